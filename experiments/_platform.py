"""Where JAX computes: the flag --platform, and a clear word where it is not what one expects."""

from typing import Any

import jax
from absl import flags

from experiments import runs

PLATFORM = flags.DEFINE_enum(
    "platform",
    None,
    ("cpu", "gpu", "tpu"),
    "Where JAX computes: there, or not at all. Without it, on the best there is.",
)

_REMEDIES = {
    "gpu": "pip install 'sgd_jax[cuda13]', or 'sgd_jax[cuda12]' where the driver is older than 580",
    "tpu": "pip install 'sgd_jax[tpu]'",
}


def choose(platform: str | None) -> None:
    """Makes JAX compute on a platform; to be called before it makes its first array.

    Args:
      platform: `cpu`, `gpu` or `tpu`; None: what JAX takes by itself, or JAX_PLATFORMS says.

    Raises:
      ValueError: JAX cannot compute there; says what it found, and what to do.
    """
    if platform is None:
        return
    if platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
        return
    # All that there is, as JAX's setting names plugins, of which a GPU may have one or the other.
    jax.config.update("jax_platforms", "")
    try:
        found = jax.default_backend()
    except RuntimeError as error:  # there is a plugin, and it fails
        found = f"none that works ({error})"
    if found == platform:
        return
    seen = [name for name in runs.find_accelerators() if platform.upper() in name]
    there = f", although this machine seems to have {' and '.join(seen)}" if seen else ""
    raise ValueError(
        f"platform is {platform!r}, but the best that JAX finds is {found}{there}; expected a "
        f"{platform.upper()} that it can use. Install a JAX made for it, {_REMEDIES[platform]}, "
        "or leave out --platform"
    )


def warning_of_fallback(device: dict[str, Any]) -> str | None:
    """Returns what to tell a user whose run is on the CPU for want of a better JAX, if it is.

    Args:
      device: As in `runs.describe_environment`.
    """
    unused = device.get("unused")
    if not unused:
        return None
    kind = "tpu" if all("TPU" in name for name in unused) else "gpu"
    return (
        f"warning: JAX computes on the CPU, although this machine seems to have "
        f"{' and '.join(unused)}. Install a JAX made for it, {_REMEDIES[kind]}, or say "
        "--platform=cpu"
    )

"""Several processes and devices for one run: their flags, and how the program joins them."""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax
from absl import flags
from jax.sharding import Mesh

from sgd_jax.distributed import processes, sharding

_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "host:port of process 0, the same for all processes; or auto, alone, where SLURM, Kubernetes, "
    "MPI or a TPU pod tells which there are. Start the program once on each host, with the same "
    "settings.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Which of them this is, from 0; that one writes and prints."
)
_PEER_TIMEOUT = flags.DEFINE_integer(
    "peer_timeout",
    30,
    "Seconds without a sign of life after which a process counts as lost, and the others end.",
)
_JOIN_TIMEOUT = flags.DEFINE_integer("join_timeout", 300, "Seconds to wait for all to come.")
_NUM_DEVICES = flags.DEFINE_integer(
    "num_devices",
    None,
    "Devices of one process that share each mini-batch, 1 by default; several processes use all "
    "that they have.",
)
HEADING = "Several devices, several hosts"
GROUPS = {
    HEADING: (
        _COORDINATOR,
        _NUM_PROCESSES,
        _PROCESS_ID,
        _PEER_TIMEOUT,
        _JOIN_TIMEOUT,
        _NUM_DEVICES,
    )
}


_MAY_DIFFER = {_PROCESS_ID.name, "data_dir", "peer_timeout", "join_timeout", "coordinator"}
"""Flags that need not be equal in all processes: of the data, the contents are compared."""


def initialize(groups: Mapping[str, Sequence[flags.FlagHolder]], program: str) -> None:
    """Joins the processes, where the flags say so; all but the first fall silent.

    Args:
      groups: Flags that the program reads; without ours nothing is joined.
      program: Its name.

    Raises:
      ValueError: flags that do not go together; processes that run different programs or settings.
      TimeoutError: not all processes came.
    """
    if HEADING not in groups:
        return
    if _COORDINATOR.value is not None:
        _keep_stdout_for_python()
    processes.initialize(
        _COORDINATOR.value,
        _NUM_PROCESSES.value,
        _PROCESS_ID.value,
        peer_timeout=_PEER_TIMEOUT.value,
        join_timeout=_JOIN_TIMEOUT.value,
    )
    settings = {
        holder.name: holder.value
        for group in groups.values()
        for holder in group
        if holder.name not in _MAY_DIFFER
    }
    processes.check_same({"the program": program} | settings)
    if not processes.is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until the process ends


def _keep_stdout_for_python() -> None:
    """Sends what libraries print to stderr: Gloo has a line for each connection."""
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = open(own, "w", encoding=sys.stdout.encoding, errors="replace")  # noqa: SIM115


def make_mesh(given: dict[str, Any]) -> Mesh | None:
    """Returns the devices to compute on, or None for one; takes our flags out of ``given``.

    Raises:
      ValueError: more devices than there are, or their number with several processes.
    """
    for holder in GROUPS[HEADING]:
        given.pop(holder.name, None)
    number, available = _NUM_DEVICES.value, jax.device_count()
    if jax.process_count() > 1:
        if number is not None:
            raise ValueError(
                f"num_devices is {number}; leave it out with several processes, which use all "
                "devices that they have"
            )
        return sharding.data_mesh()
    if number is not None and not 1 <= number <= available:
        there = "is 1 device" if available == 1 else f"are {available} devices"
        remedy = (
            f"JAX_NUM_CPU_DEVICES={number} in the environment makes {number} of a CPU"
            if number > available and jax.default_backend() == "cpu"
            else "Leave it out to use one"
        )
        raise ValueError(
            f"num_devices is {number}; expected at least 1 and at most what this process has, and "
            f"there {there} ({jax.devices()[0].device_kind}). {remedy}"
        )
    return sharding.data_mesh(jax.devices()[:number]) if (number or 1) > 1 else None


_LOSS = re.compile(r"gloo|nccl|heartbeat|coordination|connection|preempt", re.IGNORECASE)
"""What the errors say that JAX raises where another process does not answer."""


def is_loss(error: Exception) -> bool:
    """Whether an error says that another process of this run is lost."""
    return jax.process_count() > 1 and _LOSS.search(str(error)) is not None


def leave_the_lost(error: Exception) -> NoReturn:
    """Says that another process is lost, and ends this one: at its exit JAX would wait for all."""
    reason = str(error).splitlines()[0]
    print(
        f"error: process {jax.process_index()} has lost another process of its run "
        f"({reason:.200}). What was saved is kept: start all processes again, with --resume where "
        "they train",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)

"""Several processes that compute as one, on one host or on many: joining them, and agreeing.

All run the same program on the same settings; JAX's own runtime makes their devices one set. What
must happen once, such as writing a file, the first process does, and tells the others.
"""

import contextlib
import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from sgd_jax import _validate

AUTO = "auto"
"""As coordinator: lets JAX find the processes, as SLURM, Kubernetes, MPI or a TPU pod name them."""

_PAUSE = 0.2  # seconds between two looks for process 0

Value = TypeVar("Value")


class OtherProcessError(RuntimeError):
    """Something failed in another process; the message says what and where."""


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    peer_timeout: int = 30,
    join_timeout: int = 300,
) -> None:
    """Joins the processes of one computation, by `jax.distributed.initialize`.

    Call it before anything else of JAX. Without arguments nothing is joined, and the process
    computes alone. Where process 0 can be reached and another does not come, those who wait say so
    and end with exit code 1, for JAX, which cannot be interrupted there, would abort them.

    Args:
      coordinator: address ``host:port`` of process 0, where a port must be free; or `AUTO`, alone,
        on SLURM, Kubernetes, under MPI or in a TPU pod.
      num_processes: how many there are.
      process_id: which of them this is, from 0.
      peer_timeout: seconds without a sign of life after which a process counts as lost; the others
        then end.
      join_timeout: seconds to wait for all to come.

    Raises:
      ValueError: some arguments without the others, or out of range; a host that nobody knows;
        `AUTO` where there is nothing to be found; processes that run different versions, JAX
        settings or numbers of devices, see `check_same`.
      OSError: process 0 cannot have the port.
      TimeoutError: process 0 could not be reached in time.
      RuntimeError: the processes were joined already, or JAX has computed already.
    """
    given = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    present = [name for name, value in given.items() if value is not None]
    if not present:
        return
    timeouts: Any = {
        "heartbeat_timeout_seconds": _validate.positive_int("peer_timeout", peer_timeout),
        "initialization_timeout": _validate.positive_int("join_timeout", join_timeout) + 60,
        "shutdown_timeout_seconds": peer_timeout,
    }
    if coordinator == AUTO:
        if len(present) > 1:
            raise ValueError(
                f"coordinator is {AUTO}, which finds {present[1]} too; leave {present[1]} out, or "
                "give the address of process 0"
            )
        try:
            with _ended_after(join_timeout, "a process"):
                jax.distributed.initialize(**timeouts)
        except ValueError as error:
            raise ValueError(
                f"coordinator is {AUTO}, but neither SLURM, Kubernetes, MPI nor a TPU pod tells "
                f"which processes there are ({error}); give coordinator as host:port, "
                "num_processes and process_id"
            ) from error
        check_same(_environment(), "versions, JAX settings and devices")
        return
    missing = [name for name in given if name not in present]
    if missing:
        raise ValueError(
            f"{' and '.join(present)} given without {' and '.join(missing)}; give all three, or "
            f"coordinator={AUTO} alone"
        )
    host, _, port = str(coordinator).rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(
            f"coordinator is {coordinator!r}; expected host:port of process 0, as in 10.0.0.1:1234"
        )
    count = _validate.positive_int("num_processes", num_processes)
    if isinstance(process_id, bool) or not hasattr(process_id, "__index__"):
        raise TypeError(f"process_id must be a whole number, got {process_id!r}")
    if not 0 <= int(process_id or 0) < count:
        raise ValueError(
            f"process_id is {process_id}; expected 0 to num_processes − 1 = {count - 1}"
        )
    began = time.monotonic()
    host = host.strip("[]")
    _check_host(str(coordinator), host, int(port))
    if process_id == 0:
        _check_port(str(coordinator), int(port))
    else:
        _await_first(str(coordinator), host, int(port), join_timeout)
    left = max(1.0, join_timeout - (time.monotonic() - began))
    with _ended_after(left, f"process {process_id} of {count}"):
        jax.distributed.initialize(coordinator, count, process_id, **timeouts)
    check_same(_environment(), "versions, JAX settings and devices")


def _check_port(coordinator: str, port: int) -> None:
    """Raises OSError where this process could not have the port; JAX would crash."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise OSError(
                f"coordinator is {coordinator}, but process 0 cannot have port {port} "
                f"({error.strerror}); give all processes another one"
            ) from error


def _check_host(coordinator: str, host: str, port: int) -> None:
    """Raises ValueError where nobody knows the host of process 0."""
    try:
        socket.getaddrinfo(host, port)
    except OSError as error:
        raise ValueError(
            f"coordinator is {coordinator}, but no host {host!r} is known here ({error.strerror}); "
            "expected host:port of process 0, as in 10.0.0.1:1234"
        ) from error


def _await_first(coordinator: str, host: str, port: int, timeout: float) -> None:
    """Waits so many seconds for process 0 to listen; then raises TimeoutError."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout).close()
        except OSError as error:
            if time.monotonic() + _PAUSE > deadline:
                raise TimeoutError(
                    f"no process 0 was found at {coordinator} in {timeout} s ({error}); expected "
                    "it to run there, and its port to be open to this host"
                ) from error
            time.sleep(_PAUSE)
        else:
            return


@contextlib.contextmanager
def _ended_after(seconds: float, who: str) -> Iterator[None]:
    """Ends this process, with a message, where the others have not come by then."""

    def end() -> None:
        print(
            f"error: {who} has waited for the others, and not all came in time. Start all with the "
            "same coordinator and num_processes, and each with a process_id of its own",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    watch = threading.Timer(seconds, end)
    watch.daemon = True
    watch.start()
    try:
        yield
    finally:
        watch.cancel()


def is_first() -> bool:
    """Whether this is the process that writes and prints: process 0, or the only one."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def from_first(function: Callable[[], Value]) -> Value:
    """Calls a function in the first process alone, and returns in all what it returned.

    All processes must come here. Where there are several, tuples come back as lists.

    Args:
      function: what it returns can be written as JSON.

    Raises:
      OtherProcessError: in the other processes, where the function raised in the first, which
        raises what it raised.
    """
    if jax.process_count() == 1:
        return function()
    error = None
    message: dict[str, Any] = {}
    if is_first():
        try:
            message = {"value": function()}
        except Exception as raised:  # the others wait to be told
            error, message = raised, {"error": str(raised)}
    message = json.loads(_from_first(json.dumps(message).encode()))
    if error is not None:
        raise error
    if "error" in message:
        raise OtherProcessError(f"in process 0: {message['error']}")
    return message["value"]


def in_all(function: Callable[[], Value]) -> Value:
    """Calls a function in every process, and returns if none raised; all must come here.

    Raises:
      OtherProcessError: it raised in another process; where it raised itself, a process raises
        what was raised.
    """
    if jax.process_count() == 1:
        return function()
    error, value = None, None
    try:
        value = function()
    except Exception as raised:
        error = raised
    failed = np.asarray(multihost_utils.process_allgather(np.int32(error is not None)))
    if error is not None:
        raise error
    if failed.any():
        raise OtherProcessError(f"process {int(np.argmax(failed))} failed; see its own output")
    return value  # pyright: ignore[reportReturnType]


def check_same(facts: Mapping[str, Any], what: str = "settings") -> None:
    """Checks that facts are equal in all processes; every process must call it.

    Each process compares the facts of all, so where one differs, all of them raise.

    Args:
      facts: values by name; two are equal if they are the same as JSON, or have the same `str`.
      what: what the facts are, for the message.

    Raises:
      ValueError: a fact differs, or is missing somewhere; names each, with its values and the
        processes that have them.
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return  # asked in this order: counting starts JAX, before --platform has its say
    _check_device_counts(Counter(device.process_index for device in jax.devices()))
    own = {name: json.dumps(value, default=str, sort_keys=True) for name, value in facts.items()}
    differences = describe_differences([json.loads(text) for text in _from_all(json.dumps(own))])
    if differences:
        raise ValueError(
            f"the {jax.process_count()} processes were started differently: {differences}. Start "
            f"all of them with the same {what}"
        )


def describe_differences(facts: Sequence[Mapping[str, str]]) -> str:
    """Returns which facts differ between processes, or "" if none does.

    Args:
      facts: of each process, by name.

    >>> describe_differences([{"seed": "0", "m": "10"}, {"seed": "1", "m": "10"}])
    'seed is 0 in process 0 and 1 in process 1'
    """
    sentences = []
    for name in dict.fromkeys(name for mapping in facts for name in mapping):
        processes_by_value: dict[str, list[int]] = {}
        for index, mapping in enumerate(facts):
            processes_by_value.setdefault(mapping.get(name, "missing"), []).append(index)
        if len(processes_by_value) > 1:
            parts = (
                f"{value} in {_name_processes(indices)}"
                for value, indices in processes_by_value.items()
            )
            sentences.append(f"{name} is {' and '.join(parts)}")
    return "; ".join(sentences)


def _name_processes(indices: Sequence[int], most: int = 4) -> str:
    """Returns such as "processes 0, 2, 3"; of many the first few and how many more."""
    shown = ", ".join(map(str, indices[:most]))
    more = f" and {len(indices) - most} more" if len(indices) > most else ""
    return f"process{'es' * (len(indices) > 1)} {shown}{more}"


def _check_device_counts(counts: Mapping[int, int]) -> None:
    """Raises ValueError unless every process has the same number of devices."""
    facts = [{"the number of devices": str(counts[index])} for index in sorted(counts)]
    if differences := describe_differences(facts):
        raise ValueError(
            f"the processes have different devices: {differences}. Give each the same number: on "
            "CPUs by JAX_NUM_CPU_DEVICES, on GPUs by CUDA_VISIBLE_DEVICES"
        )


_PACKAGES = ("jax", "jaxlib", "numpy", "optax", "sgd_jax")
_JAX_SETTINGS = (
    "jax_enable_x64",
    "jax_default_dtype_bits",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion",
)


def _environment() -> dict[str, Any]:
    """Returns what must be equal in all processes whatever they compute."""
    facts: dict[str, Any] = {}
    for package in _PACKAGES:
        try:
            facts[f"the version of {package}"] = metadata.version(package)
        except metadata.PackageNotFoundError:  # a checkout that is not installed
            facts[f"the version of {package}"] = None
    settings = jax.config.values
    facts |= {name: settings[name] for name in _JAX_SETTINGS if name in settings}
    sources = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        sources.update(path.read_bytes())
    facts["the source of sgd_jax (SHA-256)"] = sources.hexdigest()[:12]
    facts["the kind of device"] = jax.local_devices()[0].device_kind
    return facts


def _from_all(text: str) -> list[str]:
    """Returns the text of each process, in their order."""
    own = text.encode()
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(own))))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(own)] = np.frombuffer(own, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded), np.uint8)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def _from_first(text: bytes) -> bytes:
    """The bytes of process 0, which alone knows their number."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(size, np.uint8)
    if is_first():
        padded[:] = np.frombuffer(text, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8))

"""SIGINT and SIGTERM: a program stops at once, but never in the middle of saving."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_shields = 0
_arrived: int | None = None


class Stopped(KeyboardInterrupt):
    """A signal asks the program to end. Like its base class no `Exception`: nothing swallows it."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number
        """By the custom of shells: 130 after SIGINT, 143 after SIGTERM."""


def exit_code(error: KeyboardInterrupt) -> int:
    """Returns the code to leave with: of `Stopped` its own, 130 of a plain KeyboardInterrupt."""
    return error.exit_code if isinstance(error, Stopped) else 128 + signal.SIGINT


def install() -> None:
    """Lets the first signal raise `Stopped` in the main thread, and the second end the process.

    The second needs no help of the main thread, which may be in a long call of a compiled program
    or of the compiler, where Python runs no handlers. A signal that was ignored when the program
    started, as under nohup, stays ignored.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    take()
    signal.signal(signal.SIGALRM, _raise_again)
    sys.unraisablehook = _on_unraisable
    threading.Thread(target=_end_at_the_second, args=(reading,), daemon=True).start()


def take() -> None:
    """Takes the signals back from `jax.distributed.initialize`, which makes SIGTERM its own."""
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _on_signal)


def _end_at_the_second(reading: int) -> None:
    count = 0
    while arrived := os.read(reading, 1):
        count += arrived[0] in _SIGNALS
        if count == 2:
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"error: stopped at once\n")
            os._exit(128 + arrived[0])


def _on_signal(number: int, frame: FrameType | None) -> None:
    del frame
    _deliver(number)


def _deliver(number: int) -> None:
    """Raises `Stopped`, once for a signal, or leaves that to the end of the shield."""
    global _arrived
    _arrived = number if _shields else None
    if not _shields:
        raise Stopped(number)


def _on_unraisable(unraisable: Any) -> None:
    """Has `Stopped` raised again where Python swallowed it: in a callback of the collector, say."""
    global _arrived
    if isinstance(unraisable.exc_value, Stopped):
        _arrived = unraisable.exc_value.exit_code - 128
        signal.setitimer(signal.ITIMER_REAL, 0.01)
    else:
        sys.__unraisablehook__(unraisable)


def _raise_again(number: int, frame: FrameType | None) -> None:
    del number, frame
    if _arrived is not None:
        _deliver(_arrived)


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Puts off `Stopped` until the block is done."""
    global _shields
    _shields += 1
    try:
        yield
    finally:
        _shields -= 1
    if _arrived is not None and not _shields:
        _deliver(_arrived)


def until_ready(tree: Any) -> Any:
    """Returns ``tree`` when its arrays are computed, as `jax.block_until_ready` does.

    Meanwhile handlers of signals run, and may raise: Python runs none while it waits inside JAX, so
    another thread does that.
    """
    done = threading.Event()

    def wait() -> None:
        with contextlib.suppress(Exception):  # raised again below
            jax.block_until_ready(tree)
        done.set()

    threading.Thread(target=wait, daemon=True).start()
    done.wait()
    return jax.block_until_ready(tree)

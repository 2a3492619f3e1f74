"""A lock on a run folder: one process at a time works on it."""

import os
import socket
import time
from pathlib import Path

import filelock

from experiments.runs.files import read_json, write_json


class RunLock:
    """Held from `acquire` to `release`, or until the process ends, in whatever way it does.

    The operating system holds it (flock), so a process that was killed leaves no lock behind. The
    lock file stays. Beside it lies, while the lock is held, who holds it.

    Args:
      path: Of the run folder.
    """

    def __init__(self, path: Path):
        self._path = path
        self._lock = filelock.FileLock(path / ".lock", blocking=False, thread_local=False)
        self._owner_path = path / ".owner.json"

    def acquire(self) -> None:
        """Takes the lock; raises BlockingIOError where another holds it, and names that one."""
        try:
            self._lock.acquire()
        except filelock.Timeout as error:
            raise BlockingIOError(
                f"{self._path} is in use by {self._owner()}; expected a run that no other process "
                "works on. Wait until it ends or stop it, or start another run"
            ) from error
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        write_json(self._owner_path, owner)

    def release(self) -> None:
        """Gives the lock back, where it is held."""
        if self._lock.is_locked:
            self._owner_path.unlink(missing_ok=True)
            self._lock.release()

    def _owner(self) -> str:
        try:
            owner = read_json(self._owner_path)
            return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
        except (OSError, ValueError, KeyError):  # it has just come, or is about to go
            return "another process"

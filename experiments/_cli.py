"""What every program here does alike: help, errors of the user, keeping compiled programs."""

import contextlib
import errno
import io
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import app, flags, logging

from experiments import _platform, _processes, _signals
from experiments import runs as _runs  # noqa: F401  # says what to install where that is not done
from sgd_jax.distributed import processes

HelpGroups = Mapping[str, Sequence[flags.FlagHolder]]
"""Flags by the heading that --help shows them under."""

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


def start(
    main: Callable[..., int],
    doc: str,
    groups: HelpGroups,
    operands: str = "",
    defaults: Mapping[str, Any] = {},
) -> None:
    """Parses the command line and leaves with the exit code of ``main``; never returns.

    Exit code 2 and one message on stderr for what is wrong with the command line; 1 where the disk
    is full or fails; 130 after SIGINT (Ctrl-C) and 143 after SIGTERM, see `_signals`.

    Args:
      main: The program; its arguments are the words of the command line that are no flags.
      doc: What --help begins with.
      groups: Flags by heading.
      operands: What those words are, for a program that needs at least one; others take none.
      defaults: Of flags that have another one in this program.
    """

    def parse(argv: Sequence[str]) -> list[str]:
        if set(argv[1:]) & {"--help", "-help", "-h", "--helpshort", "--helpfull"}:
            print_or_leave(help_text(as_typed(doc), groups, defaults))
            sys.exit(0)
        try:
            rest = flags.FLAGS(list(argv))
        except flags.Error as error:
            fail(f"{describe_flag_error(error)} (--help lists the flags)")
        if operands and not rest[1:]:
            fail(f"nothing was given to work on; expected {operands}. See --help")
        if rest[1:] and not operands:
            fail(f"got {' '.join(rest[1:])!r}, which is no flag; expected --name=value. See --help")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        return rest

    def guarded(argv: Sequence[str]) -> int:
        with user_errors():
            _processes.initialize(groups, Path(argv[0]).stem)
            _signals.take()
            _platform.choose(_platform.PLATFORM.value)
        try:
            code = main(*argv[1:])
            sys.stdout.flush()
        except KeyboardInterrupt as error:
            print(f"error: {str(error) or 'interrupted'}", file=sys.stderr)
            code = _signals.exit_code(error)
        except BrokenPipeError:
            leave_closed_pipe()
        except OSError as error:
            if not is_of_disk(error):
                raise
            print(f"error: {error}. What was written before is kept", file=sys.stderr)
            code = 1
        except (RuntimeError, ValueError, MemoryError) as error:
            if _processes.is_loss(error):
                _processes.leave_the_lost(error)
            if not is_out_of_memory(error):
                raise
            print(f"error: {out_of_memory(error)}", file=sys.stderr)
            code = 1
        if code > 128:  # an epoch may be under way, which Python would wait for
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code

    print_what_can_be_printed()
    _signals.install()
    keep_compiled_programs()
    app.run(guarded, flags_parser=parse)


def as_typed(text: str) -> str:
    """Returns a text whose commands are spelled as this program was started."""
    if Path(sys.orig_argv[:2][-1]).stem != "sgd-jax":
        return text
    return re.sub(r"python -m experiments\.(\w+)", r"sgd-jax \1", text)


def print_or_leave(text: str) -> None:
    """Prints a text; ends the program if nobody reads it."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        leave_closed_pipe()


def leave_closed_pipe() -> NoReturn:
    """Ends the program quietly, as SIGPIPE would: nobody reads its output, as after `| head`."""
    os._exit(128 + signal.SIGPIPE)


_EXPECTED = {"int": "a whole number", "float": "a number", "bool": "true or false"}


def describe_flag_error(error: flags.Error) -> str:
    """Returns what is wrong with a flag in a sentence; absl passes on the words of `int`."""
    match = re.match(r"flag --(\w+)=(.*?): ", str(error), re.DOTALL)
    flag = flags.FLAGS[match[1]] if match and match[1] in flags.FLAGS else None
    expected = None if flag is None else _EXPECTED.get(flag.flag_type())
    if match is None or expected is None or isinstance(flag, flags.EnumFlag | flags.EnumClassFlag):
        return str(error)
    return f"--{match[1]}={match[2]}: expected {expected}"


def is_of_disk(error: OSError) -> bool:
    """Whether the disk is full or fails: by its number, or one of ours, a sentence without one."""
    return error.errno in _DISK_ERRORS or error.errno is None


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory, of the host or of the device, was too small."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def out_of_memory(error: Exception) -> str:
    """Returns the message for an error of memory: what was asked for, and what to try."""
    reason = str(error).partition("\n")[0] or "the system gave no reason"
    return (
        f"out of memory ({reason:.200}). Use fewer examples at a time: --stream if the data do not "
        "fit, a smaller --chunk_mib if they are streamed, a smaller --batch_size, --num_seeds or "
        "number of draws otherwise"
    )


def print_what_can_be_printed() -> None:
    """Lets a letter that the output cannot encode, as in a locale without UTF-8, print as ?."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def help_text(doc: str, groups: HelpGroups, defaults: Mapping[str, Any] = {}) -> str:
    """Returns the text of --help: what the program does, then its flags under their headings.

    ``defaults`` are those of flags that have another one in this program.
    """
    lines = [doc.strip().replace("python -m experiments.", "sgd-jax ")]
    for heading, holders in {**groups, "Machine": (_platform.PLATFORM,)}.items():
        lines += ["", f"{heading}:"]
        for holder in holders:
            flag = flags.FLAGS[holder.name]
            default = defaults.get(holder.name, flag.default)
            is_shown = default is not None and not isinstance(default, bool)
            lines += [f"  --{holder.name}={_show(default)}" if is_shown else f"  --{holder.name}"]
            lines += textwrap.wrap(
                flag.help or "", 84, initial_indent="      ", subsequent_indent="      "
            )
    return "\n".join(lines)


def _show(default: Any) -> str:
    return ",".join(map(str, default)) if isinstance(default, list | tuple) else str(default)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns an error of the checks that run before the work into a message and exit code 2.

    By the house style what a check raises names the value, what was expected and the remedy, so the
    message is all a user needs. Anything else is a fault of ours and keeps its traceback.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except processes.OtherProcessError as error:
        if processes.is_first():
            fail(str(error))
        sys.exit(2)  # the process that failed has said why
    except (ValueError, TypeError, OSError, ImportError) as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    """Leaves with exit code 2 and the message on stderr."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def use_all_cores() -> None:
    """Makes each CPU core a device, unless the environment says how many there are.

    For programs whose runs are divided among devices; to be called before JAX starts.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)


def _can_write(folder: Path) -> bool:
    """Whether files can be made in a folder, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def keep_compiled_programs() -> None:
    """Lets JAX keep what it compiles in a cache folder of the user, so the next start is quicker.

    JAX_COMPILATION_CACHE_DIR names another folder; empty, it turns the cache off, and so does a
    home that cannot be written to. All programs are
    kept, also those compiled quickly: a start has many of them.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = cache / "sgd_jax" / "compiled"
        if not _can_write(folder):  # JAX would warn of each program
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

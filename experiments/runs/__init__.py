"""What a run leaves behind: a folder of its own, metrics, checkpoints, a picture, a report."""

from importlib.util import find_spec as _find_spec

try:
    import filelock as _filelock  # noqa: F401
    import orbax.checkpoint as _orbax  # noqa: F401

    if _find_spec("matplotlib") is None:  # imported when there is something to draw, as it is slow
        raise ImportError("No module named 'matplotlib'")
except ImportError as error:
    raise ImportError(
        f"Run folders need orbax-checkpoint, matplotlib and filelock ({error}). "
        "Run: pip install 'sgd_jax[experiments]'"
    ) from error

from experiments.runs.checkpoints import Checkpoints, Snapshot, read_checkpoint
from experiments.runs.environment import describe_environment, find_accelerators
from experiments.runs.files import write_json, write_text
from experiments.runs.folder import Record, RunFolder, check_name, check_new_name, check_writable
from experiments.runs.loggers import LOGGERS, Logger, check_loggers
from experiments.runs.page import (
    GENERATOR,
    Page,
    html_figure,
    html_pairs,
    html_table,
    read_page,
    write_joined_page,
    write_page,
)
from experiments.runs.report import (
    column_labels,
    draw_learning_curve,
    format_record,
    save_figure,
    write_report,
)
from experiments.runs.summary import per_seed, summarize

__all__ = [
    "GENERATOR",
    "LOGGERS",
    "Checkpoints",
    "Logger",
    "Page",
    "Record",
    "RunFolder",
    "Snapshot",
    "check_loggers",
    "check_name",
    "check_new_name",
    "check_writable",
    "column_labels",
    "describe_environment",
    "draw_learning_curve",
    "find_accelerators",
    "format_record",
    "html_figure",
    "html_pairs",
    "html_table",
    "per_seed",
    "read_checkpoint",
    "read_page",
    "save_figure",
    "summarize",
    "write_joined_page",
    "write_json",
    "write_page",
    "write_report",
    "write_text",
]

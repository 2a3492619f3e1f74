"""How fast is it, against the obvious ways to write the same thing?

Every suite does the same work in several ways, its contenders. They take turns, round by round, in
one process, so that whatever else the machine does hits all of them alike. The tables give the
ratio first, then the median and the spread. A contender whose library is not installed is skipped
by name; one that computes something else is left out by name.

    python scripts/benchmark.py --suite=epoch --data_dir=FOLDER_OF_MNIST --out_dir=runs/benchmark
    python scripts/benchmark.py --suite=per_example --out_dir=docs/benchmarks

`epoch`: an epoch of the textbook network with m = 10, 128 and 1000, beside C, which is compiled for
it (`benchmarks/epoch.c`), NumPy and, where they are installed, optax, scikit-learn and PyTorch; and
of a wide network beside one product of as many operations; ratios to our own way. Without
--data_dir it draws pixels at random in MNIST's shape, and says so: how long an epoch takes does not
depend on what the pixels show. About three minutes on two cores.

`per_example`: what per-example gradients cost; ratios to the plain gradient of the mean cost, each
library's to its own. PyTorch, Opacus and BackPACK take part where they are installed. About fifteen
minutes on two cores; --tables=mlp,conv takes some of its tables.

`moments`: moments of 50,000 gradients of the textbook network; ratios to the full gradient alone.
About a minute on two cores.

`startup`: from the start of Python to the first step; ratios to `import jax` and one compiled step.
About a minute on two cores.

`sweep`: an epoch of 32 runs as one program, beside single runs; times are per run. Each core is a
device. About a minute on two cores.

`gpu`: an epoch at batch sizes from 10 to 50,000, sweeps of 1 to 1,024 runs, per-example gradients
and moments on an accelerator, the data on it too; beside PyTorch eager, compiled and as CUDA
graphs. Without an accelerator it refuses, or with --tiny runs tiny sizes to try the code. About ten
minutes; --tables=gpu_epoch,gpu_sweep takes the first two tables.

`models`: models that other people wrote, from the packages of the extra `models`; a model whose
package is missing is skipped by name, one that raises is a row that says so. Exactness of every
method in float64; time, compile time and memory beside the plain gradient and `vmap(grad)`. Rows
are appended to models.jsonl of --out_dir, and models.md shows the last row of each model. About an
hour on two cores; --models=jraph,transformers.bert takes some.

A picture of what lies in a folder, ratios as bars, is drawn by

    python scripts/benchmark.py --out_dir=FOLDER --figure=docs/figures/benchmark.png

A suite is one function that returns a list of `Suite`, named in `SUITES`.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import app, flags

from benchmarks import harness, models, models_table
from benchmarks.epoch import epoch_suites
from benchmarks.gpu import gpu_suites
from benchmarks.moments import moments_suites
from benchmarks.per_example import per_example_suites
from benchmarks.start_up import start_up_suites
from benchmarks.sweep import sweep_suites

SUITES = {
    "epoch": epoch_suites,
    "per_example": per_example_suites,
    "moments": moments_suites,
    "startup": start_up_suites,
    "sweep": sweep_suites,
    "gpu": gpu_suites,
}


def write(name: str, results: list[dict], where: dict, folder: Path) -> None:
    """Writes results of `measure` into a folder, made if need be: <name>.json and <name>.md."""
    folder.mkdir(parents=True, exist_ok=True)
    report = json.dumps(where | {"tables": results}, indent=2)
    (folder / f"{name}.json").write_text(report + "\n")
    (folder / f"{name}.md").write_text(harness.as_markdown(results, where) + "\n")


def run_models(names: Sequence[str], num_rounds: int, folder: Path) -> None:
    """Runs the suite `models` and writes models.jsonl and models.md into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / "models.jsonl"
    try:
        models.run(names, num_rounds, lines)
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    if not lines.exists():
        sys.exit("error: no model is installed; pip install 'sgd_jax[models]'")
    table = models_table.as_markdown(models_table.latest(lines))
    (folder / "models.md").write_text(table + "\n")
    print(table)


def draw(folder: str | None, path: Path) -> None:
    """Draws what lies in a folder; without the folder, or anything in it, leaves with an error."""
    if folder is None:
        raise app.UsageError("--figure draws what lies in --out_dir; expected that too")
    from benchmarks.figure import draw_figure  # what it needs, timing does not

    try:
        headings = draw_figure(Path(folder), path)
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
    print("\n".join([*headings, f"figure: {path}"]))


def define_flags() -> None:
    """Defines the flags: called by the program, not on import, as other programs share names."""
    flags.DEFINE_enum("suite", "epoch", [*SUITES, "models"], "What to time.")
    flags.DEFINE_list("tables", [], "Only these tables of the suite; without it all.")
    flags.DEFINE_list("models", [], "With --suite=models: names of models or packages; else all.")
    flags.DEFINE_string("data_dir", None, "Folder of MNIST; without it random pixels.")
    flags.DEFINE_bool("tiny", False, "With --suite=gpu: tiny sizes on any device, to try the code.")
    flags.DEFINE_integer("num_rounds", 7, "Timed rounds.", lower_bound=1)
    flags.DEFINE_bool("keep_freed_memory", True, "Whether glibc keeps large freed blocks.")
    flags.DEFINE_string("out_dir", None, "Where to write <suite>.json and <suite>.md.")
    flags.DEFINE_string("figure", None, "PNG file to draw from --out_dir; then nothing is timed.")


def main(argv: Sequence[str]) -> None:
    """Times the suite asked for, prints its tables and writes them where asked."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    values = flags.FLAGS
    if values.figure is not None:
        draw(values.out_dir, Path(values.figure))
        return
    if values.suite == "sweep":
        jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    if values.tiny and values.suite != "gpu":
        raise app.UsageError(f"--tiny is for --suite=gpu, got --suite={values.suite}")
    if values.suite == "models":
        run_models(values.models, values.num_rounds, Path(values.out_dir or "runs/benchmark"))
        return
    try:
        options = {"tiny": values.tiny} if values.suite == "gpu" else {}
        suites = SUITES[values.suite](values.data_dir, **options)
    except RuntimeError as error:
        sys.exit(f"error: {error}")
    unknown = set(values.tables) - {suite.name for suite in suites}
    if unknown:
        names = ", ".join(suite.name for suite in suites)
        raise app.UsageError(f"--tables: expected some of {names}, got {', '.join(unknown)}")
    where, results = harness.circumstances(), []
    where["keeps_freed_memory"] = values.keep_freed_memory and harness.keep_freed_memory()
    for suite in suites:
        if suite.name in (values.tables or [suite.name]):
            results.append(harness.measure(suite, values.num_rounds))
            print(harness.as_markdown(results[-1:], where), flush=True)
            if values.out_dir is not None:
                write(values.suite, results, where, Path(values.out_dir))


if __name__ == "__main__":
    define_flags()
    app.run(main)

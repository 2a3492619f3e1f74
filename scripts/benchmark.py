"""Runs the benchmarks of a clone: the same as ``python -m benchmarks``; see `benchmarks.__main__`.

python scripts/benchmark.py --suite=epoch --out_dir=runs/benchmark
"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    runpy.run_module("benchmarks", run_name="__main__", alter_sys=True)

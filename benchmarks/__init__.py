"""The suites of scripts/benchmark.py, and the harness that times them."""

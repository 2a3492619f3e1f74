"""A run in a few numbers, from its lines of metrics."""

import statistics
from typing import Any

from experiments.runs.folder import Record


def summarize(records: list[Record], first_seed: int = 0) -> dict[str, Any]:
    """Returns what a run came to, ready for JSON.

    Accuracies are fractions; each is the median over the seeds, which for one seed is its own.
    `best_test_accuracy` is the best of all epochs, chosen on the test set as the book does, so it
    flatters; `test_accuracy_at_best_validation` is free of that choice. Epoch 0, the random
    network, counts. A seed is *stuck* when its final network gets fewer than one in ten
    examples right of some class in the test set: an output neuron died, or has yet to wake.

    Args:
      records: Lines of metrics of all epochs, first to last; at least one.
      first_seed: The seed of the first run.

    Returns:
      A dict with `epochs`, `best_test_accuracy`, `best_epoch` (the first with the highest median
      test accuracy), `final_test_accuracy`, `best_validation_epoch`,
      `test_accuracy_at_best_validation`, `num_seeds`, `num_stuck`, `stuck_seeds`, `spread` (of
      best and final test accuracy each `median`, `min`, `max`, `per_seed`) and `seconds` (of
      training, all epochs and seeds together; without compiling, evaluating and saving).
    """
    test = [per_seed(record["accuracy_test"]) for record in records]
    median_test = [statistics.median(values) for values in test]
    median_validation = [statistics.median(per_seed(r["accuracy_validation"])) for r in records]
    best = _spread([max(values) for values in zip(*test, strict=True)])
    final = _spread(test[-1])
    best_validation = median_validation.index(max(median_validation))
    dead = per_seed(records[-1]["dead_classes_test"])
    stuck = [first_seed + i for i, count in enumerate(dead) if count > 0]
    return {
        "epochs": records[-1]["epoch"],
        "best_test_accuracy": best["median"],
        "best_epoch": records[median_test.index(max(median_test))]["epoch"],
        "final_test_accuracy": final["median"],
        "best_validation_epoch": records[best_validation]["epoch"],
        "test_accuracy_at_best_validation": median_test[best_validation],
        "num_seeds": len(dead),
        "num_stuck": len(stuck),
        "stuck_seeds": stuck,
        "spread": {"best_test_accuracy": best, "final_test_accuracy": final},
        "seconds": sum(record["seconds"] for record in records),
    }


def per_seed(value: Any) -> list[Any]:
    """Returns one value a seed: a line of metrics holds a list for several, the value for one."""
    return value if isinstance(value, list) else [value]


def _spread(values: list[float]) -> dict[str, Any]:
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "per_seed": list(values),
    }

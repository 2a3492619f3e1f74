"""What every source returns, and the one check they share."""

from typing import NamedTuple

import numpy as np


class Examples(NamedTuple):
    """n examples, one a row; a pytree.

    Attributes:
      inputs: (n, num_features), uint8, float32 or float64; finite, not yet divided by the scale.
      labels: (n,), int32, each in 0 … num_classes − 1.
    """

    inputs: np.ndarray
    labels: np.ndarray


class Dataset(NamedTuple):
    """Three disjoint sets of examples with the same features and classes.

    Attributes:
      name: What it was loaded as: `digits`, `mnist`, `fashion_mnist`, or the stem of a file.
      train: What gradients see.
      validation: What choices are made on.
      test: What is reported.
      num_classes: Labels are 0 … num_classes − 1.
      scale: The network sees `inputs / scale`; whole-number pixels thereby land in [0, 1].
    """

    name: str
    train: Examples
    validation: Examples
    test: Examples
    num_classes: int
    scale: float


def check_labels(name: str, labels: np.ndarray, num_classes: int, first: int = 0) -> np.ndarray:
    """Returns `labels` as int32, or raises ValueError at the first outside 0 … num_classes − 1.

    ``first`` is the number of the first of them.
    """
    bad = (labels < 0) | (labels >= num_classes)
    if bad.any():
        index = int(np.argmax(bad))
        raise ValueError(
            f"{name}[{first + index}] is {labels[index]}; expected labels from 0 to "
            f"{num_classes - 1}. Number the classes from 0, and check that this is the file of "
            "labels."
        )
    return labels.astype(np.int32)

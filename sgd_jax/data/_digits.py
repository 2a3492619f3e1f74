"""scikit-learn's embedded handwritten digits: nothing to download."""

import gzip
from importlib import metadata

import numpy as np

from sgd_jax.data._examples import Dataset, Examples

_FILE = "sklearn/datasets/data/digits.csv.gz"


def load_digits() -> Dataset:
    """Returns the 1,797 digits of 8 × 8 pixels, split within each class; see `load`."""
    table = _read_table()
    inputs, labels = table[:, :-1], table[:, -1]
    examples = Examples(np.asarray(inputs, np.uint8), np.asarray(labels, np.int32))

    position = np.empty_like(examples.labels)  # of an example among those of its class
    for label in range(10):
        members = np.flatnonzero(examples.labels == label)
        position[members] = np.arange(len(members))
    train, validation, test = (
        Examples(examples.inputs[chosen], examples.labels[chosen])
        for chosen in (position % 6 < 4, position % 6 == 4, position % 6 == 5)
    )
    return Dataset("digits", train, validation, test, num_classes=10, scale=16.0)


def _read_table() -> np.ndarray:
    """Returns the digits, a row each: 64 pixels and the label.

    Scikit-learn's file is read without importing scikit-learn, which takes longer than JAX itself.
    """
    try:
        file = metadata.distribution("scikit-learn").locate_file(_FILE)
        with gzip.open(str(file), "rt") as lines:
            return np.loadtxt(lines, delimiter=",")
    except (metadata.PackageNotFoundError, FileNotFoundError):  # it may be there in another form
        return _ask_scikit_learn()


def _ask_scikit_learn() -> np.ndarray:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            "The data set 'digits' comes with scikit-learn, which is not installed. "
            "Run: pip install 'sgd_jax[experiments]'"
        ) from error
    inputs, labels = datasets.load_digits(return_X_y=True)
    return np.column_stack([inputs, labels])

"""scikit-learn's embedded handwritten digits: nothing to download."""

import numpy as np

from sgd_jax.data.examples import Dataset, Examples


def load_digits() -> Dataset:
    """Returns the 1,797 digits of 8 × 8 pixels, split within each class; see `load`."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            "The data set 'digits' comes with scikit-learn, which is not installed. "
            "Run: pip install 'sgd_jax[experiments]'"
        ) from error
    inputs, labels = datasets.load_digits(return_X_y=True)
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

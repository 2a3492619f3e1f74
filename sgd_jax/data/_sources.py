"""`load`: the one door to every source of examples."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

from sgd_jax.data._digits import load_digits
from sgd_jax.data._examples import Dataset
from sgd_jax.data._folder import open_folder, read_rows
from sgd_jax.data._mnist import SOURCES, load_mnist, open_mnist
from sgd_jax.data._npz import load_npz

NAMES = ("digits", *SOURCES)
"""The data sets that have a name."""


def load(
    dataset: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = True,
) -> Dataset:
    """Returns training, validation and test examples, split without any randomness.

    - `digits`: scikit-learn's 1,797 digits of 8 × 8 pixels 0 … 16, uint8, scale 16. Of the
      examples of each class, numbered k = 0, 1, … in file order, those with k mod 6 = 4 validate,
      k mod 6 = 5 test, and the rest train: 1,204 / 297 / 296.
    - `mnist`, `fashion_mnist`: 28 × 28 pixels 0 … 255, uint8, scale 255. The first 50,000 of the
      training file train, its last 10,000 validate, the test file's 10,000 test.
    - a folder: the same arrays, each a file of its own, `x_train.npy`, or in shards of any number,
      `x_train-000.npy`, `x_train-001.npy`, …, taken in the order of their names; beside each a
      shard of labels, `y_train-000.npy`, …, with as many rows. IDX files, named `.idx`, will do.
    - a path ending in `.npz`: arrays `x_train`, `y_train`, `x_test`, `y_test`, and optionally
      `x_validation`, `y_validation`; other arrays are ignored. `x_*` is (n, ...), flattened to
      (n, num_features), all of one dtype: uint8 (scale 255), float32, float64, or float16, which
      becomes float32 (scale 1). `y_*` is (n,), integers. The classes are 0 … max(y_train).
      Without validation arrays the last tenth of the training examples, rounded down but at
      least one, is held out: shuffle before writing the file. Pickles are never read.

    MNIST is looked for in `data_dir/<dataset>/`, then in `data_dir`: all four IDX files in the one
    or in the other, gzipped or not. Otherwise the missing ones are downloaded to the former, from
    the first of two mirrors whose file has the right checksum, under a temporary name until then.
    A file that exists is never written to.

    Args:
      dataset: `digits`, `mnist`, `fashion_mnist`, or the path of an `.npz` file or of a folder.
      data_dir: Folder of the MNIST files; by default a cache folder of the user. The other data
        sets do not use it.
      download: Whether missing MNIST files may be fetched.

    Returns:
      The data set; labels are int32, inputs as stored: divide them by `scale`.

    Raises:
      ValueError: An unknown name; a damaged, empty or mismatched file; labels outside the
        classes; NaN or infinity among the inputs.
      TypeError: A dtype other than those above.
      FileNotFoundError: There is no folder `data_dir`; files are missing and could not be, or were
        not to be, downloaded.
      ImportError: scikit-learn or pooch is needed and missing.

    Example:
      >>> digits = load("digits")
      >>> digits.train.inputs.shape, digits.validation.inputs.shape, digits.test.inputs.shape
      ((1204, 64), (297, 64), (296, 64))
      >>> float(digits.train.inputs.max() / digits.scale)
      1.0

    Sources: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998.
    Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-based learning applied to document
    recognition", 1998. H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST", arXiv:1708.07747. The
    split of MNIST: M. Nielsen, "Neural Networks and Deep Learning", chapter 1.
    """
    name = os.fspath(dataset)
    if name == "digits":
        return load_digits()
    if name in SOURCES:
        return load_mnist(name, _existing_folder(data_dir), download)
    path = Path(name).expanduser()
    if path.is_dir():
        return read_rows(open_folder(path))
    if name.lower().endswith(".npz"):
        return load_npz(path)
    raise ValueError(
        f"dataset is {name!r}; expected digits, {', '.join(SOURCES)}, the path of an .npz file or "
        f"that of a folder with x_train.npy and the like. {_remedy(name, NAMES)}"
    )


def open_dataset(
    dataset: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = True,
) -> Dataset:
    """Returns the same examples as `load`, which stay on the disk: for data larger than memory.

    The inputs and labels of each part are `Rows`, which stand in for the arrays: they have their
    length, shape and dtype, and read what is asked for. Before this returns, every header has been
    held against its file, and all labels, and inputs that are not whole numbers, have been read
    once and checked.

    Args:
      dataset: A folder of `.npy` or IDX shards, or `mnist` or `fashion_mnist`, whose IDX files then
        must not be gzipped. What else `load` takes is in memory anyway.
      data_dir: As for `load`.
      download: As for `load`. What is downloaded is gzipped: unpack it.

    Raises:
      ValueError: The data set cannot be mapped, or for what `load` raises it.
      TypeError, FileNotFoundError, ImportError: As `load`.
    """
    name = os.fspath(dataset)
    if name in SOURCES:
        return open_mnist(name, _existing_folder(data_dir), download)
    path = Path(name).expanduser()
    if path.is_dir():
        return open_folder(path)
    raise ValueError(
        f"dataset is {name!r}, which cannot be streamed; expected {', '.join(SOURCES)} or the path "
        f"of a folder with x_train.npy and the like. {_remedy(name, SOURCES)}"
    )


def _remedy(name: str, names: Iterable[str]) -> str:
    """Returns what to do about a name that is not known, or known only to `load`."""
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"Did you mean {close[0]}?"
    return "Write data of your own with np.save; an .npz file is always read into memory"


def _existing_folder(data_dir: str | os.PathLike[str] | None) -> Path | None:
    """Returns the folder given; raises FileNotFoundError if there is none, before any download."""
    if data_dir is None:
        return None
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data_dir is {str(data_dir)!r}, but there is no such folder; expected one that holds "
            f"the files, or that they can be downloaded to. To make it: mkdir -p {folder}"
        )
    return folder

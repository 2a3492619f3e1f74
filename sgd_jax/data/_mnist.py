"""MNIST and its twin Fashion-MNIST: four IDX files, found in a folder or fetched from a mirror."""

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from sgd_jax.data._examples import Dataset, Examples, check_labels
from sgd_jax.data._idx import read_idx
from sgd_jax.data._rows import Rows, as_examples, open_rows

_NUM_CLASSES = 10
_TRAIN_IMAGES = "train-images-idx3-ubyte"
_TRAIN_LABELS = "train-labels-idx1-ubyte"
_TEST_IMAGES = "t10k-images-idx3-ubyte"
_TEST_LABELS = "t10k-labels-idx1-ubyte"


class Source(NamedTuple):
    """Where a data set comes from and what it must be.

    Attributes:
      mirrors: Addresses of folders, tried in order.
      sha256: Of each gzipped file as the mirrors serve it, by name without `.gz`.
      train_labels_sha256: Of the training labels themselves: tells the twins apart.
      num_train: The first so many of the training file.
      num_validation: The rest of the training file.
      num_test: All of the test file.
      image_shape: Pixels.
    """

    mirrors: tuple[str, ...]
    sha256: dict[str, str]
    train_labels_sha256: str
    num_train: int = 50_000
    num_validation: int = 10_000
    num_test: int = 10_000
    image_shape: tuple[int, int] = (28, 28)


SOURCES = {
    "mnist": Source(
        mirrors=(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        sha256={
            _TRAIN_IMAGES: "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            _TRAIN_LABELS: "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            _TEST_IMAGES: "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            _TEST_LABELS: "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        },
        train_labels_sha256="1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
    ),
    "fashion_mnist": Source(
        mirrors=(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/"
            "b2617bb6d3ffa2e429640350f613e3291e10b141/data/fashion/",
        ),
        sha256={
            _TRAIN_IMAGES: "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            _TRAIN_LABELS: "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            _TEST_IMAGES: "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            _TEST_LABELS: "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        },
        train_labels_sha256="657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
    ),
}


def load_mnist(name: str, data_dir: Path | None, download: bool) -> Dataset:
    """Returns `mnist` or `fashion_mnist`; see `load`."""
    return _load(name, data_dir, download, _read_images)


def open_mnist(name: str, data_dir: Path | None, download: bool) -> Dataset:
    """Returns `mnist` or `fashion_mnist`, its arrays as `Rows`; see `open_dataset`."""
    dataset = _load(name, data_dir, download, _map_images)
    mapped: Any = dataset[1:4]
    parts = {
        part: as_examples(images, Rows([labels]))
        for part, (images, labels) in zip(dataset._fields[1:4], mapped, strict=True)
    }
    return dataset._replace(**parts)


def _load(
    name: str,
    data_dir: Path | None,
    download: bool,
    read_images: Callable[[Path, tuple[int, ...]], Any],
) -> Dataset:
    source = SOURCES[name]
    folder = Path(_import_pooch().os_cache("sgd_jax")) if data_dir is None else data_dir
    files = _find_files(name, source, folder, download)

    num_given = source.num_train + source.num_validation
    labels = _read_bytes(files[_TRAIN_LABELS], (num_given,))
    _refuse_the_other_twin(name, files[_TRAIN_LABELS], labels)
    labels = check_labels(str(files[_TRAIN_LABELS]), labels, _NUM_CLASSES)
    test_labels = _read_bytes(files[_TEST_LABELS], (source.num_test,))
    test_labels = check_labels(str(files[_TEST_LABELS]), test_labels, _NUM_CLASSES)
    inputs = read_images(files[_TRAIN_IMAGES], (num_given, *source.image_shape))
    test_inputs = read_images(files[_TEST_IMAGES], (source.num_test, *source.image_shape))
    cut = source.num_train
    return Dataset(
        name,
        train=Examples(inputs[:cut], labels[:cut]),
        validation=Examples(inputs[cut:], labels[cut:]),
        test=Examples(test_inputs, test_labels),
        num_classes=_NUM_CLASSES,
        scale=255.0,
    )


def _read_images(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    return _read_bytes(path, shape).reshape(shape[0], -1)


def _map_images(path: Path, shape: tuple[int, ...]) -> Rows:
    rows = open_rows([path])
    if rows.shape != shape:
        raise ValueError(
            f"{path} has shape {rows.shape}; expected {shape}. It is another file: "
            "delete it and fetch it again."
        )
    _check_bytes(path, rows.dtype)
    return Rows([part.reshape(len(part), -1) for part in rows.parts])


def _read_bytes(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    values = read_idx(path, shape=shape)
    _check_bytes(path, values.dtype)
    return values


def _check_bytes(path: Path, dtype: np.dtype) -> None:
    if dtype != np.uint8:
        raise TypeError(
            f"{path} holds {dtype}; expected uint8. It is another file: "
            "delete it and fetch it again."
        )


def _refuse_the_other_twin(name: str, path: Path, labels: np.ndarray) -> None:
    """Raises ValueError if these are the labels of the other data set: the files share names."""
    digest = hashlib.sha256(labels.tobytes()).hexdigest()
    for other, source in SOURCES.items():
        if other != name and digest == source.train_labels_sha256:
            raise ValueError(
                f"{path} belongs to {other}; expected {name}. Put the files of each into a "
                f"subfolder of its name, {other}/ and {name}/, of the folder given as --data_dir."
            )


def _find_files(name: str, source: Source, data_dir: Path, download: bool) -> dict[str, Path]:
    """Returns the path of each of the four files, all from one folder."""
    own_folder = data_dir / name
    for folder in (own_folder, data_dir):
        files = _existing(folder, source)
        if len(files) == len(source.sha256):
            return files
    made = [path for path in (own_folder, *own_folder.parents) if not path.exists()]
    failures = _download(source, own_folder) if download else []
    files = _existing(own_folder, source)
    missing = [f"{file}.gz" for file in source.sha256 if file not in files]
    if not missing:
        return files
    for path in made:  # for a download of which nothing came
        with contextlib.suppress(OSError):
            path.rmdir()
    lines = [
        f"{name}: files are missing from {own_folder}"
        + (" and could not be downloaded:" if download else "; downloading is off:"),
        *(f"  {file}" for file in missing),
        f"Put them, gzipped or not, into {own_folder}, or all four into {data_dir}, "
        "or say with --data_dir where they are.",
        "They are published at " + " and ".join(source.mirrors),
        *(f"  {failure}" for failure in failures),
    ]
    raise FileNotFoundError("\n".join(lines))


def _existing(folder: Path, source: Source) -> dict[str, Path]:
    candidates = {file: (folder / file, folder / f"{file}.gz") for file in source.sha256}
    return {
        file: next(path for path in paths if path.is_file())
        for file, paths in candidates.items()
        if any(path.is_file() for path in paths)
    }


def _download(source: Source, folder: Path) -> list[str]:
    """Fetches what is missing; returns what went wrong at the first file no mirror served.

    pooch writes to a temporary file in `folder`, compares the checksum, and only then renames.
    """
    pooch = _import_pooch()
    from requests import RequestException  # pooch's own dependency

    downloader = pooch.HTTPDownloader(progressbar=True)
    present = _existing(folder, source)
    for file, sha256 in source.sha256.items():
        if file in present:
            continue
        failures = []
        for mirror in source.mirrors:
            url = f"{mirror}{file}.gz"
            try:
                pooch.retrieve(url, f"sha256:{sha256}", f"{file}.gz", folder, downloader=downloader)
                break
            except (RequestException, ValueError) as error:  # ValueError: wrong checksum
                failures.append(f"{url}: {error}")
        else:
            return failures
    return []


def _import_pooch() -> ModuleType:
    try:
        import pooch
    except ImportError as error:
        raise ImportError(
            "The cache folder and the download of MNIST need pooch, which is not installed. "
            "Run: pip install 'sgd_jax[experiments]', or give --data_dir a folder with the files."
        ) from error
    return pooch

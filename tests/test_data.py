"""sgd_jax.data: the splits are as documented, and no bad file gets past the door."""

import gzip
import hashlib
import http.server
import io
import os
import re
import struct
import sys
import threading
import tracemalloc
import zipfile
from importlib import metadata

import numpy as np
import pytest

from sgd_jax.data import Dataset, load, read_idx
from sgd_jax.data import _mnist as mnist

FILES = tuple(mnist.SOURCES["mnist"].sha256)
TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = FILES
NUM_TRAIN, NUM_VALIDATION, NUM_TEST, IMAGE_SHAPE = 5, 2, 3, (2, 4)
NUM_GIVEN = NUM_TRAIN + NUM_VALIDATION
FEW_BYTES = 4 << 20


def idx_bytes(array, code=0x08, stored=">u1"):
    header = struct.pack(f">4B{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    return header + array.astype(stored).tobytes()


def parts(dataset: Dataset):
    return dataset.train, dataset.validation, dataset.test


def peak_bytes(action):
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# --- digits ---------------------------------------------------------------------------------


def test_digits_split_has_the_documented_counts_and_every_class_is_split_alike():
    dataset = load("digits")
    assert [len(part.labels) for part in parts(dataset)] == [1204, 297, 296]
    totals = sum(np.bincount(part.labels, minlength=10) for part in parts(dataset))
    for part, share in zip(parts(dataset), (4 / 6, 1 / 6, 1 / 6), strict=True):
        assert np.all(abs(np.bincount(part.labels) - share * totals) < 2)


def test_digits_split_follows_the_position_of_each_example_within_its_class():
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    inputs, labels = sklearn_datasets.load_digits(return_X_y=True)
    rows, seen = ([], [], []), [0] * 10
    for row, label in enumerate(labels):
        rows[{4: 1, 5: 2}.get(seen[label] % 6, 0)].append(row)
        seen[label] += 1
    for part, chosen in zip(parts(load("digits")), rows, strict=True):
        np.testing.assert_array_equal(part.inputs, inputs[chosen])
        np.testing.assert_array_equal(part.labels, labels[chosen])


def test_digits_are_uint8_from_0_to_the_scale_and_labels_int32():
    dataset = load("digits")
    assert (dataset.name, dataset.num_classes, dataset.scale) == ("digits", 10, 16.0)
    for part in parts(dataset):
        assert part.inputs.dtype == np.uint8
        assert part.labels.dtype == np.int32
        assert (part.inputs.min(), part.inputs.max()) == (0, dataset.scale)


def test_the_digits_are_the_same_where_scikit_learn_keeps_its_file_elsewhere(monkeypatch):
    usual = load("digits")
    monkeypatch.setattr("sgd_jax.data._digits._FILE", "sklearn/elsewhere.csv.gz")
    for part, other in zip(parts(usual), parts(load("digits")), strict=True):
        np.testing.assert_array_equal(part.inputs, other.inputs)
        np.testing.assert_array_equal(part.labels, other.labels)


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"pip install 'sgd_jax\[experiments\]'"):
        load("digits")


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'cifar'; expected digits, mnist, fashion_mnist, .*npz"):
        load("cifar")


# --- IDX ------------------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize(
    ("code", "stored"),
    [(0x08, ">u1"), (0x09, ">i1"), (0x0B, ">i2"), (0x0C, ">i4"), (0x0D, ">f4"), (0x0E, ">f8")],
)
def test_idx_values_of_every_type_survive_whatever_the_name_of_the_file(
    tmp_path, code, stored, compress
):
    array = np.arange(24).reshape(2, 3, 4) + (0 if stored == ">u1" else -7)
    path = tmp_path / ("a.gz" if compress is bytes else "a")  # the name says the opposite
    path.write_bytes(compress(idx_bytes(array, code, stored)))
    loaded = read_idx(path)
    np.testing.assert_array_equal(loaded, array)
    assert loaded.dtype == np.dtype(stored).newbyteorder("=")
    assert loaded.flags.writeable


def test_an_idx_file_of_many_chunks_is_read_whole(tmp_path):
    array = np.arange(3_000_000) % 251
    path = tmp_path / "a"
    path.write_bytes(gzip.compress(idx_bytes(array), 1))
    np.testing.assert_array_equal(read_idx(path), array)


GOOD = idx_bytes(np.arange(6).reshape(2, 3))
BAD_IDX = {
    "no bytes": (b"", r"starts with b''; expected two zero bytes"),
    "wrong magic": (b"\1" + GOOD[1:], r"starts with .*; expected two zero bytes"),
    "unknown type code": (b"\0\0\x0a" + GOOD[3:], r"has type code 0x0A; expected one of 0x08"),
    "no axes": (b"\0\0\x08\0\7", r"has 0 axes; expected 1 to 64"),
    "too many axes": (b"\0\0\x08\x41" + b"\0\0\0\1" * 65 + b"\7", r"has 65 axes"),
    "short header": (GOOD[:11], r"ends within the header of 2 axes"),
    "no values": (idx_bytes(np.zeros((0, 3))), r"is empty, shape \(0, 3\)"),
    "short body": (GOOD[:-1], r"is shorter than its header says; expected 6 bytes"),
    "long body": (GOOD + b"\0", r"is longer than its header says; expected 6 bytes"),
}


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize(("content", "message"), BAD_IDX.values(), ids=BAD_IDX)
def test_a_bad_idx_file_is_refused_by_name_with_a_remedy(tmp_path, content, message, compress):
    path = tmp_path / "a"
    path.write_bytes(compress(content))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} {message}.*delete it and"):
        read_idx(path)


GOOD_GZIP = gzip.compress(GOOD)
BAD_GZIP = {
    "truncated": GOOD_GZIP[:-9],
    "without checksum": GOOD_GZIP[:-8],
    "wrong checksum": GOOD_GZIP[:-8] + bytes([GOOD_GZIP[-8] ^ 1]) + GOOD_GZIP[-7:],
    "wrong length": GOOD_GZIP[:-1] + b"\1",
    "broken stream": GOOD_GZIP[:10] + b"\xff" + GOOD_GZIP[11:],
    "something after it": GOOD_GZIP + b"more",
}


@pytest.mark.parametrize("content", BAD_GZIP.values(), ids=BAD_GZIP)
def test_a_broken_gzip_file_is_refused(tmp_path, content):
    path = tmp_path / "a"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a is a broken gzip file: .* delete it and fetch it"):
        read_idx(path)


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_a_forged_idx_header_is_refused_before_the_values_are_read(tmp_path, compress):
    path = tmp_path / "a"
    header = struct.pack(">4B3I", 0, 0, 0x0E, 3, *[0xFFFFFFFF] * 3)
    path.write_bytes(compress(header + bytes(2 * FEW_BYTES)))

    def refuse():
        with pytest.raises(ValueError, match="shorter than its header says"):
            read_idx(path)

    assert peak_bytes(refuse) < FEW_BYTES


def test_a_gzip_bomb_costs_no_memory(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(gzip.compress(GOOD + bytes(64 << 20), 1))

    def refuse():
        with pytest.raises(ValueError, match="longer than its header says"):
            read_idx(path)

    assert peak_bytes(refuse) < FEW_BYTES


def test_an_idx_file_of_another_shape_is_refused_before_its_values_are_read(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(GOOD[:-1])  # reading the values would fail with another error
    with pytest.raises(ValueError, match=r"has shape \(2, 3\); expected \(2, 4\)"):
        read_idx(path, shape=(2, 4))


# --- MNIST ----------------------------------------------------------------------------------


def contents(first_pixel=0):
    """A tiny MNIST; images differ in every pixel."""
    num_pixels = IMAGE_SHAPE[0] * IMAGE_SHAPE[1]
    pixels = np.arange((NUM_GIVEN + NUM_TEST) * num_pixels) + first_pixel
    images = pixels.reshape(-1, *IMAGE_SHAPE)
    labels = np.arange(NUM_GIVEN + NUM_TEST) % 10
    arrays = (images[:NUM_GIVEN], labels[:NUM_GIVEN], images[NUM_GIVEN:], labels[NUM_GIVEN:])
    return {file: idx_bytes(array) for file, array in zip(FILES, arrays, strict=True)}


def write_files(folder, files, suffix=""):
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (folder / f"{file}{suffix}").write_bytes(gzip.compress(content) if suffix else content)


def shrink(monkeypatch, **changes):
    small = {
        "num_train": NUM_TRAIN,
        "num_validation": NUM_VALIDATION,
        "num_test": NUM_TEST,
        "image_shape": IMAGE_SHAPE,
        "mirrors": (),
    }
    for name, source in mnist.SOURCES.items():
        monkeypatch.setitem(mnist.SOURCES, name, source._replace(**{**small, **changes}))


def test_the_split_of_mnist_is_the_book_s():
    for source in mnist.SOURCES.values():
        assert (source.num_train, source.num_validation, source.num_test) == (50000, 10000, 10000)
        assert source.image_shape == (28, 28)
        assert len(set(source.mirrors)) == 2


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("name", mnist.SOURCES)
def test_mnist_keeps_file_order_and_holds_out_the_last_training_examples(
    tmp_path, monkeypatch, name, suffix
):
    shrink(monkeypatch)
    write_files(tmp_path, contents(), suffix)
    dataset = load(name, tmp_path, download=False)
    assert (dataset.name, dataset.num_classes, dataset.scale) == (name, 10, 255.0)
    assert [len(part.labels) for part in parts(dataset)] == [NUM_TRAIN, NUM_VALIDATION, NUM_TEST]
    inputs = np.concatenate([part.inputs for part in parts(dataset)])
    labels = np.concatenate([part.labels for part in parts(dataset)])
    np.testing.assert_array_equal(inputs, np.arange(inputs.size).reshape(len(labels), -1))
    np.testing.assert_array_equal(labels, np.arange(len(labels)) % 10)
    assert (inputs.dtype, labels.dtype) == (np.uint8, np.int32)


def test_both_data_sets_share_a_folder_by_subfolders_which_come_first(tmp_path, monkeypatch):
    shrink(monkeypatch)
    write_files(tmp_path, contents(first_pixel=0))
    write_files(tmp_path / "fashion_mnist", contents(first_pixel=100))
    assert load("mnist", tmp_path, download=False).train.inputs[0, 0] == 0
    assert load("fashion_mnist", tmp_path, download=False).train.inputs[0, 0] == 100


def test_files_of_two_folders_are_never_mixed(tmp_path, monkeypatch):
    shrink(monkeypatch)
    write_files(tmp_path, {file: contents()[file] for file in FILES[:2]})
    write_files(tmp_path / "mnist", {file: contents()[file] for file in FILES[2:]})
    with pytest.raises(FileNotFoundError, match=TRAIN_IMAGES):
        load("mnist", tmp_path, download=False)


def test_the_files_of_the_other_twin_are_refused(tmp_path, monkeypatch):
    labels = contents()[TRAIN_LABELS][8:]
    shrink(monkeypatch, train_labels_sha256="")
    own = mnist.SOURCES["mnist"]._replace(train_labels_sha256=hashlib.sha256(labels).hexdigest())
    monkeypatch.setitem(mnist.SOURCES, "mnist", own)
    write_files(tmp_path, contents())
    load("mnist", tmp_path, download=False)
    with pytest.raises(ValueError, match=r"belongs to mnist; expected fashion_mnist.*--data_dir"):
        load("fashion_mnist", tmp_path, download=False)


def test_image_and_label_counts_that_differ_are_refused(tmp_path, monkeypatch):
    shrink(monkeypatch)
    labels = np.zeros(NUM_GIVEN - 1)
    write_files(tmp_path, {**contents(), TRAIN_LABELS: idx_bytes(labels)})
    expected = rf"{TRAIN_LABELS} has shape \({NUM_GIVEN - 1},\); expected \({NUM_GIVEN},\)"
    with pytest.raises(ValueError, match=expected):
        load("mnist", tmp_path, download=False)


@pytest.mark.parametrize(("file", "count"), [(TRAIN_LABELS, NUM_GIVEN), (TEST_LABELS, NUM_TEST)])
def test_a_label_of_10_is_refused(tmp_path, monkeypatch, file, count):
    shrink(monkeypatch)
    labels = np.zeros(count)
    labels[2] = 10
    write_files(tmp_path, {**contents(), file: idx_bytes(labels)})
    with pytest.raises(ValueError, match=rf"{file}\[2\] is 10; expected labels from 0 to 9"):
        load("mnist", tmp_path, download=False)


@pytest.mark.parametrize("file", FILES)
def test_mnist_files_of_another_type_are_refused(tmp_path, monkeypatch, file):
    shrink(monkeypatch)
    array = read_idx_bytes(contents()[file])
    write_files(tmp_path, {**contents(), file: idx_bytes(array, 0x0D, ">f4")})
    with pytest.raises(TypeError, match=rf"{file} holds float32; expected uint8"):
        load("mnist", tmp_path, download=False)


def read_idx_bytes(content):
    num_axes = content[3]
    shape = struct.unpack_from(f">{num_axes}I", content, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * num_axes).reshape(shape)


def test_with_nothing_to_read_the_error_says_which_files_to_put_where(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        load("mnist", tmp_path, download=False)
    message = str(caught.value)
    for file in FILES:
        assert f"{file}.gz" in message
    assert f"into {tmp_path / 'mnist'}, or all four into {tmp_path}" in message
    assert "--data_dir" in message
    for mirror in mnist.SOURCES["mnist"].mirrors:
        assert mirror in message
    assert not any(tmp_path.iterdir())


@pytest.fixture
def mirrors(tmp_path, monkeypatch):
    """A server on this machine with /good/, /corrupt/ and, at any other address, nothing."""
    root = tmp_path / "www"
    write_files(root / "good", contents(), ".gz")
    write_files(root / "corrupt", contents(first_pixel=1), ".gz")
    requested = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            requested.append(self.path)

    def make_handler(*args):
        return Handler(*args, directory=str(root))

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), make_handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()

        def choose(*folders):
            address = f"http://127.0.0.1:{server.server_port}"
            sha256 = {
                file: hashlib.sha256((root / "good" / f"{file}.gz").read_bytes()).hexdigest()
                for file in FILES
            }
            urls = tuple(f"{address}/{folder}/" for folder in folders)
            shrink(monkeypatch, mirrors=urls, sha256=sha256)
            return requested

        yield choose
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("first", ["gone", "corrupt"])
def test_when_the_first_mirror_fails_the_second_serves(tmp_path, mirrors, first):
    requested = mirrors(first, "good")
    dataset = load("mnist", tmp_path)
    assert dataset.train.inputs[0, 1] == 1
    for file in FILES:
        assert f"/{first}/{file}.gz" in requested
    assert sorted(os.listdir(tmp_path / "mnist")) == sorted(f"{f}.gz" for f in FILES)


def test_what_was_downloaded_is_not_downloaded_again(tmp_path, mirrors):
    requested = mirrors("good")
    load("mnist", tmp_path)
    assert len(requested) == len(FILES)
    load("mnist", tmp_path)
    assert len(requested) == len(FILES)


def test_a_download_completes_a_folder_and_leaves_what_is_there(tmp_path, mirrors):
    requested = mirrors("good")
    changed = contents(first_pixel=7)[TRAIN_IMAGES]
    write_files(tmp_path / "mnist", {TRAIN_IMAGES: changed})
    assert load("mnist", tmp_path).train.inputs[0, 0] == 7
    assert len(requested) == len(FILES) - 1
    assert (tmp_path / "mnist" / TRAIN_IMAGES).read_bytes() == changed


def test_a_corrupt_file_is_an_error_and_never_replaced(tmp_path, mirrors):
    requested = mirrors("good")
    write_files(tmp_path / "mnist", contents(), ".gz")
    path = tmp_path / "mnist" / f"{TEST_IMAGES}.gz"
    path.write_bytes(b"an error page")
    with pytest.raises(ValueError, match=rf"{path.name} starts with .* delete it and fetch"):
        load("mnist", tmp_path)
    assert path.read_bytes() == b"an error page"
    assert requested == []


def test_a_folder_that_is_not_there_is_refused_before_any_download(tmp_path, mirrors):
    requested = mirrors("good")
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        load("mnist", tmp_path / "a" / "data")
    assert requested == []
    assert not (tmp_path / "a").exists()


def test_when_both_mirrors_fail_the_error_is_the_offline_one_and_nothing_is_left(tmp_path, mirrors):
    mirrors("corrupt", "gone")
    with pytest.raises(FileNotFoundError) as caught:
        load("mnist", tmp_path)
    message = str(caught.value)
    assert f"into {tmp_path / 'mnist'}, or" in message
    assert "--data_dir" in message
    assert re.search(rf"/corrupt/{TRAIN_IMAGES}.gz: .*hash", message)
    assert re.search(rf"/gone/{TRAIN_IMAGES}.gz: .*404", message)
    assert not (tmp_path / "mnist").exists()


def test_the_default_folder_is_the_cache_of_the_user(tmp_path, monkeypatch):
    pooch = pytest.importorskip("pooch")
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / project)
    shrink(monkeypatch)
    write_files(tmp_path / "sgd_jax" / "mnist", contents())
    assert load("mnist", download=False).train.inputs[0, 1] == 1


def test_without_pooch_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(ImportError, match=r"pip install 'sgd_jax\[experiments\]'.*--data_dir"):
        load("mnist", tmp_path)


def test_with_the_files_at_hand_mnist_needs_no_pooch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    shrink(monkeypatch)
    write_files(tmp_path, contents())
    load("mnist", tmp_path)


@pytest.mark.mnist
@pytest.mark.skipif(
    "SGD_JAX_MNIST_DIR" not in os.environ, reason="SGD_JAX_MNIST_DIR, the folder of MNIST, is unset"
)
def test_the_real_mnist_is_read():
    dataset = load("mnist", os.environ["SGD_JAX_MNIST_DIR"], download=False)
    assert [part.inputs.shape for part in parts(dataset)] == [
        (50000, 784),
        (10000, 784),
        (10000, 784),
    ]
    assert dataset.train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert dataset.test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    given = np.concatenate([dataset.train.labels, dataset.validation.labels])
    digest = hashlib.sha256(given.astype(np.uint8).tobytes()).hexdigest()
    assert digest == mnist.SOURCES["mnist"].train_labels_sha256
    assert abs(dataset.train.inputs.mean() / dataset.scale - 0.1307) < 1e-3


# --- npz ------------------------------------------------------------------------------------


def arrays(**changes):
    """24 examples of 2 × 3 features and 3 classes."""
    good = {
        "x_train": np.arange(120, dtype=np.float32).reshape(20, 2, 3),
        "y_train": np.arange(20) % 3,
        "x_test": np.arange(24, dtype=np.float32).reshape(4, 2, 3),
        "y_test": np.array([0, 1, 2, 0]),
    }
    return {name: array for name, array in {**good, **changes}.items() if array is not None}


def save(tmp_path, save_fn=np.savez, **changes):
    path = tmp_path / "mine.npz"
    save_fn(path, **arrays(**changes))
    return path


@pytest.mark.parametrize("save_fn", [np.savez, np.savez_compressed])
def test_npz_holds_out_the_last_tenth_of_training_for_validation(tmp_path, save_fn):
    dataset = load(save(tmp_path, save_fn))
    assert (dataset.name, dataset.num_classes, dataset.scale) == ("mine", 3, 1.0)
    given = arrays()["x_train"].reshape(20, 6)
    np.testing.assert_array_equal(dataset.train.inputs, given[:18])
    np.testing.assert_array_equal(dataset.validation.inputs, given[18:])
    np.testing.assert_array_equal(dataset.train.labels, np.arange(18) % 3)
    np.testing.assert_array_equal(dataset.validation.labels, np.arange(18, 20) % 3)
    np.testing.assert_array_equal(dataset.test.inputs, arrays()["x_test"].reshape(4, 6))
    np.testing.assert_array_equal(dataset.test.labels, [0, 1, 2, 0])
    assert all(part.labels.dtype == np.int32 for part in parts(dataset))


@pytest.mark.parametrize(("num_examples", "num_held_out"), [(2, 1), (9, 1), (19, 1), (20, 2)])
def test_npz_the_tenth_is_rounded_down_but_at_least_one(tmp_path, num_examples, num_held_out):
    inputs, labels = np.ones((num_examples, 6)), np.full(num_examples, 2)
    path = save(tmp_path, x_train=inputs, y_train=labels, x_test=np.ones((4, 6)))
    dataset = load(path)
    assert len(dataset.validation.labels) == len(dataset.validation.inputs) == num_held_out
    assert len(dataset.train.labels) == len(dataset.train.inputs) == num_examples - num_held_out


def test_npz_with_one_training_example_and_no_validation_is_refused(tmp_path):
    path = save(tmp_path, x_train=np.ones((1, 6), np.float32), y_train=np.array([2]))
    with pytest.raises(ValueError, match=r"1 example; expected at least 2.*x_validation"):
        load(path)


def test_npz_uses_the_validation_arrays_it_holds(tmp_path):
    inputs = np.full((2, 6), 7, np.float32)
    dataset = load(save(tmp_path, x_validation=inputs, y_validation=np.array([2, 0])))
    np.testing.assert_array_equal(dataset.validation.inputs, inputs)
    np.testing.assert_array_equal(dataset.validation.labels, [2, 0])
    assert len(dataset.train.labels) == 20


@pytest.mark.parametrize(
    ("stored", "loaded", "scale"),
    [
        ("u1", np.uint8, 255.0),
        ("f2", np.float32, 1.0),
        ("<f4", np.float32, 1.0),
        (">f4", np.float32, 1.0),
        ("f8", np.float64, 1.0),
    ],
)
def test_npz_inputs_keep_their_values_in_a_native_dtype(tmp_path, stored, loaded, scale):
    x_train = np.asfortranarray(arrays()["x_train"].astype(stored))
    dataset = load(save(tmp_path, x_train=x_train, x_test=arrays()["x_test"].astype(stored)))
    assert (dataset.train.inputs.dtype, dataset.scale) == (np.dtype(loaded), scale)
    np.testing.assert_array_equal(dataset.train.inputs, np.arange(108).reshape(18, 6))


def test_npz_rows_of_one_number_have_one_feature(tmp_path):
    dataset = load(save(tmp_path, x_train=np.ones(20), x_test=np.ones(4)))
    assert dataset.train.inputs.shape == (18, 1)


NAN_INPUT = arrays()["x_test"].copy()
NAN_INPUT[2, 1, 0] = np.nan
INF_INPUT = arrays()["x_train"].copy()
INF_INPUT[[3, 4], 0, 2] = -np.inf
BAD_ARRAYS = {
    "missing": ({"x_test": None}, ValueError, r"lacks x_test: it holds .*y_test"),
    "half a validation set": ({"x_validation": NAN_INPUT}, ValueError, r"lacks y_validation"),
    "int64 inputs": ({"x_train": np.ones((20, 6), int)}, TypeError, r"x_train has dtype int64"),
    "bool inputs": ({"x_test": np.ones((4, 6), bool)}, TypeError, r"x_test has dtype bool"),
    "complex inputs": ({"x_test": np.ones((4, 6), complex)}, TypeError, r"dtype complex128"),
    "mixed inputs": (
        {"x_test": np.ones((4, 6), np.uint8)},
        TypeError,
        r"x_test has dtype uint8; expected float32",
    ),
    "float labels": ({"y_test": np.zeros(4)}, TypeError, r"y_test has dtype float64"),
    "bool labels": ({"y_test": np.zeros(4, bool)}, TypeError, r"y_test has dtype bool"),
    "one-hot labels": ({"y_test": np.eye(4, dtype=int)}, ValueError, r"y_test has shape \(4, 4\)"),
    "fewer labels": (
        {"y_train": np.zeros(19, int)},
        ValueError,
        r"y_train has shape \(19,\); expected \(20,\)",
    ),
    "other features": (
        {"x_test": np.ones((4, 5), np.float32)},
        ValueError,
        r"x_test has rows of shape \(5,\); expected \(2, 3\)",
    ),
    "no examples": (
        {"x_test": np.ones((0, 6), np.float32), "y_test": np.zeros(0, int)},
        ValueError,
        r"x_test has shape \(0, 6\)",
    ),
    "no features": ({"x_train": np.ones((20, 0), np.float32)}, ValueError, r"shape \(20, 0\)"),
    "a scalar": ({"y_test": np.array(1)}, ValueError, r"y_test has shape \(\)"),
    "NaN": ({"x_test": NAN_INPUT}, ValueError, r"x_test\[2, 1, 0\] is nan; expected finite"),
    "infinity": ({"x_train": INF_INPUT}, ValueError, r"x_train\[3, 0, 2\] is -inf"),
    "negative label": (
        {"y_train": np.arange(20) - 1},
        ValueError,
        r"y_train\[0\] is -1; expected labels from 0 to 18",
    ),
    "only negative labels": (
        {"y_train": np.full(20, -5)},
        ValueError,
        r"y_train\[0\] is -5; expected labels from 0 to 0",
    ),
    "unseen test label": (
        {"y_test": np.array([0, 1, 3, 0])},
        ValueError,
        r"y_test\[2\] is 3; expected labels from 0 to 2",
    ),
    "label beyond int32": (
        {"y_train": np.full(20, 2**31, np.uint64)},
        ValueError,
        r"y_train holds label 2147483648",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS)
def test_bad_npz_arrays_are_refused_by_name(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        load(save(tmp_path, **changes))


@pytest.mark.parametrize("label_dtype", [np.int8, np.uint8, np.uint64])
def test_npz_labels_of_any_integer_dtype_are_loaded(tmp_path, label_dtype):
    labels = np.full(20, 127, label_dtype)  # num_classes = 128 does not fit int8
    dataset = load(save(tmp_path, y_train=labels, y_test=np.arange(4, dtype=label_dtype)))
    assert dataset.num_classes == 128
    assert dataset.train.labels.tolist() == [127] * 18


class UnpickledError(Exception):
    pass


class Trap:
    def __reduce__(self):
        return explode, ()


def explode():
    raise UnpickledError


def test_pickles_are_never_read(tmp_path):
    trap = np.array([Trap()] * 4, dtype=object)
    path = save(tmp_path, x_test=trap)
    with pytest.raises(UnpickledError):  # the trap does spring where pickles are read
        np.load(path, allow_pickle=True)["x_test"]
    with pytest.raises(TypeError, match="x_test has dtype object"):
        load(path)


def test_a_file_that_is_no_zip_file_is_refused(tmp_path):
    path = tmp_path / "mine.npz"
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match=r"mine.npz is not a zip file; expected .*np.savez"):
        load(path)


def test_a_missing_npz_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"mine.npz"):
        load(tmp_path / "mine.npz")


@pytest.mark.parametrize("save_fn", [np.savez, np.savez_compressed])
def test_a_flipped_bit_in_an_npz_array_is_noticed(tmp_path, save_fn):
    inputs = np.random.default_rng(0).integers(0, 256, (20, 50), dtype=np.uint8)
    path = save(tmp_path, save_fn, x_train=inputs, x_test=inputs[:4])
    content = bytearray(path.read_bytes())
    content[600] ^= 1  # within x_train, the first member
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"mine.npz (is a zip file that does not open|holds)"):
        load(path)


X_TRAIN_DATA = 30 + len("x_train.npy") + 20  # after the local header, its name and zip64 sizes


@pytest.mark.parametrize(
    ("record", "offset", "value"),
    [
        (b"PK\1\2", 8, 1),
        (b"PK\1\2", 10, 99),
        (b"PK\5\6", 16, 60_000),
        (b"PK\3\4", 28, 60_000),
        (None, X_TRAIN_DATA, 0xFFFF),
    ],
    ids=["encrypted", "unknown compression", "before the start", "after the end", "no deflate"],
)
def test_an_npz_file_whose_members_do_not_open_is_refused(tmp_path, record, offset, value):
    path = save(tmp_path, np.savez_compressed)
    content = bytearray(path.read_bytes())
    start = 0 if record is None else content.rindex(record)
    struct.pack_into("<H", content, start + offset, value)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"mine.npz is a zip file that does not open: .*again"):
        load(path)


def write_member(path, name, content):
    """An archive of good arrays whose member `name` has this content."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for good_name, array in arrays().items():
            stream = io.BytesIO()
            np.save(stream, array)
            archive.writestr(
                f"{good_name}.npy", content if good_name == name else stream.getvalue()
            )


def npy_header(shape):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    return stream.getvalue()


@pytest.mark.parametrize("content", [b"", b"nothing", npy_header((4, 6))[:40]])
def test_an_npz_member_that_is_no_array_is_refused(tmp_path, content):
    path = tmp_path / "mine.npz"
    write_member(path, "x_test", content)
    with pytest.raises(ValueError, match=r"mine.npz holds x_test without an array header"):
        load(path)


@pytest.mark.parametrize("shape", [(2**20, 2**20), (4, 5), (4, 7)])
def test_a_forged_npz_header_is_refused_without_memory(tmp_path, shape):
    path = tmp_path / "mine.npz"
    write_member(path, "x_test", npy_header(shape) + bytes(24))

    def refuse():
        with pytest.raises(ValueError, match=r"holds 24 bytes for x_test, uint8 of shape"):
            load(path)

    assert peak_bytes(refuse) < FEW_BYTES


def test_a_forged_npz_directory_is_refused_without_memory(tmp_path):
    path = tmp_path / "mine.npz"
    header = npy_header((4, 2**28))
    write_member(path, "x_test", header + bytes(24))
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\1\2", 0, content.rindex(b"x_test.npy"))
    struct.pack_into("<I", content, entry + 24, len(header) + 2**30)  # its uncompressed size
    path.write_bytes(content)

    def refuse():
        with pytest.raises(ValueError, match=r"too small to hold the 1073741824 bytes x_test"):
            load(path)

    assert peak_bytes(refuse) < FEW_BYTES

"""Examples on the disk: those in memory, each once an epoch, in an order that is random."""

import collections
import errno
import itertools
import math
import mmap
import os
import sys
import threading
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_data import contents as mnist_files
from test_data import idx_bytes, shrink, write_files

import sgd_jax as sj
from sgd_jax import data
from sgd_jax.data import _folder as folders
from sgd_jax.data import _mapped as mapped
from sgd_jax.data import _read_ahead as read_ahead
from sgd_jax.data import _shuffling as shuffling
from sgd_jax.data import index_shuffle

N = 23  # training examples: no multiple of a batch size or of a shard
CUTS = (0, 9, 10, N)  # of the shards


needs_advice = pytest.mark.skipif(
    not hasattr(os, "posix_fadvise") or not hasattr(os, "RWF_NOWAIT"),
    reason="this system takes no advice on files",
)


def arrays(seed=0, dtype=np.uint8):
    random = np.random.default_rng(seed)
    made = {}
    for part, n in (("train", N), ("validation", 4), ("test", 5)):
        made[f"x_{part}"] = random.integers(0, 255, (n, 2, 3)).astype(dtype)
        made[f"y_{part}"] = np.arange(n) % 3
    return made


def write_shards(folder, made, save=np.save, suffix="npy"):
    """Writes the training set in three shards, the others in one file each."""
    folder.mkdir(exist_ok=True)
    for name, array in made.items():
        if name.endswith("train"):
            for number, (start, stop) in enumerate(itertools.pairwise(CUTS)):
                save(folder / f"{name}-{number}.{suffix}", array[start:stop])
        else:
            save(folder / f"{name}.{suffix}", array)
    return folder


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "mine", arrays())


def read(chunk):
    """Returns the mini-batches of a chunk as arrays, (num_orders, steps, m, ...)."""
    batches = np.asarray(chunk.batches)
    return [np.asarray(leaf)[batches] for leaf in chunk.examples]


# --- A random order ---------------------------------------------------------------------------


@pytest.mark.parametrize("n", [*range(1, 40), 255, 256, 257, 10_007])
def test_every_example_stands_at_one_position(n):
    shuffled = index_shuffle(np.arange(n), n, seed=(3, n))
    np.testing.assert_array_equal(np.sort(shuffled), np.arange(n))


def test_any_part_of_an_order_is_that_of_the_whole():
    n = 20_000  # more than is worked on together
    whole = index_shuffle(np.arange(n), n, seed=5)
    some = np.random.default_rng(0).integers(n, size=(7, 3))
    np.testing.assert_array_equal(index_shuffle(some, n, seed=5), whole[some])


def test_an_order_of_2_to_the_62_needs_no_memory_for_it():
    n = 1 << 62
    positions = np.array([0, 1, n // 2, n - 1])
    tracemalloc.start()
    shuffled = index_shuffle(positions, n, seed=(0, 1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(shuffled.tolist())) == 4
    assert np.all((shuffled >= 0) & (shuffled < n))
    assert peak < 1 << 20


def chi_square(n, num_orders):
    """Returns χ² of the n! orders being equally likely, over its expectation, and in its σ."""
    seen = collections.Counter(
        tuple(index_shuffle(np.arange(n), n, seed=(seed, 1))) for seed in range(num_orders)
    )
    expected = num_orders / math.factorial(n)
    total = sum((seen[o] - expected) ** 2 / expected for o in itertools.permutations(range(n)))
    freedom = math.factorial(n) - 1
    return (total - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [3, 4, 5])
def test_all_orders_are_equally_likely(n):
    assert abs(chi_square(n, num_orders=3000)) < 3


def test_a_shuffle_of_too_few_rounds_is_told_from_a_random_one(monkeypatch):
    monkeypatch.setattr(shuffling, "_NUM_ROUNDS", 4)
    assert chi_square(5, num_orders=3000) > 30


def test_neighbours_in_the_order_are_strangers():
    n, num_orders = 1009, 50
    orders = [index_shuffle(np.arange(n), n, seed=seed) for seed in range(num_orders)]
    for lag in (1, 2, 31, 32):  # 32 is about √n: a column of the pairs
        correlations = [np.corrcoef(o[:-lag], o[lag:])[0, 1] for o in orders]
        assert abs(np.mean(correlations)) < 4 / math.sqrt(n * num_orders)


def test_epochs_and_seeds_have_orders_of_their_own():
    n = 1000
    orders = [index_shuffle(np.arange(n), n, seed) for seed in ((0, 1), (0, 2), (1, 1), (1, 2))]
    for a, b in itertools.combinations(orders, 2):
        assert np.mean(a == b) < 0.01


def test_an_order_stays_what_it_is_on_every_machine_and_in_every_version():
    expected = [4, 0, 1, 2, 3]
    assert index_shuffle(np.arange(5), 5, seed=(0, 1)).tolist() == expected


@pytest.mark.parametrize(
    ("positions", "n", "message"),
    [([0], 0, "n is 0"), ([0], 2**62 + 1, "n is 4611"), ([5], 5, r"in \[5, 5\]"), ([-1], 5, "-1")],
)
def test_positions_outside_are_refused(positions, n, message):
    with pytest.raises(ValueError, match=message):
        index_shuffle(np.array(positions), n, seed=0)


# --- Rows on the disk -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64, ">f4"])
@pytest.mark.parametrize("with_validation", [True, False])
def test_shards_hold_what_npz_holds(tmp_path, dtype, with_validation):
    made = arrays(dtype=dtype)
    if not with_validation:
        del made["x_validation"], made["y_validation"]
    np.savez(tmp_path / "mine.npz", **made)
    expected = data.load(tmp_path / "mine.npz")
    folder = write_shards(tmp_path / "mine", made)
    for dataset in (data.load(folder), data.open_dataset(folder)):
        assert dataset[4:] == expected[4:]
        assert dataset.name == "mine"
        for part in ("train", "validation", "test"):
            for rows, array in zip(getattr(dataset, part), getattr(expected, part), strict=True):
                assert (rows.shape, rows.dtype, len(rows)) == (array.shape, array.dtype, len(array))
                np.testing.assert_array_equal(np.asarray(rows), array)


def test_rows_are_those_asked_for_across_shards(shards):
    rows = data.open_dataset(shards).train.inputs
    expected = np.asarray(rows)
    for indices in ([], [0], [8, 9], [3, 3, 9, 10, 10, N - 1], range(N)):
        taken = rows.take(np.array(indices, int))
        np.testing.assert_array_equal(taken, expected[np.array(indices, int)])
    for start, stop in itertools.combinations_with_replacement((0, 1, 8, 9, 10, 11, N), 2):
        part = rows[start:stop]
        np.testing.assert_array_equal(np.asarray(part), expected[start:stop])
        assert part.nbytes == part.dtype.itemsize * 6 * (stop - start)
        if stop > start:
            np.testing.assert_array_equal(
                part.take(np.array([stop - start - 1]))[0], expected[stop - 1]
            )
    with pytest.raises(ValueError, match="ascend"):
        rows.take(np.array([2, 1]))
    with pytest.raises(IndexError, match=r"\[0, 23\)"):
        rows.take(np.array([0, N]))
    with pytest.raises(ValueError, match="steps of 1"):
        rows[::2]


def test_opening_reads_no_inputs_into_memory(tmp_path):
    made = arrays()
    made["x_train"] = np.zeros((N, 1 << 20), np.uint8)
    made["x_validation"], made["x_test"] = made["x_train"][:4], made["x_train"][:5]
    folder = write_shards(tmp_path / "mine", made)
    tracemalloc.start()
    dataset = data.open_dataset(folder)
    dataset.train.inputs.take(np.array([3]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert dataset.train.inputs.nbytes == N << 20
    assert peak < 2 << 20


@pytest.fixture
def asked(monkeypatch):
    """The pieces of files that were asked for: byte from which, and how many."""
    pieces = []

    def advise(file, start, length, advice):
        assert advice == os.POSIX_FADV_WILLNEED
        pieces.append((start, length))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    return pieces


def map_rows(path, n=1000, size=5000):
    """Returns a file of n rows of so many bytes, mapped, and the bytes before its first row."""
    np.save(path, np.random.default_rng(0).integers(0, 256, (n, size), np.uint8))
    (rows,) = data.open_rows([path]).parts
    return rows, path.stat().st_size - n * size


@needs_advice
@pytest.mark.parametrize("first", [0, 3])
def test_rows_that_are_not_in_memory_are_asked_for_a_block_ahead(
    tmp_path, monkeypatch, asked, first
):
    monkeypatch.setattr(read_ahead, "_is_any_missing", lambda file, starts: True)
    monkeypatch.setattr(read_ahead, "_ROWS_AHEAD", 10)
    rows, offset = map_rows(tmp_path / "x.npy")
    indices = np.unique(np.random.default_rng(1).integers(0, 1000 - first, 45))
    is_asked = np.zeros(offset + rows.nbytes + mmap.PAGESIZE, bool)
    seen, num_asked = 0, 0
    for block in read_ahead.blocks_read_ahead(rows[first:], indices):
        for start, length in asked[num_asked:]:
            is_asked[start : start + length] = True
        num_asked = len(asked)
        assert block.start == seen
        seen = min(block.stop, len(indices))
        for number, index in enumerate(indices):
            start = offset + (first + index) * 5000
            if number < seen + 10:  # this block and the next
                assert is_asked[start : start + 5000].all()
            elif number > seen + 10:
                assert not is_asked[start + mmap.PAGESIZE]  # nor was what comes later
    assert seen == len(indices)
    pages = {page for i in indices for page in range((offset + (first + i) * 5000) // mmap.PAGESIZE,
             (offset + (first + i + 1) * 5000 - 1) // mmap.PAGESIZE + 1)}  # fmt: skip
    wasted = is_asked.sum() // mmap.PAGESIZE - len(pages)
    assert 0 <= wasted <= read_ahead._GAP * len(indices)


@needs_advice
def test_of_rows_that_are_in_memory_none_is_asked_for(tmp_path, asked):
    rows, _ = map_rows(tmp_path / "x.npy")
    np.asarray(rows).sum()
    indices = np.arange(0, 1000, 20)
    assert list(read_ahead.blocks_read_ahead(rows, indices)) == [slice(0, 50)]
    assert list(read_ahead.blocks_read_ahead(np.array(rows), indices)) == [slice(0, 50)]
    assert asked == []


@needs_advice
def test_rows_that_the_disk_has_dropped_are_missing_until_they_are_read(tmp_path):
    path = tmp_path / "x.npy"
    rows, offset = map_rows(path)
    starts = offset + 5000 * np.arange(0, 1000, 50)
    del rows
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if not read_ahead._is_any_missing(file.fileno(), starts):
            pytest.skip("this file system keeps all in memory")
        file.read()
        assert not read_ahead._is_any_missing(file.fileno(), starts)


@needs_advice
@pytest.mark.parametrize("error", [BlockingIOError, OSError(errno.EOPNOTSUPP, "not supported")])
def test_where_one_of_those_tried_is_missing_or_the_system_does_not_say_all_are_asked_for(
    tmp_path, monkeypatch, asked, error
):
    rows, offset = map_rows(tmp_path / "x.npy")
    tried = []

    def read(file, buffers, start, flags):
        tried.append(start)
        if start > offset + rows.nbytes // 2:
            raise error

    monkeypatch.setattr(os, "preadv", read)
    assert list(read_ahead.blocks_read_ahead(rows, np.arange(0, 1000, 20))) == [slice(0, 2048)]
    assert asked
    assert tried == [offset + 5000 * 60 * k for k in range(len(tried))]  # all over the file


@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_rows_read_ahead_are_those_asked_for(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(read_ahead, "_is_any_missing", lambda file, starts: True)
    monkeypatch.setattr(read_ahead, "_ROWS_AHEAD", 7)
    stored, _ = map_rows(tmp_path / "x.npy", n=90, size=30)
    rows = data.Rows([stored[:40], stored[40:50], stored[55:]], dtype)
    expected = np.concatenate([stored[:50], stored[55:]])
    indices = np.sort(np.random.default_rng(0).integers(0, 85, 60))
    np.testing.assert_array_equal(rows.take(indices), expected[indices])
    (tmp_path / "x.npy").unlink()  # still mapped
    np.testing.assert_array_equal(rows.take(indices), expected[indices])


# --- Files that change while they are read -------------------------------------------------------


def append(path):
    with open(path, "ab") as file:
        file.write(b"more")


CHANGES = {
    "shrinks": lambda path: os.truncate(path, path.stat().st_size // 2),
    "is emptied": lambda path: os.truncate(path, 0),
    "grows": append,
    "is written to": lambda path: os.utime(path, ns=(0, path.stat().st_mtime_ns + 1)),
}
READS = {
    "take": lambda rows: rows.take(np.arange(0, len(rows), 7)),
    "all": np.asarray,
    "a slice": lambda rows: np.asarray(rows[len(rows) - 3 :]),
    "blocks": lambda rows: list(rows.blocks()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_file_that_changes_ends_in_an_error_that_names_both_sizes(tmp_path, change, read, dtype):
    path = tmp_path / "x.npy"
    map_rows(path, n=200)
    before = path.stat().st_size
    rows = data.Rows(data.open_rows([path]).parts, dtype)
    READS[read](rows)
    CHANGES[change](path)
    sizes = f"expected {before:,} bytes .*, found {path.stat().st_size:,} bytes"
    with pytest.raises(data.ChangedFileError, match=rf"x\.npy has changed .*{sizes}"):
        READS[read](rows)


def test_a_file_that_is_deleted_or_replaced_is_read_to_its_end(tmp_path):
    path = tmp_path / "x.npy"
    map_rows(path, n=20)
    rows = data.open_rows([path])
    expected = np.asarray(rows)
    np.save(tmp_path / "other.npy", np.zeros(3))
    os.replace(tmp_path / "other.npy", path)
    np.testing.assert_array_equal(rows, expected)
    path.unlink()
    np.testing.assert_array_equal(rows.take(np.arange(20)), expected)


def test_a_system_that_does_not_copy_memory_checks_the_file_before(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "_find_reader", lambda: None)
    path = tmp_path / "x.npy"
    map_rows(path, n=20)
    rows = data.open_rows([path])
    np.testing.assert_array_equal(rows.take(np.arange(20)), np.load(path))
    os.truncate(path, 100)
    with pytest.raises(data.ChangedFileError, match="found 100 bytes"):
        rows.take(np.arange(20))


def test_idx_shards_do_as_well(tmp_path):
    made = arrays()

    def save(path, array):
        path.write_bytes(idx_bytes(array))

    folder = write_shards(tmp_path / "idx", made, save, "idx")
    for part in ("train", "test"):
        examples = getattr(data.open_dataset(folder), part)
        np.testing.assert_array_equal(examples.inputs, made[f"x_{part}"].reshape(-1, 6))
        np.testing.assert_array_equal(examples.labels, made[f"y_{part}"])


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_unpacked_mnist_is_mapped_and_gzipped_mnist_refused(tmp_path, monkeypatch, name):
    shrink(monkeypatch)
    write_files(tmp_path / "plain", mnist_files())
    write_files(tmp_path / "packed", mnist_files(), ".gz")
    mapped = data.open_dataset(name, tmp_path / "plain", download=False)
    expected = data.load(name, tmp_path / "packed", download=False)
    assert mapped[4:] == expected[4:]
    for part in ("train", "validation", "test"):
        for rows, array in zip(getattr(mapped, part), getattr(expected, part), strict=True):
            assert isinstance(rows, data.Rows)
            np.testing.assert_array_equal(np.asarray(rows), array)
    with pytest.raises(ValueError, match=r"is gzipped; .* gunzip "):
        data.open_dataset(name, tmp_path / "packed", download=False)


def test_what_cannot_be_mapped_is_refused_with_the_way_out(tmp_path):
    for name in ("digits", "mine.npz", str(tmp_path / "absent")):
        with pytest.raises(ValueError, match=r"cannot be streamed; .*np.save"):
            data.open_dataset(name)


def without(path):
    return lambda folder: (folder / path).unlink()


def saved(path, array):
    return lambda folder: np.save(folder / path, array, allow_pickle=True)


def cut(path):
    def change(folder):
        (folder / path).write_bytes((folder / path).read_bytes()[:-1])

    return change


def written(path, content):
    return lambda folder: (folder / path).write_bytes(content)


HEADER_OF_A_MILLION = (
    b"\x93NUMPY\1\0\x46\0"
    + b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 2, 3)}".ljust(69)
    + b"\n"
)
BAD_FOLDERS = {
    "no x_test": (lambda f: [p.unlink() for p in f.glob("?_test.npy")], "lacks x_test"),
    "nothing": (lambda f: [p.unlink() for p in f.glob("*")], "lacks x_train and x_test.*np.save"),
    "a missing shard of labels": (without("y_train-1.npy"), "x_train-1.npy but not y_train-1.npy"),
    "a missing shard of inputs": (without("x_train-1.npy"), "y_train-1.npy but not x_train-1.npy"),
    "too few labels": (saved("y_train-1.npy", np.zeros(2, int)), "holds 2 labels, .* 1 rows"),
    "labels of the wrong shard": (
        lambda f: (saved("y_train-1.npy", np.zeros(9, int))(f), saved("y_train-0.npy", [0])(f)),
        r"y_train-0.npy holds 1 labels, .* 9 rows",
    ),
    "one-hot labels": (saved("y_test.npy", np.zeros((5, 3), int)), r"y_test has shape \(5, 3\)"),
    "labels that are no integers": (saved("y_test.npy", np.zeros(5)), "y_test has dtype float64"),
    "a label too large": (saved("y_test.npy", [0, 1, 3, 0, 1]), r"y_test\[2\] is 3; .*0 to 2"),
    "a negative label": (saved("y_train-2.npy", [0] * 12 + [-1]), r"y_train\[22\] is -1"),
    "shards of two dtypes": (
        saved("x_train-1.npy", np.zeros((1, 2, 3))),
        r"x_train-1.npy holds float64; expected uint8 as x_train-0.npy",
    ),
    "shards of two shapes": (
        saved("x_train-1.npy", np.zeros((1, 2, 4), np.uint8)),
        r"x_train-1.npy has rows of shape \(2, 4\); expected \(2, 3\)",
    ),
    "a test set of another dtype": (saved("x_test.npy", np.zeros((5, 6))), "x_test has dtype"),
    "a dtype that is not for inputs": (
        lambda f: [np.save(p, np.load(p).astype(np.int64)) for p in f.glob("x_*")],
        "x_train has dtype int64; expected uint8",
    ),
    "an empty shard": (saved("x_train-1.npy", np.zeros((0, 2, 3), np.uint8)), r"shape \(0, 2, 3\)"),
    "a number": (saved("x_train-1.npy", np.uint8(3)), r"shape \(\)"),
    "Fortran order": (
        saved("x_train-0.npy", np.asfortranarray(arrays()["x_train"][:9])),
        "is in Fortran order",
    ),
    "a pickle": (saved("x_train-1.npy", np.array([[print]])), "Python objects.*never read"),
    "a torn shard": (cut("x_train-2.npy"), r"has 77 bytes of values; expected those of uint8"),
    "a forged header": (
        written("x_train-2.npy", HEADER_OF_A_MILLION + bytes(78)),
        r"has 78 bytes of values; expected .* \(1000000, 2, 3\)",
    ),
    "no array": (written("x_train-2.npy", b"hello, world"), "x_train-2.npy has no header"),
    "an empty file": (written("x_train-2.npy", b""), "x_train-2.npy has no header"),
    "gzip": (written("x_train-2.npy", b"\x1f\x8b\x08"), "is gzipped; expected .*gunzip"),
    "torn IDX": (written("x_train-2.npy", idx_bytes(np.zeros((3, 2)))[:-1]), "has 5 bytes"),
}


@pytest.mark.parametrize(("change", "message"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_bad_shards_are_refused_by_name_before_any_work(shards, change, message):
    change(shards)
    for open_fn in (data.load, data.open_dataset):
        with pytest.raises((ValueError, TypeError), match=message):
            open_fn(shards)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_inputs_that_are_not_finite_are_refused_with_their_place(tmp_path, value):
    made = arrays(dtype=np.float32)
    made["x_train"][10, 1, 2] = value
    folder = write_shards(tmp_path / "mine", made)
    with pytest.raises(ValueError, match=rf"x_train\[10, 1, 2\] is {value}; expected finite"):
        data.open_dataset(folder)


def test_what_does_not_fit_into_memory_is_not_read_into_it(shards, monkeypatch):
    monkeypatch.setattr(folders, "_bytes_of_memory", lambda: 100)
    with pytest.raises(ValueError, match=r"mine holds 0.0 GiB, .*--stream, or data.open_dataset"):
        data.load(shards)
    data.open_dataset(shards)


# --- An epoch in chunks -----------------------------------------------------------------------


def chunks_of(folder, m=4, seeds=((0, 1),), steps=2, **options):
    """Returns an epoch in chunks of so many mini-batches: an example is 6 bytes and a label 4."""
    examples = data.open_dataset(folder).train
    return data.ShuffledChunks(
        examples, m, seeds, chunk_bytes=10 * m * steps * len(seeds), **options
    )


@pytest.mark.parametrize(("m", "steps"), [(4, 2), (4, 6), (4, 1), (1, 5), (N, 1), (10, 9)])
def test_an_epoch_holds_every_example_once_in_the_order_drawn(shards, m, steps):
    chunks = chunks_of(shards, m, steps=steps)
    examples = data.load(shards).train
    order = index_shuffle(np.arange(N), N, (0, 1))
    num_steps = -(-N // m)
    padded = np.concatenate([order, np.full(num_steps * m - N, -1)]).reshape(num_steps, m)
    assert chunks.num_steps == num_steps
    assert len(chunks) == -(-num_steps // steps)
    for number in range(len(chunks)):
        chunk, rows = chunks[number], padded[steps * number : steps * (number + 1)]
        assert list(chunks.steps(number)) == list(range(num_steps))[steps * number :][: len(rows)]
        np.testing.assert_array_equal(chunks.indices(number), [rows])
        present = rows >= 0
        np.testing.assert_array_equal(chunk.batches[0] >= 0, present)
        assert len(chunk.examples.labels) == present.sum()
        for leaf, expected in zip(read(chunk), examples, strict=True):
            np.testing.assert_array_equal(leaf[0][present], expected[rows[present]])


def test_several_orders_share_a_chunk_and_each_is_that_it_has_alone(shards):
    seeds = [(0, 1), (7, 1), (8, 2)]
    together = chunks_of(shards, seeds=seeds)
    alone = [chunks_of(shards, seeds=[seed]) for seed in seeds]
    for number, chunk in enumerate(map(together.__getitem__, range(len(together)))):
        for order, chunks in enumerate(alone):
            own = chunks[number]
            present = own.batches[0] >= 0
            for leaf, expected in zip(read(chunk), read(own), strict=True):
                np.testing.assert_array_equal(leaf[order][present], expected[0][present])


@pytest.mark.parametrize("num_processes", [2, 3, 4, 8])
@pytest.mark.parametrize("seeds", [[(0, 1)], [(0, 1), (7, 1)]])
def test_the_shares_of_all_processes_side_by_side_are_the_mini_batches(
    shards, num_processes, seeds
):
    whole = chunks_of(shards, seeds=seeds)
    shares = [
        chunks_of(shards, seeds=seeds, process_index=k, num_processes=num_processes)
        for k in range(num_processes)
    ]
    examples = data.load(shards).train
    for number in range(len(whole)):
        expected = whole.indices(number)
        filled_up = np.full((*expected.shape[:2], -4 % num_processes), -1)
        expected = np.concatenate([expected, filled_up], axis=2)
        found = np.concatenate([chunks.indices(number) for chunks in shares], axis=2)
        np.testing.assert_array_equal(found, expected)
        taken = [chunks[number] for chunks in shares]
        assert [len(chunk.examples.labels) for chunk in taken] == [
            chunks.num_rows(number) for chunks in shares
        ]  # of one shape: a program of all processes can be called on them
        assert len({chunks.num_rows(number) for chunks in shares}) == 1
        present = expected >= 0
        batches = np.concatenate([chunk.batches for chunk in taken], axis=2)
        np.testing.assert_array_equal(batches >= 0, present)
        for leaf, all_rows in enumerate(examples):
            rows = np.concatenate([read(chunk)[leaf] for chunk in taken], axis=2)
            np.testing.assert_array_equal(rows[present], all_rows[expected[present]])
    for chunks in shares:
        assert (len(chunks), chunks.num_steps) == (len(whole), whole.num_steps)


@pytest.mark.parametrize("num_processes", [2, 3, 8])
def test_the_parts_of_all_processes_one_after_the_other_are_the_blocks(shards, num_processes):
    examples = data.open_dataset(shards).train
    options = {"block_bytes": 10 * 9, "multiple": 3}
    whole = data.Blocks(examples, **options)
    parts = [
        data.Blocks(examples, **options, process_index=k, num_processes=num_processes)
        for k in range(num_processes)
    ]
    assert [len(blocks) for blocks in parts] == [len(whole)] * num_processes
    assert [whole.num_rows(k) for k in range(3)] == [9, 9, 5]
    for number in range(len(whole)):
        for leaf, expected in enumerate(whole[number]):
            found = [blocks[number][leaf] for blocks in parts]
            assert {len(part) for part in found} == {-(-len(expected) // num_processes)}
            np.testing.assert_array_equal(np.concatenate(found)[: len(expected)], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"m": 0}, "batch_size is 0"),
        ({"m": N + 1}, "batch_size is 24; expected 1 to 23"),
        ({"steps": 0.5}, "takes 40 bytes and a chunk at most 20; .*smaller"),
        ({"process_index": 2, "num_processes": 2}, "process_index is 2; expected 0 to .* = 1"),
        ({"process_index": -1}, "process_index is -1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(shards, options, message):
    options = {"m": 4, "steps": 2} | options
    options["steps"] = options.pop("steps")
    with pytest.raises(ValueError, match=message):
        data.ShuffledChunks(
            data.open_dataset(shards).train,
            options.pop("m"),
            [0],
            chunk_bytes=int(40 * options.pop("steps")),
            **options,
        )


# --- Through grain ----------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_an_epoch_goes_on_from_any_chunk(shards, first):
    chunks = chunks_of(shards)
    got = list(data.prefetched(chunks, jax.device_put, first))
    assert len(got) == len(chunks) - first
    for number, chunk in enumerate(got, start=first):
        assert isinstance(chunk.examples.inputs, jax.Array)
        for leaf, expected in zip(
            jax.tree.leaves(chunk), jax.tree.leaves(chunks[number]), strict=True
        ):
            np.testing.assert_array_equal(leaf, expected)


def test_the_next_chunk_is_loaded_while_one_is_in_use_and_no_further_one(shards):
    loaded, is_loaded = [], threading.Event()

    def put(chunk):
        loaded.append(threading.current_thread())
        is_loaded.set()
        return chunk

    chunks = iter(data.prefetched(chunks_of(shards), put))
    next(chunks)
    for count in (2, 3):
        while len(loaded) < count:
            assert is_loaded.wait(timeout=120)
            is_loaded.clear()
        assert len(loaded) == count
        assert threading.current_thread() not in loaded
        next(chunks)


def test_without_grain_the_error_says_what_to_install(shards, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r"pip install 'sgd_jax\[experiments\]'"):
        data.prefetched(chunks_of(shards), jax.device_put)


@pytest.mark.parametrize("steps", [2, 6])
def test_an_epoch_in_chunks_is_the_epoch_in_memory_on_the_same_mini_batches(shards, steps):
    chunks = chunks_of(shards, steps=steps)
    examples = data.load(shards).train
    params = sj.init_network(jax.random.key(0), (6, 4, 3), dtype=jnp.float64)

    def fun(params, example):
        x = jnp.asarray(example.inputs).astype(jnp.float64) / 255
        return sj.quadratic_cost(sj.feedforward(params, x), jax.nn.one_hot(example.labels, 3))

    optimizer = sj.sgd(learning_rate=1.0, momentum=0.5)
    epoch = sj.make_epoch(fun, optimizer)
    state = sj.init_state(params, optimizer)
    batches = np.concatenate([chunks.indices(k)[0] for k in range(len(chunks))])
    expected, expected_info = epoch(state, jax.device_put(examples), batches)
    costs = []
    for chunk in data.prefetched(chunks, jax.device_put):
        state, info = epoch(state, chunk.examples, chunk.batches[0])
        costs.append(info.cost)
    np.testing.assert_allclose(np.concatenate(costs), expected_info.cost, rtol=1e-12)
    for leaf, whole in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, whole, rtol=1e-12, atol=1e-14)

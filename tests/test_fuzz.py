"""Damaged and forged files raise a clear error and do nothing else; the fuzzer sees what would."""

import random

import numpy as np
import pytest

from scripts.robustness import fuzz, mutations, readers


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "share"), fuzz._SHARES.items())
def test_damaged_files_are_refused_by_name_or_still_good(kind, share):
    found = fuzz.fuzz(kind, 20 * share, seed=7)
    assert found.faults == []
    assert found.counts.total() == 20 * share
    assert found.counts["refused"] > 0
    assert found.growth < 2**29


def reader(read, expected=None):
    return readers.Reader(lambda draw: None, read, ("sample",), expected)


def refuse(error):
    raise error


@pytest.mark.parametrize(
    ("planted", "outcome"),
    [
        (reader(lambda: None), "read"),
        (reader(lambda: refuse(ValueError("sample is damaged"))), "refused"),
        (reader(lambda: refuse(ValueError("Expecting value"))), "fault: ValueError: 'Expecting"),
        (reader(lambda: {}["key"]), "fault: KeyError"),
        (reader(lambda: refuse(MemoryError("sample"))), "fault: MemoryError"),
        (reader(lambda: refuse(AssertionError("sample"))), "fault: AssertionError"),
        (reader(lambda: 1, expected=1), "read"),
        (reader(lambda: 2, expected=1), "fault: unseen"),
    ],
)
def test_the_fuzzer_tells_a_fault_from_a_refusal(planted, outcome):
    assert fuzz.run_case(planted, 0, "kind", 0).outcome.startswith(outcome)


def test_the_same_case_is_the_same_file(tmp_path):
    made = readers.make_readers()["npz"](tmp_path)
    files = []
    for number in [*range(30), *range(30)]:
        made.damage(random.Random(f"0 npz {number}"))
        files.append((tmp_path / "sample.npz").read_bytes())
    assert files[:30] == files[30:]
    assert len(set(files)) == 30


def test_a_forged_pickle_would_run_if_it_were_ever_loaded(tmp_path):
    sentinel, draw = tmp_path / "executed", random.Random(0)
    while not sentinel.exists():
        (tmp_path / "evil.npy").write_bytes(mutations.forge_npy(draw, str(sentinel)))
        try:
            np.load(tmp_path / "evil.npy", allow_pickle=True)
        except Exception as error:  # the other forgeries: of these NumPy makes anything
            del error

"""Damage to files: blind mutations of bytes, and forgeries that know the format."""

import gzip
import io
import json
import os
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

_NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1)
_MIB = 2**20


def mutate(draw: random.Random, whole: bytes) -> bytes:
    """Returns ``whole`` after one to three random mutations; half of them near its beginning."""
    damaged = bytearray(whole)
    for _ in range(draw.randint(1, 3)):
        draw.choice(_MUTATIONS)(draw, damaged)
    return bytes(damaged)


def _place(draw: random.Random, damaged: bytearray) -> int:
    end = min(len(damaged), 128) if draw.random() < 0.5 else len(damaged)
    return draw.randrange(end) if end else 0


def _flip_bits(draw: random.Random, damaged: bytearray) -> None:
    for _ in range(draw.choice((1, 1, 2, 16)) if damaged else 0):
        damaged[_place(draw, damaged)] ^= 1 << draw.randrange(8)


def _truncate(draw: random.Random, damaged: bytearray) -> None:
    del damaged[_place(draw, damaged) :]


def _delete(draw: random.Random, damaged: bytearray) -> None:
    start = _place(draw, damaged)
    del damaged[start : start + draw.choice((1, 4, 100))]


def _splice(draw: random.Random, damaged: bytearray) -> None:
    start, length = _place(draw, damaged), draw.choice((1, 8, 64, 1000))
    target = _place(draw, damaged)
    damaged[target : target + draw.choice((0, length))] = damaged[start : start + length]


def _duplicate(draw: random.Random, damaged: bytearray) -> None:
    damaged.extend(bytes(damaged[_place(draw, damaged) :]))
    del damaged[_MIB:]


def _insert_noise(draw: random.Random, damaged: bytearray) -> None:
    start = _place(draw, damaged)
    damaged[start:start] = draw.randbytes(draw.choice((1, 4, 50)))


def _forge_number(draw: random.Random, damaged: bytearray) -> None:
    code = draw.choice((">B", ">H", "<H", ">I", "<I", ">Q", "<Q"))
    number = draw.choice(_NUMBERS) & (256 ** struct.calcsize(code) - 1)
    start = _place(draw, damaged)
    damaged[start : start + struct.calcsize(code)] = struct.pack(code, number)


_MUTATIONS = (
    _flip_bits,
    _truncate,
    _delete,
    _splice,
    _duplicate,
    _insert_noise,
    _forge_number,
)


# IDX


def forge_idx(draw: random.Random) -> bytes:
    """Returns an IDX file whose header promises what the file may not hold, gzipped or not."""
    code = draw.choice((0x08, 0x09, 0x0B, 0x0C, 0x0D, 0x0E, draw.randrange(256)))
    num_axes = draw.choice((1, 2, 3, 4, 64, 65, 255))
    sizes = [draw.choice((*_NUMBERS[:10], 3, 28)) & 0xFFFFFFFF for _ in range(num_axes)]
    body = bytes(draw.choice((0, 1, 100, 2352, _MIB)))
    whole = struct.pack(f">HBB{num_axes}I", 0, code, num_axes, *sizes) + body
    if draw.random() < 0.2:  # a bomb: it unpacks to as much as it promises, and more
        whole = struct.pack(">HBBI", 0, 8, 1, draw.choice((16 * _MIB, 2**32 - 1)))
        whole += bytes(16 * _MIB)
    return gzip.compress(whole, 1) if draw.random() < 0.5 or len(whole) > 2 * _MIB else whole


# NumPy's formats


class _Evil:
    """Runs a command when it is unpickled: what must never happen."""

    def __init__(self, sentinel: str):
        self._sentinel = sentinel

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self._sentinel}",)


def forge_npy(draw: random.Random, sentinel: str) -> bytes:
    """Returns a `.npy` file with a forged header or a pickle in it."""
    file = io.BytesIO()
    kind = draw.randrange(4)
    if kind == 0:
        array = np.empty(draw.choice((1, 3)), object)
        array[:] = _Evil(sentinel)
        np.save(file, array, allow_pickle=True)
        return file.getvalue()
    if kind == 1:  # a promise
        shape = tuple(draw.choice((*_NUMBERS, -1, 2**64)) for _ in range(draw.randint(0, 4)))
        dtype = draw.choice(("<f4", "|u1", "<f8", "|V2000000000", "|O", "<U9", "<M8[s]", ">i8"))
        header = {"descr": dtype, "fortran_order": draw.random() < 0.5, "shape": shape}
        text = repr(header)
    elif kind == 2:  # a literal that is hard to read
        depth = draw.choice((10, 150, 5000))
        text = draw.choice(("(" * depth + ")" * depth, "-" * depth + "1", "[" * depth, "{" * depth))
    else:  # of other types than it should be
        odd = draw.choice((None, True, "x", 1.5, [("a", "<f4"), ("b", "|O")], ("<f4", (2, 3)), {}))
        header = {"descr": "<f4", "fortran_order": False, "shape": (2, 3)}
        header[draw.choice((*header, "more"))] = odd
        text = repr(header)
    packed = text.encode() + b"\n"
    version = draw.choice((1, 1, 2, 3, 9))
    length = draw.choice((len(packed), len(packed), 0, 0xFFFF))
    prefix = b"\x93NUMPY" + bytes((version, 0))
    size = struct.pack("<H" if version == 1 else "<I", length)
    return prefix + size + packed + bytes(draw.choice((0, 24, 1000)))


def forge_npz(draw: random.Random, arrays: dict[str, np.ndarray], sentinel: str) -> bytes:
    """Returns a zip file that opens, with members that do not belong there."""
    file = io.BytesIO()
    methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    method = draw.choice(methods)
    with zipfile.ZipFile(file, "w") as archive:
        victim = draw.choice(list(arrays))
        for name, array in arrays.items():
            member = io.BytesIO()
            np.save(member, array)
            content = member.getvalue()
            if name == victim:
                content = draw.choice(
                    (
                        lambda: forge_npy(draw, sentinel),
                        lambda content=content: mutate(draw, content),
                        lambda content=content: content + bytes(draw.choice((1, 8 * _MIB))),
                    )
                )()
            path = name if name == victim and draw.random() < 0.1 else f"{name}.npy"
            archive.writestr(zipfile.ZipInfo(path), content, method)  # of 1980, not of today
        for name in draw.choice(((), ("../../evil.npy", "/evil.npy"), ("x_train", "x_train/"))):
            archive.writestr(zipfile.ZipInfo(name), draw.randbytes(20))
    whole = bytearray(file.getvalue())
    if draw.random() < 0.3:  # flags and sizes in the directory: encrypted, other methods, huge
        start = whole.find(b"PK\x01\x02")
        whole[start + draw.randrange(6, 46)] = draw.randrange(256)
    return bytes(whole)


# JSON


def forge_json(draw: random.Random, whole: bytes) -> bytes:
    """Returns JSON in which a value has been replaced, moved or left out, or that is hard to read.

    Args:
      draw: Of random numbers.
      whole: A JSON object.
    """
    if draw.random() < 0.15:
        depth = draw.choice((100, 100_000))
        hard = ("[" * depth, '{"a":' * depth, "9" * 5000, '"\\ud800"', "NaN", "[]", "null", "")
        return draw.choice(hard).encode()
    value = json.loads(whole)
    holder: Any = value
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = draw.choice(keys)
        if not isinstance(holder[key], dict | list) or not holder[key] or draw.random() < 0.5:
            break
        holder = holder[key]
    if draw.random() < 0.2:
        del holder[key]
    else:
        odd = (None, True, -1, 0, 1.5, 10**400, 1e308, "", "x", [], [1, "a"], {}, {"a": 1}, [[]])
        holder[key] = draw.choice(odd)
    text = json.dumps(value)
    return text.replace("1e+308", draw.choice(("1e999", "Infinity"))).encode()

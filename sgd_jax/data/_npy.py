"""The header of the `.npy` format; its values are read elsewhere, and pickles nowhere."""

from typing import Any

import numpy as np
from numpy.lib import format as npy


def read_npy_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Returns shape, whether in Fortran order, and dtype; the stream then stands behind the header.

    Raises:
      ValueError: The stream does not begin with a header of the format.
    """
    try:
        version = npy.read_magic(stream)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        return read(stream)
    except Exception as error:  # NumPy takes the header for Python: of a forged one comes anything
        raise ValueError(f"{type(error).__name__}: {error}") from error

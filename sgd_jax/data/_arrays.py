"""What arrays of one's own must be to make a data set, in whatever file they come."""

import math

import numpy as np

from sgd_jax.data._examples import Examples

_INPUT_DTYPES = ("uint8", "float32", "float64")
_MAX_CLASSES = 2**31


def check_headers(headers: dict[str, tuple[tuple[int, ...], np.dtype]]) -> None:
    """Raises TypeError or ValueError where shapes and dtypes do not make a data set."""
    train_shape, train_dtype = headers["x_train"]
    for name, (shape, dtype) in headers.items():
        if name.startswith("y_"):
            if dtype.kind not in "iu":
                raise TypeError(
                    f"{name} has dtype {dtype}; expected integers, one class number an example. "
                    f"Convert with {name}.astype(np.int32)."
                )
            num_examples = headers["x" + name[1:]][0][0]
            if shape != (num_examples,):
                raise ValueError(
                    f"{name} has shape {shape}; expected ({num_examples},), one label for each "
                    f"row of x{name[1:]}. Use argmax(axis=1) on one-hot rows, ravel() on a column."
                )
            continue
        if loaded_dtype(dtype).name not in _INPUT_DTYPES:
            raise TypeError(
                f"{name} has dtype {dtype}; expected {', '.join(_INPUT_DTYPES)} or float16. "
                f"Convert with {name}.astype(np.float32), or np.uint8 for pixels 0 to 255."
            )
        if loaded_dtype(dtype) != loaded_dtype(train_dtype):
            raise TypeError(
                f"{name} has dtype {dtype}; expected {train_dtype} as x_train has. "
                "Give all inputs the same dtype and scale."
            )
        if math.prod(shape[1:]) != math.prod(train_shape[1:]):
            raise ValueError(
                f"{name} has rows of shape {shape[1:]}; expected {train_shape[1:]} as x_train has. "
                "Give all inputs the same features."
            )


def loaded_dtype(dtype: np.dtype) -> np.dtype:
    """Returns what inputs of this dtype are read as: in native byte order, halves as float32."""
    return np.dtype(np.float32) if dtype.name == "float16" else dtype.newbyteorder("=")


def check_finite(name: str, inputs: np.ndarray, first: int = 0) -> None:
    """Raises ValueError at the first input that is NaN or infinite; row 0 has number ``first``."""
    finite = np.isfinite(inputs)
    if not finite.all():
        index = tuple(int(i) for i in np.unravel_index(np.argmin(finite), inputs.shape))
        raise ValueError(
            f"{name}{[first + index[0], *index[1:]]} is {inputs[index]}; expected finite inputs. "
            "Remove or fill in such examples."
        )


def hold_out(examples: Examples) -> tuple[Examples, Examples]:
    """Returns all but the last tenth (rounded down, at least one example), and that tenth."""
    num_examples = len(examples.labels)
    if num_examples < 2:
        raise ValueError(
            "x_train has 1 example; expected at least 2, one of them held out for validation. "
            "Add examples, or give x_validation and y_validation."
        )
    cut = num_examples - max(1, num_examples // 10)
    return (
        Examples(examples.inputs[:cut], examples.labels[:cut]),
        Examples(examples.inputs[cut:], examples.labels[cut:]),
    )


def count_classes(largest: int) -> int:
    """Returns the number of classes where ``largest`` is the largest training label."""
    if largest >= _MAX_CLASSES:
        raise ValueError(
            f"y_train holds label {largest}; expected less than {_MAX_CLASSES}. "
            "Number the classes from 0."
        )
    return 1 + max(largest, 0)


def default_scale(dtype: np.dtype) -> float:
    """Returns what inputs of this dtype are divided by: pixels land in [0, 1]."""
    return 255.0 if dtype == np.uint8 else 1.0

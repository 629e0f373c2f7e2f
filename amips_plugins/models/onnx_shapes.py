"""The shape and kind of every value of a model, worked out from its operators.

What an operator takes is refused unless ``export.to_onnx`` writes it so. Row and column numbers
that a model looks up are known to be there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from amips_plugins.models.protobuf import Malformed

__all__ = ["FLOAT", "INT8", "INT64", "N_QUERIES", "UINT8", "Value", "results_of"]

FLOAT, UINT8, INT8, INT32, INT64 = 1, 2, 3, 6, 7  # ONNX's numbers for them
N_QUERIES = -1  # the free axis


@dataclass(frozen=True)
class Value:
    """A matrix, a vector or a number; ``constant`` holds what the file says it is.

    Of row and column numbers all are at least 0, and less than ``below``.
    """

    shape: tuple[int, ...]
    dtype: int = FLOAT
    constant: npt.NDArray[Any] | None = None
    below: int = 0


def results_of(operator: str, inputs: Sequence[Value]) -> tuple[Value, ...]:
    """Return the shapes of what an operator gives, or refuse what it takes."""
    look_up = _LOOK_UPS.get(operator)
    found = None if look_up is None else look_up(inputs)
    return (_result(operator, inputs),) if found is None else found


def _result(operator: str, inputs: Sequence[Value]) -> Value:
    shapes = [value.shape for value in inputs]
    first, *others = shapes or [()]
    floats = all(value.dtype == FLOAT for value in inputs)
    matrices = floats and all(len(shape) == 2 for shape in shapes)
    result: tuple[int, ...] | None = None
    dtype = FLOAT
    if operator == "ReduceMax" and len(first) == 3:
        result = first[:2] if floats and len(shapes) == 1 else None
    elif any(len(shape) == 3 for shape in shapes):
        result = None  # groups of columns are there to be reduced, or multiplied
    elif operator in ("Abs", "Identity", "Relu"):
        result = first if floats and len(shapes) == 1 else None
    elif operator in ("Add", "Div", "Max", "Mul"):
        result = _broadcast(first, others[0]) if floats and len(shapes) == 2 else None
    elif operator == "LogSoftmax":
        result = first if matrices and len(shapes) == 1 else None
    elif operator in ("ReduceL2", "ReduceMax"):
        result = (first[0], 1) if matrices and len(shapes) == 1 else None
    elif operator == "Gemm":
        result = _gemm(shapes) if floats else None
    elif operator == "QuantizeLinear":
        result, dtype = _quantised(inputs), UINT8
    elif operator == "MatMulInteger":
        result, dtype = _integer_product(inputs), INT32
    elif operator == "Cast":
        result = first if [value.dtype for value in inputs] == [INT32] else None
    elif operator == "Concat":
        fits = matrices and len(shapes) == 2 and first[0] == others[0][0]
        result = (first[0], first[1] + others[0][1]) if fits else None
    elif operator == "Slice":
        result = _slice(inputs)
    if result is None or result[:1] != (N_QUERIES,):  # what comes out is a row for each query
        raise Malformed(f"its {operator} takes the shapes {[list(shape) for shape in shapes[:4]]}")
    return Value(result, dtype)


def _broadcast(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...] | None:
    rank = max(len(left), len(right))
    pairs = zip((1,) * (rank - len(left)) + left, (1,) * (rank - len(right)) + right, strict=True)
    result = []
    for one, other in pairs:
        if one != other and 1 not in (one, other):
            return None
        result.append(other if one == 1 else one)
    # The queries lie along the first axis of a matrix and nowhere else.
    return None if N_QUERIES in result[1:] else tuple(result)


def _gemm(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    if len(shapes) not in (2, 3) or len(shapes[0]) != 2 or len(shapes[1]) != 2:
        return None
    (rows, inner), (columns, of_weight) = shapes[:2]
    if inner != of_weight or columns == N_QUERIES or shapes[2:] not in ([], [(columns,)]):
        return None
    return rows, columns


def _quantised(inputs: Sequence[Value]) -> tuple[int, ...] | None:
    """Return the shape of a matrix of floats in steps of one size."""
    if len(inputs) != 3 or inputs[0].dtype != FLOAT or len(inputs[0].shape) != 2:
        return None
    plain = _is_number(inputs[1], FLOAT) and _is_number(inputs[2], UINT8)
    return inputs[0].shape if plain else None


def _integer_product(inputs: Sequence[Value]) -> tuple[int, ...] | None:
    """Return the shape of the product of quantised rows and constant weights."""
    if len(inputs) != 3 or not _is_number(inputs[2], UINT8):
        return None
    rows, weight = inputs[:2]
    if (rows.dtype, weight.dtype) != (UINT8, INT8):
        return None
    if (len(rows.shape), len(weight.shape)) != (2, 2):
        return None
    return (rows.shape[0], weight.shape[1]) if rows.shape[1] == weight.shape[0] else None


def _is_number(value: Value, dtype: int) -> bool:
    return value.constant is not None and value.dtype == dtype and value.shape == ()


def _slice(inputs: Sequence[Value]) -> tuple[int, ...] | None:
    """Return the shape of the first columns of a matrix."""
    if len(inputs) != 4 or inputs[0].dtype != FLOAT or len(inputs[0].shape) != 2:
        return None
    bounds = [value.constant for value in inputs[1:]]
    if any(bound is None or bound.shape != (1,) or bound.dtype != np.int64 for bound in bounds):
        return None
    start, stop, axis = (int(bound[0]) for bound in bounds if bound is not None)
    rows, columns = inputs[0].shape
    return (rows, stop) if (start, axis) == (0, 1) and 0 < stop <= columns else None


def _best(inputs: Sequence[Value]) -> tuple[Value, ...] | None:
    """TopK: the largest columns of a matrix, and their numbers."""
    if len(inputs) != 2 or not _is_floats(inputs[0], 2):
        return None
    wanted, (rows, columns) = inputs[1].constant, inputs[0].shape
    if rows != N_QUERIES or wanted is None or wanted.dtype != np.int64 or wanted.shape != (1,):
        return None
    count = int(wanted[0])
    if not 0 < count <= columns:
        return None
    return Value((rows, count)), Value((rows, count), INT64, below=columns)


def _rows(inputs: Sequence[Value]) -> tuple[Value, ...] | None:
    """Gather: rows of a constant matrix by their numbers, for every query several."""
    if len(inputs) != 2 or inputs[0].constant is None or len(inputs[0].shape) != 2:
        return None
    table, numbers = inputs
    (rows, columns), below = table.shape, 0
    if numbers.dtype != INT64 or len(numbers.shape) != 2 or not 0 < numbers.below <= rows:
        return None
    if table.dtype == INT64:
        assert table.constant is not None  # noqa: S101 - for the type checker
        if table.constant.min() < 0:
            return None
        below = int(table.constant.max()) + 1
    elif table.dtype != FLOAT:
        return None
    return (Value((*numbers.shape, columns), table.dtype, below=below),)


def _reshaped(inputs: Sequence[Value]) -> tuple[Value, ...] | None:
    """Reshape: a query's numbers in rows of one length, or in a row."""
    if len(inputs) != 2 or inputs[0].shape[:1] != (N_QUERIES,):
        return None
    value, wanted = inputs[0], inputs[1].constant
    if value.dtype not in (FLOAT, INT64) or wanted is None or wanted.dtype != np.int64:
        return None
    size = math.prod(value.shape[1:])
    match wanted.tolist() if wanted.ndim == 1 else []:
        case [0, -1] if len(value.shape) == 3:
            return (Value((N_QUERIES, size), value.dtype, below=value.below),)
        case [0, -1, row] if row > 0 and size % row == 0:
            return (Value((N_QUERIES, size // row, row), value.dtype, below=value.below),)
    return None


def _products(inputs: Sequence[Value]) -> tuple[Value, ...] | None:
    """MatMul: every query's rows times its one column."""
    if len(inputs) != 2 or not all(_is_floats(value, 3) for value in inputs):
        return None
    (queries, count, inner), column = (value.shape for value in inputs)
    return (Value((queries, count, 1)),) if column == (queries, inner, 1) else None


def _scattered(inputs: Sequence[Value]) -> tuple[Value, ...] | None:
    """ScatterElements: a matrix in which some columns of every row are replaced."""
    if len(inputs) != 3 or not (_is_floats(inputs[0], 2) and _is_floats(inputs[2], 2)):
        return None
    base, numbers, new = inputs
    fits = base.shape[0] == new.shape[0] == N_QUERIES and numbers.shape == new.shape
    fits = fits and numbers.dtype == INT64 and 0 < numbers.below <= base.shape[1]
    return (Value(base.shape),) if fits else None


def _is_floats(value: Value, rank: int) -> bool:
    return value.dtype == FLOAT and len(value.shape) == rank


_LOOK_UPS: Mapping[str, Callable[[Sequence[Value]], tuple[Value, ...] | None]] = {
    "Gather": _rows,
    "MatMul": _products,
    "Reshape": _reshaped,
    "ScatterElements": _scattered,
    "TopK": _best,
}
"""What chooses and looks up, and so knows which numbers may come."""

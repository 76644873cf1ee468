"""Small mathematics in standard array calls: sums, shifts and normalisations along one axis of a stack of matrices."""

from __future__ import annotations

from typing import Any

import numpy as np

from birkhoff import _xp

__all__ = [
    "accumulate_dtype",
    "compute_dtype",
    "exp_in_sum",
    "log_divide",
    "lower_bound",
    "marginal_errors",
    "maximum_along",
    "reciprocal",
    "reduce_sum",
    "softmax",
]


def compute_dtype(xp: Any, array: Any) -> Any:
    """The dtype to compute in: the array's own, or float32 for half precisions."""
    return array.dtype if _xp.dtype_name(array.dtype) in ("float32", "float64") else xp.float32


def accumulate_dtype(xp: Any, array: Any) -> Any:
    """Float64 where the array's device has it, else the compute dtype."""
    return xp.float64 if _has_float64(xp, array) else compute_dtype(xp, array)


def _has_float64(xp: Any, array: Any) -> bool:
    """Whether the array's device has float64."""
    if _xp.library_name(xp) in ("numpy", "torch", "cupy"):
        return _xp.device_kind(array) != "mps"
    return "float64" in xp.__array_namespace_info__().dtypes(device=_xp.device(array), kind="real floating")


def reduce_sum(xp: Any, array: Any, axis: int, accumulate: Any) -> Any:
    """Sum along ``axis``, kept as an axis of length one, accumulated in the dtype ``accumulate``."""
    if accumulate == array.dtype:
        if type(array) is np.ndarray:  # what numpy.sum calls, at a third of its price for a small array
            return np.add.reduce(array, axis=axis, keepdims=True)
        return xp.sum(array, axis=axis, keepdims=True)
    return _xp.astype(xp, xp.sum(array, axis=axis, keepdims=True, dtype=accumulate), array.dtype)


def reciprocal(array: Any) -> Any:
    """``1 / array``; torch divides a number by a tensor in Python, and has a method that does not."""
    method = getattr(array, "reciprocal", None)
    return 1.0 / array if method is None else method()


def lower_bound(xp: Any, array: Any, low: Any) -> Any:
    """``max(array, low)`` that lets NaN through; where both are equal, derivatives are those of the array."""
    return xp.where(array < low, low, array)


def maximum_along(xp: Any, logits: Any, axis: int) -> Any:
    """The maximum along ``axis``, or the lowest finite number for a line of -inf, so that subtracting it is safe."""
    return lower_bound(xp, xp.max(logits, axis=axis, keepdims=True), xp.finfo(logits.dtype).min)


_SMALLEST_EXPONENT = {"float32": -87.0, "float64": -708.0}  # exp of less is a denormal number, or zero


def exp_in_sum(xp: Any, exponents: Any, branch: bool) -> Any:
    """``exp(exponents)`` for a sum whose largest term is one.

    On the host, terms that would be denormal numbers (which a processor makes one at a time) or zero become the
    smallest normal ones, which such a sum does not notice.
    """
    if not branch:
        return xp.exp(exponents)
    return xp.exp(xp.maximum(exponents, _SMALLEST_EXPONENT[_xp.dtype_name(exponents.dtype)]))


def log_divide(xp: Any, logits: Any, axis: int, accumulate: Any, *, branch: bool) -> Any:
    r"""Divide ``exp(logits)`` by its sums along ``axis``, in the log domain.

    .. math:: L_{ij} \leftarrow L_{ij} - \log \textstyle\sum_k \exp(L_{kj})

    The dominant entries end near zero, so their absolute error is a few roundings whatever the range. A line of -inf
    stays as it is.
    """
    shifted = logits - maximum_along(xp, logits, axis)
    # The largest term is exp(0) = 1; a smaller sum means a line of zeros, which log(1) = 0 leaves alone.
    total = lower_bound(xp, reduce_sum(xp, exp_in_sum(xp, shifted, branch), axis, accumulate), 1.0)
    return shifted - xp.log(total)


def softmax(xp: Any, logits: Any, axis: int, accumulate: Any) -> Any:
    """``exp(logits)`` divided by its sums along ``axis``: one shifted exponential and one linear division.

    The sums of the result are 1 within n + 1 units of roundoff. A line of -inf becomes a line of zeros.
    """
    scaled = xp.exp(logits - maximum_along(xp, logits, axis))
    return scaled / lower_bound(xp, reduce_sum(xp, scaled, axis, accumulate), 1.0)


def marginal_errors(xp: Any, matrix: Any) -> tuple[Any, Any]:
    """``max |row sum - 1|`` and ``max |column sum - 1|`` of each matrix of a batch ``(..., n, n)``."""
    rows = xp.max(xp.abs(xp.sum(matrix, axis=-1) - 1.0), axis=-1)
    columns = xp.max(xp.abs(xp.sum(matrix, axis=-2) - 1.0), axis=-1)
    return rows, columns

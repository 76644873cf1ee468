"""What functions ask of their arguments, in one place: arrays of square matrices, solvers, precisions, numbers."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

from birkhoff import _xp
from birkhoff.errors import ArrayTypeError, DtypeError, OptionError, ShapeError
from birkhoff.precision import DEFAULT, Precision

__all__ = [
    "as_count",
    "as_precision",
    "as_real",
    "check_solver",
    "iteration_options",
    "matching_gradient",
    "square_matrices",
]


def square_matrices(array: Any, name: str, *, nonempty: bool = False) -> Any:
    """The namespace of a batch of square matrices ``(..., n, n)``, or the error that says what is wrong with it.

    With ``nonempty`` n must be at least 1: a function that answers a question about a matrix has no answer for n = 0,
    whereas one that maps matrices to matrices returns the empty array.
    """
    xp = _xp.array_namespace(array)
    if getattr(array, "is_sparse", False) or getattr(array, "is_sparse_csr", False):
        raise ArrayTypeError(
            f"{name} must be a dense array, got a sparse tensor; use to_dense(), or birkhoff.sparse with SciPy or CuPy"
        )
    if not _xp.is_floating(array.dtype):
        raise DtypeError(
            f"{name} must be real floating (bfloat16, float16, float32, float64), got {_xp.dtype_name(array.dtype)}; "
            "convert with astype"
        )
    shape = tuple(array.shape)
    if len(shape) < 2 or shape[-1] != shape[-2] or (nonempty and shape[-1] == 0):
        raise ShapeError(
            f"{name} must have shape (..., n, n), got {shape}; the last two axes hold the square matrix"
            f"{', which must not be empty' if nonempty else ''}, all others are batch axes"
        )
    return xp


def matching_gradient(logits: Any, grad_matrix: Any) -> Any:
    """The namespace of logits and a real gradient of their projection, of the same shape and library."""
    xp = _xp.array_namespace(logits, grad_matrix)
    square_matrices(logits, "logits")
    if not _xp.is_floating(grad_matrix.dtype):
        raise DtypeError(f"grad_matrix must be real floating, got {_xp.dtype_name(grad_matrix.dtype)}")
    if logits.shape != grad_matrix.shape:
        raise ShapeError(
            f"grad_matrix must have the shape of logits, got {tuple(grad_matrix.shape)} and {tuple(logits.shape)}"
        )
    return xp


def check_solver(solver: Any) -> None:
    """Raise for what is not a value of :mod:`birkhoff.solvers`, a class of them included."""
    if isinstance(solver, type) or not hasattr(solver, "method"):
        raise OptionError(f"solver must be a value of birkhoff.solvers, such as SinkhornKnopp(), got {solver!r}")


def as_precision(precision: Any) -> Precision:
    """The precision asked for, the default one for None, or the error that says what is accepted."""
    if precision is not None and not isinstance(precision, Precision):
        raise OptionError(f"precision must be None or a birkhoff.Precision, got {precision!r}")
    return precision or DEFAULT


def as_count(value: Any, name: str, *, least: int) -> int:
    """An integer of any library as Python's own, or the error that says what is accepted."""
    number = value
    if not isinstance(value, int):
        try:
            number = operator.index(value)
        except TypeError:
            number = least - 1
    if isinstance(value, bool) or number < least:
        raise OptionError(f"{name} must be an integer >= {least}, got {value!r}")
    return int(number)


def as_real(value: Any, name: str) -> float:
    """A real number of any library as a Python float, or the error that names it."""
    if isinstance(value, (float, int, numbers.Real)) and not isinstance(value, bool):
        return float(value)
    raise OptionError(f"{name} must be a number, got {value!r}")


def iteration_options(num_iters: Any, tol: Any, first: Any, progress: Any) -> tuple[int, float | None]:
    """The limit and the tolerance of a function that iterates until it is told to stop; its other options checked."""
    if tol is not None and not 0.0 < as_real(tol, "tol") < math.inf:
        raise OptionError(f"tol must be None or a number > 0, got {tol!r}")
    if first not in ("columns", "rows"):
        raise OptionError(f"first must be 'columns' or 'rows', got {first!r}")
    if progress is not None and not callable(progress):
        raise OptionError(f"progress must be None or callable as progress(iteration, error), got {progress!r}")
    return as_count(num_iters, "num_iters", least=1), None if tol is None else as_real(tol, "tol")

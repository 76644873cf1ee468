"""What every function asks of an array of matrices, in one place: real floating, and square in its last two axes."""

from __future__ import annotations

from typing import Any

from birkhoff import _xp
from birkhoff.errors import DtypeError, OptionError, ShapeError

__all__ = ["check_solver", "matching_gradient", "square_matrices"]


def square_matrices(array: Any, name: str, *, nonempty: bool = False) -> Any:
    """The namespace of a batch of square matrices ``(..., n, n)``, or the error that says what is wrong with it.

    With ``nonempty`` n must be at least 1: a function that answers a question about a matrix has no answer for n = 0,
    whereas one that maps matrices to matrices returns the empty array.
    """
    xp = _xp.array_namespace(array)
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
    """The namespace of logits and a gradient of their projection, of the same shape and library."""
    xp = _xp.array_namespace(logits, grad_matrix)
    square_matrices(logits, "logits")
    if logits.shape != grad_matrix.shape:
        raise ShapeError(
            f"grad_matrix must have the shape of logits, got {tuple(grad_matrix.shape)} and {tuple(logits.shape)}"
        )
    return xp


def check_solver(solver: Any) -> None:
    """Raise for what is not a value of :mod:`birkhoff.solvers`, a class of them included."""
    if isinstance(solver, type) or not hasattr(solver, "method"):
        raise OptionError(f"solver must be a value of birkhoff.solvers, such as SinkhornKnopp(), got {solver!r}")

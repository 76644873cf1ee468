"""Linear systems with symmetric positive definite matrices, for a whole stack at once, in plain array calls.

A library's own solver works on one layout only, may raise for the whole batch when one matrix is singular, and waits
for a GPU to say so. Gauss-Jordan elimination without pivoting is stable for these matrices and does none of that.
"""

from __future__ import annotations

from typing import Any

from birkhoff import _xp
from birkhoff._layout import Frame

__all__ = ["solve_positive_definite"]


def solve_positive_definite(matrix: Any, right: Any, frame: Frame) -> Any:
    """Solve A x = b for a stack of symmetric positive definite A.

    Parameters
    ----------
    matrix : array, a stack of n x n matrices in the given frame
    right : array, a stack of n x 1 columns in the given frame
    frame : Frame

    Returns
    -------
    array
        The stack of n x 1 solutions. A singular or non-finite matrix gives infinities or NaN for itself alone.
    """
    xp, i, j = frame.xp, frame.i, frame.j
    n = matrix.shape[i]
    unit = xp.eye(n, dtype=matrix.dtype, device=_xp.device(matrix))
    unit = xp.reshape(unit, (n, n, 1)) if frame.batch == 2 else unit
    for k in range(n):
        pivot_row = _line(matrix, i, k)
        pivot = _line(pivot_row, j, k)
        scaled_row, scaled_right = pivot_row / pivot, _line(right, i, k) / pivot
        # Row k becomes scaled_row, every other row loses its entry in column k.
        column = _line(matrix, j, k) - _line(unit, j, k)
        matrix = matrix - column * scaled_row
        right = right - column * scaled_right
    return right


def _line(stack: Any, axis: int, k: int) -> Any:
    """Row or column k, kept as an axis of length one."""
    index = [slice(None)] * stack.ndim
    index[axis] = slice(k, k + 1)
    return stack[tuple(index)]

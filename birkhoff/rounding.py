"""Rounding to the Birkhoff polytope: the closed-form last step that makes marginals right for every input.

The two functions are the first two steps, and all three steps, of Algorithm 2 of Altschuler, Weed and Rigollet (2017).
One change matters in floating point only: a divisor above one is enlarged by four units of roundoff, so that no sum
exceeds one. Both are made of plain array operations: they run on every array library and on batches, and torch
differentiates them.
"""

from __future__ import annotations

from typing import Any

from birkhoff import _math, _xp
from birkhoff._checks import square_matrices

__all__ = ["round_to_nonexpansive", "round_to_polytope"]


def round_to_nonexpansive(matrix: Any) -> Any:
    r"""Shrink rows, then columns, whose sum exceeds one: afterwards the spectral norm is at most one.

    .. math:: A_1 = \operatorname{diag}(\min(1/r, 1))\, A, \qquad A_2 = A_1 \operatorname{diag}(\min(1/c(A_1), 1))

    Parameters
    ----------
    matrix : array, shape (..., n, n)
        Non-negative, real floating. Negative entries are treated as zero. bfloat16 and float16 are computed in
        float32; sums are taken in float64 where the device has it.

    Returns
    -------
    array, shape (..., n, n)
        Same library, device and dtype. Entries are never larger than those of ``matrix``.

    Raises
    ------
    ArrayTypeError, DtypeError, ShapeError
        For what is not an array, not real floating, or not a batch of square matrices.

    Notes
    -----
    Guarantee (:ref:`shrinking_gives_norm_at_most_one <claim-shrinking-gives-norm-at-most-one>`):
    every row and column sum is at most one, so
    :math:`\lVert A_2\rVert_2 \le \sqrt{\lVert A_2\rVert_1 \lVert A_2\rVert_\infty} \le 1`. In floating point, at most
    one means :math:`1 + n 2^{-53}` for the stored values of a float32 matrix, whose sums are taken in float64, and
    :math:`1 + (n + 2)\,2^{-53}` for float64; a result stored in bfloat16 or float16 adds the rounding of the cast. A
    matrix whose sums do not exceed one is returned unchanged. A NaN stays in its own matrix of the batch. No data is
    inspected, so nothing synchronises a device.

    References
    ----------
    .. [1] J. Altschuler, J. Weed, P. Rigollet, "Near-linear time approximation algorithms for optimal transport via
       Sinkhorn iteration", NIPS 2017, Algorithm 2.

    Examples
    --------
    >>> import numpy as np
    >>> from birkhoff.rounding import round_to_nonexpansive
    >>> P = round_to_nonexpansive(np.array([[1.5, 0.5], [0.0, 0.5]]))
    >>> bool(np.linalg.norm(P, 2) <= 1.0)
    True
    """
    xp, values, accumulate = _prepare(matrix)
    return _xp.astype(xp, _shrink(xp, values, accumulate), matrix.dtype)


def round_to_polytope(matrix: Any) -> Any:
    r"""Round a non-negative matrix to a doubly stochastic one nearby: both marginals exact up to a few roundings.

    After the two steps of :func:`round_to_nonexpansive` the deficits :math:`e_r = 1 - A_2 1` and
    :math:`e_c = 1 - A_2^\top 1` are non-negative and have the same total, and

    .. math:: B = A_2 + e_r e_c^\top / \lVert e_r \rVert_1

    has :math:`B 1 = 1` and :math:`B^\top 1 = 1`.

    Parameters
    ----------
    matrix : array, shape (..., n, n)
        Non-negative, real floating. Negative entries are treated as zero. The zero matrix gives the constant
        :math:`1/n`. bfloat16 and float16 are computed in float32.

    Returns
    -------
    array, shape (..., n, n)
        Same library, device and dtype, non-negative.

    Raises
    ------
    ArrayTypeError, DtypeError, ShapeError
        For what is not an array, not real floating, or not a batch of square matrices.

    Notes
    -----
    Guarantee (:ref:`rounding_makes_both_sides_exact <claim-rounding-makes-both-sides-exact>`,
    :ref:`rounding_moves_little <claim-rounding-moves-little>`): the sums of the stored values are within
    :math:`n + 4` units of roundoff of one in float32 (sums are taken in float64) and within :math:`n^2 + n + 4` units
    in float64: the fill divides by the sum of :math:`n` deficits, each with the error of a sum, which adds up when one
    row holds the whole deficit. And
    :math:`\lVert B - A\rVert_1 \le 2(\lVert A1 - 1\rVert_1 + \lVert A^\top 1 - 1\rVert_1)` up to rounding. It holds
    for every finite input, converged or not. Storing in bfloat16 or float16 adds the rounding of that dtype.
    This is a rounding, not a projection: it is near, not nearest. Differentiable except where a sum is exactly one;
    there the derivative of the unshrunk side is used.

    References
    ----------
    .. [1] J. Altschuler, J. Weed, P. Rigollet, "Near-linear time approximation algorithms for optimal transport via
       Sinkhorn iteration", NIPS 2017, Algorithm 2 and Lemma 7.

    Examples
    --------
    >>> import numpy as np
    >>> from birkhoff.rounding import round_to_polytope
    >>> P = round_to_polytope(np.array([[0.9, 0.2], [0.0, 0.5]]))
    >>> P.sum(axis=0), P.sum(axis=1)
    (array([1., 1.]), array([1., 1.]))
    """
    xp, values, accumulate = _prepare(matrix)
    shrunk = _shrink(xp, values, accumulate)
    deficit_rows = _positive_part(xp, 1.0 - xp.sum(shrunk, axis=-1, dtype=accumulate))  # e_r
    deficit_columns = _positive_part(xp, 1.0 - xp.sum(shrunk, axis=-2, dtype=accumulate))  # e_c
    total = xp.sum(deficit_rows, axis=-1, keepdims=True)  # the deficits of the columns have the same total
    share = deficit_columns / xp.where(total > 0, total, xp.ones_like(total))
    left = _xp.astype(xp, deficit_rows, values.dtype)[..., :, None]
    right = _xp.astype(xp, share, values.dtype)[..., None, :]
    return _xp.astype(xp, shrunk + left * right, matrix.dtype)


def _prepare(matrix: Any) -> tuple[Any, Any, Any]:
    """Namespace, non-negative values in the compute dtype, and the dtype of the sums."""
    xp = square_matrices(matrix, "matrix")
    values = _xp.astype(xp, _xp.contiguous(matrix), _math.compute_dtype(xp, matrix))
    accumulate = _math.accumulate_dtype(xp, matrix)
    return xp, _positive_part(xp, values), accumulate


def _positive_part(xp: Any, values: Any) -> Any:
    """``max(values, 0)`` that lets NaN through and has derivative one at zero."""
    return xp.where(values < 0, xp.zeros_like(values), values)


def _shrink(xp: Any, values: Any, accumulate: Any) -> Any:
    """Steps 1 and 2: divide rows, then columns, by their sum where it exceeds one."""
    margin = 1.0 + 2.0 * xp.finfo(values.dtype).eps  # two eps = four units of roundoff
    for axis in (-1, -2):
        sums = xp.sum(values, axis=axis, keepdims=True, dtype=accumulate)
        divisor = xp.where(sums > 1.0, sums * margin, xp.ones_like(sums))
        with _xp.quiet(values):
            values = values / _xp.astype(xp, divisor, values.dtype)
    return values

r"""The oracle: every iteration in plain NumPy float64, with numbered equations and no options.

Logits :math:`X` of shape ``(..., n, n)``; entry ``[o, i]`` is row (output) o, column (input) i.

.. math::

    M_0 &= \exp(X)                                             \tag{R1} \\
    T_c(M)_{oi} &= M_{oi} / \textstyle\sum_k M_{ki}            \tag{R2} \\
    T_r(M)_{oi} &= M_{oi} / \textstyle\sum_k M_{ok}            \tag{R3} \\
    M_t &= T_r(T_c(M_{t-1}))                                   \tag{R4}

(R1)-(R4) are evaluated on :math:`\log M`, so no logit range overflows or underflows before the last exponential. Tests,
proofs and benchmarks compare with this file; the library never imports it.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

__all__ = ["converged", "gradient", "sinkhorn", "sinkhorn_damped"]

Array = npt.NDArray[np.float64]


def _log_divide(log_matrix: Array, axis: int) -> Array:
    """(R2) for axis -2 and (R3) for axis -1, on logarithms; a line of zeros stays."""
    peak = np.max(log_matrix, axis=axis, keepdims=True)
    peak = np.where(np.isneginf(peak), 0.0, peak)
    with np.errstate(divide="ignore"):
        log_sum = peak + np.log(np.sum(np.exp(log_matrix - peak), axis=axis, keepdims=True))
    return log_matrix - np.where(np.isneginf(log_sum), 0.0, log_sum)


def _axes(first: Literal["columns", "rows"]) -> tuple[int, int]:
    return (-2, -1) if first == "columns" else (-1, -2)


def sinkhorn(
    logits: npt.ArrayLike, num_iters: int = 20, *, first: Literal["columns", "rows"] = "columns"
) -> npt.NDArray[np.float64]:
    r"""The truncated iteration :math:`M_t` of (R4); ``first="rows"`` swaps (R2) and (R3).

    Parameters
    ----------
    logits : array_like, shape (..., n, n)
        Finite, or -inf for an exact zero.
    num_iters : int
        Full iterations, each one column and one row normalisation.
    first : {"columns", "rows"}
        The side normalised first. The other side is exact at the end.

    Returns
    -------
    numpy.ndarray of float64, shape (..., n, n)

    Examples
    --------
    >>> from birkhoff.reference import sinkhorn
    >>> sinkhorn([[0.0, 0.0], [0.0, 0.0]])
    array([[0.5, 0.5],
           [0.5, 0.5]])
    """
    log_matrix = np.asarray(logits, dtype=np.float64)  # (R1)
    for _ in range(num_iters):  # (R4)
        for axis in _axes(first):
            log_matrix = _log_divide(log_matrix, axis)
    return np.exp(log_matrix)


def sinkhorn_damped(
    logits: npt.ArrayLike,
    num_iters: int = 20,
    *,
    first: Literal["columns", "rows"] = "rows",
    eps_start: float = 1e-6,
    eps_den: float = 1e-6,
) -> npt.NDArray[np.float64]:
    r"""The damped recurrence of DeepSeek-V4, on the matrix as it is stored.

    .. math::

        M_0 &= \operatorname{softmax}_{\text{rows}}(X) + \epsilon_s                                \tag{R5} \\
        T^\epsilon_c(M)_{jk} &= M_{jk} / (\textstyle\sum_l M_{lk} + \epsilon_d)                    \tag{R6} \\
        M_1 &= T^\epsilon_c(M_0), \quad M_t = T^\epsilon_c(T^\epsilon_r(M_{t-1})), \quad t = 2..T   \tag{R7}

    The softmax of (R5) counts as the first row normalisation. With both :math:`\epsilon` zero this is (R4) with
    ``first="rows"``.

    Examples
    --------
    >>> from birkhoff.reference import sinkhorn_damped
    >>> bool(abs(sinkhorn_damped([[0.0, 1.0], [2.0, 0.0]]).sum(axis=0) - 1).max() < 2e-6)
    True
    """
    first_axis, last_axis = _axes(first)
    matrix = np.exp(_log_divide(np.asarray(logits, dtype=np.float64), first_axis)) + eps_start  # (R5)
    matrix = matrix / (matrix.sum(axis=last_axis, keepdims=True) + eps_den)  # (R6)
    for _ in range(num_iters - 1):  # (R7)
        for axis in (first_axis, last_axis):
            matrix = matrix / (matrix.sum(axis=axis, keepdims=True) + eps_den)
    return matrix


def converged(logits: npt.ArrayLike, *, tol: float = 1e-13, max_iters: int = 200) -> npt.NDArray[np.float64]:
    r"""The limit :math:`M_\infty` of (R4), the Kullback-Leibler projection of :math:`\exp(X)`, for finite logits.

    Newton's method on the convex dual with the rows eliminated, one matrix at a time, steps halved until it falls:

    .. math:: P = \operatorname{softmax}_{\text{rows}}(X + 1 g^\top), \quad
              (\operatorname{diag}(P^\top 1) - P^\top P + \tfrac1n 11^\top)\, \delta = 1 - P^\top 1          \tag{R8}

    Parameters
    ----------
    logits : array_like, shape (..., n, n)
    tol : float
        Largest accepted ``max |column sum - 1|``; rows are exact.
    max_iters : int
        Newton steps.

    Raises
    ------
    ArithmeticError
        If a matrix does not reach ``tol``.

    Examples
    --------
    >>> from birkhoff.reference import converged
    >>> converged([[0.0, -40.0], [0.0, 0.0]]).sum(axis=0)
    array([1., 1.])
    """
    stack = np.asarray(logits, dtype=np.float64)
    flat = stack.reshape(-1, *stack.shape[-2:])
    return np.stack([_newton_limit(x, tol, max_iters) for x in flat]).reshape(stack.shape) if len(flat) else stack


def _newton_limit(logits: Array, tol: float, max_iters: int) -> Array:
    n = logits.shape[-1]
    g = np.zeros(n)

    def log_rows_normalised(g: Array) -> Array:
        return _log_divide(logits + g, -1)

    def dual(g: Array) -> float:
        return float(np.sum(np.logaddexp.reduce(logits + g, axis=-1)) - g.sum())

    for _ in range(max_iters):
        g = g - np.logaddexp.reduce(log_rows_normalised(g), axis=0)  # one Sinkhorn iteration: columns, then rows
        matrix = np.exp(log_rows_normalised(g))
        columns = matrix.sum(axis=0)
        if np.abs(columns - 1.0).max() <= tol:
            return matrix
        hessian = np.diag(columns) - matrix.T @ matrix + 1.0 / n  # (R8)
        step = np.linalg.lstsq(hessian, 1.0 - columns, rcond=None)[0]
        length = 1.0
        while length > 1e-9 and dual(g + length * step) > dual(g):
            length /= 2.0
        g = g + length * step
    worst = float(np.abs(np.exp(log_rows_normalised(g)).sum(axis=0) - 1.0).max())
    raise ArithmeticError(f"the limit was not reached: max |column sum - 1| = {worst:.2e} after {max_iters} steps")


def gradient(
    logits: npt.ArrayLike,
    grad_matrix: npt.ArrayLike,
    num_iters: int = 20,
    *,
    first: Literal["columns", "rows"] = "columns",
) -> npt.NDArray[np.float64]:
    r"""The exact vector-Jacobian product of :func:`sinkhorn`, every iterate kept.

    Reverse through :math:`L \mapsto L - \log\sum\exp L`, whose normalised matrix is :math:`P`:

    .. math:: \bar L_{t-1} = \bar L_t - P_t \circ (1 1^\top \bar L_t) \text{ (columns)}, \quad
              \bar L_{t-1} = \bar L_t - P_t \circ (\bar L_t 1 1^\top) \text{ (rows)}, \quad
              \bar L_{\text{end}} = P \circ G                                                        \tag{R9}

    Examples
    --------
    >>> from birkhoff.reference import gradient
    >>> gradient([[0.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]])
    array([[ 0.125, -0.125],
           [-0.125,  0.125]])
    """
    log_matrix = np.asarray(logits, dtype=np.float64)
    kept: list[tuple[Array, int]] = []
    for _ in range(num_iters):
        for axis in _axes(first):
            log_matrix = _log_divide(log_matrix, axis)
            kept.append((np.exp(log_matrix), axis))
    adjoint = np.exp(log_matrix) * np.asarray(grad_matrix, dtype=np.float64)
    for matrix, axis in reversed(kept):
        adjoint = adjoint - matrix * adjoint.sum(axis=axis, keepdims=True)
    return adjoint

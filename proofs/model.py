"""The mathematical model that implementations are compared with: the iteration in extended precision.

Independent of `birkhoff`: the iterates are written down once more, from the equations, in the widest float that
NumPy has on the machine (80 bits on x86), so that an error shared with the library's own oracle is seen too.
"""

from __future__ import annotations

import numpy as np

__all__ = ["damped_derivative", "damped_iterate", "derivative", "iterate", "limit"]


def _log_sum_exp(values: np.ndarray, axis: int) -> np.ndarray:
    top = np.max(values, axis=axis, keepdims=True)
    shift = np.where(np.isfinite(top), top, 0)
    with np.errstate(divide="ignore"):
        return shift + np.log(np.sum(np.exp(values - shift), axis=axis, keepdims=True))


def _normalise(log_matrix: np.ndarray, axis: int) -> np.ndarray:
    """Divide by the sums along `axis`, in the log domain; a zero line stays zero."""
    total = _log_sum_exp(log_matrix, axis)
    return log_matrix - np.where(np.isfinite(total), total, 0)


def _axes(first: str) -> tuple[int, int]:
    """Axis of the first and of the second sum: summing over axis -2 gives column sums."""
    return (-2, -1) if first == "columns" else (-1, -2)


def iterate(logits: np.ndarray, num_iters: int, first: str = "columns") -> np.ndarray:
    """Return `num_iters` alternating normalisations of exp(logits), both sides each time.

    Parameters
    ----------
    logits : numpy.ndarray, shape (..., n, n)
        ``-inf`` is an exact zero.
    first : {"columns", "rows"}
        Which sums are made 1 first; the other side is exact at the end.
    """
    log_matrix = np.asarray(logits, dtype=np.longdouble)
    one, two = _axes(first)
    for _ in range(num_iters):
        log_matrix = _normalise(_normalise(log_matrix, one), two)
    return np.exp(log_matrix)


def damped_iterate(
    logits: np.ndarray, num_iters: int, eps_start: float, eps_den: float, first: str = "rows"
) -> np.ndarray:
    """Return the softmax-started recurrence with `eps_den` added to every divisor.

    The start is a softmax along the lines of the first-normalised side plus `eps_start`; it replaces the first of the
    `2 num_iters` normalisations.
    """
    one, two = _axes(first)
    matrix = np.exp(_normalise(np.asarray(logits, dtype=np.longdouble), one)) + np.longdouble(eps_start)
    matrix = matrix / (np.sum(matrix, axis=two, keepdims=True) + np.longdouble(eps_den))
    for _ in range(num_iters - 1):
        matrix = matrix / (np.sum(matrix, axis=one, keepdims=True) + np.longdouble(eps_den))
        matrix = matrix / (np.sum(matrix, axis=two, keepdims=True) + np.longdouble(eps_den))
    return matrix


def derivative(logits: np.ndarray, direction: np.ndarray, num_iters: int, first: str = "columns") -> np.ndarray:
    """Return the directional derivative of :func:`iterate`, by differentiating each log-domain step.

    A step L -> L - lse(L) has the derivative V -> V - sum(P * V), P the normalised matrix, along the same axis.
    """
    log_matrix = np.asarray(logits, dtype=np.longdouble)
    tangent = np.asarray(direction, dtype=np.longdouble)
    for _ in range(num_iters):
        for axis in _axes(first):
            log_matrix = _normalise(log_matrix, axis)
            tangent = tangent - np.sum(np.exp(log_matrix) * tangent, axis=axis, keepdims=True)
    return np.exp(log_matrix) * tangent


def damped_derivative(
    logits: np.ndarray, direction: np.ndarray, num_iters: int, eps_start: float, eps_den: float, first: str = "rows"
) -> np.ndarray:
    """Return the directional derivative of :func:`damped_iterate`, carried along with the values.

    A step M -> M / s with s = sum(M) + eps has the derivative V -> (V - M / s * sum(V)) / s.
    """
    one, two = _axes(first)
    tangent = np.asarray(direction, dtype=np.longdouble)
    matrix = np.exp(_normalise(np.asarray(logits, dtype=np.longdouble), one))
    tangent = matrix * (tangent - np.sum(matrix * tangent, axis=one, keepdims=True))
    matrix = matrix + np.longdouble(eps_start)
    for axis in (two, *(one, two) * (num_iters - 1)):
        divisor = np.sum(matrix, axis=axis, keepdims=True) + np.longdouble(eps_den)
        matrix = matrix / divisor
        tangent = (tangent - matrix * np.sum(tangent, axis=axis, keepdims=True)) / divisor
    return tangent


def limit(logits: np.ndarray, max_iters: int = 20_000, tol: float = 1e-15, first: str = "columns") -> np.ndarray:
    """Iterate in float64 until the open side is within `tol` of 1, or `max_iters` is reached."""
    log_matrix = np.asarray(logits, dtype=np.float64)
    one, two = _axes(first)
    for _ in range(max_iters):
        log_matrix = _normalise(_normalise(log_matrix, one), two)
        if np.max(np.abs(np.sum(np.exp(log_matrix), axis=one) - 1), initial=0) <= tol:
            break
    return np.exp(log_matrix)

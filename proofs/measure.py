"""Measuring instruments of the claims: sums without rounding, allowances, norms beyond double precision."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from proofs.rational import norm_at_most, norm_below

__all__ = [
    "accuracy_allowance",
    "compute_roundoff",
    "finish_allowance",
    "limit_allowance",
    "logit_range",
    "marginal_allowance",
    "norm2",
    "norms_at_most",
    "norms_below",
    "roundings",
    "storage_error",
    "sums",
]

_COMPUTE = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-24, "bfloat16": 2.0**-24}
_STORE = {"float64": 0.0, "float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# below it a device may take numbers for zero (the smallest normal one), or a cast does (the smallest float16)
_TINY = {"float64": 2.0**-1022, "float32": 2.0**-126, "float16": 2.0**-24, "bfloat16": 2.0**-126}


def compute_roundoff(dtype: str) -> float:
    """Return u of the arithmetic: half precisions are computed in float32."""
    return _COMPUTE[dtype]


def storage_error(dtype: str) -> float:
    """Return the relative error of casting a result to its dtype; 0 where nothing is cast."""
    return _STORE[dtype]


def sums(matrix: np.ndarray, side: str) -> np.ndarray:
    """Return row or column sums with an error far below one float64 rounding.

    Parameters
    ----------
    matrix : numpy.ndarray, shape (..., n, n)
    side : {"rows", "columns"}

    Returns
    -------
    numpy.ndarray of float64, shape (..., n)

    Notes
    -----
    Neumaier's compensated summation: twice the working precision, in standard float64.

    Examples
    --------
    >>> import numpy as np
    >>> from proofs.measure import sums
    >>> sums(np.array([[1e16, 1.0], [0.0, -1e16]]), "columns").tolist(), sums(np.full((1, 3), 0.1), "rows").tolist()
    ([1e+16, -1e+16], [0.30000000000000004])
    """
    wide = np.asarray(matrix, dtype=np.float64)
    terms = np.moveaxis(wide, -1 if side == "rows" else -2, 0)
    if terms.shape[0] == 0:
        return np.zeros(terms.shape[1:])
    total, lost = terms[0].copy(), np.zeros_like(terms[0])
    with np.errstate(invalid="ignore", over="ignore"):
        for term in terms[1:]:
            new = total + term
            lost += np.where(np.abs(total) >= np.abs(term), (total - new) + term, (term - new) + total)
            total = new
        return total + lost


def logit_range(logits: np.ndarray) -> np.ndarray:
    """Return max - min over the finite logits of each matrix, shape (B,)."""
    wide = np.asarray(logits, dtype=np.float64)
    finite = np.isfinite(wide)
    top = np.max(np.where(finite, wide, -np.inf), axis=(-2, -1), initial=-np.inf)
    bottom = np.min(np.where(finite, wide, np.inf), axis=(-2, -1), initial=np.inf)
    return np.where(top >= bottom, top - bottom, 0.0)


def accuracy_allowance(logits: np.ndarray, dtype: str) -> np.ndarray:
    """Return the accuracy contract 4 n u max(1, range/16), with the cast to the stored dtype, shape (B,).

    >>> import numpy as np
    >>> from proofs.measure import accuracy_allowance
    >>> accuracy_allowance(np.array([[[0.0, 32.0], [0.0, 0.0]]]), "float32") / 2.0**-24
    array([16.])
    """
    size = logits.shape[-1]
    contract = 4 * size * _COMPUTE[dtype] * np.maximum(1.0, logit_range(logits) / 16)
    return contract + (1 + contract) * _STORE[dtype] + _TINY[dtype]


def roundings(units: int, size: int, dtype: str) -> float:
    """Return `units` of u, with the cast of a result near 1 to the stored dtype, and n numbers that are flushed."""
    computed = units * _COMPUTE[dtype]
    return computed + (1 + computed) * _STORE[dtype] + size * _TINY[dtype]


def marginal_allowance(size: int, dtype: str) -> float:
    """Return what the sums of the side that is normalised last may miss: (n+1) u, with :func:`roundings`' cast.

    >>> from proofs.measure import marginal_allowance
    >>> marginal_allowance(4, "float64") / 2.0**-53
    5.0
    """
    return roundings(size + 1, size, dtype)


def limit_allowance(size: int, tol: float = 1e-6) -> float:
    """Return how far two results of one limit may be apart when each holds its sums to `tol`: 4 n tol.

    Changing the sums changes the entries by the currents of a network whose conductances are the entries: no current
    exceeds what is injected, at most n tol in all, whatever the condition number.
    """
    return 4 * size * tol


def finish_allowance(size: int, dtype: str) -> float:
    """Return what the sums of an exactly finished matrix may miss: (n+4) u, for float64 (n^2+n+4) u.

    The rank-one fill divides by the sum of n deficits, each with the error of a sum of n entries. Float32 results are
    summed in float64, so only the stored entries round.
    """
    return roundings(size * size + size + 4 if dtype == "float64" else size + 4, size, dtype)


def norm2(matrix: np.ndarray) -> np.ndarray:
    """Return the largest singular value, float64 LAPACK, shape (...,); NaN for a matrix that is not finite."""
    wide = np.asarray(matrix, dtype=np.float64)
    finite = np.asarray(np.isfinite(wide).all(axis=(-2, -1)))
    norms = np.linalg.norm(np.where(finite[..., None, None], wide, 0.0), ord=2, axis=(-2, -1))
    return np.where(finite, norms, np.nan)


def norms_at_most(matrices: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Decide ``norm_2 <= bound`` for a stack of stored floats, shape (B,), without rounding."""
    return _decide(matrices, bounds, norm_at_most)


def norms_below(matrices: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Decide ``norm_2 < bound`` for a stack of stored floats, shape (B,), without rounding."""
    return _decide(matrices, bounds, norm_below)


def _decide(matrices: np.ndarray, bounds: np.ndarray, exactly: Callable[[np.ndarray, float], bool]) -> np.ndarray:
    """Eliminate ``bound^2 I - A^T A`` in extended precision; what that cannot decide goes to the rationals."""
    wide = np.asarray(matrices, dtype=np.longdouble)
    limits = np.asarray(bounds, dtype=np.longdouble)
    eps, size = np.finfo(np.longdouble).eps, wide.shape[-1]
    definite, undecided = np.ones(len(wide), dtype=bool), ~np.isfinite(limits)
    with np.errstate(all="ignore"):
        gram = -np.einsum("bki,bkj->bij", wide, wide)
        diagonal = np.arange(size)
        gram[:, diagonal, diagonal] += (limits**2)[:, None]
        error = 64 * size * eps * np.maximum(limits**2, np.max(np.abs(gram), axis=(1, 2), initial=0))
        for k in range(size):
            pivot = gram[:, k, k]
            undecided |= definite & ~(np.abs(pivot) > error)
            definite &= pivot > 0
            factors = gram[:, k, k + 1 :] / np.where(pivot == 0, np.longdouble(1), pivot)[:, None]
            gram[:, k + 1 :, k + 1 :] -= factors[:, :, None] * gram[:, k, None, k + 1 :]
            error = error * (1 + np.max(np.abs(factors), axis=1, initial=0) ** 2)  # what an error of a pivot becomes
    if eps > 1e-18:  # no extended precision on this machine
        undecided[:] = True
    for index in np.flatnonzero(undecided):
        definite[index] = exactly(matrices[index], float(bounds[index]))
    return definite

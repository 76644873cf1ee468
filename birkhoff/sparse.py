r"""Projection of sparse matrices: compressed rows in, compressed rows out, on SciPy or CuPy.

Only stored entries take part; the zeros stay. Whether a scaling exists is a question about the pattern alone, which is
answered first (:mod:`birkhoff.support`). The iteration is the one of :mod:`birkhoff.large`, with sparse
matrix-vector products and absorption.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from birkhoff import _xp
from birkhoff._checks import iteration_options
from birkhoff._result import Projection, Status
from birkhoff.errors import ArrayTypeError, DtypeError, OptionError, ProjectionError, ShapeError
from birkhoff.precision import unit_roundoff
from birkhoff.support import Support, require_scipy, sparse_total_support

__all__ = ["project_sparse"]

_LIMIT = 20.0  # see birkhoff.large


def project_sparse(
    matrix: Any,
    *,
    entries: Literal["values", "logits"] = "values",
    num_iters: int = 1000,
    tol: float | None = None,
    first: Literal["columns", "rows"] = "columns",
    restrict: bool = False,
    progress: Callable[[int, float], None] | None = None,
    throw: bool = False,
) -> Projection:
    r"""Scale the rows and columns of a sparse matrix so that it becomes doubly stochastic.

    Parameters
    ----------
    matrix : scipy.sparse or cupyx.scipy.sparse matrix or array, shape (n, n)
        float32 or float64, any format; it is read as CSR. Duplicate entries are summed.
    entries : {"values", "logits"}
        What the stored entries are: non-negative values (a stored zero is a zero), or logarithms of positive values, in
        which case a stored 0.0 is the value one and -inf is a zero.
    num_iters, tol, first, progress, throw
        As in :func:`birkhoff.large.project_large`.
    restrict : bool
        If the pattern has support but not total support, drop the entries that lie on no permutation. The result is
        then the limit of Sinkhorn's iteration, reached at its linear rate instead of at 1/k.

    Returns
    -------
    Projection
        ``matrix`` in CSR, with the pattern and dtype of the input (with ``restrict``: of its total support). The other
        fields are NumPy scalars. Without total support the status is ``no_total_support``, and the matrix is the last
        iterate.

    Raises
    ------
    ArrayTypeError, ShapeError, DtypeError, OptionError
        If the argument is not a sparse matrix, not square, not float32 or float64, or an option is out of its domain.
    MissingPackageError
        If SciPy, which analyses the pattern, is not installed.
    ProjectionError
        With ``throw``, for any status but ``converged``.

    Notes
    -----
    The pattern is analysed on the host (Hopcroft-Karp, then strongly connected components); the iteration runs where
    the matrix is. Negative values give ``Status.nonfinite_input``, as NaN does: they have no logarithm.

    Examples
    --------
    >>> import numpy as np, scipy.sparse as sparse
    >>> from birkhoff.sparse import project_sparse
    >>> matrix = sparse.csr_array(np.array([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0], [1.0, 0.0, 1.0]]))
    >>> result = project_sparse(matrix, tol=1e-12)
    >>> result.matrix.nnz, bool(abs(result.matrix.sum(axis=0) - 1).max() < 1e-12)
    (6, True)
    """
    csr, xp = _as_csr(matrix)
    name = _xp.dtype_name(csr.dtype)
    if name not in ("float32", "float64"):
        raise DtypeError(f"matrix must hold float32 or float64, got {name}; convert with astype")
    if entries not in ("values", "logits"):
        raise OptionError(f"entries must be 'values' or 'logits', got {entries!r}")
    num_iters, tol = iteration_options(num_iters, tol, first, progress)
    target = unit_roundoff(name) ** 0.5 if tol is None else tol
    with np.errstate(all="ignore"):
        logits = xp.log(csr.data) if entries == "values" else csr.data.copy()
        bad = bool(xp.any(xp.isnan(logits) | (logits == xp.inf)))
        csr, logits, support = _diagnosed(csr, logits, xp, restrict)
        problem = _Entries.of(csr, logits, xp)
        data, iterations, row_error, column_error = problem.scaled(num_iters, target, first, progress)
    if bad:
        status = Status.nonfinite_input
    elif support is not Support.total:
        status = Status.no_total_support
    else:
        error = column_error if first == "columns" else row_error
        status = Status.converged if error <= target else Status.max_iters_reached
    if throw and status != Status.converged:
        raise ProjectionError(
            f"{status.name} after {iterations} iterations, tol={target:g}. {status.advice}", status=status
        )
    result = type(csr)((data, csr.indices, csr.indptr), shape=csr.shape)
    return Projection(result, np.int32(status), np.int32(iterations), np.float64(row_error), np.float64(column_error))


def _as_csr(matrix: Any) -> tuple[Any, Any]:
    """A fresh CSR with summed duplicates, and the array module of its data."""
    if not (hasattr(matrix, "tocsr") and hasattr(matrix, "nnz")):
        got = f"{type(matrix).__module__}.{type(matrix).__qualname__}"
        raise ArrayTypeError(
            f"expected a scipy.sparse or cupyx.scipy.sparse matrix, got {got}; use project for dense arrays"
        )
    shape = tuple(matrix.shape)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ShapeError(f"matrix must have shape (n, n) with n >= 1, got {shape}")
    csr = matrix.tocsr(copy=True)
    csr.sum_duplicates()
    return csr, _xp.array_namespace(csr.data)


def _diagnosed(csr: Any, logits: Any, xp: Any, restrict: bool) -> tuple[Any, Any, Support]:
    """The support of the positive entries; with ``restrict``, the matrix cut down to its total support."""
    sparse, _ = require_scipy("project_sparse")
    host = [_xp.to_numpy(part) for part in (logits, csr.indices, csr.indptr)]
    pattern = sparse.csr_array(((host[0] != -np.inf).astype(np.int8), host[1], host[2]), shape=csr.shape)
    support, kept = sparse_total_support(pattern)
    if not (restrict and support is Support.partial):
        return csr, logits, support
    row_of = np.repeat(np.arange(csr.shape[0]), np.diff(host[2]))[kept]
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=csr.shape[0]))])
    chosen = xp.asarray(np.flatnonzero(kept))
    arrays = (csr.data[chosen], csr.indices[chosen], xp.asarray(indptr.astype(host[2].dtype)))
    return type(csr)(arrays, shape=csr.shape), logits[chosen], Support.total


@dataclass(frozen=True)
class _Entries:
    """The stored entries as coordinates: everything an iteration needs."""

    xp: Any
    kind: Any
    logits: Any
    rows: Any
    columns: Any
    indptr: Any
    n: int

    @classmethod
    def of(cls, csr: Any, logits: Any, xp: Any) -> _Entries:
        counts = _xp.to_numpy(csr.indptr)
        rows = xp.asarray(np.repeat(np.arange(csr.shape[0]), np.diff(counts)))
        return cls(xp, type(csr), logits, rows, csr.indices, csr.indptr, csr.shape[0])

    def scaled(
        self, num_iters: int, tol: float, first: str, progress: Callable[[int, float], None] | None
    ) -> tuple[Any, int, float, float]:
        """Scaled entries, iterations, row and column error."""
        xp = self.xp
        # "left" scales the side normalised last, "right" the side normalised first.
        lefts, rights = (self.rows, self.columns) if first == "columns" else (self.columns, self.rows)
        log_left = xp.zeros((self.n,), dtype=self.logits.dtype)
        log_left, log_right, kernel, sums = self._absorb(log_left, lefts, rights, first)
        left = right = xp.ones_like(log_left)
        iteration, error = 1, _distance_from_one(xp, sums)
        while True:
            if progress is not None:
                progress(iteration, error)
            if error <= tol or iteration >= num_iters or error != error:
                break
            next_right = 1.0 / sums
            next_left = 1.0 / (kernel @ next_right)
            if _within(xp, next_right) and _within(xp, next_left):
                left, right = next_left, next_right
                sums = kernel.T @ left
                error = _distance_from_one(xp, sums * right)
            else:
                log_left, log_right, kernel, sums = self._absorb(log_left + xp.log(left), lefts, rights, first)
                left = right = xp.ones_like(log_left)
                error = _distance_from_one(xp, sums)
            iteration += 1
        exponents = self.logits + (log_left + xp.log(left))[lefts] + (log_right + xp.log(right))[rights]
        data = self._normalised(exponents, lefts)[0]
        row_sums, column_sums = (
            xp.bincount(index, weights=data, minlength=self.n) for index in (self.rows, self.columns)
        )
        return data, iteration, _distance_from_one(xp, row_sums), _distance_from_one(xp, column_sums)

    def _absorb(self, log_left: Any, lefts: Any, rights: Any, first: str) -> tuple[Any, Any, Any, Any]:
        """One iteration on logarithms: potentials, their kernel (left side as its rows), and the right sums."""
        log_right = -self._normalised(self.logits + log_left[lefts], rights)[1]
        data, log_sums = self._normalised(self.logits + log_right[rights], lefts)
        kernel = self.kind((data, self.columns, self.indptr), shape=(self.n, self.n))
        kernel = kernel if first == "columns" else kernel.T
        return -log_sums, log_right, kernel, kernel.T @ self.xp.ones_like(log_left)

    def _normalised(self, exponents: Any, lines: Any) -> tuple[Any, Any]:
        """``exp`` of the entries divided by the sums of their lines, and the logarithms of those sums."""
        xp = self.xp
        lowest = float(xp.finfo(exponents.dtype).min)
        peak = xp.full((self.n,), lowest, dtype=exponents.dtype)
        xp.maximum.at(peak, lines, exponents)
        values = xp.exp(exponents - peak[lines])
        # The largest term is 1; a smaller sum means a line of zeros, which stays one.
        total = xp.maximum(xp.bincount(lines, weights=values, minlength=self.n), 1.0)
        scaled = (values / total[lines]).astype(exponents.dtype)
        return scaled, (peak + xp.log(total)).astype(exponents.dtype)


def _distance_from_one(xp: Any, sums: Any) -> float:
    return float(xp.max(xp.abs(sums - 1.0)))


def _within(xp: Any, factors: Any) -> bool:
    """Whether all scaling factors are in [exp(-tau), exp(tau)]; false for NaN."""
    return bool(xp.max(xp.abs(xp.log(factors))) <= _LIMIT)

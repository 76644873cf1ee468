r"""Projection of one large dense matrix, n up to tens of thousands: one read of the matrix for each iteration.

The iterate is kept as :math:`P = \operatorname{diag}(u)\, K \operatorname{diag}(v)` with a stored kernel
:math:`K_{ij} = \exp(X_{ij} + f_i + g_j)`. With v known, a block of rows gives its part of u = 1 / (K v) and,
while it is still in the cache, its part of the next column sums K^T u:

.. math:: v \leftarrow 1 / c, \qquad u \leftarrow 1 / (K v), \qquad c \leftarrow K^\top u

so an iteration reads K once and its column error, :math:`\max_j |c_j v_j - 1|`, costs nothing. When a scaling factor
leaves :math:`[e^{-\tau}, e^{\tau}]`, one full iteration is done on logarithms instead and its result becomes the new
kernel (absorption, Schmitzer 2019), so that no range of logits under- or overflows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from birkhoff import _math, _xp
from birkhoff._registry import Row, Table
from birkhoff._result import Projection, Status
from birkhoff.errors import DtypeError, OptionError, ProjectionError, ShapeError
from birkhoff.precision import unit_roundoff
from birkhoff.support import Support, diagnose_support

__all__ = ["PASSES", "PassFacts", "project_large", "scaling_pass"]

Progress = Callable[[int, float], None]
"""Called after each iteration with its number and the largest distance of a first-side sum from one."""

_LIMIT = 20.0  # tau: what a float32 kernel drops is below n exp(-87 + 2 tau) = 1e-20 n of a line's sum
_BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 32}  # rows read at a time: the second-level cache, or the whole matrix


@dataclass(frozen=True)
class PassFacts:
    """What an implementation of the pass is chosen by."""

    library: str
    device: str
    dtype: str
    n: int


PASSES: Table[PassFacts] = Table(
    "scaling passes",
    (
        Row(
            name="array",
            targets={"pass": "birkhoff.large:scaling_pass"},
            refuse=lambda facts: None,
            note="two matrix-vector products for each block of rows, the second from the cache",
        ),
    ),
)
"""Implementations of ``pass(kernel, right) -> (left, sums)``; a fused kernel is one more row, before the last."""


def scaling_pass(kernel: Any, right: Any) -> tuple[Any, Any]:
    """Compute ``left = 1 / (K right)`` and ``sums = K^T left``, reading K once.

    Parameters
    ----------
    kernel : array, shape (n, n)
    right : array, shape (n,)

    Returns
    -------
    left, sums : array, shape (n,)

    Examples
    --------
    >>> import numpy as np
    >>> from birkhoff.large import scaling_pass
    >>> scaling_pass(np.full((2, 2), 0.5), np.ones(2))
    (array([1., 1.]), array([1., 1.]))
    """
    xp = _xp.array_namespace(kernel, right)
    parts, sums = [], xp.zeros_like(right)
    for rows in _blocks(kernel):
        block = kernel[rows, :]
        part = 1.0 / xp.matmul(block, right)
        parts.append(part)
        sums = sums + xp.matmul(part, block)
    return xp.concat(parts), sums


def project_large(
    logits: Any,
    *,
    num_iters: int = 1000,
    tol: float | None = None,
    first: Literal["columns", "rows"] = "columns",
    progress: Progress | None = None,
    throw: bool = False,
) -> Projection:
    r"""Make one or a few large matrices doubly stochastic by Sinkhorn-Knopp scaling with absorption.

    Parameters
    ----------
    logits : array, shape (..., n, n)
        Real floating; -inf is an exact zero. Matrices of the batch are treated one after the other. Half precisions are
        computed in float32. Memory: the logits and one kernel of the same size, and the result.
    num_iters : int
        Most iterations, each one column and one row normalisation.
    tol : float, optional
        Stop once the largest distance of a first-side sum from one is at most this. Default: the square root of the
        unit roundoff (2.4e-4 in float32, 1.1e-8 in float64).
    first : {"columns", "rows"}
        The side normalised first; the other one is exact to rounding in the result.
    progress : callable, optional
        ``progress(iteration, error)`` after every iteration, for a progress bar or a log.
    throw : bool
        Raise :class:`ProjectionError` for a matrix that did not converge.

    Returns
    -------
    Projection
        ``matrix`` in the dtype of the logits; ``status``, ``num_iters`` (int32), ``row_error`` and ``column_error`` as
        arrays of the batch's shape. The errors are of the stored matrix.

    Raises
    ------
    ShapeError, DtypeError, OptionError
        If the matrices are not square, not real floating, or an option is out of its domain.
    ProjectionError
        With ``throw``, as said there.

    Notes
    -----
    The iterates are those of :func:`birkhoff.sinkhorn`, up to rounding, whatever the range of the logits. Three scalars
    are read per iteration, which waits for a device. No gradient is tracked; for gradients through large matrices use
    :func:`birkhoff.project`. If there are -inf, their pattern is analysed on the host.

    References
    ----------
    .. [1] B. Schmitzer, "Stabilized sparse scaling algorithms for entropy regularized transport problems", SIAM Journal
       on Scientific Computing 41(3), 2019.

    Examples
    --------
    >>> import numpy as np
    >>> from birkhoff.large import project_large
    >>> result = project_large(np.random.default_rng(0).normal(size=(300, 300)), tol=1e-10)
    >>> int(result.status), bool(result.column_error < 1e-10)
    (0, True)
    """
    xp = _xp.array_namespace(logits)
    if not _xp.is_floating(logits.dtype):
        raise DtypeError(f"logits must be real floating, got {_xp.dtype_name(logits.dtype)}; convert with astype")
    if logits.ndim < 2 or logits.shape[-1] != logits.shape[-2] or logits.shape[-1] == 0:
        raise ShapeError(f"logits must have shape (..., n, n) with n >= 1, got {tuple(logits.shape)}")
    if num_iters < 1:
        raise OptionError(f"num_iters must be at least 1, got {num_iters}")
    if tol is not None and not tol > 0:
        raise OptionError(f"tol must be None or a number > 0, got {tol!r}")
    if first not in ("columns", "rows"):
        raise OptionError(f"first must be 'columns' or 'rows', got {first!r}")
    n, batch = logits.shape[-1], tuple(logits.shape[:-2])
    stack = xp.reshape(_xp.detach(logits), (-1, n, n))
    dtype = _math.compute_dtype(xp, logits)
    target = unit_roundoff(dtype) ** 0.5 if tol is None else tol
    matrices, reports = [], []
    with _xp.quiet(logits):
        for index in range(stack.shape[0]):
            single = _xp.astype(xp, stack[index, :, :], dtype)
            single = _transposed(xp, single) if first == "rows" else single
            matrix, report = _project_one(xp, single, num_iters, target, progress, logits.dtype)
            matrices.append(_transposed(xp, matrix) if first == "rows" else matrix)
            reports.append(report if first == "columns" else (report[0], report[1], report[3], report[2]))
    if throw and any(report[0] != Status.converged for report in reports):
        worst = next(Status(report[0]) for report in reports if report[0] != Status.converged)
        raise ProjectionError(f"{worst.name} after {num_iters} iterations, tol={target:g}. {worst.advice}")
    where = _xp.device(logits)
    columns = list(zip(*reports, strict=True)) if reports else [(), (), (), ()]
    status, counts = (xp.reshape(xp.asarray(list(c), dtype=xp.int32, device=where), batch) for c in columns[:2])
    rows, cols = (xp.reshape(xp.asarray(list(c), dtype=dtype, device=where), batch) for c in columns[2:])
    whole = xp.stack(matrices) if matrices else _xp.astype(xp, stack, logits.dtype)
    return Projection(xp.reshape(whole, logits.shape), status, counts, rows, cols)


def _project_one(
    xp: Any, logits: Any, num_iters: int, tol: float, progress: Progress | None, store: Any
) -> tuple[Any, tuple[int, int, float, float]]:
    """Columns first. Returns the matrix in the dtype ``store``, and status, iterations, row and column error."""
    n = logits.shape[-1]
    facts = PassFacts(_xp.library_name(xp), _xp.device_kind(logits), _xp.dtype_name(logits.dtype), n)
    run_pass = PASSES.resolve(facts).row.load("pass")
    zeros = xp.zeros((n,), dtype=logits.dtype, device=_xp.device(logits))
    log_left, log_right, kernel, sums = _absorb(xp, logits, zeros)
    left, right = xp.ones_like(zeros), xp.ones_like(zeros)
    iteration, error = 1, float(xp.max(xp.abs(sums - 1.0)))
    while True:
        if progress is not None:
            progress(iteration, error)
        if error <= tol or iteration >= num_iters or error != error:
            break
        next_right = 1.0 / sums
        if float(xp.max(xp.abs(xp.log(next_right)))) <= _LIMIT:  # false for NaN as well
            next_left, next_sums = run_pass(kernel, next_right)
            if float(xp.max(xp.abs(xp.log(next_left)))) <= _LIMIT:
                left, right, sums = next_left, next_right, next_sums
                iteration, error = iteration + 1, float(xp.max(xp.abs(sums * right - 1.0)))
                continue
        log_left, log_right, kernel, sums = _absorb(xp, logits, log_left + xp.log(left))
        left, right = xp.ones_like(zeros), xp.ones_like(zeros)
        iteration, error = iteration + 1, float(xp.max(xp.abs(sums - 1.0)))
    del kernel
    matrix, row_error, column_error = _finish(xp, logits, log_left + xp.log(left), log_right + xp.log(right), store)
    if bool(xp.any(~(logits < xp.inf))):
        status = Status.nonfinite_input
    elif bool(xp.any(logits == -xp.inf)) and int(diagnose_support(logits > -xp.inf)) != Support.total:
        status = Status.no_total_support
    else:
        status = Status.converged if error <= tol else Status.max_iters_reached
    return matrix, (int(status), iteration, row_error, column_error)


def _absorb(xp: Any, logits: Any, log_left: Any) -> tuple[Any, Any, Any, Any]:
    """One iteration on logarithms from row potentials: new potentials, their kernel, and its column sums."""
    log_right = -_log_sums(xp, logits, log_left)
    parts, blocks, sums = [], [], xp.zeros_like(log_left)
    for rows in _blocks(logits):
        shifted = logits[rows, :] + log_right
        peak = _math.maximum_along(xp, shifted, -1)
        scaled = xp.exp(shifted - peak)
        # The largest term is 1; a smaller sum means a line of zeros, which stays one.
        total = _math.lower_bound(xp, xp.sum(scaled, axis=-1, keepdims=True), 1.0)
        parts.append(-(peak + xp.log(total))[:, 0])
        block = scaled / total
        blocks.append(block)
        sums = sums + xp.sum(block, axis=0)
    return xp.concat(parts), log_right, xp.concat(blocks, axis=0), sums


def _log_sums(xp: Any, logits: Any, log_left: Any) -> Any:
    """Logarithms of the column sums of ``exp(logits + log_left)``: a running maximum and a rescaled running sum."""
    peak = total = None
    for rows in _blocks(logits):
        shifted = logits[rows, :] + log_left[rows, None]
        block_peak = _math.maximum_along(xp, shifted, 0)[0, :]
        if peak is None:
            peak, total = block_peak, xp.sum(xp.exp(shifted - block_peak), axis=0)
        else:
            higher = xp.maximum(peak, block_peak)
            total = total * xp.exp(peak - higher) + xp.sum(xp.exp(shifted - higher), axis=0)
            peak = higher
    return peak + xp.log(_math.lower_bound(xp, total, 1.0))


def _finish(xp: Any, logits: Any, log_left: Any, log_right: Any, store: Any) -> tuple[Any, float, float]:
    """The matrix by one shifted exponential and a division by its row sums, and the errors of what is stored."""
    accumulate = _math.accumulate_dtype(xp, logits)
    blocks, row_error = [], 0.0
    sums = xp.zeros((logits.shape[-1],), dtype=accumulate, device=_xp.device(logits))
    for rows in _blocks(logits):
        shifted = logits[rows, :] + log_left[rows, None] + log_right
        block = _xp.astype(xp, _math.softmax(xp, shifted, -1, accumulate), store)
        blocks.append(block)
        row_sums = xp.sum(_xp.astype(xp, block, logits.dtype), axis=-1, dtype=accumulate)
        row_error = float(np.maximum(row_error, float(xp.max(xp.abs(row_sums - 1.0)))))
        sums = sums + xp.sum(_xp.astype(xp, block, logits.dtype), axis=0, dtype=accumulate)
    return xp.concat(blocks, axis=0), row_error, float(xp.max(xp.abs(sums - 1.0)))


def _transposed(xp: Any, matrix: Any) -> Any:
    """The transpose, its rows contiguous."""
    moved = xp.matrix_transpose(matrix)
    return xp.reshape(xp.reshape(moved, (-1,)), moved.shape)


def _blocks(matrix: Any) -> Iterator[slice]:
    """Row ranges of a matrix that fit the cache."""
    n = matrix.shape[0]
    bytes_per_row = max(1, n * (8 if _xp.dtype_name(matrix.dtype) == "float64" else 4))
    count = max(1, _BLOCK_BYTES.get(_xp.device_kind(matrix), 1 << 20) // bytes_per_row)
    for start in range(0, n, count):
        yield slice(start, min(start + count, n))

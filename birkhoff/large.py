r"""Projection of one large dense matrix, n up to tens of thousands: one read of the matrix for each iteration.

The iterate is kept as :math:`P = \operatorname{diag}(u)\, K \operatorname{diag}(v)` with a stored kernel
:math:`K_{ij} = \exp(X_{ij} + f_i + g_j)` and its column sums c for the present u. One iteration is

.. math:: v \leftarrow 1 / c, \qquad u \leftarrow 1 / (K v), \qquad c \leftarrow K^\top u

and a block of rows gives its part of u and, while it is still in the cache, its part of the next c. So K is read once,
and the column error :math:`\max_j |c_j v_j - 1|` costs nothing. When a scaling factor leaves
:math:`[e^{-\tau}, e^{\tau}]`, one full iteration is done on logarithms instead and its result becomes the new kernel
(absorption, Schmitzer 2019), so that no range of logits under- or overflows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from birkhoff import _math, _xp
from birkhoff._checks import iteration_options, square_matrices
from birkhoff._registry import Row, Table, no_cuda_compiler
from birkhoff._result import Projection, Status
from birkhoff.errors import ProjectionError
from birkhoff.precision import unit_roundoff
from birkhoff.support import Support, diagnose_support

__all__ = ["PASSES", "PassFacts", "project_large", "scaling_passes"]

Progress = Callable[[int, float], None]
"""Called after each iteration with its number and the largest distance of a first-side sum from one."""

_LIMIT = 20.0  # tau: what a float32 kernel drops is below n exp(-87 + 2 tau) = 1e-20 n of a line's sum
_LONGEST_RUN = 16  # iterations between two looks at the error, where looking means waiting for a device
_BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 32}  # rows read at a time: the second-level cache, or the whole matrix


@dataclass(frozen=True)
class PassFacts:
    """What an implementation of the passes is chosen by."""

    library: str
    device: str
    dtype: str
    n: int


def _refuse_fused(facts: PassFacts) -> str | None:
    largest = {"float32": 16384, "float64": 8192}[facts.dtype]
    if facts.device != "cuda":
        return f"needs a CUDA device, got {facts.device}"
    if facts.library not in ("torch", "cupy"):
        return f"serves arrays of torch and cupy, got {facts.library}"
    if facts.n > largest:
        return f"keeps a row in registers up to n = {largest} in {facts.dtype}, got n = {facts.n}"
    return no_cuda_compiler()


PASSES: Table[PassFacts] = Table(
    "scaling passes",
    (
        Row(
            name="cuda",
            targets={"passes": "birkhoff.kernels.cuda.large:scaling_passes"},
            refuse=_refuse_fused,
            note="many iterations in one cooperative launch, compiled at run time",
        ),
        Row(
            name="array",
            targets={"passes": "birkhoff.large:scaling_passes"},
            refuse=lambda facts: None,
            note="two matrix-vector products for each block of rows, the second from the cache",
        ),
    ),
)
"""Implementations of :func:`scaling_passes`, in order of preference."""


def scaling_passes(kernel: Any, sums: Any, count: int) -> tuple[Any, Any, Any, Any, Any]:
    """Do ``count`` iterations ``right = 1 / sums; left = 1 / (K right); sums = K^T left``, reading K once in each.

    Parameters
    ----------
    kernel : array, shape (n, n)
        Non-negative.
    sums : array, shape (n,)
        Column sums of K scaled by the present left factors.
    count : int
        At least 1.

    Returns
    -------
    left, right, sums : array, shape (n,)
        Of the last iteration.
    errors : array, shape (count,)
        After each iteration the largest distance from one of a column sum of ``left K right``.
    largest : array, shape ()
        The largest absolute logarithm of any factor of any iteration.

    Examples
    --------
    >>> import numpy as np
    >>> from birkhoff.large import scaling_passes
    >>> left, right, sums, errors, largest = scaling_passes(np.full((2, 2), 0.25), np.full(2, 0.5), 3)
    >>> left, right, errors
    (array([1., 1.]), array([2., 2.]), array([0., 0., 0.]))
    """
    xp = _xp.array_namespace(kernel, sums)
    errors, extremes = [], []
    left = right = sums
    for _ in range(count):
        right = 1.0 / sums
        parts, sums = [], xp.zeros_like(sums)
        for rows in _blocks(kernel):
            block = kernel[rows, :]
            part = 1.0 / _xp.matmul(xp, block, right)
            parts.append(part)
            sums = sums + _xp.matmul(xp, part, block)
        left = xp.concat(parts)
        errors.append(xp.max(xp.abs(sums * right - 1.0)))
        extremes += [xp.max(xp.abs(xp.log(left))), xp.max(xp.abs(xp.log(right)))]
    return left, right, sums, xp.stack(errors), xp.max(xp.stack(extremes))


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
        ``progress(iteration, error)`` for every iteration, for a progress bar or a log.
    throw : bool
        Raise :class:`ProjectionError` for a matrix that did not converge.

    Returns
    -------
    Projection
        ``matrix`` in the dtype of the logits; ``status``, ``num_iters`` (int32), ``row_error`` and ``column_error`` as
        arrays of the batch's shape. The errors are of the stored matrix.

    Raises
    ------
    ArrayTypeError, ShapeError, DtypeError, OptionError
        For what is not a dense array, matrices that are not square or not real floating, an option out of its domain.
    ProjectionError
        With ``throw``, as said there.

    Notes
    -----
    The iterates are those of :func:`birkhoff.sinkhorn`, up to rounding, whatever the range of the logits. On a GPU the
    errors of up to 16 iterations are read at once, which waits for it. No gradient is tracked; for gradients through
    large matrices use :func:`birkhoff.project`. If there are -inf, their pattern is analysed on the host.

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
    xp = square_matrices(logits, "logits")
    num_iters, tol = iteration_options(num_iters, tol, first, progress)
    n, batch = logits.shape[-1], tuple(logits.shape[:-2])
    dtype, where = _math.compute_dtype(xp, logits), _xp.device(logits)
    if 0 in logits.shape:
        counts, errors = (xp.zeros(batch, dtype=kind, device=where) for kind in (xp.int32, dtype))
        return Projection(_xp.detach(logits), counts, counts, errors, errors)
    stack = xp.reshape(_xp.detach(logits), (-1, n, n))
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
    columns = list(zip(*reports, strict=True))
    status, counts = (xp.reshape(xp.asarray(list(c), dtype=xp.int32, device=where), batch) for c in columns[:2])
    rows, cols = (xp.reshape(xp.asarray(list(c), dtype=dtype, device=where), batch) for c in columns[2:])
    return Projection(xp.reshape(xp.stack(matrices), logits.shape), status, counts, rows, cols)


def _project_one(
    xp: Any, logits: Any, num_iters: int, tol: float, progress: Progress | None, store: Any
) -> tuple[Any, tuple[int, int, float, float]]:
    """Columns first. Returns the matrix in the dtype ``store``, and status, iterations, row and column error."""
    n = logits.shape[-1]
    facts = PassFacts(_xp.library_name(xp), _xp.device_kind(logits), _xp.dtype_name(logits.dtype), n)
    row = PASSES.resolve(facts).row
    run_passes, longest = row.load("passes"), 1 if row.name == "array" and facts.device == "cpu" else _LONGEST_RUN
    zeros = xp.zeros((n,), dtype=logits.dtype, device=_xp.device(logits))
    log_left, log_right, kernel, sums = _absorb(xp, logits, zeros)
    left, right = xp.ones_like(zeros), xp.ones_like(zeros)
    iteration, error = 1, float(xp.max(xp.abs(sums - 1.0)))
    _tell(progress, iteration, [error])
    count = 1
    while error > tol and iteration < num_iters:
        count = min(count, num_iters - iteration)
        next_left, next_right, next_sums, errors, largest = run_passes(kernel, sums, count)
        seen = [float(value) for value in _xp.to_numpy(errors)]
        if float(largest) <= _LIMIT:  # false for NaN as well
            needed = next((k for k, value in enumerate(seen, 1) if value <= tol), count)
            if needed < count:  # the run went past the tolerance: stop where it was reached
                next_left, next_right, next_sums, errors, _ = run_passes(kernel, sums, needed)
                seen = [float(value) for value in _xp.to_numpy(errors)]
            left, right, sums = next_left, next_right, next_sums
            _tell(progress, iteration + 1, seen)
            iteration, error = iteration + needed, seen[-1]
            count = min(2 * count, longest)
        else:
            log_left, log_right, kernel, sums = _absorb(xp, logits, log_left + xp.log(left))
            left, right = xp.ones_like(zeros), xp.ones_like(zeros)
            iteration, error = iteration + 1, float(xp.max(xp.abs(sums - 1.0)))
            _tell(progress, iteration, [error])
            count = 1
    del kernel
    matrix, row_error, column_error = _finish(xp, logits, log_left + xp.log(left), log_right + xp.log(right), store)
    if bool(xp.any(~(logits < xp.inf))):
        status = Status.nonfinite_input
    elif bool(xp.any(logits == -xp.inf)) and int(diagnose_support(logits > -xp.inf)) != Support.total:
        status = Status.no_total_support
    else:
        status = Status.converged if error <= tol else Status.max_iters_reached
    return matrix, (int(status), iteration, row_error, column_error)


def _tell(progress: Progress | None, first: int, errors: list[float]) -> None:
    if progress is not None:
        for offset, error in enumerate(errors):
            progress(first + offset, error)


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

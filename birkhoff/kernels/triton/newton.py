r"""Newton's method on the reduced dual for a batch of small matrices, n <= 8, one matrix a lane.

Columns held to the tolerance, rows exact (rows first swaps them). With the rows eliminated the dual's gradient is
c - 1, c the column sums of P, and its Hessian the Laplacian of the graph with weights W_jk = sum_i P_ij P_ik: a step
solves

.. math:: \sum_k W_{jk} (d_j - d_k) = 1 - c_j

by elimination without subtraction, which keeps every weight accurate at any condition. The dual's third derivative is
bounded by the span R of the step, so a length of (2 + log(1 + R)) / R, at most 1, keeps it falling in practice
(log(1 + R) / R does so for certain). Linear arithmetic on scalings serves ranges up to 2^100; what is wider, or does
not converge so, runs on logarithms with one Sinkhorn iteration after each step. Derivation:
``docs/derivations/newton_dual``.
"""
# ruff: noqa: RUF005  (Triton compiles tuple concatenation, not unpacking)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from birkhoff.kernels.triton import lines, tile
from birkhoff.kernels.triton.sinkhorn import device_of, load_matrices, store_matrices

__all__ = ["MAX_SIZE", "newton_forward"]

#: Largest n of this kernel.
MAX_SIZE = 8

#: Newton steps in linear arithmetic before a matrix goes on on logarithms.
_LINEAR_STEPS = tl.constexpr(24)

#: Least weight of a pair of nodes on logarithms: the rounding error of a sum near 1, in float32 and float64.
_ROUNDING = tl.constexpr(1.2e-7)
_ROUNDING_DOUBLE = tl.constexpr(2.3e-16)

#: Keeps a node that underflow has cut off from dividing by zero.
_SMALLEST_DEGREE = tl.constexpr(1e-37)


@triton.jit
def _solve(w, b, m: tl.constexpr):
    """Laplacian solution for m nodes, the last at zero: weights w of pairs (0,1), (0,2), ..., (1,2), ...; sources b."""
    if m == 1:
        return (b[0] * 0.0,)
    else:
        degree = w[0]
        for k in tl.static_range(1, m - 1):
            degree += w[k]
        inverse = lines.reciprocal(tl.maximum(degree, _SMALLEST_DEGREE))
        share = ()
        sources = ()
        for k in tl.static_range(m - 1):
            share = share + (w[k] * inverse,)
            sources = sources + (tl.fma(share[k], b[0], b[k + 1]),)
        rest = ()
        for j in tl.static_range(m - 1):
            for k in tl.static_range(j + 1, m - 1):
                old = w[(m - 1) + j * (m - 1) - j * (j + 1) // 2 + (k - j - 1)]
                rest = rest + (tl.fma(share[j], w[k], old),)
        others = _solve(rest, sources, m - 1)
        mine = b[0] * inverse
        for k in tl.static_range(m - 1):
            mine = tl.fma(share[k], others[k], mine)
        return (mine,) + others


@triton.jit
def _step(p, gap, floor, n: tl.constexpr, AXIS: tl.constexpr):
    """The damped Newton step of the potentials of the lines along AXIS, centred; floor is added to every weight."""
    w = ()
    for j in tl.static_range(n):
        for k in tl.static_range(j + 1, n):
            if AXIS == 0:
                total = tl.fma(p[j], p[k], floor)
                for i in tl.static_range(1, n):
                    total = tl.fma(p[i * n + j], p[i * n + k], total)
            else:
                total = tl.fma(p[j * n], p[k * n], floor)
                for i in tl.static_range(1, n):
                    total = tl.fma(p[j * n + i], p[k * n + i], total)
            w = w + (total,)
    d = _solve(w, gap, n)
    high = d[0]
    low = d[0]
    for k in tl.static_range(1, n):
        high = tl.maximum(high, d[k])
        low = tl.minimum(low, d[k])
    span = high - low
    length = tl.minimum(1.0, (2.0 + tl.log(1.0 + span)) / tl.maximum(span, 1e-30))
    length = tl.where(span < 1e30, length, 0.0)  # a lane that overflowed waits for the logarithms
    out = ()
    for k in tl.static_range(n):
        out = out + ((d[k] - 0.5 * (high + low)) * length,)
    return out


@triton.jit
def _gap(p, n: tl.constexpr, AXIS: tl.constexpr):
    """1 - sums along AXIS, and the largest of them in magnitude (infinite for NaN)."""
    sums = lines.line_sums(p, n, AXIS, True)
    gap = ()
    worst = tl.abs(1.0 - sums[0])
    for k in tl.static_range(n):
        gap = gap + (1.0 - sums[k],)
        worst = tl.maximum(worst, tl.abs(gap[k]))
    return gap, tl.where(worst < 1e30, worst, float("inf"))


@triton.jit
def _linear_solution(m, wide, target, limit, n: tl.constexpr, FIRST: tl.constexpr):
    """Scale K = m until the error is at most `target`: the matrix, who is done, and the steps of each."""
    a, b = tile.start(m, n, FIRST, tile.KNOPP, 0.0, True)
    for _ in tl.static_range(2):
        a = lines.inverse(lines.sums(m, b, n, FIRST, True), n, False, True)
        b = lines.inverse(lines.sums(m, a, n, 1 - FIRST, True), n, False, True)
    p = lines.divide_lines(lines.scale(m, a, n, FIRST, True), n, 1 - FIRST, True)
    gap, error = _gap(p, n, FIRST)
    no_floor = p[0] * 0.0
    counts = (error * 0.0).to(tl.int32)
    pending = ((error > target) & ~wide).to(tl.int32)
    steps = 0
    while (tl.max(pending, 0) != 0) & (steps < limit):
        d = _step(p, gap, no_floor, n, FIRST)
        moved = ()
        for k in tl.static_range(n):
            moved = moved + (tl.where(pending != 0, a[k] * tl.exp2(d[k] * lines.LOG2E), a[k]),)
        a = moved
        p = lines.divide_lines(lines.scale(m, a, n, FIRST, True), n, 1 - FIRST, True)
        gap, error = _gap(p, n, FIRST)
        counts += pending
        pending = pending * (error > target).to(tl.int32)
        steps += 1
    return p, pending, counts


@triton.jit
def _sweep(e, n: tl.constexpr, FIRST: tl.constexpr):
    """One Sinkhorn iteration on logarithms."""
    e = lines.shift(e, lines.log_sums(e, n, FIRST, True), n, FIRST, True)
    return lines.shift(e, lines.log_sums(e, n, 1 - FIRST, True), n, 1 - FIRST, True)


@triton.jit
def _logarithmic_solution(e, chosen, target, limit, n: tl.constexpr, FIRST: tl.constexpr):
    """The same on log2 of the matrix, for the chosen lanes.

    Blocks joined by entries below rounding have column sums that miss their row count by rounding alone. Divided by a
    weight of 1e-38 that would be all of the step; a weight of at least one rounding error keeps it near one.
    """
    e = _sweep(_sweep(e, n, FIRST), n, FIRST)
    p = lines.divide_lines(lines.exponential(e, n, True), n, 1 - FIRST, True)
    gap, error = _gap(p, n, FIRST)
    floor = p[0] * 0.0 + (_ROUNDING_DOUBLE if p[0].dtype == tl.float64 else _ROUNDING)
    counts = chosen * 0
    pending = chosen * (error > target).to(tl.int32)
    steps = 0
    while (tl.max(pending, 0) != 0) & (steps < limit):
        d = _step(p, gap, floor, n, FIRST)
        in_bits = ()
        for k in tl.static_range(n):
            in_bits = in_bits + (d[k] * lines.LOG2E,)
        moved = lines.shift(e, in_bits, n, FIRST, True)
        moved = lines.shift(moved, lines.log_sums(moved, n, 1 - FIRST, True), n, 1 - FIRST, True)
        moved = _sweep(moved, n, FIRST)
        e = lines.pick(pending != 0, moved, e, n * n, True)
        p = lines.divide_lines(lines.exponential(e, n, True), n, 1 - FIRST, True)
        gap, error = _gap(p, n, FIRST)
        counts += pending
        pending = pending * (error > target).to(tl.int32)
        steps += 1
    return p, counts


@triton.jit
def _pair_solution(x):
    """n = 2: p = sigmoid((x00 + x11 - x01 - x10) / 2) on the diagonal, 1 - p beside it."""
    half = ((x[0] - x[1]) + (x[3] - x[2])) * (0.5 * lines.LOG2E)
    same = 1.0 / (1.0 + tl.exp2(-half))
    other = 1.0 / (1.0 + tl.exp2(half))
    return (same, other, other, same)


@triton.jit(do_not_specialize=["batch", "num_iters"])
def newton_forward_kernel(
    logits, matrix, counts, batch, num_iters, target, n: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr, COLUMNS_FIRST: tl.constexpr, RANGE_CAP: tl.constexpr,
):  # fmt: skip
    """BLOCK matrices: steps until all of the program's matrices are done."""
    FIRST: tl.constexpr = 0 if COLUMNS_FIRST else 1
    x = load_matrices(logits, batch, n, WIDTH, BLOCK, 1, COMPUTE)
    which = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    target = tl.cast(target, COMPUTE)
    e = tile.exponents(x, n, FIRST, RANGE_CAP, True)
    if n == 2:
        capped = ()
        for k in tl.static_range(4):
            capped = capped + (e[k] * (1.0 / lines.LOG2E),)
        p = _pair_solution(capped)
        done_in = (e[0] * 0.0).to(tl.int32)
    else:
        wide = tile.is_wide(tile.lowest(e, n, True))
        limit = tl.minimum(num_iters, _LINEAR_STEPS)
        p, pending, done_in = _linear_solution(lines.exponential(e, n, True), wide, target, limit, n, FIRST)
        chosen = tl.maximum(pending, wide.to(tl.int32))
        if tl.max(chosen, 0) != 0:
            slow, slow_counts = _logarithmic_solution(e, chosen, target, num_iters, n, FIRST)
            p = lines.pick(chosen != 0, slow, p, n * n, True)
            done_in = tl.where(chosen != 0, slow_counts, done_in)
    store_matrices(matrix, p, batch, n, WIDTH, BLOCK, 1)
    tl.store(counts + which, done_in, mask=which < batch)


def newton_forward(
    logits: torch.Tensor,
    *,
    num_iters: int = 100,
    tol: float = 1e-6,
    first: str = "columns",
    range_cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The limit of Sinkhorn's iteration to `tol`, one launch.

    Parameters
    ----------
    logits : torch.Tensor, shape (batch, n, n), contiguous, n <= 8
        float32, float64, bfloat16 or float16; computed in float32 (float64 in float64).
    num_iters : int
        Most Newton steps. A matrix that needs more keeps what it has.
    tol : float
        Steps end once ``max |sum - 1|`` of the first side is at most ``tol / 2`` in the computing dtype.
    first : {"columns", "rows"}
        The side held to the tolerance; the other one is exact to rounding.
    range_cap : float, optional
        As in the solvers.

    Returns
    -------
    matrix : torch.Tensor
        Shape, dtype and device of the logits.
    counts : torch.Tensor, int32, shape (batch,)
        Newton steps of each matrix.
    """
    matrix = torch.empty_like(logits)
    counts = torch.empty(logits.shape[0], dtype=torch.int32, device=logits.device)
    if logits.numel() == 0:
        return matrix, counts
    batch, n, block = logits.shape[0], logits.shape[-1], 32
    with device_of(logits):
        newton_forward_kernel[(triton.cdiv(batch, block),)](
            logits, matrix, counts, batch, num_iters, 0.5 * tol, n=n, WIDTH=triton.next_power_of_2(n * n), BLOCK=block,
            COMPUTE=tl.float64 if logits.dtype == torch.float64 else tl.float32, COLUMNS_FIRST=first == "columns",
            RANGE_CAP=None if range_cap is None else float(range_cap), num_warps=1,
        )  # fmt: skip
    return matrix, counts

r"""Sinkhorn's recurrences on values that are already on chip, forward and exact backward, for use inside any kernel.

A batch of n x n matrices is held in one of two forms, chosen by the constexpr ``LANE``:

* ``LANE=True``: a tuple of n*n tensors ``(BLOCK,)``, row-major; each element position is one matrix. Sums over rows and
  columns are then plain additions and no lane talks to another. Best for n <= 4 (forward: n <= 8). For larger n with
  ``GRID=G``, a tuple of E*E tensors ``(BLOCK, G, G)``, E = ceil(n / G): lane (r, c) of a grid of G*G holds the E x E
  block at row r E and column c E, and sums take log2(G) exchanges more; entries beyond n are ignored and come back as
  zero. :func:`unpack` and :func:`pack` convert from and to one tensor with a last axis of WIDTH, a power of two.
* ``LANE=False``: one tensor ``(BLOCK, N, N)``, N the power of two that holds n; entries beyond n are ignored and come
  back as zero.

Columns first, with K = exp(X - column max), b_0 = 1, and for t = 1..T (rows first swaps the axes):

.. math:: a_t = 1 / (K^\top b_{t-1}), \qquad b_t = 1 / (K a_t), \qquad P = \operatorname{diag}(b_T) K
          \operatorname{diag}(a_T)

The damped recurrence starts from K = softmax(X) + eps_start, a_1 = 1, and adds eps_den to each sum of the *matrix*,
which reads a_t = a_{t-1} / (a_{t-1} K^T b_{t-1} + eps_den) in the scalings.

A matrix with an entry further than 2^-100 (2^-900 in float64) below its column's largest is computed on logarithms
instead, in the same call: every program looks at its own matrices, and one without such a matrix pays nothing.
Arithmetic is in the dtype of the values: cast to float32 (or float64) after the load.
"""
# ruff: noqa: RUF005  (Triton compiles tuple concatenation, not unpacking)

from __future__ import annotations

import triton
import triton.language as tl

from birkhoff.kernels.triton import lines
from birkhoff.kernels.triton.lines import pack, unpack

__all__ = [
    "DAMPED",
    "KNOPP",
    "any_of",
    "exponents",
    "is_wide",
    "lowest",
    "pack",
    "sinkhorn",
    "sinkhorn_vjp",
    "start",
    "unpack",
]

KNOPP = tl.constexpr(0)  #: the undamped iteration, linear where safe and logarithmic elsewhere
DAMPED = tl.constexpr(1)  #: DeepSeek's recurrence
_LOG = tl.constexpr(2)


# --------------------------------------------------------------------------------------------------------------------
# Start: logits to exponents of two below zero


@triton.jit
def _inside(i: tl.constexpr, j: tl.constexpr, n: tl.constexpr, EDGE: tl.constexpr, GRID: tl.constexpr):
    """Which lanes of the grid have their block's entry (i, j) in the matrix. Shape (1, GRID, GRID)."""
    begin = tl.arange(0, GRID) * EDGE
    return ((begin + i < n)[:, None] & (begin + j < n)[None, :])[None, :, :]


@triton.jit
def _pad(x, n: tl.constexpr, GRID: tl.constexpr, off: tl.constexpr, diagonal: tl.constexpr):
    """Put numbers beyond the matrix: on the diagonal, and off it."""
    EDGE: tl.constexpr = (n + GRID - 1) // GRID
    if n == EDGE * GRID:
        return x
    else:
        lane = tl.arange(0, GRID)
        on_diagonal = (lane[:, None] == lane[None, :])[None, :, :]
        out = ()
        for i in tl.static_range(EDGE):
            for j in tl.static_range(EDGE):
                beyond = tl.full(x[0].shape, off, x[0].dtype)
                if i == j:
                    beyond = tl.where(on_diagonal, diagonal, beyond)
                out = out + (tl.where(_inside(i, j, n, EDGE, GRID), x[i * EDGE + j], beyond),)
        return out


@triton.jit
def exponents(logits, n: tl.constexpr, FIRST: tl.constexpr, cap: tl.constexpr, LANE: tl.constexpr):
    """(X - max) log2(e) with the maximum over each first-normalised line, not below -cap; padding is -inf.

    The product and the subtraction are one fused operation, and the constant that is subtracted from a line cancels in
    the first normalisation whatever its rounding.
    """
    top = lines.peak(logits, n, FIRST, LANE)
    if LANE:
        out = ()
        for i in tl.static_range(n):
            for j in tl.static_range(n):
                if FIRST == 0:
                    offset = top[j]
                else:
                    offset = top[i]
                log2e = tl.full(logits[0].shape, lines.LOG2E, offset.dtype)
                e = tl.fma(logits[i * n + j], log2e, tl.broadcast_to(-(offset * lines.LOG2E), logits[0].shape))
                if cap is not None:
                    e = tl.where(logits[i * n + j] < offset - cap, tl.full(e.shape, -cap * lines.LOG2E, e.dtype), e)
                out = out + (e,)
        return out
    else:
        offset = tl.expand_dims(top, FIRST + 1)
        e = logits * lines.LOG2E - offset * lines.LOG2E
        if cap is not None:
            e = tl.where(logits < offset - cap, tl.full(e.shape, -cap * lines.LOG2E, e.dtype), e)
        if logits.shape[1] != n:
            k = tl.arange(0, logits.shape[1])
            e = tl.where((k[:, None] < n)[None, :, :] & (k[None, :] < n)[None, :, :], e, float("-inf"))
        return e


@triton.jit
def _masked_logits(logits, n: tl.constexpr, LANE: tl.constexpr, GRID: tl.constexpr):
    """The values, with padding at -inf so that it is never a maximum."""
    if LANE:
        return _pad(logits, n, GRID, float("-inf"), float("-inf"))
    else:
        if logits.shape[1] != n:
            k = tl.arange(0, logits.shape[1])
            inside = (k[:, None] < n)[None, :, :] & (k[None, :] < n)[None, :, :]
            logits = tl.where(inside, logits, float("-inf"))
        return logits


@triton.jit
def _exponents(masked, n: tl.constexpr, FIRST: tl.constexpr, cap: tl.constexpr, LANE: tl.constexpr, GRID: tl.constexpr):
    """Exponents with padding as `start` needs it, and each matrix's lowest.

    Beyond the matrix a grid of lanes holds the identity, whose lines have the sum 1, so that no step has to look.
    """
    EDGE: tl.constexpr = (n + GRID - 1) // GRID
    e = exponents(masked, EDGE, FIRST, cap, LANE)
    if LANE:
        low = lowest(_pad(e, n, GRID, 0.0, 0.0), EDGE, LANE)
        return _pad(e, n, GRID, float("-inf"), 0.0), low
    else:
        return e, lowest(e, n, LANE)


@triton.jit
def lowest(e, n: tl.constexpr, LANE: tl.constexpr):
    """Each matrix's lowest exponent, of a tuple without padding. Shape (BLOCK,), or (BLOCK, 1, 1)."""
    if LANE:
        low = e[0]
        for k in tl.static_range(1, n * n):
            low = tl.minimum(low, e[k])
        return -lines.max_over_grid(lines.max_over_grid(-low, 0), 1)
    else:
        inside = e
        if e.shape[1] != n:
            k = tl.arange(0, e.shape[1])
            inside = tl.where((k[:, None] < n)[None, :, :] & (k[None, :] < n)[None, :, :], e, 0.0)
        return tl.min(tl.min(inside, 2, keep_dims=True), 1, keep_dims=True)


@triton.jit
def is_wide(low):
    """Beyond linear arithmetic: a scaling, and the sum that it inverts, could leave the range of the dtype."""
    return low < (-900.0 if low.dtype == tl.float64 else -100.0)


@triton.jit
def _is_unpaired(low):
    """Beyond the product of two sums."""
    return low < (-480.0 if low.dtype == tl.float64 else -60.0)


@triton.jit
def any_of(wide):
    """Whether the program holds such a matrix: a scalar, the same for all lanes."""
    flags = wide.to(tl.int32)
    if len(flags.shape) == 1:
        return tl.max(flags, 0) != 0
    else:
        return tl.max(tl.reshape(flags, (flags.shape[0],)), 0) != 0


# --------------------------------------------------------------------------------------------------------------------
# Forward


@triton.jit
def _half(
    m,
    v,
    before,
    n: tl.constexpr,
    AXIS: tl.constexpr,
    KIND: tl.constexpr,
    eps: tl.constexpr,
    LANE: tl.constexpr,
    PAIRED: tl.constexpr = False,
):
    """One half step: the scalings of the lines along AXIS, from the scalings v of the other lines."""
    if KIND == _LOG:
        return lines.log_sums(lines.shift(m, v, n, 1 - AXIS, LANE), n, AXIS, LANE)
    else:
        s = lines.sums(m, v, n, AXIS, LANE)
        if KIND == DAMPED:
            return lines.damped_inverse(s, before, eps, n, LANE)
        else:
            return lines.inverse(s, n, PAIRED, LANE)


@triton.jit
def start(m, n: tl.constexpr, FIRST: tl.constexpr, KIND: tl.constexpr, eps: tl.constexpr, LANE: tl.constexpr):
    """Scalings (a, b) before the first full iteration; for the damped recurrence after its first last-side division."""
    value: tl.constexpr = 0.0 if KIND == _LOG else 1.0
    a = lines.constant(m, value, n, FIRST, LANE)
    b = lines.constant(m, value, n, 1 - FIRST, LANE)
    if KIND == DAMPED:
        b = _half(m, a, b, n, 1 - FIRST, KIND, eps, LANE)
    return a, b


@triton.jit
def _damped_start(
    e, n: tl.constexpr, FIRST: tl.constexpr, eps_start: tl.constexpr, LANE: tl.constexpr, GRID: tl.constexpr
):
    """softmax over the first-normalised lines, plus eps_start; padding stays as it is."""
    EDGE: tl.constexpr = (n + GRID - 1) // GRID
    soft = lines.divide_lines(lines.exponential(e, EDGE, LANE), EDGE, FIRST, LANE)
    if LANE:
        out = ()
        for k in tl.static_range(EDGE * EDGE):
            out = out + (soft[k] + eps_start,)
        return soft, _pad(out, n, GRID, 0.0, 1.0)
    else:
        if e.shape[1] == n:
            return soft, soft + eps_start
        else:
            k = tl.arange(0, e.shape[1])
            inside = (k[:, None] < n)[None, :, :] & (k[None, :] < n)[None, :, :]
            return soft, tl.where(inside, soft + eps_start, 0.0)


@triton.jit
def _linear(m, num_iters, n: tl.constexpr, FIRST: tl.constexpr, LANE: tl.constexpr, PAIRED: tl.constexpr):
    """T iterations on scalings; the last half step divides the matrix itself, so that its sums are exact."""
    a, b = start(m, n, FIRST, KNOPP, 0.0, LANE)
    for _ in range(num_iters - 1):
        a = _half(m, b, a, n, FIRST, KNOPP, 0.0, LANE, PAIRED)
        b = _half(m, a, b, n, 1 - FIRST, KNOPP, 0.0, LANE, PAIRED)
    a = _half(m, b, a, n, FIRST, KNOPP, 0.0, LANE, PAIRED)
    return lines.divide_lines(lines.scale(m, a, n, FIRST, LANE), n, 1 - FIRST, LANE)


@triton.jit
def _logarithmic(e, num_iters, n: tl.constexpr, FIRST: tl.constexpr, LANE: tl.constexpr):
    """T iterations on log2 of the matrix itself: its large entries stay near zero, where rounding is smallest."""
    for _ in range(num_iters):
        e = lines.shift(e, lines.log_sums(e, n, FIRST, LANE), n, FIRST, LANE)
        e = lines.shift(e, lines.log_sums(e, n, 1 - FIRST, LANE), n, 1 - FIRST, LANE)
    return lines.divide_lines(lines.exponential(e, n, LANE), n, 1 - FIRST, LANE)


@triton.jit
def sinkhorn(
    logits,
    num_iters,
    n: tl.constexpr,
    METHOD: tl.constexpr,
    COLUMNS_FIRST: tl.constexpr,
    LANE: tl.constexpr,
    eps_start: tl.constexpr = 0.0,
    eps_den: tl.constexpr = 0.0,
    range_cap: tl.constexpr = None,
    GRID: tl.constexpr = 1,
):
    """The matrix after `num_iters` >= 1 iterations, in the form of the logits."""
    FIRST: tl.constexpr = 0 if COLUMNS_FIRST else 1
    EDGE: tl.constexpr = (n + GRID - 1) // GRID
    e, low = _exponents(_masked_logits(logits, n, LANE, GRID), n, FIRST, range_cap, LANE, GRID)
    if METHOD == DAMPED:
        _, m = _damped_start(e, n, FIRST, eps_start, LANE, GRID)
        a, b = start(m, EDGE, FIRST, DAMPED, eps_den, LANE)
        for _ in range(num_iters - 1):
            a = _half(m, b, a, EDGE, FIRST, DAMPED, eps_den, LANE)
            b = _half(m, a, b, EDGE, 1 - FIRST, DAMPED, eps_den, LANE)
        return lines.scale(lines.scale(m, a, EDGE, FIRST, LANE), b, EDGE, 1 - FIRST, LANE)
    else:
        m = lines.exponential(e, EDGE, LANE)
        out = _linear(m, num_iters, EDGE, FIRST, LANE, LANE)
        if LANE:
            unpaired = _is_unpaired(low)
            if any_of(unpaired):
                plain = _linear(m, num_iters, EDGE, FIRST, LANE, False)
                out = lines.pick(unpaired, plain, out, EDGE * EDGE, LANE)
        wide = is_wide(low)
        if any_of(wide):
            slow = _logarithmic(e, num_iters, EDGE, FIRST, LANE)
            out = lines.pick(wide, slow, out, EDGE * EDGE, LANE)
        return out


# --------------------------------------------------------------------------------------------------------------------
# Backward: iterations are replayed from the start in segments whose scalings fit in registers, last segment first


@triton.jit
def _pull_half(m, dm, out, d_out, v, n: tl.constexpr, AXIS: tl.constexpr, KIND: tl.constexpr, LANE: tl.constexpr):
    """Pull d_out through out = 1/(m v) (or its logarithm) along AXIS: the new dm and the gradient of v."""
    if KIND == _LOG:
        w = lines.exponential(lines.shift(lines.shift(m, out, n, AXIS, LANE), v, n, 1 - AXIS, LANE), n, LANE)
        flow = lines.scale(w, lines.negative(d_out, n, LANE), n, AXIS, LANE)
        if LANE:
            return lines.add(dm, flow, n * n, LANE), lines.line_sums(flow, n, 1 - AXIS, LANE)
        else:
            return dm + flow, tl.sum(flow, 2 - AXIS)
    else:
        q = lines.minus_square_times(out, d_out, n, LANE)
        return lines.add_outer(dm, q, v, n, AXIS, LANE), lines.sums(m, q, n, 1 - AXIS, LANE)


@triton.jit
def _pull_result(m, grad, a, b, n: tl.constexpr, FIRST: tl.constexpr, KIND: tl.constexpr, LANE: tl.constexpr):
    """Gradients of m, a and b of P = a m b (or 2^(m + a + b), in natural units)."""
    if KIND == _LOG:
        p = lines.exponential(lines.shift(lines.shift(m, a, n, FIRST, LANE), b, n, 1 - FIRST, LANE), n, LANE)
        dm = lines.times(grad, p, n, LANE)
        return dm, lines.line_sums(dm, n, FIRST, LANE), lines.line_sums(dm, n, 1 - FIRST, LANE)
    else:
        dm = lines.scale(lines.scale(grad, a, n, FIRST, LANE), b, n, 1 - FIRST, LANE)
        flow = lines.times(grad, m, n, LANE)
        return dm, lines.sums(flow, b, n, FIRST, LANE), lines.sums(flow, a, n, 1 - FIRST, LANE)


@triton.jit
def _pull_segment(
    m,
    grad,
    dm,
    da,
    db,
    begin,
    is_last,
    n: tl.constexpr,
    FIRST: tl.constexpr,
    KIND: tl.constexpr,
    eps: tl.constexpr,
    LENGTH: tl.constexpr,
    LANE: tl.constexpr,
    WHOLE: tl.constexpr = False,
):
    """Replay iterations 0..begin, keep the scalings of the next LENGTH, and pull the gradients back through these.

    WHOLE: these are all iterations there are, so nothing came in from a later segment.
    """
    a, b = start(m, n, FIRST, KIND, eps, LANE)
    for _ in range(begin):
        a = _half(m, b, a, n, FIRST, KIND, eps, LANE)
        b = _half(m, a, b, n, 1 - FIRST, KIND, eps, LANE)
    kept_a = (a,)
    kept_b = (b,)
    for t in tl.static_range(LENGTH):
        kept_a = kept_a + (_half(m, kept_b[t], kept_a[t], n, FIRST, KIND, eps, LANE),)
        kept_b = kept_b + (_half(m, kept_a[t + 1], kept_b[t], n, 1 - FIRST, KIND, eps, LANE),)
    end_dm, end_da, end_db = _pull_result(m, grad, kept_a[LENGTH], kept_b[LENGTH], n, FIRST, KIND, LANE)
    if WHOLE:
        dm, da, db = end_dm, end_da, end_db
    else:
        dm = lines.pick(is_last, end_dm, dm, n * n, LANE)
        da = lines.pick(is_last, end_da, da, n, LANE)
        db = lines.pick(is_last, end_db, db, n, LANE)
    for t in tl.static_range(LENGTH - 1, -1, -1):
        dm, more = _pull_half(m, dm, kept_b[t + 1], db, kept_a[t + 1], n, 1 - FIRST, KIND, LANE)
        da = lines.add(da, more, n, LANE)
        dm, d_before = _pull_half(m, dm, kept_a[t + 1], da, kept_b[t], n, FIRST, KIND, LANE)
        if KIND == DAMPED:
            db = lines.add(d_before, lines.damping_adjoint(eps, kept_b[t + 1], kept_b[t], db, n, LANE), n, LANE)
            da = lines.damping_adjoint(eps, kept_a[t + 1], kept_a[t], da, n, LANE)
        else:
            db = d_before
            da = lines.constant(m, 0.0, n, FIRST, LANE)
    return dm, da, db


@triton.jit
def _pull_iterations(
    m,
    grad,
    num_iters,
    n: tl.constexpr,
    FIRST: tl.constexpr,
    KIND: tl.constexpr,
    eps: tl.constexpr,
    LENGTH: tl.constexpr,
    LANE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Gradient of m through all full iterations."""
    a, b = start(m, n, FIRST, KIND, eps, LANE)
    if WHOLE:
        dm, da, db = _pull_segment(m, grad, grad, a, b, 0, True, n, FIRST, KIND, eps, LENGTH, LANE, True)
    else:
        full = num_iters
        if KIND == DAMPED:
            full = num_iters - 1
        dm, da, db = _pull_result(m, grad, a, b, n, FIRST, KIND, LANE)
        segments = full // LENGTH
        for k in range(segments):
            dm, da, db = _pull_segment(
                m, grad, dm, da, db, full - (k + 1) * LENGTH, k == 0, n, FIRST, KIND, eps, LENGTH, LANE
            )
        rest = full - segments * LENGTH
        for k in range(rest):
            is_last = (k == 0) & (segments == 0)
            dm, da, db = _pull_segment(m, grad, dm, da, db, rest - 1 - k, is_last, n, FIRST, KIND, eps, 1, LANE)
    if KIND == DAMPED:
        ones = lines.constant(m, 1.0, n, FIRST, LANE)
        dm, _ = _pull_half(m, dm, b, db, ones, n, 1 - FIRST, KIND, LANE)
    return dm


@triton.jit
def _pull_softmax(soft, d, n: tl.constexpr, FIRST: tl.constexpr, LANE: tl.constexpr):
    """s (d - sum of s d) along the first-normalised lines."""
    flow = lines.times(soft, d, n, LANE)
    total = lines.line_sums(flow, n, FIRST, LANE)
    lost = lines.scale(soft, lines.negative(total, n, LANE), n, FIRST, LANE)
    if LANE:
        return lines.add(flow, lost, n * n, LANE)
    else:
        return flow + lost


@triton.jit
def _pull_cap(logits, d, n: tl.constexpr, FIRST: tl.constexpr, cap: tl.constexpr, LANE: tl.constexpr):
    """A raised entry hands its gradient to the largest of its line; equal largest share it."""
    top = lines.peak(logits, n, FIRST, LANE)
    if LANE:
        own = ()
        lost = ()
        at_peak = ()
        for i in tl.static_range(n):
            for j in tl.static_range(n):
                peak = top[j if FIRST == 0 else i]
                raised = logits[i * n + j] < peak - cap
                own = own + (tl.where(raised, 0.0, d[i * n + j]),)
                lost = lost + (tl.where(raised, d[i * n + j], 0.0),)
                at_peak = at_peak + (tl.where(logits[i * n + j] == peak, 1.0, 0.0).to(d[0].dtype),)
        taken = lines.line_sums(lost, n, FIRST, LANE)
        ties = lines.line_sums(at_peak, n, FIRST, LANE)
        share = ()
        for k in tl.static_range(n):
            share = share + (taken[k] / tl.maximum(ties[k], 1.0),)
        return lines.add(own, lines.scale(at_peak, share, n, FIRST, LANE), n * n, LANE)
    else:
        peak = tl.expand_dims(top, FIRST + 1)
        raised = logits < peak - cap
        at_peak = tl.where(logits == peak, 1.0, 0.0)
        taken = tl.sum(tl.where(raised, d, 0.0), FIRST + 1, keep_dims=True)
        share = at_peak / tl.maximum(tl.sum(at_peak, FIRST + 1, keep_dims=True), 1.0)
        return tl.where(raised, 0.0, d) + share * taken


@triton.jit
def sinkhorn_vjp(
    logits,
    grad,
    num_iters,
    n: tl.constexpr,
    METHOD: tl.constexpr,
    COLUMNS_FIRST: tl.constexpr,
    LANE: tl.constexpr,
    LENGTH: tl.constexpr,
    eps_start: tl.constexpr = 0.0,
    eps_den: tl.constexpr = 0.0,
    range_cap: tl.constexpr = None,
    WHOLE: tl.constexpr = False,
    GRID: tl.constexpr = 1,
):
    """Exact gradient of :func:`sinkhorn` with respect to the logits.

    LENGTH iterations are kept in registers at a time (2 n numbers each); earlier ones are replayed, so that any
    `num_iters` works: with T a multiple of LENGTH, T (T / LENGTH + 1) / 2 forward iterations are computed in all.
    WHOLE: all full iterations are LENGTH (`num_iters`; one less for DAMPED, whose first half step is the softmax),
    known when compiling, and nothing is replayed.
    """
    FIRST: tl.constexpr = 0 if COLUMNS_FIRST else 1
    EDGE: tl.constexpr = (n + GRID - 1) // GRID
    masked = _masked_logits(logits, n, LANE, GRID)
    e, low = _exponents(masked, n, FIRST, range_cap, LANE, GRID)
    if METHOD == DAMPED:
        soft, m = _damped_start(e, n, FIRST, eps_start, LANE, GRID)
        dm = _pull_iterations(m, grad, num_iters, EDGE, FIRST, DAMPED, eps_den, LENGTH, LANE, WHOLE)
        out = _pull_softmax(soft, dm, EDGE, FIRST, LANE)
    else:
        m = lines.exponential(e, EDGE, LANE)
        dm = _pull_iterations(m, grad, num_iters, EDGE, FIRST, KNOPP, 0.0, LENGTH, LANE, WHOLE)
        out = lines.times(m, dm, EDGE, LANE)
        wide = is_wide(low)
        if any_of(wide):
            slow = _pull_iterations(e, grad, num_iters, EDGE, FIRST, _LOG, 0.0, 1, LANE, False)
            out = lines.pick(wide, slow, out, EDGE * EDGE, LANE)
    if range_cap is not None:
        out = _pull_cap(masked, out, EDGE, FIRST, range_cap, LANE)
    return out

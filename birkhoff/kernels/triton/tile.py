r"""Sinkhorn's recurrences on values that are already on chip, forward and exact backward, for use inside any kernel.

A batch of n x n matrices is held in one of two forms, chosen by the constexpr ``LANE``:

* ``LANE=True``: a tuple of n*n tensors of one shape, row-major; each element position is one matrix. Sums over rows and
  columns are then plain additions and no lane talks to another. Best for n <= 4 (forward: n <= 8). :func:`unpack` and
  :func:`pack` convert from and to a tensor ``(BLOCK, WIDTH)`` with WIDTH a power of two, at least n*n.
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
                e = tl.fma(logits[i * n + j], tl.full(offset.shape, lines.LOG2E, offset.dtype), -(offset * lines.LOG2E))
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
def _masked_logits(logits, n: tl.constexpr, LANE: tl.constexpr):
    """The values, with padding at -inf so that it is never a maximum."""
    if not LANE:  # noqa: SIM102  (a tuple has no shape)
        if logits.shape[1] != n:
            k = tl.arange(0, logits.shape[1])
            inside = (k[:, None] < n)[None, :, :] & (k[None, :] < n)[None, :, :]
            logits = tl.where(inside, logits, float("-inf"))
    return logits


@triton.jit
def lowest(e, n: tl.constexpr, LANE: tl.constexpr):
    """Each matrix's lowest exponent. Shape (BLOCK,), or (BLOCK, 1, 1)."""
    if LANE:
        low = e[0]
        for k in tl.static_range(1, n * n):
            low = tl.minimum(low, e[k])
        return low
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
def any_of(wide, LANE: tl.constexpr):
    """Whether the program holds such a matrix: a scalar, the same for all lanes."""
    flags = wide.to(tl.int32)
    if LANE:
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
    if KIND == _LOG:
        a = lines.constant(m, 0.0, n, FIRST, LANE)
        return a, a
    else:
        a = lines.constant(m, 1.0, n, FIRST, LANE)
        if KIND == DAMPED:
            return a, _half(m, a, a, n, 1 - FIRST, KIND, eps, LANE)
        else:
            return a, a


@triton.jit
def _damped_start(e, n: tl.constexpr, FIRST: tl.constexpr, eps_start: tl.constexpr, LANE: tl.constexpr):
    """softmax over the first-normalised lines, plus eps_start; padding stays zero."""
    soft = lines.divide_lines(lines.exponential(e, n, LANE), n, FIRST, LANE)
    if LANE:
        out = ()
        for k in tl.static_range(n * n):
            out = out + (soft[k] + eps_start,)
        return soft, out
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
):
    """The matrix after `num_iters` >= 1 iterations, in the form of the logits."""
    FIRST: tl.constexpr = 0 if COLUMNS_FIRST else 1
    e = exponents(_masked_logits(logits, n, LANE), n, FIRST, range_cap, LANE)
    if METHOD == DAMPED:
        _, m = _damped_start(e, n, FIRST, eps_start, LANE)
        a, b = start(m, n, FIRST, DAMPED, eps_den, LANE)
        for _ in range(num_iters - 1):
            a = _half(m, b, a, n, FIRST, DAMPED, eps_den, LANE)
            b = _half(m, a, b, n, 1 - FIRST, DAMPED, eps_den, LANE)
        return lines.scale(lines.scale(m, a, n, FIRST, LANE), b, n, 1 - FIRST, LANE)
    else:
        m = lines.exponential(e, n, LANE)
        low = lowest(e, n, LANE)
        out = _linear(m, num_iters, n, FIRST, LANE, LANE)
        if LANE:
            unpaired = _is_unpaired(low)
            if any_of(unpaired, LANE):
                out = lines.pick(unpaired, _linear(m, num_iters, n, FIRST, LANE, False), out, n * n, LANE)
        wide = is_wide(low)
        if any_of(wide, LANE):
            out = lines.pick(wide, _logarithmic(e, num_iters, n, FIRST, LANE), out, n * n, LANE)
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
        out = ()
        for i in tl.static_range(n):
            for j in tl.static_range(n):
                taken = 0.0
                ties = 0.0
                for k in tl.static_range(n):
                    if FIRST == 0:
                        other = logits[k * n + j]
                        d_other = d[k * n + j]
                    else:
                        other = logits[i * n + k]
                        d_other = d[i * n + k]
                    peak = top[j if FIRST == 0 else i]
                    taken += tl.where(other < peak - cap, d_other, 0.0)
                    ties += tl.where(other == peak, 1.0, 0.0)
                entry = logits[i * n + j]
                own = tl.where(entry < peak - cap, 0.0, d[i * n + j])
                out = out + (own + tl.where(entry == peak, taken / ties, 0.0),)
        return out
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
):
    """Exact gradient of :func:`sinkhorn` with respect to the logits.

    LENGTH iterations are kept in registers at a time (2 n numbers each); earlier ones are replayed, so that any
    `num_iters` works: with T a multiple of LENGTH, T (T / LENGTH + 1) / 2 forward iterations are computed in all.
    WHOLE: all full iterations are LENGTH (`num_iters`; one less for DAMPED, whose first half step is the softmax),
    known when compiling, and nothing is replayed.
    """
    FIRST: tl.constexpr = 0 if COLUMNS_FIRST else 1
    masked = _masked_logits(logits, n, LANE)
    e = exponents(masked, n, FIRST, range_cap, LANE)
    if METHOD == DAMPED:
        soft, m = _damped_start(e, n, FIRST, eps_start, LANE)
        dm = _pull_iterations(m, grad, num_iters, n, FIRST, DAMPED, eps_den, LENGTH, LANE, WHOLE)
        out = _pull_softmax(soft, dm, n, FIRST, LANE)
    else:
        m = lines.exponential(e, n, LANE)
        dm = _pull_iterations(m, grad, num_iters, n, FIRST, KNOPP, 0.0, LENGTH, LANE, WHOLE)
        out = lines.times(m, dm, n, LANE)
        wide = is_wide(lowest(e, n, LANE))
        if any_of(wide, LANE):
            slow = _pull_iterations(e, grad, num_iters, n, FIRST, _LOG, 0.0, 1, LANE, False)
            out = lines.pick(wide, slow, out, n * n, LANE)
    if range_cap is not None:
        out = _pull_cap(masked, out, n, FIRST, range_cap, LANE)
    return out

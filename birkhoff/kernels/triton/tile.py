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

The damped recurrence starts from K = softmax(X) + eps_start, a_1 = 1, and adds eps_den to each sum of the *matrix*, which
reads a_t = a_{t-1} / (a_{t-1} K^T b_{t-1} + eps_den) in the scalings.

A matrix with an entry further than 2^-60 (2^-480 in float64) below its column's largest is computed on logarithms instead,
in the same call: every program looks at its own matrices, and a program without such a one pays nothing. Arithmetic is in
the dtype of the values: cast to float32 (or float64) after the load.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

__all__ = ["DAMPED", "KNOPP", "pack", "sinkhorn", "sinkhorn_vjp", "unpack"]

KNOPP = tl.constexpr(0)  #: the undamped iteration, linear where safe and logarithmic elsewhere
DAMPED = tl.constexpr(1)  #: DeepSeek's recurrence
_LOG = tl.constexpr(2)

_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
#: One instruction instead of a division: only where PTX is compiled (neither the interpreter nor HIP takes it).
_PTX = tl.constexpr(not _INTERPRETED and torch.version.hip is None)

_LOG2E = tl.constexpr(1.4426950408889634)


# --------------------------------------------------------------------------------------------------------------------
# Between memory order and one tensor per entry


@triton.jit
def unpack(values, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Split ``(BLOCK, WIDTH)`` into a tuple of WIDTH tensors ``(BLOCK,)``."""
    if WIDTH == 1:
        return (tl.reshape(values, (BLOCK,)),)
    else:
        even, odd = tl.split(tl.reshape(values, (BLOCK, WIDTH // 2, 2)))
        evens = unpack(even, BLOCK, WIDTH // 2)
        odds = unpack(odd, BLOCK, WIDTH // 2)
        out = ()
        for k in tl.static_range(WIDTH // 2):
            out = out + (evens[k], odds[k])
        return out


@triton.jit
def pack(values, BLOCK: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """Join the first COUNT of a tuple of tensors ``(BLOCK,)`` into ``(BLOCK, WIDTH)``; the rest repeats the first."""
    out = ()
    for k in tl.static_range(WIDTH):
        if k < COUNT:
            out = out + (values[k],)
        else:
            out = out + (values[0],)
    return _pack(out, BLOCK, WIDTH)


@triton.jit
def _pack(values, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    if WIDTH == 1:
        return tl.reshape(values[0], (BLOCK, 1))
    else:
        even = ()
        odd = ()
        for k in tl.static_range(WIDTH // 2):
            even = even + (values[2 * k],)
            odd = odd + (values[2 * k + 1],)
        return tl.reshape(tl.join(_pack(even, BLOCK, WIDTH // 2), _pack(odd, BLOCK, WIDTH // 2)), (BLOCK, WIDTH))


# --------------------------------------------------------------------------------------------------------------------
# Vectors: tuples of n tensors, or (BLOCK, N)


@triton.jit
def _full(m, value: tl.constexpr, n: tl.constexpr, AXIS: tl.constexpr, LANE: tl.constexpr):
    """A vector of constants, as long as a reduction of m over AXIS."""
    if LANE:
        out = ()
        for _ in tl.static_range(n):
            out = out + (tl.full(m[0].shape, value, m[0].dtype),)
        return out
    else:
        return tl.full((m.shape[0], m.shape[1]), value, m.dtype)


@triton.jit
def _reciprocal(s):
    """1/s within one unit in the last place."""
    if _PTX and s.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [s], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / s


@triton.jit
def _rounded_reciprocal(s):
    """1/s within half a unit in the last place, nearly always: one Newton step after the approximation."""
    r = _reciprocal(s)
    if _PTX and s.dtype == tl.float32:
        r = tl.fma(r, tl.fma(-s, r, 1.0), r)
    return r


@triton.jit
def _valid(s, n: tl.constexpr):
    """Keep padding out of reciprocals: its sums count as one."""
    if s.shape[1] != n:
        s = tl.where((tl.arange(0, s.shape[1]) < n)[None, :], s, 1.0)
    return s


@triton.jit
def _inverse(s, n: tl.constexpr, LANE: tl.constexpr):
    """1/s of a vector of sums; two sums share one reciprocal where they lie in one lane."""
    if LANE:
        out = ()
        for i in tl.static_range(n // 2):
            both = _reciprocal(s[2 * i] * s[2 * i + 1])
            out = out + (both * s[2 * i + 1], both * s[2 * i])
        if n % 2 == 1:
            out = out + (_reciprocal(s[n - 1]),)
        return out
    else:
        return _reciprocal(_valid(s, n))


@triton.jit
def _damped_inverse(s, before, eps: tl.constexpr, n: tl.constexpr, LANE: tl.constexpr):
    """before / (before * s + eps); a line of zeros stays (its scaling is kept) when eps = 0."""
    if LANE:
        out = ()
        for i in tl.static_range(n):
            total = before[i] * s[i] + eps
            if eps == 0.0:
                total = tl.where(total == 0.0, 1.0, total)
            out = out + (before[i] * _reciprocal(total),)
        return out
    else:
        total = _valid(before * s + eps, n)
        if eps == 0.0:
            total = tl.where(total == 0.0, 1.0, total)
        return before * _reciprocal(total)


@triton.jit
def _add(x, y, n: tl.constexpr, LANE: tl.constexpr):
    if LANE:
        out = ()
        for i in tl.static_range(n):
            out = out + (x[i] + y[i],)
        return out
    else:
        return x + y


@triton.jit
def _pick(condition, x, y, COUNT: tl.constexpr, LANE: tl.constexpr):
    """where() over every part; the condition is a scalar or has one value a matrix."""
    if LANE:
        out = ()
        for i in tl.static_range(COUNT):
            out = out + (tl.where(condition, x[i], y[i]),)
        return out
    else:
        return tl.where(condition, x, y)


@triton.jit
def _minus_square_times(a, da, n: tl.constexpr, LANE: tl.constexpr):
    """-a^2 da, in the order that stays in range: a da is of the size of the gradient."""
    if LANE:
        out = ()
        for i in tl.static_range(n):
            out = out + (-a[i] * (a[i] * da[i]),)
        return out
    else:
        return -a * (a * da)


@triton.jit
def _damping_adjoint(eps: tl.constexpr, after, before, d, n: tl.constexpr, LANE: tl.constexpr):
    """Gradient of before / (before s + eps) with respect to `before`, s fixed: eps (after / before)^2 d."""
    if LANE:
        out = ()
        for i in tl.static_range(n):
            ratio = after[i] * _reciprocal(before[i])
            out = out + (eps * ratio * ratio * d[i],)
        return out
    else:
        ratio = after * _reciprocal(_valid(before, n))
        return eps * ratio * ratio * d


# --------------------------------------------------------------------------------------------------------------------
# Matrices: tuples of n*n tensors, or (BLOCK, N, N). AXIS 0 runs over rows, 1 over columns; a vector over AXIS's
# complement is indexed by the other axis: sums over AXIS=0 give one number a column.


@triton.jit
def _sums(m, v, n: tl.constexpr, AXIS: tl.constexpr, LANE: tl.constexpr):
    """Sum of m * v over AXIS, v indexed along AXIS."""
    if LANE:
        out = ()
        for i in tl.static_range(n):
            if AXIS == 0:
                total = m[i] * v[0]
                for k in tl.static_range(1, n):
                    total = tl.fma(m[k * n + i], v[k], total)
            else:
                total = m[i * n] * v[0]
                for k in tl.static_range(1, n):
                    total = tl.fma(m[i * n + k], v[k], total)
            out = out + (total,)
        return out
    else:
        return tl.sum(m * tl.expand_dims(v, 2 - AXIS), AXIS + 1)


@triton.jit
def _scale(m, v, n: tl.constexpr, AXIS: tl.constexpr, LANE: tl.constexpr):
    """m * v with one factor for each line along AXIS (v indexed by the other axis)."""
    if LANE:
        out = ()
        for i in tl.static_range(n):
            for j in tl.static_range(n):
                if AXIS == 0:
                    out = out + (m[i * n + j] * v[j],)
                else:
                    out = out + (m[i * n + j] * v[i],)
        return out
    else:
        return m * tl.expand_dims(v, AXIS + 1)


@triton.jit
def _shift(m, v, n: tl.constexpr, AXIS: tl.constexpr, LANE: tl.constexpr):
    """m + v, v as in :func:`_scale`."""
    if LANE:
        out = ()
        for i in tl.static_range(n):
            for j in tl.static_range(n):
                if AXIS == 0:
                    out = out + (m[i * n + j] + v[j],)
                else:
                    out = out + (m[i * n + j] + v[i],)
        return out
    else:
        return m + tl.expand_dims(v, AXIS + 1)


@triton.jit
def _times(x, y, n: tl.constexpr, LANE: tl.constexpr):
    if LANE:
        out = ()
        for k in tl.static_range(n * n):
            out = out + (x[k] * y[k],)
        return out
    else:
        return x * y


@triton.jit
def _exponential(m, n: tl.constexpr, LANE: tl.constexpr):
    if LANE:
        out = ()
        for k in tl.static_range(n * n):
            out = out + (tl.exp2(m[k]),)
        return out
    else:
        return tl.exp2(m)


@triton.jit
def _peak(m, n: tl.constexpr, AXIS: tl.constexpr, LANE: tl.constexpr):
    """Largest entry of each line along AXIS; zero for a line of zeros of the matrix (-inf everywhere)."""
    if LANE:
        out = ()
        for i in tl.static_range(n):
            if AXIS == 0:
                top = m[i]
                for k in tl.static_range(1, n):
                    top = tl.maximum(top, m[k * n + i])
            else:
                top = m[i * n]
                for k in tl.static_range(1, n):
                    top = tl.maximum(top, m[i * n + k])
            out = out + (tl.where(top == float("-inf"), 0.0, top),)
        return out
    else:
        top = tl.max(m, AXIS + 1)
        return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _log_sums(m, n: tl.constexpr, AXIS: tl.constexpr, LANE: tl.constexpr):
    """-log2 of the sum of 2^m over each line along AXIS; zero for a line of zeros, which then stays."""
    top = _peak(m, n, AXIS, LANE)
    total = _line_sums(_exponential(_shift(m, _negative(top, n, LANE), n, AXIS, LANE), n, LANE), n, AXIS, LANE)
    if LANE:
        out = ()
        for i in tl.static_range(n):
            out = out + (tl.where(total[i] == 0.0, 0.0, -top[i] - tl.log2(total[i])),)
        return out
    else:
        return tl.where(total == 0.0, 0.0, -top - tl.log2(tl.where(total == 0.0, 1.0, total)))


@triton.jit
def _negative(v, n: tl.constexpr, LANE: tl.constexpr):
    if LANE:
        out = ()
        for i in tl.static_range(n):
            out = out + (-v[i],)
        return out
    else:
        return -v


@triton.jit
def _line_sums(m, n: tl.constexpr, AXIS: tl.constexpr, LANE: tl.constexpr):
    """Sum over AXIS."""
    if LANE:
        out = ()
        for i in tl.static_range(n):
            if AXIS == 0:
                total = m[i]
                for k in tl.static_range(1, n):
                    total += m[k * n + i]
            else:
                total = m[i * n]
                for k in tl.static_range(1, n):
                    total += m[i * n + k]
            out = out + (total,)
        return out
    else:
        return tl.sum(m, AXIS + 1)


@triton.jit
def _divide_lines(m, n: tl.constexpr, AXIS: tl.constexpr, LANE: tl.constexpr):
    """m over its sums along AXIS, which are then 1 within (n + 1) roundings; a line of zeros stays."""
    total = _line_sums(m, n, AXIS, LANE)
    if LANE:
        inverse = ()
        for i in tl.static_range(n):
            inverse = inverse + (_rounded_reciprocal(tl.where(total[i] == 0.0, 1.0, total[i])),)
        return _scale(m, inverse, n, AXIS, LANE)
    else:
        return _scale(m, _rounded_reciprocal(tl.where(total == 0.0, 1.0, total)), n, AXIS, LANE)


@triton.jit
def _add_outer(dm, q, v, n: tl.constexpr, AXIS: tl.constexpr, LANE: tl.constexpr):
    """dm + q v^T: v indexed along AXIS, q by the other axis."""
    if LANE:
        out = ()
        for i in tl.static_range(n):
            for j in tl.static_range(n):
                if AXIS == 0:
                    out = out + (tl.fma(v[i], q[j], dm[i * n + j]),)
                else:
                    out = out + (tl.fma(q[i], v[j], dm[i * n + j]),)
        return out
    else:
        return dm + tl.expand_dims(v, 2 - AXIS) * tl.expand_dims(q, AXIS + 1)


# --------------------------------------------------------------------------------------------------------------------
# Start: logits to exponents of two below zero


@triton.jit
def _exponents(logits, n: tl.constexpr, FIRST: tl.constexpr, cap: tl.constexpr, LANE: tl.constexpr):
    """(X - max) log2(e) with the maximum over each first-normalised line, not below -cap; padding is -inf.

    The product and the subtraction are one fused operation, and the constant that is subtracted from a line cancels in
    the first normalisation whatever its rounding.
    """
    top = _peak(logits, n, FIRST, LANE)
    if LANE:
        out = ()
        for i in tl.static_range(n):
            for j in tl.static_range(n):
                if FIRST == 0:
                    offset = top[j]
                else:
                    offset = top[i]
                e = tl.fma(logits[i * n + j], tl.full(offset.shape, _LOG2E, offset.dtype), -(offset * _LOG2E))
                if cap is not None:
                    e = tl.where(logits[i * n + j] < offset - cap, tl.full(e.shape, -cap * _LOG2E, e.dtype), e)
                out = out + (e,)
        return out
    else:
        offset = tl.expand_dims(top, FIRST + 1)
        e = logits * _LOG2E - offset * _LOG2E
        if cap is not None:
            e = tl.where(logits < offset - cap, tl.full(e.shape, -cap * _LOG2E, e.dtype), e)
        if logits.shape[1] != n:
            k = tl.arange(0, logits.shape[1])
            e = tl.where((k[:, None] < n)[None, :, :] & (k[None, :] < n)[None, :, :], e, float("-inf"))
        return e


@triton.jit
def _masked_logits(logits, n: tl.constexpr, LANE: tl.constexpr):
    """The values, with padding at -inf so that it is never a maximum."""
    if not LANE:
        if logits.shape[1] != n:
            k = tl.arange(0, logits.shape[1])
            inside = (k[:, None] < n)[None, :, :] & (k[None, :] < n)[None, :, :]
            logits = tl.where(inside, logits, float("-inf"))
    return logits


@triton.jit
def _is_wide(e, n: tl.constexpr, LANE: tl.constexpr):
    """Per matrix: an exponent too low for linear arithmetic. Shape (BLOCK,), or (BLOCK, 1, 1)."""
    if LANE:
        low = e[0]
        for k in tl.static_range(1, n * n):
            low = tl.minimum(low, e[k])
        return low < (-480.0 if e[0].dtype == tl.float64 else -60.0)
    else:
        inside = e
        if e.shape[1] != n:
            k = tl.arange(0, e.shape[1])
            inside = tl.where((k[:, None] < n)[None, :, :] & (k[None, :] < n)[None, :, :], e, 0.0)
        low = tl.min(tl.min(inside, 2, keep_dims=True), 1, keep_dims=True)
        return low < (-480.0 if e.dtype == tl.float64 else -60.0)


@triton.jit
def _any(wide, LANE: tl.constexpr):
    flags = wide.to(tl.int32)
    if LANE:
        return tl.max(flags, 0) != 0
    else:
        return tl.max(tl.reshape(flags, (flags.shape[0],)), 0) != 0


# --------------------------------------------------------------------------------------------------------------------
# Forward


@triton.jit
def _half(m, v, before, n: tl.constexpr, AXIS: tl.constexpr, KIND: tl.constexpr, eps: tl.constexpr, LANE: tl.constexpr):
    """One half step: the scalings of the lines along AXIS, from the scalings v of the other lines."""
    if KIND == _LOG:
        return _log_sums(_shift(m, v, n, 1 - AXIS, LANE), n, AXIS, LANE)
    else:
        s = _sums(m, v, n, AXIS, LANE)
        if KIND == DAMPED:
            return _damped_inverse(s, before, eps, n, LANE)
        else:
            return _inverse(s, n, LANE)


@triton.jit
def _start(m, n: tl.constexpr, FIRST: tl.constexpr, KIND: tl.constexpr, eps: tl.constexpr, LANE: tl.constexpr):
    """Scalings (a, b) before the first full iteration; for the damped recurrence after its first last-side division."""
    if KIND == _LOG:
        a = _full(m, 0.0, n, FIRST, LANE)
        return a, a
    else:
        a = _full(m, 1.0, n, FIRST, LANE)
        if KIND == DAMPED:
            return a, _half(m, a, a, n, 1 - FIRST, KIND, eps, LANE)
        else:
            return a, a


@triton.jit
def _damped_start(e, n: tl.constexpr, FIRST: tl.constexpr, eps_start: tl.constexpr, LANE: tl.constexpr):
    """softmax over the first-normalised lines, plus eps_start; padding stays zero."""
    soft = _divide_lines(_exponential(e, n, LANE), n, FIRST, LANE)
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
def _linear(m, num_iters, n: tl.constexpr, FIRST: tl.constexpr, LANE: tl.constexpr):
    """T iterations on scalings; the last half step divides the matrix itself, so that its sums are exact."""
    a, b = _start(m, n, FIRST, KNOPP, 0.0, LANE)
    for _ in range(num_iters - 1):
        a = _half(m, b, a, n, FIRST, KNOPP, 0.0, LANE)
        b = _half(m, a, b, n, 1 - FIRST, KNOPP, 0.0, LANE)
    a = _half(m, b, a, n, FIRST, KNOPP, 0.0, LANE)
    return _divide_lines(_scale(m, a, n, FIRST, LANE), n, 1 - FIRST, LANE)


@triton.jit
def _logarithmic(e, num_iters, n: tl.constexpr, FIRST: tl.constexpr, LANE: tl.constexpr):
    """T iterations on log2 of the matrix itself: its large entries stay near zero, where rounding is smallest."""
    for _ in range(num_iters):
        e = _shift(e, _log_sums(e, n, FIRST, LANE), n, FIRST, LANE)
        e = _shift(e, _log_sums(e, n, 1 - FIRST, LANE), n, 1 - FIRST, LANE)
    return _divide_lines(_exponential(e, n, LANE), n, 1 - FIRST, LANE)


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
    e = _exponents(_masked_logits(logits, n, LANE), n, FIRST, range_cap, LANE)
    if METHOD == DAMPED:
        _, m = _damped_start(e, n, FIRST, eps_start, LANE)
        a, b = _start(m, n, FIRST, DAMPED, eps_den, LANE)
        for _ in range(num_iters - 1):
            a = _half(m, b, a, n, FIRST, DAMPED, eps_den, LANE)
            b = _half(m, a, b, n, 1 - FIRST, DAMPED, eps_den, LANE)
        return _scale(_scale(m, a, n, FIRST, LANE), b, n, 1 - FIRST, LANE)
    else:
        wide = _is_wide(e, n, LANE)
        out = _linear(_exponential(e, n, LANE), num_iters, n, FIRST, LANE)
        if _any(wide, LANE):
            out = _pick(wide, _logarithmic(e, num_iters, n, FIRST, LANE), out, n * n, LANE)
        return out


# --------------------------------------------------------------------------------------------------------------------
# Backward: iterations are replayed from the start in segments whose scalings fit in registers, last segment first


@triton.jit
def _pull_half(m, dm, out, d_out, v, n: tl.constexpr, AXIS: tl.constexpr, KIND: tl.constexpr, LANE: tl.constexpr):
    """Pull d_out through out = 1/(m v) (or its logarithm) along AXIS: the new dm and the gradient of v."""
    if KIND == _LOG:
        w = _exponential(_shift(_shift(m, out, n, AXIS, LANE), v, n, 1 - AXIS, LANE), n, LANE)
        flow = _scale(w, _negative(d_out, n, LANE), n, AXIS, LANE)
        if LANE:
            return _add(dm, flow, n * n, LANE), _line_sums(flow, n, 1 - AXIS, LANE)
        else:
            return dm + flow, tl.sum(flow, 2 - AXIS)
    else:
        q = _minus_square_times(out, d_out, n, LANE)
        return _add_outer(dm, q, v, n, AXIS, LANE), _sums(m, q, n, 1 - AXIS, LANE)


@triton.jit
def _pull_result(m, grad, a, b, n: tl.constexpr, FIRST: tl.constexpr, KIND: tl.constexpr, LANE: tl.constexpr):
    """Gradients of m, a and b of P = a m b (or 2^(m + a + b), in natural units)."""
    if KIND == _LOG:
        p = _exponential(_shift(_shift(m, a, n, FIRST, LANE), b, n, 1 - FIRST, LANE), n, LANE)
        dm = _times(grad, p, n, LANE)
        return dm, _line_sums(dm, n, FIRST, LANE), _line_sums(dm, n, 1 - FIRST, LANE)
    else:
        dm = _scale(_scale(grad, a, n, FIRST, LANE), b, n, 1 - FIRST, LANE)
        flow = _times(grad, m, n, LANE)
        return dm, _sums(flow, b, n, FIRST, LANE), _sums(flow, a, n, 1 - FIRST, LANE)


@triton.jit
def _pull_segment(
    m,
    grad,
    dm,
    da,
    db,
    start,
    is_last,
    n: tl.constexpr,
    FIRST: tl.constexpr,
    KIND: tl.constexpr,
    eps: tl.constexpr,
    LENGTH: tl.constexpr,
    LANE: tl.constexpr,
):
    """Replay iterations 0..start, keep the scalings of the next LENGTH, and pull the gradients back through these."""
    a, b = _start(m, n, FIRST, KIND, eps, LANE)
    for _ in range(start):
        a = _half(m, b, a, n, FIRST, KIND, eps, LANE)
        b = _half(m, a, b, n, 1 - FIRST, KIND, eps, LANE)
    kept_a = (a,)
    kept_b = (b,)
    for t in tl.static_range(LENGTH):
        kept_a = kept_a + (_half(m, kept_b[t], kept_a[t], n, FIRST, KIND, eps, LANE),)
        kept_b = kept_b + (_half(m, kept_a[t + 1], kept_b[t], n, 1 - FIRST, KIND, eps, LANE),)
    end_dm, end_da, end_db = _pull_result(m, grad, kept_a[LENGTH], kept_b[LENGTH], n, FIRST, KIND, LANE)
    dm = _pick(is_last, end_dm, dm, n * n, LANE)
    da = _pick(is_last, end_da, da, n, LANE)
    db = _pick(is_last, end_db, db, n, LANE)
    for t in tl.static_range(LENGTH - 1, -1, -1):
        dm, more = _pull_half(m, dm, kept_b[t + 1], db, kept_a[t + 1], n, 1 - FIRST, KIND, LANE)
        da = _add(da, more, n, LANE)
        dm, d_before = _pull_half(m, dm, kept_a[t + 1], da, kept_b[t], n, FIRST, KIND, LANE)
        if KIND == DAMPED:
            db = _add(d_before, _damping_adjoint(eps, kept_b[t + 1], kept_b[t], db, n, LANE), n, LANE)
            da = _damping_adjoint(eps, kept_a[t + 1], kept_a[t], da, n, LANE)
        else:
            db = d_before
            da = _full(m, 0.0, n, FIRST, LANE)
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
):
    """Gradient of m through all full iterations."""
    full = num_iters
    if KIND == DAMPED:
        full = num_iters - 1
    a, b = _start(m, n, FIRST, KIND, eps, LANE)
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
        ones = _full(m, 1.0, n, FIRST, LANE)
        dm, _ = _pull_half(m, dm, b, db, ones, n, 1 - FIRST, KIND, LANE)
    return dm


@triton.jit
def _pull_softmax(soft, d, n: tl.constexpr, FIRST: tl.constexpr, LANE: tl.constexpr):
    """s (d - sum of s d) along the first-normalised lines."""
    flow = _times(soft, d, n, LANE)
    total = _line_sums(flow, n, FIRST, LANE)
    lost = _scale(soft, _negative(total, n, LANE), n, FIRST, LANE)
    if LANE:
        return _add(flow, lost, n * n, LANE)
    else:
        return flow + lost


@triton.jit
def _pull_cap(logits, d, n: tl.constexpr, FIRST: tl.constexpr, cap: tl.constexpr, LANE: tl.constexpr):
    """A raised entry hands its gradient to the largest of its line; equal largest share it."""
    top = _peak(logits, n, FIRST, LANE)
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
):
    """Exact gradient of :func:`sinkhorn` with respect to the logits.

    LENGTH iterations are kept in registers at a time (2 n numbers each); earlier ones are replayed, so that any
    `num_iters` works: with T a multiple of LENGTH, T (T / LENGTH + 1) / 2 forward iterations are computed in all.
    """
    FIRST: tl.constexpr = 0 if COLUMNS_FIRST else 1
    masked = _masked_logits(logits, n, LANE)
    e = _exponents(masked, n, FIRST, range_cap, LANE)
    if METHOD == DAMPED:
        soft, m = _damped_start(e, n, FIRST, eps_start, LANE)
        dm = _pull_iterations(m, grad, num_iters, n, FIRST, DAMPED, eps_den, LENGTH, LANE)
        out = _pull_softmax(soft, dm, n, FIRST, LANE)
    else:
        m = _exponential(e, n, LANE)
        out = _times(m, _pull_iterations(m, grad, num_iters, n, FIRST, KNOPP, 0.0, LENGTH, LANE), n, LANE)
        wide = _is_wide(e, n, LANE)
        if _any(wide, LANE):
            slow = _pull_iterations(e, grad, num_iters, n, FIRST, _LOG, 0.0, 1, LANE)
            out = _pick(wide, slow, out, n * n, LANE)
    if range_cap is not None:
        out = _pull_cap(masked, out, n, FIRST, range_cap, LANE)
    return out

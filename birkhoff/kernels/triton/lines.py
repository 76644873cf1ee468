"""Operations on the lines (rows and columns) of a batch of n x n matrices held on chip, in either form of tile.py.

``LANE=True``: a matrix is a tuple of n*n tensors of one shape, row-major, a vector a tuple of n. Tensors ``(BLOCK,)``
hold a matrix in a lane; with tensors ``(BLOCK, G, G)`` each lane of a grid holds an n x n block of a larger matrix, a
vector's tensors are 1 along its AXIS, and sums go on over the grid. ``LANE=False``: a matrix is a tensor ``(BLOCK, N,
N)``, a vector ``(BLOCK, N)``. AXIS 0 runs over rows, 1 over columns: sums over AXIS 0 give one number a column.
"""
# ruff: noqa: RUF005  (Triton compiles tuple concatenation, not unpacking)

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

#: One instruction instead of a division: only where PTX is compiled (neither the interpreter nor HIP takes it).
_PTX = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") != "1" and torch.version.hip is None)


# --------------------------------------------------------------------------------------------------------------------
# Between memory order and one tensor per entry


@triton.jit
def unpack(values, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Split ``(BLOCK, WIDTH)`` into a tuple of WIDTH tensors ``(BLOCK,)``, or ``(BLOCK, G, G, WIDTH)`` alike."""
    GRID: tl.constexpr = values.shape[1] if len(values.shape) == 4 else 1
    if WIDTH == 1:
        if GRID == 1:
            return (tl.reshape(values, (BLOCK,)),)
        else:
            return (tl.reshape(values, (BLOCK, GRID, GRID)),)
    else:
        if GRID == 1:
            even, odd = tl.split(tl.reshape(values, (BLOCK, WIDTH // 2, 2)))
        else:
            even, odd = tl.split(tl.reshape(values, (BLOCK, GRID, GRID, WIDTH // 2, 2)))
        evens = unpack(even, BLOCK, WIDTH // 2)
        odds = unpack(odd, BLOCK, WIDTH // 2)
        out = ()
        for k in tl.static_range(WIDTH // 2):
            out = out + (evens[k], odds[k])
        return out


@triton.jit
def pack(values, BLOCK: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """The inverse of :func:`unpack` for the first COUNT tensors of a tuple; the rest repeats the first."""
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
        return tl.expand_dims(values[0], len(values[0].shape))
    else:
        even = ()
        odd = ()
        for k in tl.static_range(WIDTH // 2):
            even = even + (values[2 * k],)
            odd = odd + (values[2 * k + 1],)
        both = tl.join(_pack(even, BLOCK, WIDTH // 2), _pack(odd, BLOCK, WIDTH // 2))
        if len(both.shape) == 3:
            return tl.reshape(both, (BLOCK, WIDTH))
        else:
            return tl.reshape(both, (BLOCK, both.shape[1], both.shape[2], WIDTH))


# --------------------------------------------------------------------------------------------------------------------
# Vectors: tuples of n tensors, or (BLOCK, N)


@triton.jit
def constant(m, value: tl.constexpr, n: tl.constexpr, AXIS: tl.constexpr, LANE: tl.constexpr):
    """A vector of constants, as long as a reduction of m over AXIS."""
    if LANE:
        if len(m[0].shape) == 1:
            one = tl.full(m[0].shape, value, m[0].dtype)
        elif AXIS == 0:
            one = tl.full((m[0].shape[0], 1, m[0].shape[2]), value, m[0].dtype)
        else:
            one = tl.full((m[0].shape[0], m[0].shape[1], 1), value, m[0].dtype)
        out = ()
        for _ in tl.static_range(n):
            out = out + (one,)
        return out
    else:
        return tl.full((m.shape[0], m.shape[1]), value, m.dtype)


@triton.jit
def sum_over_grid(x, AXIS: tl.constexpr):
    """Sum over the lanes that share a line, if several do."""
    if len(x.shape) == 3:
        return tl.sum(x, AXIS + 1, keep_dims=True)
    else:
        return x


@triton.jit
def max_over_grid(x, AXIS: tl.constexpr):
    if len(x.shape) == 3:
        return tl.max(x, AXIS + 1, keep_dims=True)
    else:
        return x


@triton.jit
def fused(x, y, z):
    """x * y + z, rounded once; x and y may be tensors of a vector."""
    return tl.fma(tl.broadcast_to(x, z.shape), tl.broadcast_to(y, z.shape), z)


@triton.jit
def reciprocal(s):
    """1/s within one unit in the last place."""
    if _PTX and s.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [s], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / s


@triton.jit
def rounded_reciprocal(s):
    """1/s within half a unit in the last place, nearly always: one Newton step after the approximation."""
    r = reciprocal(s)
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
def inverse(s, n: tl.constexpr, PAIRED: tl.constexpr, LANE: tl.constexpr):
    """1/s of a vector of sums; PAIRED: two sums in one lane share a reciprocal (their product must be safe)."""
    if LANE and not PAIRED:
        out = ()
        for i in tl.static_range(n):
            out = out + (reciprocal(s[i]),)
        return out
    elif LANE:
        out = ()
        for i in tl.static_range(n // 2):
            both = reciprocal(s[2 * i] * s[2 * i + 1])
            out = out + (both * s[2 * i + 1], both * s[2 * i])
        if n % 2 == 1:
            out = out + (reciprocal(s[n - 1]),)
        return out
    else:
        return reciprocal(_valid(s, n))


@triton.jit
def damped_inverse(s, before, eps: tl.constexpr, n: tl.constexpr, LANE: tl.constexpr):
    """before / (before * s + eps); a line of zeros stays (its scaling is kept) when eps = 0."""
    if LANE:
        out = ()
        for i in tl.static_range(n):
            total = before[i] * s[i] + eps
            if eps == 0.0:
                total = tl.where(total == 0.0, 1.0, total)
            out = out + (before[i] * reciprocal(total),)
        return out
    else:
        total = _valid(before * s + eps, n)
        if eps == 0.0:
            total = tl.where(total == 0.0, 1.0, total)
        return before * reciprocal(total)


@triton.jit
def add(x, y, n: tl.constexpr, LANE: tl.constexpr):
    if LANE:
        out = ()
        for i in tl.static_range(n):
            out = out + (x[i] + y[i],)
        return out
    else:
        return x + y


@triton.jit
def pick(condition, x, y, COUNT: tl.constexpr, LANE: tl.constexpr):
    """where() over every part; the condition is a scalar or has one value a matrix."""
    if LANE:
        out = ()
        for i in tl.static_range(COUNT):
            out = out + (tl.where(condition, x[i], y[i]),)
        return out
    else:
        return tl.where(condition, x, y)


@triton.jit
def minus_square_times(a, da, n: tl.constexpr, LANE: tl.constexpr):
    """-a^2 da, in the order that stays in range: a da is of the size of the gradient."""
    if LANE:
        out = ()
        for i in tl.static_range(n):
            out = out + (-a[i] * (a[i] * da[i]),)
        return out
    else:
        return -a * (a * da)


@triton.jit
def damping_adjoint(eps: tl.constexpr, after, before, d, n: tl.constexpr, LANE: tl.constexpr):
    """Gradient of before / (before s + eps) with respect to `before`, s fixed: eps (after / before)^2 d."""
    if LANE:
        out = ()
        for i in tl.static_range(n):
            ratio = after[i] * reciprocal(before[i])
            out = out + (eps * ratio * ratio * d[i],)
        return out
    else:
        ratio = after * reciprocal(_valid(before, n))
        return eps * ratio * ratio * d


# --------------------------------------------------------------------------------------------------------------------
# Matrices: tuples of n*n tensors, or (BLOCK, N, N). AXIS 0 runs over rows, 1 over columns; a vector over AXIS's
# complement is indexed by the other axis: sums over AXIS=0 give one number a column.


@triton.jit
def sums(m, v, n: tl.constexpr, AXIS: tl.constexpr, LANE: tl.constexpr):
    """Sum of m * v over AXIS, v indexed along AXIS."""
    if LANE:
        out = ()
        for i in tl.static_range(n):
            if AXIS == 0:
                total = m[i] * v[0]
                for k in tl.static_range(1, n):
                    total = fused(m[k * n + i], v[k], total)
            else:
                total = m[i * n] * v[0]
                for k in tl.static_range(1, n):
                    total = fused(m[i * n + k], v[k], total)
            out = out + (sum_over_grid(total, AXIS),)
        return out
    else:
        return tl.sum(m * tl.expand_dims(v, 2 - AXIS), AXIS + 1)


@triton.jit
def scale(m, v, n: tl.constexpr, AXIS: tl.constexpr, LANE: tl.constexpr):
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
def shift(m, v, n: tl.constexpr, AXIS: tl.constexpr, LANE: tl.constexpr):
    """m + v, v as in :func:`scale`."""
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
def times(x, y, n: tl.constexpr, LANE: tl.constexpr):
    if LANE:
        out = ()
        for k in tl.static_range(n * n):
            out = out + (x[k] * y[k],)
        return out
    else:
        return x * y


@triton.jit
def exponential(m, n: tl.constexpr, LANE: tl.constexpr):
    if LANE:
        out = ()
        for k in tl.static_range(n * n):
            out = out + (tl.exp2(m[k]),)
        return out
    else:
        return tl.exp2(m)


@triton.jit
def peak(m, n: tl.constexpr, AXIS: tl.constexpr, LANE: tl.constexpr):
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
            top = max_over_grid(top, AXIS)
            out = out + (tl.where(top == float("-inf"), 0.0, top),)
        return out
    else:
        top = tl.max(m, AXIS + 1)
        return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def log_sums(m, n: tl.constexpr, AXIS: tl.constexpr, LANE: tl.constexpr):
    """-log2 of the sum of 2^m over each line along AXIS; zero for a line of zeros, which then stays."""
    top = peak(m, n, AXIS, LANE)
    total = line_sums(exponential(shift(m, negative(top, n, LANE), n, AXIS, LANE), n, LANE), n, AXIS, LANE)
    if LANE:
        out = ()
        for i in tl.static_range(n):
            out = out + (tl.where(total[i] == 0.0, 0.0, -top[i] - tl.log2(total[i])),)
        return out
    else:
        return tl.where(total == 0.0, 0.0, -top - tl.log2(tl.where(total == 0.0, 1.0, total)))


@triton.jit
def negative(v, n: tl.constexpr, LANE: tl.constexpr):
    if LANE:
        out = ()
        for i in tl.static_range(n):
            out = out + (-v[i],)
        return out
    else:
        return -v


@triton.jit
def line_sums(m, n: tl.constexpr, AXIS: tl.constexpr, LANE: tl.constexpr):
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
            out = out + (sum_over_grid(total, AXIS),)
        return out
    else:
        return tl.sum(m, AXIS + 1)


@triton.jit
def divide_lines(m, n: tl.constexpr, AXIS: tl.constexpr, LANE: tl.constexpr):
    """m over its sums along AXIS, which are then 1 within (n + 1) roundings; a line of zeros stays."""
    total = line_sums(m, n, AXIS, LANE)
    if LANE:
        inverse = ()
        for i in tl.static_range(n):
            inverse = inverse + (rounded_reciprocal(tl.where(total[i] == 0.0, 1.0, total[i])),)
        return scale(m, inverse, n, AXIS, LANE)
    else:
        return scale(m, rounded_reciprocal(tl.where(total == 0.0, 1.0, total)), n, AXIS, LANE)


@triton.jit
def add_outer(dm, q, v, n: tl.constexpr, AXIS: tl.constexpr, LANE: tl.constexpr):
    """dm + q v^T: v indexed along AXIS, q by the other axis."""
    if LANE:
        out = ()
        for i in tl.static_range(n):
            for j in tl.static_range(n):
                if AXIS == 0:
                    out = out + (fused(v[i], q[j], dm[i * n + j]),)
                else:
                    out = out + (fused(q[i], v[j], dm[i * n + j]),)
        return out
    else:
        return dm + tl.expand_dims(v, 2 - AXIS) * tl.expand_dims(q, AXIS + 1)

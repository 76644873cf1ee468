"""In-register residual map of a tile of tokens and its exact adjoint, for every convention."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["residual_map", "residual_map_backward"]


@triton.jit
def residual_map(
    logits,
    n: tl.constexpr,
    NS: tl.constexpr,
    METHOD: tl.constexpr,
    FIRST: tl.constexpr,
    ITERS: tl.constexpr,
    eps_start,
    eps_den,
):
    """Project stored logits [BLOCK, NS, NS] (cells outside n x n are ignored)."""
    a = tl.arange(0, NS)[None, :, None]
    b = tl.arange(0, NS)[None, None, :]
    real = (a < n) & (b < n)
    ax: tl.constexpr = 1 if FIRST == "columns" else 2
    bx: tl.constexpr = 3 - ax
    z = tl.where(real, logits, -1.0e30)
    z = z - tl.max(z, axis=ax, keep_dims=True)
    m = tl.where(real, tl.exp(z), 0.0)
    pad_a = tl.where(tl.sum(tl.where(real, 1.0, 0.0), axis=ax, keep_dims=True) > 0, 0.0, 1.0)
    pad_b = tl.where(tl.sum(tl.where(real, 1.0, 0.0), axis=bx, keep_dims=True) > 0, 0.0, 1.0)
    if METHOD == "damped":
        m = m / (tl.sum(m, axis=ax, keep_dims=True) + pad_a)
        m = tl.where(real, m + eps_start, 0.0)
        m = m / (tl.sum(m, axis=bx, keep_dims=True) + eps_den + pad_b)
        for _ in range(ITERS - 1):
            m = m / (tl.sum(m, axis=ax, keep_dims=True) + eps_den + pad_a)
            m = m / (tl.sum(m, axis=bx, keep_dims=True) + eps_den + pad_b)
    else:
        for _ in range(ITERS):
            m = m / (tl.sum(m, axis=ax, keep_dims=True) + pad_a)
            m = m / (tl.sum(m, axis=bx, keep_dims=True) + pad_b)
    return m


@triton.jit
def residual_map_backward(
    logits,
    grad,
    n: tl.constexpr,
    NS: tl.constexpr,
    METHOD: tl.constexpr,
    FIRST: tl.constexpr,
    ITERS: tl.constexpr,
    eps_start,
    eps_den,
):
    """Return (matrix, dL/dlogits) for dL/dmatrix = grad, both as stored."""
    a = tl.arange(0, NS)[None, :, None]
    b = tl.arange(0, NS)[None, None, :]
    real = (a < n) & (b < n)
    ax: tl.constexpr = 1 if FIRST == "columns" else 2
    bx: tl.constexpr = 3 - ax
    z = tl.where(real, logits, -1.0e30)
    z = z - tl.max(z, axis=ax, keep_dims=True)
    m = tl.where(real, tl.exp(z), 0.0)
    pad_a = tl.where(tl.sum(tl.where(real, 1.0, 0.0), axis=ax, keep_dims=True) > 0, 0.0, 1.0)
    pad_b = tl.where(tl.sum(tl.where(real, 1.0, 0.0), axis=bx, keep_dims=True) > 0, 0.0, 1.0)
    sums = ()
    start = m
    if METHOD == "damped":
        start = m / (tl.sum(m, axis=ax, keep_dims=True) + pad_a)
        m = tl.where(real, start + eps_start, 0.0)
        s = tl.sum(m, axis=bx, keep_dims=True) + eps_den + pad_b
        m = m / s
        sums = sums + (s,)
        for _ in tl.static_range(ITERS - 1):
            s = tl.sum(m, axis=ax, keep_dims=True) + eps_den + pad_a
            m = m / s
            sums = sums + (s,)
            s = tl.sum(m, axis=bx, keep_dims=True) + eps_den + pad_b
            m = m / s
            sums = sums + (s,)
    else:
        for _ in tl.static_range(ITERS):
            s = tl.sum(m, axis=ax, keep_dims=True) + pad_a
            m = m / s
            sums = sums + (s,)
            s = tl.sum(m, axis=bx, keep_dims=True) + pad_b
            m = m / s
            sums = sums + (s,)
    out = m
    d = tl.where(real, grad, 0.0)
    if METHOD == "damped":
        for t in tl.static_range(2 * ITERS - 1):
            s = sums[2 * ITERS - 2 - t]
            if t % 2 == 0:
                d = (d - tl.sum(d * m, axis=bx, keep_dims=True)) / s
            else:
                d = (d - tl.sum(d * m, axis=ax, keep_dims=True)) / s
            m = m * s
        d = start * (d - tl.sum(d * start, axis=ax, keep_dims=True))
    else:
        for t in tl.static_range(2 * ITERS):
            s = sums[2 * ITERS - 1 - t]
            if t % 2 == 0:
                d = (d - tl.sum(d * m, axis=bx, keep_dims=True)) / s
            else:
                d = (d - tl.sum(d * m, axis=ax, keep_dims=True)) / s
            m = m * s
        d = d * start
    return out, tl.where(real, d, 0.0)

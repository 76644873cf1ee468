"""Coefficients of a site, forward: projection with mean square in one read of the streams, then the finish.

Tokens M, streams n, channels C, K = nC, N = n(n + 2). The contraction is split over K into slabs that the finish sums in a fixed
order: no atomics, bitwise reproducible. Streams of 16 bits are exact tensor-core operands, so only phi is split, in two terms.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mhc_layers.kernels.options import SiteOptions
from mhc_layers.kernels.triton.configs import (
    ProjectConfig,
    finish_block,
    is_interpreting,
    next_power_of_2,
    num_sms,
    project_config,
)
from mhc_layers.kernels.triton.maps import residual_map

__all__ = ["finish", "project", "split_phi"]


@triton.jit
def split_phi_kernel(PHI, TERMS, K, N: tl.constexpr, NP: tl.constexpr, BLOCK: tl.constexpr):
    """hi = round(phi), lo = round(phi - hi); rows N..NP are zero so that the projection needs no row mask."""
    j = tl.arange(0, NP)[:, None]
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    value = tl.load(PHI + j * K + k, mask=(j < N) & (k < K), other=0.0)
    hi = value.to(TERMS.dtype.element_ty)
    lo = (value - hi.to(tl.float32)).to(TERMS.dtype.element_ty)
    tl.store(TERMS + j * K + k, hi, mask=k < K)
    tl.store(TERMS + (NP + j) * K + k, lo, mask=k < K)


@triton.jit(do_not_specialize=["M"])
def project_kernel(
    X,
    PHI,
    SLABS,
    SQUARES,
    M,
    K: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    SPAN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    V: tl.constexpr,
    TERMS: tl.constexpr,
    SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """slab[s, t, :] = sum over k in split s of x[t, k] phi[:, k];  square[s, t] = sum over the same k of x[t, k]^2."""
    split = tl.program_id(1)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    row_mask = rows < M
    j = tl.arange(0, NP)
    x_rows = X + rows[:, None].to(tl.int64) * K
    acc = tl.zeros((BM, NP), tl.float32)
    squares = tl.zeros((BM, BK // V), tl.float32)
    for step in tl.range(0, SPAN, BK, num_stages=STAGES):
        k = split * SPAN + step + tl.arange(0, BK)
        if EVEN:
            x = tl.load(x_rows + k[None, :], mask=row_mask[:, None], other=0.0)
        else:
            x = tl.load(x_rows + k[None, :], mask=row_mask[:, None] & (k < K)[None, :], other=0.0)
        x32 = x.to(tl.float32)
        if SPLIT:
            if EVEN:
                w = tl.load(PHI + j[None, :] * K + k[:, None], mask=(j < N)[None, :], other=0.0)
            else:
                w = tl.load(PHI + j[None, :] * K + k[:, None], mask=(j < N)[None, :] & (k < K)[:, None], other=0.0)
            hi = w.to(x.dtype)
            lo = (w - hi.to(tl.float32)).to(x.dtype)
        else:
            if EVEN:
                hi = tl.load(PHI + j[None, :] * K + k[:, None])
            else:
                hi = tl.load(PHI + j[None, :] * K + k[:, None], mask=(k < K)[:, None], other=0.0)
            lo = hi
            if TERMS == 2:
                if EVEN:
                    lo = tl.load(PHI + (NP + j[None, :]) * K + k[:, None])
                else:
                    lo = tl.load(PHI + (NP + j[None, :]) * K + k[:, None], mask=(k < K)[:, None], other=0.0)
        if UPCAST:
            acc = tl.dot(x32, hi.to(tl.float32), acc, input_precision=PRECISION)
            if TERMS == 2:
                acc = tl.dot(x32, lo.to(tl.float32), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x, hi, acc, input_precision=PRECISION)
            if TERMS == 2:
                acc = tl.dot(x, lo, acc, input_precision=PRECISION)
        # V neighbouring channels sit in one lane, so the loop has no shuffles
        squares += tl.sum(tl.reshape(x32 * x32, (BM, BK // V, V)), axis=2)
    out = split.to(tl.int64) * M + rows
    tl.store(SLABS + out[:, None] * N + j[None, :], acc, mask=row_mask[:, None] & (j < N)[None, :])
    tl.store(SQUARES + out, tl.sum(squares, axis=1), mask=row_mask)


@triton.jit
def _sum_slabs(SLABS, offset, mask, stride, S):
    """Sum of S partial products in the order s = 0, 1, ..., S - 1."""
    total = tl.load(SLABS + offset, mask=mask, other=0.0)
    for s in range(1, S):
        total += tl.load(SLABS + s * stride + offset, mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=["M", "S"])
def finish_kernel(
    SLABS,
    SQUARES,
    ALPHA,
    BIAS,
    COEF,
    PROJ,
    RSTD,
    M,
    S,
    inv_k,
    norm_eps,
    eps_pre,
    post_scale,
    eps_start,
    eps_den,
    n: tl.constexpr,
    NS: tl.constexpr,
    METHOD: tl.constexpr,
    FIRST: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ITERS: tl.constexpr,
    BT: tl.constexpr,
):
    """proj = h / r (Eq. 15), logits = alpha proj + bias (Eq. 16), then sigmoids (Eq. 17, 18) and the projection (Eq. 9, 19)."""
    N: tl.constexpr = n * (n + 2)
    tok = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    live = tok < M
    stride = M.to(tl.int64) * N
    square = _sum_slabs(SQUARES, tok, live, M.to(tl.int64), S)
    rstd = tl.rsqrt(square * inv_k + norm_eps)
    tl.store(RSTD + tok, rstd, mask=live)

    i = tl.arange(0, NS)
    pair = live[:, None] & (i < n)[None, :]
    pre_at = tok[:, None] * N + i[None, :]
    post_at = pre_at + n
    p = _sum_slabs(SLABS, pre_at, pair, stride, S) * rstd[:, None]
    tl.store(PROJ + pre_at, p, mask=pair)
    h_pre = tl.sigmoid(tl.load(ALPHA) * p + tl.load(BIAS + i, mask=i < n, other=0.0)[None, :]) + eps_pre
    tl.store(COEF + pre_at, h_pre, mask=pair)
    p = _sum_slabs(SLABS, post_at, pair, stride, S) * rstd[:, None]
    tl.store(PROJ + post_at, p, mask=pair)
    h_post = post_scale * tl.sigmoid(tl.load(ALPHA + 1) * p + tl.load(BIAS + n + i, mask=i < n, other=0.0)[None, :])
    tl.store(COEF + post_at, h_post, mask=pair)

    a = tl.arange(0, NS)[None, :, None]
    b = tl.arange(0, NS)[None, None, :]
    cell = 2 * n + a * n + b
    real = (a < n) & (b < n)
    square_mask = live[:, None, None] & real
    at = tok[:, None, None] * N + cell
    p = _sum_slabs(SLABS, at, square_mask, stride, S) * rstd[:, None, None]
    tl.store(PROJ + at, p, mask=square_mask)
    logits = tl.load(ALPHA + 2) * p + tl.load(BIAS + cell, mask=real, other=0.0)
    h_res = residual_map(logits, n, NS, METHOD, FIRST, ITERS, eps_start, eps_den)
    out = at
    if TRANSPOSED:
        out = tok[:, None, None] * N + (2 * n + b * n + a)
    tl.store(COEF + out, h_res, mask=square_mask)


def split_phi(phi: torch.Tensor) -> torch.Tensor:
    """Split fp32 ``phi [N, K]`` into two bf16 terms ``[2, PAD(N), K]``.

    The terms carry 16 significant bits between them (TF32 has 11). They are exact operands of bf16 products, and of TF32
    products for fp16 streams, which are exact in TF32 as well.
    """
    num_rows, k = phi.shape
    padded = max(16, next_power_of_2(num_rows))
    terms = torch.empty((2, padded, k), dtype=torch.bfloat16, device=phi.device)
    block = 64 if not is_interpreting() else 1024
    split_phi_kernel[(triton.cdiv(k, block),)](phi, terms, k, N=num_rows, NP=padded, BLOCK=block, num_warps=4)
    return terms


def project(
    x: torch.Tensor, phi: torch.Tensor, *, config: ProjectConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial products of the streams with phi, and partial sums of squares, in one read of the streams.

    Parameters
    ----------
    x : Tensor
        Streams ``[M, n, C]``, contiguous; bf16, fp16 or fp32.
    phi : Tensor
        ``[N, K]`` fp32, contiguous.
    config : ProjectConfig, optional
        Replaces the table's launch shape.

    Returns
    -------
    slabs, squares : Tensor
        ``[S, M, N]`` and ``[S, M]`` fp32; the finish sums them in order.
    """
    num_tokens, num_streams, dim = x.shape
    num_rows, k = phi.shape
    if config is None:
        config = project_config(num_tokens, num_streams, dim, x.element_size(), num_sms(x.device))
    padded = max(16, next_power_of_2(num_rows))
    # a split covers a whole number of k-steps, so the last one may be short but none is empty
    span = triton.cdiv(triton.cdiv(k, config.num_splits), config.block_k) * config.block_k
    num_splits = triton.cdiv(k, span)
    slabs = torch.empty((num_splits, num_tokens, num_rows), dtype=torch.float32, device=x.device)
    squares = torch.empty((num_splits, num_tokens), dtype=torch.float32, device=x.device)
    if num_tokens == 0:
        return slabs, squares
    upcast = is_interpreting() or x.dtype != torch.bfloat16
    two_terms = x.dtype != torch.float32
    split_in_kernel = config.split_in_kernel and x.dtype == torch.bfloat16
    operand = phi
    if two_terms and not split_in_kernel:
        operand = split_phi(phi)
    project_kernel[(triton.cdiv(num_tokens, config.block_tokens), num_splits)](
        x,
        operand,
        slabs,
        squares,
        num_tokens,
        K=k,
        N=num_rows,
        NP=padded,
        SPAN=span,
        BM=config.block_tokens,
        BK=config.block_k,
        V=8 if x.element_size() == 2 else 4,
        TERMS=2 if two_terms else 1,
        SPLIT=split_in_kernel or not two_terms,
        UPCAST=upcast,
        PRECISION="tf32" if x.dtype == torch.float16 else "ieee",
        EVEN=num_splits * span == k,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
    return slabs, squares


def finish(
    slabs: torch.Tensor,
    squares: torch.Tensor,
    alpha: torch.Tensor,
    bias: torch.Tensor,
    options: SiteOptions,
    k: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum the slabs in order and form the coefficients.

    Returns
    -------
    coef : Tensor
        ``[M, N]`` fp32: h_pre, h_post, h_res (row-major, output stream first).
    proj, rstd : Tensor
        ``[M, N]`` and ``[M]`` fp32: the normalised projections and 1/r, which the backward needs.
    """
    num_splits, num_tokens, num_rows = slabs.shape
    num_streams = round((num_rows + 1) ** 0.5) - 1
    coef = torch.empty((num_tokens, num_rows), dtype=torch.float32, device=slabs.device)
    proj = torch.empty_like(coef)
    rstd = torch.empty((num_tokens,), dtype=torch.float32, device=slabs.device)
    if num_tokens == 0:
        return coef, proj, rstd
    block = finish_block(num_streams)
    finish_kernel[(triton.cdiv(num_tokens, block),)](
        slabs,
        squares,
        alpha,
        bias,
        coef,
        proj,
        rstd,
        num_tokens,
        num_splits,
        1.0 / k,
        options.norm_eps,
        options.eps_pre,
        options.post_multiplier,
        options.eps_start,
        options.eps_den,
        n=num_streams,
        NS=next_power_of_2(num_streams),
        METHOD=options.method,
        FIRST=options.first,
        TRANSPOSED=options.transposed,
        ITERS=options.num_iters,
        BT=block,
        num_warps=4 if not is_interpreting() else 1,
    )
    return coef, proj, rstd

# ruff: noqa: RUF005 - Triton concatenates tuples, it does not unpack them
"""Coefficients of a site, forward: projection with mean square in one read of the streams, then the finish.

Tokens M, streams n, channels C, K = nC, N = n(n + 2). The contraction is split over K into slabs that the finish sums
in a fixed order: no atomics, bitwise reproducible. Streams of 16 bits are exact operands of the tensor cores, so only
phi is split, in two terms, in the kernel.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from birkhoff.kernels.triton import tile
from mhc_layers.kernels.options import SiteOptions, padded_rows, streams_of
from mhc_layers.kernels.triton.configs import (
    FinishConfig,
    ProjectConfig,
    capability,
    cdiv,
    finish_config,
    is_interpreting,
    next_power_of_2,
    num_sms,
    overlaps,
    project_config,
)
from mhc_layers.kernels.triton.launch import Launch
from mhc_layers.kernels.triton.overlap import start_after_previous

__all__ = ["finish", "finish_launch", "project", "project_launch"]


@triton.jit(do_not_specialize=["M", "STEPS"])
def project_kernel(
    X,
    PHI,
    SLABS,
    SQUARES,
    M,
    STEPS,
    K: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    V: tl.constexpr,
    TERMS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """slab[s, t, :] = sum over k in split s of x[t, k] phi[:, k];  square[s, t] = sum over the same k of x[t, k]^2."""
    start_after_previous(OVERLAP)
    split = tl.program_id(1)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    row_mask = rows < M
    j = tl.arange(0, NP)
    x_rows = X + rows[:, None].to(tl.int64) * K
    acc = tl.zeros((BM, NP), tl.float32)
    squares = tl.zeros((BM, BK // V), tl.float32)
    last = tl.minimum((split + 1) * STEPS, (K + BK - 1) // BK)
    for step in tl.range(split * STEPS, last, num_stages=STAGES):
        k = step * BK + tl.arange(0, BK)
        if EVEN:
            x = tl.load(x_rows + k[None, :], mask=row_mask[:, None], other=0.0)
        else:
            x = tl.load(x_rows + k[None, :], mask=row_mask[:, None] & (k < K)[None, :], other=0.0)
        x32 = x.to(tl.float32)
        if EVEN:
            w = tl.load(PHI + j[None, :] * K + k[:, None], mask=(j < N)[None, :], other=0.0)
        else:
            w = tl.load(PHI + j[None, :] * K + k[:, None], mask=(j < N)[None, :] & (k < K)[:, None], other=0.0)
        if TERMS == 2:
            # phi = hi + lo: 16 significant bits, each term exact on the tensor cores
            hi = w.to(tl.bfloat16)
            lo = (w - hi.to(tl.float32)).to(tl.bfloat16)
            if UPCAST:
                part = tl.dot(x32, hi.to(tl.float32), input_precision=PRECISION)
                part = tl.dot(x32, lo.to(tl.float32), part, input_precision=PRECISION)
            else:
                part = tl.dot(x, hi)
                part = tl.dot(x, lo, part)
            # these cut off what a sum cannot hold, so each step has a sum of its own; float32 additions round
            acc += part
        else:
            acc = tl.dot(x32, w, acc, input_precision=PRECISION)
        # V neighbouring channels sit in one lane, so the loop has no shuffles
        squares += tl.sum(tl.reshape(x32 * x32, (BM, BK // V, V)), axis=2)
    out = split.to(tl.int64) * M + rows
    tl.store(SLABS + out[:, None] * N + j[None, :], acc, mask=row_mask[:, None] & (j < N)[None, :])
    tl.store(SQUARES + out, tl.sum(squares, axis=1), mask=row_mask)


@triton.jit
def _load_parts(SLABS, SQUARES, s, tok, mask, pre_at, pre_mask, res_at, res_mask, M, n: tl.constexpr):
    """Slab s of a token's sum of squares, and of its columns pre, post and res."""
    tokens = tl.cast(M, tl.int64)
    stride = tokens * (n * (n + 2))
    square = tl.load(SQUARES + s * tokens + tok, mask=mask, other=0.0)
    pre = tl.load(SLABS + s * stride + pre_at, mask=pre_mask, other=0.0)
    post = tl.load(SLABS + s * stride + pre_at + n, mask=pre_mask, other=0.0)
    res = tl.load(SLABS + s * stride + res_at, mask=res_mask, other=0.0)
    return square, pre, post, res


@triton.jit
def _sum_slabs(SLABS, SQUARES, tok, live, pre_at, pre_mask, res_at, res_mask, M, S, n: tl.constexpr):
    """Sums over the slabs in the order s = 0, 1, ..., S - 1; the loads of four slabs do not wait for each other."""
    square, pre, post, res = _load_parts(SLABS, SQUARES, 0, tok, live, pre_at, pre_mask, res_at, res_mask, M, n)
    for start in range(1, S, 4):
        parts = ()
        for d in tl.static_range(4):
            s = start + d
            exists = tl.full(tok.shape, s, tl.int32) < S
            pre_exists = tl.full(pre_at.shape, s, tl.int32) < S
            res_exists = tl.full(res_at.shape, s, tl.int32) < S
            part = _load_parts(
                SLABS,
                SQUARES,
                s,
                tok,
                live & exists,
                pre_at,
                pre_mask & pre_exists,
                res_at,
                res_mask & res_exists,
                M,
                n,
            )
            parts = parts + (part,)
        for d in tl.static_range(4):
            square += parts[d][0]
            pre += parts[d][1]
            post += parts[d][2]
            res += parts[d][3]
    return square, pre, post, res


@triton.jit(do_not_specialize=["M", "S"])
def finish_kernel(
    SLABS,
    SQUARES,
    ALPHA_PRE,
    ALPHA_POST,
    ALPHA_RES,
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
    n: tl.constexpr,
    NS: tl.constexpr,
    METHOD: tl.constexpr,
    COLUMNS_FIRST: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ITERS: tl.constexpr,
    EPS_START: tl.constexpr,
    EPS_DEN: tl.constexpr,
    LANE: tl.constexpr,
    W: tl.constexpr,
    BT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """proj = h / r (Eq. 15), logits = alpha proj + bias (Eq. 16), sigmoids (Eq. 17, 18), Sinkhorn (Eq. 9, 19)."""
    start_after_previous(OVERLAP)
    N: tl.constexpr = n * (n + 2)
    tok = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    live = tok < M
    i = tl.arange(0, NS)
    pair = live[:, None] & (i < n)[None, :]
    at = tok[:, None] * N + i[None, :]
    if LANE:
        k = tl.arange(0, W)[None, :]
        res_mask = live[:, None] & (k < n * n)
        res_at = tok[:, None] * N + 2 * n + k
    else:
        a = tl.arange(0, NS)[None, :, None]
        b = tl.arange(0, NS)[None, None, :]
        real = (a < n) & (b < n)
        res_mask = live[:, None, None] & real
        cell = 2 * n + a * n + b
        res_at = tok[:, None, None] * N + cell
    square, pre, post, res = _sum_slabs(SLABS, SQUARES, tok, live, at, pair, res_at, res_mask, M, S, n)
    rstd = tl.rsqrt(square * inv_k + norm_eps)
    tl.store(RSTD + tok, rstd, mask=live)

    pre *= rstd[:, None]
    tl.store(PROJ + at, pre, mask=pair)
    logits = tl.load(ALPHA_PRE) * pre + tl.load(BIAS + i, mask=i < n, other=0.0)[None, :]
    tl.store(COEF + at, tl.sigmoid(logits) + eps_pre, mask=pair)
    post *= rstd[:, None]
    tl.store(PROJ + at + n, post, mask=pair)
    logits = tl.load(ALPHA_POST) * post + tl.load(BIAS + n + i, mask=i < n, other=0.0)[None, :]
    tl.store(COEF + at + n, post_scale * tl.sigmoid(logits), mask=pair)

    alpha = tl.load(ALPHA_RES)
    if LANE:
        res *= rstd[:, None]
        tl.store(PROJ + res_at, res, mask=res_mask)
        logits = alpha * res + tl.load(BIAS + 2 * n + k, mask=k < n * n, other=0.0)
        cells = tile.unpack(logits, BT, W)
        h_res = tile.sinkhorn(cells, ITERS, n, METHOD, COLUMNS_FIRST, True, EPS_START, EPS_DEN)
        if TRANSPOSED:
            res_at = tok[:, None] * N + 2 * n + (k % n) * n + k // n
        tl.store(COEF + res_at, tile.pack(h_res, BT, W, n * n), mask=res_mask)
    else:
        res *= rstd[:, None, None]
        tl.store(PROJ + res_at, res, mask=res_mask)
        logits = alpha * res + tl.load(BIAS + cell, mask=real, other=0.0)
        h_res = tile.sinkhorn(logits, ITERS, n, METHOD, COLUMNS_FIRST, False, EPS_START, EPS_DEN)
        if TRANSPOSED:
            res_at = tok[:, None, None] * N + (2 * n + b * n + a)
        tl.store(COEF + res_at, h_res, mask=res_mask)


def project(
    x: torch.Tensor, phi: torch.Tensor, *, config: ProjectConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial products of the streams with phi, and partial sums of squares, in one read of the streams.

    Parameters
    ----------
    x : Tensor
        Streams ``(..., n, C)``, contiguous; bf16, fp16 or fp32. M tokens.
    phi : Tensor
        ``[N, K]`` fp32, contiguous.
    config : ProjectConfig, optional
        Replaces the table's launch shape.

    Returns
    -------
    slabs, squares : Tensor
        ``[S, M, N]`` and ``[S, M]`` fp32; the finish sums them in order.
    """
    num_rows, k = phi.shape
    num_tokens, device = x.numel() // k, x.device
    start, num_splits = project_launch(num_tokens, num_rows, *x.shape[-2:], x.dtype, device, config)
    slabs = torch.empty((num_splits, num_tokens, num_rows), dtype=torch.float32, device=device)
    squares = torch.empty((num_splits, num_tokens), dtype=torch.float32, device=device)
    if num_tokens:
        start(x, phi, slabs, squares)
    return slabs, squares


@functools.lru_cache(maxsize=1024)
def project_launch(
    num_tokens: int,
    num_rows: int,
    num_streams: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
    config: ProjectConfig | None,
) -> tuple[Launch, int]:
    """The launch of the projection, and the number of slabs it writes."""
    k = num_streams * dim
    if config is None:
        n = streams_of(num_rows)  # one stream may stand for n equal ones
        config = project_config(num_tokens, n, max(1, k // n), dtype.itemsize, num_sms(device), capability(device))
    # a split covers a whole number of steps, so the last one may be short but none is empty
    all_steps = cdiv(k, config.block_k)
    steps = cdiv(all_steps, config.num_splits)
    num_splits = cdiv(all_steps, steps)
    constants = {
        "K": k,
        "N": num_rows,
        "NP": padded_rows(num_rows),
        "BM": config.block_tokens,
        "BK": config.block_k,
        "V": 8 if dtype.itemsize == 2 else 4,
        "TERMS": 1 if dtype == torch.float32 else 2,
        "UPCAST": is_interpreting() or dtype != torch.bfloat16,
        "PRECISION": "tf32" if dtype == torch.float16 else "ieee",
        "EVEN": k % config.block_k == 0,
        "STAGES": config.num_stages,
        "OVERLAP": overlaps(device),
    }
    grid = (cdiv(num_tokens, config.block_tokens), num_splits)
    return Launch(project_kernel, grid, (num_tokens, steps), constants, config.num_warps), num_splits


def finish(
    slabs: torch.Tensor,
    squares: torch.Tensor,
    alphas: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    bias: torch.Tensor,
    options: SiteOptions,
    k: int,
    lead: tuple[int, ...],
    *,
    config: FinishConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum the slabs in order and form the coefficients.

    Parameters
    ----------
    slabs, squares : Tensor
        From :func:`project` or a boundary kernel: ``[S, M, N]`` and ``[S, M]``.
    alphas : tuple of Tensor
        The gates of pre, post and res, 0-d fp32.
    bias : Tensor
        ``[N]`` fp32.
    options : SiteOptions
        The convention.
    k : int
        nC.
    lead : tuple of int
        Leading shape of the tokens; its product is M.
    config : FinishConfig, optional
        Replaces the table's launch shape.

    Returns
    -------
    coef : Tensor
        ``(*lead, N)`` fp32: h_pre, h_post, h_res (row-major, output stream first).
    proj, rstd : Tensor
        ``(*lead, N)`` and ``lead`` fp32: the normalised projections and 1/r, which the backward needs.
    """
    num_splits, num_tokens, num_rows = slabs.shape
    coef = torch.empty((*lead, num_rows), dtype=torch.float32, device=slabs.device)
    proj = torch.empty_like(coef)
    rstd = torch.empty(lead, dtype=torch.float32, device=slabs.device)
    if num_tokens:
        start = finish_launch(num_splits, num_tokens, num_rows, k, options, slabs.device, config)
        start(slabs, squares, *alphas, bias, coef, proj, rstd)
    return coef, proj, rstd


@functools.lru_cache(maxsize=1024)
def finish_launch(
    num_splits: int,
    num_tokens: int,
    num_rows: int,
    k: int,
    options: SiteOptions,
    device: torch.device,
    config: FinishConfig | None,
) -> Launch:
    """The launch of the finish, for one device."""
    num_streams = streams_of(num_rows)
    if config is None:
        config = finish_config(num_tokens, num_streams, num_sms(device))
    constants = {
        "n": num_streams,
        "NS": next_power_of_2(num_streams),
        "METHOD": int(options.method == "damped"),
        "COLUMNS_FIRST": options.first == "columns",
        "TRANSPOSED": options.transposed,
        "ITERS": options.num_iters,
        "EPS_START": options.eps_start,
        "EPS_DEN": options.eps_den,
        "LANE": config.lane,
        "W": next_power_of_2(num_streams * num_streams),
        "BT": config.block_tokens,
        "OVERLAP": overlaps(device),
    }
    scalars = (num_tokens, num_splits, 1.0 / k, options.norm_eps, options.eps_pre, options.post_multiplier)
    return Launch(finish_kernel, (cdiv(num_tokens, config.block_tokens),), scalars, constants, config.num_warps)

# ruff: noqa: RUF005 - Triton concatenates tuples, it does not unpack them
"""Streams and sublayer inputs of a block of sites, rebuilt in one pass from the streams that entered it.

The streams of a tile stay in registers from site to site: a site costs one read of f and one write each of u and x,
(n + 2) C values a token, where running the sites again costs (3n + 2) C.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mhc_layers.kernels.triton.configs import RowConfig, cdiv, row_config

__all__ = ["recompute_block"]


@triton.jit(do_not_specialize=["M"])
def recompute_block_kernel(
    X,
    FS,
    COEFS,
    READS,
    XS,
    US,
    M,
    C: tl.constexpr,
    n: tl.constexpr,
    SITES: tl.constexpr,
    READ_STRIDES: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """u_l = sum_i read_l[i] x_l[i];  x_{l+1}[o] = sum_i h_res_l[o, i] x_l[i] + h_post_l[o] f_l, rounded as stored."""
    N: tl.constexpr = n * (n + 2)
    tiles: tl.constexpr = (C + BC - 1) // BC
    pid = tl.program_id(0)
    tok = (pid // tiles) * BT + tl.arange(0, BT)
    c = (pid % tiles) * BC + tl.arange(0, BC)
    live = tok < M
    mask = live[:, None] & (c < C)[None, :]
    tok64 = tok.to(tl.int64)
    at = tok64[:, None] * (n * C) + c[None, :]
    row = tok64[:, None] * C + c[None, :]
    x = ()
    for i in tl.static_range(n):
        x = x + (tl.load(X + at + i * C, mask=mask, other=0.0).to(tl.float32),)
    for site in tl.static_range(SITES):
        u = tl.zeros((BT, BC), tl.float32)
        for i in tl.static_range(n):
            h = tl.load(READS[site] + tok64 * READ_STRIDES[site] + i, mask=live, other=0.0)
            u = tl.fma(h[:, None], x[i], u)
        tl.store(US[site] + row, u.to(X.dtype.element_ty), mask=mask)
        if site + 1 < SITES:
            coef = COEFS[site] + tok64 * N
            f = tl.load(FS[site] + row, mask=mask, other=0.0).to(tl.float32)
            new = ()
            for o in tl.static_range(n):
                y = tl.load(coef + n + o, mask=live, other=0.0)[:, None] * f
                for i in tl.static_range(n):
                    y = tl.fma(tl.load(coef + 2 * n + o * n + i, mask=live, other=0.0)[:, None], x[i], y)
                stored = y.to(X.dtype.element_ty)
                tl.store(XS[site] + at + o * C, stored, mask=mask)
                new = new + (stored.to(tl.float32),)
            x = new


def recompute_block(
    x: torch.Tensor,
    fs: list[torch.Tensor],
    coefs: list[torch.Tensor],
    reads: list[torch.Tensor],
    *,
    config: RowConfig | None = None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Rebuild what passed through a block of consecutive sites.

    Parameters
    ----------
    x : Tensor
        Streams that entered the first site, ``(..., n, C)``.
    fs : list of Tensor
        Sublayer outputs ``(..., C)`` of all sites but the last.
    coefs : list of Tensor
        ``(..., N)`` fp32 of all sites but the last.
    reads : list of Tensor
        Coefficients that each site was read with, ``(..., >= n)``, of all sites.
    config : RowConfig, optional
        Replaces the table's launch shape.

    Returns
    -------
    xs : list of Tensor
        Streams that entered the second site, the third, and so on.
    us : list of Tensor
        Inputs of all sublayers ``(..., C)``.
    """
    *lead, num_streams, dim = x.shape
    num_tokens = x.numel() // (num_streams * dim)
    xs = [torch.empty_like(x) for _ in fs]
    us = [torch.empty((*lead, dim), dtype=x.dtype, device=x.device) for _ in reads]
    if num_tokens == 0:
        return xs, us
    if config is None:
        config = row_config(num_streams, dim, x.element_size(), reducing=False)
    grid = (cdiv(num_tokens, config.block_tokens) * cdiv(dim, config.block_channels),)
    none = (x,)  # a kernel argument must not be an empty tuple
    recompute_block_kernel[grid](
        x,
        tuple(fs) or none,
        tuple(coefs) or none,
        tuple(reads),
        tuple(xs) or none,
        tuple(us),
        num_tokens,
        C=dim,
        n=num_streams,
        SITES=len(reads),
        READ_STRIDES=tuple(read.stride(-2) for read in reads),
        BT=config.block_tokens,
        BC=config.block_channels,
        num_warps=config.num_warps,
    )
    return xs, us

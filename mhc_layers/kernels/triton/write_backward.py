# ruff: noqa: RUF005 - Triton concatenates tuples, it does not unpack them
"""Phase A of the backward, before the sublayer's own: df, and the gradients of h_post and h_res.

Reads g = dL/dx', x and f once. A program owns whole tokens, so the dot products over channels end in its registers: no
slabs, no atomics. The gradient that x receives, H_res^T g, is not written here; phase B2 reads g again and writes dx
once.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from mhc_layers.kernels.options import SiteOptions
from mhc_layers.kernels.triton.configs import RowConfig, cdiv, lane_values, overlaps, row_config
from mhc_layers.kernels.triton.launch import Launch
from mhc_layers.kernels.triton.overlap import start_after_previous

__all__ = ["write_backward"]


@triton.jit(do_not_specialize=["M"])
def write_backward_kernel(
    G,
    X,
    F,
    PROJ,
    ALPHA_POST,
    BIAS,
    DF,
    DCOEF,
    M,
    post_scale,
    C: tl.constexpr,
    n: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    V: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """df = sum_o h_post[o] g[o];  dh_post[o] = <g[o], f>;  dh_res[o, i] = <g[o], x[i]>."""
    start_after_previous(OVERLAP)
    N: tl.constexpr = n * (n + 2)
    tok = tl.program_id(0) * BT + tl.arange(0, BT)
    live = tok < M
    tok64 = tok.to(tl.int64)
    # h_post again from the kept projection (Eq. 18): cheaper than keeping the coefficients
    alpha = tl.load(ALPHA_POST)
    h = ()
    for o in tl.static_range(n):
        logit = alpha * tl.load(PROJ + tok64 * N + n + o, mask=live, other=0.0) + tl.load(BIAS + n + o)
        h = h + (post_scale * tl.sigmoid(logit),)
    acc = ()
    for _ in tl.static_range(n * (n + 1)):
        acc = acc + (tl.zeros((BT, BC // V), tl.float32),)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        if C % BC == 0:
            mask = live[:, None]
        else:
            mask = live[:, None] & (c < C)[None, :]
        at = tok64[:, None] * (n * C) + c[None, :]
        row = tok64[:, None] * C + c[None, :]
        f = tl.load(F + row, mask=mask, other=0.0).to(tl.float32)
        x = ()
        for i in tl.static_range(n):
            x = x + (tl.load(X + at + i * C, mask=mask, other=0.0).to(tl.float32),)
        df = tl.zeros((BT, BC), tl.float32)
        new = ()
        for o in tl.static_range(n):
            g = tl.load(G + at + o * C, mask=mask, other=0.0).to(tl.float32)
            df += h[o][:, None] * g
            # V neighbouring channels sit in one lane: the loop has no shuffles
            new = new + (acc[o * (n + 1)] + tl.sum(tl.reshape(g * f, (BT, BC // V, V)), axis=2),)
            for i in tl.static_range(n):
                new = new + (acc[o * (n + 1) + 1 + i] + tl.sum(tl.reshape(g * x[i], (BT, BC // V, V)), axis=2),)
        acc = new
        tl.store(DF + row, df.to(DF.dtype.element_ty), mask=mask)
    for o in tl.static_range(n):
        tl.store(DCOEF + tok64 * N + o, tl.zeros((BT,), tl.float32), mask=live)
        tl.store(DCOEF + tok64 * N + n + o, tl.sum(acc[o * (n + 1)], axis=1), mask=live)
        for i in tl.static_range(n):
            dot = tl.sum(acc[o * (n + 1) + 1 + i], axis=1)
            tl.store(DCOEF + tok64 * N + 2 * n + o * n + i, dot, mask=live)


def write_backward(
    g: torch.Tensor,
    x: torch.Tensor,
    f: torch.Tensor,
    proj: torch.Tensor,
    alpha_post: torch.Tensor,
    bias: torch.Tensor,
    options: SiteOptions,
    *,
    config: RowConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``df (..., C)`` and ``dcoef (..., N)`` fp32 (its h_pre columns are 0) of ``g (..., n, C)``."""
    num_streams, dim = x.shape[-2:]
    num_tokens = x.numel() // (num_streams * dim)
    df = torch.empty_like(f)
    dcoef = torch.empty_like(proj)
    if num_tokens:
        start = _launch(num_tokens, num_streams, dim, options.post_multiplier, x.dtype, x.device, config)
        start(g, x, f, proj, alpha_post, bias, df, dcoef)
    return df, dcoef


@functools.lru_cache(maxsize=1024)
def _launch(
    num_tokens: int,
    num_streams: int,
    dim: int,
    post_multiplier: float,
    dtype: torch.dtype,
    device: torch.device,
    config: RowConfig | None,
) -> Launch:
    if config is None:
        config = row_config(num_streams, dim, dtype.itemsize, reducing=True)
    constants = {
        "C": dim,
        "n": num_streams,
        "BT": config.block_tokens,
        "BC": config.block_channels,
        "V": lane_values(config),
        "OVERLAP": overlaps(device),
    }
    grid = (cdiv(num_tokens, config.block_tokens),)
    return Launch(write_backward_kernel, grid, (num_tokens, post_multiplier), constants, config.num_warps)

# ruff: noqa: RUF005 - Triton concatenates tuples, it does not unpack them
"""Phase B1 of the backward: the gradient of h_pre from du."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from mhc_layers.kernels.triton.configs import RowConfig, cdiv, lane_values, overlaps, row_config
from mhc_layers.kernels.triton.launch import Launch
from mhc_layers.kernels.triton.overlap import start_after_previous

__all__ = ["read_backward", "read_backward_launch"]


@triton.jit(do_not_specialize=["M"])
def read_backward_kernel(
    GU,
    X,
    DOTS,
    M,
    C: tl.constexpr,
    n: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    V: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """dots[t, i] = <du[t], x[t, i]>: a program owns whole tokens and reduces in its registers."""
    start_after_previous(OVERLAP)
    tok = tl.program_id(0) * BT + tl.arange(0, BT)
    live = tok < M
    tok64 = tok.to(tl.int64)
    acc = ()
    for _ in tl.static_range(n):
        acc = acc + (tl.zeros((BT, BC // V), tl.float32),)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        if C % BC == 0:
            mask = live[:, None]
        else:
            mask = live[:, None] & (c < C)[None, :]
        u = tl.load(GU + tok64[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        at = tok64[:, None] * (n * C) + c[None, :]
        new = ()
        for i in tl.static_range(n):
            x = tl.load(X + at + i * C, mask=mask, other=0.0).to(tl.float32)
            new = new + (acc[i] + tl.sum(tl.reshape(u * x, (BT, BC // V, V)), axis=2),)
        acc = new
    for i in tl.static_range(n):
        tl.store(DOTS + tok64 * n + i, tl.sum(acc[i], axis=1), mask=live)


def read_backward(gu: torch.Tensor, x: torch.Tensor, *, config: RowConfig | None = None) -> torch.Tensor:
    """Return ``dots (..., n)`` fp32 of ``gu (..., C)`` with the streams ``x (..., n, C)``, contiguous."""
    *lead, num_streams, dim = x.shape
    num_tokens = x.numel() // (num_streams * dim)
    dots = torch.empty((*lead, num_streams), dtype=torch.float32, device=x.device)
    if num_tokens:
        read_backward_launch(num_tokens, num_streams, dim, x.dtype, x.device, config)(gu, x, dots)
    return dots


@functools.lru_cache(maxsize=1024)
def read_backward_launch(
    num_tokens: int, num_streams: int, dim: int, dtype: torch.dtype, device: torch.device, config: RowConfig | None
) -> Launch:
    """The launch of B1, for one device."""
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
    return Launch(read_backward_kernel, grid, (num_tokens,), constants, config.num_warps)

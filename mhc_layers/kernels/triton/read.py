"""Read of a site: the sublayer's input u = sum_i h_pre[i] x[i]."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from mhc_layers.kernels.triton.configs import RowConfig, cdiv, overlaps, row_config
from mhc_layers.kernels.triton.launch import Launch
from mhc_layers.kernels.triton.overlap import start_after_previous

__all__ = ["read_forward", "read_launch"]


@triton.jit(do_not_specialize=["M"])
def read_forward_kernel(
    X,
    COEF,
    U,
    M,
    COEF_STRIDE: tl.constexpr,
    C: tl.constexpr,
    n: tl.constexpr,
    STORED: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """u[t, c] = sum_i h_pre[t, i] x[t, i, c], summed in the order of the streams, rounded once."""
    start_after_previous(OVERLAP)
    tiles: tl.constexpr = (C + BC - 1) // BC
    # from the last token on: a boundary kernel before this one has left those streams in the cache
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    tok = (pid // tiles) * BT + tl.arange(0, BT)
    c = (pid % tiles) * BC + tl.arange(0, BC)
    live = tok < M
    mask = live[:, None] & (c < C)[None, :]
    tok64 = tok.to(tl.int64)
    x_at = X + tok64[:, None] * (STORED * C) + c[None, :]
    u = tl.zeros((BT, BC), tl.float32)
    for i in tl.static_range(n):
        h = tl.load(COEF + tok64 * COEF_STRIDE + i, mask=live, other=0.0)
        u = tl.fma(h[:, None], tl.load(x_at + (i % STORED) * C, mask=mask, other=0.0).to(tl.float32), u)
    tl.store(U + tok64[:, None] * C + c[None, :], u.to(U.dtype.element_ty), mask=mask)


def read_forward(
    x: torch.Tensor, coef: torch.Tensor, *, copies: int = 1, config: RowConfig | None = None
) -> torch.Tensor:
    """Return ``u (..., C)`` of streams ``x (..., n, C)``; ``coef (..., >= n)`` fp32 starts with h_pre.

    The rows of ``coef`` may be strided, with one stride for all tokens (0 for coefficients shared by all). With
    ``copies`` the only stream of ``x (..., 1, C)`` stands for that many equal ones and is read once.
    """
    *lead, num_streams, dim = x.shape
    num_tokens = x.numel() // (num_streams * dim)
    u = torch.empty((*lead, dim), dtype=x.dtype, device=x.device)
    if num_tokens:
        read_launch(num_tokens, num_streams, dim, coef.stride(-2), x.dtype, x.device, config, copies)(x, coef, u)
    return u


@functools.lru_cache(maxsize=1024)
def read_launch(
    num_tokens: int,
    num_streams: int,
    dim: int,
    coef_stride: int,
    dtype: torch.dtype,
    device: torch.device,
    config: RowConfig | None,
    copies: int = 1,
) -> Launch:
    """The launch of the read, for one device."""
    if config is None:
        config = row_config(num_streams * copies, dim, dtype.itemsize, reducing=False)
    grid = (cdiv(num_tokens, config.block_tokens) * cdiv(dim, config.block_channels),)
    constants = {
        "COEF_STRIDE": coef_stride,
        "C": dim,
        "n": num_streams * copies,
        "STORED": num_streams,
        "BT": config.block_tokens,
        "BC": config.block_channels,
        "OVERLAP": overlaps(device),
    }
    return Launch(read_forward_kernel, grid, (num_tokens,), constants, config.num_warps)

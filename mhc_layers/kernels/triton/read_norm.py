# ruff: noqa: RUF005 - Triton concatenates tuples, it does not unpack them
"""Read of a site together with the sublayer's root-mean-square norm, in one pass over the streams.

A program owns whole tokens and keeps their row u in registers: the squares are summed while it is formed, and it is
scaled and stored once. The norm takes u as the read alone would have stored it, rounded to the dtype of the streams,
so the result has the same bits as the two steps one after the other (:func:`norm_rows` is the second one).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from mhc_layers.kernels.triton.configs import cdiv, is_interpreting, next_power_of_2, overlaps
from mhc_layers.kernels.triton.launch import Launch
from mhc_layers.kernels.triton.overlap import start_after_previous

__all__ = ["NormConfig", "norm_config", "norm_rows", "read_norm_forward"]


@dataclass(frozen=True)
class NormConfig:
    """Tile of a kernel that holds rows: tokens, channels of a tile, tiles of a row, warps."""

    block_tokens: int
    block_channels: int
    num_tiles: int
    num_warps: int


@functools.lru_cache(maxsize=4096)
def norm_config(dim: int, item_size: int, most_tiles: int) -> NormConfig:
    """Warps side by side along a row until a lane holds at most ``most_tiles`` 16-byte loads of it.

    The shape depends on C and the dtype only, so a token's bits depend on nothing but the token.
    """
    lanes = 16 // item_size * 32
    if is_interpreting():
        lanes, most_tiles = 64, 1 << 20
    warps = 1
    while cdiv(dim, lanes * warps) > most_tiles:
        warps *= 2
    block_channels = min(lanes * warps, max(32, next_power_of_2(dim)))
    return NormConfig(max(1, 4 // warps), block_channels, cdiv(dim, block_channels), max(4, warps))


@triton.jit(do_not_specialize=["M"])
def read_norm_forward_kernel(
    X,
    COEF,
    WEIGHT,
    OUT,
    INVERSE,
    M,
    inv_c,
    eps,
    COEF_STRIDE: tl.constexpr,
    C: tl.constexpr,
    n: tl.constexpr,
    STORED: tl.constexpr,
    UNIT: tl.constexpr,
    TILES: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """u = sum_i h_pre[i] x[i] rounded as stored;  s = 1 / sqrt(mean(u^2) + eps);  out = u s weight, rounded once."""
    start_after_previous(OVERLAP)
    tok = tl.program_id(0) * BT + tl.arange(0, BT)
    live = tok < M
    tok64 = tok.to(tl.int64)
    x_rows = X + tok64[:, None] * (STORED * C)
    h = ()
    if not UNIT:
        for i in tl.static_range(n):
            h = h + (tl.load(COEF + tok64 * COEF_STRIDE + i, mask=live, other=0.0)[:, None],)
    row = ()
    squares = tl.zeros((BT, BC), tl.float32)
    for k in tl.static_range(TILES):
        c = k * BC + tl.arange(0, BC)
        if C % BC == 0:
            mask = live[:, None]
        else:
            mask = live[:, None] & (c < C)[None, :]
        if UNIT:
            u = tl.load(x_rows + c[None, :], mask=mask, other=0.0)
        else:
            total = tl.zeros((BT, BC), tl.float32)
            for i in tl.static_range(n):
                x = tl.load(x_rows + ((i % STORED) * C + c)[None, :], mask=mask, other=0.0)
                total = tl.fma(h[i], x.to(tl.float32), total)
            u = total.to(X.dtype.element_ty)
        wide = u.to(tl.float32)
        squares += wide * wide
        row = row + (u,)
    inverse = tl.rsqrt(tl.sum(squares, axis=1) * inv_c + eps)
    tl.store(INVERSE + tok64, inverse, mask=live)
    for k in tl.static_range(TILES):
        c = k * BC + tl.arange(0, BC)
        weight = tl.load(WEIGHT + c, mask=c < C, other=0.0, eviction_policy="evict_last")
        out = row[k].to(tl.float32) * inverse[:, None] * weight[None, :]
        mask = live[:, None] & (c < C)[None, :]
        tl.store(OUT + tok64[:, None] * C + c[None, :], out.to(OUT.dtype.element_ty), mask=mask)


def read_norm_forward(
    x: torch.Tensor,
    coef: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    *,
    copies: int = 1,
    config: NormConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the streams and normalise the result.

    Parameters
    ----------
    x : Tensor
        Streams ``(..., n, C)``, contiguous.
    coef : Tensor or None
        ``(..., >= n)`` fp32, starts with h_pre; one stride for all tokens, which may be 0. None stands for one stream
        that is read as it is.
    weight : Tensor
        The norm's gain ``[C]`` fp32.
    eps : float
        Added to the mean square, inside the root.
    copies : int
        How many equal streams the only one of ``x (..., 1, C)`` stands for.
    config : NormConfig, optional
        Replaces the table's launch shape.

    Returns
    -------
    out : Tensor
        ``(..., C)`` in the dtype of the streams.
    inverse : Tensor
        ``(...)`` fp32: one over the root mean square of u, which the backward needs.
    """
    *lead, num_streams, dim = x.shape
    num_tokens = x.numel() // (num_streams * dim)
    out = torch.empty((*lead, dim), dtype=x.dtype, device=x.device)
    inverse = torch.empty(lead, dtype=torch.float32, device=x.device)
    if num_tokens:
        stride = None if coef is None else coef.stride(-2)
        start = _launch(num_tokens, num_streams, dim, stride, eps, x.dtype, x.device, config, copies)
        start(x, weight if coef is None else coef, weight, out, inverse)
    return out, inverse


@functools.lru_cache(maxsize=1024)
def _launch(
    num_tokens: int,
    num_streams: int,
    dim: int,
    coef_stride: int | None,
    eps: float,
    dtype: torch.dtype,
    device: torch.device,
    config: NormConfig | None,
    copies: int,
) -> Launch:
    if config is None:
        config = norm_config(dim, dtype.itemsize, 8)
    constants = {
        "COEF_STRIDE": coef_stride or 0,
        "C": dim,
        "n": num_streams * copies,
        "STORED": num_streams,
        "UNIT": coef_stride is None,
        "TILES": config.num_tiles,
        "BT": config.block_tokens,
        "BC": config.block_channels,
        "OVERLAP": overlaps(device),
    }
    grid = (cdiv(num_tokens, config.block_tokens),)
    return Launch(read_norm_forward_kernel, grid, (num_tokens, 1.0 / dim, eps), constants, config.num_warps)


def norm_rows(u: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise rows ``u (..., C)`` that are already read: the same bits as :func:`read_norm_forward`."""
    return read_norm_forward(u.unsqueeze(-2), None, weight, eps)

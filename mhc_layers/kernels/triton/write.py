# ruff: noqa: RUF005 - Triton concatenates tuples, it does not unpack them
"""Write of a site: the next streams x'[o] = sum_i h_res[o, i] x[i] + h_post[o] f."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from mhc_layers.kernels.triton.configs import RowConfig, cdiv, overlaps, row_config
from mhc_layers.kernels.triton.launch import Launch
from mhc_layers.kernels.triton.overlap import start_after_previous

__all__ = ["write_forward"]


@triton.jit(do_not_specialize=["M"])
def write_forward_kernel(
    X, F, COEF, OUT, M, C: tl.constexpr, n: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, OVERLAP: tl.constexpr
):
    """Eq. 3 after the sublayer in fp32, one rounding at the end.

    The fused multiply-adds are written out: left to the compiler, another kernel of the same sum contracts another of
    its products. So the boundary kernels, the rebuild and the first site give these bits.
    """
    start_after_previous(OVERLAP)
    N: tl.constexpr = n * (n + 2)
    tiles: tl.constexpr = (C + BC - 1) // BC
    pid = tl.program_id(0)
    tok = (pid // tiles) * BT + tl.arange(0, BT)
    c = (pid % tiles) * BC + tl.arange(0, BC)
    live = tok < M
    mask = live[:, None] & (c < C)[None, :]
    tok64 = tok.to(tl.int64)
    at = tok64[:, None] * (n * C) + c[None, :]
    coef = COEF + tok64 * N
    f = tl.load(F + tok64[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
    x = ()
    for i in tl.static_range(n):
        x = x + (tl.load(X + at + i * C, mask=mask, other=0.0).to(tl.float32),)
    for o in tl.static_range(n):
        y = tl.load(coef + n + o, mask=live, other=0.0)[:, None] * f
        for i in tl.static_range(n):
            y = tl.fma(tl.load(coef + 2 * n + o * n + i, mask=live, other=0.0)[:, None], x[i], y)
        tl.store(OUT + at + o * C, y.to(OUT.dtype.element_ty), mask=mask)


def write_forward(
    x: torch.Tensor, f: torch.Tensor, coef: torch.Tensor, *, config: RowConfig | None = None
) -> torch.Tensor:
    """Return the next streams ``(..., n, C)`` of ``x (..., n, C)``, ``f (..., C)`` and ``coef (..., N)`` fp32."""
    num_streams, dim = x.shape[-2:]
    num_tokens = x.numel() // (num_streams * dim)
    out = torch.empty_like(x)
    if num_tokens:
        _launch(num_tokens, num_streams, dim, x.dtype, x.device, config)(x, f, coef, out)
    return out


@functools.lru_cache(maxsize=1024)
def _launch(
    num_tokens: int, num_streams: int, dim: int, dtype: torch.dtype, device: torch.device, config: RowConfig | None
) -> Launch:
    if config is None:
        config = row_config(num_streams, dim, dtype.itemsize, reducing=False)
    grid = (cdiv(num_tokens, config.block_tokens) * cdiv(dim, config.block_channels),)
    constants = {
        "C": dim,
        "n": num_streams,
        "BT": config.block_tokens,
        "BC": config.block_channels,
        "OVERLAP": overlaps(device),
    }
    return Launch(write_forward_kernel, grid, (num_tokens,), constants, config.num_warps)

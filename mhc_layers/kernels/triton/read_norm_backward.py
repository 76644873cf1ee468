# ruff: noqa: RUF005 - Triton concatenates tuples, it does not unpack them
"""Phase B1 where the read is fused with a root-mean-square norm: through the norm to du, and the gradient of h_pre.

One read of the streams and of the gradient. With a = weight dv, s = 1 / rms and k = s^2 <a, u> / C,

    du = s (a - k u),   <du, x_i> = s (<a, x_i> - k <u, x_i>),   <a, u> = sum_i h_i <a, x_i>,

so the dot products of B1 need no second pass, and du is formed from rows that are still in registers. A program walks
over a span of tokens and keeps its share of dweight = sum_t dv u s: slabs, summed in a fixed order, no atomics.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from mhc_layers.kernels.options import SiteOptions
from mhc_layers.kernels.triton.configs import capability, cdiv, is_interpreting, num_sms, overlaps
from mhc_layers.kernels.triton.launch import Launch
from mhc_layers.kernels.triton.overlap import start_after_previous
from mhc_layers.kernels.triton.read_norm import NormConfig, norm_config

__all__ = ["read_norm_backward"]


@triton.jit(do_not_specialize=["M", "SPAN"])
def read_norm_backward_kernel(
    GV,
    X,
    WEIGHT,
    INVERSE,
    READ,
    PROJ,
    ALPHA_PRE,
    BIAS,
    GU,
    DOTS,
    SLABS,
    M,
    SPAN,
    inv_c,
    eps_pre,
    C: tl.constexpr,
    n: tl.constexpr,
    STORED: tl.constexpr,
    HAS_READ: tl.constexpr,
    READ_STRIDE: tl.constexpr,
    TILES: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    V: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """du, its dot products with the streams, and a slab of the gain's gradient, for a span of tokens."""
    start_after_previous(OVERLAP)
    N: tl.constexpr = n * (n + 2)
    begin = tl.program_id(0) * SPAN
    end = tl.minimum(M, begin + SPAN)
    dweight = ()
    for _ in tl.static_range(TILES):
        dweight = dweight + (tl.zeros((BT, BC), tl.float32),)
    for t in tl.range(begin, end, BT, num_stages=STAGES):
        tok = t + tl.arange(0, BT)
        live = tok < end
        tok64 = tok.to(tl.int64)
        inverse = tl.load(INVERSE + tok64, mask=live, other=0.0)
        h = ()
        for i in tl.static_range(n):
            if HAS_READ:
                h = h + (tl.load(READ + tok64 * READ_STRIDE + i, mask=live, other=0.0),)
            else:
                # h_pre again from the kept projection (Eq. 17): cheaper than keeping the coefficients
                logit = tl.load(ALPHA_PRE) * tl.load(PROJ + tok64 * N + i, mask=live, other=0.0) + tl.load(BIAS + i)
                h = h + (tl.sigmoid(logit) + eps_pre,)
        to_a = ()
        to_u = ()
        for _ in tl.static_range(n):
            to_a = to_a + (tl.zeros((BT, BC // V), tl.float32),)
            to_u = to_u + (tl.zeros((BT, BC // V), tl.float32),)
        rows_gv = ()
        rows_u = ()
        sums = ()
        for k in tl.static_range(TILES):
            c = k * BC + tl.arange(0, BC)
            if C % BC == 0:
                mask = live[:, None]
            else:
                mask = live[:, None] & (c < C)[None, :]
            narrow = tl.load(GV + tok64[:, None] * C + c[None, :], mask=mask, other=0.0)
            gv = narrow.to(tl.float32)
            x = ()
            total = tl.zeros((BT, BC), tl.float32)
            for i in tl.static_range(n):
                at = tok64[:, None] * (STORED * C) + ((i % STORED) * C + c)[None, :]
                x = x + (tl.load(X + at, mask=mask, other=0.0).to(tl.float32),)
                total += h[i][:, None] * x[i]
            stored = total.to(X.dtype.element_ty)
            u = stored.to(tl.float32)
            a = gv * tl.load(WEIGHT + c, mask=c < C, other=0.0)[None, :]
            sums = sums + (dweight[k] + gv * u * inverse[:, None],)
            rows_gv = rows_gv + (narrow,)
            rows_u = rows_u + (stored,)
            # V neighbouring channels sit in one lane: the loop has no shuffles
            new_a = ()
            new_u = ()
            for i in tl.static_range(n):
                new_a = new_a + (to_a[i] + tl.sum(tl.reshape(a * x[i], (BT, BC // V, V)), axis=2),)
                new_u = new_u + (to_u[i] + tl.sum(tl.reshape(u * x[i], (BT, BC // V, V)), axis=2),)
            to_a = new_a
            to_u = new_u
        dweight = sums
        dot_a = ()
        along = tl.zeros((BT,), tl.float32)
        for i in tl.static_range(n):
            dot_a = dot_a + (tl.sum(to_a[i], axis=1),)
            along += h[i] * dot_a[i]
        along = along * inverse * inverse * inv_c
        for i in tl.static_range(n):
            tl.store(DOTS + tok64 * n + i, inverse * (dot_a[i] - along * tl.sum(to_u[i], axis=1)), mask=live)
        for k in tl.static_range(TILES):
            c = k * BC + tl.arange(0, BC)
            a = rows_gv[k].to(tl.float32) * tl.load(WEIGHT + c, mask=c < C, other=0.0)[None, :]
            gu = inverse[:, None] * (a - along[:, None] * rows_u[k].to(tl.float32))
            mask = live[:, None] & (c < C)[None, :]
            tl.store(GU + tok64[:, None] * C + c[None, :], gu.to(GU.dtype.element_ty), mask=mask)
    for k in tl.static_range(TILES):
        c = k * BC + tl.arange(0, BC)
        out = SLABS + tl.program_id(0).to(tl.int64) * C + c
        tl.store(out, tl.sum(dweight[k], axis=0), mask=c < C)


@triton.jit(do_not_specialize=["S"])
def sum_rows_kernel(SLABS, OUT, S, C: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, OVERLAP: tl.constexpr):
    """Sum of S rows of C values, DEPTH rows at a time in order."""
    start_after_previous(OVERLAP)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, S, DEPTH):
        row = start + tl.arange(0, DEPTH)
        mask = (row < S)[:, None] & (c < C)[None, :]
        total += tl.sum(tl.load(SLABS + row[:, None].to(tl.int64) * C + c[None, :], mask=mask, other=0.0), axis=0)
    tl.store(OUT + c, total, mask=c < C)


def backward_config(num_streams: int, dim: int, item_size: int) -> NormConfig:
    """Rows, their gradient, gain, dweight and the streams of a tile share the registers: fewer tiles when n > 4."""
    if num_streams > 4 or item_size == 4:
        config = norm_config(dim, item_size, 2)
        if config.num_warps <= (8 if item_size == 2 else 16):
            return config
    # rows of 1280 channels are five tiles of one warp, or three of two warps with a sixth of the lanes idle
    return norm_config(dim, item_size, 5 if num_streams == 4 and item_size == 2 and dim <= 1280 else 4)


def residency(config: NormConfig, num_streams: int, item_size: int, capability: int) -> tuple[int, int]:
    """Programs for one multiprocessor, and pipeline stages.

    Every stage but one has a row of the streams, of the gradient and (twice) of the gain on its way in shared memory.
    One program with all of it was faster than several with less; without room for a second stage, several hide latency.
    """
    shared = 200_000 if capability in (90, 100, 101, 103) else 150_000 if capability in (80, 87) else 90_000
    values = config.block_tokens * config.block_channels * config.num_tiles
    most = 1 if capability >= 100 else 2  # two buffers spill a few bytes there
    stages = 1 + min(most, shared // (values * ((num_streams + 1) * item_size + 8)))
    return (1 if stages > 1 else max(1, 12 // config.num_warps)), stages


def read_norm_backward(
    gv: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    inverse: torch.Tensor,
    proj: torch.Tensor,
    alpha_pre: torch.Tensor,
    bias: torch.Tensor,
    options: SiteOptions,
    read: torch.Tensor | None = None,
    *,
    copies: int = 1,
    config: NormConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of u, of h_pre as read, and of the norm's gain.

    Parameters
    ----------
    gv : Tensor
        Gradient of the normalised input, ``(..., C)``.
    x : Tensor
        Streams ``(..., n, C)``, contiguous.
    weight : Tensor
        ``[C]`` fp32.
    inverse : Tensor
        ``(...)`` fp32, kept by the forward.
    proj : Tensor
        ``(..., N)`` fp32, kept by the forward; h_pre is recomputed from it.
    alpha_pre, bias : Tensor
        The gate, 0-d, and the biases ``[N]``.
    options : SiteOptions
        The convention.
    read : Tensor, optional
        ``(..., n)``, the coefficients the site was read with, where these are not its own (one stride for all tokens).
    copies : int
        How many equal streams the only one of ``x (..., 1, C)`` stands for; their gradients of h_pre are equal.
    config : NormConfig, optional
        Replaces the table's launch shape.

    Returns
    -------
    gu : Tensor
        ``(..., C)`` in the dtype of ``gv``.
    dots : Tensor
        ``(..., n)`` fp32: ``<du, x_i>``, from du before it is rounded.
    dweight : Tensor
        ``[C]`` fp32.
    """
    *lead, stored, dim = x.shape
    num_tokens, num_streams = x.numel() // (stored * dim), stored * copies
    gu = torch.empty_like(gv)
    dots = torch.empty((*lead, num_streams), dtype=torch.float32, device=x.device)
    if num_tokens == 0:
        return gu, dots, torch.zeros_like(weight)
    backward, reduction, num_slabs = _launches(
        num_tokens,
        num_streams,
        copies,
        dim,
        None if read is None else read.stride(-2),
        options,
        x.dtype,
        x.device,
        config,
    )
    slabs = torch.empty((num_slabs, dim), dtype=torch.float32, device=x.device)
    dweight = torch.empty((dim,), dtype=torch.float32, device=x.device)
    absent = proj  # an address for an argument that the kernel does not read
    backward(gv, x, weight, inverse, absent if read is None else read, proj, alpha_pre, bias, gu, dots, slabs)
    reduction(slabs, dweight)
    return gu, dots, dweight


@functools.lru_cache(maxsize=1024)
def _launches(
    num_tokens: int,
    num_streams: int,
    copies: int,
    dim: int,
    read_stride: int | None,
    options: SiteOptions,
    dtype: torch.dtype,
    device: torch.device,
    config: NormConfig | None,
) -> tuple[Launch, Launch, int]:
    if config is None:
        config = backward_config(num_streams, dim, dtype.itemsize)
    programs, stages = residency(config, num_streams, dtype.itemsize, capability(device))
    span = cdiv(cdiv(num_tokens, programs * num_sms(device)), config.block_tokens) * config.block_tokens
    num_slabs = cdiv(num_tokens, span)
    constants = {
        "C": dim,
        "n": num_streams,
        "STORED": num_streams // copies,
        "HAS_READ": read_stride is not None,
        "READ_STRIDE": read_stride or 0,
        "TILES": config.num_tiles,
        "BT": config.block_tokens,
        "BC": config.block_channels,
        "V": 16 // dtype.itemsize,
        "STAGES": stages,
        "OVERLAP": overlaps(device),
    }
    scalars = (num_tokens, span, 1.0 / dim, options.eps_pre)
    backward = Launch(read_norm_backward_kernel, (num_slabs,), scalars, constants, config.num_warps)
    block = 1024 if is_interpreting() else 32
    sums = {"C": dim, "BLOCK": block, "DEPTH": 64, "OVERLAP": overlaps(device)}
    return backward, Launch(sum_rows_kernel, (cdiv(dim, block),), (num_slabs,), sums, 4), num_slabs

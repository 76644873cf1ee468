# ruff: noqa: RUF005 - Triton concatenates tuples, it does not unpack them
"""Phase B2 of the backward: dx, written once, and the token-split partials of dphi, from one read of x and g.

dx[i] = sum_o h_res[o, i] g[o] + h_pre[i] du + (dz phi)[i] + rc x[i];   dphi = sum_t dz[t]^T x[t].
Channels are the tensor core's rows in dphi (X^T dz), which makes it a wgmma on Hopper. No atomics: the reduce sums the
slabs in order.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from mhc_layers.kernels.triton.configs import (
    StreamsBackwardConfig,
    capability,
    cdiv,
    is_interpreting,
    num_sms,
    overlaps,
    streams_backward_config,
)
from mhc_layers.kernels.triton.launch import Launch
from mhc_layers.kernels.triton.overlap import start_after_previous

__all__ = ["reduce_launch", "reduce_slabs", "streams_backward", "streams_backward_launch"]

#: Up to this many token splits are ranges of tokens; more take tiles in turn (``measured/layer_kernels.md``).
_MOST_RANGES = 8

#: Bytes of streams that a second-level cache may still hold from B1; then tiles are taken in turn, too.
_CACHE_BYTES = 48 << 20


@triton.jit(do_not_specialize=["M", "SPAN"])
def streams_backward_kernel(
    X,
    G,
    GU,
    MIX,
    DZ,
    PHI,
    DX,
    FIRST,
    SLABS,
    M,
    SPAN,
    C: tl.constexpr,
    n: tl.constexpr,
    NP: tl.constexpr,
    P: tl.constexpr,
    GROUP: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
    IN_TURN: tl.constexpr,
    TERMS: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_GU: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start_after_previous(OVERLAP)
    N: tl.constexpr = n * (n + 2)
    K: tl.constexpr = n * C
    GROUPS: tl.constexpr = n // GROUP
    first = (tl.program_id(0) % GROUPS) * GROUP
    split = tl.program_id(1)
    c = (tl.program_id(0) // GROUPS) * BC + tl.arange(0, BC)
    c_mask = c < C
    j = tl.arange(0, NP)
    phi_hi = ()
    phi_lo = ()
    acc = ()
    for q in tl.static_range(GROUP):
        w_at = j[:, None] * K + ((first + q) * C + c)[None, :]
        w = tl.load(PHI + w_at, mask=(j < N)[:, None] & c_mask[None, :], other=0.0)
        if TERMS == 2:
            hi = w.to(X.dtype.element_ty)
            lo = (w - hi.to(tl.float32)).to(X.dtype.element_ty)
            if UPCAST:
                phi_hi = phi_hi + (hi.to(tl.float32),)
                phi_lo = phi_lo + (lo.to(tl.float32),)
            else:
                phi_hi = phi_hi + (hi,)
                phi_lo = phi_lo + (lo,)
        else:
            phi_hi = phi_hi + (w,)
        acc = acc + (tl.zeros((BC, NP), tl.float32),)
    if IN_TURN:
        # SPAN programs take tiles in turn, from the last token on: those are the ones that B1 has read just now
        begin = split * BT
        end = M
        step = SPAN * BT
    else:
        begin = split * SPAN
        end = tl.minimum(M, begin + SPAN)
        step = BT
    for start in tl.range(begin, end, step, num_stages=STAGES):
        t = start
        if IN_TURN:
            t = (M + BT - 1) // BT * BT - BT - start
        tok = t + tl.arange(0, BT)
        live = tok < end
        tok64 = tok.to(tl.int64)
        if C % BC == 0:
            mask = live[:, None]
        else:
            mask = live[:, None] & c_mask[None, :]
        at = tok64[:, None] * K + c[None, :]
        mix = MIX + tok64 * (n * P) + first * P
        z_at = DZ + tok64[:, None] * (TERMS * NP) + j[None, :]
        z_hi = tl.load(z_at, mask=live[:, None], other=0.0)
        z_lo = z_hi
        if TERMS == 2:
            z_lo = tl.load(z_at + NP, mask=live[:, None], other=0.0)
        if UPCAST:
            z_hi = z_hi.to(tl.float32)
            z_lo = z_lo.to(tl.float32)
        g = ()
        if HAS_G:
            for o in tl.static_range(n):
                g = g + (tl.load(G + at + o * C, mask=mask, other=0.0).to(tl.float32),)
        if HAS_GU:
            u = tl.load(GU + tok64[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        rc = tl.load(mix + n + 1, mask=live, other=0.0)
        new = ()
        for q in tl.static_range(GROUP):
            x = tl.load(X + at + (first + q) * C, mask=mask, other=0.0)
            x32 = x.to(tl.float32)
            dx = tl.dot(z_hi, phi_hi[q], input_precision=PRECISION)
            if TERMS == 2:
                dx = tl.dot(z_lo, phi_hi[q], dx, input_precision=PRECISION)
                dx = tl.dot(z_hi, phi_lo[q], dx, input_precision=PRECISION)
            if HAS_G:
                for o in tl.static_range(n):
                    dx += tl.load(mix + q * P + o, mask=live, other=0.0)[:, None] * g[o]
            if HAS_GU:
                dx += tl.load(mix + q * P + n, mask=live, other=0.0)[:, None] * u
            dx += rc[:, None] * x32
            tl.store(DX + at + (first + q) * C, dx.to(DX.dtype.element_ty), mask=mask)
            if UPCAST:
                part = tl.dot(tl.trans(x32), z_hi, acc[q], input_precision=PRECISION)
                if TERMS == 2:
                    part = tl.dot(tl.trans(x32), z_lo, part, input_precision=PRECISION)
            else:
                part = tl.dot(tl.trans(x), z_hi, acc[q], input_precision=PRECISION)
                if TERMS == 2:
                    part = tl.dot(tl.trans(x), z_lo, part, input_precision=PRECISION)
            new = new + (part,)
        acc = new
    # the first slab has a place of its own: the gradient of phi, to which the reduce adds the others
    slab = SLABS + (split - 1).to(tl.int64) * (N * K)
    is_first = tl.full((1, NP), split, tl.int32) == 0
    for q in tl.static_range(GROUP):
        at = j[None, :] * K + ((first + q) * C + c)[:, None]
        mask = (j < N)[None, :] & c_mask[:, None]
        tl.store(FIRST + at, acc[q], mask=mask & is_first)
        tl.store(slab + at, acc[q], mask=mask & ~is_first)


@triton.jit(do_not_specialize=["S", "PROGRAMS"])
def reduce_kernel(
    FIRST,
    SLABS,
    PARAMS,
    DPHI,
    DPARAMS,
    S,
    PROGRAMS,
    SIZE: tl.constexpr,
    NP: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """DPHI = FIRST + S slabs, DEPTH at a time in order; the first program sums the partials of bias and alpha."""
    start_after_previous(OVERLAP)
    pid = tl.program_id(0) - 1
    if pid < 0:  # the longest program, so it starts first; its loads do not wait for each other
        j = tl.arange(0, 2 * NP)
        rows = tl.zeros((ROWS, 2 * NP), tl.float32)
        for start in range(0, PROGRAMS, ROWS):
            row = start + tl.arange(0, ROWS)
            mask = (row < PROGRAMS)[:, None] & (j < NP + 3)[None, :]
            rows += tl.load(PARAMS + row[:, None] * (NP + 4) + j[None, :], mask=mask, other=0.0)
        tl.store(DPARAMS + j, tl.sum(rows, axis=0), mask=j < NP + 3)
    else:
        at = pid * BLOCK + tl.arange(0, BLOCK)
        total = tl.load(FIRST + at, mask=at < SIZE, other=0.0)
        for start in range(0, S, DEPTH):
            slab = start + tl.arange(0, DEPTH)
            mask = (slab < S)[:, None] & (at < SIZE)[None, :]
            values = tl.load(SLABS + slab[:, None].to(tl.int64) * SIZE + at[None, :], mask=mask, other=0.0)
            total += tl.sum(values, axis=0)
        tl.store(DPHI + at, total, mask=at < SIZE)


def streams_backward(
    x: torch.Tensor,
    g: torch.Tensor | None,
    gu: torch.Tensor | None,
    mix: torch.Tensor,
    dz: torch.Tensor,
    phi: torch.Tensor,
    *,
    config: StreamsBackwardConfig | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Return ``dx (..., n, C)`` and the slabs of dphi; ``g`` or ``gu`` may be None (term absent).

    The slabs are the first ``[N, K]``, which :func:`reduce_slabs` turns into dphi in its place, and the other S - 1,
    ``[S - 1, N, K]``, fp32.
    """
    num_rows, k = phi.shape
    num_tokens, device = x.numel() // k, x.device
    dx = torch.empty_like(x)
    if num_tokens == 0:
        return dx, (torch.zeros_like(phi), phi.new_empty((0, num_rows, k)))
    start, num_splits = streams_backward_launch(
        num_tokens,
        *x.shape[-2:],
        dz.shape[-1],
        mix.shape[-1],
        x.dtype,
        device,
        g is not None,
        gu is not None,
        config,
    )
    first, others = torch.empty_like(phi), phi.new_empty((num_splits - 1, num_rows, k))
    start(x, x if g is None else g, x if gu is None else gu, mix, dz, phi, dx, first, others)
    return dx, (first, others)


@functools.lru_cache(maxsize=1024)
def streams_backward_launch(
    num_tokens: int,
    num_streams: int,
    dim: int,
    padded: int,
    mix_columns: int,
    dtype: torch.dtype,
    device: torch.device,
    has_g: bool,
    has_gu: bool,
    config: StreamsBackwardConfig | None,
) -> tuple[Launch, int]:
    """The launch of B2, and the number of slabs it writes, the first apart from the others."""
    if config is None:
        config = streams_backward_config(
            num_tokens, num_streams, dim, dtype.itemsize, num_sms(device), capability(device)
        )
    span = cdiv(cdiv(num_tokens, config.num_splits), config.block_tokens) * config.block_tokens
    num_splits = cdiv(num_tokens, span)
    two_terms = dtype == torch.bfloat16
    in_turn = num_splits > _MOST_RANGES or num_tokens * num_streams * dim * dtype.itemsize <= _CACHE_BYTES
    grid = (cdiv(dim, config.block_channels) * (num_streams // config.group), num_splits)
    constants = {
        "C": dim,
        "n": num_streams,
        "NP": padded,
        "P": mix_columns,
        "GROUP": config.group,
        "BT": config.block_tokens,
        "BC": config.block_channels,
        "STAGES": config.num_stages,
        "IN_TURN": in_turn,
        "TERMS": 2 if two_terms else 1,
        "HAS_G": has_g,
        "HAS_GU": has_gu,
        "UPCAST": is_interpreting() or not two_terms,
        "PRECISION": "ieee",
        "OVERLAP": overlaps(device),
    }
    return Launch(
        streams_backward_kernel,
        grid,
        (num_tokens, num_splits if in_turn else span),
        constants,
        config.num_warps,
    ), num_splits


def reduce_slabs(
    slabs: torch.Tensor | tuple[torch.Tensor, torch.Tensor], params: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum slabs and ``[programs, PAD(N) + 4]`` partials in a fixed order.

    Parameters
    ----------
    slabs : Tensor or tuple of Tensor
        ``[S, N, K]``, or the first ``[N, K]``, which becomes dphi, and the others ``[S - 1, N, K]``.
    params : Tensor
        Of the finish.

    Returns
    -------
    dphi : Tensor
        ``[N, K]`` fp32.
    dparams : Tensor
        ``[PAD(N) + 4]`` fp32: dbias in the first N, dalpha (pre, post, res) from PAD(N) on.
    """
    programs, width = params.shape
    dparams = params.new_empty((width,))
    if isinstance(slabs, tuple):
        first, others = slabs
        dphi = first
    else:
        dphi = slabs.new_empty(slabs.shape[1:])
        first, others = slabs, slabs[1:]
    if programs == 0:  # no tokens
        return dphi.zero_(), dparams.zero_()
    start = reduce_launch(others.shape[0], dphi.numel(), programs, width - 4, params.device)
    start(first, others, params, dphi, dparams)
    return dphi, dparams


@functools.lru_cache(maxsize=1024)
def reduce_launch(num_others: int, size: int, programs: int, padded: int, device: torch.device) -> Launch:
    """The launch of the reduce, for one device, of a first slab and others; dphi may be in the place of the first."""
    block = 16384 if is_interpreting() else 256
    constants = {
        "SIZE": size,
        "NP": padded,
        "BLOCK": block,
        "DEPTH": 8,
        "ROWS": 4096 // padded,
        "OVERLAP": overlaps(device),
    }
    return Launch(reduce_kernel, (cdiv(size, block) + 1,), (num_others, programs), constants, 4)

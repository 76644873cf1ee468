# ruff: noqa: RUF005 - Triton concatenates tuples, it does not unpack them
"""The first site of a model, whose n streams are copies of one embedding e: its passes, with one read of e in all.

Its projection is that of e with phi summed over the streams, and its read is ``read_forward(e, coef, copies=n)``. Here
are the write, and the two phases of the backward that need g = dL/dx'. What the copies receive as gradients is never
formed for each of them: only their sum, which is the gradient of e.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
import triton.language as tl

from mhc_layers.kernels.options import SiteOptions, streams_of
from mhc_layers.kernels.triton.configs import (
    RowConfig,
    StreamsBackwardConfig,
    capability,
    cdiv,
    is_interpreting,
    lane_values,
    num_sms,
    overlaps,
    row_config,
    streams_backward_config,
    token_splits,
)
from mhc_layers.kernels.triton.launch import Launch
from mhc_layers.kernels.triton.overlap import start_after_previous

__all__ = ["broadcast_streams_backward", "broadcast_write_backward", "broadcast_write_forward"]


@triton.jit(do_not_specialize=["M"])
def broadcast_write_kernel(
    E, F, COEF, OUT, M, C: tl.constexpr, n: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, OVERLAP: tl.constexpr
):
    """x'[o] = h_post[o] f + sum_i h_res[o, i] e, in the order of the write of n streams."""
    start_after_previous(OVERLAP)
    N: tl.constexpr = n * (n + 2)
    tiles: tl.constexpr = (C + BC - 1) // BC
    pid = tl.program_id(0)
    tok = (pid // tiles) * BT + tl.arange(0, BT)
    c = (pid % tiles) * BC + tl.arange(0, BC)
    live = tok < M
    mask = live[:, None] & (c < C)[None, :]
    tok64 = tok.to(tl.int64)
    row = tok64[:, None] * C + c[None, :]
    coef = COEF + tok64 * N
    f = tl.load(F + row, mask=mask, other=0.0).to(tl.float32)
    e = tl.load(E + row, mask=mask, other=0.0).to(tl.float32)
    for o in tl.static_range(n):
        y = tl.load(coef + n + o, mask=live, other=0.0)[:, None] * f
        for i in tl.static_range(n):
            y = tl.fma(tl.load(coef + 2 * n + o * n + i, mask=live, other=0.0)[:, None], e, y)
        tl.store(OUT + tok64[:, None] * (n * C) + (o * C + c)[None, :], y.to(OUT.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def broadcast_write_backward_kernel(
    G,
    E,
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
    """df = sum_o h_post[o] g[o];  dh_post[o] = <g[o], f>;  dh_res[o, i] = <g[o], e> for every i."""
    start_after_previous(OVERLAP)
    N: tl.constexpr = n * (n + 2)
    tok = tl.program_id(0) * BT + tl.arange(0, BT)
    live = tok < M
    tok64 = tok.to(tl.int64)
    alpha = tl.load(ALPHA_POST)
    h = ()
    to_f = ()
    to_e = ()
    for o in tl.static_range(n):
        logit = alpha * tl.load(PROJ + tok64 * N + n + o, mask=live, other=0.0) + tl.load(BIAS + n + o)
        h = h + (post_scale * tl.sigmoid(logit),)
        to_f = to_f + (tl.zeros((BT, BC // V), tl.float32),)
        to_e = to_e + (tl.zeros((BT, BC // V), tl.float32),)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        if C % BC == 0:
            mask = live[:, None]
        else:
            mask = live[:, None] & (c < C)[None, :]
        row = tok64[:, None] * C + c[None, :]
        f = tl.load(F + row, mask=mask, other=0.0).to(tl.float32)
        e = tl.load(E + row, mask=mask, other=0.0).to(tl.float32)
        df = tl.zeros((BT, BC), tl.float32)
        new_f = ()
        new_e = ()
        for o in tl.static_range(n):
            at = tok64[:, None] * (n * C) + (o * C + c)[None, :]
            g = tl.load(G + at, mask=mask, other=0.0).to(tl.float32)
            df += h[o][:, None] * g
            new_f = new_f + (to_f[o] + tl.sum(tl.reshape(g * f, (BT, BC // V, V)), axis=2),)
            new_e = new_e + (to_e[o] + tl.sum(tl.reshape(g * e, (BT, BC // V, V)), axis=2),)
        to_f = new_f
        to_e = new_e
        tl.store(DF + row, df.to(DF.dtype.element_ty), mask=mask)
    for o in tl.static_range(n):
        tl.store(DCOEF + tok64 * N + o, tl.zeros((BT,), tl.float32), mask=live)
        tl.store(DCOEF + tok64 * N + n + o, tl.sum(to_f[o], axis=1), mask=live)
        along = tl.sum(to_e[o], axis=1)
        for i in tl.static_range(n):
            tl.store(DCOEF + tok64 * N + 2 * n + o * n + i, along, mask=live)


@triton.jit(do_not_specialize=["M", "SPAN"])
def broadcast_streams_backward_kernel(
    E,
    G,
    GU,
    MIX,
    DZ,
    PHI,
    DE,
    SLABS,
    M,
    SPAN,
    C: tl.constexpr,
    n: tl.constexpr,
    NP: tl.constexpr,
    P: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
    TERMS: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_GU: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """de = sum_o (sum_i h_res[o, i]) g[o] + (sum_i h_pre[i]) du + dz phi + rc e, and a slab of dz^T e."""
    start_after_previous(OVERLAP)
    N: tl.constexpr = n * (n + 2)
    split = tl.program_id(1)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    c_mask = c < C
    j = tl.arange(0, NP)
    w = tl.load(PHI + j[:, None] * C + c[None, :], mask=(j < N)[:, None] & c_mask[None, :], other=0.0)
    phi_hi = w
    phi_lo = w
    if TERMS == 2:
        hi = w.to(E.dtype.element_ty)
        phi_hi = hi
        phi_lo = (w - hi.to(tl.float32)).to(E.dtype.element_ty)
        if UPCAST:
            phi_hi = phi_hi.to(tl.float32)
            phi_lo = phi_lo.to(tl.float32)
    acc = tl.zeros((BC, NP), tl.float32)
    begin = split * SPAN
    end = tl.minimum(M, begin + SPAN)
    for t in tl.range(begin, end, BT, num_stages=STAGES):
        tok = t + tl.arange(0, BT)
        live = tok < end
        tok64 = tok.to(tl.int64)
        if C % BC == 0:
            mask = live[:, None]
        else:
            mask = live[:, None] & c_mask[None, :]
        row = tok64[:, None] * C + c[None, :]
        mix = MIX + tok64 * (n * P)
        z_at = DZ + tok64[:, None] * (TERMS * NP) + j[None, :]
        z_hi = tl.load(z_at, mask=live[:, None], other=0.0)
        z_lo = z_hi
        if TERMS == 2:
            z_lo = tl.load(z_at + NP, mask=live[:, None], other=0.0)
        if UPCAST:
            z_hi = z_hi.to(tl.float32)
            z_lo = z_lo.to(tl.float32)
        e = tl.load(E + row, mask=mask, other=0.0)
        e32 = e.to(tl.float32)
        de = tl.dot(z_hi, phi_hi, input_precision=PRECISION)
        if TERMS == 2:
            de = tl.dot(z_lo, phi_hi, de, input_precision=PRECISION)
            de = tl.dot(z_hi, phi_lo, de, input_precision=PRECISION)
        if HAS_G:
            for o in tl.static_range(n):
                total = tl.zeros((BT,), tl.float32)
                for i in tl.static_range(n):
                    total += tl.load(mix + i * P + o, mask=live, other=0.0)
                at = tok64[:, None] * (n * C) + (o * C + c)[None, :]
                de += total[:, None] * tl.load(G + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_GU:
            total = tl.zeros((BT,), tl.float32)
            for i in tl.static_range(n):
                total += tl.load(mix + i * P + n, mask=live, other=0.0)
            de += total[:, None] * tl.load(GU + row, mask=mask, other=0.0).to(tl.float32)
        de += tl.load(mix + n + 1, mask=live, other=0.0)[:, None] * e32
        tl.store(DE + row, de.to(DE.dtype.element_ty), mask=mask)
        if UPCAST:
            acc = tl.dot(tl.trans(e32), z_hi, acc, input_precision=PRECISION)
            if TERMS == 2:
                acc = tl.dot(tl.trans(e32), z_lo, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(tl.trans(e), z_hi, acc, input_precision=PRECISION)
            if TERMS == 2:
                acc = tl.dot(tl.trans(e), z_lo, acc, input_precision=PRECISION)
    out = (split * N + j[None, :]).to(tl.int64) * C + c[:, None]
    tl.store(SLABS + out, acc, mask=(j < N)[None, :] & c_mask[:, None])


def broadcast_write_forward(
    e: torch.Tensor, f: torch.Tensor, coef: torch.Tensor, *, config: RowConfig | None = None
) -> torch.Tensor:
    """Return the next streams ``(..., n, C)`` of n copies of ``e (..., 1, C)``, ``f (..., C)``, ``coef (..., N)``."""
    n, dim = streams_of(coef.shape[-1]), e.shape[-1]
    out = torch.empty((*e.shape[:-2], n, dim), dtype=e.dtype, device=e.device)
    if e.numel():
        _write_launch(e.numel() // dim, n, dim, e.dtype, e.device, config)(e, f, coef, out)
    return out


@functools.lru_cache(maxsize=1024)
def _write_launch(
    num_tokens: int, n: int, dim: int, dtype: torch.dtype, device: torch.device, config: RowConfig | None
) -> Launch:
    if config is None:
        config = row_config(n, dim, dtype.itemsize, reducing=False)
    grid = (cdiv(num_tokens, config.block_tokens) * cdiv(dim, config.block_channels),)
    constants = {"C": dim, "n": n, "BT": config.block_tokens, "BC": config.block_channels, "OVERLAP": overlaps(device)}
    return Launch(broadcast_write_kernel, grid, (num_tokens,), constants, config.num_warps)


def broadcast_write_backward(
    g: torch.Tensor,
    e: torch.Tensor,
    f: torch.Tensor,
    proj: torch.Tensor,
    alpha_post: torch.Tensor,
    bias: torch.Tensor,
    options: SiteOptions,
    *,
    config: RowConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``df (..., C)`` and ``dcoef (..., N)`` fp32 (its h_pre columns are 0) of ``g (..., n, C)``."""
    n, dim = g.shape[-2:]
    df, dcoef = torch.empty_like(f), torch.empty_like(proj)
    if e.numel():
        start = _write_backward_launch(e.numel() // dim, n, dim, options.post_multiplier, e.dtype, e.device, config)
        start(g, e, f, proj, alpha_post, bias, df, dcoef)
    return df, dcoef


@functools.lru_cache(maxsize=1024)
def _write_backward_launch(
    num_tokens: int,
    n: int,
    dim: int,
    post_multiplier: float,
    dtype: torch.dtype,
    device: torch.device,
    config: RowConfig | None,
) -> Launch:
    if config is None:
        config = row_config(n, dim, dtype.itemsize, reducing=True)
    constants = {
        "C": dim,
        "n": n,
        "BT": config.block_tokens,
        "BC": config.block_channels,
        "V": lane_values(config),
        "OVERLAP": overlaps(device),
    }
    grid = (cdiv(num_tokens, config.block_tokens),)
    scalars = (num_tokens, post_multiplier)
    return Launch(broadcast_write_backward_kernel, grid, scalars, constants, config.num_warps)


def broadcast_streams_backward(
    e: torch.Tensor,
    g: torch.Tensor | None,
    gu: torch.Tensor | None,
    mix: torch.Tensor,
    dz: torch.Tensor,
    phi: torch.Tensor,
    *,
    config: StreamsBackwardConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``de (..., 1, C)`` and slabs ``[S, N, C]`` of dphi summed over the streams, as ``phi (N, C)`` is."""
    num_rows, dim = phi.shape
    de = torch.empty_like(e)
    if not e.numel():
        return de, torch.empty((0, num_rows, dim), dtype=torch.float32, device=e.device)
    absent = (g is None, gu is None)
    start, num_splits = _streams_launch(
        e.numel() // dim, num_rows, dim, dz.shape[-1], mix.shape[-1], absent, e.dtype, e.device, config
    )
    slabs = torch.empty((num_splits, num_rows, dim), dtype=torch.float32, device=e.device)
    start(e, e if g is None else g, e if gu is None else gu, mix, dz, phi, de, slabs)
    return de, slabs


@functools.lru_cache(maxsize=1024)
def _streams_launch(
    num_tokens: int,
    num_rows: int,
    dim: int,
    padded: int,
    width: int,
    absent: tuple[bool, bool],
    dtype: torch.dtype,
    device: torch.device,
    config: StreamsBackwardConfig | None,
) -> tuple[Launch, int]:
    n = streams_of(num_rows)
    if config is None:
        sms = num_sms(device)
        config = streams_backward_config(num_tokens, n, dim, dtype.itemsize, sms, capability(device))
        columns = cdiv(dim, config.block_channels)
        num_splits = token_splits(cdiv(num_tokens, config.block_tokens), columns, sms)
        config = dataclasses.replace(config, group=1, num_splits=num_splits)
    span = cdiv(cdiv(num_tokens, config.num_splits), config.block_tokens) * config.block_tokens
    num_splits = cdiv(num_tokens, span)
    two_terms = dtype == torch.bfloat16
    constants = {
        "C": dim,
        "n": n,
        "NP": padded,
        "P": width,
        "BT": config.block_tokens,
        "BC": config.block_channels,
        "STAGES": config.num_stages,
        "TERMS": 2 if two_terms else 1,
        "HAS_G": not absent[0],
        "HAS_GU": not absent[1],
        "UPCAST": is_interpreting() or not two_terms,
        "PRECISION": "ieee",
        "OVERLAP": overlaps(device),
    }
    grid = (cdiv(dim, config.block_channels), num_splits)
    return Launch(broadcast_streams_backward_kernel, grid, (num_tokens, span), constants, config.num_warps), num_splits

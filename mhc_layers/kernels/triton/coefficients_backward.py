"""Finish of the backward: from the gradients of the coefficients to dz, the operator of B2, and parameter partials.

Everything is per token and on chip: sigmoids, the exact adjoint of the truncated Sinkhorn iteration (recomputed here,
no iterate is stored), the affine maps, and the factor that the root mean square contributes to dx.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from birkhoff.kernels.triton import tile
from mhc_layers.kernels.options import SiteOptions, mix_width, padded_rows, streams_of
from mhc_layers.kernels.triton.configs import (
    FinishConfig,
    cdiv,
    finish_config,
    next_power_of_2,
    num_sms,
    overlaps,
)
from mhc_layers.kernels.triton.launch import Launch
from mhc_layers.kernels.triton.overlap import start_after_previous

__all__ = ["finish_backward", "finish_backward_launch"]


@triton.jit
def _store_dz(DZ, at, dz, mask, NP: tl.constexpr, TERMS: tl.constexpr):
    """dz as hi + lo in the element type of DZ (two bf16 terms), or as one fp32 term."""
    hi = dz.to(DZ.dtype.element_ty)
    tl.store(DZ + at, hi, mask=mask)
    if TERMS == 2:
        tl.store(DZ + at + NP, (dz - hi.to(tl.float32)).to(DZ.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def finish_backward_kernel(
    PROJ,
    RSTD,
    DCOEF,
    DOTS,
    READ,
    ALPHA_PRE,
    ALPHA_POST,
    ALPHA_RES,
    BIAS,
    MIX,
    DZ,
    PARAMS,
    M,
    inv_k,
    eps_pre,
    post_scale,
    n: tl.constexpr,
    NS: tl.constexpr,
    NP: tl.constexpr,
    P: tl.constexpr,
    TERMS: tl.constexpr,
    HAS_DOTS: tl.constexpr,
    HAS_READ: tl.constexpr,
    READ_STRIDE: tl.constexpr,
    METHOD: tl.constexpr,
    COLUMNS_FIRST: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ITERS: tl.constexpr,
    EPS_START: tl.constexpr,
    EPS_DEN: tl.constexpr,
    LENGTH: tl.constexpr,
    LANE: tl.constexpr,
    W: tl.constexpr,
    BT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """With l the logits and p the normalised projections: dp = alpha dl, dz = dp / r, rc = -(sum dp p) / (r^2 K)."""
    start_after_previous(OVERLAP)
    N: tl.constexpr = n * (n + 2)
    pid = tl.program_id(0)
    tok = (pid * BT + tl.arange(0, BT)).to(tl.int64)
    live = tok < M
    rstd = tl.load(RSTD + tok, mask=live, other=0.0)
    i = tl.arange(0, NS)
    pair = live[:, None] & (i < n)[None, :]
    row = tok[:, None] * N + i[None, :]
    dz_row = tok[:, None] * (TERMS * NP) + i[None, :]
    partial = PARAMS + pid * (NP + 4)

    # read: Eq. 17
    alpha = tl.load(ALPHA_PRE)
    p = tl.load(PROJ + row, mask=pair, other=0.0)
    s = tl.sigmoid(alpha * p + tl.load(BIAS + i, mask=i < n, other=0.0)[None, :])
    h_pre = s + eps_pre
    d = tl.load(DCOEF + row, mask=pair, other=0.0)
    if HAS_DOTS:
        d += tl.load(DOTS + tok[:, None] * n + i[None, :], mask=pair, other=0.0)
    if HAS_READ:
        # a delayed read used another site's h_pre
        h_pre = tl.load(READ + tok[:, None] * READ_STRIDE + i[None, :], mask=pair, other=0.0)
    dl = d * s * (1.0 - s)
    dlp = dl * p
    tl.store(partial + i, tl.sum(dl, axis=0), mask=i < n)
    tl.store(partial + NP, tl.sum(tl.sum(dlp, axis=1), axis=0))
    inner = alpha * tl.sum(dlp, axis=1)
    _store_dz(DZ, dz_row, alpha * dl * rstd[:, None], pair, NP, TERMS)

    # write: Eq. 18
    alpha = tl.load(ALPHA_POST)
    p = tl.load(PROJ + row + n, mask=pair, other=0.0)
    s = tl.sigmoid(alpha * p + tl.load(BIAS + n + i, mask=i < n, other=0.0)[None, :])
    dl = tl.load(DCOEF + row + n, mask=pair, other=0.0) * post_scale * s * (1.0 - s)
    dlp = dl * p
    tl.store(partial + n + i, tl.sum(dl, axis=0), mask=i < n)
    tl.store(partial + NP + 1, tl.sum(tl.sum(dlp, axis=1), axis=0))
    inner += alpha * tl.sum(dlp, axis=1)
    _store_dz(DZ, dz_row + n, alpha * dl * rstd[:, None], pair, NP, TERMS)

    # mix: Eq. 9 and 19, exact adjoint of the truncated iteration
    alpha = tl.load(ALPHA_RES)
    if LANE:
        # entries in one tensor between memory and the tuple of lanes: few memory operations compile fast
        k = tl.arange(0, W)[None, :]
        mask = live[:, None] & (k < n * n)
        stored = tok[:, None] * N + 2 * n + k
        acting = stored
        place = (k % n) * P + k // n
        if TRANSPOSED:
            acting = tok[:, None] * N + 2 * n + (k % n) * n + k // n
            place = (k // n) * P + k % n
        p = tl.load(PROJ + stored, mask=mask, other=0.0)
        logits = alpha * p + tl.load(BIAS + 2 * n + k, mask=k < n * n, other=0.0)
        d = tl.load(DCOEF + acting, mask=mask, other=0.0)
        cells = tile.unpack(logits, BT, W)
        h_res = tile.sinkhorn(cells, ITERS, n, METHOD, COLUMNS_FIRST, True, EPS_START, EPS_DEN)
        tl.store(MIX + tok[:, None] * (n * P) + place, tile.pack(h_res, BT, W, n * n), mask=mask)
        dlogits = tile.sinkhorn_vjp(
            cells, tile.unpack(d, BT, W), ITERS, n, METHOD, COLUMNS_FIRST, True, LENGTH, EPS_START, EPS_DEN
        )
        dl = tl.where(mask, tile.pack(dlogits, BT, W, n * n), 0.0)
        # p is read again rather than held through the adjoint, which needs the registers
        dlp = dl * tl.load(PROJ + stored, mask=mask, other=0.0)
        tl.store(partial + 2 * n + tl.arange(0, W), tl.sum(dl, axis=0), mask=tl.arange(0, W) < n * n)
        dot = tl.sum(dlp, axis=1)
        tl.store(partial + NP + 2, tl.sum(dot, axis=0))
        inner += alpha * dot
        _store_dz(DZ, tok[:, None] * (TERMS * NP) + 2 * n + k, alpha * dl * rstd[:, None], mask, NP, TERMS)
    else:
        a = tl.arange(0, NS)[None, :, None]
        b = tl.arange(0, NS)[None, None, :]
        real = (a < n) & (b < n)
        mask = live[:, None, None] & real
        token = tok[:, None, None]
        stored = 2 * n + a * n + b
        acting = stored
        place = b * P + a
        if TRANSPOSED:
            acting = 2 * n + b * n + a
            place = a * P + b
        p = tl.load(PROJ + token * N + stored, mask=mask, other=0.0)
        logits = alpha * p + tl.load(BIAS + stored, mask=real, other=0.0)
        h_res = tile.sinkhorn(logits, ITERS, n, METHOD, COLUMNS_FIRST, False, EPS_START, EPS_DEN)
        tl.store(MIX + token * (n * P) + place, h_res, mask=mask)
        d = tl.load(DCOEF + token * N + acting, mask=mask, other=0.0)
        dl = tile.sinkhorn_vjp(logits, d, ITERS, n, METHOD, COLUMNS_FIRST, False, LENGTH, EPS_START, EPS_DEN)
        dl = tl.where(mask, dl, 0.0)
        dlp = dl * p
        tl.store(partial + stored, tl.sum(dl, axis=0, keep_dims=True), mask=real)
        dot = tl.sum(tl.sum(dlp, axis=2), axis=1)
        tl.store(partial + NP + 2, tl.sum(dot, axis=0))
        inner += alpha * dot
        _store_dz(DZ, token * (TERMS * NP) + stored, alpha * dl * rstd[:, None, None], mask, NP, TERMS)

    # what B2 multiplies with: row i holds h_res[0..n-1, i], h_pre[i], rc
    out = MIX + tok[:, None] * (n * P) + i[None, :] * P
    tl.store(out + n, h_pre, mask=pair)
    rc = -inner * rstd * rstd * inv_k
    tl.store(out + n + 1, tl.broadcast_to(rc[:, None], (BT, NS)), mask=pair)

    # padding columns of dz are operands of the tensor cores: zero
    j = tl.arange(0, NP)
    pad = live[:, None] & (j >= N)[None, :]
    zero = tl.zeros((BT, NP), tl.float32)
    _store_dz(DZ, tok[:, None] * (TERMS * NP) + j[None, :], zero, pad, NP, TERMS)


def finish_backward(
    proj: torch.Tensor,
    rstd: torch.Tensor,
    dcoef: torch.Tensor,
    dots: torch.Tensor | None,
    alphas: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    bias: torch.Tensor,
    options: SiteOptions,
    k: int,
    stream_dtype: torch.dtype,
    read: torch.Tensor | None = None,
    *,
    config: FinishConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Adjoint of the coefficients.

    Parameters
    ----------
    proj, rstd : Tensor
        Kept by the forward: ``(..., N)`` and ``(...)`` fp32, M tokens.
    dcoef : Tensor
        Gradient of the coefficients, ``(..., N)`` fp32.
    dots : Tensor or None
        ``(..., n)``, added to the gradient of h_pre.
    alphas : tuple of Tensor
        The gates of pre, post and res, 0-d fp32.
    bias : Tensor
        ``[N]`` fp32.
    options : SiteOptions
        The convention.
    k : int
        nC.
    stream_dtype : torch.dtype
        bf16 streams take dz in two bf16 terms, others in one fp32 term.
    read : Tensor, optional
        ``(..., n)``, the coefficients the site was read with, where these are not its own (one stride for all tokens).
    config : FinishConfig, optional
        Replaces the table's launch shape.

    Returns
    -------
    mix : Tensor
        ``[M, n, P]`` fp32; row i holds ``h_res[0..n-1, i]``, ``h_pre[i]``, ``rc``.
    dz : Tensor
        ``[M, terms, PAD(N)]``: the gradient of the raw product with phi.
    params : Tensor
        ``[programs, PAD(N) + 4]`` fp32 partial sums: dbias, then dalpha for pre, post, res.
    """
    num_rows = proj.shape[-1]
    num_tokens = rstd.numel()
    two_terms = stream_dtype == torch.bfloat16
    device = proj.device
    start, mix_shape, dz_shape, params_shape = finish_backward_launch(
        num_tokens,
        num_rows,
        k,
        options,
        two_terms,
        dots is not None,
        None if read is None else read.stride(-2),
        device,
        config,
    )
    mix = torch.empty(mix_shape, dtype=torch.float32, device=device)
    dz = torch.empty(dz_shape, dtype=stream_dtype if two_terms else torch.float32, device=device)
    params = torch.empty(params_shape, dtype=torch.float32, device=device)
    if num_tokens:
        # an address for arguments that the kernel does not read
        absent = (proj if dots is None else dots, proj if read is None else read)
        start(proj, rstd, dcoef, *absent, *alphas, bias, mix, dz, params)
    return mix, dz, params


@functools.lru_cache(maxsize=1024)
def finish_backward_launch(
    num_tokens: int,
    num_rows: int,
    k: int,
    options: SiteOptions,
    two_terms: bool,
    has_dots: bool,
    read_stride: int | None,
    device: torch.device,
    config: FinishConfig | None,
) -> tuple[Launch, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The launch, and the shapes of mix, dz and the partials."""
    num_streams = streams_of(num_rows)
    padded = padded_rows(num_rows)
    width = mix_width(num_streams)
    terms = 2 if two_terms else 1
    if config is None:
        config = finish_config(num_tokens, num_streams, num_sms(device))
    programs = cdiv(num_tokens, config.block_tokens)
    damped = options.method == "damped"
    # iterations past the last whole segment are replayed one by one: shorter segments leave fewer
    whole = options.num_iters - damped
    length = min(config.length if whole % config.length == 0 else 5, options.num_iters)
    constants = {
        "n": num_streams,
        "NS": next_power_of_2(num_streams),
        "NP": padded,
        "P": width,
        "TERMS": terms,
        "HAS_DOTS": has_dots,
        "HAS_READ": read_stride is not None,
        "READ_STRIDE": read_stride or 0,
        "METHOD": int(damped),
        "COLUMNS_FIRST": options.first == "columns",
        "TRANSPOSED": options.transposed,
        "ITERS": options.num_iters,
        "EPS_START": options.eps_start,
        "EPS_DEN": options.eps_den,
        "LENGTH": length,
        "LANE": config.lane,
        "W": next_power_of_2(num_streams * num_streams),
        "BT": config.block_tokens,
        "OVERLAP": overlaps(device),
    }
    scalars = (num_tokens, 1.0 / k, options.eps_pre, options.post_multiplier)
    start = Launch(finish_backward_kernel, (programs,), scalars, constants, config.num_warps)
    return start, (num_tokens, num_streams, width), (num_tokens, terms, padded), (programs, padded + 4)

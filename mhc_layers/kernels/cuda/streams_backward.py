"""The last backward kernel of a site (B2), alone or chained with the first one (A) of the site before.

Tokens M (any leading axes), streams n, channels C, K = nC, N = n(n + 2). Everything contiguous.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from birkhoff.kernels.cuda.launcher import PreparedLaunch
from mhc_layers.kernels.cuda.launch import kernels, refuse, start, token_splits

__all__ = ["applies", "applies_chained", "streams_backward", "streams_backward_chained"]

_TOKENS = 8
_WARPS = 8


def applies(x: Tensor, g: Tensor | None, gu: Tensor | None) -> str | None:
    """Return why :func:`streams_backward` does not run on these tensors, or None if it does."""
    if g is None or gu is None:
        return "CUDA streams_backward takes both gradients, one is absent"
    return refuse(x, (2, 3, 4, 6), "CUDA streams_backward")


def applies_chained(x: Tensor, g: Tensor | None, gu: Tensor | None) -> str | None:
    """Return why :func:`streams_backward_chained` does not run on these tensors, or None if it does."""
    if g is None or gu is None:
        return "CUDA streams_backward_chained takes both gradients, one is absent"
    return refuse(x, (2, 3, 4), "CUDA streams_backward_chained")


def _geometry(num_streams: int, num_mix: int, num_dz: int, chained: bool) -> tuple[int, int]:
    """Channels of a block and its bytes of shared memory; the source asserts the bytes."""
    n, jt = num_streams, -(-num_streams * (num_streams + 2) // 8)
    mt = 2 if n <= 4 else 1
    block_c = _WARPS * 16 * mt
    stages = 2 if chained or n > 4 else 3
    segments = 2 * n + 1 + (n + 1 if chained else 0)
    numbers = n * num_mix + num_dz + (n if chained else 0)
    stage = segments * (_TOKENS * (2 * block_c + 16) + 32) + _TOKENS * 4 * ((numbers + 11) // 16 * 16 + 4)
    dots = n * (n + 1)
    phi = 2 * _WARPS * n * mt * jt * 32 * 8
    return block_c, phi + stages * stage + (_WARPS * _TOKENS * dots * 4 if chained else 0)


class _Prepared(NamedTuple):
    """What one kind of site on one device launches, but for its tensors, and the slabs that come out."""

    backward: PreparedLaunch
    sum_dots: PreparedLaunch | None
    groups: int
    splits: int


@functools.lru_cache(maxsize=1024)
def _prepare(
    num_tokens: int,
    num_streams: int,
    dim: int,
    num_mix: int,
    num_dz: int,
    post_multiplier: float | None,
    device: int,
) -> _Prepared:
    """Compiled for a shape, with ``post_multiplier`` where it is chained."""
    chained = post_multiplier is not None
    block_c, shared = _geometry(num_streams, num_mix, num_dz, chained)
    macros = (f"-DMIX_COLUMNS={num_mix}", f"-DDZ_COLUMNS={num_dz}", f"-DSHARED_BYTES={shared}")
    module = kernels("streams_backward", num_streams, dim, (*macros, "-DCHAINED") if chained else macros, device)
    groups = -(-dim // block_c)
    splits = token_splits(num_tokens, _TOKENS, groups, 4, device)
    arguments = (*[None] * 11, np.float32(post_multiplier or 0.0), *[None] * 4, np.int32(num_tokens))
    with torch.cuda.device(device):
        backward = module.function("streams_backward_kernel").prepare(
            (groups, splits), (32 * _WARPS,), arguments, shared_bytes=shared
        )
        if not chained:
            return _Prepared(backward, None, groups, splits)
        blocks = -(-num_tokens * num_streams * (num_streams + 2) // 256)
        sum_dots = module.function("sum_dots_kernel").prepare(
            (blocks,), (256,), (None, None, np.int32(groups), np.int32(num_tokens))
        )
    return _Prepared(backward, sum_dots, groups, splits)


def streams_backward(x: Tensor, g: Tensor, gu: Tensor, mix: Tensor, dz: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradient of the streams, and partial gradients of phi from the same read.

    ``dx[i] = sum_o h_res[o, i] g[o] + h_pre[i] gu + rc x[i] + phi_i^T dz`` and ``dphi = sum_t dz_t x_t^T``.

    Parameters
    ----------
    x, g : Tensor
        Streams and the gradient of the next streams, ``(M, n, C)`` bfloat16.
    gu : Tensor
        Gradient of the sublayer's input, ``(M, C)`` bfloat16.
    mix : Tensor
        ``(M, n, P)`` float32: row i is ``h_res[:, i]``, ``h_pre[i]``, ``rc``, padding.
    dz : Tensor
        ``(M, 2, Q)`` bfloat16: gradient of the raw projections in two terms, padded with zeros.
    phi : Tensor
        ``(N, K)`` float32; enters as two bfloat16 terms.

    Returns
    -------
    dx : Tensor
        ``(M, n, C)`` bfloat16.
    dphi_slabs : Tensor
        ``(S, N, K)`` float32, one slab per split of the tokens; their sum in order is the gradient of phi.
    """
    if x.numel() == 0:
        return torch.empty_like(x), phi.new_empty((0, *phi.shape))
    n, c = x.shape[-2:]
    prepared = _prepare(x.numel() // (n * c), n, c, mix.shape[-1], dz.shape[-1], None, x.get_device())
    dx, slabs = torch.empty_like(x), phi.new_empty((prepared.splits, *phi.shape))
    # addresses for arguments that the kernel does not read
    start(prepared.backward, x, g, gu, mix, dz, phi, x, gu, mix, mix, mix, dx, slabs, dx, slabs)
    return dx, slabs


def streams_backward_chained(
    x: Tensor,
    g: Tensor,
    gu: Tensor,
    mix: Tensor,
    dz: Tensor,
    phi: Tensor,
    y: Tensor,
    f: Tensor,
    proj: Tensor,
    alpha_post: Tensor,
    bias: Tensor,
    post_multiplier: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run :func:`streams_backward` of a site and the write's backward of the site before it, which wrote ``x``.

    Parameters
    ----------
    x, g, gu, mix, dz, phi
        As for :func:`streams_backward`.
    y, f : Tensor
        Streams that entered the site before ``(M, n, C)`` and its sublayer's output ``(M, C)``, bfloat16.
    proj, alpha_post, bias : Tensor
        Its projections ``(M, N)``, gate ``()`` and biases ``(N,)``, float32, from which ``h_post`` is made again.
    post_multiplier : float
        Of its convention.

    Returns
    -------
    dx, dphi_slabs : Tensor
        As for :func:`streams_backward`.
    df : Tensor
        ``(M, C)`` bfloat16: gradient of ``f``.
    dcoef : Tensor
        ``(M, N)`` float32: gradient of the site's coefficients, zero in the columns of ``h_pre``.
    """
    if x.numel() == 0:
        return torch.empty_like(x), phi.new_empty((0, *phi.shape)), torch.empty_like(f), torch.empty_like(proj)
    n, c = x.shape[-2:]
    m = x.numel() // (n * c)
    prepared = _prepare(m, n, c, mix.shape[-1], dz.shape[-1], post_multiplier, x.get_device())
    dx, df, dcoef = torch.empty_like(x), torch.empty_like(f), torch.empty_like(proj)
    slabs, dots = phi.new_empty((prepared.splits, *phi.shape)), phi.new_empty((prepared.groups, m, n + n * n))
    start(prepared.backward, x, g, gu, mix, dz, phi, y, f, proj, alpha_post, bias, dx, slabs, df, dots)
    if prepared.sum_dots is not None:
        start(prepared.sum_dots, dots, dcoef)
    return dx, slabs, df, dcoef

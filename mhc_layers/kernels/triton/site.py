"""The read of a site and its backward as chains of launches: the leaves' kernels, with less work on the host.

The intermediate tensors of a chain lie in one allocation, and one check of its tensors serves all of its launches. The
kernels, their order and their numbers are those of the leaves.

Tokens M, streams n, channels C, K = nC, N = n(n + 2).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mhc_layers.kernels.options import SiteOptions, padded_rows
from mhc_layers.kernels.triton.coefficients import finish_launch, project_launch
from mhc_layers.kernels.triton.coefficients_backward import finish_backward_launch
from mhc_layers.kernels.triton.launch import Chain, Launch
from mhc_layers.kernels.triton.read import read_launch
from mhc_layers.kernels.triton.read_backward import read_backward_launch
from mhc_layers.kernels.triton.streams_backward import reduce_launch, streams_backward_launch

__all__ = ["site_backward", "site_forward"]


class _Scratch:
    """Places of intermediate tensors in one allocation, each aligned for the kernels."""

    def __init__(self, *tensors: tuple[tuple[int, ...], torch.dtype]) -> None:
        self._tensors = tensors
        self.offsets, end = [], 0
        for shape, dtype in tensors:
            self.offsets.append(end)
            end += -(-math.prod(shape) * dtype.itemsize // 256) * 256
        self.size = end // 4

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Return the tensors themselves, in ``size`` values of float32."""
        bytes_, found = buffer.view(torch.uint8), []
        for (shape, dtype), offset in zip(self._tensors, self.offsets, strict=True):
            part = bytes_[offset : offset + math.prod(shape) * dtype.itemsize]
            found.append(part.view(dtype).view(shape))
        return found


class _Forward(NamedTuple):
    chain: Chain
    launches: tuple[Launch, ...]
    scratch: _Scratch
    squares: int


@functools.lru_cache(maxsize=1024)
def _forward(
    num_tokens: int,
    num_streams: int,
    dim: int,
    num_rows: int,
    read_stride: int,
    dtype: torch.dtype,
    device: torch.device,
    options: SiteOptions,
) -> _Forward:
    project, num_splits = project_launch(num_tokens, num_rows, num_streams, dim, dtype, device, None)
    finish = finish_launch(num_splits, num_tokens, num_rows, num_streams * dim, options, device, None)
    read = read_launch(num_tokens, num_streams, dim, read_stride, dtype, device, None)
    scratch = _Scratch(((num_splits, num_tokens, num_rows), torch.float32), ((num_splits, num_tokens), torch.float32))
    launches = (project, finish, read)
    return _Forward(Chain(*launches), launches, scratch, scratch.offsets[1])


def site_forward(
    x: Tensor,
    phi: Tensor,
    alphas: tuple[Tensor, Tensor, Tensor],
    bias: Tensor,
    options: SiteOptions,
    previous: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the leaves ``project``, ``finish`` and ``read_forward``.

    Parameters
    ----------
    x : Tensor
        Streams ``(..., n, C)``, contiguous.
    phi, alphas, bias : Tensor
        Of the site, fp32.
    options : SiteOptions
        The convention.
    previous : Tensor or None
        ``(..., n)``, read with instead of the site's own h_pre (one stride for all tokens).

    Returns
    -------
    u, coef, proj, rstd : Tensor
        ``(..., C)`` in the streams' dtype; ``(..., N)``, ``(..., N)`` and ``(...)`` fp32.
    """
    *lead, num_streams, dim = x.shape
    (num_rows, k), device = phi.shape, x.device
    num_tokens = x.numel() // k
    # new_empty and empty_like take less time than empty, which parses a dtype and a device
    u, coef, rstd = x.new_empty((*lead, dim)), phi.new_empty((*lead, num_rows)), phi.new_empty(lead)
    proj = torch.empty_like(coef)
    if num_tokens == 0:
        return u, coef, proj, rstd
    stride = num_rows if previous is None else previous.stride(-2)
    plan = _forward(num_tokens, num_streams, dim, num_rows, stride, x.dtype, device, options)
    scratch = phi.new_empty(plan.scratch.size)
    h_read = coef if previous is None else previous
    tensors = (x, phi, *alphas, bias, coef, proj, rstd, h_read, u, scratch)
    ready = plan.chain.ready(*tensors)
    if ready is None:
        slabs, squares = plan.scratch.views(scratch)
        project, finish, read = plan.launches
        project(x, phi, slabs, squares)
        finish(slabs, squares, *alphas, bias, coef, proj, rstd)
        read(x, h_read, u)
        plan.chain.remember(*tensors)
        return u, coef, proj, rstd
    at, stream, (start_project, start_finish, start_read) = ready
    slab = at[11]
    square = slab + plan.squares
    start_project(stream, at[0], at[1], slab, square)
    start_finish(stream, slab, square, *at[2:9])
    start_read(stream, at[0], at[9], at[10])
    return u, coef, proj, rstd


class _Backward(NamedTuple):
    chain: Chain
    launches: tuple[Launch, ...]
    scratch: _Scratch
    offsets: Sequence[int]


@functools.lru_cache(maxsize=1024)
def _backward(
    num_tokens: int,
    num_streams: int,
    dim: int,
    num_rows: int,
    read_stride: int | None,
    has_g: bool,
    has_gu: bool,
    dtype: torch.dtype,
    device: torch.device,
    options: SiteOptions,
) -> _Backward:
    k, two_terms = num_streams * dim, dtype == torch.bfloat16
    has_dots = has_gu and read_stride is None
    finish, mix, dz, params = finish_backward_launch(
        num_tokens, num_rows, k, options, two_terms, has_dots, read_stride, device, None
    )
    streams, num_splits = streams_backward_launch(
        num_tokens, num_streams, dim, dz[-1], mix[-1], dtype, device, has_g, has_gu, None
    )
    reduce = reduce_launch(num_splits, num_rows * k, params[0], params[1] - 4, device)
    read = (read_backward_launch(num_tokens, num_streams, dim, dtype, device, None),) if has_gu else ()
    scratch = _Scratch(
        (mix, torch.float32),
        (dz, dtype if two_terms else torch.float32),
        (params, torch.float32),
        ((num_splits, num_rows, k), torch.float32),
    )
    launches = (finish, streams, reduce, *read)
    return _Backward(Chain(*launches), launches, scratch, scratch.offsets)


def site_backward(
    x: Tensor,
    g: Tensor | None,
    gu: Tensor | None,
    phi: Tensor,
    alphas: tuple[Tensor, Tensor, Tensor],
    bias: Tensor,
    proj: Tensor,
    rstd: Tensor,
    dcoef: Tensor,
    options: SiteOptions,
    previous: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Run the leaves ``read_backward``, ``finish_backward``, ``streams_backward`` and ``reduce_slabs``.

    Parameters
    ----------
    x, g : Tensor
        Streams and gradient of the next streams (or None), ``(..., n, C)``, contiguous.
    gu : Tensor or None
        Gradient of the sublayer's input, ``(..., C)``.
    phi, alphas, bias, proj, rstd, dcoef, options, previous
        As for the leaves.

    Returns
    -------
    dx, dphi, dparams : Tensor
        ``(..., n, C)``; ``(N, K)`` fp32; ``(PAD(N) + 4,)`` fp32: dbias, at PAD(N) dalpha.
    dots : Tensor or None
        ``(..., n)`` fp32: gradient of the coefficients that ``u`` was read with; None without ``gu``.
    """
    num_streams, dim = x.shape[-2:]
    (num_rows, k), device = phi.shape, x.device
    num_tokens = x.numel() // k
    dx, dphi, dparams = torch.empty_like(x), torch.empty_like(phi), phi.new_empty(padded_rows(num_rows) + 4)
    dots = None if gu is None else phi.new_empty(x.shape[:-1])
    if num_tokens == 0:
        return dx, dphi.zero_(), dparams.zero_(), dots
    stride = None if previous is None else previous.stride(-2)
    plan = _backward(
        num_tokens,
        num_streams,
        dim,
        num_rows,
        stride,
        g is not None,
        gu is not None,
        x.dtype,
        device,
        options,
    )
    scratch = phi.new_empty(plan.scratch.size)
    # an address for arguments that a kernel does not read
    given_g, given_gu = x if g is None else g, x if gu is None else gu
    read_with = proj if previous is None else previous
    given_dots = proj if dots is None or previous is not None else dots
    tensors = (
        *(x, given_g, given_gu, phi, proj, rstd, dcoef, given_dots, read_with, *alphas, bias),
        *(dx, dphi, dparams, scratch, *(() if dots is None else (dots,))),
    )
    ready = plan.chain.ready(*tensors)
    if ready is None:
        mix, dz, params, slabs = plan.scratch.views(scratch)
        finish, streams, reduce, *read = plan.launches
        if dots is not None:
            read[0](given_gu, x, dots)
        finish(proj, rstd, dcoef, given_dots, read_with, *alphas, bias, mix, dz, params)
        streams(x, given_g, given_gu, mix, dz, phi, dx, slabs)
        reduce(slabs, params, dphi, dparams)
        plan.chain.remember(*tensors)
        return dx, dphi, dparams, dots
    at, stream, starts = ready
    base = at[16]
    mix_at, dz_at, params_at, slabs_at = [base + offset for offset in plan.offsets]
    if dots is not None:
        starts[3](stream, at[2], at[0], at[17])
    starts[0](stream, *at[4:13], mix_at, dz_at, params_at)
    starts[1](stream, at[0], at[1], at[2], mix_at, dz_at, at[3], at[13], slabs_at)
    starts[2](stream, slabs_at, params_at, at[14], at[15])
    return dx, dphi, dparams, dots

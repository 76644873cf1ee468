"""One fused site as torch operators: schemas, fakes, autograd.

The operators (``torch.ops.mhc_layers.*``) are opaque to the compiler and visible to dispatch modes: selective
checkpointing, flop counting. They have no autograd of their own; two Functions around them do. The backward runs in
three phases: the write's backward (A) before the sublayer's, the read's (B1, finish, B2) after it. The gradient g of
the next streams travels from A to B2 through the graph, in the gradient slot of ``FusedState.link``, so no partial dx
is stored.

Shape legend: ... tokens, n streams, C channels, K = nC, N = n(n + 2) coefficients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from mhc_layers._fused_state import SiteParams, token_rows, without_data
from mhc_layers._operators import batched, optional_gradient, register
from mhc_layers._plain_backward import post_backward_composite, pre_backward_composite
from mhc_layers._streams import without_autocast
from mhc_layers.functional import compute_dtype
from mhc_layers.kernels.cost import register_formulas
from mhc_layers.kernels.options import padded_rows, site_options, streams_of
from mhc_layers.kernels.table import leaf

__all__ = [
    "Post",
    "Pre",
    "fake_post_backward",
    "fake_pre_backward",
    "fake_pre_forward",
    "post_gradients",
    "pre_gradients",
    "read_gradients",
    "read_streams",
]


# ---------------------------------------------------------------------------------------------------------------------
# Operators


def pre_forward(
    x: Tensor,
    phi: Tensor,
    bias: Tensor,
    alpha_pre: Tensor,
    alpha_post: Tensor,
    alpha_res: Tensor,
    previous: Tensor | None,
    options: str,
    norm: Tensor | None = None,
    norm_eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``u (..., C)``, ``coef`` and ``proj (..., N)``, ``rstd (...)``; ``previous (..., n)`` reads in place of h_pre.

    With the gain ``norm (C,)`` of a root-mean-square norm, u is normalised, and the last output is ``inverse (...)``.
    """
    x, phi = x.contiguous(), phi.contiguous()
    with without_autocast(x.device.type):
        slabs, squares = leaf("project", x)(x, phi)
        coef, proj, rstd = leaf("finish", x)(
            slabs,
            squares,
            (alpha_pre, alpha_post, alpha_res),
            bias.contiguous(),
            site_options(options),
            phi.shape[1],
            x.shape[:-2],
        )
        u, inverse = read_streams(x, coef if previous is None else token_rows(previous), norm, norm_eps)
    return u, coef, proj, rstd, inverse


def read_streams(
    x: Tensor, coef: Tensor, norm: Tensor | None, norm_eps: float, copies: int = 1
) -> tuple[Tensor, Tensor]:
    """``u (..., C)`` read with the first n of ``coef``, normalised if there is a gain, and ``inverse`` or nothing."""
    if norm is None:
        return leaf("read_forward", x)(x, coef, copies=copies), coef.new_empty((0,))
    u, inverse = leaf("read_norm_forward", x)(x, coef, norm.contiguous(), norm_eps, copies=copies)
    return u, inverse


def fake_pre_forward(
    x: Tensor,
    phi: Tensor,
    bias: Tensor,
    alpha_pre: Tensor,
    alpha_post: Tensor,
    alpha_res: Tensor,
    previous: Tensor | None,
    options: str,
    norm: Tensor | None = None,
    norm_eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    lead, dtype = x.shape[:-2], compute_dtype(x.dtype)
    rows = (*lead, phi.shape[0])
    return (
        x.new_empty((*lead, x.shape[-1])),
        x.new_empty(rows, dtype=dtype),
        x.new_empty(rows, dtype=dtype),
        x.new_empty(lead, dtype=dtype),
        x.new_empty((0,) if norm is None else lead, dtype=dtype),
    )


def post_forward(x: Tensor, f: Tensor, coef: Tensor) -> Tensor:
    """``x_next (..., n, C)``."""
    x = x.contiguous()
    with without_autocast(x.device.type):
        return leaf("write_forward", x)(x, f.contiguous(), coef.contiguous())


def fake_post_forward(x: Tensor, f: Tensor, coef: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def post_backward(
    g: Tensor, x: Tensor, f: Tensor, proj: Tensor, bias: Tensor, alpha_post: Tensor, options: str
) -> tuple[Tensor, Tensor]:
    """Phase A: ``df (..., C)`` and ``dcoef (..., N)`` of g = dL/dx_next."""
    x = x.contiguous()
    with without_autocast(x.device.type):
        return leaf("write_backward", x)(
            g.contiguous(),
            x,
            f.contiguous(),
            proj.contiguous(),
            alpha_post,
            bias.contiguous(),
            site_options(options),
        )


def fake_post_backward(
    g: Tensor, x: Tensor, f: Tensor, proj: Tensor, bias: Tensor, alpha_post: Tensor, options: str
) -> tuple[Tensor, Tensor]:
    return f.new_empty(f.shape), proj.new_empty(proj.shape)


def pre_backward(
    x: Tensor,
    phi: Tensor,
    bias: Tensor,
    alpha_pre: Tensor,
    alpha_post: Tensor,
    alpha_res: Tensor,
    previous: Tensor | None,
    proj: Tensor,
    rstd: Tensor,
    g: Tensor | None,
    gu: Tensor | None,
    dcoef: Tensor | None,
    options: str,
    norm: Tensor | None = None,
    inverse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Phases B1, finish, B2: ``dx``, ``dphi (N, K)``, ``dparams`` (dbias, at PAD(N) dalpha), ``dprevious (..., n)``.

    The last output is ``dnorm (C,)`` where the read was fused with a norm of gain ``norm``.
    """
    params = SiteParams(phi.contiguous(), bias.contiguous(), alpha_pre, alpha_post, alpha_res)
    x, g = x.contiguous(), None if g is None else g.contiguous()
    with without_autocast(x.device.type):
        found = read_gradients(x, gu, dcoef, params, options, proj, rstd, previous, norm, inverse)
        dx, slabs = leaf("streams_backward", x, optional=(g, found.gu))(x, g, found.gu, found.mix, found.dz, params.phi)
        dphi, dparams = leaf("reduce_slabs", x)(slabs, found.partials)
    return dx, dphi, dparams, optional_gradient(found.dots, previous, proj), optional_gradient(found.dnorm, norm, proj)


class ReadGradients(NamedTuple):
    """What the backward of a read gives to that of the streams, and gradients of what it read with.

    ``gu (..., C)`` is that of u as read, ``dots (..., n)`` that of the coefficients of the read, ``dnorm (C,)`` that of
    the norm's gain; they are None where nothing reached u, or nothing normalised it. The others are the leaf's
    ``finish_backward``.
    """

    gu: Tensor | None
    dots: Tensor | None
    dnorm: Tensor | None
    mix: Tensor
    dz: Tensor
    partials: Tensor


def read_gradients(
    x: Tensor,
    gu: Tensor | None,
    dcoef: Tensor | None,
    params: SiteParams,
    options: str,
    proj: Tensor,
    rstd: Tensor,
    previous: Tensor | None,
    norm: Tensor | None,
    inverse: Tensor | None,
    copies: int = 1,
) -> ReadGradients:
    """Phase B1 and the finish: inner products of the read, through its norm, and the adjoint of the coefficients.

    ``previous (..., n)`` are the coefficients of the read where they are not the site's own; ``copies`` says how many
    equal streams ``x (..., 1, C)`` stands for. Streams and parameters are contiguous.
    """
    convention, alphas = site_options(options), params[2:]
    proj, read = proj.contiguous(), None if previous is None else token_rows(previous)
    dots = dnorm = None
    if gu is not None:
        gu = gu.contiguous()
        if norm is None or inverse is None:
            dots = leaf("read_backward", x)(gu, x)
            if copies > 1:
                dots = dots.expand(*dots.shape[:-1], copies).contiguous()
        else:
            gu, dots, dnorm = leaf("read_norm_backward", x)(
                gu,
                x,
                norm.contiguous(),
                inverse.contiguous(),
                proj,
                params.alpha_pre,
                params.bias,
                convention,
                read,
                copies=copies,
            )
    mix, dz, partials = leaf("finish_backward", x)(
        proj,
        rstd.contiguous(),
        torch.zeros_like(proj) if dcoef is None else dcoef.contiguous(),
        dots if read is None else None,
        alphas,
        params.bias,
        convention,
        x.shape[-2] * x.shape[-1],
        x.dtype,
        read,
    )
    return ReadGradients(gu, dots, dnorm, mix, dz, partials)


def fake_pre_backward(
    x: Tensor,
    phi: Tensor,
    bias: Tensor,
    alpha_pre: Tensor,
    alpha_post: Tensor,
    alpha_res: Tensor,
    previous: Tensor | None,
    proj: Tensor,
    rstd: Tensor,
    g: Tensor | None,
    gu: Tensor | None,
    dcoef: Tensor | None,
    options: str,
    norm: Tensor | None = None,
    inverse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        proj.new_empty(phi.shape),
        proj.new_empty((padded_rows(phi.shape[0]) + 4,)),
        proj.new_empty((0,) if previous is None else previous.shape),
        proj.new_empty((0,) if norm is None else norm.shape),
    )


PRE_FORWARD = register(pre_forward, fake_pre_forward)
POST_FORWARD = register(post_forward, fake_post_forward)
POST_BACKWARD = register(post_backward, fake_post_backward)
PRE_BACKWARD = register(pre_backward, fake_pre_backward)
register_formulas("pre_forward", "post_forward", "post_backward", "pre_backward")


# ---------------------------------------------------------------------------------------------------------------------
# Autograd


class Pre(Function):
    """``(x, parameters, previous, options, norm, eps) -> u, coef, link, proj, rstd, inverse``, as in ``FusedState``."""

    @staticmethod
    def forward(
        x: Tensor,
        phi: Tensor,
        bias: Tensor,
        alpha_pre: Tensor,
        alpha_post: Tensor,
        alpha_res: Tensor,
        previous: Tensor | None,
        options: str,
        norm: Tensor | None = None,
        norm_eps: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        u, coef, proj, rstd, inverse = PRE_FORWARD(
            x, phi, bias, alpha_pre, alpha_post, alpha_res, previous, options, norm, norm_eps
        )
        return u, coef, without_data(x, x.shape), proj, rstd, inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.options, norm, ctx.norm_eps = inputs
        proj, rstd, inverse = output[3:]
        ctx.mark_non_differentiable(proj, rstd, inverse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, proj, rstd, norm, None if norm is None else inverse)

    @staticmethod
    def backward(
        ctx: Any, gu: Tensor | None, dcoef: Tensor | None, g: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return pre_gradients(ctx, PRE_BACKWARD, gu, dcoef, g)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return batched(Pre, info, in_dims, args, num_data=1, optional_data=(6,))


def pre_gradients(
    ctx: Any, operator: Callable[..., Any], gu: Tensor | None, dcoef: Tensor | None, g: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs of :class:`Pre`, from an operator like ``pre_backward``, or differentiable ones."""
    if gu is None and dcoef is None and g is None:
        return (None,) * 10
    x, *rest, previous, proj, rstd, norm, inverse = ctx.saved_tensors
    params, options = SiteParams(*rest), ctx.options
    if torch.is_grad_enabled():
        streams = all_streams(x, params)
        dx, *found, dnorm = pre_backward_composite(gu, g, dcoef, streams, params, previous, options, norm, ctx.norm_eps)
        if dx is not None and streams is not x:
            dx = dx.sum(-2, keepdim=True)
        return dx, *found, None, dnorm, None
    dx, dphi, dparams, dprevious, dnorm = operator(
        x, *params, previous, proj, rstd, g, gu, dcoef, options, norm, inverse
    )
    dprevious, dnorm = None if previous is None else dprevious, None if norm is None else dnorm
    return dx, *SiteParams.of_gradients(dphi, dparams), dprevious, None, dnorm, None


def all_streams(x: Tensor, params: SiteParams) -> Tensor:
    """The n streams: ``x (..., n, C)`` itself, or one that stands for them, expanded."""
    n = streams_of(params.phi.shape[0])
    return x if x.shape[-2] == n else x.expand(*x.shape[:-2], n, -1)


class Post(Function):
    """``(x, link, f, coef, proj, parameters, options) -> x_next``; the gradient of ``link`` is that of ``x_next``."""

    @staticmethod
    def forward(
        x: Tensor,
        link: Tensor,
        f: Tensor,
        coef: Tensor,
        proj: Tensor,
        phi: Tensor,
        bias: Tensor,
        alpha_pre: Tensor,
        alpha_post: Tensor,
        alpha_res: Tensor,
        options: str,
    ) -> Tensor:
        return POST_FORWARD(x, f, coef)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, f, _, proj, *params, ctx.options = inputs
        ctx.save_for_backward(x, f, proj, *params)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return post_gradients(ctx, POST_BACKWARD, g)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return batched(Post, info, in_dims, args, num_data=5)


def post_gradients(ctx: Any, operator: Callable[..., Any], g: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs of :class:`Post`, from an operator like ``post_backward``, or differentiable ones."""
    x, f, proj, *rest = ctx.saved_tensors
    params = SiteParams(*rest)
    if torch.is_grad_enabled():
        df, dcoef = post_backward_composite(g, all_streams(x, params), f, params, ctx.options)
    else:
        df, dcoef = operator(g, x, f, proj, params.bias, params.alpha_post, ctx.options)
    return None, g, df, dcoef, *(None,) * 7

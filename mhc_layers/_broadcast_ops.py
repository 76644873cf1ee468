"""The first site of a model as operators: its n streams are copies of one embedding e, which is read in their place.

The same functions of e as the site's of n equal streams (``docs/derivations/broadcast_first_site``): the projection
uses phi summed over the streams, the gradient of e is the sum of theirs. Streams of the shape ``(..., 1, C)`` stand for
the copies. Two pairs of operators and two Functions, as in :mod:`mhc_layers._site_ops`.

Shape legend: ... tokens, n streams, C channels, N = n(n + 2) coefficients; e is ``(..., 1, C)``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mhc_layers._fused_state import FusedState, SiteParams, token_rows, without_data
from mhc_layers._operators import apply, batched, optional_gradient, register
from mhc_layers._site_ops import (
    Post,
    Pre,
    fake_post_backward,
    fake_pre_backward,
    fake_pre_forward,
    post_gradients,
    pre_gradients,
    read_gradients,
    read_streams,
)
from mhc_layers._streams import without_autocast
from mhc_layers.kernels.cost import register_formulas
from mhc_layers.kernels.options import site_options, streams_of
from mhc_layers.kernels.table import leaf

__all__ = ["broadcast_post", "broadcast_pre"]


def _summed(phi: Tensor, num_streams: int) -> Tensor:
    """Sum of phi over the streams, ``(N, C)``."""
    return phi.unflatten(1, (num_streams, -1)).sum(1)


def broadcast_pre_forward(
    e: Tensor,
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
    """What ``pre_forward`` returns for n copies of e."""
    e, n = e.contiguous(), streams_of(phi.shape[0])
    with without_autocast(e.device.type):
        slabs, squares = leaf("project", e)(e, _summed(phi, n))
        alphas = (alpha_pre, alpha_post, alpha_res)
        coef, proj, rstd = leaf("finish", e)(
            slabs, squares, alphas, bias.contiguous(), site_options(options), e.shape[-1], e.shape[:-2]
        )
        u, inverse = read_streams(e, coef if previous is None else token_rows(previous), norm, norm_eps, copies=n)
    return u, coef, proj, rstd, inverse


def broadcast_pre_backward(
    e: Tensor,
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
    """What ``pre_backward`` returns for n copies of e, with ``de``, the sum of their gradients, first."""
    params, n = SiteParams(phi, bias.contiguous(), alpha_pre, alpha_post, alpha_res), streams_of(phi.shape[0])
    e, g = e.contiguous(), None if g is None else g.contiguous()
    with without_autocast(e.device.type):
        found = read_gradients(e, gu, dcoef, params, options, proj, rstd, previous, norm, inverse, copies=n)
        de, slabs = leaf("broadcast_streams_backward", e)(e, g, found.gu, found.mix, found.dz, _summed(phi, n))
        dphi, dparams = leaf("reduce_slabs", e)(slabs, found.partials)
    dprevious, dnorm = optional_gradient(found.dots, previous, proj), optional_gradient(found.dnorm, norm, proj)
    return de, dphi.repeat(1, n), dparams, dprevious, dnorm


def broadcast_post_forward(e: Tensor, f: Tensor, coef: Tensor) -> Tensor:
    """``x_next (..., n, C)``, written from n copies of e."""
    with without_autocast(e.device.type):
        return leaf("broadcast_write_forward", e)(e.contiguous(), f.contiguous(), coef.contiguous())


def _fake_broadcast_post_forward(e: Tensor, f: Tensor, coef: Tensor) -> Tensor:
    return e.new_empty((*e.shape[:-2], streams_of(coef.shape[-1]), e.shape[-1]))


def broadcast_post_backward(
    g: Tensor, e: Tensor, f: Tensor, proj: Tensor, bias: Tensor, alpha_post: Tensor, options: str
) -> tuple[Tensor, Tensor]:
    """``df (..., C)`` and ``dcoef (..., N)`` of g = dL/dx_next."""
    e = e.contiguous()
    with without_autocast(e.device.type):
        return leaf("broadcast_write_backward", e)(
            g.contiguous(),
            e,
            f.contiguous(),
            proj.contiguous(),
            alpha_post,
            bias.contiguous(),
            site_options(options),
        )


PRE_FORWARD = register(broadcast_pre_forward, fake_pre_forward)
PRE_BACKWARD = register(broadcast_pre_backward, fake_pre_backward)
POST_FORWARD = register(broadcast_post_forward, _fake_broadcast_post_forward)
POST_BACKWARD = register(broadcast_post_backward, fake_post_backward)
register_formulas(*(f"broadcast_{step}" for step in ("pre_forward", "pre_backward", "post_forward", "post_backward")))


class BroadcastPre(Pre):
    """``(e, parameters, previous, options, norm, eps)`` to what ``Pre`` returns for n copies of e."""

    @staticmethod
    def forward(
        e: Tensor,
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
            e, phi, bias, alpha_pre, alpha_post, alpha_res, previous, options, norm, norm_eps
        )
        link = (*e.shape[:-2], streams_of(phi.shape[0]), e.shape[-1])
        return u, coef, without_data(e, link), proj, rstd, inverse

    @staticmethod
    def backward(
        ctx: Any, gu: Tensor | None, dcoef: Tensor | None, g: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return pre_gradients(ctx, PRE_BACKWARD, gu, dcoef, g)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return batched(BroadcastPre, info, in_dims, args, num_data=1, optional_data=(6,))


class BroadcastPost(Post):
    """``(e, link, f, coef, proj, parameters, options) -> x_next``; the gradient of ``link`` is that of ``x_next``."""

    @staticmethod
    def forward(
        e: Tensor,
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
        return POST_FORWARD(e, f, coef)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return post_gradients(ctx, POST_BACKWARD, g)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return batched(BroadcastPost, info, in_dims, args, num_data=5)


def broadcast_pre(
    e: Tensor, params: SiteParams, previous: Tensor | None, options: str, norm: Tensor | None, norm_eps: float
) -> tuple[Tensor, FusedState]:
    """Read the first site of a model.

    Parameters
    ----------
    e : Tensor
        ``(..., 1, C)``, in place of n copies.
    params : SiteParams
        Of the site.
    previous : Tensor or None
        Coefficients that the site is read with, where they are not its own.
    options : str
        Its convention, from :func:`mhc_layers.kernels.options.options_key`.
    norm : Tensor or None
        Gain ``(C,)`` of the norm that ends the read.
    norm_eps : float
        The norm's epsilon.

    Returns
    -------
    u : Tensor
        ``(..., C)``.
    state : FusedState
        For :func:`broadcast_post`.
    """
    u, coef, link, proj, rstd, _ = apply(BroadcastPre, e, *params, previous, options, norm, norm_eps)
    return u, FusedState(coef, link, proj, rstd, params, options)


def broadcast_post(e: Tensor, f: Tensor, state: FusedState) -> Tensor:
    """Write the streams ``(..., n, C)`` after the first site."""
    return apply(BroadcastPost, e, state.link, f.to(e.dtype), state.coef, state.proj, *state.params, state.options)

"""The boundary of two fused sites as one step: write of site l, projection and read of site l + 1, and the backward.

Two operators and a Function, like those of :mod:`mhc_layers._site_ops`. The gradient of the streams between the sites
is formed once, and starts the backward of site l's write while it is on chip.

Shape legend: ... tokens, n streams, C channels, K = nC, N = n(n + 2) coefficients; "next" is site l + 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from mhc_layers._fused_state import FusedState, SiteParams, without_data
from mhc_layers._operators import apply, batched, optional_gradient, register
from mhc_layers._plain_backward import post_backward_composite, pre_backward_composite
from mhc_layers._site_ops import read_gradients, read_streams
from mhc_layers._streams import without_autocast
from mhc_layers.kernels.cost import register_formulas
from mhc_layers.kernels.options import padded_rows, site_options
from mhc_layers.kernels.table import leaf

__all__ = ["boundary"]


def boundary_forward(
    x: Tensor,
    f: Tensor,
    coef: Tensor,
    phi: Tensor,
    bias: Tensor,
    alpha_pre: Tensor,
    alpha_post: Tensor,
    alpha_res: Tensor,
    options: str,
    delayed: bool,
    norm: Tensor | None = None,
    norm_eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``x_next (..., n, C)``, ``u_next (..., C)``, and the next site's ``coef``, ``proj (..., N)`` and ``rstd (...)``.

    ``coef`` is site l's, the parameters are the next site's. ``delayed``: the next site reads with site l's h_pre.
    With the gain ``norm (C,)``, u_next is normalised, and the last output is ``inverse (...)``.
    """
    x, f, coef, phi = x.contiguous(), f.contiguous(), coef.contiguous(), phi.contiguous()
    with without_autocast(x.device.type):
        u, k, lead = None, phi.shape[1], x.shape[:-2]
        single_pass = leaf("boundary_read_forward", x, required=False) if delayed else None
        write_and_project = leaf("boundary_forward", x, required=False)
        if single_pass is not None:
            x_next, u, slabs, squares = single_pass(x, f, coef, phi)
        elif write_and_project is not None:
            x_next, slabs, squares = write_and_project(x, f, coef, phi)
        else:
            x_next = leaf("write_forward", x)(x, f, coef)
            slabs, squares = leaf("project", x)(x_next, phi)
        alphas = (alpha_pre, alpha_post, alpha_res)
        next_coef, proj, rstd = leaf("finish", x)(
            slabs, squares, alphas, bias.contiguous(), site_options(options), k, lead
        )
        if u is None:
            u, inverse = read_streams(x_next, coef if delayed else next_coef, norm, norm_eps)
        elif norm is None:
            inverse = rstd.new_empty((0,))
        else:
            u, inverse = leaf("norm_rows", x)(u, norm.contiguous(), norm_eps)
    return x_next, u, next_coef, proj, rstd, inverse


def _fake_boundary_forward(
    x: Tensor,
    f: Tensor,
    coef: Tensor,
    phi: Tensor,
    bias: Tensor,
    alpha_pre: Tensor,
    alpha_post: Tensor,
    alpha_res: Tensor,
    options: str,
    delayed: bool,
    norm: Tensor | None = None,
    norm_eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    lead = x.shape[:-2]
    rows = (*lead, phi.shape[0])
    return (
        x.new_empty(x.shape),
        x.new_empty((*lead, x.shape[-1])),
        coef.new_empty(rows),
        coef.new_empty(rows),
        coef.new_empty(lead),
        coef.new_empty((0,) if norm is None else lead),
    )


def boundary_backward(
    x: Tensor,
    gx: Tensor | None,
    gu: Tensor | None,
    dcoef: Tensor | None,
    g: Tensor | None,
    f: Tensor,
    coef: Tensor | None,
    proj: Tensor,
    bias: Tensor,
    alpha_post: Tensor,
    options: str,
    x_next: Tensor,
    next_proj: Tensor,
    next_rstd: Tensor,
    next_phi: Tensor,
    next_bias: Tensor,
    next_alpha_pre: Tensor,
    next_alpha_post: Tensor,
    next_alpha_res: Tensor,
    next_options: str,
    norm: Tensor | None = None,
    inverse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the streams between the sites, f, site l's coef, the next site's phi, its dbias and dalpha, norm.

    ``g`` is that of the streams which the next site wrote, ``gx`` what reaches those between the sites from outside.
    ``coef`` is site l's where the next site reads with its h_pre, else None. ``x`` comes first because torch 2.11
    asks the first argument of an operator for the device mesh.
    """
    x, f, bias, n = x.contiguous(), f.contiguous(), bias.contiguous(), x.shape[-2]
    g = None if g is None else g.contiguous()
    following = SiteParams(
        next_phi.contiguous(), next_bias.contiguous(), next_alpha_pre, next_alpha_post, next_alpha_res
    )
    previous, before = None if coef is None else coef[..., :n], site_options(options)
    with without_autocast(x.device.type):
        gu, dots, dnorm, mix, dz, partials = read_gradients(
            x_next, gu, dcoef, following, next_options, next_proj, next_rstd, previous, norm, inverse
        )
        chained = None
        if gx is None and g is not None and gu is not None:
            chained = leaf("streams_backward_chained", x, required=False)
        if chained is not None:
            dx, slabs, df, before_dcoef = chained(
                x_next, g, gu, mix, dz, following.phi, x, f, proj, alpha_post, bias, before.post_multiplier
            )
        else:
            dx, slabs = leaf("streams_backward", x, optional=(g, gu))(x_next, g, gu, mix, dz, following.phi)
            dx = dx if gx is None else dx + gx
            df, before_dcoef = leaf("write_backward", x)(dx, x, f, proj, alpha_post, bias, before)
        if previous is not None and dots is not None:
            before_dcoef[..., :n] = dots.view(*before_dcoef.shape[:-1], n)
        dphi, dparams = leaf("reduce_slabs", x)(slabs, partials)
    return dx, df, before_dcoef, dphi, dparams, optional_gradient(dnorm, norm, proj)


def _fake_boundary_backward(
    x: Tensor,
    gx: Tensor | None,
    gu: Tensor | None,
    dcoef: Tensor | None,
    g: Tensor | None,
    f: Tensor,
    coef: Tensor | None,
    proj: Tensor,
    bias: Tensor,
    alpha_post: Tensor,
    options: str,
    x_next: Tensor,
    next_proj: Tensor,
    next_rstd: Tensor,
    next_phi: Tensor,
    next_bias: Tensor,
    next_alpha_pre: Tensor,
    next_alpha_post: Tensor,
    next_alpha_res: Tensor,
    next_options: str,
    norm: Tensor | None = None,
    inverse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        f.new_empty(f.shape),
        proj.new_empty(proj.shape),
        proj.new_empty(next_phi.shape),
        proj.new_empty((padded_rows(next_phi.shape[0]) + 4,)),
        proj.new_empty((0,) if norm is None else norm.shape),
    )


BOUNDARY_FORWARD = register(boundary_forward, _fake_boundary_forward)
BOUNDARY_BACKWARD = register(boundary_backward, _fake_boundary_backward)
register_formulas("boundary_forward", "boundary_backward")


class Boundary(Function):
    """``(x, link, f, coef, proj, parameters, options | the next site's)`` to x_next and what ``Pre`` returns."""

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
        next_phi: Tensor,
        next_bias: Tensor,
        next_alpha_pre: Tensor,
        next_alpha_post: Tensor,
        next_alpha_res: Tensor,
        next_options: str,
        delayed: bool,
        norm: Tensor | None = None,
        norm_eps: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        next_params = (next_phi, next_bias, next_alpha_pre, next_alpha_post, next_alpha_res)
        x_next, u, next_coef, next_proj, rstd, inverse = BOUNDARY_FORWARD(
            x, f, coef, *next_params, next_options, delayed, norm, norm_eps
        )
        return x_next, u, next_coef, without_data(x, x.shape), next_proj, rstd, inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, _, f, coef, proj, *params = inputs[:10]
        ctx.options, *next_params, ctx.next_options, delayed, norm, ctx.norm_eps = inputs[10:]
        x_next, _, _, _, next_proj, rstd, inverse = output
        ctx.mark_non_differentiable(next_proj, rstd, inverse)
        ctx.set_materialize_grads(False)
        kept = coef if delayed else None
        scale = None if norm is None else inverse
        ctx.save_for_backward(x, f, kept, proj, *params, x_next, next_proj, rstd, *next_params, norm, scale)

    @staticmethod
    def backward(
        ctx: Any, gx: Tensor | None, gu: Tensor | None, dcoef: Tensor | None, g: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if gx is None and gu is None and dcoef is None and g is None:
            return (None,) * 20
        # asked for once: the hooks of a recompute block hand each tensor out once
        x, f, coef, proj, *saved, norm, inverse = ctx.saved_tensors
        params, (x_next, next_proj, rstd), next_params = saved[:5], saved[5:8], saved[8:]
        if torch.is_grad_enabled():
            previous = None if coef is None else coef[..., : x.shape[-2]]
            dx, *dnext, dprevious, dnorm = pre_backward_composite(
                gu, g, dcoef, x_next, SiteParams(*next_params), previous, ctx.next_options, norm, ctx.norm_eps
            )
            terms = [term for term in (dx, gx) if term is not None]
            dx = torch.stack(terms).sum(0) if terms else torch.zeros_like(x_next)
            df, before_dcoef = post_backward_composite(dx, x, f, SiteParams(*params), ctx.options)
            if dprevious is not None:
                before_dcoef = torch.cat([dprevious, before_dcoef[..., x.shape[-2] :]], -1)
        else:
            _, bias, _, alpha_post, _ = params
            dx, df, before_dcoef, dphi, dparams, dnorm = BOUNDARY_BACKWARD(
                x,
                gx,
                gu,
                dcoef,
                g,
                f,
                coef,
                proj,
                bias,
                alpha_post,
                ctx.options,
                x_next,
                next_proj,
                rstd,
                *next_params,
                ctx.next_options,
                norm,
                inverse,
            )
            dnext = list(SiteParams.of_gradients(dphi, dparams))
        return None, dx, df, before_dcoef, *(None,) * 7, *dnext, None, None, None if norm is None else dnorm, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return batched(Boundary, info, in_dims, args, num_data=5)


def boundary(
    x: Tensor,
    f: Tensor,
    state: FusedState,
    params: SiteParams,
    options: str,
    delayed: bool,
    norm: Tensor | None = None,
    norm_eps: float = 0.0,
) -> tuple[Tensor, Tensor, FusedState]:
    """Write the streams of a site and read them for the next one.

    Parameters
    ----------
    x : Tensor
        Streams that entered the site, ``(..., n, C)``.
    f : Tensor
        Its sublayer's output ``(..., C)``.
    state : FusedState
        What its read returned.
    params : SiteParams
        Of the site that reads what is written here.
    options : str
        Its convention, from :func:`mhc_layers.kernels.options.options_key`.
    delayed : bool
        Whether it reads with the ``h_pre`` of ``state``.
    norm : Tensor, optional
        Gain ``(C,)`` of the root-mean-square norm that ends its read.
    norm_eps : float
        The norm's epsilon.

    Returns
    -------
    x_next : Tensor
        ``(..., n, C)``.
    u_next : Tensor
        ``(..., C)``.
    state_next : FusedState
        For the next site's write, or its boundary.
    """
    x_next, u, coef, link, proj, rstd, _ = apply(
        Boundary,
        x,
        state.link,
        f.to(x.dtype),
        state.coef,
        state.proj,
        *state.params,
        state.options,
        *params,
        options,
        delayed,
        norm,
        norm_eps,
    )
    return x_next, u, FusedState(coef, link, proj, rstd, params, options)

"""The fused site as torch operators: schemas, fakes, backward, and the object that a model calls.

The operators (``torch.ops.mhc_layers.*``) are opaque to the compiler and visible to dispatch modes: selective
checkpointing, flop counting. They have no autograd of their own; two Functions around them do. The backward runs in
three phases: the write's backward (A) before the sublayer's, the read's (B1, finish, B2) after it. The gradient g of
the next streams travels from A to B2 through the graph, in the gradient slot of ``FusedState.link``, so no partial dx
is stored.

Shape legend: ... tokens, n streams, C channels, K = nC, N = n(n + 2) coefficients.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from mhc_layers._boundary_ops import boundary
from mhc_layers._broadcast_ops import broadcast_post, broadcast_pre
from mhc_layers._fused_state import FusedState, SiteParams, fused_norm, token_rows
from mhc_layers._operators import apply, batched, optional_gradient, register
from mhc_layers._plain_backward import post_backward_composite, pre_backward_composite, pre_composite
from mhc_layers._sharding import is_distributed, register_rules, replicated_like
from mhc_layers._sites import FUNCTIONAL, SiteState
from mhc_layers._streams import without_autocast
from mhc_layers.conventions import Convention
from mhc_layers.functional import expand_streams
from mhc_layers.kernels import plain
from mhc_layers.kernels.cost import register_formulas
from mhc_layers.kernels.options import options_key, padded_rows, site_options
from mhc_layers.kernels.table import leaf

if TYPE_CHECKING:
    from mhc_layers.hyper_connection import HyperConnection

__all__ = ["FusedSite", "first_stream", "fused_site"]


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
    x, phi, bias = x.contiguous(), phi.contiguous(), bias.contiguous()
    alphas, before = (alpha_pre, alpha_post, alpha_res), None if previous is None else token_rows(previous)
    chain = leaf("site_forward", x, required=False) if norm is None else None
    if chain is not None:
        u, coef, proj, rstd = chain(x, phi, alphas, bias, site_options(options), before)
        return u, coef, proj, rstd, rstd.new_empty((0,))
    with without_autocast(x.device.type):
        slabs, squares = leaf("project", x)(x, phi)
        coef, proj, rstd = leaf("finish", x)(
            slabs, squares, alphas, bias, site_options(options), phi.shape[1], x.shape[:-2]
        )
        read = coef if before is None else before
        if norm is None:
            u, inverse = leaf("read_forward", x)(x, read), rstd.new_empty((0,))
        else:
            u, inverse = leaf("read_norm_forward", x)(x, read, norm.contiguous(), norm_eps)
    return u, coef, proj, rstd, inverse


def _fake_pre_forward(
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
    lead, dtype = x.shape[:-2], _coefficient_dtype(x)
    rows = (*lead, phi.shape[0])
    return (
        x.new_empty((*lead, x.shape[-1])),
        x.new_empty(rows, dtype=dtype),
        x.new_empty(rows, dtype=dtype),
        x.new_empty(lead, dtype=dtype),
        x.new_empty((0,) if norm is None else lead, dtype=dtype),
    )


def _coefficient_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def post_forward(x: Tensor, f: Tensor, coef: Tensor) -> Tensor:
    """``x_next (..., n, C)``."""
    x = x.contiguous()
    with without_autocast(x.device.type):
        return leaf("write_forward", x)(x, f.contiguous(), coef.contiguous())


def _fake_post_forward(x: Tensor, f: Tensor, coef: Tensor) -> Tensor:
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


def _fake_post_backward(
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
    x, phi, bias, proj, rstd = (tensor.contiguous() for tensor in (x, phi, bias, proj, rstd))
    g = None if g is None else g.contiguous()
    gu = None if gu is None else gu.contiguous()
    dcoef = torch.zeros_like(proj) if dcoef is None else dcoef.contiguous()
    alphas, read = (alpha_pre, alpha_post, alpha_res), None if previous is None else token_rows(previous)
    chain, dnorm = leaf("site_backward", x, required=False) if norm is None else None, None
    if chain is not None:
        dx, dphi, dparams, dots = chain(x, g, gu, phi, alphas, bias, proj, rstd, dcoef, site_options(options), read)
    else:
        with without_autocast(x.device.type):
            dots = None
            if gu is not None and (norm is None or inverse is None):
                dots = leaf("read_backward", x)(gu, x)
            elif gu is not None and norm is not None and inverse is not None:
                gu, dots, dnorm = leaf("read_norm_backward", x)(
                    gu, x, norm.contiguous(), inverse.contiguous(), proj, alpha_pre, bias, site_options(options), read
                )
            mix, dz, partials = leaf("finish_backward", x)(
                proj,
                rstd,
                dcoef,
                dots if read is None else None,
                alphas,
                bias,
                site_options(options),
                phi.shape[1],
                x.dtype,
                read,
            )
            dx, slabs = leaf("streams_backward", x, optional=(g, gu))(x, g, gu, mix, dz, phi)
            dphi, dparams = leaf("reduce_slabs", x)(slabs, partials)
    return dx, dphi, dparams, optional_gradient(dots, previous, proj), optional_gradient(dnorm, norm, proj)


def _fake_pre_backward(
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


PRE_FORWARD = register(pre_forward, _fake_pre_forward)
POST_FORWARD = register(post_forward, _fake_post_forward)
POST_BACKWARD = register(post_backward, _fake_post_backward)
PRE_BACKWARD = register(pre_backward, _fake_pre_backward)
register_formulas(
    "pre_forward", "post_forward", "post_backward", "pre_backward", "boundary_forward", "boundary_backward"
)


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
        return u, coef, x.new_empty(()).expand(x.shape), proj, rstd, inverse

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
        x, *rest, previous, proj, rstd, norm, inverse = ctx.saved_tensors
        params, options = SiteParams(*rest), ctx.options
        if gu is None and dcoef is None and g is None:
            return (None,) * 10
        if torch.is_grad_enabled():
            *found, dnorm = pre_backward_composite(gu, g, dcoef, x, params, previous, options, norm, ctx.norm_eps)
            return *found, None, dnorm, None
        dx, dphi, dparams, dprevious, dnorm = PRE_BACKWARD(
            x, *params, previous, proj, rstd, g, gu, dcoef, options, norm, inverse
        )
        dprevious, dnorm = None if previous is None else dprevious, None if norm is None else dnorm
        return dx, *SiteParams.of_gradients(dphi, dparams), dprevious, None, dnorm, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return batched(Pre, info, in_dims, args, num_data=1, optional_data=(6,))


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
        x, f, proj, *rest = ctx.saved_tensors
        params = SiteParams(*rest)
        if torch.is_grad_enabled():
            df, dcoef = post_backward_composite(g, x, f, params, ctx.options)
        else:
            df, dcoef = POST_BACKWARD(g, x, f, proj, params.bias, params.alpha_post, ctx.options)
        return None, g, df, dcoef, *(None,) * 7

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return batched(Post, info, in_dims, args, num_data=5)


# ---------------------------------------------------------------------------------------------------------------------
# The site


class FusedSite:
    """The steps of a site as fused kernels.

    Streams are bfloat16, float16 or float32 and keep their dtype, inside autocast too; coefficients are float32.
    Gradients of gradients and forward mode are computed in plain torch; float64 streams run the functional row. Streams
    that are a ``DTensor``, sharded along tokens, run the same operators on every process's share, with parameters that
    are replicated ``DTensor`` (:mod:`mhc_layers._sharding`).

    Parameters
    ----------
    convention : Convention
        Of every site that this object runs.
    """

    folds_broadcast = True

    def __init__(self, convention: Convention) -> None:
        self.convention = convention
        self.options = options_key(convention)

    def pre(
        self, x: Tensor, site: HyperConnection, previous: Tensor | None = None
    ) -> tuple[Tensor, FusedState | SiteState]:
        """Read: ``u (..., C)`` and the state for :meth:`post`."""
        params, folded = SiteParams.of(site), x.shape[-2] != site.num_streams
        plainly = _runs_plainly(x, params)
        if folded and (plainly or _forward_mode()):
            x, folded = expand_streams(x.squeeze(-2), site.num_streams), False
        if plainly:
            return FUNCTIONAL.pre(x, site, previous)
        options = self.options
        if not self.convention.read_delay:
            previous = None
        elif previous is None:
            previous = first_stream(x.expand(*x.shape[:-2], site.num_streams, -1))
        norm, norm_eps = fused_norm(site, x)
        if folded:
            u, state = broadcast_pre(x, params, previous, options, norm, norm_eps)
        elif _forward_mode():
            u, coef, proj, rstd = pre_composite(x, params, previous, options, norm, norm_eps)
            state = FusedState(coef, x, proj, rstd, params, options)
        else:
            u, coef, link, proj, rstd, _ = apply(Pre, x, *params, previous, options, norm, norm_eps)
            state = FusedState(coef, link, proj, rstd, params, options)
        return (u if norm is not None else site.normed(u)), state

    def post(self, x: Tensor, f: Tensor, state: FusedState | SiteState) -> Tensor:
        """Write: the next streams."""
        if not isinstance(state, FusedState):
            return FUNCTIONAL.post(x, f, state)
        folded = x.shape[-2] != state.num_streams
        if _forward_mode():
            x = expand_streams(x.squeeze(-2), state.num_streams) if folded else x
            return plain.write_forward(x, f, state.coef)
        if folded:
            return broadcast_post(x, f, state)
        return apply(Post, x, state.link, f.to(x.dtype), state.coef, state.proj, *state.params, state.options)

    def boundary(
        self, x: Tensor, f: Tensor, state: FusedState | SiteState, next_site: HyperConnection
    ) -> tuple[Tensor, Tensor, FusedState | SiteState]:
        """``post`` of a site and ``pre`` of the next one, in one pass over the streams where they are fused."""
        params = SiteParams.of(next_site)
        folded = isinstance(state, FusedState) and x.shape[-2] != state.num_streams
        if not isinstance(state, FusedState) or folded or _runs_plainly(x, params) or _forward_mode():
            x = self.post(x, f, state)
            return x, *self.pre(x, next_site, state.h_pre)
        norm, norm_eps = fused_norm(next_site, x)
        x, u, state = boundary(x, f, state, params, self.options, bool(self.convention.read_delay), norm, norm_eps)
        return x, (u if norm is not None else next_site.normed(u)), state

    def warm_up(self, site: HyperConnection, dtype: torch.dtype = torch.bfloat16) -> None:
        """Compile every kernel that the training of a site needs, on its device, for streams of a dtype.

        The number of tokens is an argument of the kernels; only few tokens (up to 32) and many have kernels of their
        own. So two small batches are enough, and no later batch size compiles anything. A site of index 0 is also run
        from one stream in place of equal ones. Gradients of the site's parameters are not touched.
        """
        n, c = site.num_streams, site.dim
        for tokens in (1, 64):
            x = torch.zeros(tokens, n, c, dtype=dtype, device=site.phi.device, requires_grad=True)
            with torch.enable_grad():
                u, state = self.pre(x, site)
                y, u, state = self.boundary(x, u, state, site)
                y = self.post(y, u, state)
            torch.autograd.grad(y, [x, *SiteParams.of(site)], torch.zeros_like(y), allow_unused=True)
            if site.index == 0 and n > 1:
                e = x[:, :1].detach().requires_grad_()
                with torch.enable_grad():
                    u, state = self.pre(e, site)
                    y = self.post(e, u, state)
                torch.autograd.grad(y, [e, *SiteParams.of(site)], torch.zeros_like(y), allow_unused=True)


def _forward_mode() -> bool:
    """Whether a forward-mode derivative is being taken; never while compiling."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def _runs_plainly(x: Tensor, params: SiteParams) -> bool:
    """Whether a site runs the functional row: float64, or parameters sharded otherwise than operators can have them."""
    distributed = is_distributed(x) and register_rules()
    return x.dtype == torch.float64 or (is_distributed(params.phi) and not distributed)


def first_stream(x: Tensor) -> Tensor:
    """A delayed read has nothing before the first site: it reads stream 0."""
    weights = torch.zeros(x.shape[-2], dtype=_coefficient_dtype(x), device=x.device)
    weights[0] = 1.0
    return replicated_like(weights, x).expand(x.shape[:-1])


@functools.lru_cache(maxsize=64)
def fused_site(convention: Convention) -> FusedSite:
    """Return the object that runs fused sites of a convention; one a convention, so that boundaries can fuse."""
    return FusedSite(convention)

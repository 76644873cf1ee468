"""The fused site: the object that a model calls, on the operators of one site, a boundary and a first site."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mhc_layers._boundary_ops import boundary
from mhc_layers._broadcast_ops import broadcast_post, broadcast_pre
from mhc_layers._fused_state import FusedState, SiteParams, fused_norm
from mhc_layers._operators import apply
from mhc_layers._plain_backward import pre_composite
from mhc_layers._sharding import is_distributed, register_rules, replicated_like
from mhc_layers._site_ops import Post, Pre
from mhc_layers._sites import FUNCTIONAL, SiteState
from mhc_layers.conventions import Convention
from mhc_layers.functional import compute_dtype, expand_streams
from mhc_layers.kernels import plain
from mhc_layers.kernels.options import options_key

if TYPE_CHECKING:
    from mhc_layers.hyper_connection import HyperConnection

__all__ = ["FusedSite", "first_stream", "fused_site"]


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
    """Weights ``(..., n)`` that read stream 0 of ``x (..., n, C)``: a delayed read has no site before the first."""
    weights = torch.zeros(x.shape[-2], dtype=compute_dtype(x.dtype), device=x.device)
    weights[0] = 1.0
    return replicated_like(weights, x).expand(x.shape[:-1])


@functools.lru_cache(maxsize=64)
def fused_site(convention: Convention) -> FusedSite:
    """Return the object that runs fused sites of a convention; one a convention, so that boundaries can fuse."""
    return FusedSite(convention)

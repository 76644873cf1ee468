"""How a site is executed: the three steps, and the plain-torch objects that run them.

A *site implementation* is an object with the methods of :class:`SiteImplementation`. A model chooses one for each
site when it is built (:mod:`mhc_layers._registry`) and then only calls these three steps, so a fused kernel slots in
without a change to the layer, the model or the trainer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

from torch import Tensor

from mhc_layers import _streams, functional

if TYPE_CHECKING:
    from mhc_layers.hyper_connection import HyperConnection

__all__ = ["FUNCTIONAL", "RESIDUAL", "FunctionalSite", "RefusedSite", "ResidualSite", "SiteImplementation", "SiteState"]


class SiteState(NamedTuple):
    """What a site keeps between reading and writing.

    ``h_pre (..., n)``, ``h_post (..., n)`` and ``h_res (..., n, n)`` were computed from the streams that entered the
    site. ``h_pre`` is this site's own, also where the convention delays its use: the next site, or the readout, takes
    it from here. ``h_res`` is None for the identity; all three are None for the plain residual. ``streams`` is an
    alias of the streams through which their gradient is threaded (:mod:`mhc_layers._streams`); only ``post`` uses it.
    """

    h_pre: Tensor | None
    h_post: Tensor | None
    h_res: Tensor | None
    streams: Tensor | None = None
    apply_dtype: str = "float32"


class SiteImplementation(Protocol):
    """The three steps of a site.

    An object whose ``folds_broadcast`` is true takes streams ``(..., 1, C)`` in place of n equal ones, in ``pre`` and
    then in the ``post`` or ``boundary`` of the same site; others are always given all n.
    """

    def pre(self, x: Tensor, site: HyperConnection, previous: Tensor | None = None) -> tuple[Tensor, SiteState]:
        """From streams ``(..., n, C)`` to the sublayer's input ``(..., C)``, after ``site.input_norm`` if it has one.

        ``previous`` is the ``h_pre`` of the site before, used where ``site.convention.read_delay`` is 1; None there
        means that this is the first site, which reads stream 0.
        """
        ...

    def post(self, x: Tensor, f: Tensor, state: SiteState) -> Tensor:
        """From the streams that entered and the sublayer's output ``(..., C)`` to the next streams."""
        ...

    def boundary(
        self, x: Tensor, f: Tensor, state: SiteState, next_site: HyperConnection
    ) -> tuple[Tensor, Tensor, SiteState]:
        """``post``, then ``pre`` of ``next_site``, in one step: ``(x_next, u_next, state_next)``."""
        ...


class FunctionalSite:
    """The steps in plain torch, from :mod:`mhc_layers.functional`; runs every connection on every device."""

    def pre(self, x: Tensor, site: HyperConnection, previous: Tensor | None = None) -> tuple[Tensor, SiteState]:
        h_pre, h_post, h_res, x = site.threaded_maps(x)
        if not site.convention.read_delay:
            u, x = _streams.read(x, h_pre)
        elif previous is None:
            u = x[..., 0, :]
        else:
            u, x = _streams.read(x, previous)
        return site.normed(u), SiteState(h_pre, h_post, h_res, x, site.convention.apply_dtype)

    def post(self, x: Tensor, f: Tensor, state: SiteState) -> Tensor:
        h_post = cast(Tensor, state.h_post)
        if state.apply_dtype == "float32":
            return _streams.write(cast(Tensor, state.streams), f, state.h_res, h_post)
        return functional.write(x, f, state.h_res, h_post, apply_dtype=state.apply_dtype)

    def boundary(
        self, x: Tensor, f: Tensor, state: SiteState, next_site: HyperConnection
    ) -> tuple[Tensor, Tensor, SiteState]:
        x = self.post(x, f, state)
        return x, *self.pre(x, next_site, state.h_pre)


class ResidualSite:
    """The plain residual at the same call sites: reads stream 0 and adds the output to every stream."""

    def pre(self, x: Tensor, site: HyperConnection, previous: Tensor | None = None) -> tuple[Tensor, SiteState]:
        return site.normed(x[..., 0, :]), SiteState(None, None, None)

    def post(self, x: Tensor, f: Tensor, state: SiteState) -> Tensor:
        return x + f.unsqueeze(-2).to(x.dtype)

    def boundary(
        self, x: Tensor, f: Tensor, state: SiteState, next_site: HyperConnection
    ) -> tuple[Tensor, Tensor, SiteState]:
        x = self.post(x, f, state)
        return x, *self.pre(x, next_site)


class RefusedSite:
    """Stands for an implementation that was asked for by name and cannot run this site; raises when it is used."""

    def __init__(self, message: str) -> None:
        self.message = message

    def pre(self, x: Tensor, site: HyperConnection, previous: Tensor | None = None) -> tuple[Tensor, SiteState]:
        raise ValueError(self.message)

    def post(self, x: Tensor, f: Tensor, state: SiteState) -> Tensor:
        raise ValueError(self.message)

    def boundary(
        self, x: Tensor, f: Tensor, state: SiteState, next_site: HyperConnection
    ) -> tuple[Tensor, Tensor, SiteState]:
        raise ValueError(self.message)


FUNCTIONAL = FunctionalSite()
"""The plain row of the table of site implementations."""

RESIDUAL = ResidualSite()
"""The row of disabled sites."""

"""The coefficients that a model's sites compute in a forward pass, recorded as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn

from mhc_layers._sites import SiteState
from mhc_layers.hyper_connection import HyperConnection

__all__ = ["CapturedCoefficients", "SiteRecord", "capture_coefficients"]


class SiteRecord(NamedTuple):
    """Coefficients of one site in one forward pass, detached; unpacks as ``h_pre, h_post, h_res``."""

    h_pre: Tensor
    h_post: Tensor
    h_res: Tensor


class CapturedCoefficients(Sequence[SiteRecord]):
    """The records of a model's sites in depth order; empty until a forward pass has run.

    A later forward pass, or the recomputation in a checkpointed backward pass, replaces the records.
    """

    def __init__(self, sites: Sequence[HyperConnection]) -> None:
        self._sites = list(sites)
        self._records: dict[int, tuple[SiteRecord, Tensor]] = {}
        self.final_streams: Tensor | None = None

    def keep(self, site: HyperConnection, x: Tensor, state: SiteState) -> None:
        """Record a site's coefficients and the streams that entered it, detached and not copied."""
        x = x.detach()
        if state.h_pre is None or state.h_post is None or state.h_res is None:
            with torch.no_grad():
                record = SiteRecord(*site.coefficients(x))
        else:
            record = SiteRecord(state.h_pre.detach(), state.h_post.detach(), state.h_res.detach())
        self._records[id(site)] = (record, x)

    @property
    def streams(self) -> list[Tensor]:
        """The streams ``(..., n, C)`` that entered each recorded site, in depth order."""
        return [self._records[id(site)][1] for site in self._sites if id(site) in self._records]

    @property
    def sites(self) -> list[HyperConnection]:
        """The recorded sites, in depth order."""
        return [site for site in self._sites if id(site) in self._records]

    @overload
    def __getitem__(self, index: int) -> SiteRecord: ...

    @overload
    def __getitem__(self, index: slice) -> list[SiteRecord]: ...

    def __getitem__(self, index: int | slice) -> SiteRecord | list[SiteRecord]:
        return [self._records[id(site)][0] for site in self.sites][index]

    def __len__(self) -> int:
        return len(self._records)


@contextmanager
def capture_coefficients(model: nn.Module) -> Iterator[CapturedCoefficients]:
    """Record every site's coefficients during the forward passes inside the context.

    Parameters
    ----------
    model : Module
        A model with :class:`HyperConnection` modules; ``model.sites`` gives their order in depth if it exists,
        otherwise their order of registration does.

    Yields
    ------
    CapturedCoefficients
        A sequence of ``(h_pre, h_post, h_res)``, one for each site, detached and on the model's device. Its
        ``streams`` are what entered each site and its ``final_streams`` what a Transformer's readout collapsed.
        Recording copies nothing and does not wait for the device, but it keeps the recorded streams alive.

    Examples
    --------
    >>> import torch
    >>> from mhc_layers import HyperConnection, capture_coefficients
    >>> site = HyperConnection(dim=8, num_streams=4, sublayer=torch.nn.Identity())
    >>> with capture_coefficients(site) as captured:
    ...     _ = site(torch.randn(3, 4, 8))
    >>> [tuple(t.shape) for t in captured[0]]
    [(3, 4), (3, 4), (3, 4, 4)]
    """
    sites = getattr(model, "sites", None)
    if sites is None:
        sites = [module for module in model.modules() if isinstance(module, HyperConnection)]
    captured = CapturedCoefficients(list(sites))
    readout = getattr(model, "readout_streams", None)

    def keep_final(module: nn.Module, args: tuple[Any, ...]) -> None:
        captured.final_streams = args[0].detach()

    handle = None if readout is None else readout.register_forward_pre_hook(keep_final)
    for site in captured._sites:
        site._capture = captured
    try:
        yield captured
    finally:
        for site in captured._sites:
            site._capture = None
        if handle is not None:
            handle.remove()

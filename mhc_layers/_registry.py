"""The table of site implementations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhc_layers._sites import FUNCTIONAL, RESIDUAL, SiteImplementation

if TYPE_CHECKING:
    from mhc_layers.hyper_connection import HyperConnection


def resolve(site: HyperConnection, requested: str | SiteImplementation) -> SiteImplementation:
    """Choose the implementation of a site."""
    if not isinstance(requested, str):
        return requested
    return RESIDUAL if site.connection == "residual" else FUNCTIONAL

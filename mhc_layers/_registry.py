"""The table of site implementations: which object runs a site's three steps, chosen once for each site."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from birkhoff._registry import Resolution, Row, Table, installed
from mhc_layers._sites import RefusedSite, SiteImplementation
from mhc_layers.conventions import Convention
from mhc_layers.kernels.options import LARGEST_STREAMS, refuse_convention

if TYPE_CHECKING:
    from mhc_layers.hyper_connection import HyperConnection

__all__ = ["SITES", "SiteFacts", "explain", "facts_of", "resolve"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteFacts:
    """The static facts of a site that its implementation is chosen by.

    ``res_map`` is the class name of what replaces the projection, or None; ``dtype`` is the parameters', since the
    streams' is known only when they arrive.
    """

    connection: str
    res_map: str | None
    convention: Convention
    num_streams: int
    dim: int
    device: str
    dtype: str


def only(connection: str) -> Callable[[SiteFacts], str | None]:
    """A condition: the row serves this kind of connection and no other."""

    def refuse(facts: SiteFacts) -> str | None:
        if facts.connection == connection:
            return None
        return f"serves the connection {connection!r}, got {facts.connection!r}"

    return refuse


def refuse_fused(facts: SiteFacts) -> str | None:
    """The conditions of the fused kernels that are known before streams arrive."""
    checks = (
        (facts.connection == "mhc", f"runs the connection 'mhc', got {facts.connection!r}"),
        (facts.res_map is None, f"projects with Sinkhorn, this site has {facts.res_map}"),
        (facts.device == "cuda", f"needs a CUDA or ROCm device, got {facts.device}"),
        (facts.dtype == "float32", f"takes float32 parameters, got {facts.dtype}"),
        (installed("triton"), "the package triton is not installed"),
        (
            facts.num_streams <= LARGEST_STREAMS,
            f"keeps 1 to {LARGEST_STREAMS} streams in registers, got n = {facts.num_streams}",
        ),
    )
    reason = next((reason for holds, reason in checks if not holds), None)
    return refuse_convention(facts.convention) if reason is None else reason


SITES: Table[SiteFacts] = Table(
    "sites",
    (
        Row(
            name="residual",
            targets={"site": "mhc_layers._sites:RESIDUAL"},
            refuse=only("residual"),
            note="x + f, no maps",
        ),
        Row(
            name="fused",
            targets={"site_of": "mhc_layers._torch_ops:fused_site"},
            refuse=refuse_fused,
            note="fused kernels, forward and backward",
        ),
        Row(
            name="functional",
            targets={"site": "mhc_layers._sites:FUNCTIONAL"},
            refuse=lambda facts: None,
            note="plain torch",
        ),
    ),
)


def facts_of(site: HyperConnection) -> SiteFacts:
    """The static facts of a site."""
    return SiteFacts(
        connection=site.connection,
        res_map=None if site.res_map is None else type(site.res_map).__name__,
        convention=site.convention,
        num_streams=site.num_streams,
        dim=site.dim,
        device="none" if site.bias is None else site.bias.device.type,
        dtype="none" if site.bias is None else str(site.bias.dtype).removeprefix("torch."),
    )


def explain(site: HyperConnection) -> Resolution[SiteFacts]:
    """Say which implementation the table gives this site, and why the rows before it refused."""
    return SITES.resolve(facts_of(site))


def resolve(site: HyperConnection, requested: str | SiteImplementation) -> SiteImplementation:
    """Return the implementation of a site: the table's choice, a named row, or the object itself.

    A named row that refuses the site as it is now gives an object that says so when it is used, since the site may be
    on its way to another device.

    Raises
    ------
    ValueError
        If the named row does not exist.
    """
    if not isinstance(requested, str):
        return requested
    if requested == "auto":
        return _load(explain(site).row, site)
    rows = {row.name: row for row in SITES.rows}
    if requested not in rows:
        raise ValueError(f"Unknown implementation {requested!r}; accepted: 'auto', {', '.join(map(repr, rows))}.")
    reason = rows[requested].refuse(facts_of(site))
    if reason is not None:
        return RefusedSite(f"The implementation {requested!r} refuses this site: {reason}. Use implementation='auto'.")
    return _load(rows[requested], site)


def _load(row: Row[SiteFacts], site: HyperConnection) -> SiteImplementation:
    """A row holds the object itself, or what returns the object of a convention."""
    return row.load("site") if "site" in row.targets else row.load("site_of")(site.convention)

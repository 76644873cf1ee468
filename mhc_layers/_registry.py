"""The table of site implementations: which object runs a site's three steps, chosen once for each site."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from birkhoff._registry import Resolution, Row, Table
from mhc_layers._sites import SiteImplementation
from mhc_layers.conventions import Convention

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

    Raises
    ------
    ValueError
        If the named row does not exist, or refuses this site.
    """
    if not isinstance(requested, str):
        return requested
    if requested == "auto":
        return explain(site).row.load("site")
    rows = {row.name: row for row in SITES.rows}
    if requested not in rows:
        raise ValueError(f"Unknown implementation {requested!r}; accepted: 'auto', {', '.join(map(repr, rows))}.")
    reason = rows[requested].refuse(facts_of(site))
    if reason is not None:
        raise ValueError(f"The implementation {requested!r} refuses this site: {reason}. Use implementation='auto'.")
    return rows[requested].load("site")

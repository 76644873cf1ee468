"""How many bytes a residual connection moves: the memory traffic that decides its speed.

The rows are the paper's Table 2 and the dataflows of fused kernels; ``docs/explanation/`` derives them. Everything is
per token and per site, and counts the streams and sublayer outputs only: coefficients are a few hundred bytes more.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.box import SIMPLE
from rich.table import Table

from mhc_layers.config import TransformerConfig

__all__ = ["Traffic", "connection_traffic", "traffic_table"]


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Elements that one way to run a connection moves, in units of C, for n streams.

    Attributes
    ----------
    name : str
        The way.
    direction : str
        ``forward``, ``backward`` or ``recompute``.
    formula : str
        Elements in terms of n, in units of C.
    channels : int
        Its value.
    """

    name: str
    direction: str
    formula: str
    channels: int

    def num_bytes(self, dim: int, element_size: int = 2) -> int:
        """Return the bytes per token and site for C = ``dim`` and elements of ``element_size`` bytes."""
        return self.channels * dim * element_size


def connection_traffic(num_streams: int) -> list[Traffic]:
    """List the ways to run a connection of n streams, from the plain residual to the floor.

    Parameters
    ----------
    num_streams : int
        Streams n.

    Returns
    -------
    list of Traffic
        Forward, backward and recomputation.

    Raises
    ------
    ValueError
        If ``num_streams`` is smaller than 1.

    Examples
    --------
    >>> from mhc_layers.training.traffic import connection_traffic
    >>> [row.channels for row in connection_traffic(4) if row.direction == "forward"]
    [3, 34, 18, 14, 10]
    >>> connection_traffic(4)[4].num_bytes(dim=1)  # 20 C bytes in bfloat16
    20
    """
    if num_streams < 1:
        raise ValueError(f"num_streams is {num_streams}; it must be 1 or more")
    n = num_streams
    rows = [
        ("residual (2C in, C out)", "forward", "3", 3),
        ("unfused (paper, Table 2)", "forward", "8n+2", 8 * n + 2),
        ("separate kernels", "forward", "4n+2", 4 * n + 2),
        ("fused boundary, then read", "forward", "3n+2", 3 * n + 2),
        ("single pass (floor)", "forward", "2n+2", 2 * n + 2),
        ("residual", "backward", "3", 3),
        ("separate, autograd adds", "backward", "14n+3", 14 * n + 3),
        ("separate, added in place", "backward", "9n+3", 9 * n + 3),
        ("three phases", "backward", "6n+4", 6 * n + 4),
        ("three phases, chained", "backward", "5n+4", 5 * n + 4),
        ("merged, chained (floor)", "backward", "3n+3", 3 * n + 3),
        ("streams of a block rebuilt", "recompute", "n+2", n + 2),
    ]
    return [Traffic(name=a, direction=b, formula=c, channels=d) for a, b, c, d in rows]


def traffic_table(config: TransformerConfig, *, element_size: int = 2, bandwidth: float | None = None) -> Table:
    """Return the traffic of a model's connections as a table.

    Parameters
    ----------
    config : TransformerConfig
        Gives n, C and the number of sites.
    element_size : int
        Bytes of a stream element; 2 for bfloat16.
    bandwidth : float, optional
        Bytes per second of the memory; adds the time per million tokens for all sites.
    """
    sites = 2 * config.num_layers
    table = Table(
        box=SIMPLE,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=f"memory traffic a token: n = {config.num_streams}, C = {config.dim}, {sites} sites, "
        f"{element_size}-byte elements",
    )
    for heading in ("way", "elements"):
        table.add_column(heading, no_wrap=True)
    headings = ["bytes", "B/site", "B/model"] + (["s/Mtok"] if bandwidth else [])
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    direction = None
    for row in connection_traffic(config.num_streams):
        if row.direction != direction:
            direction = row.direction
            table.add_row(f"[bold]{direction}")
        size = row.num_bytes(config.dim, element_size)
        cells = [row.name, f"({row.formula})C", f"{row.channels * element_size}C", f"{size:,}", f"{size * sites:,}"]
        table.add_row(*cells, *([f"{1e6 * size * sites / bandwidth:.3f}"] if bandwidth else []))
    return table

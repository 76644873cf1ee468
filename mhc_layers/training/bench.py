"""How long a connection takes on this machine: one site, forward and backward, checked before it is timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from rich.table import Table
from torch import Tensor, nn

from mhc_layers.config import CONNECTION_KINDS
from mhc_layers.hyper_connection import HyperConnection

__all__ = ["SiteTiming", "time_connections", "timing_table"]


@dataclass(frozen=True, kw_only=True)
class SiteTiming:
    """Median times of one site in milliseconds, its error against float64, and the implementation that ran."""

    connection: str
    forward_ms: float
    forward_backward_ms: float
    error: float
    implementation: str


def time_connections(
    *,
    dim: int = 512,
    num_streams: int = 4,
    tokens: int = 2048,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: torch.device | None = None,
    connections: tuple[str, ...] = ("residual", "identity", "mhc", "hc"),
    repeats: int = 20,
) -> list[SiteTiming]:
    """Time one site of each kind around a sublayer that costs nothing.

    Parameters
    ----------
    dim, num_streams, tokens : int
        Channels C, streams n, tokens.
    dtype : {"float32", "bfloat16"}
        Of the streams.
    device : torch.device, optional
        The CPU by default.
    connections : tuple of str
        Kinds, see :class:`mhc_layers.HyperConnection`. "residual" has one stream.
    repeats : int
        Timed runs; the median is reported.

    Returns
    -------
    list of SiteTiming
        In the order of ``connections``.

    Raises
    ------
    RuntimeError
        If a site's output is further from its float64 value than rounding explains; nothing is timed then.
    """
    device = device or torch.device("cpu")
    unknown = [name for name in connections if name not in CONNECTION_KINDS]
    if unknown:
        raise ValueError(f"there is no connection {unknown[0]!r}; accepted are {', '.join(CONNECTION_KINDS)}")
    results = []
    for connection in connections:
        streams = 1 if connection == "residual" else num_streams
        generator = torch.Generator().manual_seed(0)
        site = HyperConnection(dim, streams, nn.Identity(), connection=connection).to(device)
        x = torch.randn(tokens, streams, dim, generator=generator).to(device, getattr(torch, dtype))
        error = _error(site, x)
        bound = 2e-2 if dtype == "bfloat16" else 1e-4
        if not error < bound:
            raise RuntimeError(f"the site {connection!r} is off by {error:.2e}, more than {bound:.0e}; not timed")
        x.requires_grad_()
        gradient = torch.ones_like(x)

        def forward(site: HyperConnection = site, x: Tensor = x) -> None:
            with torch.no_grad():
                site(x)

        def forward_backward(site: HyperConnection = site, x: Tensor = x, gradient: Tensor = gradient) -> None:
            site(x).backward(gradient)

        results.append(
            SiteTiming(
                connection=connection,
                forward_ms=_median_ms(forward, device, repeats),
                forward_backward_ms=_median_ms(forward_backward, device, repeats),
                error=error,
                implementation=type(site.implementation).__name__,
            )
        )
    return results


def timing_table(timings: list[SiteTiming], *, title: str) -> Table:
    """Return timings as a table, with ratios to the first row."""
    table = Table(title=title)
    for heading in ("connection", "forward ms", "ratio", "forward + backward ms", "ratio", "error", "implementation"):
        table.add_column(heading, justify="left" if heading in ("connection", "implementation") else "right")
    for timing in timings:
        table.add_row(
            timing.connection,
            f"{timing.forward_ms:.3f}",
            f"{timing.forward_ms / timings[0].forward_ms:.2f}",
            f"{timing.forward_backward_ms:.3f}",
            f"{timing.forward_backward_ms / timings[0].forward_backward_ms:.2f}",
            f"{timing.error:.1e}",
            timing.implementation,
        )
    return table


def _error(site: HyperConnection, x: Tensor) -> float:
    """Largest relative difference of a site's output from the same site in float64, over a few tokens."""
    exact = HyperConnection(
        site.dim, site.num_streams, nn.Identity(), connection=site.connection, dtype=torch.float64, device=x.device
    )
    exact.load_state_dict(site.state_dict())
    with torch.no_grad():
        expected, actual = exact(x[:64].double()), site(x[:64]).double()
    return float((actual - expected).abs().max() / expected.abs().max())


def _median_ms(work: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Median wall time of ``work`` in milliseconds, after warming up."""
    times = []
    for index in range(repeats + 3):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if index >= 3:
            times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)

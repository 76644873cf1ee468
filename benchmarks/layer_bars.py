"""The layer's bars, judged from a report alone: what was asked, what was measured, met or missed."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.layer_peers import PEERS

__all__ = ["FUSED", "Lookup", "Verdict", "against_peers", "best_us", "judge"]

FUSED, TRITON = "ours, fused", "ours, fused, all Triton"
_LARGE, _SMALL = (1280, 4096, 7168), (1280, 4096)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One bar: ``value`` is None where the report has no measurement; ``at_least`` turns the comparison round."""

    what: str
    value: float | None
    bar: float
    stretch: float | None = None
    at_least: bool = False
    unit: str = "x"

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; None if it was not measured."""
        if self.value is None:
            return None
        return self.value >= self.bar if self.at_least else self.value <= self.bar


def best_us(times: dict[str, Any] | None) -> float | None:
    """The smaller of the time as called and the time in a graph."""
    if times is None:
        return None
    return min(value for value in (times["called_us"], times["graph_us"]) if value is not None)


class Lookup:
    """Look-ups that return None for what a report does not hold."""

    def __init__(self, report: dict[str, Any]) -> None:
        self._shapes = {(shape["tokens"], shape["dim"]): shape for shape in report["shapes"]}

    def floor(self, m: int, c: int, step: str) -> float:
        return float(self._shapes[m, c]["floor_us"][step])

    def row(self, m: int, c: int, name: str) -> dict[str, Any] | None:
        rows = self._shapes.get((m, c), {"rows": []})["rows"]
        return next((row for row in rows if row["name"] == name and "skipped" not in row), None)

    def timed(self, m: int, c: int, name: str, *path: str) -> float | None:
        found: Any = self.row(m, c, name)
        for key in path:
            found = None if found is None else found.get(key)
        if found is None:
            return None
        return float(found) if isinstance(found, int | float) else best_us(found)

    def ratio(self, m: int, c: int, name: str, step: str, *path: str) -> float | None:
        found = self.timed(m, c, name, *path)
        return None if found is None else found / self.floor(m, c, step)

    def ours(self, m: int, c: int) -> float | None:
        """The fastest of ours per site: a chain with fused boundaries, else one site alone."""
        chained = self.timed(m, c, FUSED, "chain", "fused", "both")
        return chained if chained is not None else self.timed(m, c, FUSED, "both")


def _quotient(top: float | None, bottom: float | None) -> float | None:
    return None if top is None or bottom is None else top / bottom


def judge(report: dict[str, Any]) -> list[Verdict]:
    """Return the verdict on every bar whose shape the report has, n = 4."""
    look, verdicts = Lookup(report), []
    shapes = {(shape["tokens"], shape["dim"]) for shape in report["shapes"]}
    for c, bar in zip(_LARGE, (1.9, 1.75, 1.75), strict=True):
        if (16384, c) in shapes:
            value = look.ratio(16384, c, FUSED, "both", "both")
            verdicts.append(Verdict(f"fwd+bwd, separate steps, of 29 E, C = {c}", value, bar))
    for c, bar in zip(_LARGE, (1.8, 1.62, 1.62), strict=True):
        if (16384, c) in shapes:
            value = look.ratio(16384, c, FUSED, "both", "chain", "fused", "both")
            verdicts.append(Verdict(f"fwd+bwd, fused boundaries, of 29 E, C = {c}", value, bar, 1.4))
    for c in _LARGE:
        if (16384, c) in shapes:
            value = look.ratio(16384, c, FUSED, "forward", "chain", "fused", "forward", "site_us")
            verdicts.append(Verdict(f"forward, a boundary and its read, of 14 E, C = {c}", value, 1.12, 1.04))
    for c in _LARGE:
        if (16384, c) in shapes:
            whole, forward = (look.timed(16384, c, FUSED, step) for step in ("both", "forward"))
            value = None if whole is None or forward is None else whole - forward
            value = _quotient(value, look.floor(16384, c, "backward"))
            verdicts.append(Verdict(f"backward of a site (by difference), of 28 E, C = {c}", value, 1.12, 1.05))
    for c, bar, stretch in zip(_LARGE, (3.0, 1.9, 1.6), (4.0, 2.3, 1.9), strict=True):
        if (16384, c) in shapes:
            value = _quotient(look.timed(16384, c, "TileKernels", "both"), look.ours(16384, c))
            verdicts.append(Verdict(f"faster than TileKernels, C = {c}", value, bar, stretch, at_least=True))
    if (16384, 4096) in shapes:
        value = look.ratio(16384, 4096, TRITON, "both", "both")
        verdicts.append(Verdict("fwd+bwd without CUDA C++, of 29 E, C = 4096", value, 1.8, 1.6))
    for c in _SMALL:
        if (4096, c) in shapes:
            verdicts += _as_called(look, c)
            value = look.ratio(4096, c, FUSED, "both", "both", "graph_us")
            verdicts.append(Verdict(f"in a graph, of 29 E, M = 4096, C = {c}", value, 2.0))
    verdicts += _memory_and_errors(look, sorted(shapes))
    return verdicts


def _as_called(look: Lookup, c: int) -> list[Verdict]:
    """What a call costs over its graph with few tokens: one site and a site of a chain, with and without a thread."""
    verdicts = []
    for what, path in (("as called", ("both",)), ("as called in a chain", ("chain", "fused", "both"))):
        graph = look.timed(4096, c, FUSED, *path, "graph_us")
        for key, how in (("called_us", ""), ("one_thread_us", ", one thread")):
            value = _quotient(look.timed(4096, c, FUSED, *path, key), graph)
            verdicts.append(Verdict(f"{what}{how}, of its graph, M = 4096, C = {c}", value, 1.5, 1.2))
    return verdicts


def _memory_and_errors(look: Lookup, shapes: list[tuple[int, int]]) -> list[Verdict]:
    """The worst of all shapes that were measured."""
    found = [(m, c, row) for m, c in shapes if (row := look.row(m, c, FUSED)) is not None]

    def worst(values: list[float]) -> float | None:
        return max(values, default=None)

    kept = worst([row["memory"]["kept"] / m for m, _, row in found])
    peak = worst([row["memory"]["peak"] / (2 * m * c) for m, c, row in found])
    streams = worst([max(row["errors"][name] for name in ("u", "x_next", "gx", "gf")) for *_, row in found])
    phi = worst([row["errors"]["gphi"] for *_, row in found])
    same = worst([0.0 if row.get("same_bits") else 1.0 for *_, row in found])
    return [
        Verdict("kept between forward and backward, bytes a token", kept, 100, unit=""),
        Verdict("peak beyond the inputs, E", peak, 10.5, 6, unit=""),
        Verdict("error of outputs and stream gradients", streams, 1.8e-3, unit=""),
        Verdict("error of the gradient of phi", phi, 1e-4, unit=""),
        Verdict("runs whose bits differ from a repetition", same, 0, unit=""),
    ]


def against_peers(report: dict[str, Any]) -> list[list[str]]:
    """Rows of a table: shape, then how many times longer each peer takes than ours, forward and backward of a site."""
    look, table = Lookup(report), []
    for shape in report["shapes"]:
        m, c = shape["tokens"], shape["dim"]
        ours, cells = look.ours(m, c), []
        for peer in PEERS:
            value = _quotient(look.timed(m, c, peer.name, "both"), ours)
            cells.append("-" if value is None else f"{value:.2f}")
        called = [_quotient(look.timed(m, c, peer.name, "both", "called_us"), 1.0) for peer in PEERS]
        fastest = min((value for value in called if value is not None), default=None)
        as_called = _quotient(fastest, look.timed(m, c, FUSED, "both", "called_us"))
        table.append([f"{m} x {c}", *cells, "-" if as_called is None else f"{as_called:.2f}"])
    return table

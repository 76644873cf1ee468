"""The page and the figure of a projection report of a GPU, from its JSON alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.report import measured_on, save_figure, table

__all__ = ["CUDA", "LARGE", "TRITON", "Rows", "markdown", "plot"]


class Rows:
    """Rows by case and by implementation."""

    def __init__(self, report: dict[str, Any]) -> None:
        self.rate: float = report.get("copy_bytes_per_second", 0.0)
        self.results = report["results"]
        self.names = list(dict.fromkeys(row["name"] for result in self.results for row in result["rows"]))

    def find(self, name: str, **wanted: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The first case with these values and the row of this name in it, if the row has a time."""
        for result in self.results:
            if all(result["case"].get(key) == value for key, value in wanted.items()):
                for row in result["rows"]:
                    if row["name"] == name and "fastest" in row:
                        return result["case"], row
        return None

    def times_floor(self, case: dict[str, Any], seconds: float) -> float:
        return float(seconds * self.rate / case["floor_bytes"])

    def ratio(self, name: str, **wanted: Any) -> float | None:
        found = self.find(name, **wanted)
        return None if found is None or not self.rate else self.times_floor(found[0], found[1]["fastest"])


CUDA, TRITON = "our CUDA kernels, no autograd", "our Triton kernels, no autograd"
NEWTON, LARGE = "our Newton kernel to 1e-6", "ours: passes in one launch"


def _bars(rows: Rows) -> list[tuple[str, str, str]]:
    """What was asked for, what this run has, and the verdict."""
    lines = []

    def add(what: str, got: float | None, bar: float, stretch: float | None, unit: str = "x") -> None:
        asked = f"{bar:g}" + (f", stretch {stretch:g}" if stretch else "")
        if got is None:
            return lines.append((f"{what}: {asked}", "not measured", "-"))
        reached = stretch is not None and got <= stretch
        verdict = "met, stretch too" if reached else "met" if got <= bar else "**missed**"
        return lines.append((f"{what}: {asked}", f"{got:.3g} {unit}", verdict))

    def batch(n: int, size: int, gradient: bool) -> dict[str, Any]:
        return {"n": n, "batch": size, "gradient": gradient, "kind": ""}

    for size, bar, stretch in ((1 << 20, 1.35, 1.1), (1 << 22, 1.25, 1.05)):
        for name in (CUDA, TRITON):
            kernel = name.split()[1]
            add(f"n = 4 forward, {size}, {kernel}", rows.ratio(name, **batch(4, size, False)), bar, stretch)
    for name, bar in ((CUDA, 1.8), (TRITON, 2.3)):
        got = rows.ratio(name, **batch(4, 1 << 20, True))
        add(f"n = 4 forward and backward, {1 << 20}, {name.split()[1]}", got, bar, 1.5)
    for n, size in ((2, 1 << 20), (3, 1 << 20), (6, 1 << 18), (8, 1 << 18), (16, 1 << 16), (32, 1 << 16)):
        got = rows.ratio(CUDA, **batch(n, size, False))
        add(f"n = {n} forward, {size}, CUDA", got, 3.0, 1.5)
    large = rows.find(LARGE, kind="large")
    add("one 4096 x 4096 matrix, 100 iterations, ms", large and large[1]["fastest"] * 1e3, 5.0, 2.7, "ms")
    newton, forward = rows.find(NEWTON, kind="limit"), rows.find(CUDA, **batch(4, 1 << 20, False))
    ratio = newton[1]["fastest"] / forward[1]["fastest"] if newton and forward else None
    add("Newton at logit std 10, of a 20-iteration forward", ratio, 3.0, None, "times")
    for kind, what in (("limit", "std 10, all of 2^20"), ("vertices", "all 65536 vertices")):
        found = rows.find(NEWTON, kind=kind)
        add(f"Newton, worst marginal error, {what}", found and found[1]["errors"]["marginals"], 1e-6, None, "")
    lines.append(_against_peers(rows))
    return lines


def _against_peers(rows: Rows) -> tuple[str, str, str]:
    """The fastest of ours against the fastest of the others on every case where both have a time."""
    factors = []
    for result in rows.results:
        timed = [row for row in result["rows"] if "fastest" in row and row["computes"] != "limit"]
        ours = [row["fastest"] for row in timed if row["ours"]]
        peers = [row["fastest"] for row in timed if not row["ours"]]
        if ours and peers:
            factors.append(min(peers) / min(ours))
    if not factors:
        return "faster than every peer of this run", "no peer has a time", "-"
    text = f"{min(factors):.1f} to {max(factors):.1f} times the fastest peer, {len(factors)} cases"
    return "faster than every peer of this run", text, "met" if min(factors) > 1 else "**missed**"


def _batches(rows: Rows, gradient: bool, cell: Callable[[dict[str, Any], dict[str, Any]], str]) -> list[str]:
    """Implementations down, sizes across."""
    results = [
        result for result in rows.results if not result["case"].get("kind") and result["case"]["gradient"] == gradient
    ]
    results.sort(key=lambda result: (result["case"]["n"], result["case"]["batch"]))
    lines = []
    for name in rows.names:
        line = [name]
        for result in results:
            row = next((row for row in result["rows"] if row["name"] == name), None)
            line.append("" if row is None or "fastest" not in row else cell(result["case"], row))
        if any(line[1:]):
            lines.append(line)
    if not lines:
        return ["Nothing measured yet."]
    header = ["implementation", *(f"n = {r['case']['n']}, 2^{r['case']['batch'].bit_length() - 1}" for r in results)]
    floors = [f"{1e6 * result['case']['floor_bytes'] / rows.rate:.1f}" for result in results]
    return table(header, [["*floor, us*", *floors], *lines])


def _others(rows: Rows) -> list[str]:
    """Newton, the vertices and the large matrix: one table each."""
    lines = []
    for result in rows.results:
        case, timed = result["case"], [row for row in result["rows"] if "fastest" in row]
        if not case.get("kind") or not timed:
            continue
        best = min(row["fastest"] for row in timed if row["ours"]) if any(row["ours"] for row in timed) else None
        cells = [
            [
                row["name"],
                f"{row['fastest'] / best:.2f}" if best else "",
                f"{row['fastest'] * 1e6:.1f}",
                f"{row['median'] * 1e6:.1f}",
                f"{rows.times_floor(case, row['fastest']):.2f}",
                ", ".join(f"{key} {value:.1e}" for key, value in row["errors"].items()),
            ]
            for row in timed
        ]
        header = ["implementation", "x our fastest", "us", "us as called", "x floor", "errors"]
        lines += ["", f"## {case['title'][0].upper()}{case['title'][1:]}", "", *table(header, cells)]
    return lines


def _accuracy(rows: Rows) -> list[str]:
    lines = []
    for name in rows.names:
        found = [
            row["errors"]
            for result in rows.results
            for row in result["rows"]
            if row["name"] == name and not result["case"].get("kind") and "errors" in row
        ]
        if found:
            entries = max(errors.get("entries", 0.0) for errors in found)
            gradients = [errors["gradient"] for errors in found if "gradient" in errors]
            lines.append([name, f"{entries:.3f}", f"{max(gradients):.1e}" if gradients else ""])
    return table(["implementation", "entries, of 4 n u max(1, range / 16)", "gradient, of the largest"], lines)


def _not_timed(rows: Rows) -> list[str]:
    """Why rows have no time, each reason with its cases; what a case is not meant for is left out."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for result in rows.results:
        for row in result["rows"]:
            reason = row.get("failed") or row.get("wrong") or row.get("skipped")
            if reason and not reason.startswith(
                ("runs on", "another kind", "the iteration's time", "powers of two", "a slow peer")
            ):
                reasons.setdefault((row["name"], reason), []).append(result["case"]["title"])
    lines = []
    for (name, reason), titles in reasons.items():
        where = "every case" if len(titles) > 6 else "; ".join(titles)
        lines.append(f"- {name}: {reason} ({where})")
    return [*lines, "- Megatron-LM: its Triton Sinkhorn is on a branch and in no release that can be installed."]


def markdown(report: dict[str, Any]) -> str:
    """Render a report; cells are times over floor with microseconds in brackets."""
    about, rows = report["machine"], Rows(report)
    if not rows.rate:
        return "# Projection on a GPU\n\nNothing measured yet.\n"
    lines = [
        "# Projection on a GPU",
        "",
        f"{measured_on(about)}. Copy rate of this run: {rows.rate / 1e9:.0f} GB/s (read plus write).",
        f"Command: `{report.get('command', '')}`",
        *(["", report["note"]] if "note" in report else []),
        "",
        "float32, 20 iterations, logits of standard deviation 1, exact gradient of the iteration. Every time passed a "
        "comparison with the float64 oracle first. A cell is time over floor, then microseconds; the smaller of the "
        "median as called and of the replay of a CUDA graph. A floor touches each array once (forward two, forward and "
        "backward five times the batch) at the copy rate.",
        "",
        "## Bars",
        "",
        *table(["bar", "this run", ""], [list(line) for line in _bars(rows)]),
    ]

    def best(case: dict[str, Any], row: dict[str, Any]) -> str:
        return f"{rows.times_floor(case, row['fastest']):.2f} ({row['fastest'] * 1e6:.0f})"

    def called(case: dict[str, Any], row: dict[str, Any]) -> str:
        return f"{row['median'] * 1e6:.0f}"

    for gradient, what in ((False, "Forward"), (True, "Forward and backward")):
        lines += ["", f"## {what}", "", *_batches(rows, gradient, best)]
        lines += ["", "As called, without a graph, us:", "", *_batches(rows, gradient, called)]
    lines += _others(rows)
    lines += ["", "## Errors found by the gate", "", *_accuracy(rows)]
    lines += ["", "## Not timed", "", *_not_timed(rows)]
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw times over floor by n, forward and forward plus backward, for every implementation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = Rows(report)
    figure, axes = pyplot.subplots(1, 2, figsize=(10.4, 4.2), layout="constrained", sharey=True)
    for axis, gradient in zip(axes, (False, True), strict=True):
        sizes = [r["case"] for r in rows.results if not r["case"].get("kind") and r["case"]["gradient"] == gradient]
        sizes = [case for case in sizes if (case["n"], case["batch"]) not in ((4, 1 << 16), (4, 1 << 22))]
        sizes.sort(key=lambda case: case["n"])
        for name in rows.names:
            points = [(case["n"], rows.ratio(name, title=case["title"])) for case in sizes]
            points = [(n, value) for n, value in points if value is not None]
            if points:
                style = "-o" if "our " in name or name.startswith("birkhoff") else "--s"
                axis.plot(*zip(*points, strict=True), style, markersize=4, linewidth=1.2, label=name)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks([case["n"] for case in sizes], [str(case["n"]) for case in sizes])
        axis.minorticks_off()
        axis.set_xlabel("n")
        axis.set_title("forward and backward" if gradient else "forward")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("time over floor")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=7)
    save_figure(figure, path)

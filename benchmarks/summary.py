"""What the committed GPU reports say, written into README and the pages that quote them.

``python -m benchmarks summary`` replaces the lines between ``<!-- measured: NAME -->`` and ``<!-- end -->`` in README
and ``docs``; a test holds the committed text to the committed reports.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import layer_report, projection_report, training_report, which_solver
from benchmarks.layer_bars import FUSED, Lookup, best_us
from benchmarks.layer_peers import PEERS
from benchmarks.projection_report import CUDA, LARGE, Rows
from benchmarks.report import table

__all__ = ["BLOCKS", "fill", "main"]

ROOT = Path(__file__).parent.parent
_MARKED = re.compile(r"(<!-- measured: ([^>]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def _newest(subject: str, device: str = "h100") -> dict[str, Any] | None:
    found = sorted((ROOT / "benchmarks" / "reports").glob(f"{subject}_{device}_*.json"))
    return json.loads(found[-1].read_text()) if found else None


def _microseconds(row: dict[str, Any] | None, key: str = "fastest") -> str:
    return "-" if row is None else f"{row[key] * 1e6:.0f}"


def _readme() -> list[str]:
    lines = [_readme_sinkhorn(), _readme_large(), _readme_site(), _readme_training()]
    return table(["what", "ours", "peers"], [line for line in lines if line])


def _readme_sinkhorn() -> list[str]:
    rows = Rows(_newest("sinkhorn") or {"results": []})
    found = {
        (name, gradient): rows.find(name, n=4, batch=1 << 20, kind="", gradient=gradient)
        for name in rows.names
        for gradient in (False, True)
    }
    if found.get((CUDA, False)) is None:
        return []
    case, ours = found[CUDA, False]
    both = found[CUDA, True]
    peers = []
    for name in rows.names:
        timed = [found[name, gradient] for gradient in (False, True)]
        if any(timed) and not (timed[0] or timed[1])[1]["ours"]:
            peers.append(f"{name} {' and '.join(_microseconds(each and each[1]) for each in timed)}")
    text = (
        f"{_microseconds(ours)} us, {rows.times_floor(case, ours['fastest']):.2f} times what the bytes take; with the "
        f"exact gradient {_microseconds(both and both[1])} us"
    )
    return ["Sinkhorn, 20 iterations, 2^20 matrices of 4 x 4, float32", text, f"{'; '.join(peers)} us"]


def _readme_large() -> list[str]:
    rows = Rows(_newest("sinkhorn") or {"results": []})
    found = {name: rows.find(name, kind="large") for name in rows.names}
    if found.get(LARGE) is None:
        return []
    cells = {name: f"{each[1]['fastest'] * 1e3:.1f}" for name, each in found.items() if each is not None}
    ours = cells.pop(LARGE)
    peers = "; ".join(f"{name} {value}" for name, value in cells.items())
    return ["one 4096 x 4096 matrix, 100 iterations", f"{ours} ms", f"{peers} ms"]


def _readme_site() -> list[str]:
    look = Lookup(_newest("layer") or {"shapes": []})
    ours = look.ours(16384, 4096)
    if ours is None:
        return []
    peers = {peer.name: look.timed(16384, 4096, peer.name, "both") for peer in PEERS}
    factors = [f"{name} {value / ours:.1f}" for name, value in peers.items() if value is not None]
    text = f"{ours / 1e3:.2f} ms, {ours / look.floor(16384, 4096, 'both'):.2f} times what 29 streams take"
    what = "one mHC site, n = 4, 16384 x 4096, forward and backward, in a chain"
    return [what, text, f"{'; '.join(factors)} times as long"]


def _readme_training() -> list[str]:
    width = next((w for w in (_newest("training") or {"widths": []})["widths"] if w["dim"] == 4096), None)
    timed = {} if width is None else {row["name"]: row for row in width["rows"] if "called_us" in row}
    if width is None or not {"residual", "mHC, fused"} <= set(timed):
        return []
    base = timed["residual"]

    def percent(name: str, key: str) -> str | None:
        value = training_report.overhead(timed[name], base, key) if name in timed else None
        return None if value is None else f"+{value:.1f} %"

    ours = [f"{value} {how}" for key, how in training_report.HOW.items() if (value := percent("mHC, fused", key))]
    peers = [f"{name.removeprefix('mHC, ')} {percent(name, 'graph_us')}" for name in timed if "plain" in name]
    floor = 100 * width["connections_floor_us"] / best_us(base)
    text = f"{', '.join(ours)} (bytes: {floor:.1f} %)"
    return ["mHC over the plain residual, C = 4096, 8192 tokens", text, f"{'; '.join(peers)} in a graph"]


def _chains() -> list[str]:
    """Per site of a chain, and how much longer peers take."""
    report = _newest("layer") or {"shapes": []}
    look = Lookup(report)
    shapes = [shape for shape in report["shapes"] if look.row(shape["tokens"], shape["dim"], FUSED)]
    shapes.sort(key=lambda shape: (-shape["tokens"], shape["dim"]))
    lines = []
    for step, what in (("forward", "forward"), ("both", "forward and backward")):
        for how, words in (("separate", "separate steps"), ("fused", "fused boundaries")):
            for key, end in ((None, ""), ("site_us", ", without the ends")):
                cells = []
                for shape in shapes:
                    path = ("chain", how, step, *([key] if key else []))
                    value = look.timed(shape["tokens"], shape["dim"], FUSED, *path)
                    floor = shape["floor_us"][step]
                    cells.append("-" if value is None else f"{value:.0f} us, {value / floor:.2f} x")
                lines.append([f"{what}, {words}{end}", *cells])
    for peer in PEERS:
        cells = []
        for shape in shapes:
            m, c = shape["tokens"], shape["dim"]
            theirs, ours = look.timed(m, c, peer.name, "both"), look.ours(m, c)
            cells.append("-" if theirs is None or ours is None else f"{theirs / ours:.1f}")
        lines.append([f"{peer.name} takes, times as long", *cells])
    return table(["per site", *(f"{shape['tokens']} x {shape['dim']}" for shape in shapes)], lines)


def _kernels() -> list[str]:
    """Every kernel alone against its own bytes, at every shape."""
    report = _newest("layer") or {"shapes": []}
    shapes = [shape for shape in report["shapes"] if any("us" in row for row in shape.get("kernels", []))]
    shapes.sort(key=lambda shape: (-shape["tokens"], shape["dim"]))
    if not shapes:
        return ["The committed report does not have the kernels alone."]
    keys = list(
        dict.fromkeys((row["name"], row["row"], row["streams"]) for shape in shapes for row in shape["kernels"])
    )
    lines = []
    for name, how, streams in keys:
        cells = []
        for shape in shapes:
            row = next((row for row in shape["kernels"] if (row["name"], row["row"]) == (name, how)), {})
            floor = (streams or 0) * 2 * shape["tokens"] * shape["dim"] / report["copy_bytes_per_second"] * 1e6
            ratio = f", {row['us'] / floor:.2f} x" if floor and "us" in row else ""
            cells.append(f"{row['us']:.0f} us{ratio}" if "us" in row else "-")
        lines.append([f"`{name}`", how, f"{streams} E" if streams else "", *cells])
    header = ["kernel", "row", "bytes", *(f"{shape['tokens']} x {shape['dim']}" for shape in shapes)]
    return table(header, lines)


def _training() -> list[str]:
    lines = []
    report = _newest("training") or {"widths": []}
    for width in report["widths"]:
        lines += training_report.times(width, report["batch"] * report["sequence"])
    return lines[1:]


def _part(
    markdown: Callable[[dict[str, Any]], str], begin: str, subject: str, device: str = "h100"
) -> Callable[[], list[str]]:
    """Lines of a report's page after a heading and before the next, without empty lines around them."""

    def lines() -> list[str]:
        report = _newest(subject, device)
        if report is None:
            return ["Not measured yet."]
        return markdown(report).partition(f"{begin}\n")[2].partition("\n## ")[0].strip("\n").splitlines()

    return lines


BLOCKS: dict[str, Callable[[], list[str]]] = {
    "readme": _readme,
    "chains": _chains,
    "kernels": _kernels,
    "layer bars": _part(layer_report.markdown, "## Bars", "layer"),
    "projection bars": _part(projection_report.markdown, "## Bars", "sinkhorn"),
    "large matrix": _part(projection_report.markdown, "## One 4096 x 4096 matrix, 100 iterations", "sinkhorn"),
    "training": _training,
    "which solver": _part(which_solver.markdown, which_solver.HEADING, "which_solver"),
    "which solver on a CPU": _part(which_solver.markdown, which_solver.HEADING, "which_solver", "cpu"),
}


def fill(text: str) -> str:
    """Replace what stands between the marks; an unknown name is a KeyError."""
    return _MARKED.sub(lambda found: found[1] + "\n".join(["", *BLOCKS[found[2]](), "", ""]) + found[4], text)


def main(argv: list[str]) -> int:
    """Run ``python -m benchmarks summary``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks summary", description=__doc__.splitlines()[0])
    parser.parse_args(argv)
    for page in pages():
        text = page.read_text()
        if (filled := fill(text)) != text:
            page.write_text(filled)
            print(page.relative_to(ROOT))
    return 0


def pages() -> list[Path]:
    """README and every page of the documentation that has a mark."""
    return [
        page
        for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("[a-z]*/**/*.md")))
        if _MARKED.search(page.read_text())
    ]

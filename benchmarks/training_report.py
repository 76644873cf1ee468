"""Tables and figures of a training report, from its JSON alone."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.report import measured_on, save_figure, table

__all__ = ["HOW", "markdown", "overhead", "plot", "times"]

#: what the fused connection may cost over the residual at C = 4096, and the paper's own number
BAR, STRETCH = 10.0, 6.7


#: how a step is timed; *in one thread* runs the backward in the calling thread
HOW = {"called_us": "as called", "one_thread_us": "as called in one thread", "graph_us": "in a graph"}


def overhead(row: dict[str, Any], base: dict[str, Any] | None, key: str) -> float | None:
    """Percent that a step takes longer than the residual's, both timed in the same way.

    The residual is the one that was timed in turn with the row, or else ``base``, its own row. Where the readings are
    there, it is the median over pairs of neighbours, which found the card in the same state.
    """
    if pairs := _pairs(row, key):
        return statistics.median(pairs)
    base = row.get("baseline", base)
    if base is None or row.get(key) is None or base.get(key) is None:
        return None
    return 100 * (row[key] / base[key] - 1)


def _pairs(row: dict[str, Any], key: str) -> list[float]:
    """The overhead of each reading over the residual's beside it, in percent."""
    one, other = (each.get("readings", {}).get(key, []) for each in (row, row.get("baseline", {})))
    return [100 * (us / base - 1) for us, base in zip(one, other, strict=True)] if one and other else []


def _with_spread(row: dict[str, Any], base: dict[str, Any] | None, key: str) -> str:
    """The overhead, and within which bounds the middle half of its pairs lies."""
    text, pairs = _percent(overhead(row, base, key)), _pairs(row, key)
    if len(pairs) < 2:
        return text
    low, _, high = statistics.quantiles(pairs, n=4, method="inclusive")
    return f"{text} ({low:.1f} to {high:.1f})"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"


def _rows(timed: list[dict[str, Any]], base: dict[str, Any] | None, tokens: int) -> list[list[str]]:
    lines = []
    for row in timed:
        cells = [row["name"]]
        for key in HOW:
            cells.append(_with_spread(row, base, key))
            found = row.get(key)
            cells.append("-" if found is None else f"{found / 1e3:.2f}")
        fastest = min(found for key in HOW if (found := row.get(key)) is not None)
        cells.append(f"{tokens / fastest * 1e6:.0f}")
        lines.append([*cells, f"{row['kept_bytes'] / 1e9:.2f}", f"{row['peak_bytes'] / 1e9:.2f}"])
    return lines


def times(width: dict[str, Any], tokens: int) -> list[str]:
    """The table of one width, and what its bytes would take."""
    timed = {row["name"]: row for row in width["rows"] if "called_us" in row}
    base = timed.get("residual")
    header = ["connection"]
    for how in HOW.values():
        header += [f"overhead {how}", "step, ms"]
    header += ["tokens/s, fastest", "kept, GB", "peak, GB"]
    lines = ["", f"C = {width['dim']}:", "", *table(header, _rows(list(timed.values()), base, tokens))]
    if base is not None:
        floor = width["connections_floor_us"] / min(base[k] for k in ("called_us", "graph_us") if base.get(k)) * 100
        text = (
            f"Byte floor of the connections (29 streams a site at the copy rate): {floor:.1f} % of the residual's step."
        )
        fused = timed.get("mHC, fused")
        if fused is not None and width["dim"] == 4096:
            text += f" Bar {BAR:.0f} % (stretch {STRETCH} %) for the fused connection:"
            for key, how in HOW.items():
                if (value := overhead(fused, base, key)) is not None:
                    text += f" {_with_spread(fused, base, key)} {how}, {'met' if value <= BAR else '**missed**'};"
            text = text[:-1] + "."
        lines += ["", text]
    return lines


def _width(width: dict[str, Any], tokens: int) -> list[str]:
    timed = {row["name"]: row for row in width["rows"] if "called_us" in row}
    lines = ["", f"## C = {width['dim']}", *times(width, tokens)[2:]]
    for row in timed.values():
        if "formula_saves_bytes" in row and "mHC, fused" in timed:
            saved = timed["mHC, fused"]["kept_bytes"] - row["kept_bytes"]
            expected = row["formula_saves_bytes"]
            lines += [
                "",
                f"{row['name']}, blocks of {row['recompute_block']} sites: keeps {saved / 1e6:.1f} MB less than "
                f"without; the formula says {expected / 1e6:.1f} MB ({100 * (saved / expected - 1):+.2f} %).",
            ]
    agreements = [
        [row["name"], *(f"{value:.1e}" for value in row["agreement"].values())]
        for row in width["rows"]
        if "agreement" in row
    ]
    if agreements:
        lines += ["", "Relative difference from plain torch:", ""]
        lines += table(["connection", "loss", "gradient of the embedding", "gradient of phi"], agreements)
    skipped = [f"- {row['name']}: {row['skipped']}" for row in width["rows"] if "skipped" in row]
    skipped += [
        f"- {row['name']}, in a graph: {row['graph_refused']}" for row in timed.values() if row["graph_refused"]
    ]
    return [*lines, "", "Not timed:", "", *skipped] if skipped else lines


def markdown(report: dict[str, Any]) -> str:
    """Render a report; overhead is over the residual baseline of the same run."""
    about = report["machine"]
    tokens = report["batch"] * report["sequence"]
    rows = [row for width in report["widths"] for row in width["rows"]]
    in_turn = "in turn with the row's and " if any("baseline" in row for row in rows) else ""
    spread = ", with the middle half of all pairs of readings" if any("readings" in row for row in rows) else ""
    lines = [
        "# Forward and backward of a dense Transformer, n = 4, bfloat16",
        "",
        f"{measured_on(about)}. Copy rate of this run: {report['copy_bytes_per_second'] / 1e9:.0f} GB/s.",
        f"Command: `{report.get('command', '')}`",
        *(["", report["note"]] if "note" in report else []),
        "",
        f"{report['layers']} layers, {report['batch']} x {report['sequence']} = {tokens} tokens, SwiGLU of 8/3 C, "
        "heads of 128, sublayers under torch.compile in every row, the residual's addition and norm as well, no "
        "optimizer step. Kept is alive between forward and backward; peak is the highest above weights, gradients "
        "included. "
        f"Overhead is over the residual's step, timed {in_turn}the same way{spread}; *in one thread* runs the "
        "backward in the calling thread (`torch.autograd.set_multithreading_enabled(False)`), not in autograd's own.",
    ]
    for width in report["widths"]:
        lines += _width(width, tokens)
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw the overhead over the residual and the memory that is kept, one row of panels a width."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    widths = report["widths"]
    figure, axes = pyplot.subplots(len(widths), 2, figsize=(11, 2.6 * len(widths)), squeeze=False, layout="constrained")
    for (left, right), width in zip(axes, widths, strict=True):
        timed = [row for row in width["rows"] if "called_us" in row][::-1]
        base = next((row for row in timed if row["name"] == "residual"), None)
        names = [row["name"] for row in timed]
        for offset, key, label in ((0.2, "called_us", "as called"), (-0.2, "graph_us", "in a CUDA graph")):
            values = [overhead(row, base, key) or 0.0 for row in timed]
            bars = left.barh([index + offset for index in range(len(names))], values, height=0.38, label=label)
            left.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
        left.set_yticks(range(len(names)), names)
        left.set_xscale("symlog", linthresh=20)
        left.set_xlabel("step over the residual's, %")
        left.set_title(f"C = {width['dim']}")
        bars = right.barh(names, [row["kept_bytes"] / 1e9 for row in timed], color="#55a868")
        right.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        right.set_yticks(range(len(names)), [""] * len(names))
        right.set_xlabel("kept between forward and backward, GB")
        for axis in (left, right):
            axis.spines[["top", "right"]].set_visible(False)
            axis.margins(x=0.12)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    save_figure(figure, path)

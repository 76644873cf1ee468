"""Tables and figures of a layer report, from its JSON alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.layer_bars import against_peers, best_us, judge
from benchmarks.layer_peers import PEERS
from benchmarks.report import measured_on, save_figure, table

__all__ = ["markdown", "plot"]


def _ratio(microseconds: float | None, floor: float) -> str:
    return "-" if microseconds is None else f"{microseconds / floor:.2f} ({microseconds:.0f})"


def _speed(shape: dict[str, Any]) -> list[str]:
    floor, rows = shape["floor_us"], []
    for row in shape["rows"]:
        if "skipped" in row:
            continue
        both = row["both"]
        graph = "-" if both["graph_us"] is None else _ratio(both["graph_us"], floor["both"])
        rows.append(
            [
                row["name"],
                _ratio(best_us(row["pre"]), floor["pre"]),
                _ratio(best_us(row["post"]), floor["post"]),
                _ratio(best_us(row["forward"]), floor["forward"]),
                graph,
                _ratio(both["called_us"], floor["both"]),
                _ratio(both.get("one_thread_us"), floor["both"]),
            ]
        )
    header = ["implementation", "read", "write", "forward", "fwd+bwd in a graph", "fwd+bwd as called", "in one thread"]
    floor_row = ["*floor, us*", *(f"{floor[key]:.0f}" for key in ("pre", "post", "forward", "both", "both", "both"))]
    return table(header, [floor_row, *rows])


def _chains(shape: dict[str, Any]) -> list[str]:
    floor, rows, length = shape["floor_us"], [], 0
    for row in shape["rows"]:
        if "skipped" in row or "chain" not in row:
            continue
        length = row["chain"]["length"]
        for how, words in (("separate", "separate steps"), ("fused", "fused boundaries")):
            chain = row["chain"][how]
            cells = [f"{row['name']}, {words}"]
            for step in ("forward", "both"):
                found = (chain[step]["half_us"], best_us(chain[step]), chain[step]["site_us"])
                cells += [_ratio(value, floor[step]) for value in found]
            cells += [_ratio(chain["both"].get(key), floor["both"]) for key in ("called_us", "one_thread_us")]
            rows.append([*cells, f"{chain['kept_per_site']:.0f}"])
    if not rows:
        return []
    short = length // 2
    header = ["per site of a chain"]
    for step in ("forward", "fwd+bwd"):
        header += [f"{step}, {short} sites", f"{step}, {length} sites", f"{step}, without the ends"]
    header += ["fwd+bwd as called", "in one thread", "kept, bytes"]
    text = f"Chains of {short} and {length} sites. Without the ends: what each of the last {length - short} sites adds."
    return ["", text, "", *table(header, rows)]


def _host(shape: dict[str, Any]) -> list[str]:
    """What was read as called at each time, with the host's speed before and after."""
    rows = []
    for row in shape["rows"]:
        if "skipped" in row or "addition_us" not in row:
            continue
        kinds = [("", row["both"])]
        kinds += [(f", chain, {how}", row["chain"][how]["both"]) for how in ("separate", "fused") if "chain" in row]
        for words, times in kinds:
            cells = [
                " / ".join(f"{us:.0f}" for us in times.get("read", {}).get(key, [times.get(key)]) if us is not None)
                for key in ("called_us", "one_thread_us")
            ]
            rows.append([row["name"] + words, *(cell or "-" for cell in cells)])
        rows[-1].append(" / ".join(f"{us:.1f}" for us in row["addition_us"]))
        for earlier in rows[-len(kinds) : -1]:
            earlier.append("")
    if not rows:
        return []
    text = (
        "Forward and backward as called, us a site: what was read in its turn, and again later in the run where "
        "two numbers stand; the smaller counts. Beside them what launching a small addition took the host before and "
        "after each."
    )
    return ["", text, "", *table(["implementation", "as called", "in one thread", "an addition, us"], rows)]


def _kernels(shape: dict[str, Any], rate: float) -> list[str]:
    if not shape.get("kernels"):
        return []
    stream, rows = 2 * shape["tokens"] * shape["dim"], []
    for row in shape["kernels"]:
        if "us" not in row:
            rows.append([row["name"], row["row"], "-", row.get("skipped", "-")])
        elif row["streams"] is None:
            rows.append([row["name"], row["row"], "-", f"({row['us']:.0f})"])
        else:
            floor = row["streams"] * stream / rate * 1e6
            rows.append([row["name"], row["row"], f"{row['streams']} E", _ratio(row["us"], floor)])
    return ["", "Kernels alone, in a graph:", "", *table(["kernel", "row", "bytes", "time / bytes (us)"], rows)]


def _bars(report: dict[str, Any]) -> list[str]:
    def number(value: float | None, unit: str) -> str:
        if value is None:
            return "-"
        if 0 < value < 0.01:
            return f"{value:.1e}{unit}"
        return f"{value:.2f}{unit}" if unit else f"{value:.2f}".rstrip("0").rstrip(".")

    rows = []
    for verdict in judge(report):
        word = {True: "met", False: "**missed**", None: "not measured"}[verdict.met]
        cells = [number(value, verdict.unit) for value in (verdict.value, verdict.bar, verdict.stretch)]
        rows.append([verdict.what, *cells, word])
    lines = ["## Bars", "", *table(["bar", "measured", "bar", "stretch", ""], rows)]
    text = (
        "How many times longer a peer takes than ours with fused boundaries, forward and backward per site, best of "
        "graph and as called; the last column: the fastest peer as called over one site of ours as called."
    )
    header = ["tokens x C", *(peer.name for peer in PEERS), "fastest peer, as called"]
    return [*lines, "", text, "", *table(header, against_peers(report))]


def _accuracy(shape: dict[str, Any]) -> list[str]:
    names = ["u", "x_next", "gx", "gf", "gphi", "galpha", "gbias"]
    tokens, stream = shape["tokens"], shape["tokens"] * shape["dim"] * 2
    rows = []
    for row in shape["rows"]:
        if "errors" not in row:
            continue
        memory = row.get("memory")
        numbers = (
            ["-", "-"] if memory is None else [f"{memory['kept'] / tokens:.0f}", f"{memory['peak'] / stream:.1f} E"]
        )
        same = {True: "yes", False: "no", None: "-"}[row.get("same_bits")]
        found = [f"{row['errors'][name]:.1e}" for name in names]
        rows.append([row["name"], row["convention"], *found, same, *numbers])
    header = ["implementation", "convention", *names, "same bits twice", "kept, bytes a token", "peak"]
    return table(header, rows)


def _settling(readings: list[float]) -> list[str]:
    """How the host was before the first row: it is slow for a while after compilers on all cores."""
    if not readings:
        return []
    return [
        f"Before the first row the host was waited for, {len(readings) / 2:.1f} s: launching an addition took "
        f"{readings[0]:.1f} us at first, {readings[-1]:.1f} us in the end."
    ]


def markdown(report: dict[str, Any]) -> str:
    """Render a report. Ratios to the floor come first, microseconds in brackets."""
    about, rate = report["machine"], report["copy_bytes_per_second"] / 1e9
    lines = [
        f"# One mHC site, n = {report['streams']}, bfloat16 streams",
        "",
        f"{measured_on(about)}. Copy rate of this run: {rate:.0f} GB/s (read plus write).",
        f"Command: `{report.get('command', '')}`",
        *_settling(report.get("settling_us", [])),
        *(["", report["note"]] if "note" in report else []),
        "",
        "A cell is time / floor (microseconds). Floors touch each tensor once at the copy rate: read n+1, write 2n+1, "
        "forward 3n+2, forward and backward 6n+5 streams E of M C 2 bytes; coefficients and phi are left out, which "
        "makes the ratios stricter. Times are medians, by graph replay where that is the smaller, unless the column "
        "says which. *In one thread* is as called with `torch.autograd.set_multithreading_enabled(False)`: the "
        "backward runs in the calling thread, not in autograd's own.",
        "",
        *_bars(report),
    ]
    for shape in report["shapes"]:
        lines += [
            "",
            f"## M = {shape['tokens']}, C = {shape['dim']}",
            "",
            *_speed(shape),
            *_chains(shape),
            *_host(shape),
        ]
        lines += [
            "",
            "Relative errors against float64 autograd of the same convention, and memory:",
            "",
            *_accuracy(shape),
            *_kernels(shape, report["copy_bytes_per_second"]),
        ]
        skipped = [f"- {row['name']}: {row['skipped']}" for row in shape["rows"] if "skipped" in row]
        if skipped:
            lines += ["", "Not timed:", "", *skipped]
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw forward plus backward over the floor, one panel a shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes, columns = report["shapes"], min(3, len(report["shapes"]))
    lines = -(-len(shapes) // columns)
    size = (5.2 * columns, 3.4 * lines)
    figure, axes = pyplot.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(shapes) :]:
        axis.axis("off")
    for axis, shape in zip(axes.flat, shapes, strict=False):
        bars: list[tuple[str, float, str]] = []
        for row in shape["rows"]:
            if "skipped" in row:
                continue
            color = "#c44e52" if row["name"].startswith("ours, fused") else "#4c72b0"
            bars.append((row["name"], best_us(row["both"]) / shape["floor_us"]["both"], color))
            fused = best_us(row.get("chain", {}).get("fused", {}).get("both"))
            if fused is not None:
                bars.append((f"{row['name']}, chain", fused / shape["floor_us"]["both"], color))
        bars.sort(key=lambda bar: bar[1], reverse=True)
        names, values, colors = zip(*bars, strict=True) if bars else ((), (), ())
        drawn = axis.barh(names, values, color=colors)
        axis.bar_label(drawn, fmt="%.2f", padding=3)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.margins(x=0.15)
        ticks = [tick for tick in (1, 2, 4, 8, 16, 32) if tick <= 1.2 * max(values, default=1)]
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set_title(f"M = {shape['tokens']}, C = {shape['dim']}")
        axis.set_xlabel("forward + backward, times the floor")
        axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)

"""Tables and figures of a layer report, from its JSON alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["best_us", "markdown", "plot"]


def best_us(times: dict[str, Any] | None) -> float | None:
    """The smaller of the time as called and the time in a graph."""
    if times is None:
        return None
    return min(value for value in (times["called_us"], times["graph_us"]) if value is not None)


def _ratio(microseconds: float | None, floor: float) -> str:
    return "-" if microseconds is None else f"{microseconds / floor:.2f} ({microseconds:.0f})"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|" + " --- |" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def _speed(shape: dict[str, Any]) -> list[str]:
    floor, rows = shape["floor_us"], []
    for row in shape["rows"]:
        if "skipped" in row:
            continue
        separate = row.get("chain", {}).get("separate", {}).get("both")
        fused = row.get("chain", {}).get("fused", {})
        rows.append(
            [
                row["name"],
                _ratio(best_us(row["pre"]), floor["pre"]),
                _ratio(best_us(row["post"]), floor["post"]),
                _ratio(best_us(row["both"]), floor["both"]),
                f"{row['both']['called_us'] / floor['both']:.2f} ({row['both']['called_us']:.0f})",
                _ratio(best_us(separate), floor["both"]),
                _ratio(best_us(fused.get("forward")), floor["forward"]),
                _ratio(best_us(fused.get("both")), floor["both"]),
            ]
        )
    header = ["implementation", "read", "write", "fwd+bwd", "fwd+bwd as called"]
    header += ["fwd+bwd, per site of a chain", "forward, fused boundaries", "fwd+bwd, fused boundaries"]
    floor_row = [
        "*floor, us*",
        *(f"{floor[key]:.0f}" for key in ("pre", "post", "both", "both", "both", "forward", "both")),
    ]
    return _table(header, [floor_row, *rows])


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
        rows.append([row["name"], row["convention"], *(f"{row['errors'][name]:.1e}" for name in names), *numbers])
    return _table(["implementation", "convention", *names, "kept, bytes a token", "peak"], rows)


def markdown(report: dict[str, Any]) -> str:
    """Render a report. Ratios to the floor come first, microseconds in brackets."""
    about, rate = report["machine"], report["copy_bytes_per_second"] / 1e9
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"# One mHC site, n = {report['streams']}, bfloat16 streams",
        "",
        f"{about['date']}, {about['device']}, CUDA {about['cuda']}, Python {about['python']}, {versions}; commit "
        f"{about['commit']}. Copy rate of this run: {rate:.0f} GB/s (read plus write).",
        f"Command: `{report.get('command', '')}`",
        *(["", report["note"]] if "note" in report else []),
        "",
        "A cell is time / floor (microseconds). Floors touch each tensor once at the copy rate: read n+1, write 2n+1, "
        "forward 3n+2, forward and backward 6n+5 streams E of M C 2 bytes; coefficients and phi are left out, which "
        "makes the ratios stricter. Times are medians, by graph replay where that is the smaller.",
    ]
    for shape in report["shapes"]:
        lines += ["", f"## M = {shape['tokens']}, C = {shape['dim']}", "", *_speed(shape)]
        lines += [
            "",
            "Relative errors against float64 autograd of the same convention, and memory:",
            "",
            *_accuracy(shape),
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

    shapes = report["shapes"]
    figure, axes = pyplot.subplots(
        1, len(shapes), figsize=(5.2 * len(shapes), 3.4), squeeze=False, layout="constrained"
    )
    for axis, shape in zip(axes[0], shapes, strict=True):
        bars: list[tuple[str, float]] = []
        for row in shape["rows"]:
            if "skipped" in row:
                continue
            bars.append((row["name"], best_us(row["both"]) / shape["floor_us"]["both"]))
            fused = best_us(row.get("chain", {}).get("fused", {}).get("both"))
            if fused is not None:
                bars.append((f"{row['name']}, boundaries", fused / shape["floor_us"]["both"]))
        bars.sort(key=lambda bar: bar[1], reverse=True)
        drawn = axis.barh([name for name, _ in bars], [value for _, value in bars], color="#4c72b0")
        axis.bar_label(drawn, fmt="%.2f", padding=3)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_title(f"M = {shape['tokens']}, C = {shape['dim']}")
        axis.set_xlabel("forward + backward, times the floor")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    pyplot.close(figure)

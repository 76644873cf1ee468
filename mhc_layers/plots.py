"""Figures of a run, made from its log alone; the only place that imports matplotlib.

Every function takes run directories, writes PNG files and returns their paths. Nothing here needs the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mhc_layers.training.metrics import read_metrics

__all__ = ["plot_comparison", "plot_gains", "plot_loss", "plot_maps", "plot_run", "plot_streams"]

_DPI = 120


def plot_run(folder: Path) -> list[Path]:
    """Draw every figure of a run into ``plots/`` of its directory.

    Parameters
    ----------
    folder : pathlib.Path
        A run directory with ``metrics.jsonl``.

    Returns
    -------
    list of pathlib.Path
        The files written: the loss, and, if the connections were measured, gains by depth, maps and streams.

    Raises
    ------
    FileNotFoundError
        If there is no log.
    """
    log = read_metrics(folder)
    target = folder / "plots"
    target.mkdir(exist_ok=True)
    figures = {"loss": plot_loss(log)}
    if log.get("monitor"):
        last = log["monitor"][-1]
        figures.update(gains=plot_gains(last), maps=plot_maps(last))
        if "streams/cosine_mean" in last:
            figures["streams"] = plot_streams(last)
    return [_save(figure, target / f"{name}.png") for name, figure in figures.items()]


def plot_loss(log: dict[str, list[dict[str, Any]]]) -> Figure:
    """Draw training and validation bits per byte against steps."""
    figure = _figure(6.4, 4.0)
    axes = figure.subplots()
    _draw_loss(axes, log, color="C0", label="training")
    evaluations = log.get("eval", [])
    axes.plot(
        [e["step"] for e in evaluations],
        [e["bits_per_byte"] for e in evaluations],
        "o-",
        color="C1",
        label="validation",
    )
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(0, 8.5))
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def plot_gains(monitor: dict[str, Any]) -> Figure:
    """Draw forward and backward gains by depth, of each site and of the composites, with least and largest values.

    Parameters
    ----------
    monitor : dict
        One ``monitor`` line of the log.
    """
    figure = _figure(9.6, 6.4)
    grid = figure.subplots(2, 2, sharex=True)
    rows = [
        ("each site", "site/", ("forward_gain", "backward_gain")),
        ("composite", "composite/", ("prefix_forward_gain", "suffix_backward_gain")),
    ]
    for row, (what, group, names) in enumerate(rows):
        for column, name in enumerate(names):
            axes = grid[row, column]
            low, high = (np.array(monitor[f"{group}{name}_{end}"], dtype=float) for end in ("min", "max"))
            site = np.arange(len(low))
            axes.fill_between(site, low, high, alpha=0.25, color=f"C{column}", step=None)
            axes.plot(site, high, "o-", markersize=3, color=f"C{column}", label="largest")
            axes.plot(site, low, "o--", markersize=3, color=f"C{column}", label="least")
            axes.axhline(1.0, color="black", linewidth=0.6)
            direction = "forward (row sums)" if column == 0 else "backward (column sums)"
            axes.set_title(f"{what}: {direction}", fontsize=10)
            if max(high.max(), 1.0) / max(low.min(), 1e-6) > 20.0:
                axes.set_yscale("log")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
    grid[1, 0].set_xlabel("sites 0 .. l, from the input")
    grid[1, 1].set_xlabel("sites l .. last, from the output")
    figure.suptitle(f"gain = |signed sum|, step {monitor['step']}", fontsize=11)
    return figure


def plot_maps(monitor: dict[str, Any], *, max_sites: int = 24) -> Figure:
    """Draw the token average of every site's operator and of the composite as heat maps.

    Parameters
    ----------
    monitor : dict
        One ``monitor`` line of the log.
    max_sites : int
        With more sites than this, evenly spread ones are drawn.
    """
    matrices = np.array(monitor["mean_h_res"], dtype=float)
    composite = np.array(monitor["mean_composite"], dtype=float)
    chosen = np.unique(np.linspace(0, len(matrices) - 1, min(max_sites, len(matrices))).round().astype(int))
    tiles = [(f"site {site}", matrices[site]) for site in chosen] + [(f"composite of {len(matrices)}", composite)]
    columns = min(6, len(tiles))
    rows = -(-len(tiles) // columns)
    figure = _figure(1.7 * columns + 0.8, 1.9 * rows + 0.4)
    grid = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    signed = min(matrices.min(), composite.min()) < -1e-6
    bound = max(1.0, float(np.abs(matrices).max()))
    low, colors = (-bound, "RdBu_r") if signed else (0.0, "viridis")
    for axes in grid[len(tiles) :]:
        axes.set_axis_off()
    for axes, (title, matrix) in zip(grid, tiles, strict=False):
        image = axes.imshow(matrix, vmin=low, vmax=bound, cmap=colors)
        axes.set_title(title, fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
        if len(matrix) <= 4:
            for (row, column), value in np.ndenumerate(matrix):
                shade = (
                    "black" if (signed and abs(value) < bound / 2) or (not signed and value > bound / 2) else "white"
                )
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6, color=shade)
    figure.colorbar(image, ax=list(grid), shrink=0.8)
    figure.suptitle(f"H_res[output, input], mean over tokens, step {monitor['step']}", fontsize=10)
    return figure


def plot_streams(monitor: dict[str, Any]) -> Figure:
    """Draw how different the streams are at every depth: cosine, relative difference, effective number."""
    figure = _figure(9.6, 3.0)
    panels = [
        ("pairwise cosine", ("cosine_mean", "cosine_min")),
        ("relative difference from the mean", ("difference",)),
        ("effective number of streams", ("effective_streams",)),
    ]
    for axes, (title, names) in zip(figure.subplots(1, 3), panels, strict=True):
        for name in names:
            axes.plot(monitor[f"streams/{name}"], "o-", markersize=3, label=name.replace("_", " "))
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("streams entering site l; last: leaving")
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend(fontsize=8)
    return figure


def plot_comparison(folders: Sequence[Path], target: Path) -> Path:
    """Draw several runs side by side: training and validation bits per byte, and the composite's gains over training.

    Parameters
    ----------
    folders : sequence of pathlib.Path
        Run directories.
    target : pathlib.Path
        The PNG file to write.

    Returns
    -------
    pathlib.Path
        ``target``.
    """
    figure = _figure(12.8, 4.0)
    losses, validation, gains = figure.subplots(1, 3)
    for index, folder in enumerate(folders):
        log, color = read_metrics(folder), f"C{index % 10}"
        _draw_loss(losses, log, color=color, label=folder.name)
        evaluations = log.get("eval", [])
        validation.plot(
            [e["step"] for e in evaluations],
            [e["bits_per_byte"] for e in evaluations],
            "o-",
            color=color,
            markersize=3,
            label=folder.name,
        )
        monitors = log.get("monitor", [])
        steps = [line["step"] for line in monitors]
        for name, style in (("forward", "-"), ("backward", "--")):
            values = [line[f"composite/prefix_{name}_gain_max"][-1] for line in monitors]
            gains.plot(steps, values, style, color=color, label=f"{folder.name} {name}")
    losses.set(xlabel="step", ylabel="bits per byte", title="training")
    validation.set(xlabel="step", title="validation")
    gains.set(xlabel="step", title="largest composite gain")
    for axes in (losses, validation, gains):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7)
    target.parent.mkdir(parents=True, exist_ok=True)
    return _save(figure, target)


def _draw_loss(axes: Axes, log: dict[str, list[dict[str, Any]]], *, color: str, label: str) -> None:
    lines = [line for line in log.get("train", []) if line["bits_per_byte"] is not None]
    axes.plot(
        [line["step"] for line in lines],
        [line["bits_per_byte"] for line in lines],
        color=color,
        linewidth=1.0,
        label=label,
    )


def _figure(width: float, height: float) -> Figure:
    """Return a figure that belongs to no window system."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=_DPI)
    return path

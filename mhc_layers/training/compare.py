"""Runs side by side: their final numbers in one table, their curves in one figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE
from rich.table import Table

from mhc_layers import plots
from mhc_layers.training.metrics import read_metrics
from mhc_layers.training.report import Report, read_report, rounded_up

__all__ = ["Comparison", "compare_runs", "comparison_table"]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The reports of several runs, warnings about what makes them incomparable, and the figure."""

    folders: list[Path]
    reports: list[Report]
    warnings: list[str]
    figure: Path


def compare_runs(folders: Sequence[Path], figure: Path) -> Comparison:
    """Read finished runs and draw them together.

    Parameters
    ----------
    folders : sequence of pathlib.Path
        Run directories, at least one.
    figure : pathlib.Path
        The PNG file to write.

    Returns
    -------
    Comparison
        With a warning for every difference other than the connection: text, steps.

    Raises
    ------
    FileNotFoundError
        If a run is not finished or not a run.
    ValueError
        If no run is given.
    """
    if not folders:
        raise ValueError("no runs to compare; give run directories, such as runs/tiny_cpu-mhc runs/tiny_cpu-residual")
    reports = [read_report(folder) for folder in folders]
    for folder in folders:
        read_metrics(folder)
    warnings = []
    for what, values in (
        ("text (sha256)", {report.corpus_sha256 for report in reports}),
        ("number of steps", {report.steps for report in reports}),
        ("recipe", {report.name for report in reports}),
    ):
        if len(values) > 1:
            warnings.append(f"the runs differ in their {what}, so their losses do not compare the connections alone")
    return Comparison(
        folders=list(folders), reports=reports, warnings=warnings, figure=plots.plot_comparison(folders, figure)
    )


def comparison_table(comparison: Comparison) -> Table:
    """Return the runs as rows, best validation first."""
    table = Table(title="runs by validation bits per byte", box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in (
        "run",
        "connection",
        "parameters",
        "bits/byte",
        "norm_2 <=",
        "forward gain",
        "backward gain",
        "differ",
        "tokens/s",
    ):
        table.add_column(heading, justify="left" if heading in ("run", "connection") else "right", no_wrap=True)
    rows = sorted(zip(comparison.folders, comparison.reports, strict=True), key=lambda pair: pair[1].bits_per_byte)
    for folder, report in rows:
        table.add_row(
            folder.name,
            report.connection,
            f"{report.parameters:,}",
            f"{report.bits_per_byte:.4f}",
            rounded_up(report.norm2_upper, 6) + (" (abs)" if report.absolute else ""),
            f"{report.forward_gain_min:.3f} - {report.forward_gain_max:.3f}",
            f"{report.backward_gain_min:.3f} - {report.backward_gain_max:.3f}",
            f"{report.stream_difference:.4f}",
            f"{report.tokens_per_second:,.0f}",
        )
    return table

"""The decision table of ``docs/how_to/which_solver``: what each solver leaves of the marginals, and what it costs.

``python -m benchmarks which_solver --device cuda`` for torch on a GPU, ``--device cpu`` for NumPy. Errors are of the
side that a solver does not make exact, over every matrix of a float32 batch of normal logits, in float64 sums. Times
are of the public call and relative to ``SinkhornKnopp()`` in the same line.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

import birkhoff
from benchmarks.report import Deadline, add_options, command, finish, positive, rendered, survives, table, write
from benchmarks.timing import host_machine, time_host
from birkhoff.solvers import Newton, SinkhornKnopp, SinkhornLog

__all__ = ["CHOICES", "HEADING", "Choice", "main", "markdown", "run"]

PACKAGES = ("birkhoff-mhc", "numpy", "torch", "triton", "cupy-cuda13x")

HEADING = "# What each solver leaves, and what it costs"

_LAUNCHES_MATTER = 8e-3
"""A call on a GPU that takes longer, in seconds, is not captured in a graph: launches are no longer its cost."""


@dataclass(frozen=True)
class Choice:
    """A way to call ``birkhoff.project``, under the title of its column; called with logits, it gives the matrix."""

    title: str
    solver: Any
    finish: Literal["none", "nonexpansive", "exact"] = "none"

    def __call__(self, logits: Any) -> Any:
        return birkhoff.project(logits, self.solver, finish=self.finish).matrix


CHOICES = (
    Choice("`SinkhornKnopp()`", SinkhornKnopp()),
    Choice('`finish="exact"`', SinkhornKnopp(), "exact"),
    Choice("`SinkhornLog(num_iters=100)`", SinkhornLog(num_iters=100)),
    Choice("`Newton()`", Newton()),
)


def _column_errors(matrix: Any) -> np.ndarray:
    values = birkhoff._xp.to_numpy(matrix).astype(np.float64)
    return np.abs(values.sum(axis=-2) - 1).max(axis=-1)


def _on_host(batch: int, n: int, std: float) -> Any:
    return (np.random.default_rng(0).normal(size=(batch, n, n)) * std).astype(np.float32)


def _on_device(batch: int, n: int, std: float) -> Any:
    import torch

    return torch.randn(batch, n, n, device="cuda", generator=torch.Generator(device="cuda").manual_seed(0)) * std


def _host_seconds(call: Callable[[], Any]) -> float:
    return time_host([call], budget=0.5)[1]


def _device_seconds(call: Callable[[], Any]) -> float:
    from benchmarks.device import time_calls

    called = time_calls([call], graph=False, budget_ms=25.0).best * 1e-6
    if called > _LAUNCHES_MATTER:
        return called
    return min(called, time_calls([call], budget_ms=25.0).best * 1e-6)


def measure(choice: Choice, logits: Any, seconds: Callable[[Callable[[], Any]], float]) -> dict[str, Any]:
    """One cell of the table: errors of every matrix of the batch, and seconds of a call."""
    cell: dict[str, Any] = {"name": choice.title}
    with survives(cell):
        errors = _column_errors(choice(logits))
        cell |= {"median": float(np.median(errors)), "worst": float(errors.max())}
        cell["seconds"] = seconds(partial(choice, logits))
    return cell


def run(
    device: str,
    sizes: list[int],
    stds: list[float],
    entries: int,
    deadline: Deadline,
    report: dict[str, Any],
    save: Callable[[], None],
) -> None:
    """Measure every choice for each n and standard deviation into ``report``; ``save`` is called after each line."""
    make, seconds = (_on_device, _device_seconds) if device == "cuda" else (_on_host, _host_seconds)
    for n in sizes:
        for std in stds:
            line: dict[str, Any] = {"n": n, "std": std, "batch": max(1, entries // n**2)}
            report["lines"].append(line)
            if deadline.passed:
                line["skipped"] = deadline.reason
            else:
                logits = make(line["batch"], n, std)
                line["cells"] = [measure(choice, logits, seconds) for choice in CHOICES]
            save()


def _number(value: float) -> str:
    """Two digits, or a whole number."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _cells(line: dict[str, Any]) -> list[str]:
    first, *others = line["cells"]
    unit = first.get("seconds")
    cells = [str(line["n"]), f"{line['std']:g}"]
    if unit is None:
        cells.append("-")
    else:
        cells.append(f"{first['median']:.0e} / {first['worst']:.0e}, {_number(1e9 * unit / line['batch'])} ns")
    for cell in others:
        timed = unit is not None and "seconds" in cell
        cells.append(f"{cell['worst']:.0e}, {_number(cell['seconds'] / unit)}" if timed else "-")
    return cells


def markdown(report: dict[str, Any]) -> str:
    """Render a report: the sentence that says where it was measured, and the table."""
    about = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    first, *others = (choice.title for choice in CHOICES)
    header = ["n", "logit std", f"{first}: median / worst, time a matrix", *(f"{o}: worst, time" for o in others)]
    measured = [line for line in report["lines"] if "cells" in line]
    reasons = [
        f"- n = {line['n']}, std {line['std']:g}: {line['skipped']}" for line in report["lines"] if "skipped" in line
    ]
    reasons += [
        f"- n = {line['n']}, std {line['std']:g}, {cell['name']}: {cell['skipped']}"
        for line in measured
        for cell in line["cells"]
        if "skipped" in cell
    ]
    return "\n".join(
        [
            HEADING,
            "",
            f"{about['date']}, {about['device']}, Python {about['python']}, {versions}; commit {about['commit']}.",
            f"Command: `{report['command']}`",
            "",
            f"Errors of the column sums over every matrix of a batch of {report['entries']} entries, float32, normal "
            "logits. Times of the public call: nanoseconds a matrix for the first, and relative to it for the others.",
            "",
            *table(header, [_cells(line) for line in measured]),
            *(["", "Not measured:", "", *reasons] if reasons else []),
        ]
    ) + "\n"  # fmt: skip


def _describe(device: str, commit: str | None) -> dict[str, Any]:
    if device == "cpu":
        return host_machine(PACKAGES, commit)
    from benchmarks.device import machine

    return machine(PACKAGES, commit)


def main(argv: list[str]) -> int:
    """Run ``python -m benchmarks which_solver``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks which_solver", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", type=positive, nargs="+", default=[4, 8, 16, 64])
    parser.add_argument("--stds", type=float, nargs="+", default=[1.0, 3.0, 10.0, 30.0])
    parser.add_argument("--entries", type=positive, help="entries of a batch (default 2^18, on a GPU 2^22)")
    add_options(parser)
    arguments = parser.parse_args(argv)
    if rendered(arguments, markdown, None):
        return 0
    deadline = Deadline(arguments.seconds)
    entries = arguments.entries or (1 << 22 if arguments.device == "cuda" else 1 << 18)
    report = {"machine": _describe(arguments.device, arguments.commit), "command": command("which_solver", argv)}
    report |= {"entries": entries, "lines": []}
    save = partial(write, arguments, report, markdown)
    run(arguments.device, arguments.sizes, arguments.stds, entries, deadline, report, save)
    finish(arguments, report, markdown, None)
    return 0

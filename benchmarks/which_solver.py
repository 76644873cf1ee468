"""The decision table of ``docs/how_to/which_solver``: what each solver leaves of the marginals, and what it costs.

``python -m benchmarks which_solver --device cuda --markdown table.md``; ``--device cpu`` for NumPy. Errors are of the
side that a solver does not make exact, over every matrix of a float32 batch of normal logits, in float64 sums. Times
are of the public call and relative to ``SinkhornKnopp()`` in the same line.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

import birkhoff
from benchmarks.timing import time_host
from birkhoff.solvers import Newton, SinkhornKnopp, SinkhornLog

__all__ = ["CHOICES", "Choice", "lines", "main"]


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

    return time_calls([call], budget_ms=25.0).best * 1e-6


def lines(
    device: str, sizes: tuple[int, ...], stds: tuple[float, ...], batch: Callable[[int], int]
) -> Iterator[tuple[str, ...]]:
    """Rows of the table, one for each n and standard deviation."""
    make, seconds = (_on_device, _device_seconds) if device == "cuda" else (_on_host, _host_seconds)
    for n in sizes:
        for std in stds:
            logits = make(batch(n), n, std)
            cells: list[str] = []
            unit = 0.0
            for choice in CHOICES:
                errors = _column_errors(choice(logits))
                spent = seconds(partial(choice, logits))
                if not cells:
                    unit = spent
                    cells.append(f"{np.median(errors):.0e} / {errors.max():.0e}, {1e9 * spent / batch(n):.3g} ns")
                else:
                    cells.append(f"{errors.max():.0e}, {spent / unit:.2g}")
            yield (str(n), f"{std:g}", *cells)


def main(argv: list[str]) -> int:
    """Run ``python -m benchmarks which_solver``: print the table, and write it line by line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks which_solver", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8, 16, 64])
    parser.add_argument("--stds", type=float, nargs="+", default=[1.0, 3.0, 10.0, 30.0])
    parser.add_argument("--entries", type=int, help="entries of a batch (default 2^18, on a GPU 2^22)")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    arguments = parser.parse_args(argv)
    entries = arguments.entries or (1 << 22 if arguments.device == "cuda" else 1 << 18)
    first, *others = (choice.title for choice in CHOICES)
    header = ["n", "logit std", f"{first}: median / worst, time a matrix", *(f"{o}: worst, time" for o in others)]
    text = "| " + " | ".join(header) + " |\n|" + "---|" * len(header) + "\n"
    print(text, end="", flush=True)
    for cells in lines(
        arguments.device, tuple(arguments.sizes), tuple(arguments.stds), lambda n: max(1, entries // n**2)
    ):
        text += (line := "| " + " | ".join(cells) + " |\n")
        print(line, end="", flush=True)
        if arguments.markdown is not None:
            arguments.markdown.write_text(text)
    return 0

"""One large matrix on a GPU: 100 Sinkhorn iterations, ours and what else there is, correctness before time.

``python -m benchmarks.large_matrix --size 4096``. The floor reads the matrix once an iteration from device memory; ours
keeps part of it on chip, so it can be below.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.device import copy_rate, machine, time_calls

__all__ = ["main", "measure"]


def _passes(kernel: torch.Tensor, sums: torch.Tensor, count: int) -> Callable[[], Any]:
    from birkhoff.kernels.cuda.large import scaling_passes

    return lambda: scaling_passes(kernel, sums, count)[2]


def _matvec(kernel: torch.Tensor, sums: torch.Tensor, count: int) -> Callable[[], Any]:
    def run() -> torch.Tensor:
        total = sums
        for _ in range(count):
            total = (1 / (kernel @ (1 / total))) @ kernel
        return total

    return run


def _potentials(kernel: torch.Tensor, sums: torch.Tensor, count: int) -> Callable[[], Any]:
    logits = kernel.log()

    @torch.compile
    def iteration(g: torch.Tensor) -> torch.Tensor:
        f = -torch.logsumexp(logits + g, 1)
        return -torch.logsumexp(logits + f[:, None], 0)

    def run() -> torch.Tensor:
        g = -sums.log()
        for _ in range(count):
            g = iteration(g)
        return (-g).exp()

    return run


def _pot(kernel: torch.Tensor, sums: torch.Tensor, count: int) -> Callable[[], Any]:
    import ot

    weights = torch.ones(kernel.shape[0], device=kernel.device) / kernel.shape[0]
    cost = -kernel.log()
    return lambda: ot.sinkhorn(weights, weights, cost, 1.0, numItermax=count, stopThr=0.0, warn=False)


#: name, what it needs, how it is made, whether its result is the column sums after the last iteration
CONTESTANTS: tuple[tuple[str, str, Callable[..., Callable[[], Any]], bool], ...] = (
    ("ours: passes in one launch", "torch", _passes, True),
    ("two torch matrix-vector products", "torch", _matvec, True),
    ("torch.compile, potentials on logarithms", "torch", _potentials, True),
    ("POT sinkhorn (torch backend)", "ot", _pot, False),
)


def measure(size: int, count: int) -> str:
    """The table for one size."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    kernel = torch.softmax(torch.randn(size, size, device="cuda", generator=generator), 1)
    sums = kernel.sum(0)
    exact, total = kernel.double(), sums.double()
    for _ in range(count):
        total = (1 / (exact @ (1 / total))) @ exact
    del exact
    floor = 1e6 * count * kernel.nbytes / copy_rate()
    lines = [
        "| implementation | ms, graph or called | ms as called | x one read an iteration | error |",
        "|---" * 5 + "|",
    ]
    for name, package, make, comparable in CONTESTANTS:
        if importlib.util.find_spec(package) is None:
            lines.append(f"| {name} | {package} is not installed |  |  |  |")
            continue
        try:
            call = make(kernel, sums, count)
            error = float(((call() - total) / total).abs().max()) if comparable else float("nan")
            if comparable and not error < 1e-4:
                lines.append(f"| {name} | wrong: {error:.1e} |  |  |  |")
                continue
            times = time_calls([call], budget_ms=200.0)
        except Exception as reason:  # a peer that fails is a line of the report
            lines.append(f"| {name} | failed: {type(reason).__name__} {str(reason)[:80]} |  |  |  |")
            continue
        lines.append(
            f"| {name} | {times.best / 1e3:.2f} | {times.called / 1e3:.2f} | {times.best / floor:.2f} | {error:.1e} |"
        )
    return "\n".join(lines) + f"\n\nOne read an iteration: {floor / 1e3:.2f} ms.\n"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--iterations", type=int, default=100)
    arguments = parser.parse_args()
    print(machine())
    print(f"\n{arguments.size} x {arguments.size}, float32, {arguments.iterations} iterations\n")
    print(measure(arguments.size, arguments.iterations))


if __name__ == "__main__":
    main()

"""One large matrix on a GPU: 100 Sinkhorn iterations, ours and what else there is, correctness before time.

Contestants of ``python -m benchmarks projection --device cuda``. Each starts from a row-normalised kernel and does the
iterations alone; what it returns gives the column sums after the last one. The floor reads the matrix once an iteration
from device memory; ours keeps part of it on chip, so it can be below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["CONTESTANTS", "Contestant"]


@dataclass(frozen=True)
class Contestant:
    """A way to do ``case.num_iters`` iterations: ``make(kernel, sums, count)`` returns the call."""

    name: str
    package: str
    make: Callable[[torch.Tensor, torch.Tensor, int], Callable[[], Any]]
    ours: bool = False
    compiles: bool = False
    #: whether the call returns column sums of the kernel scaled from the left; else the doubly stochastic matrix / n
    gives_sums: bool = True

    def prepare(self, case: Any, logits: torch.Tensor, upstream: Any) -> Callable[[], Any]:
        """The call on one matrix of logits."""
        kernel = torch.softmax(logits[0], 1)
        return self.make(kernel, kernel.sum(0), case.num_iters)

    def check(self, case: Any, answer: Any, logits: torch.Tensor, upstream: Any) -> tuple[str | None, dict[str, float]]:
        """Compare with the same iterations in float64."""
        exact = torch.softmax(logits[0].double(), 1)
        total = exact.sum(0)
        for _ in range(case.num_iters):
            left = 1 / (exact @ (1 / total))
            right, total = 1 / total, left @ exact
        if self.gives_sums:
            error = float(((answer - total) / total).abs().max())
        else:
            error = float((answer * case.n - left[:, None] * exact * right).abs().max())
        return (None if error < 1e-4 else f"off by {error:.1e}"), {"entries": error}


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


CONTESTANTS = (
    Contestant("ours: passes in one launch", "cupy", _passes, ours=True),
    Contestant("two torch matrix-vector products", "torch", _matvec),
    Contestant("torch.compile, potentials on logarithms", "torch", _potentials, compiles=True),
    Contestant("POT sinkhorn (torch backend)", "ot", _pot, gives_sums=False),
)

"""Projection on a GPU: cases, peers and our kernels for ``python -m benchmarks projection --device cuda``.

``median`` is the time as called (launches included), ``graph`` the replay of a CUDA graph where it can be captured,
``fastest`` the smaller. Inputs are made on the device and rotate over sets that together exceed the second-level cache.
Floors divide the bytes by the copy rate of the same run. With ``--jobs``, what compiles is compiled by processes side
by side before the first row, into the compilers' caches on disk.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks import large_matrix, projection_report, tile_kernels
from benchmarks.ahead import compile_ahead
from benchmarks.device import copy_rate, free, machine, time_calls
from benchmarks.projection import PACKAGES, Case, Contestant, Device, everything, refusal, time_limit, torch_call

__all__ = ["CASES", "CONTESTANTS", "DEVICES", "DeviceCase"]

_SECOND_LEVEL_CACHE = 50 << 20

_COMPILE_LIMIT = 90.0
"""Seconds that a process of :func:`_prepare` gives to one row."""

_ENOUGH_BYTES = 16 << 30
"""Memory that rows may leave in the allocator before the next one returns it."""

_LAUNCHES_MATTER_MS = 20.0
"""A call that takes longer is not captured in a graph: launches are no longer its cost."""


@dataclass(frozen=True)
class DeviceCase(Case):
    """A case whose inputs are made on the GPU.

    ``kind``: "" for a batch of normal logits, "limit" for solvers to a tolerance, "vertices" for all matrices of
    {0, 100}^(4 x 4), "large" for one matrix.
    """

    device: str = "cuda"
    kind: str = ""

    @property
    def title(self) -> str:
        if self.kind == "vertices":
            return "65536 x 4 x 4, every matrix of 0 and 100, to 1e-6"
        if self.kind == "large":
            return f"one {self.n} x {self.n} matrix, {self.num_iters} iterations"
        return super().title + (", to 1e-6" if self.kind == "limit" else "")

    @property
    def floor_bytes(self) -> int:
        """As for any case; for one large matrix a read for each iteration."""
        return 4 * self.num_iters * self.n**2 if self.kind == "large" else super().floor_bytes

    def refuse(self, contestant: Contestant) -> str | None:
        """A case is for the contestants of its kind, and for Sinkhorn's iteration on wide logits if it is a limit."""
        if self.kind == "large" or contestant.computes == "large":
            return None if self.kind == contestant.computes else "another kind of problem"
        if contestant.turn >= 2 and not self.kind and self not in _FOR_SLOW_PEERS[: 2 if contestant.turn > 2 else None]:
            return "a slow peer, run on fewer sizes"
        if self.kind == "vertices" or (contestant.computes == "limit" and not self.kind):
            return None if contestant.computes == "limit" and self.kind else "another kind of problem"
        return "the iteration's time is in its own case" if self.kind and contestant.turn else None

    def inputs(self, share: float) -> Iterator[tuple[Any, Any]]:
        """Sets of logits and upstream gradients that together exceed the second-level cache, two at least."""
        if torch.cuda.memory_reserved() > _ENOUGH_BYTES:
            free()
        if self.kind == "vertices":
            entry = torch.arange(16, device="cuda")
            bits = (torch.arange(1 << 16, device="cuda")[:, None] >> entry) & 1
            yield 100.0 * bits.reshape(-1, 4, 4).float(), None
            return
        shape = (max(1, int(self.batch * share)), self.n, self.n)
        sets = max(2, min(16, 2 * _SECOND_LEVEL_CACHE // (8 * self.batch * self.n**2)))
        for seed in range(1 if self.kind == "large" else sets):
            generator = torch.Generator(device="cuda").manual_seed(seed)
            logits = torch.randn(shape, device="cuda", generator=generator) * self.std
            yield logits, torch.randn(shape, device="cuda", generator=generator)


def _cases() -> tuple[DeviceCase, ...]:
    """The cases that bars are set for come first."""
    bars = ((4, 1 << 20), (4, 1 << 22))
    others = ((2, 1 << 20), (3, 1 << 20), (6, 1 << 18), (8, 1 << 18), (16, 1 << 16), (32, 1 << 16), (4, 1 << 16))
    both = (False, True)
    return (
        *(DeviceCase(n, batch, gradient=gradient) for n, batch in bars for gradient in both),
        DeviceCase(4, 1 << 20, std=10.0, kind="limit"),
        DeviceCase(4, 1 << 16, std=100.0, kind="vertices"),
        DeviceCase(4096, 1, num_iters=100, kind="large"),
        *(DeviceCase(n, batch, gradient=gradient) for n, batch in others for gradient in both),
    )


_FOR_SLOW_PEERS = tuple(
    DeviceCase(n, batch, gradient=gradient)
    for n, batch, gradient in (
        (4, 1 << 20, False), (4, 1 << 20, True), (2, 1 << 20, False), (3, 1 << 20, False), (6, 1 << 18, False),
        (8, 1 << 18, False), (16, 1 << 16, False), (16, 1 << 16, True), (32, 1 << 16, False),
    )
)  # fmt: skip
"""Plain torch, torch.compile, POT and lucidrains are tens to hundreds of times slower, or compile for a minute."""


# --------------------------------------------------------------------------------------------------------------------
# Contestants


def _leaves(module: str) -> Callable[..., Callable[[], Any]]:
    """Our kernels without autograd: what they cost."""

    def prepare(case: Case, logits: Any, upstream: Any) -> Callable[[], Any]:
        kernels = importlib.import_module(module)
        options = {"num_iters": case.num_iters}
        if not case.gradient:
            return lambda: kernels.sinkhorn_forward(logits, **options)
        return lambda: (
            kernels.sinkhorn_forward(logits, **options),
            kernels.sinkhorn_backward(logits, upstream, **options),
        )

    return prepare


def _newton(case: Case, logits: Any, upstream: Any) -> Callable[[], Any]:
    from birkhoff.kernels.triton.newton import newton_forward

    return lambda: newton_forward(logits)[0]


def _liger(case: Case, logits: Any, upstream: Any) -> Callable[[], Any]:
    """Liger's coefficient kernel: Sinkhorn and, in the same launch, its 2n gates; eps = 0 is the plain iteration."""
    from liger_kernel.ops.mhc import mhc_sinkhorn_bwd, mhc_split_sinkhorn_fwd

    gates = torch.zeros(logits.shape[0], 2 * case.n, device="cuda")
    mix = torch.cat((gates, logits.flatten(1)), 1).contiguous()
    bias, one = torch.zeros(mix.shape[1], device="cuda"), torch.ones((), device="cuda")
    options = {"tmax": case.num_iters, "sinkhorn_eps": 0.0}

    def forward(**more: Any) -> Any:
        return mhc_split_sinkhorn_fwd(mix, bias, one, one, one, pre_eps=0.0, post_mult=2.0, **options, **more)

    if not case.gradient:
        return lambda: forward()[2]

    def both() -> Any:
        *_, matrix, history = forward(return_hist=True)
        return matrix, mhc_sinkhorn_bwd(mix, bias, one, upstream, hist=history, **options).view_as(logits)

    return both


def _power_of_two(case: Case) -> str | None:
    return None if case.n & (case.n - 1) == 0 else "powers of two only"


def _tile_kernels(x: Any, case: Case) -> Any:
    """TileKernels' operator with its eps at zero, which is the plain iteration, rows first."""
    return tile_kernels.load("tile_kernels.modeling.mhc.ops.sinkhorn").sinkhorn_normalize(x, case.num_iters, 0.0)


def _tile_kernels_serves(case: Case) -> str | None:
    if case.gradient and case.n > 6:
        return "its backward asks for more shared memory than there is"
    return None


def _measures_large(contestant: large_matrix.Contestant) -> Contestant:
    return Contestant(
        contestant.name, contestant.package, "large", contestant.prepare, ours=contestant.ours, devices=("cuda",),
        turn=0 if contestant.ours else 1, compiles="exact" if contestant.compiles else None, check=contestant.check,
    )  # fmt: skip


GPU = ("cuda",)

CASES = _cases()

CONTESTANTS = (
    Contestant(
        "our CUDA kernels, no autograd", "cupy", "columns", _leaves("birkhoff.kernels.cuda.sinkhorn"), ours=True,
        devices=GPU, compiles="any",
    ),
    Contestant(
        "our Triton kernels, no autograd", "triton", "columns", _leaves("birkhoff.kernels.triton.sinkhorn"), ours=True,
        devices=GPU, compiles="any",
    ),
    Contestant("our Newton kernel to 1e-6", "triton", "limit", _newton, ours=True, devices=GPU, compiles="any"),
    *map(_measures_large, large_matrix.CONTESTANTS),
    Contestant(
        "Liger 0.8.5 (with its gates)", "liger_kernel", "rows", _liger, _power_of_two, devices=GPU, turn=1,
        compiles="any",
    ),
    Contestant(
        "TileKernels 1.0.0", "tile_kernels", "rows", torch_call(_tile_kernels), _tile_kernels_serves, devices=GPU,
        turn=1, compiles="any",
    ),
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# The device


def _prepare(rows: Sequence[tuple[Case, Contestant]], jobs: int, seconds: float) -> dict[str, Any]:
    """Run what compiles once, peers first, in processes side by side that are ended after so many seconds."""
    tasks, seen = [], set()
    for case, contestant in sorted(rows, key=lambda row: row[1].ours):
        kept = (contestant.name, case.n, case.gradient, case.batch if contestant.compiles == "exact" else 0)
        if contestant.compiles and refusal(contestant, case) is None and kept not in seen:
            seen.add(kept)
            tasks.append((case.title, contestant.name))
    workers = min(len(tasks), jobs)
    if not workers:
        return {}
    commands = [[json.dumps(tasks[index::workers])] for index in range(workers)]
    return {"compiled_ahead": compile_ahead(commands, workers, seconds, module=__name__)}


def _compile(tasks: list[list[str]]) -> None:
    """A process of :func:`_prepare`: one call of each task, whatever comes of it."""
    cases, contestants, _ = everything()
    for title, name in tasks:
        case = next(case for case in cases if case.title == title and case.device == "cuda")
        contestant = next(contestant for contestant in contestants if contestant.name == name)
        if contestant.compiles == "any":
            case = replace(case, batch=min(case.batch, 1 << 12))
        with contextlib.suppress(Exception), time_limit(_COMPILE_LIMIT):
            logits, upstream = next(case.inputs(1.0))
            contestant.prepare(case, logits, upstream)()
            torch.cuda.synchronize()
        torch.compiler.reset()


def _time(calls: list[Callable[[], Any]]) -> dict[str, Any]:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    calls[0]()
    stop.record()
    stop.synchronize()
    times = time_calls(calls, graph=start.elapsed_time(stop) < _LAUNCHES_MATTER_MS, budget_ms=20.0)
    graph = None if times.graph is None else times.graph * 1e-6
    row: dict[str, Any] = {"median": times.called * 1e-6, "graph": graph, "fastest": times.best * 1e-6}
    return row if times.refused is None else row | {"no_graph": times.refused}


def _after(contestant: Contestant) -> None:
    if contestant.compiles == "exact":
        torch.compiler.reset()


DEVICES = {
    "cuda": Device(
        _time,
        partial(machine, PACKAGES),
        projection_report.markdown,
        prepare=_prepare,
        floor=lambda: {"copy_bytes_per_second": copy_rate()},
        after=_after,
        plot=projection_report.plot,
    )
}

if __name__ == "__main__":
    _compile(json.loads(sys.argv[1]))

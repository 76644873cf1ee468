"""Projection on a GPU: cases, peers and our kernels for ``python -m benchmarks projection --device cuda``.

The first time of a line is the median as called (launches included), the second the replay of a CUDA graph where it can
be captured. Inputs are made on the device and rotate over sets that together exceed the second-level cache. The floor
divides the bytes by the copy rate of the same run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.device import copy_rate, free, time_calls
from benchmarks.projection import Case, Contestant

__all__ = ["CASES", "CONTESTANTS", "TIMERS", "DeviceCase"]

_SECOND_LEVEL_CACHE = 50 << 20


@functools.cache
def _copy_rate() -> float | None:
    return copy_rate() if torch.cuda.is_available() else None


@dataclass(frozen=True)
class DeviceCase(Case):
    """A case whose inputs are made on the GPU."""

    device: str = "cuda"
    copy_rate: float | None = None

    def inputs(self, share: float) -> Iterator[tuple[Any, Any]]:
        """Sets of logits and upstream gradients that together exceed the second-level cache, two at least."""
        free()
        shape = (max(1, int(self.batch * share)), self.n, self.n)
        sets = max(2, min(16, 2 * _SECOND_LEVEL_CACHE // (8 * self.batch * self.n**2)))
        for seed in range(sets):
            generator = torch.Generator(device="cuda").manual_seed(seed)
            logits = torch.randn(shape, device="cuda", generator=generator) * self.std
            yield logits, torch.randn(shape, device="cuda", generator=generator)


def _cases() -> tuple[DeviceCase, ...]:
    rate = _copy_rate()
    sizes = ((4, 1 << 20), (4, 1 << 22), (4, 1 << 16), (2, 1 << 20), (3, 1 << 20), (6, 1 << 18), (8, 1 << 18))
    sizes += ((16, 1 << 16), (32, 1 << 14))
    forward = tuple(DeviceCase(n, batch, copy_rate=rate) for n, batch in sizes)
    wide = (DeviceCase(4, 1 << 20, std=10.0, copy_rate=rate),)
    gradient = tuple(DeviceCase(n, batch, gradient=True, copy_rate=rate) for n, batch in sizes)
    return forward + wide + gradient


def _leaves(module: str) -> Callable[..., Callable[[], Any]]:
    """Our kernels without autograd: what they cost."""

    def prepare(case: Case, logits: Any, upstream: Any) -> Callable[[], Any]:
        import importlib

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


def _newton_serves(case: Case) -> str | None:
    if case.gradient:
        return "forward only"
    return None if case.n <= 8 else "n <= 8"


def _liger(case: Case, logits: Any, upstream: Any) -> Callable[[], Any]:
    """Liger's coefficient kernel: Sinkhorn and, in the same launch, its 2n gates; eps = 0 is the plain iteration."""
    from liger_kernel.ops.mhc import mhc_sinkhorn_bwd, mhc_split_sinkhorn_fwd

    gates = torch.zeros(case.batch, 2 * case.n, device="cuda")
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


def _time_device(calls: Sequence[Callable[[], Any]]) -> tuple[float, float]:
    times = time_calls(calls, budget_ms=25.0)
    return times.called * 1e-6, times.best * 1e-6


GPU = ("cuda",)

CASES = _cases()

CONTESTANTS = (
    Contestant(
        "our CUDA kernels, no autograd", "cupy", "columns", _leaves("birkhoff.kernels.cuda.sinkhorn"), ours=True,
        devices=GPU,
    ),
    Contestant(
        "our Triton kernels, no autograd", "triton", "columns", _leaves("birkhoff.kernels.triton.sinkhorn"), ours=True,
        devices=GPU,
    ),
    Contestant("our Newton kernel to 1e-6", "triton", "limit", _newton, _newton_serves, ours=True, devices=GPU),
    Contestant("Liger (with its gates)", "liger_kernel", "rows", _liger, _power_of_two, devices=GPU),
)  # fmt: skip

TIMERS = {"cuda": _time_device}

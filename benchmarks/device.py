"""Timing, memory and floors on one GPU.

Protocol: correctness first; inputs rotate over sets that together exceed the L2 cache; medians of CUDA events, as
called and by replay of a CUDA graph; a floor is bytes divided by the copy rate of the same run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.report import UsageError, provenance

__all__ = [
    "Memory",
    "Times",
    "copy_rate",
    "free",
    "launch_us",
    "machine",
    "measure_memory",
    "require_gpu",
    "time_calls",
    "time_in_turn",
]

_SLOW_MS = 20.0
"""A call that takes longer is repeated three times at least, a shorter one five times."""

_MOST = 200
"""Calls are repeated as often as the budget allows, up to this."""


@dataclasses.dataclass(frozen=True)
class Times:
    """Microseconds of one call: as the caller sees it, and in a CUDA graph (None if it cannot be captured).

    ``one_thread`` is as called with the backward in the calling thread; None if it was not asked for. Each is the
    median of its ``readings``, which are in the order of the calls: those of groups in turn are pairs.
    """

    called: float
    graph: float | None
    refused: str | None = None
    one_thread: float | None = None
    readings: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """What a report keeps."""
        row = {"called_us": self.called, "graph_us": self.graph, "graph_refused": self.refused}
        return row if self.one_thread is None else row | {"one_thread_us": self.one_thread}

    @property
    def best(self) -> float:
        """The smaller of the two: what the kernels cost."""
        return self.called if self.graph is None else min(self.called, self.graph)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes: alive between forward and backward beyond inputs and outputs, and the highest above the inputs."""

    kept: int
    peak: int


def free() -> None:
    """Return memory that earlier measurements hold in caches."""
    gc.collect()
    torch.cuda.empty_cache()


def _readings_us(runs: Sequence[Callable[[int], None]], repeats: int) -> list[list[float]]:
    """Microseconds of each call of each function, called in turn."""
    events = [[[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)] for _ in runs]
    for index in range(repeats):
        for run, pairs in zip(runs, events, strict=True):
            start, stop = pairs[index]
            start.record()
            run(index)
            stop.record()
    torch.cuda.synchronize()
    return [[start.elapsed_time(stop) * 1e3 for start, stop in pairs] for pairs in events]


def _timed(runs: Sequence[Callable[[int], None]], budget_ms: float) -> list[list[float]]:
    """Readings of as many calls as the milliseconds for each function allow."""
    for run in runs:
        run(0)
    once = max(max(readings[0] for readings in _readings_us(runs, 1)) / 1e3, 1e-3)
    return _readings_us(runs, int(min(_MOST, max(5 if once < _SLOW_MS else 3, budget_ms / once))))


def settle(seconds: float = 20.0, quiet: float = 3.0) -> list[float]:
    """Wait until the host has stopped getting faster: not by 5 percent within ``quiet`` seconds, or for ``seconds``.

    After compilers on all cores a host was seen to take up to 1.5 times as long for the same calls, for some 20 s.

    Returns
    -------
    list of float
        Microseconds that launching a small addition took, a reading every half second.
    """
    start = improved = time.monotonic()
    readings, best = [], float("inf")
    while (now := time.monotonic()) < start + seconds and now < improved + quiet:
        readings.append(launch_us(0.5))
        if readings[-1] < 0.95 * best:
            best, improved = readings[-1], time.monotonic()
    return readings


def launch_us(seconds: float = 0.03) -> float:
    """Median microseconds of the host for one small addition, over some seconds: how fast the host is now."""
    value, times, end = torch.zeros(1, device="cuda"), [], time.monotonic() + seconds
    while time.monotonic() < end:
        begin = time.perf_counter()
        for _ in range(100):
            value.add_(1.0)
        times.append((time.perf_counter() - begin) * 1e4)
        torch.cuda.synchronize()
    return statistics.median(times)


def time_calls(calls: Sequence[Callable[[], Any]], **options: Any) -> Times:
    """Time functions that do the same work on different inputs, in turn; options as of :func:`time_in_turn`."""
    return time_in_turn([calls], **options)[0]


def time_in_turn(
    groups: Sequence[Sequence[Callable[[], Any]]],
    *,
    graph: bool = True,
    budget_ms: float = 60.0,
    one_thread: bool = False,
) -> list[Times]:
    """Time groups of functions, each of which does the same work on different inputs; a call of each group in turn.

    ``called`` is the median over single calls between two events on an idle stream, which includes gaps between
    launches when the host is slower than the device. ``graph`` captures all calls of a group once and divides the
    replay's median. ``one_thread`` also times calls while autograd runs backwards in the calling thread, not in its
    own.
    """
    for calls in groups:
        for call in calls:
            call()
    torch.cuda.synchronize()
    as_called = [lambda index, calls=calls: calls[index % len(calls)]() for calls in groups]
    found = [{"called_us": readings} for readings in _timed(as_called, budget_ms)]
    if one_thread:
        with torch.autograd.set_multithreading_enabled(False):
            for each, readings in zip(found, _timed(as_called, budget_ms), strict=True):
                each["one_thread_us"] = readings
    refused: list[str | None] = [None] * len(groups)
    replays: dict[int, Callable[[int], None]] = {}
    for place, calls in enumerate(groups):
        captured = _capture(calls) if graph else "not asked for"
        if isinstance(captured, str):
            refused[place] = captured
        else:
            replays[place] = lambda index, captured=captured: captured.replay()
    if replays:
        for place, readings in zip(replays, _timed([*replays.values()], budget_ms), strict=True):
            found[place]["graph_us"] = [us / len(groups[place]) for us in readings]
    return [_times(readings, reason) for readings, reason in zip(found, refused, strict=True)]


def _times(readings: dict[str, list[float]], refused: str | None) -> Times:
    middle = {how: statistics.median(values) for how, values in readings.items()}
    return Times(middle["called_us"], middle.get("graph_us"), refused, middle.get("one_thread_us"), readings)


def _capture(calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph | str:
    """A graph of all calls, or why there is none."""
    stream, captured = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    try:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        with torch.cuda.graph(captured):
            for call in calls:
                call()
    except Exception as error:
        _recover_from_failed_capture()
        return _first_cause(error)
    return captured


def _first_cause(error: BaseException) -> str:
    """Name the error that came first: leaving a failed capture raises another one over it."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def _recover_from_failed_capture() -> None:
    """Give the generator a state that is not waiting for a capture to end; all that follows would fail otherwise."""
    with contextlib.suppress(Exception):
        torch.cuda.synchronize()
    with contextlib.suppress(Exception):
        fresh = torch.Generator(device="cuda")
        torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(fresh.graphsafe_get_state())


def measure_memory(forward: Callable[[], Any], backward: Callable[[Any], Any], outputs: int) -> Memory:
    """Measure one forward and backward; ``outputs`` bytes of the forward's results are not counted as kept.

    Counted is what is asked for. The allocator may give up to 1 MiB more a block, depending on what ran before.
    """
    result = backward(forward())  # compiles and fills workspaces that stay
    del result
    free()
    torch.cuda.reset_peak_memory_stats()
    before = _requested("current")
    result = forward()
    kept = _requested("current") - before - outputs
    result = backward(result)
    torch.cuda.synchronize()
    peak = _requested("peak") - before
    del result
    return Memory(kept, peak)


def _requested(what: str) -> int:
    return torch.cuda.memory_stats()[f"requested_bytes.all.{what}"]


def copy_rate() -> float:
    """Bytes per second, read plus write, of the fastest of several copies on the device; floors divide by it."""
    best = 0.0
    for size in (1 << 30, 1 << 32):
        source = torch.empty(size // 4, dtype=torch.float32, device="cuda").normal_()
        target = torch.empty_like(source)

        def copy(source: torch.Tensor = source, target: torch.Tensor = target) -> None:
            target.copy_(source)

        def add(source: torch.Tensor = source, target: torch.Tensor = target) -> None:
            torch.add(source, 1.0, out=target)

        for call in (copy, add):
            time_calls([call], graph=False, budget_ms=100.0)  # until the clocks are up
            best = max(best, 2 * size / time_calls([call], graph=False, budget_ms=60.0).best * 1e6)
        del source, target, copy, add, call
        free()
    return best


def require_gpu() -> None:
    """Refuse to measure where there is no CUDA device."""
    if not torch.cuda.is_available():
        raise UsageError("needs a CUDA device, and torch sees none here; --from-json renders a report without one")


def machine(packages: Sequence[str], commit: str | None = None) -> dict[str, Any]:
    """Describe hardware, versions, commit and date of a report; ``commit`` is for a tree without its git folder."""
    require_gpu()
    about = {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return about | provenance(packages, commit)

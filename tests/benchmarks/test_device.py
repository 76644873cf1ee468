"""Timing without a GPU: which call is timed when, on a clock that the calls themselves advance."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from benchmarks import device


class Clock:
    """Milliseconds, and an order of the calls."""

    def __init__(self) -> None:
        self.now, self.order = 0.0, []

    def call(self, name: str, milliseconds: float, in_one_thread: float | None = None) -> Any:
        def run() -> None:
            threads = torch._C._is_multithreading_enabled()
            self.order.append(name)
            self.now += milliseconds if threads or in_one_thread is None else in_one_thread

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = -1.0

        def record(self) -> None:
            self.at = made.now

        def elapsed_time(self, stop: Event) -> float:
            return stop.at - self.at

    class Graph:
        def __init__(self, calls: list[Any]) -> None:
            self.calls = calls

        def replay(self) -> None:
            for call in self.calls:
                call()
            made.now -= 1.0  # what launches cost

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(device, "_capture", lambda calls: "E: no" if len(calls) == 3 else Graph(calls))
    return made


def test_groups_are_timed_in_turn_and_each_has_its_own_times(clock: Clock) -> None:
    groups = [[clock.call("a", 3.0, 2.0), clock.call("b", 3.0, 2.0)], [clock.call("c", 8.0)]]
    one, two = device.time_in_turn(groups, one_thread=True, budget_ms=64.0)
    assert (one.called, one.one_thread, one.graph) == pytest.approx((3e3, 2e3, 2.5e3))
    assert (two.called, two.one_thread, two.graph) == pytest.approx((8e3, 8e3, 7e3))
    assert "".join(clock.order).count("acbc") >= 3
    assert one.row()["one_thread_us"] == one.one_thread and one.best == one.graph
    assert one.readings["graph_us"] == pytest.approx([2.5e3] * 9) and len(two.readings["called_us"]) == 8


def test_a_group_that_cannot_be_captured_keeps_its_time_as_called(clock: Clock) -> None:
    groups = [[clock.call("a", 3.0)] * 3, [clock.call("c", 8.0)]]
    refused, captured = device.time_in_turn(groups)
    assert (refused.graph, refused.refused, refused.best) == (None, "E: no", pytest.approx(3e3))
    assert captured.graph == pytest.approx(7e3) and captured.refused is None and captured.one_thread is None
    assert device.time_calls([clock.call("a", 3.0)], graph=False).refused == "not asked for"


def test_slow_calls_are_repeated_less(clock: Clock) -> None:
    device.time_calls([clock.call("slow", 500.0)], graph=False)
    slow = len(clock.order)
    device.time_calls([clock.call("quick", 0.001)], graph=False)
    assert slow == 1 + 1 + 1 + 3 and len(clock.order) - slow == 1 + 1 + 1 + 200


@pytest.mark.parametrize(
    ("us", "expected"),
    [
        ([20.0, 15.0, 10.0, 9.8, 9.7, 9.6, 9.9], 7),  # 4 readings, 2 s, after the last one that was faster
        ([7.0], 5),
        ([30.0 * 0.9**k for k in range(100)], 12),  # the time is up
    ],
    ids=["settles", "settled", "never"],
)
def test_a_host_is_waited_for_until_it_stops_getting_faster(
    monkeypatch: pytest.MonkeyPatch, us: list[float], expected: int
) -> None:
    now, values = [0.0], iter([*us, *us[-1:] * 200])

    def reading(seconds: float) -> float:
        now[0] += seconds
        return next(values)

    monkeypatch.setattr(device, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(device, "launch_us", reading)
    assert len(device.settle(seconds=6.0, quiet=2.0)) == expected

"""Replayed operators: the launches of a first call, on the tensors of later ones. Launches here are NumPy's."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mhc_layers.kernels import replay
from mhc_layers.kernels.table import restricted_to


def at(address: int, numel: int) -> np.ndarray:
    """The float32 values at an address, as a kernel sees them."""
    return np.frombuffer((ctypes.c_float * numel).from_address(address), dtype=np.float32)


def launch(numel: int, scale: float, *tensors: Tensor, starts: bool = True) -> None:
    """``last = scale * sum of the others``."""

    def start(stream: int, *addresses: int) -> None:
        *sources, target = (at(address, numel) for address in addresses)
        target[:] = np.float32(scale) * sum(sources)

    replay.note(lambda index: start if starts else None, tensors)
    if numel:
        start(0, *map(torch.Tensor.data_ptr, tensors))


class Counted:
    """An operator of two launches with an intermediate, optional arguments and an empty output."""

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda x: x, starts: bool = True) -> None:
        self.calls = 0

        def body(
            x: Tensor, y: Tensor, z: Tensor | None, scale: float, name: str = "", w: Tensor | None = None
        ) -> tuple[Tensor, Tensor, Tensor]:
            self.calls += 1
            both, out, total = (x.new_empty((n, *x.shape)) for n in (2, 1, 1))
            launch(x.numel(), scale, x, y, both[0])
            launch(x.numel(), 3.0, *(t for t in (x, z, w) if t is not None), both[1])
            launch(x.numel(), 1.0, both[0], both[1], out, starts=starts)
            launch(x.numel(), 2.0, change(both[1]), total)
            return out, total, x.new_empty((0,))

        self.operator = replay.replayed(body)

    @staticmethod
    def expected(
        x: Tensor, y: Tensor, z: Tensor | None, scale: float, w: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        second = 3.0 * sum(t for t in (x, z, w) if t is not None)
        return (scale * (x + y) + second)[None], 2.0 * second[None]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_runs_here", lambda device: True)
    monkeypatch.setattr(replay, "_stream", lambda device: 0)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for ours, wanted in zip(found, expected, strict=False):
        assert torch.equal(ours, wanted)
    assert found[-1].shape == (0,)


def test_later_calls_replay_the_first() -> None:
    op, kept = Counted(), []
    for seed in range(4):
        x, y, z = (draw(8, 4, seed=10 * seed + i) for i in range(3))
        kept.append((op.operator(x, y, z, 0.5), Counted.expected(x, y, z, 0.5)))
    assert op.calls == 1
    for found, expected in kept:  # each has outputs of its own
        check(found, expected)


def test_another_kind_of_call_is_recorded_anew() -> None:
    op = Counted()
    x, y, z = (draw(8, 4, seed=i) for i in range(3))
    kinds: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x, y, z, 0.5), {}),
        ((x, y, None, 0.5), {}),
        ((x, y, None, 0.5, "", z), {"w": z}),
        ((x, y, z, 0.25), {}),
        ((x.view(4, 8), y.view(4, 8), z.view(4, 8), 0.5), {}),
        ((draw(8, 8, seed=3), draw(8, 8, seed=4), draw(8, 8, seed=5), 0.5), {}),
    ]
    for count, (args, named) in enumerate(kinds, 1):
        for _ in range(2):
            check(op.operator(*args), Counted.expected(*args[:4], **named))
        assert op.calls == count
    with restricted_to("plain"):
        check(op.operator(x, y, z, 0.5), Counted.expected(x, y, z, 0.5))
    assert op.calls == len(kinds) + 1


@pytest.mark.parametrize("change", [torch.clone, lambda x: x.add_(0.0)], ids=["copies", "writes"])
def test_a_body_that_computes_runs_every_time(change: Callable[[Tensor], Tensor]) -> None:
    op = Counted(change)
    for seed in range(3):
        x, y, z = (draw(8, 4, seed=10 * seed + i) for i in range(3))
        check(op.operator(x, y, z, 0.5), Counted.expected(x, y, z, 0.5))
    assert op.calls == 3


def test_a_launch_without_a_start_is_not_replayed() -> None:
    op = Counted(starts=False)
    x, y, z = (draw(8, 4, seed=i) for i in range(3))
    for _ in range(3):
        check(op.operator(x, y, z, 0.5), Counted.expected(x, y, z, 0.5))
    assert op.calls == 3


def test_one_tensor_in_two_places_is_not_recorded() -> None:
    op = Counted()
    x, y, z = (draw(8, 4, seed=i) for i in range(3))
    check(op.operator(x, x, z, 0.5), Counted.expected(x, x, z, 0.5))
    for count in (2, 2):
        check(op.operator(x, y, z, 0.5), Counted.expected(x, y, z, 0.5))
        assert op.calls == count
    check(op.operator(x, x, z, 0.5), Counted.expected(x, x, z, 0.5))  # replayed: places are known by now
    assert op.calls == 2


def test_addresses_off_sixteen_bytes_run_the_body() -> None:
    op = Counted()
    x, y, z = (draw(8, 4, seed=i) for i in range(3))
    op.operator(x, y, z, 0.5)
    off = draw(33, seed=3)[1:].view(8, 4)
    for _ in range(2):
        check(op.operator(x, off, z, 0.5), Counted.expected(x, off, z, 0.5))
    assert op.calls == 3


def test_no_tokens_run_the_body() -> None:
    op, none = Counted(), torch.empty(0, 4)
    op.operator(none, none, none, 0.5)
    op.operator(none, none, none, 0.5)
    assert op.calls == 2


def test_a_launch_inside_of_an_argument_is_not_replayed() -> None:
    calls = []

    def body(x: Tensor) -> Tensor:
        calls.append(1)
        out = x.new_empty((4,))
        launch(4, 2.0, x[4:], out)
        return out

    op = replay.replayed(body)
    for seed in range(2):
        x = draw(8, seed=seed)
        assert torch.equal(op(x), 2.0 * x[4:])
    assert len(calls) == 2


def test_an_output_that_is_part_of_something_is_not_replayed() -> None:
    def body(x: Tensor) -> Tensor:
        out = x.new_empty((8,))
        launch(8, 2.0, x, out)
        return out[4:]

    op = replay.replayed(body)
    for seed in range(2):
        x = draw(8, seed=seed)
        assert torch.equal(op(x), 2.0 * x[4:])


def test_an_error_ends_the_recording() -> None:
    def body(x: Tensor) -> Tensor:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        replay.replayed(body)(draw(4, seed=0))
    assert replay._LOCAL.tape is None


def test_elsewhere_the_body_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    op = Counted()
    x, y, z = (draw(8, 4, seed=i) for i in range(3))
    for _ in range(2):
        check(op.operator(x, y, z, 0.5), Counted.expected(x, y, z, 0.5))
    assert op.calls == 2


def test_kinds_are_forgotten_at_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_LARGEST", 2)
    op = Counted()
    call = functools.partial(op.operator, *(draw(8, 4, seed=i) for i in range(2)), None)
    for scale in (1.0, 2.0, 3.0, 1.0):
        call(scale)
    assert op.calls == 4

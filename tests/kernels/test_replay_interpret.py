"""Operators replay to the bit: the fused layer's kernels, run by Triton's interpreter at replayed addresses."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from mhc_layers.conventions import DEEPSEEK_V41, PAPER
from mhc_layers.kernels import replay
from tests.kernels.replay_cases import OPERATORS, make_sites, run

triton_launch = pytest.importorskip("mhc_layers.kernels.triton.launch")

pytestmark = pytest.mark.interpret

C = 24


def tensor_at(address: int, like: Tensor) -> Tensor:
    """A tensor of the same kind at an address."""
    if like.numel() == 0:
        return like
    span = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
    memory = (ctypes.c_char * (span * like.dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=like.dtype, count=span).as_strided(like.shape, like.stride())


def note(start_on: Callable[[int], Any], tensors: tuple[Tensor, ...]) -> None:
    """Note a launch as one that can start: on the tensors that lie at the addresses it is given."""
    kernel: Callable[..., None] = start_on.__self__  # type: ignore[attr-defined]

    def start(stream: int, *addresses: int) -> None:
        kernel(*map(tensor_at, addresses, tensors))

    replay.note(lambda index: start, tensors)


def unseen(call: Callable[..., None]) -> Callable[..., None]:
    """A launch whose interpreter, which computes with torch, is not seen by the recording."""

    def run(*args: Any) -> None:
        with _disable_current_modes():
            call(*args)

    return run


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Replay on the CPU; counts, for every operator, the calls that were recorded and can be replayed."""
    counts: dict[str, int] = {}
    record = replay._record

    def counted(body: Any, args: Any, tensors: Any) -> Any:
        result, plan = record(body, args, tensors)
        counts[body.__name__] = counts.get(body.__name__, 0) + (plan is not None)
        return result, plan

    monkeypatch.setattr(triton_launch, "note", note)
    monkeypatch.setattr(triton_launch.Launch, "__call__", unseen(triton_launch.Launch.__call__))
    monkeypatch.setattr(replay, "_runs_here", lambda device: True)
    monkeypatch.setattr(replay, "_stream", lambda device: 0)
    monkeypatch.setattr(replay, "_record", counted)
    return counts


@pytest.mark.parametrize(("with_norm", "fused"), [(False, False), (True, True)], ids=["separate", "norm-boundary"])
def test_operators_replay_to_the_bit(recorded: dict[str, int], with_norm: bool, fused: bool) -> None:
    sites, tokens = make_sites(PAPER, with_norm, C), 5 + 2 * with_norm + fused  # each case's calls are the first
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "_runs_here", lambda device: False)
        expected = run(sites, 1, fused, tokens)
    run(sites, 0, fused, tokens)
    assert set(recorded) == OPERATORS[fused] and all(recorded.values())
    counts = dict(recorded)
    for ours, wanted in zip(run(sites, 1, fused, tokens), expected, strict=True):
        assert torch.equal(ours, wanted)
    assert recorded == counts, "the second run recorded nothing"


def test_a_delayed_convention_gives_the_same_bits(recorded: dict[str, int]) -> None:
    sites = make_sites(DEEPSEEK_V41, True, C)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "_runs_here", lambda device: False)
        expected = run(sites, 1, True, 9)
    run(sites, 0, True, 9)
    for ours, wanted in zip(run(sites, 1, True, 9), expected, strict=True):
        assert torch.equal(ours, wanted)

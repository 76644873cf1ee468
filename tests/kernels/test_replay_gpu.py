"""Operators replay to the bit on a GPU, with the rows of the leaves that its table chooses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mhc_layers.conventions import DEEPSEEK_V4, DEEPSEEK_V41, PAPER, Convention
from mhc_layers.kernels import replay
from mhc_layers.kernels.table import restricted_to
from tests.kernels.replay_cases import OPERATORS, make_sites, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts, for every operator, the calls that were recorded and can be replayed."""
    counts: dict[str, int] = {}
    record = replay._record

    def counted(body: Any, args: Any, tensors: Any) -> Any:
        result, plan = record(body, args, tensors)
        counts[body.__name__] = counts.get(body.__name__, 0) + (plan is not None)
        return result, plan

    monkeypatch.setattr(replay, "_record", counted)
    return counts


def without_replay(sites: Any, seed: int, fused: bool, tokens: int) -> list[torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "_runs_here", lambda device: False)
        return run(sites, seed, fused, tokens)


@pytest.mark.parametrize("rows", [None, ("triton", "plain")], ids=["chosen", "triton"])
@pytest.mark.parametrize("fused", [False, True], ids=["separate", "boundary"])
@pytest.mark.parametrize("with_norm", [False, True], ids=["plain", "norm"])
def test_operators_replay_to_the_bit(
    recorded: dict[str, int], with_norm: bool, fused: bool, rows: tuple[str, ...] | None
) -> None:
    tokens = 300 + 2 * with_norm + fused
    sites = make_sites(PAPER, with_norm, 256, device="cuda")
    with restricted_to(*rows or ("cuda", "triton", "plain")):
        run(sites, 0, fused, tokens)
        assert set(recorded) == OPERATORS[fused]
        assert all(recorded.values())
        counts = dict(recorded)
        for seed in (1, 2):
            for ours, wanted in zip(
                run(sites, seed, fused, tokens), without_replay(sites, seed, fused, tokens), strict=True
            ):
                assert torch.equal(ours, wanted)
        assert recorded == counts, "later runs recorded nothing"


@pytest.mark.parametrize("convention", [DEEPSEEK_V4, DEEPSEEK_V41], ids=lambda c: c.name)
def test_other_conventions_give_the_same_bits(convention: Convention) -> None:
    sites = make_sites(convention, True, 128, device="cuda")
    run(sites, 0, True, 100)
    for ours, wanted in zip(run(sites, 1, True, 100), without_replay(sites, 1, True, 100), strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "boundary"])
def test_a_backward_in_the_calling_thread_has_the_same_bits(fused: bool) -> None:
    sites = make_sites(PAPER, True, 128, device="cuda")
    expected = run(sites, 1, fused, 55)
    with torch.autograd.set_multithreading_enabled(False):
        for _ in range(2):
            for ours, wanted in zip(run(sites, 1, fused, 55), expected, strict=True):
                assert torch.equal(ours, wanted)


def test_a_side_stream_and_a_graph_launch_where_they_are(recorded: dict[str, int]) -> None:
    sites, tokens = make_sites(PAPER, True, 128, device="cuda"), 77
    expected = without_replay(sites, 1, True, tokens)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            found = run(sites, 1, True, tokens)
    torch.cuda.synchronize()
    for ours, wanted in zip(found, expected, strict=True):
        assert torch.equal(ours, wanted)
    x = torch.randn(tokens, 4, 128, device="cuda").to(torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        for _ in range(2):
            sites[0].pre(x)
        with torch.cuda.graph(graph):
            u, state = sites[0].pre(x)
        x.normal_()
        graph.replay()
        again, state_again = sites[0].pre(x)
    assert torch.equal(u, again)
    assert torch.equal(state.coef, state_again.coef)

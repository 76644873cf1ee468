"""The layer and training benchmarks without a GPU: gates, floors, chains, and reports rendered from JSON."""

from pathlib import Path

import pytest
import torch

from benchmarks import layer, layer_peers, layer_report, training

PLAIN = next(peer for peer in layer.OURS if peer.name == "ours, plain torch")
EAGER = next(peer for peer in layer_peers.PEERS if peer.name == "eager, fp32")


def parameters(n: int, c: int) -> layer_peers.Parameters:
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(n * (n + 2), n * c, generator=generator) / (n * c) ** 0.5
    bias = 0.5 * torch.randn(n * (n + 2), generator=generator)
    return layer_peers.Parameters(phi, torch.tensor([0.8, 1.1, 0.9]), bias)


def inputs(m: int, n: int, c: int) -> layer.Inputs:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    return layer.Inputs(normal(m, n, c).requires_grad_(), normal(m, c).requires_grad_(), normal(m, c), normal(m, n, c))


def test_floors_count_each_tensor_once() -> None:
    assert layer.floors(4) == {"pre": 5, "post": 9, "forward": 14, "both": 29}


@pytest.mark.parametrize("peer", [PLAIN, EAGER], ids=lambda peer: peer.name)
def test_a_correct_implementation_passes_its_gate(peer: layer_peers.Peer) -> None:
    runner = peer.make(parameters(4, 32), 4)
    found = layer.errors(runner, peer, parameters(4, 32), inputs(16, 4, 32))
    assert layer.gate(peer, found) is None


def test_a_wrong_convention_fails_the_gate() -> None:
    runner = PLAIN.make(parameters(4, 32), 4)
    wrong = layer_peers.Peer("wrong", PLAIN.make, PLAIN.convention.replace(first="rows", num_iters=1), "")
    found = layer.errors(runner, wrong, parameters(4, 32), inputs(16, 4, 32))
    assert "x_next" in str(layer.gate(wrong, found))


@pytest.mark.parametrize("fused", [True, False])
def test_a_chain_has_one_read_a_site_and_every_gradient(fused: bool) -> None:
    chain = layer.Chain(lambda: PLAIN.make(parameters(4, 8), 4), 3, inputs(6, 4, 8), fused)
    outputs = chain.forward()
    assert [tuple(output.shape) for output in outputs] == [(6, 8), (6, 8), (6, 8), (6, 4, 8)]
    assert len(chain.backward(outputs)) == 1 + 3 + 3 * 5


def times(called: float, graph: float | None) -> dict:
    return {"called_us": called, "graph_us": graph, "graph_refused": None}


MACHINE = {"date": "d", "device": "gpu", "cuda": "13", "python": "3", "versions": {"torch": "2"}, "commit": None}


def test_layer_report_names_what_was_not_timed(tmp_path: Path) -> None:
    both = times(900.0, 800.0)
    row = {
        "name": "a",
        "convention": "paper",
        "errors": dict.fromkeys(["u", "x_next", "gx", "gf", "gphi", "galpha", "gbias"], 1e-3),
    }
    row |= {"pre": both, "post": both, "both": both, "memory": {"kept": 1000, "peak": 10**9}}
    row |= {"chain": {"fused": {"forward": both, "both": times(700.0, None)}, "separate": {"both": both}}}
    shape = {"tokens": 16, "dim": 8, "floor_us": dict.fromkeys(["pre", "post", "forward", "both"], 400.0)}
    shape["rows"] = [row, {"name": "b", "skipped": "not installed: b"}]
    report = {"machine": MACHINE, "copy_bytes_per_second": 3e12, "streams": 4, "shapes": [shape]}
    text = layer_report.markdown(report)
    assert "| a | 2.00 (800) |" in text and "1.75 (700)" in text and "- b: not installed: b" in text
    layer_report.plot(report, tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size > 1000


def test_training_report_takes_overhead_from_the_residual_of_the_same_run() -> None:
    def row(name: str, rate: float) -> dict:
        return {"name": name, "tokens_per_second": rate, "kept_bytes": 1e9, "peak_bytes": 2e9} | times(1e4, None)

    width = {"dim": 8, "connections_floor_us": 1e3, "rows": [row("residual", 1000.0), row("mHC, fused", 800.0)]}
    report = {
        "machine": MACHINE,
        "copy_bytes_per_second": 3e12,
        "widths": [width],
        "layers": 1,
        "batch": 1,
        "sequence": 8,
    }
    assert "| mHC, fused | 25.0 % |" in training.markdown(report)

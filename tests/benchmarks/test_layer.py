"""The layer benchmark without a GPU: gates, floors, chains, bars, and reports rendered from JSON."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import (
    ahead,
    device,
    layer,
    layer_bars,
    layer_kernels,
    layer_measure,
    layer_peers,
    layer_report,
    report,
)
from benchmarks.report import Deadline
from mhc_layers import PAPER
from mhc_layers._torch_ops import fused_site

PLAIN = next(peer for peer in layer_measure.OURS if peer.name == "ours, plain torch")
EAGER = next(peer for peer in layer_peers.PEERS if peer.name == "eager, fp32")


def parameters(n: int, c: int) -> layer_peers.Parameters:
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(n * (n + 2), n * c, generator=generator) / (n * c) ** 0.5
    bias = 0.5 * torch.randn(n * (n + 2), generator=generator)
    return layer_peers.Parameters(phi, torch.tensor([0.8, 1.1, 0.9]), bias)


def inputs(m: int, n: int, c: int) -> layer_measure.Inputs:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    return layer_measure.Inputs(
        normal(m, n, c).requires_grad_(), normal(m, c).requires_grad_(), normal(m, c), normal(m, n, c)
    )


def test_floors_count_each_tensor_once() -> None:
    assert layer_measure.floors(4) == {"pre": 5, "post": 9, "forward": 14, "backward": 28, "both": 29}
    moved = layer_kernels.streams_moved(4)
    assert moved["write_backward"] + moved["read_backward"] + moved["streams_backward"] == 28
    assert moved["boundary_forward"] + moved["read_forward"] == 14


@pytest.mark.parametrize("peer", [PLAIN, EAGER], ids=lambda peer: peer.name)
def test_a_correct_implementation_passes_its_gate(peer: layer_peers.Peer) -> None:
    runner = peer.make(parameters(4, 32), 4)
    found = layer_measure.errors(runner, peer, parameters(4, 32), inputs(16, 4, 32))
    assert layer_measure.gate(peer, found) is None


def test_tokens_that_are_not_compared_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of the parameters are those of the first tokens, though all tokens run."""
    monkeypatch.setattr(layer_measure, "CHECKED_TOKENS", 5)
    runner = PLAIN.make(parameters(4, 32), 4)
    found = layer_measure.errors(runner, PLAIN, parameters(4, 32), inputs(16, 4, 32))
    assert layer_measure.gate(PLAIN, found) is None and found["gphi"] < 1e-5


def test_a_wrong_convention_fails_the_gate() -> None:
    runner = PLAIN.make(parameters(4, 32), 4)
    wrong = layer_peers.Peer("wrong", PLAIN.make, PLAIN.convention.replace(first="rows", num_iters=1), "")
    found = layer_measure.errors(runner, wrong, parameters(4, 32), inputs(16, 4, 32))
    assert "x_next" in str(layer_measure.gate(wrong, found))


def test_every_implementation_has_its_turn() -> None:
    assert sorted((*layer.FIRST, *layer.THEN)) == sorted(layer._IMPLEMENTATIONS)


def test_bars_come_first_then_every_peer_once_then_the_rest() -> None:
    large, small = (16384, 4096), (4096, 1280)
    order = layer._order([large, small], ["Liger", "TileKernels", "eager, fp32", "ours, fused"])
    first = [(shape, name, False) for name in ("ours, fused", "TileKernels") for shape in (large, small)]
    assert order == [
        *first,
        *((large, "eager, fp32", False), (large, "Liger", False), (large, None, False), (small, None, False)),
        *((small, "ours, fused", True), (small, "TileKernels", True)),
        *((small, "eager, fp32", False), (small, "eager, fp32", True), (small, "Liger", False)),
    ]


def test_jobs_that_compile_ahead_start_with_the_slowest() -> None:
    jobs = layer._jobs([(16, 32), (8, 64)], 4, ["ours, fused", "eager, fp32", "TileKernels", "Liger"], True)
    assert [job[3] for job in jobs] == ["Liger", "Liger", "TileKernels", "TileKernels", "ours, fused", "ours, fused"]
    assert layer._parser().parse_args(jobs[0][1:]).shapes == [(8, 64)]
    assert [layer._parser().parse_args(job[1:]).kernels for job in jobs] == [False] * 4 + [True] * 2


def test_a_job_that_fails_or_is_late_is_counted_and_not_raised() -> None:
    assert ahead.compile_ahead([["--help"], ["no such benchmark"]], 2, 60.0).startswith("1 of 2 jobs")
    assert ahead.compile_ahead([["--help"]], 1, -1.0).startswith("0 of 1 jobs")


def test_a_report_names_its_command_without_its_files() -> None:
    arguments = ["--shapes", "16x8", "--json", "/some/where", "--chain", "0", "--commit=abc", "--plot", "p.svg"]
    assert report.command("layer", arguments) == "python -m benchmarks layer --shapes 16x8 --chain 0"


def test_what_is_not_reproducible_is_seen() -> None:
    class Drifting:
        def __init__(self) -> None:
            self.site, self.calls = PLAIN.make(parameters(4, 32), 4), 0
            self.leaves, self.pre = self.site.leaves, self.site.pre

        def post(self, *arguments: object) -> torch.Tensor:
            self.calls += 1
            return self.site.post(*arguments) * (1 + self.calls / 100)

    assert layer_measure.repeats_its_bits(PLAIN.make(parameters(4, 32), 4), inputs(16, 4, 32))
    assert not layer_measure.repeats_its_bits(Drifting(), inputs(16, 4, 32))


@pytest.mark.parametrize("fused", [True, False])
def test_a_chain_has_one_read_a_site_and_every_gradient(fused: bool) -> None:
    chain = layer_measure.Chain(lambda: PLAIN.make(parameters(4, 8), 4), 3, inputs(6, 4, 8), fused)
    outputs = chain.forward()
    assert [tuple(output.shape) for output in outputs] == [(6, 8), (6, 8), (6, 8), (6, 4, 8)]
    assert len(chain.backward(outputs)) == 1 + 3 + 3 * 5


def times(called: float, graph: float | None) -> dict:
    return {"called_us": called, "graph_us": graph, "graph_refused": None}


@pytest.fixture
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run what the benchmark runs on the CPU, once each, with invented times."""

    def time_calls(calls: list, one_thread: bool = False, **_: object) -> device.Times:
        for call in calls:
            call()
        return device.Times(200.0 * len(calls), 100.0 * len(calls), None, 150.0 * len(calls) if one_thread else None)

    def measure_memory(forward: Callable, backward: Callable, outputs: int) -> device.Memory:
        backward(forward())
        return device.Memory(1000, 2000)

    def random(m: int, n: int, c: int, seed: int) -> layer_measure.Inputs:
        return inputs(m, n, c)

    for module in (layer_measure, layer_kernels):
        monkeypatch.setattr(module, "time_calls", time_calls)
        monkeypatch.setattr(module, "random_parameters", parameters)
    monkeypatch.setattr(layer_measure, "measure_memory", measure_memory)
    monkeypatch.setattr(layer_measure.Inputs, "random", random)
    monkeypatch.setattr(layer, "copy_rate", lambda: 3e12)
    monkeypatch.setattr(layer, "launch_us", lambda: 5.0)
    fused = layer_measure._ours("ours, fused", fused_site(PAPER), "the leaves of plain torch")
    monkeypatch.setitem(layer._IMPLEMENTATIONS, fused.name, fused)


@pytest.mark.usefixtures("without_a_gpu")
def test_a_run_saves_each_row_and_stops_in_time() -> None:
    names, saved = ["ours, fused", "Liger", "eager, fp32"], []
    report = {"machine": MACHINE, "streams": 4, "shapes": []}
    shapes = [(16, 32), (8, 32)]
    late = Deadline(600.0)
    layer.run(shapes, 4, names, 2, late, report, lambda: saved.append(layer_report.markdown(report)), kernels=True)
    assert len(saved) == 13 and sorted(row["name"] for row in report["shapes"][1]["rows"]) == sorted(names)
    fused, eager, liger = report["shapes"][0]["rows"]
    read = {"called_us": [100.0, 100.0], "one_thread_us": [75.0, 75.0]}
    chain = times(100.0, 50.0) | {"one_thread_us": 75.0, "site_us": 0.0, "half_us": 100.0, "read": read}
    assert fused["chain"]["fused"]["both"] == chain and fused["both"]["one_thread_us"] == 600.0
    assert "one_thread_us" not in fused["forward"]
    assert fused["same_bits"] and "not installed" in liger["skipped"] and eager["both"]["called_us"] == 800.0
    assert "| ours, fused, chain, fused | 100 / 100 | 75 / 75 | 5.0 / 5.0 / 5.0 / 5.0 |" in saved[-1]
    assert "| ours, fused, fused boundaries |" in saved[0] and "kernels" in report["shapes"][0]
    layer.run(shapes, 4, names, 4, Deadline(-1.0), report, lambda: None)
    assert all("not reached" in row["skipped"] for shape in report["shapes"][2:] for row in shape["rows"])


@pytest.mark.usefixtures("without_a_gpu")
def test_kernels_are_called_with_what_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_kernels, "_rows_that_serve", lambda name, x: ["plain"])
    rows = {row["name"]: row for row in layer_kernels.measure_kernels(16, 4, 32)}
    without_a_plain_row = {"boundary_forward", "streams_backward_chained"}
    assert {name for name, row in rows.items() if "us" not in row} == without_a_plain_row
    assert "backward of a site" in rows


MACHINE = {"date": "d", "device": "gpu", "cuda": "13", "python": "3", "versions": {"torch": "2"}, "commit": None}


def layer_row(name: str, both: dict, **other: object) -> dict:
    row = {
        "name": name,
        "convention": "paper",
        "errors": dict.fromkeys(["u", "x_next", "gx", "gf", "gphi", "galpha", "gbias"], 5e-5),
        "same_bits": True,
        "memory": {"kept": 100 * 16384, "peak": 10 * 2 * 16384 * 4096},
    }
    return row | dict.fromkeys(["pre", "post", "forward"], times(500.0, 400.0)) | {"both": both} | other


def layer_report_of(*rows: dict) -> dict:
    floor = {"pre": 200.0, "post": 200.0, "forward": 400.0, "backward": 800.0, "both": 1000.0}
    shape = {"tokens": 16384, "dim": 4096, "floor_us": floor, "rows": list(rows)}
    return {"machine": MACHINE, "copy_bytes_per_second": 3e12, "streams": 4, "shapes": [shape]}


def chained(graph: float, site: float) -> dict:
    both, forward = times(graph + 100, graph), times(500.0, 450.0)
    return {
        "forward": forward | {"site_us": 440.0, "half_us": 460.0},
        "both": both | {"site_us": site, "half_us": 1510.0},
        "kept_per_site": 1.0,
        "peak": 1,
    }


OURS = layer_row(
    "ours, fused",
    times(1700.0, 1600.0),
    chain={"length": 8, "fused": chained(1500.0, 1490.0), "separate": chained(1600.0, 1600.0)},
)


def test_layer_report_names_what_was_not_timed(tmp_path: Path) -> None:
    report = layer_report_of(OURS, {"name": "b", "skipped": "not installed: b"})
    text = layer_report.markdown(report)
    assert "| ours, fused | 2.00 (400) |" in text and "- b: not installed: b" in text
    forward, both = "1.15 (460) | 1.12 (450) | 1.10 (440)", "1.51 (1510) | 1.50 (1500) | 1.49 (1490)"
    assert f"| ours, fused, fused boundaries | {forward} | {both} |" in text
    layer_report.plot(report, tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size > 1000


def test_bars_are_met_missed_or_not_measured() -> None:
    peer = layer_row("TileKernels", times(3100.0, 3000.0))
    verdicts = {verdict.what: verdict for verdict in layer_bars.judge(layer_report_of(OURS, peer))}
    assert verdicts["fwd+bwd, separate steps, of 29 E, C = 4096"].met
    assert verdicts["forward, a boundary and its read, of 14 E, C = 4096"].value == 1.1
    assert verdicts["backward of a site (by difference), of 28 E, C = 4096"].met is False  # (1600 - 400) / 800
    assert verdicts["faster than TileKernels, C = 4096"].value == 2.0
    assert verdicts["fwd+bwd without CUDA C++, of 29 E, C = 4096"].met is None
    assert not any("M = 4096" in what for what in verdicts)
    assert layer_bars.against_peers(layer_report_of(OURS, peer)) == [
        ["16384 x 4096", "2.00", "-", "-", "-", "-", "1.82"]
    ]


@pytest.mark.usefixtures("without_a_gpu")
def test_a_second_reading_counts_where_it_is_the_smaller() -> None:
    row = {"both": times(1000.0, 90.0) | {"one_thread_us": 120.0}}
    layer_measure.measure_again(row, PLAIN, 4, 32, [inputs(8, 4, 32)], 0)
    assert row["both"]["read"] == {"called_us": [1000.0, 200.0], "one_thread_us": [120.0, 150.0]}
    assert (row["both"]["called_us"], row["both"]["one_thread_us"], row["both"]["graph_us"]) == (200.0, 120.0, 90.0)


@pytest.mark.usefixtures("without_a_gpu")
def test_a_second_reading_that_fails_leaves_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    row = layer._row(PLAIN, 4, 32, [inputs(8, 4, 32)], 0)
    before = row["both"].copy()
    monkeypatch.setattr(layer, "measure_again", lambda *_: 1 / 0)
    layer._again(row, PLAIN, 4, 32, [inputs(8, 4, 32)], 0)
    assert row["both"] == before and "ZeroDivisionError" in str(row["again"]) and row["addition_us"] == [5.0] * 4

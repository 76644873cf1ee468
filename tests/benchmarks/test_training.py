"""The training benchmark without a GPU: variants agree, rows come one by one, and what the report says of them."""

import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks import device, training, training_report
from benchmarks.report import Deadline
from mhc_layers import PAPER
from mhc_layers._torch_ops import fused_site

MACHINE = {"date": "d", "device": "gpu", "cuda": "13", "python": "3", "versions": {"torch": "2"}, "commit": None}


@pytest.fixture
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every variant on the CPU in plain torch, once, with invented times and memory."""

    def time_in_turn(groups: list, *, graph: bool, budget_ms: float, one_thread: bool) -> list[device.Times]:
        for calls in groups:
            calls[0]()
        readings = {"called_us": [1999.96, 2000.0]}
        times = device.Times(2000.0, 1000.0 if graph else None, None if graph else "not asked for", readings=readings)
        return [times] * len(groups)

    fused = [
        dataclasses.replace(variant, implementation=lambda: fused_site(PAPER)) if "fused" in variant.name else variant
        for variant in training.VARIANTS
    ]
    monkeypatch.setattr(training, "VARIANTS", fused)
    monkeypatch.setattr(training, "DEVICE", "cpu")
    monkeypatch.setattr(training, "time_in_turn", time_in_turn)
    monkeypatch.setattr(training, "copy_rate", lambda: 3e12)
    monkeypatch.setattr(training, "_memory", lambda *_: {"peak_bytes": 2 * 10**9, "kept_bytes": 10**9})
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.usefixtures("without_a_gpu")
def test_every_variant_is_checked_against_plain_torch_and_saved() -> None:
    report, saved = {"machine": MACHINE, "layers": 2, "batch": 1, "sequence": 16, "widths": []}, []
    names = [variant.name for variant in training.VARIANTS]
    training.run(
        [128], 2, 1, 16, names, True, Deadline(600.0), report, lambda: saved.append(training_report.markdown(report))
    )
    rows = {row["name"]: row for row in report["widths"][0]["rows"]}
    assert list(rows) == names and len(saved) == len(names)
    assert not [row for row in rows.values() if "skipped" in row]
    assert rows[training.REFERENCE]["agreement"]["phi"] == 0.0 < rows[training.FUSED]["agreement"]["phi"] < 0.1
    assert rows["mHC, fused, recompute"]["recompute_block"] == 2
    assert "baseline" not in rows["residual"] and rows[training.FUSED]["baseline"]["called_us"] == 2000.0
    assert rows[training.FUSED]["baseline"]["readings"] == {"called_us": [2000.0, 2000.0]}
    training.run([128], 2, 1, 16, names, True, Deadline(-1.0), report, lambda: None)
    assert all("not reached" in row["skipped"] for row in report["widths"][1]["rows"])


@pytest.mark.usefixtures("without_a_gpu")
def test_a_connection_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(type(fused_site(PAPER))):
        def post(self, x: torch.Tensor, f: torch.Tensor, state: object) -> torch.Tensor:
            return super().post(x, 2 * f, state)

        def boundary(self, x: torch.Tensor, f: torch.Tensor, *rest: object) -> object:
            return super().boundary(x, 2 * f, *rest)

    wrong = dataclasses.replace(training.VARIANTS[2], implementation=lambda: Wrong(PAPER))
    monkeypatch.setattr(training, "VARIANTS", [*training.VARIANTS[:2], wrong])
    report: dict = {"widths": []}
    names = ["residual", training.REFERENCE, training.FUSED]
    training.run([128], 2, 1, 16, names, False, Deadline(600.0), report, lambda: None)
    assert "disagrees" in report["widths"][0]["rows"][2]["skipped"]


def test_what_recomputation_saves_is_streams_and_inputs_of_sublayers() -> None:
    """8 sites in blocks of 2 at C = 16: 4 of 8 streams of 4 x 16 values are not kept, nor are 8 inputs of 16.

    Each site keeps its 24 coefficients instead.
    """
    assert training.saved_by_recompute(3, 8, 16) == 3 * (2 * (4 * 4 * 16 + 8 * 16) - 8 * 24 * 4)


def row(name: str, called: float, graph: float | None, **other: object) -> dict:
    found = {"name": name, "called_us": called, "graph_us": graph, "graph_refused": None if graph else "E: no"}
    return found | {"kept_bytes": 10**9, "peak_bytes": 2 * 10**9} | other


def test_overhead_is_over_the_baseline_that_was_timed_in_turn_with_a_row() -> None:
    fused = row("mHC, fused", 12_500.0, 9_800.0, baseline=row("residual", 12_000.0, 9_500.0))
    assert training_report.overhead(fused, row("residual", 10_000.0, 9_000.0), "called_us") == 100 * (12.5 / 12 - 1)


def test_overhead_is_the_median_over_pairs_and_says_where_half_of_them_lie() -> None:
    """The card gets slower by half on the way: neighbours are 10 to 14 % apart, the medians 4.5 %."""
    times, apart = [10.0, 10.0, 15.0, 15.0, 15.0], [1.10, 1.11, 1.12, 1.13, 1.14]
    base = row("residual", 15e3, None, readings={"called_us": [1e3 * ms for ms in times]})
    readings = [1e3 * ms * ratio for ms, ratio in zip(times, apart, strict=True)]
    fused = row("mHC, fused", 15e3 * 1.045, None, baseline=base, readings={"called_us": readings})
    assert training_report.overhead(fused, None, "called_us") == pytest.approx(12.0)
    text = "\n".join(training_report.times({"dim": 1, "rows": [fused]}, 8))
    assert "12.0 % (11.0 to 13.0)" in text


def test_the_report_takes_overhead_from_the_residual_of_the_same_run(tmp_path: Path) -> None:
    rows = [
        row("residual", 10_000.0, 9_000.0, one_thread_us=10_000.0),
        row("mHC, fused", 12_500.0, 9_800.0, one_thread_us=11_500.0),
        row("mHC, fused, recompute", 13_000.0, None, kept_bytes=5e8, formula_saves_bytes=5e8, recompute_block=2),
        {"name": "mHC, plain torch", "skipped": "not reached in 1 s"},
    ]
    width = {"dim": 4096, "connections_floor_us": 450.0, "rows": rows}
    report = {"machine": MACHINE, "copy_bytes_per_second": 3e12, "layers": 1, "batch": 1, "sequence": 8}
    report |= {"widths": [width]}
    text = training_report.markdown(report)
    assert "| mHC, fused | 25.0 % | 12.50 | 15.0 % | 11.50 | 8.9 % | 9.80 | 816 |" in text
    assert "5.0 % of the residual's step" in text and "25.0 % as called, **missed**; 15.0 %" in text
    assert "as called in one thread, **missed**; 8.9 % in a graph, met." in text
    assert "the formula says 500.0 MB (+0.00 %)" in text
    assert "- mHC, plain torch: not reached in 1 s" in text and "recompute, in a graph: E: no" in text
    training_report.plot(report, tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size > 1000

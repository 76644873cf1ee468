"""The table of implementations: the first row that does not refuse, and a reason from each one that does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

import birkhoff
from birkhoff import _registry
from birkhoff._dispatch import facts_of, kernel_arguments
from birkhoff._registry import PROJECTIONS, Facts, Row, Table, installed, load
from birkhoff.solvers import Newton, SinkhornDamped, SinkhornKnopp, SinkhornLog


@dataclass(frozen=True)
class Size:
    n: int


TABLE: Table[Size] = Table(
    "sizes",
    (
        Row(name="small", targets={"call": "math:sqrt"}, refuse=lambda f: None if f.n < 4 else f"n = {f.n} is not < 4"),
        Row(name="even", targets={}, refuse=lambda f: None if f.n % 2 == 0 else "odd", note="halves"),
    ),
)


def test_the_first_row_that_does_not_refuse_serves() -> None:
    assert TABLE.resolve(Size(3)).row.name == "small" and TABLE.resolve(Size(3)).refusals == ()
    chosen = TABLE.resolve(Size(6))
    assert chosen.row.name == "even"
    assert [(r.row, r.reason) for r in chosen.refusals] == [("small", "n = 6 is not < 4")]
    assert str(chosen) == "chosen: even (halves)\nrefused: small: n = 6 is not < 4"
    assert TABLE.resolve(Size(6)) is chosen


def test_a_table_without_an_answer_says_why() -> None:
    with pytest.raises(LookupError, match=r"'sizes' serves.*small: n = 7 is not < 4; even: odd"):
        TABLE.resolve(Size(7))


def test_targets_are_imported_when_loaded() -> None:
    assert TABLE.rows[0].load("call")(9.0) == 3.0
    assert load("math:pi") > 3 and installed("numpy") and not installed("no_such_package_at_all")


def test_explain_names_every_refusal() -> None:
    answer = birkhoff.explain(np.zeros((4, 4)), SinkhornKnopp())
    assert answer.row.name == "array"
    assert {refusal.row for refusal in answer.refusals} == {row.name for row in PROJECTIONS.rows} - {"array"}
    assert all(refusal.reason for refusal in answer.refusals)


def facts(**changes: object) -> Facts:
    base = {
        "method": "knopp", "library": "torch", "device": "cuda", "dtype": "float32", "n": 4,
        "precision": ("float32", "float32", "float32"),
    }  # fmt: skip
    return Facts(**{**base, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"library": "numpy"}, "serves arrays of torch"),
        ({"device": "cpu"}, "needs a CUDA device, got cpu"),
        ({"method": "newton"}, "no kernel for the method 'newton'"),
        ({"to_tolerance": True}, "fixed number of iterations"),
        ({"relaxed": True}, "over-relaxation"),
        ({"n": 500}, "got n = 500"),
        ({"precision": ("float64", "float64", "float32")}, "other precisions"),
    ],
)
def test_fused_rows_refuse_what_they_do_not_compute(
    changes: dict, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_registry, "installed", lambda package: True)
    row = next(row for row in PROJECTIONS.rows if row.name == "triton")
    assert row.refuse(facts()) is None
    assert reason in str(row.refuse(facts(**changes)))


def test_a_missing_package_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_registry, "installed", lambda package: False)
    row = next(row for row in PROJECTIONS.rows if row.name == "triton")
    assert "triton is not installed" in str(row.refuse(facts()))


def test_targets_of_the_table_exist_as_files() -> None:
    import importlib.util

    for row in PROJECTIONS.rows:
        for target in row.targets.values():
            assert importlib.util.find_spec(target.partition(":")[0]) is not None, target


def test_facts_hold_no_data_and_no_batch() -> None:
    small, large = np.zeros((2, 3, 3), dtype=np.float32), np.ones((7, 5, 3, 3), dtype=np.float32)
    assert facts_of(small, SinkhornKnopp()) == facts_of(large, SinkhornKnopp())
    assert facts_of(small, SinkhornLog(relaxation=1.5)).relaxed and facts_of(small, Newton()).to_tolerance
    assert kernel_arguments(SinkhornDamped(num_iters=3)) == {
        "method": "damped", "num_iters": 3, "first": "rows", "eps_start": 1e-6, "eps_den": 1e-6, "range_cap": None,
    }  # fmt: skip

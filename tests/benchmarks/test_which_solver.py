"""The decision table: its rows are measured, and what they claim of the solvers holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import which_solver


def test_a_line_for_each_size_and_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(which_solver, "_host_seconds", lambda call: (call(), 2.0)[1])
    where = tmp_path / "table.md"
    which_solver.main(["--sizes", "3", "4", "--stds", "10", "--entries", "800", "--markdown", str(where)])
    head, _, *rows = where.read_text().splitlines()
    assert [row.split("|")[1:3] for row in rows] == [[" 3 ", " 10 "], [" 4 ", " 10 "]]
    assert len({line.count("|") for line in (head, *rows)}) == 1


def test_the_errors_are_the_worst_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(which_solver, "_host_seconds", lambda call: 2.0)
    ((_, _, knopp, exact, log, newton),) = which_solver.lines("cpu", (4,), (10.0,), lambda n: 200)
    assert float(knopp.split()[2].rstrip(",")) > 0.01 > 1e-6 >= float(newton.split(",")[0])
    assert float(exact.split(",")[0]) <= 1e-6 < float(log.split(",")[0])
    assert newton.endswith(", 1")

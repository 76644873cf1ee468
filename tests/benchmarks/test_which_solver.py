"""The decision table: its rows are measured, and what they claim of the solvers holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import which_solver
from benchmarks.report import Deadline


@pytest.fixture(autouse=True)
def two_seconds_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(which_solver, "_host_seconds", lambda call: (call(), 2.0)[1])


def table(page: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]


def test_a_line_for_each_size_and_range(tmp_path: Path) -> None:
    files = [tmp_path / "table.md", tmp_path / "table.json", tmp_path / "again.md"]
    sizes = ["--sizes", "3", "4", "--stds", "10", "--entries", "800"]
    which_solver.main([*sizes, "--markdown", str(files[0]), "--json", str(files[1])])
    head, _, *rows = table(files[0].read_text())
    assert [row[:2] for row in rows] == [["3", "10"], ["4", "10"]]
    assert {len(line) for line in (head, *rows)} == {2 + len(which_solver.CHOICES)}
    assert [line["batch"] for line in json.loads(files[1].read_text())["lines"]] == [88, 50]
    which_solver.main(["--from-json", str(files[1]), "--markdown", str(files[2])])
    assert files[2].read_text() == files[0].read_text()


def run(deadline: float = 60.0) -> dict[str, Any]:
    report: dict[str, Any] = {"machine": {"date": "d", "device": "c", "python": "3", "versions": {}, "commit": "x"}}
    report |= {"command": "it", "entries": 3200, "lines": []}
    which_solver.run("cpu", [4], [10.0], 3200, Deadline(deadline), report, lambda: None)
    return report


def test_the_errors_are_the_worst_of_the_batch() -> None:
    knopp, exact, log, newton = run()["lines"][0]["cells"]
    assert knopp["worst"] > 0.01 > 1e-6 >= newton["worst"] and exact["worst"] <= 1e-6 < log["worst"]
    assert knopp["median"] < knopp["worst"]
    assert table(which_solver.markdown(run()))[-1][-1].endswith(", 1")


def test_what_fails_or_is_not_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        pass

    choices = (*which_solver.CHOICES[:3], which_solver.Choice("failing", Failing()))
    monkeypatch.setattr(which_solver, "CHOICES", choices)
    page = which_solver.markdown(run())
    assert "- n = 4, std 10, failing: " in page and table(page)[-1][-1] == "-"
    assert "- n = 4, std 10: not reached in -1 s" in which_solver.markdown(run(deadline=-1.0))

"""The GPU side of the projection benchmark without a GPU: what runs on what, what a stopped run keeps, and the page."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from benchmarks import projection, projection_gpu, projection_report
from benchmarks.projection import Case, Contestant, Device, measure, run, time_limit
from benchmarks.report import Deadline
from birkhoff import reference

CONTESTANTS = {contestant.name: contestant for contestant in projection_gpu.CONTESTANTS}
NEWTON = CONTESTANTS[projection_report.NEWTON]
CUDA = CONTESTANTS[projection_report.CUDA]
LARGE = CONTESTANTS[projection_report.LARGE]


def case(**wanted: Any) -> projection_gpu.DeviceCase:
    return next(c for c in projection_gpu.CASES if all(getattr(c, key) == value for key, value in wanted.items()))


def test_cases_have_titles_of_their_own_and_the_bars_come_first() -> None:
    titles = [c.title for c in projection_gpu.CASES]
    assert len(set(titles)) == len(titles)
    assert [(c.n, c.batch) for c in projection_gpu.CASES[:4]] == [(4, 1 << 20)] * 2 + [(4, 1 << 22)] * 2
    assert {c.n for c in projection_gpu.CASES if not c.kind} == {2, 3, 4, 6, 8, 16, 32}


def test_each_kind_of_problem_is_for_its_own_contestants() -> None:
    plain, limit, vertices, large = case(kind=""), case(kind="limit"), case(kind="vertices"), case(kind="large")
    assert plain.refuse(CUDA) is None and limit.refuse(CUDA) is None
    assert vertices.refuse(CUDA) and large.refuse(CUDA)
    assert limit.refuse(NEWTON) is None and vertices.refuse(NEWTON) is None
    assert plain.refuse(NEWTON) and large.refuse(NEWTON)
    assert large.refuse(LARGE) is None and plain.refuse(LARGE)
    assert large.floor_bytes == 100 * 4 * 4096**2 and plain.floor_bytes == 2 * 4 * plain.batch * plain.n**2


def contestant(name: str, function: Any, **options: Any) -> Contestant:
    return Contestant(name, "numpy", "columns", lambda case, x, g: lambda: function(x), **options)


def device(**options: Any) -> Device:
    return Device(lambda calls: {"median": 2.0, "fastest": 1.0, "graph": None}, lambda commit: {}, str, **options)


def test_ours_run_first_and_every_row_is_saved_when_it_is_there() -> None:
    def fail(x: np.ndarray) -> np.ndarray:
        raise ValueError("a peer's own trouble")

    contestants = (contestant("peer", fail, turn=1), contestant("ours", reference.sinkhorn, ours=True))
    saved: list[int] = []
    order: list[Any] = []

    def save(report: dict[str, Any]) -> None:
        saved.append(sum(len(result["rows"]) for result in report["results"]))
        order.append([row["name"] for result in report["results"] for row in result["rows"]])

    report = run((Case(2, 8), Case(3, 8)), contestants, device(), save)
    assert saved == [1, 2, 3, 4] and order[1] == ["ours", "ours"]
    ours, peer = report["results"][0]["rows"]
    assert ours["fastest"] == 1.0 and ours["errors"]["entries"] < 1e-6
    assert peer["failed"] == "ValueError: a peer's own trouble"


def test_every_peer_runs_the_first_two_cases_before_any_other() -> None:
    order: list[tuple[str, int]] = []

    def named(name: str, turn: int) -> Contestant:
        def function(x: np.ndarray) -> np.ndarray:
            order.append((name, x.shape[-1]))
            return reference.sinkhorn(x)

        return contestant(name, function, turn=turn)

    run(tuple(Case(n, 8) for n in (2, 3, 4)), (named("slow", 3), named("quick", 1), named("ours", 0)), device())
    calls = [(name, n) for name, n in dict.fromkeys(order)]
    assert calls[:3] == [("ours", 2), ("ours", 3), ("ours", 4)]
    assert calls[3:] == [("quick", 2), ("quick", 3), ("slow", 2), ("slow", 3), ("quick", 4), ("slow", 4)]


def test_what_the_time_does_not_allow_says_so() -> None:
    ours = contestant("ours", reference.sinkhorn, ours=True)
    report = run((Case(2, 8),), (ours,), device(), deadline=Deadline(-1.0))
    assert report["results"][0]["rows"][0]["skipped"] == "not reached in -1 s"
    assert "| ours | skipped: not reached in -1 s |" in projection._table(report["results"][0])


def test_a_row_is_given_up_after_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TimeoutError, match="given up"), time_limit(0.05):
        time.sleep(5.0)
    monkeypatch.setattr(projection, "ROW_LIMIT", 0.05)
    row = measure(contestant("slow", lambda x: time.sleep(5.0)), Case(2, 8), device().time)
    assert row["failed"] == "TimeoutError: given up after 0.05 s"


def test_what_compiles_is_shared_out_to_processes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that compiles for any batch is compiled for one of its batches; rows that do not compile are left out."""
    asked: list[tuple[list[list[str]], dict[str, Any]]] = []
    monkeypatch.setattr(projection_gpu, "refusal", lambda contestant, case: None)
    monkeypatch.setattr(
        projection_gpu, "compile_ahead", lambda commands, *_, **options: asked.append((commands, options)) or "done"
    )
    cases = [case(n=4, batch=batch, gradient=False) for batch in (1 << 20, 1 << 22)]
    eager = contestant("eager", abs)
    rows = [(chosen, peer) for chosen in cases for peer in (CUDA, replace(CUDA, name="one", compiles="exact"), eager)]
    assert projection_gpu._prepare(rows, 0, 10.0) == {}
    assert projection_gpu._prepare(rows, 8, 10.0) == {"compiled_ahead": "done"}
    ((commands, options),) = asked
    tasks = [tuple(task) for (text,) in commands for task in json.loads(text)]
    assert sorted(tasks) == sorted([(cases[0].title, CUDA.name), *((chosen.title, "one") for chosen in cases)])
    assert options["module"] == "benchmarks.projection_gpu"


def report() -> dict[str, Any]:
    """Four cases at 1000 GB/s: a peer three times slower than ours, and one that failed."""
    wanted = [case(n=4, batch=1 << 20, gradient=False), case(n=4, batch=1 << 20, gradient=True)]
    wanted += [case(kind="limit"), case(kind="vertices")]
    results = []
    for chosen, floors in zip(wanted, (1.2, 2.0, 3.0, 1.0), strict=True):
        seconds = floors * chosen.floor_bytes / 1e12
        name = projection_report.NEWTON if chosen.kind else projection_report.CUDA
        mine = {"name": name, "ours": True, "computes": "limit" if chosen.kind else "columns"}
        mine |= {"median": seconds, "fastest": seconds, "graph": seconds}
        mine["errors"] = {"marginals": 7e-7 if chosen.kind == "limit" else 2e-6} if chosen.kind else {"entries": 0.3}
        rows = [mine]
        if not chosen.kind:
            rows.append(mine | {"name": "peer", "ours": False, "median": 3 * seconds, "fastest": 3 * seconds})
            rows.append({"name": "broken", "ours": False, "computes": "rows", "failed": "RuntimeError: no"})
        about = {"n": chosen.n, "batch": chosen.batch, "gradient": chosen.gradient, "kind": chosen.kind}
        about |= {"title": chosen.title, "floor_bytes": chosen.floor_bytes}
        results.append({"case": about, "rows": rows})
    machine = {"date": "today", "device": "a card", "cuda": "13", "python": "3", "versions": {}, "commit": "c"}
    return {"machine": machine, "copy_bytes_per_second": 1e12, "command": "it", "results": results}


def test_the_page_holds_the_bars_against_the_floor_of_the_run() -> None:
    page = projection_report.markdown(report())
    lines = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| ")}
    assert lines["n = 4 forward, 1048576, CUDA: 1.35, stretch 1.1"].endswith("| 1.2 x | met |")
    assert lines["n = 4 forward and backward, 1048576, CUDA: 1.8, stretch 1.5"].endswith("| 2 x | **missed** |")
    assert lines["n = 4 forward, 1048576, Triton: 1.35, stretch 1.1"].endswith("| not measured | - |")
    assert lines["Newton, worst marginal error, std 10, all of 2^20: 1e-06"].endswith("| met |")
    assert lines["Newton, worst marginal error, all 65536 vertices: 1e-06"].endswith("| **missed** |")
    assert lines["Newton at logit std 10, of a 20-iteration forward: 3"].endswith("| 2.5 times | met |")
    assert "3.0 to 3.0 times the fastest peer, 2 cases | met" in lines["faster than every peer of this run"]
    assert "- broken: RuntimeError: no (" in page and "1.20 (161)" in page and "3.60 (483)" in page


def test_a_page_exists_before_anything_is_measured() -> None:
    assert "Nothing measured yet" in projection_report.markdown({"machine": {"versions": {}}, "results": []})
    assert "Nothing measured yet" in projection_report.markdown(report() | {"results": []})


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    projection_report.plot(report(), tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size > 1000

"""Runs that are cut: what matters most comes first, a budget ends them, and a killed one keeps its report."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import birkhoff.solvers
from proofs import claims, page, pool, runner, schedule, subjects, systems
from proofs.__main__ import main
from proofs._claim import Claim, Observation
from proofs.runner import PROFILES
from proofs.selection import Selection
from tests.proofs import broken

RIGHT = "tests.proofs.broken:right"
FEW = ["last_side_exact", "one_by_one_is_one"]


def _library() -> list[tuple[Claim, Any]]:
    pytest.importorskip("array_api_strict")
    names = ["numpy", "array_api_strict"]
    return list(runner.pairs(claims.CLAIMS, [*subjects.builtin_subjects(names), *systems.builtin_systems(names)]))


def test_every_claim_is_tried_on_every_backend_before_any_is_tried_again() -> None:
    wanted = _library()
    order = schedule.by_importance(wanted)
    assert sorted(map(id, (subject for _, subject in order))) == sorted(map(id, (subject for _, subject in wanted)))
    assert len({(claim.name, subject.title) for claim, subject in order}) == len(wanted)
    made = [(claim, subject) for claim, subject in order if claim.applies(subject) is None]
    assert order[-len(made) :] == made  # the others cost nothing
    places = [(claim.name, subject.backend.name) for claim, subject in made]
    first = set(places)
    assert len(first) > 100 and set(places[: len(first)]) == first
    # each goes to the main solver that it is made of, and the slow solvers come last
    heads = {claim.name: subject.name for claim, subject in made[: len(first)]}
    assert heads["last_side_exact"] == heads["large_stacks"] == "SinkhornKnopp"
    assert heads["euclidean_is_doubly_stochastic"] == "Euclidean"
    last = [subject.name for claim, subject in made if claim.name == "any_batch_shape"][-4:]
    assert last == ["Newton", "Newton", "Euclidean", "Euclidean"]


def test_long_claims_begin_before_short_ones() -> None:
    made = [(c, s) for c, s in schedule.by_importance(_library()) if c.applies(s) is None]
    on_knopp = [claim.name for claim, subject in made if subject.title == "SinkhornKnopp on numpy"]
    assert on_knopp[0] == "large_stacks"
    assert on_knopp.index("adjoint_identity") < on_knopp.index("one_by_one_is_one")


def test_the_tables_of_what_is_slow_name_what_exists() -> None:
    for name in schedule.LONG_CLAIMS:
        claims.by_name(name)
    assert set(schedule.SLOW_SUBJECTS) <= set(birkhoff.solvers.__all__)


def test_no_claim_begins_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]

    def takes_ten_seconds(claim: Claim, subject: Any, *arguments: Any, **options: Any) -> runner.Outcome:
        now[0] += 10
        return runner.Outcome(claim, subject.title, "holds", 1, Observation(0.0, 1.0))

    monkeypatch.setattr(runner, "run_claim", takes_ten_seconds)
    monkeypatch.setattr(time, "time", lambda: now[0])
    seen: list[runner.Outcome] = []
    chosen = claims.select(["one_by_one_is_one", "two_by_two_closed_form", "last_side_exact"])
    outcomes = runner.run(chosen, [broken.subject(broken.right)], PROFILES["quick"], deadline=115, progress=seen.append)
    # the longest comes first, and what is returned is in the order that was asked for
    assert [outcome.claim.name for outcome in seen] == ["last_side_exact", "one_by_one_is_one"]
    assert [outcome.claim for outcome in outcomes] == list(chosen)
    assert [outcome.verdict for outcome in outcomes] == ["holds", "not tried", "holds"]
    assert now[0] == 120


def test_no_process_begins_a_claim_after_the_deadline() -> None:
    seen: list[runner.Outcome] = []
    outcomes = pool.run(
        claims.select(FEW),
        Selection(projection="tests.proofs.broken:ends_the_process"),
        PROFILES["quick"],
        jobs=2,
        deadline=time.time(),
        progress=seen.append,
    )
    assert [outcome.verdict for outcome in outcomes] == ["not tried"] * 2 and seen == []


def test_a_budget_that_is_spent_is_never_a_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, junit = tmp_path / "out.json", tmp_path / "out.xml"
    few = ["--claim", FEW[0], "--claim", FEW[1], "--profile", "quick", "--json", str(report)]
    assert main(["--projection", RIGHT, *few, "--seconds", "1e-9", "--junit", str(junit)]) == 130
    said = capsys.readouterr().out
    assert "out of time: 2 of 2 were not tried" in said and "0 hold, 0 broken, 0 not claimed, 2 not tried" in said
    document = json.loads(report.read_text())
    assert {outcome["verdict"] for outcome in document["outcomes"]} == {"not tried"}
    assert document["settings"]["not_tried"] == 2 and document["settings"]["seconds"] == 1e-9
    assert 'skipped="2"' in junit.read_text() and 'failures="0"' in junit.read_text()
    text = page.render_report(report)
    assert "0 hold, 0 broken, 0 not claimed, 2 not tried" in text and "| last_side_exact | 1 not tried | - |" in text
    assert "0 hold, 0 broken, 2 not tried; 0 matrices" in page.render_measured([report])
    # enough time changes nothing
    assert main(["--projection", RIGHT, *few, "--seconds", "1000"]) == 0
    full = tmp_path / "full.json"
    full.write_text(report.read_text())
    assert main(["--projection", RIGHT, *few, "--seconds", "1e-9"]) == 130
    # on the page of several reports, a claim that a later run did not come to keeps what an earlier run saw
    assert "2 hold, 0 broken;" in page.render_measured([full, report])
    assert main(["--projection", RIGHT, *few, "--seconds", "0"]) == 2


def test_a_breach_counts_more_than_what_was_not_tried(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, tried = runner.run_claim, []

    def stops_at_the_second(claim: Claim, *arguments: Any, **options: Any) -> runner.Outcome:
        tried.append(claim.name)
        if len(tried) == 2:
            raise KeyboardInterrupt
        return honest(claim, *arguments, **options)

    monkeypatch.setattr(runner, "run_claim", stops_at_the_second)
    wrong = ["--projection", "tests.proofs.broken:half_a_step_missing", "--profile", "quick"]
    assert main([*wrong, "--claim", FEW[0], "--claim", FEW[1]]) == 1
    assert "interrupted: 1 of 2 were not tried" in capsys.readouterr().out


def test_a_killed_run_keeps_what_it_saw_and_leaves_no_process(tmp_path: Path) -> None:
    report = tmp_path / "out.json"
    options = ["--projection", "tests.proofs.broken:never_ends_at_two", "--profile", "quick"]
    options += ["--claim", "one_by_one_is_one", "--claim", "two_by_two_closed_form"]
    run = subprocess.Popen(
        [sys.executable, "-m", "proofs", *options, "--jobs", "2", "--json", str(report)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
    )
    verdicts: list[str] = []
    until = time.monotonic() + 60
    while "holds" not in verdicts and time.monotonic() < until:
        time.sleep(0.05)
        if report.exists():  # at any time it is whole
            verdicts = [outcome["verdict"] for outcome in json.loads(report.read_text())["outcomes"]]
    run.kill()
    run.communicate(timeout=30)  # the pipe ends when the last process that writes to it has ended
    document = json.loads(report.read_text())
    assert [outcome["verdict"] for outcome in document["outcomes"]] == ["holds", "not tried"]
    assert document["settings"]["not_tried"] == 1


def test_a_report_that_cannot_be_written_is_said_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "no_such_folder" / "out.json")
    assert main(["--projection", "tests.proofs.broken:ends_the_process", "--claim", FEW[0], "--json", missing]) == 2
    assert "no_such_folder" in "".join(capsys.readouterr().out.split("\n"))
    assert list(tmp_path.iterdir()) == []

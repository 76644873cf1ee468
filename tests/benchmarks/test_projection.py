"""The projection benchmark: a contestant that is wrong is named and not timed, and a report says what it needs to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import projection
from benchmarks.__main__ import SUBJECTS, main
from benchmarks.projection import Case, Contestant, measure
from birkhoff import reference

SMALL = Case(3, 40)
REPORTS = Path(projection.__file__).parent / "reports"
COMMITTED = sorted(path for path in REPORTS.glob("*.json") if not path.name.startswith(("claims", "certificates")))
"""Reports of benchmarks; the others are of ``python -m proofs``."""


def timer(calls: Any) -> dict[str, Any]:
    for call in calls:
        call()
    return {"median": 2.0, "fastest": 1.0}


def contestant(function: Any, computes: str = "columns", **options: Any) -> Contestant:
    return Contestant("someone", "numpy", computes, lambda case, x, g: lambda: function(x, g), **options)


def test_a_right_answer_is_timed_and_scaled_to_the_whole_batch() -> None:
    row = measure(contestant(lambda x, g: reference.sinkhorn(x), share=0.25), SMALL, timer)
    assert (row["median"], row["fastest"]) == (8.0, 4.0)


@pytest.mark.parametrize(
    ("function", "computes", "message"),
    [
        (lambda x, g: reference.sinkhorn(x, 19), "columns", "entries off"),
        (lambda x, g: reference.sinkhorn(x * 3, first="rows"), "columns", "entries off"),
        (lambda x, g: np.full_like(x, np.nan), "columns", "entries off"),
        (lambda x, g: reference.sinkhorn(5 * x), "limit", "marginals off"),
    ],
)
def test_a_wrong_answer_is_named_and_not_timed(function: Any, computes: str, message: str) -> None:
    row = measure(contestant(function, computes), SMALL, timer)
    assert message in row["wrong"] and "median" not in row


def test_a_wrong_gradient_is_named() -> None:
    both = Case(3, 40, gradient=True)
    right = contestant(lambda x, g: (reference.sinkhorn(x), reference.gradient(x, g)))
    wrong = contestant(lambda x, g: (reference.sinkhorn(x), -reference.gradient(x, g)))
    assert "median" in measure(right, both, timer) and "gradient off" in measure(wrong, both, timer)["wrong"]


def test_missing_refusing_and_failing_contestants_are_lines_of_the_report() -> None:
    def fail(x: Any, g: Any) -> Any:
        raise RuntimeError("out of luck")

    missing = Contestant("someone", "no_such_package_at_all", "columns", lambda *_: fail)  # type: ignore[arg-type, return-value]
    assert "not installed" in measure(missing, SMALL, timer)["skipped"]
    assert measure(contestant(fail, serves=lambda case: "not today"), SMALL, timer)["skipped"] == "not today"
    assert measure(contestant(fail), SMALL, timer)["failed"] == "RuntimeError: out of luck"


def test_the_command_writes_a_dated_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "CASES", (SMALL,))
    arguments = ["projection", "--names", "birkhoff, NumPy", "--json", str(tmp_path / "r.json"), "--markdown"]
    assert main([*arguments, str(tmp_path / "r.md")]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert {"date", "device", "commit", "versions"} <= set(report["machine"])
    page = (tmp_path / "r.md").read_text()
    assert "python -m benchmarks projection" in page and SMALL.title in page


def test_an_unknown_subject_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nonsense"]) == 2
    printed = capsys.readouterr().err
    assert all(f"  {subject} " in printed for subject in SUBJECTS)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_subject_has_a_command_line(subject: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    with pytest.raises(SystemExit, match="0"):
        main([subject, "--help"])
    assert f"usage: python -m benchmarks {subject} " in capsys.readouterr().out


@pytest.mark.parametrize("stored", COMMITTED, ids=lambda path: path.stem)
def test_committed_pages_are_what_their_json_renders_to(stored: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    subject, _device, _date = stored.stem.rsplit("_", 2)
    command = {"sinkhorn": ["projection", "--device", "cuda"]}.get(subject, [subject])
    written = tmp_path / "page.md"
    assert main([*command, "--from-json", str(stored), "--markdown", str(written)]) == 0
    assert written.read_text() == stored.with_suffix(".md").read_text()

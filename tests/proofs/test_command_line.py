"""``python -m proofs``: exit status, table, reports, replay, friendly errors."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from proofs import page, peers, pool, runner
from proofs.__main__ import main
from proofs._claim import Claim
from proofs.backends import BACKENDS
from tests.proofs import broken

RIGHT = "tests.proofs.broken:right"
WRONG = "tests.proofs.broken:half_a_step_missing"
FEW = ["--profile", "quick", "--claim", "last_side_exact", "--claim", "one_by_one_is_one"]


def test_exit_status_says_whether_all_claims_hold(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--projection", RIGHT, *FEW]) == 0
    table = capsys.readouterr().out
    for word in ("last_side_exact", "holds", "finite logits of std up to 3e3", "compensated sums", "2 hold, 0 broken"):
        assert word in table
    assert main(["--projection", WRONG, *FEW]) == 1
    table = capsys.readouterr().out
    assert "last_side_exact is broken by tests.proofs.broken:half_a_step_missing" in table
    assert "logits = [[[" in table
    assert main(["--projection", WRONG, "--last", "columns", *FEW]) == 0


def test_reports_can_be_read_back_and_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, junit = tmp_path / "out.json", tmp_path / "out.xml"
    assert (
        main(
            [
                "--projection",
                WRONG,
                *FEW,
                "--json",
                str(report),
                "--junit",
                str(junit),
                "--seed",
                "3",
                "--commit",
                "abc",
            ]
        )
        == 1
    )
    document = json.loads(report.read_text())
    verdicts = {outcome["claim"]: outcome["verdict"] for outcome in document["outcomes"]}
    assert verdicts == {"last_side_exact": "broken", "one_by_one_is_one": "holds"}
    assert document["settings"]["seed"] == 3 and "numpy" in document["versions"]
    assert document["commit"] == "abc" and document["settings"]["not_tried"] == 0
    assert document["claims"]["last_side_exact"]["lemma"] == "rownorm_sum"
    text = page.render_report(report)
    assert "1 hold, 1 broken, 0 not claimed, 0 not tried" in text and "commit abc" in text
    said = " ".join(text.split())
    assert f"`python -m proofs --projection {WRONG} --last rows --claim last_side_exact --claim one_by_one" in said
    assert "--profile quick --seed 3 --jobs 1`" in said
    assert "| last_side_exact | **broken 1/1** |" in text and "| one_by_one_is_one | 1 hold |" in text
    assert "- broken: last\\_side\\_exact" in page.render_measured([report])
    suite = ElementTree.parse(junit).getroot()[0]
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    assert main(["--projection", WRONG, "--replay", str(report)]) == 1
    assert main(["--replay", str(report)]) == 1
    assert "last_side_exact is broken" in capsys.readouterr().out
    assert main(["--projection", RIGHT, "--replay", str(report)]) == 2  # the report is about another projection
    assert "pass the same ones, or none" in " ".join(capsys.readouterr().out.split())
    assert main(["--projection", RIGHT, *FEW, "--json", str(report)]) == 0
    assert main(["--replay", str(report)]) == 2
    assert "holds no failing example" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"claim": "sums_to_one"}, "is of another version: this one makes no claim 'sums_to_one'"),
        ({"failing": {"logits": [[["not a number"]]], "shape": [1, 1, 1], "dtype": "float64", "seed": 0, "note": ""}},
         "is not a report of this version"),
        ({"failing": {"logits": [[["0x0p0"]]], "shape": [1, 1, 1]}}, "is not a report of this version"),
    ],
)  # fmt: skip
def test_a_report_of_another_version_is_named(
    change: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "out.json"
    assert main(["--projection", WRONG, *FEW, "--json", str(report)]) == 1
    document = json.loads(report.read_text())
    document["outcomes"] = [{**document["outcomes"][0], **change}]
    report.write_text(json.dumps(document))
    capsys.readouterr()
    assert main(["--replay", str(report)]) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert message in said and "out.json" in said


@pytest.mark.parametrize(
    "make",
    [
        lambda path: page.main(["out.md", "--report", path]),
        lambda path: page.main(["out.md", "--measured", path]),
        lambda path: peers.main(["out.md", "--add", path]),
    ],
)
@pytest.mark.parametrize("text", [None, "no JSON", "[]", '{"outcomes": []}'])
def test_pages_refuse_what_is_no_report(
    make: Callable[[str], int], text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit):
        make(str(path))
    assert "is not a report of python -m proofs --json" in capsys.readouterr().err


def test_a_backend_that_is_named_twice_is_tried_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--projection", RIGHT, *FEW, "--backend", "numpy", "--backend", "numpy", "--detail"]) == 0
    assert "2 hold, 0 broken" in capsys.readouterr().out


def test_an_interrupted_run_reports_what_it_saw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def stops_at_the_second(claim: Claim, *arguments: object, **options: object) -> runner.Outcome:
        tried.append(claim.name)
        if len(tried) == 2:
            raise KeyboardInterrupt
        return runner.Outcome(claim, f"{RIGHT} on numpy", "holds", 1)

    monkeypatch.setattr(runner, "run_claim", stops_at_the_second)
    report = tmp_path / "out.json"
    assert main(["--projection", RIGHT, *FEW, "--json", str(report)]) == 130
    assert "interrupted: 1 of 2 were not tried" in capsys.readouterr().out
    document = json.loads(report.read_text())
    assert document["settings"]["not_tried"] == 1
    assert [outcome["verdict"] for outcome in document["outcomes"]] == ["holds", "not tried"]


def test_what_kills_its_process_is_broken_and_the_rest_is_tried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    junit = tmp_path / "out.xml"
    projection = ["--projection", "tests.proofs.broken:ends_the_process_at_one", "--jobs", "2", "--junit", str(junit)]
    assert main([*projection, *FEW, "--claim", "two_by_two_closed_form"]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "1 hold, 2 broken, 0 not claimed, 0 not tried" in text
    assert "one_by_one_is_one is broken" in text and "the process that tried it died" in text
    suite = ElementTree.parse(junit).getroot()[0]
    assert suite.get("failures") == "2" and len(suite.findall("testcase/failure")) == 2


def test_a_process_that_loses_its_device_tries_nothing_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "out.json"
    chosen = [*FEW, "--claim", "two_by_two_closed_form", "--json", str(report)]
    assert main(["--projection", "tests.proofs.broken:loses_the_device", "--jobs", "2", *chosen]) == 1
    outcomes = json.loads(report.read_text())["outcomes"]
    lost = {o["claim"] for o in outcomes if "illegal memory access" in o["reason"]}
    assert lost == {"one_by_one_is_one", "last_side_exact"}
    verdicts = {o["claim"]: o["verdict"] for o in outcomes}
    assert verdicts == {**dict.fromkeys(lost, "broken"), "two_by_two_closed_form": "holds"}


def test_processes_that_cannot_begin_end_the_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_prepare", broken.ends_the_process)
    assert main(["--projection", RIGHT, *FEW, "--jobs", "2"]) == 130
    text = capsys.readouterr().out
    assert "a process died" in text and "2 of 2 were not tried" in text


def test_library_subset(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["--backend", "numpy", "--solver", "SinkhornLog", "--claim", "closure", "--profile", "quick", "--detail"])
        == 0
    )
    assert "SinkhornLog on numpy" in capsys.readouterr().out


def test_list_prints_statements(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--claim", "last_side_exact"]) == 0
    assert "lemma rownorm_sum" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--projection", "no_colon"], "package.module:function"),
        (["--projection", "no_such_module:f"], "cannot import 'no_such_module'"),
        (["--projection", "math:no_such_name"], "has no attribute 'no_such_name'"),
        (["--projection", "math:pi"], "not a function"),
        (["--projection", "math:[/x]"], "no attribute '[/x]'"),
        (["--projection", "tests.proofs.module_that_exits:f"], "raised SystemExit: 0"),
        (["--claim", "nonsense"], "unknown claim 'nonsense'"),
        (["--solver", "Nonsense", "--backend", "numpy"], "birkhoff.solvers has"),
        (["--replay", "/nonexistent.json", "--backend", "numpy"], "is not a report"),
        (["--projection", RIGHT, "--claim", "certificate"], "nothing to verify"),
        (["--projection", RIGHT, "--jobs", "0"], "give 1 or more"),
        (["--projection", RIGHT, "--num-iters", "0"], "num_iters = 0; give 1 or more"),
        (["--projection", RIGHT, "--size", "33"], "sizes = (33,); give some of 1, 2, 3,"),
        (["--projection", RIGHT, "--dtype", "float8"], "dtypes = ('float8',) on numpy; give a list of float64"),
        (["--projection", "operator:add"], "cannot be called with one array of logits: missing a required argument"),
        (["--list", "--claim", "layers"], "unknown claim 'layers'"),
        (["--projection", RIGHT, "--solver", "Newton"], "--solver is about this library"),
        (["--backend", "numpy", "--dtype", "float32"], "--dtype: about a function of yours"),
        (["--backend", "numpy", "--last", "columns"], "--last columns: about a function of yours"),
        (["--projection", RIGHT, "--junit", "/nonexistent/x.xml"], "--junit /nonexistent/x.xml: its folder does not"),
        (["--projection", RIGHT, "--json", "/nonexistent/x.json"], "--json /nonexistent/x.json: its folder does not"),
        (["--projection", RIGHT, "--junit", "/"], "--junit /: a folder"),
        (["--projection", RIGHT, "--json", "/"], "--json /: a folder"),
    ],
)
def test_wrong_arguments_get_a_friendly_message(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in " ".join(capsys.readouterr().out.split())


def test_what_is_not_installed_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else "found")
    assert main(["--list"]) == 2
    assert "rich not installed; pip install 'birkhoff-mhc[proofs]'" in capsys.readouterr().err


def test_a_backend_that_cannot_run_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    if BACKENDS["cupy"].missing() is None:
        pytest.skip("cupy runs here")
    assert main(["--backend", "cupy"]) == 2
    assert "cannot run here" in capsys.readouterr().out

"""The benchmarks' command line: what cannot be measured or rendered is said in one line, before anything is timed."""

from __future__ import annotations

import json

import pytest

from benchmarks.__main__ import main


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["projection", "--names", "nothing"], "leave nothing to measure"),
        (["projection", "--cases", "nothing"], "leave nothing to measure"),
        (["projection", "--from-json", "absent.json"], "absent.json can't be read or written (No such file"),
        (["projection", "--from-json", "broken.json"], "broken.json holds no report of this benchmark"),
        (
            ["which_solver", "--from-json", "other.json"],
            "(KeyError: 'machine'); give a file that its --json has written",
        ),
        (
            ["which_solver", "--seconds", "0", "--json", "absent/report.json"],
            "absent/report.json can't be read or written",
        ),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(words, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "broken.json").write_text('{"machine":')
    (tmp_path / "other.json").write_text(json.dumps({"lines": []}))
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith(f"python -m benchmarks {words[0]}: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    "words", [["which_solver", "--sizes", "0"], ["projection", "--threads", "-1"], ["training", "--layers", "0"]]
)
def test_numbers_out_of_range_are_refused(words, capsys):
    with pytest.raises(SystemExit) as error:
        main(words)
    assert (
        error.value.code == 2 and f"argument {words[1]}: must be 1 or more, got {words[2]}" in capsys.readouterr().err
    )


@pytest.mark.parametrize("subject", ["projection", "layer", "training", "which_solver"])
def test_a_benchmark_of_the_gpu_asks_for_one(subject, monkeypatch, capsys):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([subject, *(["--device", "cuda"] if subject in ("projection", "which_solver") else [])]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err

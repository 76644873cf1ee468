"""The command line, from its words to its exit codes."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch

from mhc_layers.cli import _parse, main
from mhc_layers.training.checkpoint import load_checkpoint
from mhc_layers.training.metrics import MetricsLog
from tests.mhc_layers.training_cases import write_text

TINY = [
    "--device", "cpu", "--threads", "1", "--steps", "4", "--log-every", "1", "--model.dim", "16",
    "--model.num-layers", "1", "--model.num-heads", "2", "--model.num-kv-heads", "2", "--model.hidden-dim", "32",
    "--data.seq-len", "16", "--data.batch-size", "2", "--data.held-out", "0.2", "--eval.num-bytes", "64",
    "--eval.final-bytes", "64", "--eval.sample-bytes", "8", "--monitor.every", "2", "--monitor.certify-every", "4",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def text(folder):
    return write_text(folder / "text")


@pytest.fixture(scope="module")
def runs(folder, text):
    """Two finished runs, with figures drawn for the first only."""
    for connection in ("mhc", "residual"):
        arguments = ["train", "--recipe", "tiny_cpu", "--connection", connection, "--data", str(text)]
        assert main([*arguments, "--runs", str(folder / "runs"), *TINY]) == 0
    return folder / "runs"


def test_train_writes_a_run_with_the_overrides(runs, text):
    config = json.loads((runs / "tiny_cpu-mhc" / "config.json").read_text())
    assert config["steps"] == 4 and config["model"]["dim"] == 16 and config["data"]["path"] == str(text)
    record = json.loads((runs / "tiny_cpu-mhc" / "run.json").read_text())
    assert len(record["corpus"]["sha256"]) == 64 and record["sessions"][0]["from_step"] == 0
    assert (runs / "tiny_cpu-mhc" / "plots" / "gains.png").is_file()
    assert json.loads((runs / "tiny_cpu-residual" / "config.json").read_text())["model"]["connection"] == "residual"


def test_train_shows_progress_and_report(folder, text, capsys):
    assert main(["train", "--data", str(text), "--out", str(folder / "shown"), *TINY]) == 0
    shown = capsys.readouterr().out
    for words in (
        "sha256",
        "step 4/4",
        "bits/byte",
        "tok/s",
        "validation",
        "certified norm",
        "held-out tokens",
        "sample",
    ):
        assert words in shown, words


def test_resume_of_a_finished_run_and_of_the_latest(runs, capsys):
    assert main(["train", "--runs", str(runs), "--resume"]) == 0
    assert main(["train", "--resume", str(runs / "tiny_cpu-mhc"), "--steps", "5"]) == 0
    assert "changed since the checkpoint: steps" in capsys.readouterr().out
    assert load_checkpoint(runs / "tiny_cpu-mhc").step == 5
    assert main(["train", "--resume", str(runs / "tiny_cpu-mhc"), "--steps", "4"]) == 1
    assert "steps is 4, but the checkpoint has done 5" in capsys.readouterr().err
    assert json.loads((runs / "tiny_cpu-mhc" / "config.json").read_text())["steps"] == 5


def test_generate_continues_the_prompt(runs, capsys):
    words = ["generate", str(runs / "tiny_cpu-residual"), "--prompt", "value_", "--num-bytes", "5", "--device", "cpu"]
    assert main(words) == 0
    first = capsys.readouterr().out
    assert first.startswith("value_")
    assert main(words) == 0
    assert capsys.readouterr().out == first


def test_a_text_holds_nothing_that_a_terminal_obeys(runs, monkeypatch, capsys):
    def escapes(model, tokens, count, **options):
        return torch.cat([tokens, torch.tensor([list(b"\x1b[2J\x07\nx")])], dim=1)

    monkeypatch.setattr("mhc_layers.training.report.generate", escapes)
    assert main(["generate", str(runs / "tiny_cpu-residual"), "--prompt", "p", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "p\ufffd[2J\ufffd\nx\n"


@pytest.mark.parametrize("connection", ["mhc", "residual"])
def test_inspect_prints_certificates(runs, connection, capsys):
    assert main(["inspect", str(runs / f"tiny_cpu-{connection}"), "--tokens", "16"]) == 0
    shown = capsys.readouterr().out
    assert "whole depth" in shown and "norm_2 <=" in shown and "sampled" in shown and "feed-forward" in shown


def test_inspect_io_needs_no_checkpoint(capsys):
    assert main(["inspect", "--io", "--dim", "4096", "--bandwidth", "3.35e12"]) == 0
    shown = capsys.readouterr().out
    for words in ("20C", "28C", "36C", "81,920", "118C"):
        assert words in shown


def test_compare_prints_and_plots(runs, folder, capsys):
    figure = folder / "compared.png"
    words = ["compare", str(runs / "tiny_cpu-mhc"), str(runs / "tiny_cpu-residual"), "--figure", str(figure)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "mhc" in shown and "residual" in shown and figure.is_file()


def test_bench_prints_every_connection(capsys):
    assert main(["bench", "--dim", "8", "--tokens", "16", "--device", "cpu", "--repeats", "2"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("residual", "identity", "mhc", "hc"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--recipe", "huge"], "there is no recipe 'huge'"),
        (["train", "--data", "no-such-folder"], "neither a file nor a folder"),
        (["train", "--steps", "0"], "steps"),
        (["train", "--data.held-out", "2"], "Error parsing config.data: data.held_out is 2.0"),
        (["train", "--threads", "-1"], "threads is -1"),
        (["train", "--seed", str(2**63)], "below 2^63"),
        (["train", "--eval.prompt", "x" * 511], "eval.prompt has 512 bytes"),
        (["train", "--resume", "no-such-run", "--out", "there"], "--out can't be given with --resume"),
        (["train", "--resume", "no-such-run", "--recipe", "tiny_cpu"], "--recipe can't be given with --resume"),
        (["generate", "no-such-run", "--seed", "-1"], "--seed is -1"),
        (["train", "--resume", "no-such-run"], "does not exist"),
        (["train", "--convention", "v5"], "presets"),
        (["generate", "no-such-run"], "does not exist"),
        (["inspect"], "needs a run directory"),
        (["compare", "no-such-run"], "report.json"),
        (["bench", "--device", "tpu"], "accepted are"),
        (["generate", __file__], "is a file; give a run directory"),
        (["train", "--name", "a/b"], "name is 'a/b'"),
        (["train", "--name", ""], "a word without slashes"),
        (["inspect", "no-such-run", "--dim", "8"], "--dim belongs to --io"),
    ],
)
def test_errors_are_one_clear_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(words)
    except SystemExit as error:  # the parser's own message
        code = error.code
    captured = capsys.readouterr()
    assert code not in (0, None) and message in captured.err + captured.out
    assert "Traceback" not in captured.err and "tyro" not in captured.err
    assert not list(tmp_path.iterdir())


def test_a_run_is_not_overwritten(runs, text, capsys):
    folder = runs / "tiny_cpu-residual"
    before = (folder / "metrics.jsonl").read_text()
    assert main(["train", "--data", str(text), "--out", str(folder), *TINY]) == 1
    assert "already holds a run" in capsys.readouterr().err.replace("\n", " ")
    assert (folder / "metrics.jsonl").read_text() == before


def test_a_folder_that_cannot_be_written_to_is_an_error_of_one_line(text, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert main(["train", "--data", str(text), "--out", str(tmp_path / "file" / "run"), *TINY]) == 1
    captured = capsys.readouterr().err
    assert "Traceback" not in captured and "file/run can't be read or written (Not a directory)" in captured


def test_a_full_disk_says_so_and_leaves_the_checkpoints(text, tmp_path, monkeypatch, capsys):
    folder, write = tmp_path / "run", MetricsLog.write

    def fills_up(log, kind, step, **values):
        if step == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(log, kind, step, **values)

    monkeypatch.setattr(MetricsLog, "write", fills_up)
    words = ["train", "--data", str(text), "--out", str(folder), *TINY, "--checkpoint.every", "2"]
    assert main(words) == 1
    assert "a file can't be read or written (No space left on device); make room" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["train", "--resume", str(folder)]) == 0
    assert load_checkpoint(folder).step == 4


def test_a_run_that_ended_before_its_first_checkpoint_is_not_said_to_continue(text, tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    assert main(["train", "--data", str(text), "--out", str(tmp_path), *TINY]) == 1
    assert "ended before its first checkpoint; delete it" in capsys.readouterr().err


def test_a_damaged_report_is_named(tmp_path, capsys):
    (tmp_path / "report.json").write_text('{"name":')
    assert main(["compare", str(tmp_path)]) == 1
    assert "report.json is damaged or of another version" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "generate", "inspect", "compare", "bench"])
def test_every_command_has_its_own_help(command, capsys):
    with pytest.raises(SystemExit) as error:
        main([command, "--help"])
    assert error.value.code == 0 and f"usage: python -m mhc_layers {command}" in capsys.readouterr().out


def test_help_names_the_recipes(capsys):
    with pytest.raises(SystemExit) as error:
        main(["--help"])
    assert error.value.code == 0 and "tiny_cpu" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "--io", "--bandwidth", "-1"], "--bandwidth -1.0; both must be above 0"),
        (["inspect", "--io", "--bandwidth", "inf"], "--bandwidth inf; both must be above 0 and finite"),
        (["inspect", "--io", "--element-size", "0"], "--element-size is 0"),
        (["bench", "--repeats", "0"], "--repeats is 0"),
        (["generate", "nowhere", "--num-bytes", "-3"], "--num-bytes is -3"),
    ],
)
def test_numbers_out_of_range_are_named(words, message, capsys):
    assert main(words) == 1
    assert message in capsys.readouterr().err


def test_sizes_that_the_recipe_derived_follow_their_source():
    model = _parse(["train", "--model.dim", "64", "--model.num-heads", "2"])[0].config.model
    assert (model.dim, model.num_heads, model.num_kv_heads, model.hidden_dim) == (64, 2, 2, 192)
    model = _parse(["train", "--model.dim=64", "--model.hidden-dim", "40"])[0].config.model
    assert (model.hidden_dim, model.num_kv_heads) == (40, 4)
    model = _parse(["train", "--recipe", "medium_ddp", "--model.num-heads", "8"])[0].config.model
    assert model.num_kv_heads == 8  # the recipe's own choice stays


def test_inspect_says_where_and_in_which_dtype_the_operators_were_computed(runs, capsys):
    assert main(["inspect", str(runs / "tiny_cpu-mhc"), "--device", "cpu"]) == 0
    assert "float32 streams on cpu" in capsys.readouterr().out
    assert main(["inspect", str(runs / "tiny_cpu-mhc"), "--tokens", "0"]) == 1
    assert "--tokens is 0" in capsys.readouterr().err

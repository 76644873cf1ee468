"""The training loop: it learns, stops, resumes with the same bits, and fails loudly without losing anything."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from rich.console import Console

from mhc_layers.models.transformer import Transformer
from mhc_layers.parallel.engine import Precision
from mhc_layers.parallel.mesh import ParallelConfig, World
from mhc_layers.parallel.parallelize import parallelize
from mhc_layers.training.checkpoint import load_checkpoint, resumed_config
from mhc_layers.training.config import TrainConfig, decode, encode
from mhc_layers.training.data import load_corpus
from mhc_layers.training.errors import CheckpointError, DataError, NonFiniteLossError, ResumeError
from mhc_layers.training.loop import StopRequest, Trainer, _repeatable, choose_device, choose_precision
from mhc_layers.training.metrics import TIMING_KEYS, MetricsLog, Throughput, read_metrics
from mhc_layers.training.run import check_resumable, latest_run, load_for_resume, new_folder, run
from tests.mhc_layers.training_cases import tiny_config, tiny_model, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(autouse=True)
def no_plots(request, monkeypatch):
    """Figures take longer than these runs; one test draws them."""
    if "separates_the_streams" not in request.node.name:
        monkeypatch.setattr("mhc_layers.plots.plot_run", lambda folder: [])


class StopAfter(StopRequest):
    """Wants to stop once a number of steps has begun."""

    def __init__(self, steps):
        super().__init__()
        self.left = steps

    @property
    def wanted(self):
        self.left -= 1
        return self.left < 0

    @wanted.setter
    def wanted(self, value):
        pass


def quiet():
    return Console(quiet=True)


def without_times(folder):
    return {
        kind: [{k: v for k, v in line.items() if k not in TIMING_KEYS} for line in lines]
        for kind, lines in read_metrics(folder).items()
    }


def assert_same_checkpoint(first, second):
    a, b = load_checkpoint(first), load_checkpoint(second)
    assert a.step == b.step
    for group in ("model", "optimizer", "random"):
        before, after = getattr(a, group), getattr(b, group)
        assert before.keys() == after.keys()
        for name in before:
            assert torch.equal(before[name], after[name]), (group, name)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, text, kind):
    config = tiny_config(text)
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, kind=kind))
    whole = run(config, tmp_path / "whole", console=quiet())
    part = run(config, tmp_path / "part", console=quiet(), stop=StopAfter(7))
    assert whole.complete and not part.complete
    checkpoint, folder = load_for_resume(tmp_path / "part")
    assert checkpoint.step == 7 and folder == tmp_path / "part"
    torch.manual_seed(12345)  # a new process would have another state
    rest = run(resumed_config(checkpoint), folder, resume=checkpoint, console=quiet())
    assert rest.complete
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "part")
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "part")
    times = {"seconds": 0, "tokens_per_second": 0, "monitor_share": 0, "monitor_setup_seconds": 0}
    assert dataclasses.replace(whole.report, **times) == dataclasses.replace(rest.report, **times)
    before = checkpoint.progress  # the time of a run is that of all its parts
    assert rest.report.seconds > before["seconds"] > before["monitor_seconds"] > 0
    assert rest.report.monitor_setup_seconds > before["monitor_setup_seconds"] > 0
    assert rest.report.monitor_share * rest.report.seconds > before["monitor_seconds"]


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", ["none", "auto"])
def test_a_resumed_run_on_the_gpu_has_the_same_bits(tmp_path, text, recompute):
    """bfloat16 streams, fused connections, attention whose default backward pass has no fixed order."""
    config = tiny_config(text, device="cuda", parallel=ParallelConfig(recompute=recompute))
    config = dataclasses.replace(
        config,
        model=tiny_model(dim=128, num_heads=2, num_layers=3, max_seq_len=256),
        data=dataclasses.replace(config.data, seq_len=256, batch_size=8),
    )
    run(config, tmp_path / "whole", console=quiet())
    run(config, tmp_path / "part", console=quiet(), stop=StopAfter(7))
    checkpoint, folder = load_for_resume(tmp_path / "part")
    run(resumed_config(checkpoint), folder, resume=checkpoint, console=quiet())
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "part")
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "part")


def test_kernels_with_a_fixed_order_are_asked_for_while_training_only():
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    with _repeatable(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert (torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory) == before
    with _repeatable(False):
        assert torch.are_deterministic_algorithms_enabled() == before[0]


def test_resume_from_an_older_checkpoint_drops_the_newer_log(tmp_path, text):
    config = tiny_config(text)
    run(config, tmp_path / "run", console=quiet())
    expected = without_times(tmp_path / "run")
    checkpoint, folder = load_for_resume(tmp_path / "run" / "checkpoints" / "step_00000010")
    run(resumed_config(checkpoint), folder, resume=checkpoint, console=quiet())
    assert without_times(tmp_path / "run") == expected


def test_training_lowers_the_loss_and_separates_the_streams(tmp_path, text):
    config = tiny_config(text, steps=60)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=8))
    report = run(config, tmp_path / "run", console=quiet()).report
    assert report.bits_per_byte < 0.75 * report.first_bits_per_byte
    assert report.stream_difference > 1e-3
    assert report.norm2_lower <= report.norm2_upper < 2.0
    assert 1 - 1e-5 < report.forward_gain_min <= report.forward_gain_max < 1 + 1e-5
    lines = read_metrics(tmp_path / "run")
    assert {"train", "eval", "monitor", "certificate"} <= lines.keys()
    for name in ("config.json", "run.json", "report.json", "sample.txt"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    assert {path.name for path in (tmp_path / "run" / "plots").iterdir()} == {
        "loss.png", "gains.png", "maps.png", "streams.png"
    }  # fmt: skip
    assert any((tmp_path / "run" / "tensorboard").iterdir())


@pytest.mark.parametrize("connection", ["residual", "hc", "identity", "mhc_static"])
def test_baselines_train_on_the_same_body(tmp_path, text, connection):
    config = tiny_config(text, model=tiny_model(connection=connection), steps=4)
    report = run(config, tmp_path / "run", console=quiet()).report
    assert report.connection == connection
    assert math.isfinite(report.norm2_upper) and report.bits_per_byte < report.first_bits_per_byte


def test_micro_batches_give_the_gradient_of_the_batch(tmp_path, text):
    config = tiny_config(text)
    whole = Trainer(config, load_corpus(text, held_out=0.2), tmp_path / "a")
    parts = Trainer(
        dataclasses.replace(config, data=dataclasses.replace(config.data, micro_batch_size=1)),
        load_corpus(text, held_out=0.2),
        tmp_path / "b",
    )
    tokens = torch.from_numpy(whole.windows.batch(0)).long()
    first = whole.engine.forward_backward(tokens)
    second = parts.engine.forward_backward(tokens, micro_batch_size=1)
    assert float(first) == pytest.approx(float(second), rel=1e-6)
    for a, b in zip(whole.engine.model.parameters(), parts.engine.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_backward_runs_in_the_calling_thread(device):
    model, seen = Transformer(tiny_model()).to(device), []
    model.embedding.weight.register_hook(
        lambda gradient: seen.append((threading.get_ident(), torch._C._is_multithreading_enabled()))
    )
    tokens = torch.randint(256, (2, 9), device=device)
    precision = Precision(device_type=device, stream_dtype=torch.float32)
    engine = parallelize(model, ParallelConfig(), precision, world=World())
    engine.forward_backward(tokens)
    assert seen == [(threading.get_ident(), False)]
    assert torch._C._is_multithreading_enabled()


def test_bfloat16_streams_keep_float32_parameters(tmp_path, text):
    config = tiny_config(text, stream_dtype="bfloat16", steps=3)
    trainer = Trainer(config, load_corpus(text, held_out=0.2), tmp_path / "run")
    assert trainer.train()
    assert {parameter.dtype for parameter in trainer.engine.model.parameters()} == {torch.float32}
    assert choose_precision(config, torch.device("cuda", 0)).stream_dtype == torch.bfloat16
    assert choose_precision(tiny_config(text), torch.device("cpu")).stream_dtype == torch.float32


def test_divergence_is_an_error_and_keeps_the_checkpoints(tmp_path, text):
    config = tiny_config(text, steps=40, log_every=1)
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, learning_rate=1e12))
    with pytest.raises(NonFiniteLossError, match=r"step (\d+): the loss.*learning-rate") as error:
        run(config, tmp_path / "run", console=quiet())
    last = read_metrics(tmp_path / "run")["train"][-1]["step"]
    assert error.value.args[0].startswith(f"step {last + 1}: ")
    for path in (tmp_path / "run" / "checkpoints").glob("step_*"):
        assert all(value.isfinite().all() for value in load_checkpoint(path).model.values())


def test_other_data_are_refused_on_resume(tmp_path, text):
    config = tiny_config(text, steps=5)
    run(config, tmp_path / "run", console=quiet())
    checkpoint, folder = load_for_resume(tmp_path / "run")
    other = write_text(tmp_path / "other", files=31)
    changed = dataclasses.replace(config, data=dataclasses.replace(config.data, path=other))
    check_resumable(config, changed)
    with pytest.raises(ResumeError, match="data are not those"):
        run(changed, folder, resume=checkpoint, console=quiet())


def test_resume_refuses_what_would_be_another_run(text):
    config = tiny_config(text)
    assert check_resumable(config, config) == []
    assert any("schedule" in note for note in check_resumable(config, dataclasses.replace(config, steps=99)))
    for change in (
        {"seed": 5},
        {"model": tiny_model(dim=32)},
        {"optim": dataclasses.replace(config.optim, learning_rate=1.0)},
        {"data": dataclasses.replace(config.data, seq_len=8)},
    ):
        with pytest.raises(ResumeError, match=next(iter(change))):
            check_resumable(config, dataclasses.replace(config, **change))


def test_too_little_text_is_an_error_before_anything_is_written(tmp_path):
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(DataError, match="too little text"):
        run(tiny_config(tmp_path / "short.txt"), tmp_path / "run", console=quiet())
    assert not (tmp_path / "run").exists()


def test_configuration_survives_json(text):
    config = tiny_config(text, model=tiny_model(convention="deepseek_v4"))
    assert decode(TrainConfig, json.loads(json.dumps(encode(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(speed=1), "unknown field 'speed'"),
        (lambda v: v["data"].update(seq_len="long"), "config.data.seq_len"),
        (lambda v: v.update(stream_dtype="int8"), "stream_dtype"),
        (lambda v: v["schedule"].update(fractions=3), "a list is expected"),
        (lambda v: v.update(optim=3), "an object"),
    ],
)
def test_wrong_json_says_where(text, change, message):
    values = encode(tiny_config(text))
    change(values)
    with pytest.raises(ValueError, match=message):
        decode(TrainConfig, values)


@pytest.mark.parametrize(
    "fields",
    [
        {"steps": 0},
        {"seed": -1},
        {"model": tiny_model(vocab_size=300)},
        {"model": tiny_model(max_seq_len=8)},
        {"stream_dtype": "float16"},
    ],
)
def test_contradictions_are_refused(text, fields):
    with pytest.raises(ValueError):
        tiny_config(text, **fields)


def test_run_folders_are_never_reused(tmp_path, text):
    config = tiny_config(text)
    (tmp_path / "killed").mkdir()  # before its first checkpoint
    (tmp_path / "killed" / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    with pytest.raises(ValueError, match="before its first checkpoint; delete it or"):
        run(config, tmp_path / "killed", console=quiet())
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["metrics.jsonl"]
    first = new_folder(tmp_path, config)
    first.mkdir()
    assert (first.name, new_folder(tmp_path, config).name) == ("test-mhc", "test-mhc-2")
    with pytest.raises(CheckpointError, match="no run with a checkpoint"):
        latest_run(tmp_path)


def test_log_of_times_and_broken_last_line(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write("train", 1, loss=float("nan"), values=[1.0, 2.0])
        log.write("train", 2, loss=1.0)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"kind": "train", "st\xff')
    assert [line["loss"] for line in read_metrics(tmp_path)["train"]] == [None, 1.0]
    with MetricsLog(tmp_path, resume_step=1) as log:
        log.write("train", 2, loss=3.0)
    assert [line["loss"] for line in read_metrics(tmp_path)["train"]] == [None, 3.0]
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl"):
        read_metrics(tmp_path / "nowhere")


def test_throughput_needs_two_marks():
    meter = Throughput()
    meter.add(10)
    assert meter.tokens_per_second == 0.0
    meter.add(10)
    assert meter.tokens_per_second > 0.0


def test_unknown_and_absent_devices_are_refused():
    with pytest.raises(ValueError, match="accepted are"):
        choose_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="sees no GPU"):
            choose_device("cuda")


def test_first_signal_asks_second_interrupts():
    stop = StopRequest()
    with stop.listening():
        signal.raise_signal(signal.SIGINT)
        assert stop.wanted
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_or_killed_run_ends_with_the_same_bits(tmp_path, text, how):
    command = [
        sys.executable, "-m", "mhc_layers", "train", "--recipe", "tiny_cpu", "--data", str(text), "--device", "cpu",
        "--threads", "1", "--steps", "40", "--model.dim", "32", "--model.num-layers", "2", "--model.hidden-dim", "64",
        "--data.seq-len", "32", "--data.batch-size", "4", "--log-every", "1",
        "--checkpoint.every", "4",
    ]  # fmt: skip
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, capture_output=True, timeout=240)
    process = subprocess.Popen([*command, "--out", str(tmp_path / "part")], stdout=subprocess.PIPE, text=True)
    log = tmp_path / "part" / "metrics.jsonl"
    while not (log.exists() and '"step": 5' in log.read_text()):
        time.sleep(0.05)
    process.send_signal(how)
    output, _ = process.communicate(timeout=120)
    if how == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130 and "--resume" in output
    subprocess.run(
        [sys.executable, "-m", "mhc_layers", "train", "--resume", str(tmp_path / "part")],
        check=True, capture_output=True, timeout=240,
    )  # fmt: skip
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "part")

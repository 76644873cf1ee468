"""Parallel techniques on two processes: the gradients and the state are those of one process.

On CPUs with gloo, and on as many GPUs with NCCL where a machine has them.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from mhc_layers import Transformer
from mhc_layers._torch_ops import FusedSite, fused_site
from mhc_layers.cli import main
from mhc_layers.parallel.engine import Precision
from mhc_layers.parallel.mesh import ParallelConfig, World, join_processes, leave_processes
from mhc_layers.parallel.parallelize import parallelize
from mhc_layers.parallel.pipeline import PipelineEngine, stage_sizes
from mhc_layers.parallel.sharded_checkpoint import load_shards, save_shards
from mhc_layers.training.checkpoint import load_checkpoint, resumed_config
from mhc_layers.training.metrics import read_metrics
from mhc_layers.training.optim import OptimConfig, build_optimizers, load_optimizer_state, optimizer_state
from mhc_layers.training.run import load_for_resume, run
from tests.mhc_layers.processes import devices, spawn, torchrun
from tests.mhc_layers.test_cli import TINY
from tests.mhc_layers.training_cases import tiny_config, tiny_model, write_text


def batch(rows=8):
    return torch.randint(256, (rows, 13), generator=torch.Generator().manual_seed(5))


def build(model_config, parallel, world, device="cpu", dtype=torch.float32, fused=False):
    """Sites are fused on a GPU; on a CPU their operators run in plain torch, if ``fused``."""
    torch.manual_seed(0)
    precision = Precision(device_type=device, stream_dtype=dtype)
    model = Transformer(model_config).to(device)
    for site in model.sites if fused else ():
        site.requested_implementation = site._implementation = fused_site(site.convention)
    assert all(isinstance(site.implementation, FusedSite) == (fused or device == "cuda") for site in model.sites)
    return parallelize(model, parallel, precision, world=world)


def one_process(model_config, device="cpu", dtype=torch.float32):
    """Loss, gradients, norm, parameters after two steps and optimizer state of a single process."""
    return steps(build(model_config, ParallelConfig(), World(), device, dtype))


def steps(engine, micro=0, clip=0.5):
    optimizers = build_optimizers(engine.model, OptimConfig(learning_rate=1e-2, eps=1e-3))
    tokens = batch().to(next(engine.model.parameters()).device)
    share = len(tokens) // engine.data_size
    mine = tokens[engine.data_rank * share : (engine.data_rank + 1) * share]
    losses, norms = [], []
    for _ in range(2):
        losses.append(float(engine.forward_backward(mine, micro_batch_size=micro)))
        norms.append(float(engine.clip(clip)))
        gradients = engine.gather({n: p.grad for n, p in engine.model.named_parameters() if p.grad is not None})
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    evaluated = float(engine.evaluate(tokens))
    parameters = engine.gather(dict(engine.model.named_parameters()))
    state = engine.gather(optimizer_state(engine.model, optimizers))
    return {"losses": losses, "norms": norms, "evaluated": evaluated, "gradients": gradients, "parameters": parameters,
            "state": state, "optimizers": optimizers}  # fmt: skip


def assert_close(expected, actual, tolerance=2e-5):
    for name in ("losses", "norms", "evaluated"):
        assert actual[name] == pytest.approx(expected[name], rel=1e-4), name
    for group in ("gradients", "parameters", "state"):
        assert expected[group].keys() == actual[group].keys(), group
        for name, value in expected[group].items():
            torch.testing.assert_close(
                actual[group][name].detach().cpu(),
                value.detach().cpu(),
                rtol=1e-3,
                atol=tolerance,
                msg=lambda m, n=name: f"{n}: {m}",
            )


CASES = {
    "ddp": (ParallelConfig(), {}, 0),
    "ddp-accumulate": (ParallelConfig(), {}, 2),
    "ddp-recompute": (ParallelConfig(recompute="auto"), {"num_layers": 3}, 0),
    "fsdp": (ParallelConfig(shard=2), {}, 0),
    "fsdp-recompute": (ParallelConfig(shard=2, recompute="auto"), {"num_layers": 3}, 2),
    "tensor": (ParallelConfig(tensor=2), {"num_heads": 4, "num_kv_heads": 2}, 0),
    "tensor-recompute": (ParallelConfig(tensor=2, recompute=2), {}, 0),
    "pipeline": (ParallelConfig(pipeline=2), {}, 0),
    "pipeline-untied": (ParallelConfig(pipeline=2, micro_batches=2), {"tie_embeddings": False, "num_layers": 3}, 0),
    "pipeline-delayed": (ParallelConfig(pipeline=2, recompute=3), {"convention": "deepseek_v41", "num_layers": 3}, 0),
    "pipeline-delayed-fused": (ParallelConfig(pipeline=2), {"convention": "deepseek_v41", "num_layers": 3}, 0),
}


def _is_contiguous(stage, arguments, outputs):
    """PyTorch 2.11 refuses other tensors in a schedule."""
    passed = [*arguments, *(outputs if isinstance(outputs, tuple) else (outputs,))]
    assert not torch.is_grad_enabled() or all(tensor.is_contiguous() for tensor in passed)


def _compare_cases(rank, device, names):
    world = join_processes(device)
    for name in names:
        parallel, changes, micro = CASES[name]
        model_config = tiny_model(**changes)
        engine = build(model_config, parallel, world, device, fused=name.endswith("fused"))
        if isinstance(engine, PipelineEngine):
            engine.model.register_forward_hook(_is_contiguous)
        actual = steps(engine, micro)
        expected = one_process(model_config, device)
        try:
            assert_close(expected, actual, 2e-5 if device == "cpu" else 1e-4)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        # scatter undoes gather: a fresh engine continues from the whole model's tensors
        fresh = build(model_config, parallel, world, device)
        optimizers = build_optimizers(fresh.model, OptimConfig())
        local = fresh.scatter(actual["parameters"])
        with torch.no_grad():
            for key, parameter in fresh.model.named_parameters():
                parameter.copy_(local[key])
        load_optimizer_state(fresh.model, optimizers, fresh.scatter(actual["state"]))
        again = fresh.gather(dict(fresh.model.named_parameters()))
        state = fresh.gather(optimizer_state(fresh.model, optimizers))
        for key, value in actual["parameters"].items():
            assert torch.equal(again[key], value), (name, key)
        for key, value in actual["state"].items():
            assert torch.equal(state[key], value), (name, key)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "tensor", "pipeline"])
@pytest.mark.parametrize("device", devices())
def test_gradients_and_state_are_those_of_one_process(device, kind):
    spawn(_compare_cases, device, [name for name in CASES if name.startswith(kind)])


def _compare_bfloat16(rank, device):
    world = join_processes(device)
    expected = one_process(tiny_model(), device, torch.bfloat16)
    for parallel in (ParallelConfig(shard=2), ParallelConfig(tensor=2)):
        actual = steps(build(tiny_model(), parallel, world, device, torch.bfloat16))
        assert actual["losses"] == pytest.approx(expected["losses"], rel=2e-2)
        assert actual["norms"] == pytest.approx(expected["norms"], rel=5e-2)


@pytest.mark.parametrize("device", devices())
def test_bfloat16_streams_stay_close(device):
    spawn(_compare_bfloat16, device)


def _mixed_axes(rank, device):
    world = join_processes(device)
    for other in ("shard", "tensor", "pipeline"):
        parallel = ParallelConfig(replicate=2, **{other: 2})
        actual = steps(build(tiny_model(), parallel, world, device))
        assert_close(one_process(tiny_model(), device), actual, 2e-5 if device == "cpu" else 1e-4)


@pytest.mark.parametrize("device", devices(4))
def test_two_axes_at_once_on_four_processes(device):
    spawn(_mixed_axes, device, processes=4)


def _train(rank, device, text, folder, parallel, resume):
    config = tiny_config(Path(text), device=device, stream_dtype="float32", parallel=parallel)
    config = dataclasses.replace(
        config,
        steps=6,
        data=dataclasses.replace(config.data, batch_size=8),
        optim=OptimConfig(learning_rate=1e-2, eps=1e-3),  # so that gradients of rounding size do not move anything
    )
    if resume:
        checkpoint, _ = load_for_resume(Path(resume))
        config = dataclasses.replace(resumed_config(checkpoint), parallel=parallel)
        run(config, Path(folder), resume=checkpoint, console=Console(quiet=True))
    else:
        run(config, Path(folder), console=Console(quiet=True))


@pytest.mark.parametrize("device", devices())
def test_a_run_on_two_processes_equals_one_and_changes_its_layout(device, tmp_path):
    text = write_text(tmp_path / "text")
    _train(0, device, str(text), str(tmp_path / "one"), ParallelConfig(), None)
    expected = load_checkpoint(tmp_path / "one")
    for name, parallel in (("fsdp", ParallelConfig(shard=2)), ("pipeline", ParallelConfig(pipeline=2))):
        spawn(_train, device, str(text), str(tmp_path / name), parallel, None)
        actual = load_checkpoint(tmp_path / name)
        assert actual.step == 6 and actual.model.keys() == expected.model.keys()
        for key, value in expected.model.items():
            torch.testing.assert_close(actual.model[key], value, rtol=1e-3, atol=2e-4)
        first, second = (read_metrics(tmp_path / folder)["train"] for folder in ("one", name))
        assert [line["loss"] for line in first] == pytest.approx([line["loss"] for line in second], rel=1e-3)
        assert (tmp_path / name / "report.json").is_file()
        records = [json.loads((tmp_path / folder / "run.json").read_text()) for folder in ("one", name)]
        assert records[0]["parameters"] == records[1]["parameters"]
    sharded = load_checkpoint(tmp_path / "fsdp")
    middle = tmp_path / "fsdp" / "checkpoints" / "step_00000005"
    assert (middle / "shards" / "__1_0.distcp").is_file() and not (middle / "model.safetensors").exists()
    # two processes again: the same bits; another layout, and one process: the same numbers
    spawn(_train, device, str(text), str(tmp_path / "again"), ParallelConfig(shard=2), str(middle))
    again = load_checkpoint(tmp_path / "again")
    for group in ("model", "optimizer"):
        before, after = getattr(sharded, group), getattr(again, group)
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    spawn(_train, device, str(text), str(tmp_path / "stages"), ParallelConfig(pipeline=2), str(middle))
    _train(0, device, str(text), str(tmp_path / "alone"), ParallelConfig(), str(middle))
    for name in ("stages", "alone"):
        resumed = load_checkpoint(tmp_path / name)
        for key, value in expected.model.items():
            torch.testing.assert_close(resumed.model[key], value, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("device", devices())
def test_torchrun_of_a_recipe_resumes_to_the_bit_and_its_run_is_read_by_one_process(device, tmp_path, capsys):
    text, folder, again = write_text(tmp_path / "text"), tmp_path / "run", tmp_path / "again"
    words = ["train", "--recipe", "medium_fsdp", "--data", str(text), "--out", str(folder), *TINY]
    words[words.index("--device") + 1] = device
    assert "certified norm" in torchrun(2, *words, "--checkpoint.every", "2")
    assert (folder / "checkpoints" / "step_00000004" / "shards" / "__1_0.distcp").is_file()
    assert main(["inspect", str(folder), "--device", "cpu"]) == 0
    assert "checkpoint of step 4, float32 streams on cpu" in capsys.readouterr().out
    shutil.copytree(folder, again)
    shutil.rmtree(again / "checkpoints" / "step_00000004")
    assert "from step 2" in torchrun(2, "train", "--resume", str(again))
    first, second = load_checkpoint(folder), load_checkpoint(again)
    for group in ("model", "optimizer"):
        before, after = getattr(first, group), getattr(second, group)
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def _threads_of_gloo():
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return [name for name in names if "gloo" in name]


def _leave(rank, text, folder):
    world = join_processes("cpu")
    for parallel in (ParallelConfig(shard=2), ParallelConfig(tensor=2), ParallelConfig(pipeline=2), ParallelConfig()):
        steps(build(tiny_model(), parallel, world))
    assert _threads_of_gloo()
    leave_processes(world)
    gc.collect()
    assert not _threads_of_gloo()
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    _train(rank, "cpu", text, folder, ParallelConfig(shard=2), None)
    gc.collect()
    assert not _threads_of_gloo()


@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="this system does not name a process's threads")
def test_no_thread_of_a_group_outlives_it(tmp_path):
    """One that does may abort the interpreter's shutdown; see end_process."""
    spawn(_leave, str(write_text(tmp_path / "text")), str(tmp_path / "run"))


def _save_shards(rank, device, folder):
    engine = build(tiny_model(), ParallelConfig(shard=2), join_processes(device), device)
    parameters = dict(engine.model.named_parameters())
    save_shards(Path(folder), parameters)
    expected = engine.gather(parameters)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.zero_()
    load_shards(Path(folder), parameters)
    for name, value in engine.gather(parameters).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("device", devices())
def test_shards_are_read_by_two_processes_and_by_one(device, tmp_path):
    spawn(_save_shards, device, str(tmp_path / "shards"))
    model = build(tiny_model(), ParallelConfig(), World(), device).model
    expected = {name: value.detach().clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_shards(tmp_path / "shards", dict(model.named_parameters()))
    for name, value in model.named_parameters():
        assert torch.equal(value, expected[name]), name
    with pytest.raises(FileExistsError):
        save_shards(tmp_path / "shards", expected)
    with pytest.raises(FileNotFoundError):
        load_shards(tmp_path / "nowhere", expected)


def test_axes_must_multiply_to_the_processes():
    assert ParallelConfig(shard=2).sizes(4) == {"pipeline": 1, "replicate": 2, "shard": 2, "tensor": 1}
    assert ParallelConfig(shard=0).sizes(4) == {"pipeline": 1, "replicate": 1, "shard": 4, "tensor": 1}
    assert ParallelConfig(shard=0).sizes(1) == {"pipeline": 1, "replicate": 1, "shard": 1, "tensor": 1}
    assert ParallelConfig(shard=0).shards and not ParallelConfig().shards
    with pytest.raises(ValueError, match="but 3 are running"):
        ParallelConfig(shard=2).sizes(3)
    with pytest.raises(ValueError, match="but 3 are running"):
        ParallelConfig(shard=0, replicate=2).sizes(3)
    for fields in ({"tensor": 0}, {"shard": -1}, {"replicate": -1}, {"recompute": "some"}, {"recompute": 0}):
        with pytest.raises(ValueError):
            ParallelConfig(**fields)


def test_unbuilt_combinations_are_refused():
    for parallel in (
        ParallelConfig(tensor=2, shard=2),
        ParallelConfig(pipeline=2, shard=2),
        ParallelConfig(tensor=4, shard=0),
        ParallelConfig(pipeline=4, shard=0),
    ):
        with pytest.raises(ValueError, match=r"replicate only"):
            parallelize(Transformer(tiny_model()), parallel, Precision(device_type="cpu"), world=World(size=4))


def test_stages_are_even():
    assert stage_sizes(8, 3) == [3, 3, 2]
    with pytest.raises(ValueError, match="between 1 and"):
        stage_sizes(3, 4)

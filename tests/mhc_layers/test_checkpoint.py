"""Checkpoints: exact round trips, atomic writes, and clear words about damage."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest
import torch

from mhc_layers import Transformer
from mhc_layers.parallel.mesh import World
from mhc_layers.training import checkpoint as checkpoint_module
from mhc_layers.training.checkpoint import (
    Checkpoint,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_parameters,
    random_state,
    restore_random_state,
    restore_shards,
    save_checkpoint,
    save_sharded_checkpoint,
    write_atomically,
)
from mhc_layers.training.errors import CheckpointError
from tests.mhc_layers.training_cases import tiny_model


def content(step=3, value=1.0):
    return Checkpoint(
        step=step,
        config={"name": "x"},
        model={"weight": torch.full((2, 3), value), "gate": torch.tensor(0.5)},
        optimizer={"exp_avg/weight": torch.randn(2, 3), "step/weight": torch.tensor(7.0)},
        progress={"seconds": 1.5},
        corpus={"sha256": "ab"},
        random=random_state(),
    )


def test_round_trip_is_exact(tmp_path):
    saved = content()
    loaded = load_checkpoint(save_checkpoint(tmp_path, saved))
    assert (loaded.step, loaded.config, loaded.progress, loaded.corpus) == (
        3,
        {"name": "x"},
        {"seconds": 1.5},
        {"sha256": "ab"},
    )
    for group in ("model", "optimizer", "random"):
        before, after = getattr(saved, group), getattr(loaded, group)
        assert before.keys() == after.keys()
        assert all(
            torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before
        )


def test_sharded_round_trip_is_exact_and_damage_is_found(tmp_path):
    first, saved = content(2), content(3)
    save_sharded_checkpoint(tmp_path, first, World())
    path = save_sharded_checkpoint(tmp_path, saved, World())
    assert sorted(item.name for item in path.iterdir()) == ["random.safetensors", "shards", "state.json"]
    loaded, lazy = load_checkpoint(path), load_checkpoint(path, read_sharded=False)
    assert lazy.step == 3 and not lazy.model and lazy.shards
    parameters = {name: torch.zeros_like(value) for name, value in saved.model.items()}
    model, optimizer = restore_shards(lazy, parameters, in_place=True)
    assert all(model[name] is parameters[name] for name in parameters)
    for before, *others in ((saved.model, loaded.model, model), (saved.optimizer, loaded.optimizer, optimizer)):
        for after in others:
            assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(CheckpointError, match="another model"):
        restore_shards(lazy, {"other": torch.zeros(2)}, in_place=True)
    shard = next((path / "shards").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"hash of shards/__0_0.distcp.*step_00000002 is intact"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="hash of shards"):
        restore_shards(lazy, parameters, in_place=True)
    shutil.rmtree(path / "shards")
    with pytest.raises(CheckpointError, match="shards cannot be read"):
        restore_shards(lazy, parameters, in_place=True)
    save_sharded_checkpoint(tmp_path, saved, World(), keep=1)  # written anew over the damaged one
    assert [item.name for item in list_checkpoints(tmp_path)] == ["step_00000003"]
    assert torch.equal(load_checkpoint(tmp_path).model["weight"], saved.model["weight"])


def test_random_generators_continue_where_they_were(tmp_path):
    random.seed(1)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(3)
    random.gauss(0, 1), np.random.randn(), torch.randn(3)  # noqa: NPY002
    path = save_checkpoint(tmp_path, content())

    def draw():
        return random.gauss(0, 1), random.random(), np.random.randn(2).tolist(), torch.randn(2).tolist()  # noqa: NPY002

    expected = draw()
    restore_random_state(load_checkpoint(path).random)
    assert draw() == expected


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 5, 20, 100):
        save_checkpoint(tmp_path, content(step), keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000020", "step_00000100"]
    assert load_checkpoint(tmp_path).step == 100


def test_interrupted_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, content(1))

    def broken(*arguments, **keywords):
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint_module, "save_file", broken)
    with pytest.raises(CheckpointError, match=r"step_00000002 can't be written \(no space left\).*are as they were"):
        save_checkpoint(tmp_path, content(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert load_checkpoint(tmp_path).step == 1


def test_interrupted_write_of_shards_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save_sharded_checkpoint(tmp_path, content(1), World())

    def broken(*arguments, **keywords):
        raise OSError("no space left")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_files_from_queue", broken)
    with pytest.raises(CheckpointError, match=r"step_00000002 can't be written \(process 0 .*: no space left\)"):
        save_sharded_checkpoint(tmp_path, content(2), World())
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert load_checkpoint(tmp_path).step == 1


def test_what_a_killed_process_left_goes_with_the_next_checkpoint(tmp_path):
    for name in (".step_00000001.77.part", ".step_00000002.part", ".step_00000001.77.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_checkpoint(tmp_path)
    save_checkpoint(tmp_path, content(3))
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def test_the_same_step_can_be_written_again(tmp_path):
    save_checkpoint(tmp_path, content(4, value=1.0))
    path = save_checkpoint(tmp_path, content(4, value=2.0))
    assert float(load_checkpoint(path).model["weight"][0, 0]) == 2.0
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_damage_is_found_and_the_intact_one_named(tmp_path, name):
    save_checkpoint(tmp_path, content(1))
    path = save_checkpoint(tmp_path, content(2))
    damaged = bytearray((path / name).read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    (path / name).write_bytes(bytes(damaged) if name != "state.json" else bytes(damaged[: len(damaged) // 2]))
    with pytest.raises(CheckpointError, match=r"damaged.*step_00000001 is intact"):
        load_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path / "step_00000001").step == 1


def test_missing_file_and_no_other_checkpoint(tmp_path):
    path = save_checkpoint(tmp_path, content(2))
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read.*no intact checkpoint"):
        load_checkpoint(path)


def test_another_format_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, content())
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(CheckpointError, match=r"format 99; this version reads format 1"):
        load_checkpoint(path)


@pytest.mark.parametrize("make", [lambda p: p / "nothing", lambda p: p, lambda p: p / "step_00000009"])
def test_missing_checkpoints_are_named(tmp_path, make):
    with pytest.raises(CheckpointError):
        find_checkpoint(make(tmp_path))


def test_parameters_of_another_model_are_refused():
    model = Transformer(tiny_model())
    tensors = {name: value.detach().clone() for name, value in model.named_parameters()}
    load_parameters(model, tensors)
    name = next(iter(tensors))
    with pytest.raises(CheckpointError, match="1 parameters are missing"):
        load_parameters(model, {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(CheckpointError, match="1 are unknown"):
        load_parameters(model, {**tensors, "extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="has shape"):
        load_parameters(model, {**tensors, name: torch.zeros(1)})


def test_text_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "report.json"
    write_atomically(path, "old")
    write_atomically(path, "new")
    assert path.read_text() == "new" and len(list(tmp_path.iterdir())) == 1

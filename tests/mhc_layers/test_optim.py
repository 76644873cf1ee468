"""Optimizers: who owns which parameter, what a step does, what a saved state restores."""

from __future__ import annotations

import pytest
import torch

from mhc_layers import Transformer
from mhc_layers.training.optim import (
    OptimConfig,
    build_optimizers,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
)
from tests.mhc_layers.training_cases import tiny_model


def make(kind="adamw", **fields):
    torch.manual_seed(0)
    model = Transformer(tiny_model())
    return model, build_optimizers(model, OptimConfig(kind=kind, **fields))


def step(model, optimizers, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(256, (2, 9), generator=generator)
    model.loss(tokens[:, :-1], tokens[:, 1:])[0].backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_has_one_owner(kind):
    model, optimizers = make(kind)
    owned = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())


def test_biases_gates_norms_and_embedding_are_not_decayed():
    model, optimizers = make(weight_decay=0.3)
    decay = {id(p): g["weight_decay"] for o in optimizers for g in o.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        decayed = name.endswith("phi") or (parameter.ndim == 2 and not name.startswith(("embedding", "head")))
        assert decay[id(parameter)] == (0.3 if decayed else 0.0), name


def test_muon_takes_body_matrices_and_phi_only():
    model, (muon, adamw) = make("muon")
    names = {id(p): n for n, p in model.named_parameters()}
    taken = {names[id(p)] for g in muon.param_groups for p in g["params"]}
    assert any(name.endswith("phi") for name in taken) and any("qkv" in name for name in taken)
    rest = {names[id(p)] for g in adamw.param_groups for p in g["params"]}
    assert "embedding.weight" in rest and any(name.endswith("bias") for name in rest)


def test_learning_rate_is_base_times_factor():
    _, optimizers = make("muon", learning_rate=2e-3, muon_learning_rate=1e-2)
    set_learning_rate(optimizers, 0.5)
    set_learning_rate(optimizers, 0.25)
    assert [o.param_groups[0]["lr"] for o in optimizers] == pytest.approx([2.5e-3, 5e-4])


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_restored_state_continues_with_the_same_bits(kind):
    model, optimizers = make(kind)
    step(model, optimizers, 1)
    saved = {name: value.clone() for name, value in optimizer_state(model, optimizers).items()}
    parameters = {name: value.detach().clone() for name, value in model.named_parameters()}
    step(model, optimizers, 2)
    expected = [p.detach().clone() for p in model.parameters()]

    other, others = make(kind)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(parameters[name])
    load_optimizer_state(other, others, saved)
    step(other, others, 2)
    assert all(torch.equal(a, b) for a, b in zip(expected, other.parameters(), strict=True))


def test_state_of_another_model_is_refused():
    model, optimizers = make()
    with pytest.raises(KeyError, match="does not have"):
        load_optimizer_state(model, optimizers, {"exp_avg/nobody": torch.zeros(2)})


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "sgd"},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"eps": -1.0},
        {"weight_decay": -0.1},
        {"clip_norm": -1.0},
        {"betas": (0.9, 1.0)},
    ],
)
def test_wrong_fields_are_refused(fields):
    with pytest.raises(ValueError):
        OptimConfig(**fields)

"""Recipes: full configurations that are valid, unique and survive JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest

from mhc_layers.parallel.mesh import ParallelConfig
from mhc_layers.recipes import RECIPES, get_recipe
from mhc_layers.training.config import TrainConfig, decode, encode
from mhc_layers.training.optim import OptimConfig


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipe_is_complete(name):
    config = get_recipe(name)
    assert config.name == name
    assert decode(TrainConfig, json.loads(json.dumps(encode(config)))) == config
    assert config == get_recipe(name)
    assert RECIPES[name].__doc__


def test_unknown_recipe_lists_the_known_ones():
    with pytest.raises(ValueError, match="tiny_cpu"):
        get_recipe("tiny")


@pytest.mark.parametrize("axis", ["shard", "tensor"])
def test_muon_is_refused_where_matrices_are_split(axis):
    config = dataclasses.replace(get_recipe("tiny_cpu"), parallel=ParallelConfig(**{axis: 2}))
    with pytest.raises(ValueError, match=r"Muon orthogonalises whole matrices.*'adamw'"):
        dataclasses.replace(config, optim=OptimConfig(kind="muon"))


@pytest.mark.parametrize("axis", ["replicate", "pipeline"])
def test_muon_is_accepted_where_matrices_are_whole(axis):
    config = dataclasses.replace(get_recipe("tiny_cpu"), parallel=ParallelConfig(**{axis: 2}))
    assert dataclasses.replace(config, optim=OptimConfig(kind="muon")).optim.kind == "muon"

"""Recipes: full configurations that are valid, unique and survive JSON."""

from __future__ import annotations

import json

import pytest

from mhc_layers.recipes import RECIPES, get_recipe
from mhc_layers.training.config import TrainConfig, decode, encode


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

"""TransformerConfig: defaults, round trip, and messages that carry the fix."""

import dataclasses
import json

import pytest

from mhc_layers import DEEPSEEK_V4, PAPER, TransformerConfig

SMALL = {"vocab_size": 64, "dim": 32, "num_layers": 2, "num_heads": 4}


def test_defaults():
    config = TransformerConfig(**SMALL)
    assert (config.num_kv_heads, config.head_dim, config.hidden_dim) == (4, 8, 96)
    assert (config.connection, config.num_streams, config.convention) == ("mhc", 4, PAPER)


@pytest.mark.parametrize("convention", ["paper", DEEPSEEK_V4, DEEPSEEK_V4.replace(num_iters=7)])
def test_round_trip_through_json(convention):
    config = TransformerConfig(**SMALL, convention=convention, res_map="Permutations")
    assert TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_residual_has_one_stream():
    config = TransformerConfig(**SMALL, connection="residual", convention="deepseek_v4", num_streams=4)
    assert (config.num_streams, config.convention) == (1, PAPER)


def test_replace_and_frozen():
    config = TransformerConfig(**SMALL)
    assert config.replace(num_streams=2).num_streams == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dim = 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "dim must be an integer >= 1, got 0"),
        ({"num_layers": 2.0}, "num_layers must be an integer >= 1, got 2.0"),
        ({"vocab_size": "64"}, "vocab_size must be an integer >= 1, got '64'"),
        ({"num_heads": 5}, "even head size"),
        ({"dim": 36, "num_heads": 4}, "even head size"),
        ({"num_kv_heads": 3}, "must divide"),
        ({"hidden_dim": 0}, "hidden_dim must be an integer >= 1"),
        ({"connection": "mHC"}, "accepted: mhc"),
        ({"init": "zeros"}, "presets: prenorm"),
        ({"res_map": "Birkhoff"}, "Permutations"),
        ({"res_map": "Permutations", "connection": "hc"}, "got connection='hc'"),
        ({"num_experts": 2, "experts_per_token": 3}, "between 1 and"),
        ({"recompute_layers": -1}, "recompute_layers must be an integer >= 0"),
        ({"norm_eps": -1e-6}, "norm_eps is -1e-06; it must not be negative"),
        ({"init_std": -0.1}, "init_std"),
        ({"rope_theta": 0.0}, "must be positive"),
        ({"convention": "v4"}, "presets: paper"),
    ],
)
def test_wrong_values(changes, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**{**SMALL, **changes})


def test_unknown_field():
    with pytest.raises(ValueError, match="n_layer"):
        TransformerConfig.from_dict({**SMALL, "n_layer": 2})

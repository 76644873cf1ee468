"""Conventions: the presets are the step tables, and a contradictory value fails when it is made."""

import dataclasses
import json

import pytest

from mhc_layers import CONVENTIONS, DEEPSEEK_V4, DEEPSEEK_V41, PAPER, Convention, get_convention


def test_paper_preset():
    assert (PAPER.first, PAPER.last, PAPER.start, PAPER.num_iters) == ("columns", "rows", "exp", 20)
    assert (PAPER.eps_pre, PAPER.eps_start, PAPER.eps_den) == (0.0, 0.0, 0.0)
    assert not PAPER.transposed and PAPER.stored_first == "columns"
    assert (PAPER.post_multiplier, PAPER.readout, PAPER.read_delay) == (2.0, "mean", 0)


def test_deepseek_presets():
    assert DEEPSEEK_V4.transposed and DEEPSEEK_V4.start == "softmax"
    assert (DEEPSEEK_V4.first, DEEPSEEK_V4.stored_first) == ("columns", "rows")
    assert {DEEPSEEK_V4.eps_pre, DEEPSEEK_V4.eps_start, DEEPSEEK_V4.eps_den, DEEPSEEK_V4.norm_eps} == {1e-6}
    assert (DEEPSEEK_V4.readout, DEEPSEEK_V4.read_delay) == ("hc_head", 0)
    changed = DEEPSEEK_V4.replace(name="deepseek_v41", readout="last_pre", read_delay=1)
    assert changed == DEEPSEEK_V41


@pytest.mark.parametrize("convention", CONVENTIONS.values(), ids=CONVENTIONS)
def test_round_trip_through_json(convention):
    assert Convention.from_dict(json.loads(json.dumps(convention.to_dict()))) == convention
    assert get_convention(convention.name) is convention
    assert get_convention(convention) is convention


def test_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PAPER.num_iters = 3
    assert len({PAPER, DEEPSEEK_V4, DEEPSEEK_V41, PAPER.replace(name="paper")}) == 3


def test_replace_renames():
    assert PAPER.replace(num_iters=5).name == "custom"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"first": "row"}, "'columns', 'rows'"),
        ({"readout": "max"}, "hc_head"),
        ({"read_delay": 2}, "0, 1"),
        ({"num_iters": 0}, "num_iters must be an integer >= 1"),
        ({"num_iters": 20.0}, "num_iters must be an integer >= 1, got 20.0"),
        ({"eps_pre": -1e-6}, "0 <= eps"),
        ({"eps_den": 1e-6}, "start='softmax'"),
        ({"start": "softmax"}, "transposed=True"),
        ({"readout": "last_pre"}, "read_delay=1"),
    ],
)
def test_contradictions_fail_with_advice(fields, message):
    with pytest.raises(ValueError, match=message):
        Convention(**fields)


def test_unknown_names():
    with pytest.raises(ValueError, match="presets: paper"):
        get_convention("mhc")
    with pytest.raises(ValueError, match="num_iterations"):
        Convention.from_dict({"num_iterations": 20})

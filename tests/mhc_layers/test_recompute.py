"""Recompute blocks: the integer argmin, borders, equal gradients, less memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mhc_layers import Transformer
from mhc_layers.parallel.recompute import (
    RecomputedWalk,
    apply_recompute,
    block_boundaries,
    block_size,
    recompute_elements,
)
from tests.mhc_layers.training_cases import tiny_model


@pytest.mark.parametrize("num_streams", [1, 2, 4, 8])
def test_block_size_is_the_integer_argmin(num_streams):
    for layers in range(1, 80):
        block = block_size(layers, num_streams=num_streams)
        costs = [recompute_elements(layers, size, num_streams=num_streams) for size in range(1, layers + 1)]
        assert costs[block - 1] == min(costs)


def test_rounding_the_square_root_is_not_enough():
    layers, n = 36, 4
    rounded = round((n * layers / (n + 2)) ** 0.5)
    best = block_size(layers, num_streams=n)
    assert recompute_elements(layers, best, num_streams=n) < recompute_elements(layers, rounded, num_streams=n)


def test_blocks_cover_every_site_and_straddle_no_stage():
    stages = [7, 5, 1, 12]
    boundaries = block_boundaries(stages, num_streams=4)
    assert [site for first, last in boundaries for site in range(first, last)] == list(range(sum(stages)))
    borders = {7, 12, 13}
    for first, last in boundaries:
        assert not any(first < border < last for border in borders)


@pytest.mark.parametrize("arguments", [{"num_layers": 0, "num_streams": 4}, {"num_layers": 3, "num_streams": 0}])
def test_sizes_below_one_are_refused(arguments):
    with pytest.raises(ValueError, match="1 or more"):
        block_size(**arguments)


def gradients(model, autocast=False, backward_twice=False):
    tokens = torch.randint(256, (2, 13), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
    if backward_twice:
        loss.backward(retain_graph=True)
        model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


CASES = {
    "mhc": {},
    "hc": {"connection": "hc"},
    "identity": {"connection": "identity"},
    "residual": {"connection": "residual"},
    "delayed": {"convention": "deepseek_v41"},
    "v4": {"convention": "deepseek_v4"},
    "experts": {"num_experts": 3},
    "two-streams": {"num_streams": 2},
}


@pytest.mark.parametrize("block", [1, 2, 3, 6])
@pytest.mark.parametrize("case", CASES)
def test_gradients_have_the_same_bits(case, block):
    torch.manual_seed(0)
    model = Transformer(tiny_model(num_layers=3, **CASES[case]))
    loss, expected = gradients(model)
    apply_recompute(model, block=block)
    again, actual = gradients(model)
    assert isinstance(model.walk, RecomputedWalk) and torch.equal(loss, again)
    assert expected.keys() == actual.keys()
    for name in expected:
        assert torch.equal(expected[name], actual[name]), name


def test_bfloat16_streams_and_a_second_backward_pass():
    torch.manual_seed(0)
    model = Transformer(tiny_model(num_layers=3))
    _, expected = gradients(model, autocast=True)
    apply_recompute(model, block=3)
    _, actual = gradients(model, autocast=True, backward_twice=True)
    for name in expected:
        assert torch.equal(expected[name], actual[name]), name


def test_evaluation_is_unchanged():
    model = Transformer(tiny_model())
    tokens = torch.randint(256, (1, 9))
    with torch.no_grad():
        expected = model(tokens)
        apply_recompute(model)
        assert torch.equal(model(tokens), expected)


def test_both_kinds_of_recomputation_are_refused():
    with pytest.raises(ValueError, match="recompute_layers"):
        apply_recompute(Transformer(tiny_model(recompute_layers=1)))


def kept_bytes(model, tokens):
    """Bytes that a forward pass leaves allocated for the backward pass."""
    model.loss(tokens[:, :-1], tokens[:, 1:])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        loss, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
    kept = sum(event.self_cpu_memory_usage for event in record.key_averages())
    loss.backward()
    return kept


def test_the_streams_are_kept_once_a_block():
    config = dataclasses.replace(tiny_model(num_layers=6, dim=32, hidden_dim=32))
    model = Transformer(config)
    tokens = torch.randint(256, (8, 33))
    everything = kept_bytes(model, tokens)
    apply_recompute(model)
    recomputed = kept_bytes(model, tokens)
    streams = 8 * 32 * 4 * 32 * 4  # one set of streams: tokens, n, C, bytes
    blocks = len(block_boundaries([12], num_streams=4))
    assert recomputed < everything - (12 - blocks) * streams

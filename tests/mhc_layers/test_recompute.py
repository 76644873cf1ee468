"""Recompute blocks: the integer argmin, borders, equal gradients, less memory."""

from __future__ import annotations

import dataclasses
import gc
from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from mhc_layers import PAPER, Transformer
from mhc_layers._torch_ops import fused_site
from mhc_layers.parallel.recompute import (
    RecomputedWalk,
    SelectiveWalk,
    _Block,
    apply_recompute,
    block_boundaries,
    block_size,
    connection_policy,
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


def use_fused(model):
    for site in model.sites:
        site.requested_implementation = site._implementation = fused_site(PAPER)


@pytest.mark.parametrize("fused", [False, True])
def test_selective_blocks_give_the_same_bits_and_keep_less(fused):
    torch.manual_seed(0)
    model = Transformer(tiny_model(num_layers=3, dim=32, hidden_dim=32))
    if fused:
        use_fused(model)
    loss, expected = gradients(model)
    tokens = torch.randint(256, (8, 33))
    everything = kept_bytes(model, tokens)
    apply_recompute(model, block=2, compiled=True)
    assert isinstance(model.walk, SelectiveWalk)
    again, actual = gradients(model)
    assert torch.equal(loss, again)
    for name in expected:
        assert torch.equal(expected[name], actual[name]), name
    assert kept_bytes(model, tokens) < 0.6 * everything


def test_sizes_that_leave_out_sites_are_refused():
    model = Transformer(tiny_model(num_layers=2))
    for compiled in (False, True):
        with pytest.raises(ValueError, match=r"stages are \[2, 1\], 3 sites; the model has 4"):
            apply_recompute(model, stages=[2, 1], compiled=compiled)
        with pytest.raises(ValueError, match="block is -1"):
            apply_recompute(model, block=-1, compiled=compiled)
    with pytest.raises(ValueError, match="block is 0"):
        recompute_elements(4, 0, num_streams=4)
    with pytest.raises(ValueError, match="block is 0"):
        block_boundaries([4], num_streams=4, block=0)


class CountRuns(TorchDispatchMode):
    """Counts the operators that really run."""

    def __init__(self):
        super().__init__()
        self.runs = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.runs[str(function)] += 1
        return function(*args, **(kwargs or {}))


def test_policies_see_the_operators_of_fused_sites():
    seen = set()

    def policy(context, operator, *args, **kwargs):
        seen.add(str(operator))
        return connection_policy(context, operator)

    model = Transformer(tiny_model(num_layers=2))
    use_fused(model)
    with CountRuns() as once:
        gradients(model)
    model.walk = SelectiveWalk(model.walk, [(0, 4)], policy)
    with CountRuns() as blocks:
        gradients(model)
    names = ("broadcast_pre_forward", "broadcast_post_forward", "pre_forward", "boundary_forward", "post_forward")
    operators = [f"mhc_layers.{name}.default" for name in names]
    assert set(operators) <= seen
    assert [once.runs[name] for name in operators] == [1, 1, 1, 2, 1]
    assert [blocks.runs[name] for name in operators[:-1]] == [2, 2, 2, 4]  # the last write is not needed again
    for name in ("aten.mm.default", "aten._scaled_dot_product_flash_attention_for_cpu.default"):
        assert blocks.runs[name] == once.runs[name] > 0, name


def test_the_policy_keeps_products_with_weights():
    kept = {op for op in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.silu.default)
            if connection_policy(None, op) == CheckpointPolicy.MUST_SAVE}  # fmt: skip
    assert kept == {torch.ops.aten.mm.default}


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_a_compiled_model_recomputes_in_one_graph(fused):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Transformer(tiny_model(num_layers=2))
    if fused:
        use_fused(model)
    _, expected = gradients(model)
    apply_recompute(model, compiled=True)
    model.loss = torch.compile(model.loss, fullgraph=True)
    _, actual = gradients(model)
    for name in expected:
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-5 * scale + 1e-8, msg=name)


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


def expected_saving(model, tokens, block):
    """Bytes that blocks of fused sites save: all streams but the entering ones, all inputs, less the coefficients."""
    sites, n, c = len(model.sites), model.config.num_streams, model.config.dim
    blocks = len(block_boundaries([sites], num_streams=n, block=block))
    # the first site of a model reads the embedding, so its streams are not kept in either case
    return 4 * tokens * ((sites - blocks) * n * c + sites * c - sites * n * (n + 2))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("block", [2, 3])
def test_fused_blocks_save_what_the_formula_says(block, compiled):
    torch._dynamo.reset()
    model = Transformer(tiny_model(num_layers=3, dim=32, hidden_dim=32))
    use_fused(model)
    if compiled:
        for site in model.sites:
            site.sublayer = torch.compile(site.sublayer, backend="aot_eager")
    tokens = torch.randint(256, (8, 33))
    everything = kept_bytes(model, tokens)
    apply_recompute(model, block=block)
    assert everything - kept_bytes(model, tokens) == expected_saving(model, 8 * 32, block)


def test_a_block_goes_with_its_graph():
    """Without a garbage collection: a cycle would keep the outputs of every sublayer for a while."""
    model = Transformer(tiny_model())
    apply_recompute(model)
    tokens = torch.randint(256, (2, 13))
    gc.collect()
    gc.disable()
    try:
        before = sum(type(item) is _Block for item in gc.get_objects())
        losses = model.loss(tokens[:, :-1], tokens[:, 1:])
        assert sum(type(item) is _Block for item in gc.get_objects()) > before
        del losses
        assert sum(type(item) is _Block for item in gc.get_objects()) == before
        gradients(model)
        assert sum(type(item) is _Block for item in gc.get_objects()) == before
    finally:
        gc.enable()

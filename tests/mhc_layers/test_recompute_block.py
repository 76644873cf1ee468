"""Recompute blocks of fused sites: streams are rebuilt by one operator, gradients and memory are as promised."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from mhc_layers import DEEPSEEK_V4, DEEPSEEK_V41, PAPER, Transformer, TransformerConfig
from mhc_layers._recompute import kept_bytes
from mhc_layers._torch_ops import fused_site
from mhc_layers.kernels import plain
from mhc_layers.models.transformer import WalkState
from mhc_layers.parallel.recompute import _Block, apply_recompute

OPS = torch.ops.mhc_layers


def model(convention: Any, num_layers: int = 3) -> Transformer:
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=32, dim=16, num_layers=num_layers, num_heads=2, max_seq_len=16, convention=convention
    )
    built = Transformer(config)
    for site in built.sites:
        with torch.no_grad():
            site.phi.normal_(std=0.3)
            site.alpha_res.fill_(1.0)
        site.requested_implementation = site._implementation = fused_site(convention)
    return built


@pytest.mark.parametrize("convention", [PAPER, DEEPSEEK_V4, DEEPSEEK_V41], ids=["paper", "v4", "v41"])
@pytest.mark.parametrize("block", [1, 2, 4])
def test_gradients_are_those_of_the_whole_model(convention: Any, block: int) -> None:
    tokens = torch.randint(32, (2, 9))
    built = model(convention)
    grads = []
    for recompute in (False, True):
        if recompute:
            apply_recompute(built, block=block)
        built.zero_grad()
        loss, _ = built.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        grads.append([loss.detach(), *(parameter.grad.clone() for parameter in built.parameters())])
    for kept, rebuilt in zip(*grads, strict=True):
        torch.testing.assert_close(rebuilt, kept, rtol=1e-5, atol=1e-7)


def test_a_rebuild_is_one_operator() -> None:
    tokens = torch.randint(32, (2, 9))
    built = model(PAPER)
    apply_recompute(built, block=3)
    with torch.profiler.profile() as profile:
        built.loss(tokens[:, :-1], tokens[:, 1:])[0].backward()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["mhc_layers::recompute_block"] == 2  # six sites in blocks of three
    assert counts["mhc_layers::pre_forward"] == 2  # the first site of each block: nothing runs twice


def test_operator_equals_running_the_sites() -> None:
    torch.manual_seed(1)
    x = torch.randn(5, 4, 6)
    fs = [torch.randn(5, 6) for _ in range(2)]
    coefs = [torch.randn(5, 24) for _ in range(3)]
    xs, us = OPS.recompute_block(x, fs, coefs[:-1], coefs)
    expected = x
    for index in range(3):
        assert torch.equal(us[index], plain.read_forward(expected, coefs[index]))
        if index < 2:
            expected = plain.write_forward(expected, fs[index], coefs[index])
            assert torch.equal(xs[index], expected)


def test_operator_passes_opcheck() -> None:
    x, f, coef = torch.randn(5, 4, 6), torch.randn(5, 6), torch.randn(5, 24)
    torch.library.opcheck(
        OPS.recompute_block.default, (x, [f], [coef], [coef, coef]), test_utils=("test_schema", "test_faketensor")
    )


class Shift(torch.nn.Module):
    """A sublayer that keeps nothing for its backward."""

    def forward(self, u: Tensor, context: Any) -> Tensor:
        return u + 1.0


@pytest.mark.parametrize("block", [1, 2, 3])
def test_kept_bytes_equal_the_formula(block: int) -> None:
    n, c, tokens, sites = 4, 32, 10, 6
    built = Transformer(TransformerConfig(vocab_size=8, dim=c, num_layers=sites // 2, num_heads=2, max_seq_len=16))
    for site in built.sites:
        site.sublayer = Shift()
        site.requested_implementation = site._implementation = fused_site(PAPER)
    apply_recompute(built, block=block)
    before = {id(item) for item in gc.get_objects() if type(item) is _Block}
    state = built.walk(WalkState(torch.randn(1, tokens, n, c, requires_grad=True)), built.context(tokens))
    blocks = [item for item in gc.get_objects() if type(item) is _Block and id(item) not in before]
    assert len(blocks) == -(-sites // block)
    storages = {}
    for item in blocks:
        for tensor in (item.x, *item.outputs, *item.rebuilder._coefs):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    projections = sites * tokens * 4 * (n * (n + 2) + 1)  # proj and rstd, held by the graph of state.x
    formula = sum(kept_bytes(tokens, min(block, sites - first), n, c, 4) for first in range(0, sites, block))
    assert sum(storages.values()) + projections == formula
    assert state.x.grad_fn is not None

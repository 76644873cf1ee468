"""The parts of the Transformer, each against its formula."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mhc_layers import HyperConnection, param_groups
from mhc_layers.conventions import DEEPSEEK_V4, PAPER
from mhc_layers.models.attention import Attention, LayerCache, causal_mask
from mhc_layers.models.mlp import SwiGLU
from mhc_layers.models.moe import MixtureOfExperts
from mhc_layers.models.norm import RMSNorm
from mhc_layers.models.readout import HyperHead, LastPreReadout, make_readout
from mhc_layers.models.rotary import RotaryEmbedding, rotate


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_rms_norm():
    norm = RMSNorm(6, eps=0.1).double()
    with torch.no_grad():
        norm.weight.copy_(normal(6, seed=1))
    x = normal(3, 6)
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * norm.weight)
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_swiglu():
    layer = SwiGLU(4, 6).double()
    u = normal(3, 4)
    gate, up = layer.gate_up.weight.split(6)
    torch.testing.assert_close(layer(u), (F.silu(u @ gate.t()) * (u @ up.t())) @ layer.output.weight.t())


def test_rotations_keep_lengths_and_see_only_distances():
    tables = RotaryEmbedding(8, 32, theta=100.0).double()
    q, k = normal(1, 1, 1, 8), normal(1, 1, 1, 8, seed=1)

    def score(i, j):
        return float((rotate(q, *tables(i, 1)) * rotate(k, *tables(j, 1))).sum())

    assert score(3, 1) == pytest.approx(score(12, 10))
    assert score(3, 1) != pytest.approx(score(3, 2))
    torch.testing.assert_close(rotate(q, *tables(7, 1)).norm(), q.norm())
    torch.testing.assert_close(rotate(q, *tables(0, 1)), q)


def test_rotation_is_a_complex_product():
    tables = RotaryEmbedding(6, 8, theta=50.0).double()
    q = normal(2, 3, 8, 6)
    angles = torch.outer(torch.arange(8.0, dtype=torch.float64), 50.0 ** (-torch.arange(0, 6, 2).double() / 6))
    turned = torch.complex(q[..., :3], q[..., 3:]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(
        rotate(q, *tables(0, 8)), torch.cat([turned.real, turned.imag], -1), rtol=1e-6, atol=1e-6
    )


def test_attention_by_hand():
    layer = Attention(8, num_heads=4, num_kv_heads=2).double()
    tables = RotaryEmbedding(2, 8).double()
    u = normal(1, 5, 8)
    q, k, v = (t.transpose(1, 2) for t in layer.qkv(u).view(1, 5, 8, 2).split([4, 2, 2], dim=2))
    q, k = rotate(q, *tables(0, 5)), rotate(k, *tables(0, 5))
    heads = []
    for head in range(4):
        scores = q[0, head] @ k[0, head // 2].t() / 2**0.5
        scores = scores.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), float("-inf"))
        heads.append(torch.softmax(scores, -1) @ v[0, head // 2])
    torch.testing.assert_close(layer(u, tables(0, 5))[0], layer.output(torch.cat(heads, -1)))


def test_causal_mask():
    assert causal_mask(2, 4, torch.device("cpu")).tolist() == [[True, True, True, False], [True] * 4]


def test_cache_is_filled_in_place():
    cache = LayerCache(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2))
    keys, _ = cache.extend(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
    assert (cache.length, keys.shape) == (2, (1, 1, 2, 2))
    with pytest.raises(ValueError, match="4 are needed"):
        cache.extend(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))


# -- mixture of experts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [1, 2, 4])
def test_mixture_is_the_weighted_sum_of_the_best_experts(chosen):
    layer = MixtureOfExperts(6, 8, num_experts=4, experts_per_token=chosen).double()
    u = normal(2, 5, 6)
    out, balance = layer(u)
    for token, expected in zip(u.flatten(0, 1), out.flatten(0, 1), strict=True):
        probabilities = torch.softmax(layer.router(token), -1)
        best = probabilities.argsort(descending=True)[:chosen]
        weights = probabilities[best] / probabilities[best].sum()
        by_hand = sum(weight * layer.experts[int(index)](token) for weight, index in zip(weights, best, strict=True))
        torch.testing.assert_close(expected, by_hand, rtol=1e-6, atol=1e-7)
    assert balance.dim() == 0


def test_balance_loss_is_one_when_even_and_larger_when_not():
    layer = MixtureOfExperts(4, 4, num_experts=4, experts_per_token=1)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(4))
    even, skewed = 0.1 * torch.eye(4), 5.0 * torch.eye(4)[:1].expand(4, 4)
    assert float(layer(even)[1].detach()) == pytest.approx(1.0)
    assert float(layer(skewed)[1].detach()) > 3.0


def test_balance_loss_trains_the_router():
    layer = MixtureOfExperts(4, 4, num_experts=4, experts_per_token=2)
    layer(normal(8, 4).float())[1].backward()
    assert float(layer.router.weight.grad.abs().sum()) > 0.0


def test_unused_experts_and_empty_batches():
    layer = MixtureOfExperts(4, 4, num_experts=8, experts_per_token=1)
    out, balance = layer(torch.zeros(0, 4))
    assert out.shape == (0, 4) and float(balance.detach()) == 0.0
    layer(torch.ones(1, 4))[0].sum().backward()  # seven experts see no token


# -- readouts and groups ----------------------------------------------------------------------------------------------


def test_readouts_start_as_the_mean():
    x = normal(3, 4, 6)
    for readout in ("mean", "learned", "hc_head"):
        head = make_readout(DEEPSEEK_V4.replace(readout=readout), 6, 4).double()
        torch.testing.assert_close(head(x), x.mean(-2), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(make_readout(PAPER.replace(readout="sum"), 6, 4)(x), x.sum(-2))
    with pytest.raises(ValueError, match="last_pre"):
        LastPreReadout()(x)


def test_head_stays_float32():
    head = HyperHead(6, 4, DEEPSEEK_V4).bfloat16()
    assert {p.dtype for p in head.parameters()} == {torch.float32}
    assert head(normal(3, 4, 6).bfloat16()).dtype == torch.bfloat16


def test_groups_of_any_model():
    model = nn.ModuleDict({"embedding": nn.Embedding(3, 8), "site": HyperConnection(8, 4, nn.Linear(8, 8))})
    groups = {group["name"]: group for group in param_groups(model, 0.3)}
    assert {name: len(group["params"]) for name, group in groups.items()} == {
        "matrices": 1,
        "phi": 1,
        "embedding": 1,
        "vectors": 1,
        "connections": 4,
    }
    assert {name for name, group in groups.items() if group["weight_decay"] == 0.3} == {"matrices", "phi"}

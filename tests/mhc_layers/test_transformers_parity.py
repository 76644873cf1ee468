"""Parity with transformers' DeepSeek-V4 classes; slow, and skipped where transformers is not installed."""

import pytest
import torch

from mhc_layers import DEEPSEEK_V4, HyperConnection, Transformer, TransformerConfig
from mhc_layers.hub import SiteTensors, connection_tensors, load_connections, load_head, load_site
from mhc_layers.models.readout import HyperHead

pytestmark = pytest.mark.slow
modeling = pytest.importorskip(
    "transformers.models.deepseek_v4.modeling_deepseek_v4",
    reason="parity needs transformers >= 5.17; it is not among the test requirements",
)
configuration = pytest.importorskip("transformers.models.deepseek_v4.configuration_deepseek_v4")

DIM = 64


def config():
    return configuration.DeepseekV4Config(hidden_size=DIM, hc_mult=4)


def theirs(std):
    """Their module with random parameters whose residual logits have about this standard deviation."""
    generator = torch.Generator().manual_seed(0)
    module = modeling.DeepseekV4HyperConnection(config())
    with torch.no_grad():
        module.fn.copy_(torch.randn(module.fn.shape, generator=generator) / (4 * DIM) ** 0.5)
        module.base.copy_(0.3 * torch.randn(module.base.shape, generator=generator))
        module.scale.copy_(torch.tensor([0.8, 1.2, std]))
    return module


def ours(module, convention=DEEPSEEK_V4):
    site = HyperConnection(DIM, 4, convention=convention)
    load_site(site, SiteTensors(module.fn.detach(), module.base.detach(), module.scale.detach()))
    return site


def streams(dtype=torch.float32):
    return torch.randn(2, 50, 4, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("std", [0.01, 1.0, 5.0])
def test_maps_and_collapse(std):
    module = theirs(std)
    site = ours(module)
    x = streams()
    post, comb, collapsed = module(x)
    _, h_post, h_res = site.coefficients(x)
    torch.testing.assert_close(h_post, post, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(h_res, comb.mT, rtol=0, atol=5e-6 * max(1.0, std))
    torch.testing.assert_close(site.pre(x)[0], collapsed, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("std", [1.0, 5.0])
def test_gradients(std):
    module = theirs(std)
    site = ours(module)
    x, x_theirs = streams().requires_grad_(), streams().requires_grad_()
    post, comb, collapsed = module(x_theirs)
    loss = collapsed.square().sum() + post.sum() + (comb @ comb.mT).sum()
    loss.backward()
    u, state = site.pre(x)
    (u.square().sum() + state.h_post.sum() + (state.h_res.mT @ state.h_res).sum()).backward()
    torch.testing.assert_close(x.grad, x_theirs.grad, rtol=1e-4, atol=1e-5)
    scale = float(module.fn.grad.abs().max())
    torch.testing.assert_close(site.phi.grad, module.fn.grad, rtol=1e-4, atol=1e-5 * scale)


def test_bfloat16_write_as_they_do():
    """Their decoder layer casts post and comb to the dtype of the streams first: ``apply_dtype="activation"``."""
    module = theirs(1.0)
    site = ours(module, DEEPSEEK_V4.replace(apply_dtype="activation"))
    x = streams(torch.bfloat16)
    y = torch.randn(2, 50, DIM, generator=torch.Generator().manual_seed(2)).bfloat16()
    post, comb, _ = module(x)
    dtype = x.dtype
    expected = post.to(dtype).unsqueeze(-1) * y.unsqueeze(-2) + torch.matmul(comb.to(dtype).transpose(-1, -2), x)
    out = site.post(x, y, site.pre(x)[1])
    assert float((out != expected).float().mean()) < 0.02  # coefficients on a rounding boundary
    torch.testing.assert_close(out, expected, rtol=2**-6, atol=2**-6)


def test_head():
    module = modeling.DeepseekV4HyperHead(config())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        module.hc_fn.copy_(torch.randn(module.hc_fn.shape, generator=generator) / (4 * DIM) ** 0.5)
        module.hc_base.copy_(torch.randn(module.hc_base.shape, generator=generator))
        module.hc_scale.fill_(1.1)
    head = HyperHead(DIM, 4, DEEPSEEK_V4)
    load_head(head, SiteTensors(module.hc_fn.detach(), module.hc_base.detach(), module.hc_scale.detach()))
    torch.testing.assert_close(head(streams()), module(streams()), rtol=2e-6, atol=2e-6)


def test_names_of_the_state_dict():
    """A tiny model of theirs has exactly the names that we write and read."""
    small = configuration.DeepseekV4Config(
        vocab_size=32,
        hidden_size=DIM,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=16,
        q_lora_rank=16,
        o_lora_rank=16,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
    )
    with torch.device("meta"):
        names = dict(modeling.DeepseekV4ForCausalLM(small).named_parameters())
    model = Transformer(TransformerConfig(vocab_size=32, dim=DIM, num_layers=2, num_heads=4, convention=DEEPSEEK_V4))
    written = connection_tensors(model, "transformers")
    wanted = {name for name in names if "hc" in name}
    assert set(written) == wanted
    assert all(names[name].shape == tensor.shape for name, tensor in written.items())
    assert len(load_connections(model, written, "transformers")) == len(written)

"""The read that ends with the sublayer's norm: the fused operators (on their plain leaves) against read, then norm."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mhc_layers import DEEPSEEK_V4, DEEPSEEK_V41, PAPER, HyperConnection, Transformer, TransformerConfig
from mhc_layers._fused_state import fused_norm
from mhc_layers._site_ops import Post, Pre
from mhc_layers._sites import FUNCTIONAL
from mhc_layers._torch_ops import fused_site
from mhc_layers.kernels.options import options_key
from mhc_layers.models.norm import RMSNorm
from tests.mhc_layers.test_boundary_ops import gradients, make_inputs, make_sites, walk
from tests.mhc_layers.test_torch_ops import OPS, problem

CONVENTIONS = [PAPER, DEEPSEEK_V4, DEEPSEEK_V41]
EPS = 1e-3


def named(convention: Any) -> str:
    return convention.name


def site_through_functions(x: Tensor, gain: Tensor, *params: Tensor, convention: Any = PAPER) -> tuple[Tensor, Tensor]:
    options = options_key(convention)
    u, coef, link, proj, *_ = Pre.apply(x, *params, None, options, gain, EPS)
    return u, Post.apply(x, link, torch.tanh(u), coef, proj, *params, options)


def sites_with_norms(n: int, c: int, convention: Any, count: int = 3) -> list[HyperConnection]:
    generator = torch.Generator().manual_seed(11)
    sites = make_sites(n, c, convention, count)
    for site in sites:
        site.norm = nn.RMSNorm(c, eps=EPS)
        with torch.no_grad():
            site.norm.weight.normal_(generator=generator)
    return sites


def models(convention: Any) -> tuple[Transformer, Transformer]:
    config = TransformerConfig(vocab_size=32, dim=16, num_layers=2, num_heads=2, max_seq_len=16, convention=convention)
    torch.manual_seed(0)
    fused = Transformer(config)
    for site in fused.sites:
        with torch.no_grad():
            site.phi.normal_(std=0.3)
            site.sublayer.norm.weight.normal_()
    plain = copy.deepcopy(fused)
    for model, implementation in ((plain, FUNCTIONAL), (fused, fused_site(convention))):
        for site in model.sites:
            site.requested_implementation = site._implementation = implementation
    return fused, plain


# -- the operators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", [PAPER, DEEPSEEK_V4], ids=named)
@pytest.mark.parametrize("n", [1, 3, 4])
def test_gradients_are_exact(n: int, convention: Any) -> None:
    (x, *_), params = problem(n, 3)
    inputs = [tensor.requires_grad_() for tensor in (x, torch.randn(3, dtype=torch.float64), *params)]

    def run(*args: Tensor) -> tuple[Tensor, Tensor]:
        return site_through_functions(*args, convention=convention)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_gradients_of_gradients_are_exact() -> None:
    (x, *_), params = problem(2, 2, lead=(2,))
    inputs = [tensor.requires_grad_() for tensor in (x, torch.randn(2, dtype=torch.float64), *params)]
    assert torch.autograd.gradgradcheck(site_through_functions, inputs, fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("convention", CONVENTIONS, ids=named)
def test_the_norm_of_a_read_that_is_only_read(convention: Any) -> None:
    """du, the gradient of the gain and that of h_pre, against autograd of the two steps."""
    (site,) = sites_with_norms(4, 6, convention, 1)
    fused = fused_site(convention)
    x = torch.randn(5, 4, 6)
    found = []
    for steps in (fused, FUNCTIONAL):
        leaf = x.clone().requires_grad_()
        u, state = steps.pre(leaf, site)
        leaves = [leaf, site.norm.weight, *([] if convention.read_delay else [site.bias])]
        found.append([u, *torch.autograd.grad((u * torch.arange(6.0)).sum() + state.h_post.sum(), leaves)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_operators_pass_opcheck() -> None:
    (x, _, g, gu), params = problem(3, 4, dtype=torch.float32)
    options, gain = options_key(DEEPSEEK_V4), torch.randn(4)
    _, coef, proj, rstd, inverse = OPS.pre_forward(x, *params, None, options, gain, EPS)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.pre_forward.default, (x, *params, None, options, gain, EPS), test_utils=checks)
    backward = (x, *params, None, proj, rstd, g, gu, coef, options, gain, inverse)
    torch.library.opcheck(OPS.pre_backward.default, backward, test_utils=checks)


def test_vmap_equals_a_loop() -> None:
    (x, *_), params = problem(2, 3, lead=(4,))
    gain, batch = torch.randn(3, dtype=torch.float64), torch.stack([x, 2 * x, -x])
    together = torch.func.vmap(site_through_functions, (0, *(None,) * 6))(batch, gain, *params)
    for item in range(3):
        for ours, theirs in zip(together, site_through_functions(batch[item], gain, *params), strict=True):
            torch.testing.assert_close(ours[item], theirs)


def test_forward_mode_agrees_with_differences() -> None:
    (site,) = sites_with_norms(3, 4, PAPER, 1)
    steps = fused_site(PAPER)
    x, tangent = torch.randn(2, 3, 4), torch.randn(2, 3, 4)

    def read(x: Tensor) -> Tensor:
        return steps.pre(x, site)[0]

    value, derivative = torch.func.jvp(read, (x,), (tangent,))
    torch.testing.assert_close(value, read(x))
    step = 1e-2
    torch.testing.assert_close(
        derivative, (read(x + step * tangent) - read(x - step * tangent)) / (2 * step), rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("convention", CONVENTIONS, ids=named)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_boundary_equals_write_then_read(convention: Any, dtype: torch.dtype) -> None:
    sites = sites_with_norms(4, 10, convention)
    x, fs = make_inputs(sites, (2, 5), dtype)
    leaves = [x, *fs, *(parameter for site in sites for parameter in site.parameters())]
    separate, fused = walk(sites, x, fs, False), walk(sites, x, fs, True)
    for got, expected in zip(fused, separate, strict=True):
        assert torch.equal(got, expected)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for got, expected in zip(gradients(fused, leaves), gradients(separate, leaves), strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_the_input_is_the_norm_of_the_rounded_read() -> None:
    """In bfloat16 the norm sees what a read alone would store, so the two steps give the same bits."""
    (site,) = sites_with_norms(4, 24, PAPER, 1)
    x = torch.randn(6, 4, 24).bfloat16()
    with torch.no_grad():
        fused = fused_site(PAPER).pre(x, site)[0]
        norm, site.norm = site.norm, None
        read = fused_site(PAPER).pre(x, site)[0].float()
        expected = read * torch.rsqrt(read.square().mean(-1, keepdim=True) + EPS) * norm.weight
    assert torch.equal(fused, expected.bfloat16())


def test_kept_bytes_are_one_number_more_and_the_read_is_not_kept() -> None:
    n, c, tokens = 4, 8, 6
    (site,) = sites_with_norms(n, c, PAPER, 1)
    x = torch.randn(tokens, n, c, requires_grad=True)
    f = torch.randn(tokens, c, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    steps = fused_site(PAPER)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _, state = steps.pre(x, site)
        steps.post(x, f, state)
    outside = {tensor.untyped_storage().data_ptr() for tensor in (x, f, *site.parameters())}
    assert sum(size for pointer, size in kept.items() if pointer not in outside) == tokens * (4 * (n * (n + 2) + 1) + 4)


# -- which norms are fused, and where they live ------------------------------------------------------------------------


class Doubling(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


@pytest.mark.parametrize(
    ("norm", "fused"),
    [
        (nn.RMSNorm(8), True),
        (nn.RMSNorm(8, eps=EPS), True),
        (RMSNorm(8, eps=EPS), True),
        (nn.RMSNorm(8).bfloat16(), True),
        (nn.RMSNorm(8, elementwise_affine=False), False),
        (nn.LayerNorm(8), False),
        (Doubling(8), False),
    ],
    ids=["torch", "torch-eps", "ours", "torch-bf16", "no-gain", "layer-norm", "subclass"],
)
def test_any_norm_is_applied_once(norm: nn.Module, fused: bool) -> None:
    site = HyperConnection(8, 4, nn.Linear(8, 8), norm=norm, implementation=fused_site(PAPER))
    x = torch.randn(3, 4, 8)
    assert (fused_norm(site, x)[0] is not None) == fused
    u, _ = site.pre(x)
    bare = HyperConnection(8, 4, implementation=fused_site(PAPER))
    bare.load_state_dict(site.state_dict(), strict=False)
    torch.testing.assert_close(u, norm.float()(bare.pre(x)[0]), rtol=1e-5, atol=1e-6)


def test_hooks_of_a_norm_are_called() -> None:
    norm = nn.RMSNorm(8)
    norm.register_forward_hook(lambda module, args, output: 3.0 * output)
    site = HyperConnection(8, 4, norm=norm, implementation=fused_site(PAPER))
    x = torch.randn(2, 4, 8)
    hooked = site.pre(x)[0]
    norm._forward_hooks.clear()
    torch.testing.assert_close(hooked, 3.0 * site.pre(x)[0])


def test_a_replaced_forward_of_a_norm_is_called() -> None:
    """As accelerate does to load the weights of a module when it is called."""
    norm = RMSNorm(8)
    site = HyperConnection(8, 4, norm=norm, implementation=fused_site(PAPER))
    x = torch.randn(2, 4, 8)
    expected = 3.0 * site.pre(x)[0]
    forward = norm.forward
    norm.forward = lambda u: 3.0 * forward(u)  # type: ignore[method-assign]
    torch.testing.assert_close(site.pre(x)[0], expected)


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_a_norm_are_called(register: str) -> None:
    norm, called = nn.RMSNorm(8), []
    getattr(norm, register)(lambda module, *gradients: called.append(module))
    site = HyperConnection(8, 4, norm=norm, implementation=fused_site(PAPER))
    site.pre(torch.randn(2, 4, 8))[0].sum().backward()
    assert called == [norm]


def test_a_norm_by_name_stays_in_the_sublayer() -> None:
    sublayer = nn.Sequential()
    sublayer.add_module("norm", nn.RMSNorm(8))
    site = HyperConnection(8, 4, sublayer, norm="norm")
    assert site.input_norm is sublayer.norm
    assert [name for name in site.state_dict() if "norm" in name] == ["sublayer.norm.weight"]
    assert copy.deepcopy(site).input_norm is not site.input_norm
    owned = HyperConnection(8, 4, nn.Linear(8, 8), norm=nn.RMSNorm(8))
    assert [name for name in owned.state_dict() if "norm" in name] == ["norm.weight"]
    site.sublayer = nn.Identity()
    assert site.input_norm is None


def test_norms_that_cannot_be_applied_are_refused() -> None:
    with pytest.raises(ValueError, match="not a submodule of the sublayer; it has: '0', '1'"):
        HyperConnection(8, 4, nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 8)), norm="norm")
    with pytest.raises(ValueError, match="it has: none"):
        HyperConnection(8, 4, torch.tanh, norm="norm")
    with pytest.raises(ValueError, match=r"gain of shape \(4,\).*\(8,\)"):
        HyperConnection(8, 4, norm=nn.RMSNorm(4))
    with pytest.raises(TypeError, match="must be a module"):
        HyperConnection(8, 4, norm=torch.tanh)


@pytest.mark.parametrize("convention", CONVENTIONS, ids=named)
def test_transformer_equals_the_plain_one(convention: Any) -> None:
    tokens = torch.randint(32, (2, 9))
    results = []
    for model in models(convention):
        loss, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-5)


@pytest.mark.slow
def test_compiles_to_one_graph() -> None:
    fused, _ = models(PAPER)
    tokens = torch.randint(32, (2, 9))
    expected, _ = fused.loss(tokens[:, :-1], tokens[:, 1:])
    wanted = torch.autograd.grad(expected, list(fused.parameters()))
    loss = torch.compile(lambda a, b: fused.loss(a, b)[0], fullgraph=True, backend="aot_eager")(
        tokens[:, :-1], tokens[:, 1:]
    )
    torch.testing.assert_close(loss, expected)
    for got, want in zip(torch.autograd.grad(loss, list(fused.parameters())), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)

"""functional.py against reference.py: values, gradients, dtypes, layouts and transforms."""

import pytest
import torch
from torch.func import functional_call, grad, vmap

from mhc_layers import DEEPSEEK_V4, PAPER, HyperConnection, collapse_streams, expand_streams, functional, reference
from mhc_layers.functional import Parameters

OUTSIDE = PAPER.replace(norm_eps=1e-3, norm_eps_place="outside")
ALL = {"paper": PAPER, "deepseek_v4": DEEPSEEK_V4, "outside": OUTSIDE}  # V4.1 has the maps of V4


def make(n=4, channels=6, tokens=(3,), seed=0, dtype=torch.float64, std=1.0):
    generator = torch.Generator().manual_seed(seed)
    rows = (n + 2) * n

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    x = normal(*tokens, n, channels)
    params = Parameters(
        normal(rows, n * channels, scale=std / (n * channels) ** 0.5),
        normal(rows, scale=0.5 * std),
        *torch.tensor([0.7, 1.3, 1.0], dtype=dtype).unbind(),
    )
    return x, params, normal(*tokens, channels)


def plain_site(x, f, params, convention):
    """The reference, from the streams and the sublayer's output to (u, next streams)."""
    h_pre, h_post, h_res = reference.coefficients(x, params.phi, params.bias, tuple(params[2:]), convention)
    return reference.read(x, h_pre), reference.eq3_next_streams(x, f, h_res, h_post)


def functional_site(x, f, params, convention):
    h_pre, h_post, h_res = functional.coefficients(x, params, convention)
    return functional.read(x, h_pre), functional.write(x, f, h_res, h_post)


@pytest.mark.parametrize("n", [1, 2, 4, 9])
@pytest.mark.parametrize("convention", ALL.values(), ids=ALL)
def test_values_and_gradients_equal_the_reference(n, convention):
    x, params, f = make(n=n)
    inputs = [x, f, *params]
    results = []
    for site in (plain_site, functional_site):
        leaves = [t.clone().requires_grad_() for t in inputs]
        u, y = site(leaves[0], leaves[1], Parameters(*leaves[2:]), convention)
        generator = torch.Generator().manual_seed(9)
        weights = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in (u, y)]
        loss = (u * weights[0]).sum() + (y * weights[1]).sum()
        results.append([u, y, *torch.autograd.grad(loss, leaves)])
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("convention", ALL.values(), ids=ALL)
def test_float32_is_within_rounding_of_float64(convention):
    x, params, f = make(channels=32, tokens=(50,), std=2.0)
    exact = functional_site(x, f, params, convention)
    single = functional_site(x.float(), f.float(), Parameters(*(p.float() for p in params)), convention)
    for ours, expected in zip(single, exact, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("convention", ALL.values(), ids=ALL)
def test_gradcheck_of_the_whole_layer(convention):
    """First and second derivatives of the layer, threaded exactly as a module runs it."""
    x, params, _ = make(n=2, channels=3, tokens=(2,))
    site = HyperConnection(3, 2, torch.tanh, convention=convention.replace(read_delay=0, readout="mean")).double()

    def run(x, *values):
        named = dict(zip(("phi", "bias", "alpha_pre", "alpha_post", "alpha_res"), values, strict=True))
        return functional_call(site, named, (x,))

    inputs = tuple(t.clone().requires_grad_() for t in (x, *params))
    assert torch.autograd.gradcheck(run, inputs)
    if convention is not DEEPSEEK_V4:
        assert torch.autograd.gradgradcheck(run, inputs)
    if convention is PAPER:
        assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True, check_backward_ad=False)


@pytest.mark.parametrize("connection", ["identity", "hc", "hc_static", "mhc_static"])
def test_gradcheck_of_the_other_kinds(connection):
    site = HyperConnection(3, 2, torch.tanh, connection=connection).double()
    generator = torch.Generator().manual_seed(1)
    names, values = zip(*site.named_parameters(), strict=True)
    values = [torch.randn(v.shape, generator=generator, dtype=v.dtype, requires_grad=True) for v in values]
    x = torch.randn(2, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        return functional_call(site, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *values))
    assert torch.autograd.gradgradcheck(run, (x, *values))


def test_gradient_of_a_zero_token_is_finite():
    x, params, f = make()
    x = torch.zeros_like(x).requires_grad_()
    for convention in (PAPER, OUTSIDE):
        _, y = functional_site(x, f, params, convention)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert torch.isfinite(gradient).all()


def test_incoming_gradients_are_not_overwritten():
    """The passes add to gradients in place; a gradient that the caller holds must stay as it was."""
    for connection in ("mhc", "identity"):
        site = HyperConnection(6, 4, torch.nn.Linear(6, 6), connection=connection)
        x = torch.randn(5, 4, 6, requires_grad=True)
        y = site(x)
        held = torch.randn_like(y)
        copy = held.clone()
        y.backward(held, retain_graph=True)
        first = x.grad.clone()
        x.grad = None
        y.backward(held)
        assert torch.equal(held, copy)
        assert torch.equal(x.grad, first)


def test_streams_used_elsewhere_too():
    """The streams may also feed something besides the site; both gradients arrive."""
    site = HyperConnection(6, 4, torch.nn.Linear(6, 6))
    x = torch.randn(5, 4, 6, requires_grad=True)
    alone = torch.autograd.grad(site(x).square().sum(), x)[0]
    both = torch.autograd.grad(site(x).square().sum() + 3.0 * x.sum(), x)[0]
    torch.testing.assert_close(both, alone + 3.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_streams_are_rounded_once(dtype):
    x, params, f = make(channels=16, tokens=(20,))
    x, f = x.to(dtype), f.to(dtype)
    single = Parameters(*(p.float() for p in params))
    h_pre, h_post, h_res = functional.coefficients(x, single)
    assert {h_pre.dtype, h_post.dtype, h_res.dtype} == {torch.float32}
    u, y = functional.read(x, h_pre), functional.write(x, f, h_res, h_post)
    assert u.dtype == y.dtype == dtype
    exact = plain_site(x.double(), f.double(), Parameters(*(p.double() for p in single)), PAPER)
    for ours, expected in zip((u, y), exact, strict=True):
        # correctly rounded, except where the float32 value falls on the other side of a rounding boundary
        assert float((ours != expected.to(dtype)).float().mean()) < 0.01
        torch.testing.assert_close(ours.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_activation_dtype_rounds_earlier():
    x, params, f = make(channels=16, tokens=(200,))
    x, f = x.bfloat16(), f.bfloat16()
    _, h_post, h_res = functional.coefficients(x, Parameters(*(p.float() for p in params)))
    exact = reference.eq3_next_streams(x.double(), f.double(), h_res.double(), h_post.double())

    def rms(apply_dtype):
        y = functional.write(x, f, h_res, h_post, apply_dtype=apply_dtype)
        return float((y.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())

    assert rms("float32") < 1.9e-3
    assert rms("activation") > 2.2e-3


def test_autocast_leaves_the_coefficients_alone():
    x, params, f = make(channels=16, tokens=(20,), dtype=torch.float32)
    leaf = x.clone().requires_grad_()
    plain = functional_site(leaf, f, params, PAPER)
    expected = torch.autograd.grad(plain[1].sum(), leaf)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = functional_site(leaf, f, params, PAPER)
        assert torch.equal(inside[0], plain[0]) and torch.equal(inside[1], plain[1])
        gradient = torch.autograd.grad(inside[1].sum(), leaf)[0]  # even with the backward pass inside
        assert torch.equal(gradient, expected)


def test_leading_axes_strides_and_empty_batches():
    x, params, f = make(tokens=(2, 3))
    flat = functional_site(x.flatten(0, 1), f.flatten(0, 1), params, PAPER)
    for tokens in (
        functional_site(x, f, params, PAPER),
        [
            torch.stack(t)
            for t in zip(*(functional_site(a, b, params, PAPER) for a, b in zip(x, f, strict=True)), strict=True)
        ],
    ):
        for ours, expected in zip(tokens, flat, strict=True):
            torch.testing.assert_close(ours.flatten(0, 1), expected)
    one = functional_site(x[0, 0], f[0, 0], params, PAPER)
    torch.testing.assert_close(one[1], flat[1][0])
    strided = torch.empty(2, 3, 6, 4, dtype=x.dtype).mT.copy_(x)
    assert not strided.is_contiguous()
    torch.testing.assert_close(functional_site(strided, f, params, PAPER)[1].flatten(0, 1), flat[1])
    leaf = x[:0].clone().requires_grad_()
    u, y = functional_site(leaf, f[:0], params, PAPER)
    assert u.shape == (0, 3, 6) and y.shape == (0, 3, 4, 6)
    y.sum().backward()
    assert leaf.grad.shape == (0, 3, 4, 6)


def test_per_sample_gradients_by_vmap():
    """vmap over grad equals a loop: the threaded passes have their batching rules."""
    site = HyperConnection(6, 3, torch.nn.Linear(6, 6)).double()
    named = {name: value.detach() for name, value in site.named_parameters()}
    x = torch.randn(4, 2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def loss(named, x):
        return functional_call(site, named, (x,)).square().sum()

    together = vmap(grad(loss), in_dims=(None, 0))(named, x)
    for index in range(4):
        for name, value in grad(loss)(named, x[index]).items():
            torch.testing.assert_close(together[name][index], value)


def test_expand_and_collapse():
    e = torch.randn(2, 5)
    x = expand_streams(e, 3)
    assert x.shape == (2, 3, 5) and bool((x == e[:, None]).all())
    torch.testing.assert_close(collapse_streams(x), e)
    torch.testing.assert_close(collapse_streams(x, reduce="sum"), 3 * e)
    torch.testing.assert_close(collapse_streams(x, torch.tensor([0.5, 0.25, 0.25])), e)
    with pytest.raises(ValueError, match="num_streams must be an integer >= 1"):
        expand_streams(e, 0)
    with pytest.raises(ValueError, match="'mean', 'sum'"):
        collapse_streams(x, reduce="max")


def test_inputs_are_not_mutated():
    x, params, f = make()
    copies = [t.clone() for t in (x, f, *params)]
    functional_site(x, f, params, PAPER)
    assert all(torch.equal(a, b) for a, b in zip(copies, (x, f, *params), strict=True))

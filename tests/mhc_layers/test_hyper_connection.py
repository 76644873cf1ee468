"""HyperConnection: wrapping, baselines, starts, precision, capture."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mhc_layers import (
    DEEPSEEK_V4,
    DEEPSEEK_V41,
    PAPER,
    HyperConnection,
    capture_coefficients,
    expand_streams,
    reference,
)
from mhc_layers._sites import FUNCTIONAL, RESIDUAL
from mhc_layers.config import CONNECTION_KINDS
from mhc_layers.hub import load_site, site_tensors
from mhc_layers.initialization import INITS
from mhc_layers.residual_maps import get_res_map, res_map_names

DYNAMIC = ("mhc", "identity", "hc")


def streams(*tokens, n=4, channels=8, seed=0, dtype=torch.float32):
    return torch.randn(*tokens, n, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def randomised(site, seed=0):
    """The same site with every parameter random, so that nothing is hidden by a start at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in site.named_parameters():
            if not name.startswith("sublayer"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return site


# -- wrapping ---------------------------------------------------------------------------------------------------------


def test_wraps_a_module_and_trains_its_parameters():
    site = HyperConnection(8, 4, nn.Linear(8, 8))
    site(streams(3)).sum().backward()
    assert site.sublayer.weight.grad is not None and site.phi.grad is not None
    assert "sublayer.weight" in site.state_dict()


def test_wraps_a_callable_with_arguments_and_extra_outputs():
    def sublayer(u, shift, *, scale):
        return u * scale + shift, "attention weights", 7

    site = HyperConnection(8, 4, sublayer)
    y, weights, number = site(streams(3), 1.0, scale=2.0)
    assert (weights, number) == ("attention weights", 7)
    plain = HyperConnection(8, 4, lambda u: u * 2.0 + 1.0)
    assert torch.equal(y, plain(streams(3)))


def test_site_is_the_reference():
    site = randomised(HyperConnection(8, 4, torch.tanh).double())
    x = streams(5, dtype=torch.float64)
    alphas = (site.alpha_pre, site.alpha_post, site.alpha_res)
    expected = reference.apply_site(x, torch.tanh, site.phi, site.bias, alphas)
    torch.testing.assert_close(site(x), expected, rtol=1e-11, atol=1e-12)


def test_pre_and_post_are_forward():
    site = randomised(HyperConnection(8, 4, torch.tanh))
    x = streams(5)
    u, state = site.pre(x)
    assert u.shape == (5, 8)
    assert torch.equal(site.post(x, torch.tanh(u), state), site(x))


@pytest.mark.parametrize("first", ["mhc", "identity", "residual"])
@pytest.mark.parametrize("second", ["mhc", "hc", "residual"])
def test_boundary_is_post_then_pre(first, second):
    left = randomised(HyperConnection(8, 4, torch.tanh, connection=first))
    right = randomised(HyperConnection(8, 4, torch.sin, connection=second), seed=1)
    x = streams(5)
    u, state = left.pre(x)
    y, v, next_state = left.boundary(x, torch.tanh(u), state, right)
    assert torch.equal(y, left(x))
    assert torch.equal(right.post(y, torch.sin(v), next_state), right(left(x)))


def test_streams_persist_between_sites():
    """What one site writes to stream 1 alone, the next site can read from stream 1 alone."""
    writes = HyperConnection(8, 4, lambda u: torch.ones_like(u), connection="hc_static")
    reads = HyperConnection(8, 4, nn.Identity(), connection="hc_static")
    with torch.no_grad():
        writes.bias[4:8] = torch.tensor([0.0, 1.0, 0.0, 0.0])
        reads.bias[:4] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    x = expand_streams(torch.zeros(2, 8), 4)
    u, _ = reads.pre(writes(x))
    assert torch.equal(u, torch.ones(2, 8))
    assert float(writes(x)[:, [0, 2, 3]].detach().abs().max()) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim must be an integer >= 1, got 0"),
        ({"dim": 8.0}, "dim must be an integer >= 1, got 8.0"),
        ({"num_streams": 0}, "num_streams must be an integer >= 1"),
        ({"connection": "mhc2"}, "accepted: mhc"),
        ({"convention": "v5"}, "presets"),
        ({"init": "zeros"}, "presets"),
        ({"dtype": torch.bfloat16}, "float32 or float64"),
        ({"res_map": "Permutations", "connection": "hc"}, "replaces the projection"),
        ({"res_map": "Sphere"}, "Unknown residual map"),
        ({"implementation": "fast"}, "'functional'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        HyperConnection(**{"dim": 8, **arguments})


@pytest.mark.parametrize(
    ("connection", "res_map"),
    [*((kind, None) for kind in CONNECTION_KINDS), ("mhc", "Permutations"), ("mhc_static", "Newton")],
)
def test_the_meta_device(connection, res_map):
    """Built there, run there for its shapes, and made real: what a plan of a large model does."""
    with torch.device("meta"):
        site = HyperConnection(8, 4, nn.Linear(8, 8), connection=connection, res_map=res_map)
        assert site(streams(3).to("meta")).shape == (3, 4, 8)
    torch.manual_seed(0)
    site.to_empty(device="cpu").reset_parameters()
    torch.manual_seed(0)
    expected = HyperConnection(8, 4, connection=connection, res_map=res_map)
    own = {name: value for name, value in site.state_dict().items() if "." not in name}
    for name, value in expected.state_dict().items():
        assert torch.equal(own[name], value)


def test_a_state_of_the_transposed_storage_is_refused(tmp_path):
    """Its shapes fit, so nothing else would tell; without the note (a safetensors file) it is taken as it is."""
    paper, deepseek = HyperConnection(8, 4), HyperConnection(8, 4, convention="deepseek_v4")
    torch.save(randomised(paper).state_dict(), tmp_path / "site.pt")
    state = torch.load(tmp_path / "site.pt", weights_only=True)
    with pytest.raises(RuntimeError, match=r"phi and bias .* convention 'paper' .* 'deepseek_v4'.*load_site"):
        deepseek.load_state_dict(state)
    HyperConnection(8, 4, convention=PAPER.replace(num_iters=5)).load_state_dict(state)
    HyperConnection(8, 4, convention="deepseek_v41").load_state_dict(deepseek.state_dict())
    deepseek.load_state_dict(dict(state))
    load_site(deepseek, site_tensors(paper))
    assert torch.equal(deepseek.phi[8:].view(4, 4, -1), paper.phi[8:].view(4, 4, -1).transpose(0, 1))


def test_wrong_streams():
    site = HyperConnection(8, 4, nn.Identity())
    with pytest.raises(ValueError, match=r"\(4, 8\), got shape \(3, 8\)"):
        site(torch.zeros(3, 8))
    with pytest.raises(TypeError, match="int64"):
        site(torch.zeros(3, 4, 8, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"must be a tensor \(\.\.\., 4, 8\), got ndarray"):
        site(torch.zeros(3, 4, 8).numpy())
    with pytest.raises(ValueError, match="no sublayer"):
        HyperConnection(8, 4)(streams(2))
    with pytest.raises(TypeError, match="num_parameters"):
        HyperConnection(8, res_map=3)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (torch.zeros(3, 16), ValueError, r"\(3, 8\) for streams of shape \(3, 4, 8\); got \(3, 16\).*projection back"),
        (torch.zeros(8), ValueError, r"got \(8,\)"),
        (torch.zeros(3, 4, 8), ValueError, r"got \(3, 4, 8\)"),
        ([torch.zeros(3, 8)], TypeError, "got list. Wrap the sublayer"),
        ({"hidden": torch.zeros(3, 8)}, TypeError, "got dict"),
        (None, TypeError, "got NoneType"),
        ((), TypeError, "got an empty tuple"),
        (("hidden", torch.zeros(3, 8)), TypeError, "got str"),
        (torch.zeros(3, 8, dtype=torch.long), TypeError, "floating dtype, got torch.int64"),
    ],
)
def test_what_a_sublayer_must_not_return(returned, error, message):
    site = HyperConnection(8, 4, lambda u: returned)
    with pytest.raises(error, match=message):
        site(streams(3))


def test_boundaries_check_what_they_write():
    first, second = HyperConnection(8, 4), HyperConnection(8, 4)
    _, state = first.pre(streams(3))
    with pytest.raises(ValueError, match=r"got \(3, 7\)"):
        first.boundary(streams(3), torch.zeros(3, 7), state, second)


def test_a_sublayer_that_cannot_be_called():
    with pytest.raises(TypeError, match=r"sublayer is a int, which cannot be called; give a module or a function"):
        HyperConnection(8, 4, 4)


# -- baselines --------------------------------------------------------------------------------------------------------


def test_disabled_is_a_plain_residual():
    layer = nn.Linear(8, 8)
    site = HyperConnection(8, 4, layer, disable=True)
    e = torch.randn(5, 8)
    y = site(expand_streams(e, 4))
    assert torch.equal(y, expand_streams(e + layer(e), 4))
    assert [name for name, _ in site.named_parameters()] == ["sublayer.weight", "sublayer.bias"]
    h_pre, h_post, h_res = site.coefficients(expand_streams(e, 4))
    assert torch.equal(h_res[0], torch.eye(4)) and torch.equal(h_post[0], torch.ones(4))
    assert h_pre[0].tolist() == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("convention", [PAPER, DEEPSEEK_V4])
def test_one_stream(convention):
    """n = 1: the mixing is the identity, exactly in the paper's convention, and the site is a gated residual."""
    site = randomised(HyperConnection(8, 1, torch.tanh, convention=convention))
    x = streams(50, n=1)
    h_pre, h_post, h_res = site.coefficients(x)
    if convention is PAPER:
        assert bool((h_res == 1.0).all())
        expected = x + h_post[..., None] * torch.tanh(h_pre * x[:, 0])[:, None]
        torch.testing.assert_close(site(x), expected, rtol=1e-6, atol=1e-6)
    else:
        torch.testing.assert_close(h_res, torch.ones_like(h_res), rtol=0, atol=3e-6)


def test_shapes_of_the_parameters():
    n, channels = 3, 8
    shapes = {
        kind: {name: tuple(p.shape) for name, p in HyperConnection(channels, n, connection=kind).named_parameters()}
        for kind in CONNECTION_KINDS
    }
    gates = {"alpha_pre": (), "alpha_post": ()}
    assert shapes["mhc"] == {"phi": (15, 24), "bias": (15,), **gates, "alpha_res": ()}
    assert shapes["mhc_static"] == shapes["hc_static"] == {"bias": (15,)}
    assert shapes["identity"] == {"phi": (6, 24), "bias": (6,), **gates}
    assert shapes["hc"] == {"phi": (5, 8), "bias": (15,), **gates, "alpha_res": ()}
    assert shapes["residual"] == {}


def test_dynamic_hc_is_the_reference():
    site = randomised(HyperConnection(8, 4, torch.tanh, connection="hc", convention=PAPER.replace(norm_eps=1e-6)))
    site = site.double()
    x = streams(5, dtype=torch.float64)
    alphas = (site.alpha_pre, site.alpha_post, site.alpha_res)
    expected = reference.dynamic_hc_coefficients(x, site.phi, site.bias, alphas)
    for ours, wanted in zip(site.coefficients(x), expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", ["mhc_static", "hc_static"])
def test_static_kinds_ignore_the_streams(kind):
    site = randomised(HyperConnection(8, 4, connection=kind))
    for one, other in zip(site.coefficients(streams(3)), site.coefficients(streams(3, seed=1)), strict=True):
        assert torch.equal(one, other)


def test_identity_kind_is_mhc_without_mixing():
    full = randomised(HyperConnection(8, 4, torch.tanh))
    site = HyperConnection(8, 4, torch.tanh, connection="identity")
    with torch.no_grad():
        site.phi.copy_(full.phi[:8])
        site.bias.copy_(full.bias[:8])
        site.alpha_pre.copy_(full.alpha_pre)
        site.alpha_post.copy_(full.alpha_post)
    x = streams(5)
    h_pre, h_post, h_res = site.coefficients(x)
    torch.testing.assert_close(h_pre, full.coefficients(x)[0])
    torch.testing.assert_close(h_post, full.coefficients(x)[1])
    assert bool((h_res == torch.eye(4)).all())


@pytest.mark.parametrize("name", res_map_names())
def test_residual_maps(name):
    """Every parametrization and solver can stand in for the projection, and starts near the identity."""
    site = HyperConnection(8, 4, torch.tanh, res_map=name)
    x = streams(6)
    h_res = site.coefficients(x)[2]
    assert h_res.shape == (6, 4, 4)
    assert float((h_res - torch.eye(4)).detach().abs().max()) < 0.3
    randomised(site)(x).sum().backward()
    assert torch.isfinite(site.phi.grad).all()
    chosen = get_res_map(name)
    sums = getattr(chosen, "sums", "none")
    h_res = site.coefficients(x)[2]
    if sums in ("both", "rows"):
        torch.testing.assert_close(h_res.sum(-1), torch.ones(6, 4), rtol=0, atol=1e-5)
    if sums in ("both", "columns"):
        torch.testing.assert_close(h_res.sum(-2), torch.ones(6, 4), rtol=0, atol=1e-5)


# -- starts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("connection", ["mhc", "mhc_static", "identity", "hc", "hc_static"])
@pytest.mark.parametrize("convention", [PAPER, DEEPSEEK_V4])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_default_start_is_the_residual(connection, convention, n):
    """Equal streams read as themselves and stay equal: u = e and every stream becomes e + F(e), to rounding."""
    e = torch.randn(20, 8, dtype=torch.float64)
    tolerance = 1e-6 if convention is PAPER or "hc" in connection[:2] else 2e-6
    for index in range(n + 1):
        site = HyperConnection(8, n, torch.tanh, connection=connection, convention=convention, index=index).double()
        x = expand_streams(e, n)
        torch.testing.assert_close(site.pre(x)[0], e, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(site(x), expand_streams(e + torch.tanh(e), n), rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("init", INITS.values(), ids=INITS)
def test_presets_set_what_they_say(init):
    torch.manual_seed(0)
    site = HyperConnection(32, 4, init=init, index=2)
    assert float(site.alpha_res.detach()) == pytest.approx(init.alpha)
    assert float(site.phi.detach().std()) == pytest.approx(init.phi_std, rel=0.1)
    bias = site.bias.detach()
    torch.testing.assert_close(torch.sigmoid(bias[:4]), torch.tensor(init.read_weights(4, 2)))
    logits = bias[8:].view(4, 4)
    assert float(logits.diagonal().abs().max()) == 0.0
    assert float(logits[0, 1]) == init.off_diagonal


def test_favoured_stream_depends_on_depth():
    firsts = [int(HyperConnection(8, 3, index=index).bias[:3].argmax()) for index in range(5)]
    assert firsts == [0, 1, 2, 0, 1]


# -- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.bfloat16)])
@pytest.mark.parametrize("connection", DYNAMIC)
def test_parameters_stay_float32_when_the_model_is_cast(cast, connection):
    site = randomised(HyperConnection(8, 4, nn.Linear(8, 8), connection=connection))
    values = {name: p.detach().clone() for name, p in site.named_parameters() if "sublayer" not in name}
    site = cast(site)
    assert site.sublayer.weight.dtype in (torch.bfloat16, torch.float16)
    for name, value in values.items():
        assert torch.equal(site.get_parameter(name), value), name  # not rounded on the way
    x = streams(3).to(site.sublayer.weight.dtype)
    assert site(x).dtype == x.dtype
    assert {h.dtype for h in site.coefficients(x)} == {torch.float32}
    site(x).float().sum().backward()
    assert site.phi.grad.dtype == torch.float32


def test_double_is_followed():
    site = HyperConnection(8, 4, nn.Linear(8, 8)).double()
    assert site.phi.dtype == site.alpha_res.dtype == torch.float64
    assert site(streams(2, dtype=torch.float64)).dtype == torch.float64


def test_autocast_changes_the_sublayer_only():
    seen = []
    layer = nn.Linear(8, 8)

    def sublayer(u):
        seen.append(layer(u).dtype)
        return layer(u)

    site = randomised(HyperConnection(8, 4, sublayer))
    x = streams(3)
    plain = site.coefficients(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = site(x)
        inside = site.coefficients(x)
    assert seen == [torch.bfloat16] and y.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


def test_meta_device_and_deepcopy():
    site = HyperConnection(8, 4, nn.Linear(8, 8), device="meta")
    assert site.phi.is_meta
    site = site.to_empty(device="cpu")
    site.reset_parameters()
    fresh = HyperConnection(8, 4, nn.Linear(8, 8))
    assert torch.equal(site.bias, fresh.bias)
    twin = copy.deepcopy(fresh)
    assert torch.equal(twin(streams(2)), fresh(streams(2)))
    assert twin.implementation is fresh.implementation  # so that boundaries of a copied model still fuse


def test_state_dict_round_trip():
    site, other = (randomised(HyperConnection(8, 4, nn.Linear(8, 8)), seed) for seed in (0, 1))
    other.load_state_dict(site.state_dict())
    assert torch.equal(other(streams(2)), site(streams(2)))


# -- delayed reads ----------------------------------------------------------------------------------------------------


def test_delayed_read_uses_the_site_before():
    first, second = (randomised(HyperConnection(8, 4, torch.tanh, convention=DEEPSEEK_V41), seed) for seed in (0, 1))
    x = streams(5)
    u, state = first.pre(x)
    assert torch.equal(u, x[:, 0])  # the first site reads stream 0
    y = first.post(x, torch.tanh(u), state)
    u, _ = second.pre(y, state.h_pre)
    torch.testing.assert_close(u, reference.read(y, first.coefficients(x)[0]))
    assert torch.equal(second(y, previous=state), second.post(y, torch.tanh(u), second.pre(y, state.h_pre)[1]))


def test_delayed_read_trains_the_site_before():
    first, second = (randomised(HyperConnection(8, 4, torch.tanh, convention=DEEPSEEK_V41), seed) for seed in (0, 1))
    x = streams(5).requires_grad_()
    u, state = first.pre(x)
    y, v, next_state = first.boundary(x, torch.tanh(u), state, second)
    second.post(y, torch.tanh(v), next_state).sum().backward()
    assert float(first.alpha_pre.grad.abs()) > 0.0
    assert float(second.alpha_pre.grad or 0.0) == 0.0


# -- implementations, capture, checkpointing --------------------------------------------------------------------------


def test_choice_of_implementation_is_explained():
    assert HyperConnection(8).implementation is FUNCTIONAL
    assert HyperConnection(8, disable=True).implementation is RESIDUAL
    assert HyperConnection(8, implementation=FUNCTIONAL).implementation is FUNCTIONAL
    insisting = HyperConnection(8, sublayer=nn.Identity(), implementation="fused")  # may still move to a GPU
    with pytest.raises(ValueError, match="'fused' refuses this site: needs a CUDA or ROCm device, got cpu"):
        insisting(streams(2))
    resolution = HyperConnection(8).explain()
    assert resolution.row.name == "functional"
    assert "serves the connection 'residual', got 'mhc'" in str(resolution)


@pytest.mark.parametrize("connection", CONNECTION_KINDS)
def test_capture(connection):
    model = nn.Sequential(*(HyperConnection(8, 4, nn.Linear(8, 8), connection=connection) for _ in range(3)))
    x = streams(5)
    with capture_coefficients(model) as captured:
        assert len(captured) == 0
        model(x)
        assert len(captured) == 3
    expected = model[1].coefficients(model[0](x))
    for ours, wanted in zip(captured[1], expected, strict=True):
        torch.testing.assert_close(ours, wanted)
        assert not ours.requires_grad
    assert torch.equal(captured.streams[0], x)
    assert captured.sites == list(model)
    assert [record.h_res.shape for record in captured] == [(5, 4, 4)] * 3
    model(streams(7))  # outside the context nothing is recorded
    assert captured[0].h_pre.shape == (5, 4)
    with torch.no_grad():
        kept = [h.clone() for h in captured[1]]
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(a, b) for a, b in zip(kept, captured[1], strict=True))  # not views of the parameters


@pytest.mark.parametrize("connection", ["mhc", "hc"])
def test_activation_checkpointing(connection):
    site = randomised(HyperConnection(8, 4, nn.Linear(8, 8), connection=connection))
    gradients = []
    for run in (site, lambda x: checkpoint(site, x, use_reentrant=False)):
        x = streams(5).requires_grad_()
        site.zero_grad()
        run(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad.clone() for p in site.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_logits_before_the_maps():
    site = randomised(HyperConnection(8, 4))
    x = streams(5)
    gate, residual = site.logits(x)
    assert gate.shape == (5, 8) and residual.shape == (5, 16)
    torch.testing.assert_close(torch.sigmoid(gate[:, :4]), site.coefficients(x)[0])
    with pytest.raises(ValueError, match="free"):
        HyperConnection(8, connection="hc").logits(x)

"""Transformer: starts as pre-norm, breaks the symmetry of its streams, is causal, and keeps its promises on wiring."""

import pytest
import torch

from mhc_layers import (
    DEEPSEEK_V41,
    PAPER,
    Transformer,
    TransformerConfig,
    capture_coefficients,
    generate,
    reference,
)
from mhc_layers.config import CONNECTION_KINDS
from mhc_layers.models.transformer import WalkState

CONVENTIONS = ("paper", "deepseek_v4", "deepseek_v41")
CASES = [(kind, "paper") for kind in CONNECTION_KINDS if kind != "residual"]
CASES += [("mhc", "deepseek_v4"), ("mhc", "deepseek_v41"), ("hc", "deepseek_v41")]


def build(seed=0, **changes):
    torch.manual_seed(seed)
    fields = {"vocab_size": 61, "dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "max_seq_len": 32}
    return Transformer(TransformerConfig(**{**fields, **changes}))


def randomised(model, seed=0):
    """The same model with random connections, so that streams and maps are generic."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sublayer" not in name and (name.startswith("sites") or name.startswith("readout")):
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def tokens(batch=2, length=12, seed=0):
    return torch.randint(61, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_no_tokens_and_no_rows():
    for changes in ({}, {"num_experts": 2}):
        model = build(**changes)
        assert model(tokens()[:0]).shape == (0, 12, 61) and model(tokens()[:, :0]).shape == (2, 0, 61)
        assert generate(model, tokens()[:0], 2).shape == (0, 14)


def test_a_tied_head_stays_tied_when_tensors_are_assigned():
    """Two parameters of one storage would be updated twice by an optimizer."""
    source = build()
    with torch.device("meta"):
        model = build()
    assert model(tokens().to("meta")).shape == (2, 12, 61)
    model.load_state_dict(source.state_dict(), assign=True)
    assert model.head.weight is model.embedding.weight
    model.rotary.to_empty(device="cpu").reset_parameters()
    assert torch.equal(model(tokens()), source(tokens()))


# -- start and symmetry -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("connection", "convention"), CASES)
def test_starts_as_the_pre_norm_transformer(connection, convention):
    """With the default start, every kind computes what the same body computes with plain residuals."""
    model = build(connection=connection, convention=convention)
    plain = build(connection="residual")
    body = {name: value for name, value in model.state_dict().items() if "sublayer" in name or "." not in name[:5]}
    plain.load_state_dict({name: body.get(name, model.state_dict()[name]) for name in plain.state_dict()})
    logits, expected = model(tokens()).detach(), plain(tokens()).detach()
    scale = float(expected.abs().max())
    # eps of the conventions and of the norms enter; far below any effect of training
    assert float((logits - expected).abs().max()) < 2e-5 * scale


@pytest.mark.parametrize(("connection", "convention"), CASES)
def test_streams_differ_after_five_steps(connection, convention):
    model = build(connection=connection, convention=convention)
    optimizer = torch.optim.AdamW(model.param_groups(), lr=1e-2)
    text = tokens(4, 16)
    for _ in range(5):
        optimizer.zero_grad()
        model.loss(text[:, :-1], text[:, 1:])[0].backward()
        optimizer.step()
    with capture_coefficients(model) as captured, torch.no_grad():
        model(text)
    spread = captured.final_streams.std(dim=-2).mean() / captured.final_streams.abs().mean()
    assert float(spread) > 1e-4  # rounding alone leaves 1e-7


def test_the_symmetric_trap_is_real():
    """phi = 0 with equal biases keeps the streams equal: what the default start must avoid."""
    model = build()
    with torch.no_grad():
        for site in model.sites:
            site.bias.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    text = tokens(4, 16)
    for _ in range(5):
        optimizer.zero_grad()
        model.loss(text[:, :-1], text[:, 1:])[0].backward()
        optimizer.step()
    with capture_coefficients(model) as captured, torch.no_grad():
        model(text)
    spread = captured.final_streams.std(dim=-2).mean() / captured.final_streams.abs().mean()
    assert float(spread) < 1e-6


def test_training_lowers_the_loss():
    model = build()
    optimizer = torch.optim.AdamW(model.param_groups(), lr=1e-2)
    text = tokens(4, 16)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss, _ = model.loss(text[:, :-1], text[:, 1:])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


# -- what a forward pass computes -------------------------------------------------------------------------------------


def test_forward_is_the_reference_site_by_site():
    """The walk over fused boundaries equals the equations applied one site after the other."""
    model = randomised(build()).double()
    text = tokens()
    context = model.context(text.shape[1])
    x = model.embed(text)
    for site in model.sites:
        alphas = (site.alpha_pre, site.alpha_post, site.alpha_res)
        x = reference.apply_site(x, lambda u, s=site: s.sublayer(s.normed(u), context), site.phi, site.bias, alphas)
    expected = model.head(model.norm(x.mean(-2)))
    torch.testing.assert_close(model(text), expected, rtol=1e-10, atol=1e-11)


def test_gradients_are_those_of_the_reference():
    model = randomised(build()).double()
    text = tokens()

    def by_reference():
        context = model.context(text.shape[1])
        x = model.embed(text)
        for site in model.sites:
            alphas = (site.alpha_pre, site.alpha_post, site.alpha_res)
            x = reference.apply_site(x, lambda u, s=site: s.sublayer(s.normed(u), context), site.phi, site.bias, alphas)
        return model.head(model.norm(x.mean(-2)))

    parameters = dict(model.named_parameters())
    ours = torch.autograd.grad(model(text).square().sum(), parameters.values())
    wanted = torch.autograd.grad(by_reference().square().sum(), parameters.values())
    for name, one, other in zip(parameters, ours, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_causal(convention):
    model = randomised(build(convention=convention, num_experts=4))
    text, changed = tokens(), tokens()
    changed[:, 7:] = (changed[:, 7:] + 1) % 61
    with torch.no_grad():
        before, after = model(text), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert float((before[:, 7:] - after[:, 7:]).abs().max()) > 1e-3


def test_single_pass_wiring():
    """V4.1: the first sublayer sees stream 0, each later one and the readout use the pre of the site before."""
    model = randomised(build(convention=DEEPSEEK_V41)).double()
    assert not list(model.readout_streams.parameters())
    text = tokens()
    context = model.context(text.shape[1])
    x = model.embed(text)
    weights = torch.zeros(*text.shape, 4, dtype=torch.float64)
    weights[..., 0] = 1.0
    for site in model.sites:
        alphas = (site.alpha_pre, site.alpha_post, site.alpha_res)
        h_pre, h_post, h_res = reference.coefficients(x, site.phi, site.bias, alphas, site.convention)
        f = site.sublayer(site.normed(reference.read(x, weights)), context)
        x, weights = reference.eq3_next_streams(x, f, h_res, h_post), h_pre
    expected = model.head(model.norm(reference.read(x, weights)))
    torch.testing.assert_close(model(text), expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_walk_may_be_cut_anywhere(convention):
    """A pipeline stage runs some of the sites and hands on the streams, and h_pre where reads are delayed."""
    model = randomised(build(convention=convention))
    text = tokens()
    context, state = model.context(text.shape[1]), WalkState(model.embed(text))
    for sites in (model.sites[:1], model.sites[1:1], model.sites[1:3], model.sites[3:]):
        state = model.walk(state, context, sites)
    torch.testing.assert_close(model.readout(state.x, state.h_pre), model(text), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("readout", ["mean", "sum", "learned", "hc_head"])
def test_readouts(readout):
    model = randomised(build(convention=PAPER.replace(readout=readout)))
    with capture_coefficients(model) as captured:
        logits = model(tokens())
    x = captured.final_streams
    head = model.readout_streams
    if readout == "learned":
        collapsed = (torch.softmax(head.logits, 0)[:, None] * x).sum(-2)
    elif readout == "hc_head":
        collapsed = reference.hc_head(x, head.fn, head.base, head.scale, PAPER)
    else:
        collapsed = x.mean(-2) if readout == "mean" else x.sum(-2)
    torch.testing.assert_close(logits, model.head(model.norm(collapsed)), rtol=1e-5, atol=1e-5)


def test_grouped_query_attention_shares_keys():
    """Two key-value heads equal four of which each is used by two query heads."""
    grouped, full = build(), build(num_kv_heads=4)
    state = full.state_dict()
    for name, value in grouped.state_dict().items():
        if name.endswith("qkv.weight"):
            q, k, v = value.split([32, 16, 16])
            value = torch.cat([q, *(part.view(2, 8, 32).repeat_interleave(2, 0).flatten(0, 1) for part in (k, v))])
        state[name] = value
    full.load_state_dict(state)
    torch.testing.assert_close(full(tokens()), grouped(tokens()))


# -- sizes, groups, precision, recomputation --------------------------------------------------------------------------


def test_tied_and_untied_heads():
    tied, untied = build(), build(tie_embeddings=False)
    assert tied.head.weight is tied.embedding.weight
    assert untied.head.weight is not untied.embedding.weight
    assert sum(p.numel() for p in untied.parameters()) == sum(p.numel() for p in tied.parameters()) + 61 * 32


@pytest.mark.parametrize("changes", [{}, {"convention": "deepseek_v4"}, {"connection": "hc"}, {"num_experts": 2}])
def test_every_parameter_is_in_one_group(changes):
    model = build(**changes)
    groups = {group["name"]: group for group in model.param_groups(weight_decay=0.3)}
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    decayed = {name for name, group in groups.items() if group["weight_decay"]}
    assert decayed == {"matrices", "phi"}
    assert all(p.dim() <= 2 and p is not model.sites[0].phi for p in groups["connections"]["params"])
    assert model.sites[0].bias.data_ptr() in {p.data_ptr() for p in groups["connections"]["params"]}


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("experts", [0, 3])
def test_recomputation_changes_nothing(convention, experts):
    plain = randomised(build(num_layers=3, convention=convention, num_experts=experts))
    recomputed = randomised(build(num_layers=3, convention=convention, num_experts=experts, recompute_layers=2))
    text = tokens()
    losses = [model.loss(text, text)[0] for model in (plain, recomputed)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for one, other in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize(("connection", "convention"), [*CASES, ("residual", "paper")])
def test_bfloat16_model(connection, convention):
    model = build(connection=connection, convention=convention)
    expected = model(tokens())
    model.bfloat16()
    logits = model(tokens())
    assert logits.dtype == torch.bfloat16
    assert model.rotary.cos.dtype == torch.float32
    assert all(p.dtype == torch.float32 for s in model.sites for n, p in s.named_parameters() if "sublayer" not in n)
    error = (logits.float() - expected).detach().abs().mean()
    assert float(error) < 0.05 * float(expected.detach().abs().mean())
    logits.float().sum().backward()


def test_autocast_gives_narrow_streams_and_wide_coefficients():
    model = build()
    with capture_coefficients(model) as captured, torch.autocast("cpu", dtype=torch.bfloat16):
        model.loss(tokens(), tokens())[0].backward()
    assert captured.final_streams.dtype == torch.bfloat16
    assert {h.dtype for h in captured[0]} == {torch.float32}
    assert model.sites[0].phi.grad.dtype == torch.float32


def test_capture_follows_depth_under_recomputation():
    model = randomised(build(num_layers=3, recompute_layers=1))
    text = tokens()
    with capture_coefficients(model) as captured:
        loss = model.loss(text, text)[0]
        before = [record.h_res.clone() for record in captured]
        loss.backward()  # replays the blocks last to first
        after = [record.h_res for record in captured]
    assert len(before) == 6
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_mixture_of_experts_adds_its_loss():
    model = build(num_experts=4, balance_weight=0.5)
    total, cross_entropy = model.loss(tokens(), tokens())
    # every layer's balance loss is at least 1, and near it for an untrained router
    assert 0.9 < float((total - cross_entropy).detach()) / (0.5 * 2) < 1.5
    assert build().run(tokens())[1] is None


def test_what_is_no_input():
    model = build()
    with pytest.raises(TypeError, match=r"integers below vocab_size, got torch.float32"):
        model(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"shape of the tokens, \(1, 3\), got \(1, 4\)"):
        model.loss(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="max_seq_len is 32"):
        model(tokens(1, 33))


def test_meta_device_initialisation():
    """Large models are made on the meta device and initialised where they live."""
    with torch.device("meta"):
        model = build()
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.reset_parameters()
    assert model.head.weight is model.embedding.weight
    expected = build(seed=1)
    torch.manual_seed(0)
    expected.reset_parameters()
    assert torch.equal(model(tokens()), expected(tokens()))


@pytest.mark.parametrize("connection", CONNECTION_KINDS)
def test_checkpoint_round_trip(connection, tmp_path):
    model, other = randomised(build(connection=connection)), build(seed=1, connection=connection)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(other(tokens()), model(tokens()))

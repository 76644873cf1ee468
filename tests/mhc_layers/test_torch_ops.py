"""The fused site's operators and autograd, on the plain leaves (any device); the kernels have tests of their own."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from birkhoff._registry import installed
from mhc_layers import DEEPSEEK_V4, DEEPSEEK_V41, PAPER, HyperConnection, Transformer, TransformerConfig
from mhc_layers._fused_state import FusedState
from mhc_layers._registry import facts_of, refuse_fused
from mhc_layers._site_ops import PRE_FORWARD, Post, Pre
from mhc_layers._sites import FUNCTIONAL
from mhc_layers._torch_ops import fused_site
from mhc_layers.kernels.options import options_key

CONVENTIONS = {"paper": PAPER, "v4": DEEPSEEK_V4}
OPS = torch.ops.mhc_layers


def problem(n: int, c: int, lead: tuple[int, ...] = (3, 2), dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    rows, k = n * (n + 2), n * c
    params = [draw(rows, k) / k**0.5, draw(rows), *(draw(3).abs() + 0.5).unbind()]
    data = [draw(*lead, n, c), draw(*lead, c), draw(*lead, n, c), draw(*lead, c)]
    return data, params


def site_through_functions(
    x: Tensor, weight: Tensor, *params: Tensor, convention: Any = PAPER
) -> tuple[Tensor, Tensor]:
    """pre, a sublayer, post."""
    options = options_key(convention)
    u, coef, link, proj, *_ = Pre.apply(x, *params, None, options)
    f = torch.tanh(u * weight)
    return u, Post.apply(x, link, f, coef, proj, *params, options)


def twin_sites(n: int, c: int, convention: Any) -> tuple[HyperConnection, HyperConnection]:
    """The same site run by the fused object (on its plain leaves) and by plain torch."""
    torch.manual_seed(3)
    plain = HyperConnection(c, n, torch.nn.Linear(c, c), convention=convention, implementation=FUNCTIONAL)
    with torch.no_grad():
        plain.phi.normal_(std=0.2)
        plain.bias.normal_()
        for alpha in (plain.alpha_pre, plain.alpha_post, plain.alpha_res):
            alpha.fill_(0.7)
    fused = HyperConnection(c, n, torch.nn.Linear(c, c), convention=convention, implementation=fused_site(convention))
    fused.load_state_dict(plain.state_dict())
    return fused, plain


@pytest.mark.parametrize("convention", CONVENTIONS.values(), ids=CONVENTIONS)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
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


@pytest.mark.parametrize("convention", CONVENTIONS.values(), ids=CONVENTIONS)
def test_site_equals_the_plain_site(convention: Any) -> None:
    fused, plain = twin_sites(4, 8, convention)
    x = torch.randn(2, 5, 4, 8)
    results = []
    for site in (fused, plain):
        leaf = x.clone().requires_grad_()
        out = site(leaf)
        out.square().sum().backward()
        results.append([out, leaf.grad, *(parameter.grad for parameter in site.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)


def test_state_carries_the_three_maps() -> None:
    fused, plain = twin_sites(3, 4, PAPER)
    x = torch.randn(2, 3, 4)
    _, state = fused.pre(x)
    assert isinstance(state, FusedState)
    for ours, theirs in zip((state.h_pre, state.h_post, state.h_res), plain.coefficients(x), strict=True):
        torch.testing.assert_close(ours, theirs)


def models(convention: Any, **changes: Any) -> tuple[Transformer, Transformer]:
    config = TransformerConfig(
        vocab_size=32, dim=16, num_layers=2, num_heads=2, max_seq_len=16, convention=convention, **changes
    )
    torch.manual_seed(0)
    plain = Transformer(config)
    fused = Transformer(config)
    fused.load_state_dict(plain.state_dict())
    for model, implementation in ((plain, FUNCTIONAL), (fused, fused_site(convention))):
        for site in model.sites:
            with torch.no_grad():
                site.phi.normal_(std=0.3, generator=torch.Generator().manual_seed(site.index))
                site.alpha_res.fill_(1.0)
            site.requested_implementation = site._implementation = implementation
    return fused, plain


@pytest.mark.parametrize("convention", [PAPER, DEEPSEEK_V4, DEEPSEEK_V41], ids=["paper", "v4", "v41"])
def test_transformer_equals_the_plain_one(convention: Any) -> None:
    tokens = torch.randint(32, (2, 9))
    results = []
    for model in models(convention):
        loss, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-5)


def test_kept_bytes_per_token_are_the_projections_and_one_norm() -> None:
    n, c, tokens = 4, 8, 6
    fused, _ = twin_sites(n, c, PAPER)
    x = torch.randn(tokens, n, c, requires_grad=True)
    f = torch.randn(tokens, c, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        u, state = fused.pre(x)
        fused.post(x, f, state)
    outside = {tensor.untyped_storage().data_ptr() for tensor in (x, f, u, *fused.parameters())}
    extra = sum(size for pointer, size in kept.items() if pointer not in outside)
    assert extra == tokens * 4 * (n * (n + 2) + 1) == tokens * 100


def test_no_streams_sized_gradient_is_stored_by_the_write() -> None:
    """The link's gradient is the incoming gradient itself."""
    (x, f, g, _), params = problem(4, 5, dtype=torch.float32)
    options = options_key(PAPER)
    _, coef, link, proj, *_ = Pre.apply(x.requires_grad_(), *params, None, options)
    out = Post.apply(x, link, f, coef, proj, *params, options)
    (carried,) = torch.autograd.grad(out, link, g, retain_graph=True)
    assert carried.data_ptr() == g.data_ptr()


@pytest.mark.parametrize("absent", ["u", "streams"])
def test_one_output_may_be_unused(absent: str) -> None:
    fused, plain = twin_sites(4, 6, PAPER)
    x = torch.randn(3, 4, 6)
    grads = []
    for site in (fused, plain):
        leaf = x.clone().requires_grad_()
        u, state = site.pre(leaf)
        out = u if absent == "streams" else site.post(leaf, torch.ones(3, 6), state)
        (grad,) = torch.autograd.grad(out.square().sum(), leaf)
        grads.append(grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_operators_pass_opcheck() -> None:
    (x, f, g, gu), params = problem(3, 4, dtype=torch.float32)
    options = options_key(DEEPSEEK_V4)
    _u, coef, proj, rstd, _ = OPS.pre_forward(x, *params, None, options)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.pre_forward.default, (x, *params, None, options), test_utils=checks)
    torch.library.opcheck(OPS.post_forward.default, (x, f, coef), test_utils=checks)
    backward = (g, x, f, proj, params[1], params[3], options)
    torch.library.opcheck(OPS.post_backward.default, backward, test_utils=checks)
    backward = (x, *params, None, proj, rstd, g, gu, coef, options)
    torch.library.opcheck(OPS.pre_backward.default, backward, test_utils=checks)


@pytest.mark.parametrize("dims", [(0, None), (1, None), (None, 0)], ids=["data", "data-1", "parameters"])
def test_vmap_equals_a_loop(dims: tuple[int | None, int | None]) -> None:
    (x, *_), params = problem(2, 3, lead=(4,))
    weight = torch.randn(3, dtype=torch.float64)
    if dims[0] is not None:
        x = torch.stack([x, 2 * x, -x], dims[0])
    else:
        params = [torch.stack([p, p + 0.1, 0.5 * p]) for p in params]
    in_dims = (dims[0], None, *(dims[1],) * 5)

    def run(*args: Tensor) -> Tensor:
        return site_through_functions(*args)[1]

    together = torch.func.vmap(run, in_dims)(x, weight, *params)
    for item in range(3):
        single = run(
            x if dims[0] is None else x.select(dims[0], item),
            weight,
            *(p if dims[1] is None else p[item] for p in params),
        )
        torch.testing.assert_close(together[item], single)


def test_functional_gradients() -> None:
    (x, *_), params = problem(2, 3, lead=(4,))
    weight = torch.randn(3, dtype=torch.float64)
    grad = torch.func.grad(lambda value: site_through_functions(value, weight, *params)[1].square().sum())(x)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(site_through_functions(leaf, weight, *params)[1].square().sum(), leaf)
    torch.testing.assert_close(grad, expected)


def test_forward_mode_agrees_with_differences() -> None:
    fused, _ = twin_sites(3, 4, PAPER)
    x, tangent = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    value, derivative = torch.func.jvp(fused, (x,), (tangent,))
    torch.testing.assert_close(value, fused(x))
    step = 1e-2
    difference = (fused(x + step * tangent) - fused(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(derivative, difference, rtol=1e-2, atol=2e-3)


def test_checkpoint_policy_sees_the_operators() -> None:
    fused, _ = twin_sites(4, 8, PAPER)
    x = torch.randn(3, 4, 8, requires_grad=True)
    seen: list[Any] = []

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if "mhc_layers" in str(op):
            seen.append(op)
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    out = checkpoint(fused, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy))
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    (expected,) = torch.autograd.grad(fused(x).square().sum(), x)
    torch.testing.assert_close(grad, expected)
    assert {OPS.pre_forward.default, OPS.post_forward.default} <= set(seen)


class Recorded(Tensor):
    """A subclass that notes the operators which are called with it."""

    seen: list[str] = []  # noqa: RUF012 - of all instances

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(func))
        with torch._C._DisableTorchDispatch():
            return func(*args, **(kwargs or {}))


def test_a_subclass_sees_the_operators() -> None:
    """Without anybody to see it the implementation is called directly; a subclass, a mode and a profiler do see it."""
    (x, *_), params = problem(3, 4, dtype=torch.float32)
    watched = torch.Tensor._make_subclass(Recorded, x)
    with torch.no_grad():
        PRE_FORWARD(watched, *params, None, options_key(PAPER))
    assert "mhc_layers.pre_forward.default" in Recorded.seen


def test_flops_are_counted() -> None:
    n, c, tokens = 4, 8, 6
    fused, _ = twin_sites(n, c, PAPER)
    x, f = torch.randn(tokens, n, c, requires_grad=True), torch.randn(tokens, c)
    with FlopCounterMode(display=False) as counter:
        _, state = fused.pre(x)
        fused.post(x, f, state).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    assert counts[OPS.pre_forward] >= 2 * tokens * n * c * n * (n + 2)
    assert counts[OPS.pre_backward] >= 2 * counts[OPS.pre_forward] - 4 * tokens * n * c * (n + 2)
    assert {OPS.post_forward, OPS.post_backward} <= set(counts)


def test_flops_of_a_boundary_are_those_of_its_steps() -> None:
    first, second = twin_sites(4, 8, PAPER)[0], twin_sites(4, 8, PAPER)[0]
    x, f = torch.randn(6, 4, 8, requires_grad=True), torch.randn(6, 8)

    def count(fused: bool) -> int:
        with FlopCounterMode(display=False) as counter:
            _, state = first.pre(x)
            if fused:
                y, u, state = first.boundary(x, f, state, second)
            else:
                y = first.post(x, f, state)
                u, state = second.pre(y)
            (second.post(y, f, state).sum() + u.sum()).backward()
        return counter.get_total_flops()

    assert count(fused=True) == count(fused=False)


def test_autocast_leaves_streams_and_coefficients_alone() -> None:
    fused, plain = twin_sites(4, 8, PAPER)
    x = torch.randn(3, 4, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        u, state = fused.pre(x)
        out = fused.post(x, torch.ones(3, 8), state)
        expected = plain.pre(x)[1]
    assert u.dtype == out.dtype == torch.bfloat16
    assert state.coef.dtype == torch.float32
    torch.testing.assert_close(state.h_res, expected.h_res, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_any_number_of_tokens(tokens: int) -> None:
    fused, _ = twin_sites(4, 6, PAPER)
    x = torch.randn(tokens, 4, 6, requires_grad=True)
    out = fused(x)
    out.sum().backward()
    assert out.shape == x.shape == x.grad.shape
    assert fused.phi.grad.shape == fused.phi.shape
    assert torch.isfinite(fused.phi.grad).all()


@pytest.mark.parametrize("convention", [PAPER, DEEPSEEK_V41], ids=["paper", "v41"])
def test_warm_up_runs_all_operators_and_leaves_gradients_alone(convention: Any) -> None:
    fused, _ = twin_sites(4, 6, convention)
    with torch.profiler.profile() as profile:
        fused.implementation.warm_up(fused, torch.float32)
    ran = {event.key for event in profile.key_averages()}
    names = ("pre_forward", "post_forward", "post_backward", "pre_backward", "boundary_forward", "boundary_backward")
    assert {f"mhc_layers::{name}" for name in (*names, *(f"broadcast_{name}" for name in names[:4]))} <= ran
    assert all(parameter.grad is None for parameter in fused.parameters())


def test_strided_gradients_and_streams() -> None:
    fused, plain = twin_sites(4, 6, PAPER)
    base = torch.randn(4, 5, 6)
    grads = []
    for site in (fused, plain):
        leaf = base.clone().requires_grad_()
        out = site(leaf.transpose(0, 1))
        out.mean(-2).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_refusals_give_reasons() -> None:
    def reasons(**settings: Any) -> str:
        facts = dataclasses.replace(facts_of(HyperConnection(8, 4)), **{"device": "cuda", **settings})
        return refuse_fused(facts)

    assert "CUDA" in reasons(device="cpu")
    assert "connection" in reasons(connection="identity")
    assert "registers" in reasons(num_streams=9)
    assert "epsilon" in reasons(convention=PAPER.replace(norm_eps_place="outside"))
    assert "one rounding" in reasons(convention=PAPER.replace(apply_dtype="activation"))
    if installed("triton"):
        assert reasons() is None


@pytest.mark.slow
@pytest.mark.parametrize("convention", [PAPER, DEEPSEEK_V41], ids=["paper", "v41"])
def test_compiles_to_one_graph(convention: Any) -> None:
    fused, _ = models(convention)
    tokens = torch.randint(32, (2, 9))
    expected, _ = fused.loss(tokens[:, :-1], tokens[:, 1:])
    expected.backward()
    grads = [parameter.grad.clone() for parameter in fused.parameters()]
    fused.zero_grad()
    compiled = torch.compile(lambda a, b: fused.loss(a, b)[0], fullgraph=True, backend="aot_eager")
    loss = compiled(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for parameter, grad in zip(fused.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-3, atol=1e-6)

"""A first site that reads one embedding in place of n equal streams equals the site of n equal streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mhc_layers import DEEPSEEK_V4, DEEPSEEK_V41, PAPER, HyperConnection, capture_coefficients, expand_streams
from mhc_layers._broadcast_ops import BroadcastPost, BroadcastPre
from mhc_layers._fused_state import FusedState
from mhc_layers._sites import FUNCTIONAL
from mhc_layers._torch_ops import fused_site
from mhc_layers.kernels.options import options_key
from mhc_layers.models.transformer import WalkState
from mhc_layers.parallel.engine import Precision
from mhc_layers.parallel.pipeline import Stage
from mhc_layers.parallel.recompute import apply_recompute
from tests.mhc_layers.test_boundary_ops import make_sites
from tests.mhc_layers.test_read_norm import models
from tests.mhc_layers.test_torch_ops import OPS, problem

CONVENTIONS = [PAPER, DEEPSEEK_V4, DEEPSEEK_V41]


def named(convention: Any) -> str:
    return convention.name


def first_site(n: int, c: int, convention: Any, norm: bool) -> HyperConnection:
    (site,) = make_sites(n, c, convention, 1)
    site.requested_implementation = site._implementation = fused_site(convention)
    if norm:
        site.norm = nn.RMSNorm(c, eps=1e-3)
        with torch.no_grad():
            site.norm.weight.normal_(generator=torch.Generator().manual_seed(2))
    return site


def through(site: HyperConnection, e: Tensor, folded: bool) -> list[Tensor]:
    """u, the next streams, and h_pre."""
    x = e.unsqueeze(-2) if folded else expand_streams(e, site.num_streams)
    u, state = site.pre(x, broadcast=folded)
    return [u, site.post(x, torch.tanh(u), state), state.h_pre]


@pytest.mark.parametrize("norm", [False, True], ids=["read", "norm"])
@pytest.mark.parametrize("convention", CONVENTIONS, ids=named)
@pytest.mark.parametrize("n", [2, 3, 4])
def test_equals_the_site_of_equal_streams(n: int, convention: Any, norm: bool) -> None:
    site = first_site(n, 10, convention, norm)
    results = []
    for folded in (True, False):
        e = torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(4)).requires_grad_()
        outputs = through(site, e, folded)
        weights = [torch.linspace(-1.0, 1.0, output.numel()).view(output.shape) for output in outputs]
        grads = torch.autograd.grad(outputs, [e, *site.parameters()], weights)
        results.append([*outputs, *grads])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


def test_bfloat16_streams_have_nearly_the_same_bits() -> None:
    """Only the projection sums in another order; read and write repeat every rounding."""
    site = first_site(4, 64, PAPER, True)
    e = torch.randn(40, 64).bfloat16()
    with torch.no_grad():
        for ours, theirs in zip(through(site, e, True)[:2], through(site, e, False)[:2], strict=True):
            assert (ours != theirs).float().mean() < 1e-3
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


def by_functions(e: Tensor, gain: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
    options = options_key(DEEPSEEK_V4)
    u, coef, link, proj, *_ = BroadcastPre.apply(e, *params, None, options, gain, 1e-3)
    return u, BroadcastPost.apply(e, link, torch.tanh(u), coef, proj, *params, options)


def test_gradients_and_their_gradients_are_exact() -> None:
    _, params = problem(2, 3)
    e, gain = torch.randn(4, 1, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (e, gain, *params)]
    assert torch.autograd.gradcheck(by_functions, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(by_functions, inputs, fast_mode=True, atol=1e-4)


def test_operators_pass_opcheck() -> None:
    (_, f, g, gu), params = problem(3, 4, dtype=torch.float32)
    e, options, gain = f.unsqueeze(-2).contiguous(), options_key(DEEPSEEK_V4), torch.randn(4)
    checks = ("test_schema", "test_faketensor")

    def check(op: Any, *args: Any) -> Any:
        torch.library.opcheck(op.default, args, test_utils=checks)
        return op(*args)

    for norm in ((), (gain, 1e-3)):
        _, coef, proj, rstd, inverse = check(OPS.broadcast_pre_forward, e, *params, None, options, *norm)
        backward = (e, *params, None, proj, rstd, g, gu, coef, options, *((gain, inverse) if norm else ()))
        check(OPS.broadcast_pre_backward, *backward)
    check(OPS.broadcast_post_forward, e, f, coef)
    check(OPS.broadcast_post_backward, g, e, f, proj, params[1], params[3], options)


def test_vmap_equals_a_loop() -> None:
    _, params = problem(2, 3)
    e, gain = torch.randn(3, 4, 1, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    together = torch.func.vmap(by_functions, (0, *(None,) * 6))(e, gain, *params)
    for item in range(3):
        for ours, theirs in zip(together, by_functions(e[item], gain, *params), strict=True):
            torch.testing.assert_close(ours[item], theirs)


@pytest.mark.parametrize("used", ["u", "streams"])
def test_one_output_may_be_unused(used: str) -> None:
    site = first_site(4, 6, PAPER, True)
    grads = []
    for folded in (True, False):
        e = torch.ones(3, 6).cumsum(0).requires_grad_()
        x = e.unsqueeze(-2) if folded else expand_streams(e, 4)
        u, state = site.pre(x, broadcast=folded)
        out = u if used == "u" else site.post(x, torch.ones(3, 6), state)
        grads.append(torch.autograd.grad(out.square().sum(), [e, site.phi]))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("implementation", "connection"),
    [(FUNCTIONAL, "mhc"), *(("auto", kind) for kind in ("mhc", "identity", "hc", "mhc_static", "residual"))],
)
def test_other_implementations_copy_it(implementation: Any, connection: str) -> None:
    torch.manual_seed(0)
    site = HyperConnection(8, 4, connection=connection, implementation=implementation)
    e = torch.randn(3, 8)
    for ours, theirs in zip(through(site, e, True)[:2], through(site, e, False)[:2], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_convention_with_rounded_writes_copies_it() -> None:
    """The fused row refuses this convention, so nothing folds; and the write needs the streams themselves."""
    site = HyperConnection(8, 4, convention=PAPER.replace(apply_dtype="activation"))
    e = torch.randn(3, 8).bfloat16()
    for ours, theirs in zip(through(site, e, True)[:2], through(site, e, False)[:2], strict=True):
        assert torch.equal(ours, theirs)


def test_double_precision_and_forward_mode_copy_it() -> None:
    site = first_site(3, 6, PAPER, True).double()
    e = torch.randn(4, 6, dtype=torch.float64)
    for ours, theirs in zip(through(site, e, True), through(site, e, False), strict=True):
        torch.testing.assert_close(ours, theirs)
    site = site.float()
    e, tangent = e.float(), torch.randn(4, 6)
    derivatives = [
        torch.func.jvp(lambda e, f=folded: tuple(through(site, e, f)[:2]), (e,), (tangent,)) for folded in (True, False)
    ]
    for ours, theirs in zip(*(pair[1] for pair in derivatives), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_one_stream_is_taken_for_all_only_when_told() -> None:
    site = first_site(4, 6, PAPER, False)
    with pytest.raises(ValueError, match=r"\(4, 6\)"):
        site.pre(torch.zeros(3, 1, 6))
    with pytest.raises(ValueError, match=r"one stream \(\.\.\., 1, 6\)"):
        site.pre(torch.zeros(3, 4, 6), broadcast=True)


@pytest.mark.parametrize("convention", CONVENTIONS, ids=named)
def test_a_transformer_folds_its_first_site(convention: Any) -> None:
    fused, _ = models(convention)
    tokens = torch.randint(32, (2, 9))
    assert fused.first_streams(tokens).shape == (2, 9, 1, 16)
    results = []
    for folded in (True, False):
        if not folded:
            fused.first_streams = fused.embed
        loss, _ = fused.loss(tokens[:, :-1], tokens[:, 1:])
        results.append([loss, *torch.autograd.grad(loss, list(fused.parameters()))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_a_first_stage_folds_its_first_site() -> None:
    fused, _ = models(PAPER)
    tokens = torch.randint(32, (2, 9))
    state, sites = WalkState(fused.first_streams(tokens)), list(fused.sites)[:2]
    expected = fused.walk(state, fused.context(9), sites).x
    stage = Stage(fused, 0, 2, Precision(device_type="cpu"))
    with FlopCounterMode(display=False) as counter:
        assert torch.equal(stage(tokens), expected)
    assert OPS.broadcast_pre_forward in counter.get_flop_counts()["Global"]


@pytest.mark.parametrize("convention", [PAPER, DEEPSEEK_V41], ids=named)
def test_recompute_blocks_start_from_the_embedding(convention: Any) -> None:
    tokens = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(0))
    results = []
    for block in (None, 3):
        fused, _ = models(convention)
        if block:
            apply_recompute(fused, block=block)
        loss, _ = fused.loss(tokens[:, :-1], tokens[:, 1:])
        results.append([loss, *torch.autograd.grad(loss, list(fused.parameters()))])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_captured_streams_have_all_n() -> None:
    fused, _ = models(PAPER)
    with capture_coefficients(fused) as captured, torch.no_grad():
        fused(torch.zeros(1, 5, dtype=torch.long))
    assert captured.streams[0].shape == (1, 5, 4, 16)
    assert torch.equal(captured.streams[0], fused.embed(torch.zeros(1, 5, dtype=torch.long)))


def test_the_products_are_those_of_one_stream() -> None:
    n, c, tokens = 4, 8, 6
    site = first_site(n, c, PAPER, False)
    e = torch.randn(tokens, 1, c, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        u, state = site.pre(e, broadcast=True)
        assert isinstance(state, FusedState)
        site.post(e, u, state).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    rows = n * (n + 2)
    assert 2 * tokens * c * rows <= counts[OPS.broadcast_pre_forward] < 2 * tokens * c * (rows + 2 * n + 2)
    assert {OPS.broadcast_post_forward, OPS.broadcast_post_backward, OPS.broadcast_pre_backward} <= set(counts)

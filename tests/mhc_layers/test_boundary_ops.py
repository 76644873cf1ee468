"""The fused boundary equals write then read, in values and in every gradient; on CPU through the plain rows."""

import pytest
import torch
from torch import Tensor

from mhc_layers import DEEPSEEK_V4, DEEPSEEK_V41, PAPER, HyperConnection, reference
from mhc_layers._boundary_ops import boundary
from mhc_layers._fused_state import FusedState, SiteParams
from mhc_layers._site_ops import Post, Pre
from mhc_layers._torch_ops import fused_site
from mhc_layers.conventions import Convention
from mhc_layers.kernels.options import options_key

FUSED = fused_site(PAPER)
OPS = torch.ops.mhc_layers
CONVENTIONS = [PAPER, DEEPSEEK_V4, DEEPSEEK_V41]


def make_sites(n: int, c: int, convention: Convention, count: int = 3, device: str = "cpu") -> list[HyperConnection]:
    generator = torch.Generator(device=device).manual_seed(3)
    sites = [HyperConnection(c, n, convention=convention, index=index, device=device) for index in range(count)]
    with torch.no_grad():
        for site in sites:
            site.phi.normal_(std=(n * c) ** -0.5, generator=generator)
            site.bias.normal_(std=0.5, generator=generator)
            for gate in (site.alpha_pre, site.alpha_post, site.alpha_res):
                gate.fill_(0.9)
    return sites


def walk(sites: list[HyperConnection], x: Tensor, fs: list[Tensor], fused: bool) -> list[Tensor]:
    """Every read and the last streams of a chain with fixed sublayer outputs."""
    steps = fused_site(sites[0].convention)
    u, state = steps.pre(x, sites[0])
    outputs = [u]
    for site, f in zip(sites[1:], fs, strict=False):
        if fused:
            x, u, state = steps.boundary(x, f, state, site)
        else:
            x = steps.post(x, f, state)
            u, state = steps.pre(x, site, state.h_pre)
        outputs.append(u)
    return [*outputs, steps.post(x, fs[-1], state), state.h_pre]


def make_inputs(sites: list[HyperConnection], lead: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    n, c, device = sites[0].num_streams, sites[0].dim, sites[0].phi.device
    generator = torch.Generator(device=device).manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype).requires_grad_()

    return normal(*lead, n, c), [normal(*lead, c) for _ in sites]


def gradients(outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator(device=outputs[0].device).manual_seed(7)
    seeds = [torch.randn(o.shape, generator=generator, device=o.device).to(o.dtype) for o in outputs]
    return list(torch.autograd.grad(outputs, leaves, seeds))


@pytest.mark.parametrize("convention", CONVENTIONS, ids=lambda convention: convention.name)
@pytest.mark.parametrize("n", [1, 3, 4])
def test_boundary_equals_write_then_read(n: int, convention: Convention) -> None:
    sites = make_sites(n, 10, convention)
    x, fs = make_inputs(sites, (2, 5), torch.float32)
    leaves = [x, *fs, *(parameter for site in sites for parameter in site.parameters())]
    separate, fused = walk(sites, x, fs, False), walk(sites, x, fs, True)
    for got, expected in zip(fused, separate, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    for got, expected in zip(gradients(fused, leaves), gradients(separate, leaves), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_boundary_in_bfloat16_rounds_where_the_separate_steps_round() -> None:
    sites = make_sites(4, 16, PAPER)
    x, fs = make_inputs(sites, (7,), torch.bfloat16)
    for got, expected in zip(walk(sites, x, fs, True), walk(sites, x, fs, False), strict=True):
        assert torch.equal(got, expected)


def test_a_loss_on_the_streams_between_the_sites_adds_to_their_gradient() -> None:
    sites = make_sites(4, 6, PAPER, count=2)
    x, (f, _) = make_inputs(sites, (3,), torch.float32)
    found = []
    for fused in (False, True):
        u, state = FUSED.pre(x, sites[0])
        if fused:
            between, u_next, state = FUSED.boundary(x, f, state, sites[1])
        else:
            between = FUSED.post(x, f, state)
            u_next, state = FUSED.pre(between, sites[1])
        loss = between.square().sum() + u_next.sum() + u.sum()
        found.append(torch.autograd.grad(loss, [x, f, sites[0].phi, sites[1].phi]))
    for got, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, expected)


def test_only_the_read_of_the_next_site_used() -> None:
    """Absent gradients: the last site is read and never written."""
    sites = make_sites(4, 6, PAPER, count=2)
    x, (f, _) = make_inputs(sites, (3,), torch.float32)
    _, state = FUSED.pre(x, sites[0])
    _, u, _ = FUSED.boundary(x, f, state, sites[1])
    got = torch.autograd.grad(u.sum(), [x, f, sites[1].phi])
    _, state = FUSED.pre(x, sites[0])
    u, _ = FUSED.pre(FUSED.post(x, f, state), sites[1])
    for value, expected in zip(got, torch.autograd.grad(u.sum(), [x, f, sites[1].phi]), strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("convention", [PAPER, DEEPSEEK_V41], ids=lambda convention: convention.name)
def test_gradient_and_second_gradient_by_differences(convention: Convention) -> None:
    sites = [site.double() for site in make_sites(2, 3, convention.replace(num_iters=3), count=2)]
    x, fs = make_inputs(sites, (2,), torch.float64)
    first, second = (SiteParams.of(site) for site in sites)
    options, delayed = options_key(sites[0].convention), bool(convention.read_delay)
    weights = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(2, 2) if delayed else None

    def run(x: Tensor, f: Tensor, g: Tensor, phi: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        u, *state, _ = Pre.apply(x, *first, weights, options)
        after = second._replace(phi=phi, bias=bias)
        between, u_next, last = boundary(x, f, FusedState(*state, first, options), after, options, delayed)
        return u, u_next, Post.apply(between, last.link, g, last.coef, last.proj, *after, options)

    inputs = (x, *fs, second.phi, second.bias)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_operators_pass_opcheck() -> None:
    sites = make_sites(4, 6, PAPER, count=2)
    x, (f, _) = make_inputs(sites, (3,), torch.float32)
    _, state = FUSED.pre(x, sites[0])
    after, options = SiteParams.of(sites[1]), options_key(PAPER)
    detached = [tensor.detach() for tensor in (x, f, state.coef, *after)]
    forward = (*detached, options, False)
    torch.library.opcheck(OPS.boundary_forward.default, forward)
    x_next, u, coef, proj, rstd, _ = OPS.boundary_forward.default(*forward)
    before = (state.proj, *(tensor.detach() for tensor in (state.params.bias, state.params.alpha_post)), options)
    saved = (f.detach(), None, *before, x_next, proj, rstd, *detached[3:], options)
    torch.library.opcheck(OPS.boundary_backward.default, (x.detach(), None, u, torch.zeros_like(coef), x_next, *saved))


def test_vmap_over_tokens() -> None:
    sites = make_sites(3, 5, PAPER, count=2)
    x, fs = make_inputs(sites, (4, 2), torch.float32)

    def run(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return walk(sites, x, [first, second], True)[2]

    torch.testing.assert_close(torch.vmap(run)(x, *fs), run(x, *fs))


@pytest.mark.slow
def test_compiles_without_a_break() -> None:
    sites = make_sites(4, 8, PAPER)
    x, fs = make_inputs(sites, (6,), torch.float32)
    leaves = [x, *fs, *(parameter for site in sites for parameter in site.parameters())]

    def run(x: Tensor, fs: list[Tensor]) -> list[Tensor]:
        return walk(sites, x, fs, True)

    eager = run(x, fs)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(x, fs)
    for got, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(got, expected)
    for got, expected in zip(gradients(compiled, leaves), gradients(eager, leaves), strict=True):
        torch.testing.assert_close(got, expected)


SHAPES = [(4, 1280, 130), (4, 1000, 7), (3, 333, 17), (2, 1001, 33), (6, 256, 20), (4, 90, 1)]


@pytest.mark.parametrize("convention", [PAPER, DEEPSEEK_V41], ids=lambda convention: convention.name)
@pytest.mark.parametrize(("n", "c", "m"), [*SHAPES[1:4], SHAPES[5]])
def test_gradients_of_the_gates_err_by_the_rounding_of_their_terms(
    n: int, c: int, m: int, convention: Convention
) -> None:
    sites = make_sites(n, c, convention)
    x, fs = make_inputs(sites, (m,), torch.bfloat16)
    check_gates(sites, x, fs, gradients(walk(sites, x, fs, True), gates_of(sites)), GATES_OF_FLOAT64)


@pytest.mark.gpu
@pytest.mark.parametrize("convention", CONVENTIONS, ids=lambda convention: convention.name)
@pytest.mark.parametrize(("n", "c", "m"), SHAPES)
def test_boundary_on_the_gpu_equals_the_separate_steps(n: int, c: int, m: int, convention: Convention) -> None:
    """bf16 streams: the stored streams are the same bits where both round alike, gradients agree within rounding."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    sites = make_sites(n, c, convention, device="cuda")
    x, fs = make_inputs(sites, (m,), torch.bfloat16)
    separate, fused = walk(sites, x, fs, False), walk(sites, x, fs, True)
    for got, expected in zip(fused, separate, strict=True):
        assert relative(got, expected) < 1e-3  # a few values round the other way: fp32 sums in another order
    gates = gates_of(sites)
    leaves = [x, *fs, *(parameter for site in sites for parameter in (site.phi, site.bias)), *gates]
    ours, theirs = gradients(fused, leaves), gradients(separate, leaves)
    for got, expected in zip(ours[: -len(gates)], theirs[: -len(gates)], strict=True):
        assert relative(got, expected) < 4e-3
    check_gates(sites, x, fs, ours[-len(gates) :], GATES_OF_FLOAT64)
    check_gates(sites, x, fs, theirs[-len(gates) :], GATES_OF_FLOAT64)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())


#: Error of a gate's gradient, in units of what follows; rounding to bfloat16 errs by up to 2^-8, 1.7e-3 of a norm.
GATES_OF_FLOAT64 = 4e-3


def gates_of(sites: list[HyperConnection]) -> list[Tensor]:
    return [gate for site in sites for gate in (site.alpha_pre, site.alpha_post, site.alpha_res)]


def check_gates(sites: list[HyperConnection], x: Tensor, fs: list[Tensor], got: list[Tensor], tolerance: float) -> None:
    """The gradient of a gate is a sum over tokens, coefficients and channels, whose terms cancel.

    A relative error of the sum says little: the steps of a site one by one err by 57 percent of it at one of these
    shapes. What is rounded are the factors of the terms, so their absolute values bound the error.
    """
    for value, (exact, terms) in zip(got, gates_in_float64(sites, x, fs), strict=True):
        assert abs(float(value) - exact) <= tolerance * terms, (float(value), exact, terms)


def gates_in_float64(sites: list[HyperConnection], x: Tensor, fs: list[Tensor]) -> list[tuple[float, float]]:
    """Gradients of the gates of :func:`walk` in float64, and the sums of the absolute values of their terms.

    A gate moves a coefficient, whose gradient is an inner product over channels: of the gradient of u with a stream, of
    that of a next stream with f or with a stream.
    """
    n, delayed = x.shape[-2], sites[0].convention.read_delay
    streams, maps = [x.detach().double().requires_grad_()], []
    inputs = [f.detach().double() for f in fs]
    gates = [gate.detach().double().requires_grad_() for gate in gates_of(sites)]
    first = torch.eye(n, dtype=torch.float64, device=x.device)[0].expand(x.shape[:-1])

    def coefficients(index: int, alphas: list[Tensor]) -> reference.Coefficients:
        site, (pre, post, res) = sites[index], alphas
        return reference.coefficients(
            streams[index], site.phi.double(), site.bias.double(), (pre, post, res), site.convention
        )

    outputs = []
    for index, f in enumerate(inputs):
        maps.append(coefficients(index, gates[3 * index : 3 * index + 3]))
        h_read = (maps[index - 1].h_pre if index else first) if delayed else maps[index].h_pre
        outputs.append(reference.read(streams[index], h_read))
        streams.append(reference.eq3_next_streams(streams[index], f, maps[index].h_res, maps[index].h_post))
    outputs += [streams[-1], maps[-1].h_pre]
    generator = torch.Generator(device=x.device).manual_seed(7)
    dtypes = [x.dtype] * (len(outputs) - 1) + [torch.float32]
    seeds = [
        torch.randn(output.shape, generator=generator, device=output.device).to(dtype).double()
        for output, dtype in zip(outputs, dtypes, strict=True)
    ]
    found = torch.autograd.grad(outputs, [*gates, *streams], seeds, retain_graph=True, allow_unused=True)
    exact, g = found[: len(gates)], found[len(gates) :]

    results = []
    for index, f in enumerate(inputs):
        writes = g[index + 1].abs()
        by_stream = writes @ streams[index].detach().abs().mT
        reads = [] if delayed and index + 1 == len(sites) else [index + 1 if delayed else index]
        by_read = sum(
            ((streams[i].detach() * seeds[i].unsqueeze(-2)).abs().sum(-1) for i in reads), torch.zeros_like(first)
        )
        if index + 1 == len(sites):
            by_read = by_read + seeds[-1].abs()
        terms = (by_read, (writes * f.unsqueeze(-2).abs()).sum(-1), by_stream)
        for kind, name in enumerate(("h_pre", "h_post", "h_res")):
            step, moved = 1e-6, []
            for sign in (1, -1):
                alphas = [gate.detach() for gate in gates[3 * index : 3 * index + 3]]
                alphas[kind] = alphas[kind] + sign * step
                with torch.no_grad():
                    moved.append(getattr(coefficients(index, alphas), name))
            slope = (moved[0] - moved[1]) / (2 * step)
            results.append((float(exact[3 * index + kind]), float((slope.abs() * terms[kind]).sum())))
    return results

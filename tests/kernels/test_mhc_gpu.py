"""The fused layer on a GPU: leaves and autograd against float64, determinism, graphs, compilation, kept memory."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mhc_layers._recompute  # noqa: F401 - registers an operator
from mhc_layers import DEEPSEEK_V4, DEEPSEEK_V41, PAPER, HyperConnection, Transformer, TransformerConfig
from mhc_layers._fused_state import FusedState
from mhc_layers._torch_ops import FusedSite
from mhc_layers.kernels.table import leaf, restricted_to
from mhc_layers.kernels.triton.configs import ProjectConfig
from tests.kernels.mhc_cases import leaves_chain, make_problem, oracle, relative_error

pytestmark = pytest.mark.gpu

STREAMS = ("u", "out", "dx", "df")
TOLERANCE = {torch.float32: (1e-6, 5e-6), torch.float16: (3e-4, 3e-5), torch.bfloat16: (1.8e-3, 1e-4)}


SLOW = pytest.mark.slow  # each combination of n, C, dtype and convention compiles for some seconds


@pytest.mark.parametrize(
    ("n", "c", "tokens", "dtype", "convention"),
    [
        (4, 1000, 2050, torch.bfloat16, PAPER),
        (4, 1000, 7, torch.bfloat16, PAPER),
        (4, 1000, 0, torch.bfloat16, PAPER),
        (3, 1000, 129, torch.bfloat16, PAPER),
        pytest.param(4, 1280, 2048, torch.bfloat16, DEEPSEEK_V4, marks=SLOW),
        pytest.param(4, 4096, 1000, torch.bfloat16, PAPER, marks=SLOW),
        pytest.param(4, 512, 333, torch.float32, DEEPSEEK_V4, marks=SLOW),
        pytest.param(4, 512, 300, torch.float16, PAPER, marks=SLOW),
        pytest.param(2, 768, 65, torch.bfloat16, PAPER, marks=SLOW),
        pytest.param(1, 300, 50, torch.bfloat16, PAPER, marks=SLOW),
        pytest.param(6, 640, 200, torch.bfloat16, PAPER, marks=SLOW),
        pytest.param(8, 512, 200, torch.bfloat16, DEEPSEEK_V4, marks=SLOW),
    ],
)
@pytest.mark.parametrize("rows", ["triton", "default"])
def test_site_equals_float64(n: int, c: int, tokens: int, dtype: torch.dtype, convention: Any, rows: str) -> None:
    problem = make_problem(tokens, n, c, dtype, device="cuda")
    exact = oracle(problem, convention)
    with restricted_to("triton") if rows == "triton" else contextlib.nullcontext():
        first, second = (leaves_chain(problem, convention, lambda name: leaf(name, problem.x)) for _ in range(2))
    rounded, summed = TOLERANCE[dtype]
    errors = {name: relative_error(first[name], exact[name]) for name in exact}
    for name, error in errors.items():
        assert error <= (rounded if name in STREAMS else summed), errors
    assert all(torch.equal(first[name], second[name]) for name in first), "not bitwise reproducible"


def test_projection_does_not_lose_accuracy_with_the_number_of_channels() -> None:
    """Sums over all of K = 28672 in one program: the tensor cores' own accumulator has 7e-5 there."""
    problem = make_problem(128, 4, 7168, torch.bfloat16, device="cuda")
    with restricted_to("triton"):
        slabs, _ = leaf("project", problem.x)(problem.x, problem.phi, config=ProjectConfig(64, 128, 1, 4, 4))
    assert slabs.shape[0] == 1
    exact = problem.x.double().flatten(1) @ problem.phi.double().T
    assert relative_error(slabs[0], exact) <= 4e-6  # 2.5e-6 is what two bfloat16 terms of phi leave out


def sites(n: int, c: int, convention: Any) -> tuple[HyperConnection, HyperConnection]:
    torch.manual_seed(0)
    plain = HyperConnection(c, n, torch.nn.Identity(), convention=convention, implementation="functional")
    with torch.no_grad():
        plain.phi.normal_(std=(n * c) ** -0.5)
        plain.bias.normal_(std=0.5)
        for alpha in (plain.alpha_pre, plain.alpha_post, plain.alpha_res):
            alpha.fill_(0.9)
    fused = HyperConnection(c, n, torch.nn.Identity(), convention=convention)
    fused.load_state_dict(plain.state_dict())
    return fused.cuda(), plain.cuda()


@pytest.mark.parametrize("convention", [PAPER, pytest.param(DEEPSEEK_V4, marks=SLOW)], ids=["paper", "v4"])
def test_module_chooses_the_kernels_and_agrees(convention: Any) -> None:
    fused, plain = sites(4, 256, convention)
    assert isinstance(fused.pre(torch.zeros(1, 4, 256, device="cuda"))[1], FusedState)
    x = torch.randn(3, 65, 4, 256, device="cuda")
    results = []
    for site in (fused, plain):
        leaf_x = x.clone().requires_grad_()
        out = site(leaf_x)
        out.square().mean().backward()
        results.append([out.detach(), leaf_x.grad, *(parameter.grad for parameter in site.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert relative_error(ours, theirs) < 2e-4


@pytest.mark.slow
def test_delayed_read_chain_agrees() -> None:
    pair = [sites(4, 256, DEEPSEEK_V41) for _ in range(2)]
    x = torch.randn(40, 4, 256, device="cuda")
    grads = []
    for which in (0, 1):
        first, second = pair[0][which], pair[1][which]
        leaf_x = x.clone().requires_grad_()
        u, state = first.pre(leaf_x)
        y, u, state = first.boundary(leaf_x, torch.tanh(u), state, second)
        second.post(y, torch.tanh(u), state).square().mean().backward()
        grads.append([leaf_x.grad, first.phi.grad, first.bias.grad, second.phi.grad])
    for ours, theirs in zip(*grads, strict=True):
        assert relative_error(ours, theirs) < 5e-4


def test_cuda_graph_replays_a_training_step() -> None:
    fused, _ = sites(4, 256, PAPER)
    x = torch.randn(64, 4, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step() -> torch.Tensor:
        fused.zero_grad(set_to_none=False)
        x.grad = None
        out = fused(x)
        out.float().square().mean().backward()
        return out

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.normal_()
        fused.phi.mul_(1.5)  # a replay must see the parameters of the day
    graph.replay()
    out, grad = captured.clone(), fused.phi.grad.clone()
    expected = step()
    assert torch.equal(out, expected)
    assert torch.equal(grad, fused.phi.grad)


@pytest.mark.parametrize("separate", [False, True], ids=["boundaries", "separate"])
def test_cuda_graph_replays_training_steps_of_a_transformer(separate: bool) -> None:
    """A captured step with clipping and optimizer, replayed, trains like the steps one by one."""
    torch.manual_seed(0)
    config = TransformerConfig(vocab_size=64, dim=256, num_layers=2, num_heads=2, max_seq_len=64)
    models = [Transformer(config).cuda() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    assert all(isinstance(site.implementation, FusedSite) for model in models for site in model.sites)
    tokens, targets = torch.randint(64, (2, 4, 64), device="cuda")
    steps = []
    for model in models:
        if separate:
            for site in model.sites:
                site._implementation = FusedSite(site.convention)  # each its own: no boundary is fused
        rate = torch.tensor(1e-2, device="cuda")
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, capturable=True, foreach=True)

        def step(model: Transformer = model, optimizer: torch.optim.Optimizer = optimizer) -> torch.Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss, _ = model.loss(tokens, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            optimizer.step()
            return loss.detach()

        steps.append(step)
    for step in steps:
        for _ in range(3):
            step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = steps[0]()
    for _ in range(5):
        graph.replay()
        expected = steps[1]()
        torch.testing.assert_close(captured, expected, rtol=1e-3, atol=1e-4)
    assert float(expected) < 0.9 * float(torch.tensor(64.0).log())


def test_addresses_that_kernels_are_not_compiled_for() -> None:
    """Launches are prepared for addresses at 16 bytes; others, and other dtypes in between, give the same values."""
    x = torch.randn(40, 4, 256, device="cuda")
    coef = torch.rand(40, 24, device="cuda")
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        streams = x.to(dtype)
        expected = leaf("read_forward", streams)(streams, coef)
        buffer = torch.empty(streams.numel() + 1, dtype=dtype, device="cuda")
        buffer[1:] = streams.flatten()
        shifted = buffer[1:].view_as(streams)
        for _ in range(2):
            assert torch.equal(leaf("read_forward", shifted)(shifted, coef), expected)
            assert torch.equal(leaf("read_forward", streams)(streams, coef), expected)
        assert relative_error(expected, (coef[:, :4, None] * streams.double()).sum(1)) < 2e-3


def test_threads_launch_at_once() -> None:
    """Prepared launches are shared by threads, each with a stream of its own."""
    fused, _ = sites(4, 256, PAPER)
    inputs = [torch.randn(64, 4, 256, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    expected = [fused(x) for x in inputs]
    torch.cuda.synchronize()
    wrong = []

    def work(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                if not torch.equal(fused(inputs[index]), expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_modes_see_the_backward_in_its_own_thread() -> None:
    """Operators go past the dispatcher unless somebody listens; on a GPU the backward runs in another thread."""
    fused, _ = sites(4, 256, PAPER)
    x = torch.randn(64, 4, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        fused(x).float().sum().backward()
    counted = {str(op) for op in counter.get_flop_counts()["Global"]}
    names = ("pre_forward", "post_forward", "post_backward", "pre_backward")
    assert {f"mhc_layers.{name}" for name in names} <= counted


def test_kept_memory_is_a_hundred_bytes_a_token() -> None:
    tokens, c = 16384, 256
    fused, _ = sites(4, c, PAPER)
    x = torch.randn(tokens, 4, c, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    f = torch.randn(tokens, c, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    u, state = fused.pre(x)
    out = fused.post(x, f, state)
    del u, state, out

    def requested() -> int:
        torch.cuda.synchronize()
        return torch.cuda.memory_stats()["requested_bytes.all.current"]  # not what the allocator rounds it to

    before = requested()
    u, state = fused.pre(x)
    out = fused.post(x, f, state)
    del state
    kept = requested() - before - u.nbytes - out.nbytes
    assert kept <= 100 * tokens + 4096


def test_peak_is_what_is_counted() -> None:
    """``measured/layer_kernels.md``, "Memory": ten streams' worth of results and half a one, at most."""
    tokens, c = 4096, 1280
    fused, _ = sites(4, c, PAPER)
    x = torch.randn(tokens, 4, c, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    f = torch.randn(tokens, c, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    given = torch.randn(tokens, c, device="cuda", dtype=torch.bfloat16), torch.randn_like(x)

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        u, state = fused.pre(x)
        return u, fused.post(x, f, state)  # as in a model, nobody holds the state after its second half

    def step() -> object:
        outputs = forward()
        return outputs, torch.autograd.grad(outputs, [x, f, fused.phi], given)

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    results = step()
    torch.cuda.synchronize()
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    del results
    assert peak <= 10.5 * 2 * tokens * c


@pytest.mark.parametrize(("n", "c", "sites"), [(4, 256, 5), (3, 1000, 1), (8, 64, 3)])
def test_a_block_is_rebuilt_to_the_bit(n: int, c: int, sites: int) -> None:
    x = torch.randn(70, n, c, device="cuda", dtype=torch.bfloat16)
    fs = [torch.randn(70, c, device="cuda", dtype=torch.bfloat16) for _ in range(sites - 1)]
    coefs = [torch.rand(70, n * (n + 2), device="cuda") for _ in range(sites)]
    xs, us = torch.ops.mhc_layers.recompute_block(x, fs, coefs[:-1], coefs)
    assert len(xs) == sites - 1
    for index in range(sites):
        assert_same_bits(us[index], leaf("read_forward", x)(x, coefs[index]), f"u of site {index}")
        if index + 1 < sites:
            x = leaf("write_forward", x)(x, fs[index], coefs[index])
            assert_same_bits(xs[index], x, f"streams after site {index}")


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    wrong = got != expected
    largest = float((got.double() - expected.double()).abs().max())
    assert not wrong.any(), f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, by at most {largest:.2e}"


@pytest.mark.slow
def test_compiles_to_one_graph() -> None:
    fused, _ = sites(4, 256, PAPER)
    x = torch.randn(33, 4, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    expected = fused(x)
    (grad,) = torch.autograd.grad(expected.float().square().sum(), x)
    compiled = torch.compile(fused, fullgraph=True)
    out = compiled(x)
    (compiled_grad,) = torch.autograd.grad(out.float().square().sum(), x)
    assert relative_error(out, expected) < 4e-3
    assert relative_error(compiled_grad, grad) < 4e-3

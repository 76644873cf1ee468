"""Sinkhorn, Newton and large-matrix kernels on a GPU against float64, with ``pytest -m gpu`` on this file."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import birkhoff
from birkhoff import _dispatch
from birkhoff._registry import PROJECTIONS, Table
from birkhoff.kernels.cuda import sinkhorn as cuda
from tests.kernels.sinkhorn_cases import UNIT, allowed, expected, expected_gradient, marginal_error, vertices

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

EPS = {"eps_start": 1e-6, "eps_den": 1e-6}


def triton_kernels() -> ModuleType:
    pytest.importorskip("triton")
    from birkhoff.kernels.triton import sinkhorn

    return sinkhorn


@pytest.fixture(params=["cuda", "triton"])
def kernels(request: pytest.FixtureRequest) -> ModuleType:
    return cuda if request.param == "cuda" else triton_kernels()


def check(kernels: ModuleType, rng: np.random.Generator, n: int, std: float, dtype=torch.float32, **options) -> None:
    options = {"method": "knopp", "num_iters": 20, "first": "columns"} | options
    logits = torch.tensor(rng.normal(size=(1027, n, n)) * std, device="cuda").to(dtype)
    grad = torch.tensor(rng.normal(size=(1027, n, n)), device="cuda").to(dtype)
    matrix = kernels.sinkhorn_forward(logits, **options)
    pulled = kernels.sinkhorn_backward(logits, grad, **options)
    assert torch.equal(matrix, kernels.sinkhorn_forward(logits, **options))
    assert torch.equal(pulled, kernels.sinkhorn_backward(logits, grad, **options))
    exact = logits.double().cpu().numpy()
    np.testing.assert_allclose(
        matrix.double().cpu().numpy(), expected(exact, **options), rtol=0, atol=allowed(exact, dtype)
    )
    reference = expected_gradient(exact, grad.double().cpu().numpy(), **options)
    scale = max(1.0, np.abs(reference).max())
    np.testing.assert_allclose(
        pulled.double().cpu().numpy(),
        reference,
        rtol=0,
        atol=scale
        * (
            8 * allowed(exact, torch.float32 if dtype != torch.float64 else dtype)
            + (UNIT[dtype] if dtype in (torch.bfloat16, torch.float16) else 0.0)
        ),
    )
    if options["method"] != "damped" and dtype in (torch.float32, torch.float64):
        axis = 2 if options["first"] == "columns" else 1
        assert marginal_error(matrix, axis) <= (n + 1) * UNIT[dtype]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 13, 16, 24, 32])
def test_contract(kernels: ModuleType, rng: np.random.Generator, n: int) -> None:
    check(kernels, rng, n, 1.0)


#: Logit standard deviation and options, dealt out to the sizes in turn.
VARIANTS: tuple[tuple[float, dict[str, Any]], ...] = (
    (1.0, {"first": "rows", "num_iters": 2}),
    (30.0, {"num_iters": 1}),
    (2.0, {"num_iters": 100, "first": "rows"}),
    (3.0, {"method": "damped", "num_iters": 1, **EPS}),
    (5.0, {"range_cap": 3.0, "num_iters": 25}),
    (2.0, {"method": "damped", "num_iters": 49, "first": "rows", **EPS}),
    (10.0, {"dtype": torch.bfloat16, "num_iters": 21}),
    (8.0, {"method": "damped", "range_cap": 4.0, "num_iters": 2, "dtype": torch.float16, **EPS}),
    (100.0, {"method": "log", "dtype": torch.float64, "num_iters": 3}),
)


@pytest.mark.parametrize("n", range(1, 33))
def test_every_size_with_options_of_its_own(kernels: ModuleType, rng: np.random.Generator, n: int) -> None:
    for std, options in VARIANTS[(n - 1) % 3 :: 3] if kernels is cuda else VARIANTS[n % 9 : n % 9 + 1]:
        check(kernels, rng, n, std, **options)


@pytest.mark.parametrize("n", [3, 4, 8, 16, 32])
def test_rows_first_and_wide_logits(rng: np.random.Generator, n: int) -> None:
    check(cuda, rng, n, 100.0, first="rows")
    check(cuda, rng, n, 10.0, num_iters=50)


def test_variants_of_n_4(kernels: ModuleType, rng: np.random.Generator) -> None:
    check(kernels, rng, 4, 10.0, first="rows")
    check(kernels, rng, 4, 100.0)
    check(kernels, rng, 4, 3.0, method="damped", first="rows", **EPS)
    check(kernels, rng, 4, 5.0, range_cap=3.0, num_iters=7)


@pytest.mark.parametrize("n", [3, 7, 16])
def test_damped_and_capped(rng: np.random.Generator, n: int) -> None:
    check(cuda, rng, n, 3.0, method="damped", num_iters=1, **EPS)
    check(cuda, rng, n, 3.0, method="damped", first="rows", **EPS)
    check(cuda, rng, n, 5.0, range_cap=3.0, first="rows")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(kernels: ModuleType, rng: np.random.Generator, dtype: torch.dtype) -> None:
    check(kernels, rng, 4, 2.0, dtype)


@pytest.mark.parametrize("n", [5, 8, 32])
def test_float64_of_the_cuda_kernels(rng: np.random.Generator, n: int) -> None:
    check(cuda, rng, n, 3.0, torch.float64)


def test_all_vertices(kernels: ModuleType) -> None:
    logits = vertices(100.0).cuda()
    exact = logits.double().cpu().numpy()
    wanted = expected(exact, method="knopp", num_iters=20, first="columns")
    got = kernels.sinkhorn_forward(logits).double().cpu().numpy()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=allowed(exact, torch.float32))


def test_bad_neighbours_and_exact_zeros(kernels: ModuleType) -> None:
    logits = torch.randn(64, 4, 4, device="cuda")
    clean = kernels.sinkhorn_forward(logits)
    spoiled = logits.clone()
    spoiled[5, 0, 1], spoiled[6, 2, 2], spoiled[7, 1, 2] = torch.nan, torch.inf, -torch.inf
    spoiled[8, :, 1] = -torch.inf
    got = kernels.sinkhorn_forward(spoiled)
    others = [k for k in range(64) if k not in (5, 6, 7, 8)]
    assert torch.equal(got[others], clean[others])
    assert got[5].isnan().all() and got[6].isnan().any() and got[7, 1, 2] == 0
    wanted = expected(spoiled[7:9].double().cpu().numpy(), method="knopp", num_iters=20, first="columns")
    np.testing.assert_allclose(got[7:9].double().cpu().numpy(), wanted, rtol=0, atol=1e-6)


def test_a_matrix_does_not_depend_on_its_place_in_the_batch(kernels: ModuleType) -> None:
    logits = torch.randn(300, 4, 4, device="cuda") * 10
    assert torch.equal(kernels.sinkhorn_forward(logits)[17:], kernels.sinkhorn_forward(logits[17:].contiguous()))


def test_misaligned_views(kernels: ModuleType) -> None:
    storage = torch.randn(16 * 100 + 1, device="cuda")
    view = storage[1:].view(100, 4, 4)
    assert torch.equal(kernels.sinkhorn_forward(view), kernels.sinkhorn_forward(view.clone()))


def test_empty_batch_launches_nothing(kernels: ModuleType) -> None:
    empty = torch.empty(0, 4, 4, device="cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        assert kernels.sinkhorn_forward(empty).shape == (0, 4, 4)
        assert kernels.sinkhorn_backward(empty, empty).shape == (0, 4, 4)
    assert not [event for event in profile.events() if "sinkhorn" in event.name]


def test_more_than_two_to_the_31_elements(kernels: ModuleType) -> None:
    batch = (1 << 31) // 16 + 77
    logits = torch.randn(1 << 16, 4, 4, device="cuda", dtype=torch.bfloat16)
    logits = logits.repeat(batch // (1 << 16) + 1, 1, 1)[:batch].contiguous()
    matrix = kernels.sinkhorn_forward(logits)
    assert torch.equal(matrix[-100:], kernels.sinkhorn_forward(logits[-100:].contiguous()))
    pulled = kernels.sinkhorn_backward(logits, logits)
    assert torch.equal(pulled[-100:], kernels.sinkhorn_backward(logits[-100:].contiguous(), logits[-100:].contiguous()))


def test_cuda_graph_replays(kernels: ModuleType) -> None:
    logits = torch.randn(1000, 4, 4, device="cuda")
    kernels.sinkhorn_forward(logits)
    kernels.sinkhorn_backward(logits, logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        matrix = kernels.sinkhorn_forward(logits)
        pulled = kernels.sinkhorn_backward(logits, logits)
    logits.normal_()
    graph.replay()
    assert torch.equal(matrix, kernels.sinkhorn_forward(logits))
    assert torch.equal(pulled, kernels.sinkhorn_backward(logits, logits))


def only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave one fused row and the plain one in the table."""
    rows = tuple(row for row in PROJECTIONS.rows if row.name in (name, "array"))
    monkeypatch.setattr(_dispatch, "PROJECTIONS", Table("projections", rows))
    logits = torch.zeros(2, 4, 4, device="cuda")
    assert str(birkhoff.explain(logits, birkhoff.solvers.SinkhornKnopp())).startswith(f"chosen: {name}")


@pytest.mark.parametrize("row", ["cuda", "triton"])
def test_transforms_reach_the_kernels(monkeypatch: pytest.MonkeyPatch, row: str) -> None:
    """vmap, torch.func and double backward over each fused row give what the plain path gives in float64 on a CPU."""
    only(row, monkeypatch)
    logits = torch.randn(5, 6, 3, 3, dtype=torch.float64, device="cuda")
    weight = torch.arange(9.0, dtype=torch.float64).reshape(3, 3)

    def value(x: torch.Tensor) -> torch.Tensor:
        return (weight.to(x.device) * birkhoff.sinkhorn(x) ** 2).sum()

    host = logits.cpu()
    close = {"rtol": 1e-9, "atol": 1e-12}
    mapped = torch.vmap(birkhoff.sinkhorn, in_dims=1, out_dims=1)(logits)
    torch.testing.assert_close(mapped.cpu(), birkhoff.sinkhorn(host), **close)
    gradients = torch.vmap(torch.func.grad(value))(logits[0])
    torch.testing.assert_close(gradients.cpu(), torch.vmap(torch.func.grad(value))(host[0]), **close)
    second = torch.func.hessian(value)(logits[0, 0])
    torch.testing.assert_close(second.cpu(), torch.func.hessian(value)(host[0, 0]), **close)
    assert torch.autograd.gradgradcheck(birkhoff.sinkhorn, (logits[0, :2].clone().requires_grad_(),))


@pytest.mark.parametrize("row", ["cuda", "triton"])
def test_compiled_and_captured_training_steps(monkeypatch: pytest.MonkeyPatch, row: str) -> None:
    """compile(fullgraph) and a captured forward and backward give the bits of the eager call."""
    only(row, monkeypatch)
    logits = torch.randn(300, 4, 4, device="cuda", requires_grad=True)
    upstream = torch.randn(300, 4, 4, device="cuda")

    def step(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        matrix = birkhoff.sinkhorn(x)
        return matrix, torch.autograd.grad(matrix, x, upstream)[0]

    eager = [tensor.detach() for tensor in step(logits)]
    compiled = torch.compile(birkhoff.sinkhorn, fullgraph=True)(logits)
    assert torch.equal(compiled, eager[0])
    assert torch.equal(torch.autograd.grad(compiled, logits, upstream)[0], eager[1])
    del compiled  # a graph of the default stream that lives during a capture invalidates it
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(logits)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        captured = step(logits)
    graph.replay()
    assert all(torch.equal(got, wanted) for got, wanted in zip(captured, eager, strict=True))


def test_n_above_the_kernels_takes_the_plain_path(rng: np.random.Generator) -> None:
    logits = torch.tensor(rng.normal(size=(7, 40, 40)), device="cuda", dtype=torch.float32)
    choice = str(birkhoff.explain(logits, birkhoff.solvers.SinkhornKnopp()))
    assert "n = 40" in choice and choice.startswith("chosen: array")
    exact = logits.double().cpu().numpy()
    got = birkhoff.sinkhorn(logits).double().cpu().numpy()
    wanted = expected(exact, method="knopp", num_iters=20, first="columns")
    np.testing.assert_allclose(got, wanted, rtol=0, atol=allowed(exact, torch.float32))


def test_cupy_kernels_are_stream_ordered_and_copy_nothing_to_the_host(rng: np.random.Generator) -> None:
    """The public call runs behind work that is still pending on CuPy's stream, and no copy to the host is recorded."""
    cupy = pytest.importorskip("cupy")
    values = rng.normal(size=(1 << 12, 4, 4)).astype(np.float32)
    birkhoff.sinkhorn(cupy.asarray(values))
    with cupy.cuda.Stream(non_blocking=True) as stream:
        big = cupy.ones((1 << 26,), dtype=cupy.float32)
        logits = cupy.zeros(values.shape, dtype=cupy.float32)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(20):
                cupy.sqrt(big, out=big)  # milliseconds of work ahead of the logits
            logits += cupy.float32(1.0)
            logits *= cupy.arange(16, dtype=cupy.float32).reshape(4, 4)
            matrix = birkhoff.sinkhorn(logits)
            stream.synchronize()
    assert not [event.name for event in profile.events() if "DtoH" in event.name]
    exact = np.broadcast_to(np.arange(16.0).reshape(4, 4), (3, 4, 4))
    wanted = expected(exact, method="knopp", num_iters=20, first="columns")
    np.testing.assert_allclose(cupy.asnumpy(matrix)[-3:], wanted, rtol=0, atol=allowed(exact, torch.float32))


def test_cupy_arrays_in_and_out(rng: np.random.Generator) -> None:
    cupy = pytest.importorskip("cupy")
    values = rng.normal(size=(100, 6, 6)).astype(np.float32)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        logits = cupy.asarray(values)
        matrix = cuda.sinkhorn_forward(logits)
        pulled = cuda.sinkhorn_backward(logits, logits)
    stream.synchronize()
    assert isinstance(matrix, cupy.ndarray) and isinstance(pulled, cupy.ndarray)
    shared = torch.from_dlpack(matrix)
    assert torch.equal(shared, cuda.sinkhorn_forward(torch.from_dlpack(logits)))


@pytest.mark.parametrize(("n", "std"), [(2, 40.0), (3, 10.0), (4, 1.0), (4, 10.0), (4, 100.0), (6, 10.0)])
def test_newton(n: int, std: float) -> None:
    pytest.importorskip("triton")
    from birkhoff.kernels.triton.newton import newton_forward

    logits = torch.randn(1 << 14, n, n, device="cuda") * std
    matrix, counts = newton_forward(logits)
    assert max(marginal_error(matrix, 1), marginal_error(matrix, 2)) <= 1e-6
    assert int(counts.max()) < 100


def test_newton_solves_every_vertex() -> None:
    pytest.importorskip("triton")
    from birkhoff.kernels.triton.newton import newton_forward

    matrix, _ = newton_forward(vertices(100.0).cuda())
    assert max(marginal_error(matrix, 1), marginal_error(matrix, 2)) <= 1e-6


@pytest.mark.parametrize(
    ("n", "dtype", "count"),
    [
        (33, torch.float32, 7), (1000, torch.float32, 5), (1001, torch.float64, 4), (4096, torch.float32, 20),
        (9000, torch.float32, 3),
    ],
)  # fmt: skip
def test_large_passes(n: int, dtype: torch.dtype, count: int) -> None:
    from birkhoff.kernels.cuda.large import scaling_passes

    kernel = torch.softmax(torch.randn(n, n, device="cuda", dtype=dtype), 1)
    before = kernel.sum(0)
    left, right, sums, errors, largest = scaling_passes(kernel, before, count)
    again: Any = scaling_passes(kernel, before, count)
    assert all(torch.equal(x, y) for x, y in zip((left, right, sums, errors, largest), again, strict=True))
    exact, total = kernel.double(), before.double()
    for step in range(count):
        scale = 1 / total
        u = 1 / (exact @ scale)
        total = u @ exact
        assert float(errors[step]) == pytest.approx(float((total * scale - 1).abs().max()), abs=n * UNIT[dtype])
    for got, wanted in ((left, u), (right, scale), (sums, total)):
        assert float(((got - wanted) / wanted).abs().max()) <= n * UNIT[dtype]
    assert float(largest) >= float(right.log().abs().max()) * (1 - 1e-5)

"""Sinkhorn launches where memory, streams, threads, graphs and devices are not the usual ones; ``pytest -m gpu``."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np
import pytest
import torch

import birkhoff
from birkhoff.kernels.cuda import compiler
from birkhoff.kernels.cuda import sinkhorn as cuda

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

PADDING, SENTINEL = 64, 777.0


@pytest.fixture(params=["cuda", "triton"])
def kernels(request: pytest.FixtureRequest) -> ModuleType:
    if request.param == "cuda":
        return cuda
    pytest.importorskip("triton")
    from birkhoff.kernels.triton import sinkhorn

    return sinkhorn


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Results lie between sentinels, which must be there afterwards."""
    buffers = []

    def allocate(like: torch.Tensor) -> torch.Tensor:
        buffers.append(torch.full((like.numel() + 2 * PADDING,), SENTINEL, dtype=like.dtype, device=like.device))
        return buffers[-1][PADDING:-PADDING].view(like.shape)

    monkeypatch.setattr(cuda, "_empty_like", allocate)
    monkeypatch.setattr(torch, "empty_like", allocate)
    yield
    assert buffers
    for buffer in buffers:
        assert bool((buffer[:PADDING] == SENTINEL).all() and (buffer[-PADDING:] == SENTINEL).all())
        assert not bool((buffer[PADDING:-PADDING] == SENTINEL).any())


def random(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cuda") -> torch.Tensor:
    return torch.randn(shape, device=device).to(dtype)


@pytest.mark.parametrize(
    ("kernels", "n", "dtype"),
    [
        *((name, n, torch.float32) for name in ("cuda", "triton") for n in (1, 2, 3, 4, 5, 6, 8, 11, 16, 21, 32)),
        *(("cuda", n, torch.bfloat16) for n in (1, 2, 3, 4, 5, 6, 8, 11, 16, 21, 32)),
        ("triton", 4, torch.bfloat16),
    ],
    indirect=["kernels"],
)
@pytest.mark.usefixtures("guarded")
def test_edges_of_tiles(kernels: ModuleType, n: int, dtype: torch.dtype) -> None:
    """Batches around every tile size: the bits of a larger batch, and nothing written beside the result."""
    logits, grad = random(300, n, n, dtype=dtype), random(300, n, n, dtype=dtype)
    matrix, pulled = kernels.sinkhorn_forward(logits), kernels.sinkhorn_backward(logits, grad)
    for batch in (1, 2, 3, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129):
        assert torch.equal(kernels.sinkhorn_forward(logits[:batch]), matrix[:batch]), batch
        assert torch.equal(kernels.sinkhorn_backward(logits[:batch], grad[:batch]), pulled[:batch]), batch


@pytest.mark.parametrize(
    ("kernels", "n", "dtype"),
    [
        *(("cuda", n, dtype) for n in (2, 3, 4, 6, 8, 16, 32) for dtype in (torch.float32, torch.bfloat16)),
        *(("cuda", n, dtype) for n in (4, 8) for dtype in (torch.float16, torch.float64)),
        *(("triton", n, dtype) for n in (4, 8) for dtype in (torch.float32, torch.bfloat16)),
    ],
    indirect=["kernels"],
)
def test_inputs_that_begin_off_16_bytes(kernels: ModuleType, n: int, dtype: torch.dtype) -> None:
    def shifted(offset: int) -> torch.Tensor:
        return random(70 * n * n + offset, dtype=dtype)[offset:].view(70, n, n)

    for first, second in ((1, 0), (0, 1), (1, 3)):
        logits, grad = shifted(first), shifted(second)
        matrix, pulled = kernels.sinkhorn_forward(logits), kernels.sinkhorn_backward(logits, grad)
        assert torch.equal(matrix, kernels.sinkhorn_forward(logits.clone()))
        assert torch.equal(pulled, kernels.sinkhorn_backward(logits.clone(), grad.clone()))


@pytest.mark.parametrize("n", [3, 4, 8, 20])
def test_strides_of_the_public_call(n: int) -> None:
    """Transposed, sliced and expanded logits, and gradients without a stride of their own, as on the CPU in float64."""
    base = random(6, n, n)
    views: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "transposed": lambda x: x.mT,
        "every other": lambda x: x[::2],
        "last axes first": lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        "expanded": lambda x: x[:1].expand(6, n, n),
        "one matrix": lambda x: x[0],
        "more axes": lambda x: x.view(2, 3, n, n).transpose(0, 1),
    }
    weight = random(n, n)
    for name, view in views.items():
        results = []
        for x in (base.clone().requires_grad_(), base.double().cpu().requires_grad_()):
            matrix = birkhoff.sinkhorn(view(x))
            upstream = weight.to(x.device, x.dtype).expand(matrix.shape)  # stride 0 over the batch
            (weighted,) = torch.autograd.grad(matrix, x, upstream, retain_graph=True)
            matrix.sum().backward()  # stride 0 in every axis
            results.append([tensor.detach().double().cpu() for tensor in (matrix, weighted, x.grad)])
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=3e-6, msg=name)


def test_no_call_waits_for_the_device(kernels: ModuleType) -> None:
    logits = random(500, 4, 4).requires_grad_()
    kernels.sinkhorn_backward(logits, kernels.sinkhorn_forward(logits))
    birkhoff.sinkhorn(logits).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.sinkhorn_backward(logits, kernels.sinkhorn_forward(logits))
        birkhoff.sinkhorn(logits).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_current_stream_orders_the_launch(kernels: ModuleType) -> None:
    values, stream = random(5000, 4, 4), torch.cuda.Stream()
    wanted = kernels.sinkhorn_forward(values), kernels.sinkhorn_backward(values, values)
    with torch.cuda.stream(stream):
        logits = torch.full_like(values, torch.nan)
        torch.cuda._sleep(50_000_000)
        logits.copy_(values)
        got = kernels.sinkhorn_forward(logits), kernels.sinkhorn_backward(logits, logits)
        logits.fill_(torch.nan)
    stream.synchronize()
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


@pytest.mark.parametrize("backend", ["cupy", "cuda.bindings"])
def test_the_first_call_may_be_captured(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Compiling and loading inside a capture: nothing was launched before for these options."""
    pytest.importorskip(backend)
    monkeypatch.setattr(compiler, "available", lambda: backend)
    cuda._kernel.cache_clear()
    n = 27 if backend == "cupy" else 29
    logits, graph = random(100, n, n), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        matrix = cuda.sinkhorn_forward(logits, num_iters=48)
        pulled = cuda.sinkhorn_backward(logits, matrix, num_iters=48)
    logits.normal_()
    graph.replay()
    assert torch.equal(matrix, cuda.sinkhorn_forward(logits, num_iters=48))
    assert torch.equal(pulled, cuda.sinkhorn_backward(logits, matrix, num_iters=48))
    cuda._kernel.cache_clear()


def in_threads(count: int, work: Callable[[int], None]) -> None:
    errors: list[BaseException] = []
    start = threading.Barrier(count)

    def run(index: int) -> None:
        try:
            start.wait(60)
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_threads_compile_and_launch_at_once(kernels: ModuleType) -> None:
    """Each thread on a stream of its own, with different iteration counts, some of which ask for more shared memory."""
    logits = random(4000, 9, 9)
    counts = [1, 5, 20, 24, 48, 7]
    got: dict[int, list[torch.Tensor]] = {}
    torch.cuda.synchronize()

    def work(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [kernels.sinkhorn_backward(logits, logits, num_iters=counts[index]) for _ in range(20)]
            torch.cuda.current_stream().synchronize()
        got[index] = results

    in_threads(len(counts), work)
    for index, results in got.items():
        wanted = kernels.sinkhorn_backward(logits, logits, num_iters=counts[index])
        assert all(torch.equal(result, wanted) for result in results)


@pytest.mark.parametrize("n", [4, 16])
def test_a_new_thread_whose_first_work_is_the_launch(kernels: ModuleType, n: int) -> None:
    """With memory from the cache, nothing before the launch makes a context current in the thread."""
    logits = random(1000, n, n)
    wanted = kernels.sinkhorn_forward(logits), kernels.sinkhorn_backward(logits, logits, num_iters=24)
    spare = [torch.empty_like(logits) for _ in range(4)]
    torch.cuda.synchronize()
    del spare
    got = []
    in_threads(1, lambda _: got.append(kernels.sinkhorn_forward(logits)))
    in_threads(1, lambda _: got.append(kernels.sinkhorn_backward(logits, logits, num_iters=24)))
    torch.cuda.synchronize()
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_tensors_of_a_device_that_is_not_the_current_one(kernels: ModuleType) -> None:
    for n in (4, 10):
        logits = random(100, n, n)
        for device in ("cuda:1", "cuda:0", "cuda:1"):
            there = logits.to(device)
            matrix = kernels.sinkhorn_forward(there)
            pulled = kernels.sinkhorn_backward(there, there)
            assert matrix.device == pulled.device == torch.device(device)
            assert torch.equal(matrix.to("cuda:0"), kernels.sinkhorn_forward(logits))
            assert torch.equal(pulled.to("cuda:0"), kernels.sinkhorn_backward(logits, logits))
    assert torch.cuda.current_device() == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_cupy_arrays_of_a_device_that_is_not_the_current_one() -> None:
    cupy = pytest.importorskip("cupy")
    values = np.random.default_rng(0).normal(size=(50, 5, 5)).astype(np.float32)
    wanted = cupy.asnumpy(cuda.sinkhorn_forward(cupy.asarray(values)))
    with cupy.cuda.Device(1):
        there = cupy.asarray(values)
    matrix = cuda.sinkhorn_forward(there)
    assert matrix.device.id == 1
    np.testing.assert_array_equal(cupy.asnumpy(matrix), wanted)


FORKED = """
import os, numpy as np, torch, birkhoff
birkhoff.sinkhorn(torch.zeros(3, 4, 4, requires_grad=True))
assert not torch.cuda.is_initialized(), "work on the CPU has started CUDA"
child = os.fork()
if child == 0:
    matrix = birkhoff.sinkhorn(torch.zeros(3, 4, 4, device="cuda"))
    os._exit(0 if float((matrix - 0.25).abs().max()) < 1e-6 else 1)
assert os.waitpid(child, 0)[1] == 0, "the child failed"
matrix = birkhoff.sinkhorn(torch.zeros(3, 4, 4, device="cuda"))
assert float((matrix - 0.25).abs().max()) < 1e-6
"""


FIRST_BACKWARD = """
import torch, birkhoff
logits, upstream = (torch.randn(1000, 4, 4, device="cuda") for _ in range(2))
matrix = birkhoff.sinkhorn(logits.requires_grad_())
(got,) = torch.autograd.grad(matrix, logits, upstream)
host = logits.detach().double().cpu().requires_grad_()
(wanted,) = torch.autograd.grad(birkhoff.sinkhorn(host), host, upstream.double().cpu())
assert float((got.cpu() - wanted).abs().max()) < 1e-5
"""


def test_the_first_backward_of_a_process() -> None:
    """The kernel is the first work of autograd's thread, in which no context is current yet."""
    result = subprocess.run([sys.executable, "-c", FIRST_BACKWARD], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]


def test_a_forked_child_has_its_own_device_state() -> None:
    """Work on the CPU does not start CUDA, so a fork (a data loader's) is still possible; parent and child launch.

    A backward before the fork is torch's own limit: its engine counts the devices when it starts its threads, which
    starts the driver, and the child then fails to initialize it.
    """
    result = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]

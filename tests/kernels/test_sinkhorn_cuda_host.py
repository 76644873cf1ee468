"""The CUDA C++ Sinkhorn kernels, run on the host by ``sinkhorn_on_host.hpp`` and compared with float64.

Every path of the source is reached without a GPU: one lane or a grid of lanes a matrix, pieces of 16 bytes or single
entries, the ends of a batch, segments of the backward, and matrices on logarithms. What is not: the assembler, the
rounding of the approximate instructions, and asynchronous copies.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from birkhoff.kernels.cuda import sinkhorn as cuda
from tests.kernels.sinkhorn_cases import UNIT, allowed, expected, expected_gradient, marginal_error

HARNESS = Path(__file__).with_name("sinkhorn_on_host.hpp")
EPS = {"eps_start": 1e-6, "eps_den": 1e-6}

INSTRUCTIONS = {
    'float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y;': "return host_exp_2(x);",
    'float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y;': "return host_reciprocal(x);",
    'float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y;': "return host_from_half(x);",
    'u16 y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y;': "return host_to_half(x);",
    "extern __shared__ __align__(16) unsigned char memory[];": "",
}

RUN = """
extern "C" int run(int blocks, const void* logits, const void* grad, void* out, i64 batch, int num_iters, int kept,
                   double eps_start, double eps_den, double cap) {
  Guarded x(logits, batch * MATRIX_BYTES), result(nullptr, batch * MATRIX_BYTES);
#if BACKWARD
  Guarded g(grad, batch * MATRIX_BYTES);
#endif
  const real start = eps_start, den = eps_den, most = cap;
  element *from = (element*)x.begin, *to = (element*)result.begin;
  body = [&] {
#if BACKWARD
    sinkhorn_backward(from, (element*)g.begin, to, batch, num_iters, kept, start, den, most);
#else
    sinkhorn_forward(from, to, batch, num_iters, start, den, most);
#endif
  };
  for (blockIdx.x = 0; blockIdx.x < (unsigned)blocks; blockIdx.x++) run_block(THREADS);
  std::memcpy(out, result.begin, batch * MATRIX_BYTES);
  return result.surrounded();
}
"""


def build(source: str, options: tuple[str, ...], folder: Path) -> Callable[..., int]:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not on PATH")
    for instruction, definition in INSTRUCTIONS.items():
        assert instruction in source
        source = source.replace(instruction, definition)
    (folder / "kernel.cpp").write_text(f'#include "{HARNESS}"\n{source}\n{RUN}')
    macros = [option for option in options if option.startswith("-D")]
    library = folder / "kernel.so"
    command = [compiler, "-std=c++17", "-O1", "-w", "-shared", "-fPIC", *macros, "-o", str(library)]
    result = subprocess.run([*command, str(folder / "kernel.cpp")], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[:3000]
    return ctypes.CDLL(str(library)).run


class OnHost:
    """``birkhoff.kernels.cuda.sinkhorn`` with its launches on the host."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.built = folder, {}
        monkeypatch.setattr(cuda, "_kernel", self.kernel)
        monkeypatch.setattr(cuda, "device_index", lambda array: 0)

    def kernel(
        self,
        backward: bool,
        n: int,
        element: int,
        damped: bool,
        rows_first: bool,
        capped: bool,
        launch: Any,
        device: int,
    ) -> Callable[..., None]:
        options = cuda.flags(n, element, launch, backward=backward, damped=damped, rows_first=rows_first, capped=capped)
        if options not in self.built:
            folder = self.folder / str(len(self.built))
            folder.mkdir()
            self.built[options] = build(cuda.source("sinkhorn.cu"), options, folder)
        run = self.built[options]

        def start(grid: tuple[int], block: tuple[int], arguments: tuple[Any, ...], *, shared_bytes: int) -> None:
            assert block == (launch.threads,) and shared_bytes <= 1 << 18
            tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
            batch, num_iters, *kept, eps_start, eps_den, cap = [a for a in arguments if not isinstance(a, torch.Tensor)]
            places = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (tensors[0], tensors[-2], tensors[-1])]
            counts = ctypes.c_longlong(int(batch)), int(num_iters), int(kept[0]) if kept else 0
            floats = [ctypes.c_double(float(x)) for x in (eps_start, eps_den, min(float(cap), 1e300))]
            assert run(int(grid[0]), *places, *counts, *floats) == 1, "wrote beside the result"

        return start


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OnHost:
    return OnHost(tmp_path, monkeypatch)


def check(n: int, std: float, dtype: torch.dtype = torch.float32, batches: tuple[int, ...] = (35,), **options) -> None:
    """Forward and backward against the oracle; batches of other sizes give the same bits."""
    options = {"method": "knopp", "num_iters": 20, "first": "columns"} | options
    rng = np.random.default_rng(n)
    logits = torch.tensor(rng.normal(size=(max(batches), n, n)) * std).to(dtype)
    grad = torch.tensor(rng.normal(size=(max(batches), n, n))).to(dtype)
    results = {}
    for batch in sorted(batches, reverse=True):
        matrix = cuda.sinkhorn_forward(logits[:batch], **options)
        pulled = cuda.sinkhorn_backward(logits[:batch], grad[:batch], **options)
        if results:
            assert torch.equal(matrix, results["matrix"][:batch]) and torch.equal(pulled, results["pulled"][:batch]), (
                batch
            )
        else:
            results = {"matrix": matrix, "pulled": pulled}
    exact, tolerance = logits.double().numpy(), allowed(logits.double().numpy(), dtype)
    got = results["matrix"].double().numpy()
    np.testing.assert_allclose(got, expected(exact, **options), rtol=0, atol=tolerance)
    reference = expected_gradient(exact, grad.double().numpy(), **options)
    limit = 8 * allowed(exact, torch.float64 if dtype == torch.float64 else torch.float32)
    limit += UNIT[dtype] if dtype in (torch.bfloat16, torch.float16) else 0.0
    scale = max(1.0, np.abs(reference).max())
    np.testing.assert_allclose(results["pulled"].double().numpy(), reference, rtol=0, atol=scale * limit)
    if options["method"] != "damped" and dtype in (torch.float32, torch.float64):
        assert marginal_error(results["matrix"], 2 if options["first"] == "columns" else 1) <= (n + 1) * UNIT[dtype]


#: Logit standard deviation, dtype and options, dealt out to the sizes in turn.
VARIANTS: tuple[tuple[float, torch.dtype, dict[str, Any]], ...] = (
    (1.0, torch.float32, {"num_iters": 20}),
    (2.0, torch.float32, {"first": "rows", "num_iters": 2}),
    (30.0, torch.float32, {"num_iters": 3}),
    (2.0, torch.float32, {"num_iters": 60, "first": "rows"}),
    (3.0, torch.float32, {"method": "damped", "num_iters": 1, **EPS}),
    (5.0, torch.float32, {"range_cap": 3.0, "num_iters": 25}),
    (2.0, torch.float32, {"method": "damped", "num_iters": 26, "first": "rows", **EPS}),
    (10.0, torch.bfloat16, {"num_iters": 21}),
    (8.0, torch.float16, {"method": "damped", "range_cap": 4.0, "num_iters": 2, **EPS}),
    (100.0, torch.float64, {"method": "log", "num_iters": 3, "first": "rows"}),
    (3.0, torch.float64, {"num_iters": 20}),
)


@pytest.mark.parametrize("n", [3, 4, 8, 13])
@pytest.mark.usefixtures("host")
def test_forward_and_backward(n: int) -> None:
    std, dtype, options = VARIANTS[{3: 5, 4: 0, 8: 3, 13: 2}[n]]
    check(n, std, dtype, (35, 1, 31, 32, 33) if n == 4 else (9, 1, 8), **options)


@pytest.mark.slow
@pytest.mark.parametrize("n", range(1, 33))
@pytest.mark.usefixtures("host")
def test_every_size_and_variant(n: int) -> None:
    tile = max(32, 128 // cuda._launch(cuda._FORWARD, n, False).lanes)
    for std, dtype, options in VARIANTS:
        check(n, std, dtype, (tile + 1, tile, tile - 1, 1) if options["num_iters"] < 20 else (5,), **options)


@pytest.mark.parametrize("n", [4, 5, 13])
@pytest.mark.usefixtures("host")
def test_exact_zeros_and_bad_neighbours(n: int) -> None:
    """Minus infinity is an exact zero without a gradient, a line of them stays; NaN stays in its matrix."""
    rng = np.random.default_rng(n)
    logits = torch.tensor(rng.normal(size=(9, n, n)), dtype=torch.float32)
    grad = torch.tensor(rng.normal(size=(9, n, n)), dtype=torch.float32)
    options = {"method": "knopp", "num_iters": 5, "first": "columns"}
    clean = cuda.sinkhorn_forward(logits, **options), cuda.sinkhorn_backward(logits, grad, **options)
    logits[1, 0, 1], logits[2, 2, 2], logits[4, :, 1] = torch.nan, torch.inf, -torch.inf
    logits[3, 1, 2] = logits[3, 0, 0] = -torch.inf
    matrix = cuda.sinkhorn_forward(logits, **options)
    pulled = cuda.sinkhorn_backward(logits, grad, **options)
    for got, wanted in zip((matrix, pulled), clean, strict=True):
        assert torch.equal(got[5:], wanted[5:]) and torch.equal(got[0], wanted[0])
        assert got[1].isnan().any() and got[2].isnan().any()
    assert matrix[3, 1, 2] == matrix[3, 0, 0] == pulled[3, 1, 2] == pulled[3, 0, 0] == 0
    zeros = slice(3, 5)
    np.testing.assert_allclose(
        matrix[zeros].numpy(), expected(logits[zeros].double().numpy(), **options), rtol=0, atol=1e-6
    )
    reference = expected_gradient(logits[3:4].double().numpy(), grad[3:4].double().numpy(), **options)
    np.testing.assert_allclose(pulled[3:4].numpy(), reference, rtol=0, atol=3e-6)
    assert pulled[4].isfinite().all()

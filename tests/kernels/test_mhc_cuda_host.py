"""CUDA C++ kernels of the fused layer, run on the host by ``cuda_on_host.hpp`` and compared with float64.

It finds wrong layouts, missing barriers between a read and an overwrite, and waits for the wrong tile, on
every machine. Speed and the compiler's output are what only a GPU can show.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mhc_layers.kernels.cuda import boundary, launch, streams_backward
from tests.kernels.mhc_cuda_cases import BF16, FP32, Site, correctly_rounded, error

HARNESS = Path(__file__).with_name("cuda_on_host.hpp")

RUN = {
    "streams_backward": """
extern "C" void run(int x, int y, int late, const u16* xs, const u16* g, const u16* du, const float* mix, const u16* dz,
                    const float* phi, const u16* before, const u16* f, const float* proj, const float* alpha,
                    const float* bias, u16* dx, float* slabs, u16* df, float* dots, float* dcoef, int M) {
  launch(x, y, THREADS, late, [=] {
    streams_backward_kernel(xs, g, du, mix, dz, phi, before, f, proj, alpha, bias, 2.f, dx, slabs, df, dots, M);
  });
  if (CHAIN) launch((M * N + 255) / 256, 1, 256, late, [=] { sum_dots_kernel(dots, dcoef, x, M); });
}""",
    "boundary": """
extern "C" void run(int x, int y, int late, const u16* xs, const u16* f, const float* coef, const float* phi, u16* out,
                    u16* u, float* slabs, float* squares, int M) {
  launch(x, y, THREADS, late, [=] { boundary_forward_kernel(xs, f, coef, phi, out, u, slabs, squares, M); });
}""",
}


def build(name: str, macros: list[str], folder: Path) -> Callable[..., None]:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not on PATH")
    source = launch._source(name).split("constexpr int n =", 1)[1]  # without ptx.cuh
    (folder / "kernel.cpp").write_text(f'#include "{HARNESS}"\nconstexpr int n ={source}\n{RUN[name]}\n')
    library = folder / "kernel.so"
    command = [compiler, "-std=c++17", "-O1", "-w", "-shared", "-fPIC", *macros, "-o", str(library)]
    result = subprocess.run([*command, str(folder / "kernel.cpp")], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[:3000]
    function = ctypes.CDLL(str(library)).run

    def run(grid: tuple[int, int], late: bool, tensors: list[torch.Tensor], m: int) -> None:
        function(*grid, int(late), *[ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors], m)

    return run


def nan(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("n", "c", "m", "chained"),
    [
        (4, 264, 43, True),
        pytest.param(4, 512, 19, True, marks=pytest.mark.slow),  # no channels to spare: unmasked copies
        pytest.param(4, 264, 43, False, marks=pytest.mark.slow),
        pytest.param(6, 128, 9, False, marks=pytest.mark.slow),
        pytest.param(4, 90, 1, True, marks=pytest.mark.slow),
        pytest.param(3, 101, 19, True, marks=pytest.mark.slow),
        pytest.param(2, 50, 30, True, marks=pytest.mark.slow),
        pytest.param(6, 136, 17, False, marks=pytest.mark.slow),
    ],
)
def test_streams_backward(n: int, c: int, m: int, chained: bool, late: bool, tmp_path: Path) -> None:
    site = Site(n, c, m, device="cpu")
    num_mix, num_dz, big_n = site.mix.shape[-1], site.dz.shape[-1], site.big_n
    block_c, shared = streams_backward._geometry(n, num_mix, num_dz, chained)
    macros = [f"-DNUM_STREAMS={n}", f"-DDIM={c}", f"-DMIX_COLUMNS={num_mix}", f"-DDZ_COLUMNS={num_dz}"]
    macros += [f"-DSHARED_BYTES={shared}", *(["-DCHAINED"] if chained else [])]
    run = build("streams_backward", macros, tmp_path)
    groups, splits = -(-c // block_c), 2
    dx, df = nan(m, n, c, dtype=torch.bfloat16), nan(m, c, dtype=torch.bfloat16)
    slabs, dots, dcoef = nan(splits, big_n, n * c), nan(groups, m, n * n + n), nan(m, big_n)
    tensors = [
        site.x,
        site.g,
        site.gu,
        site.mix,
        site.dz,
        site.phi,
        site.y,
        site.f,
        site.proj,
        site.alpha[1:2],
        site.bias,
    ]
    run((groups, splits), late, [*tensors, dx, slabs, df, dots, dcoef], m)
    expected_dx, expected_dphi = site.streams_backward()
    assert error(dx, expected_dx) < BF16
    assert correctly_rounded(dx, expected_dx) > 0.98
    assert error(slabs.double().sum(0), expected_dphi) < FP32
    if chained:
        expected_df, expected_dcoef = site.write_backward(dx)
        assert error(df, expected_df) < BF16
        assert error(dcoef, expected_dcoef) < FP32


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("n", "c", "m", "delayed"),
    [
        (4, 264, 50, True),
        pytest.param(4, 264, 50, False, marks=pytest.mark.slow),
        pytest.param(4, 90, 1, False, marks=pytest.mark.slow),
        pytest.param(3, 101, 35, True, marks=pytest.mark.slow),
        pytest.param(2, 50, 20, False, marks=pytest.mark.slow),
    ],
)
def test_boundary_forward(n: int, c: int, m: int, delayed: bool, late: bool, tmp_path: Path) -> None:
    site = Site(n, c, m, device="cpu")
    macros = [f"-DNUM_STREAMS={n}", f"-DDIM={c}", f"-DSHARED_BYTES={boundary._shared_bytes(n, delayed)}"]
    run = build("boundary", [*macros, *(["-DDELAYED"] if delayed else [])], tmp_path)
    groups = -(-c // boundary._BLOCK_C)
    out, u = nan(m, n, c, dtype=torch.bfloat16), nan(m, c, dtype=torch.bfloat16)
    slabs, squares = nan(groups, m, site.big_n), nan(groups, m)
    run((groups, 2), late, [site.x, site.f, site.coef, site.phi, out, u, slabs, squares], m)
    site.check_boundary(out, u if delayed else None, slabs, squares)

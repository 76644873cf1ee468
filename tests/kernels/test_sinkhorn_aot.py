"""Sinkhorn and Newton kernels compiled ahead of time: registers, spills and shared memory, for sm_80, sm_90, sm_100."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from birkhoff.kernels.cuda import large
from birkhoff.kernels.cuda import sinkhorn as cuda
from birkhoff.kernels.triton import newton, sinkhorn
from tests.kernels.aot_compile import Launch, Resources, compile_launch, recorded_launches

pytestmark = [pytest.mark.aot, pytest.mark.timeout(600)]

SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}


def launches(n: int, dtype: torch.dtype = torch.float32, **options) -> dict[str, Launch]:
    """The launches for a large batch of this n, without running them."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("needs TRITON_INTERPRET unset")
    batch = torch.empty(1, n, n, dtype=dtype).expand(1 << 16, n, n)
    with recorded_launches() as recorded:
        sinkhorn.sinkhorn_forward(batch, **options)
        sinkhorn.sinkhorn_backward(batch, batch, **options)
    return {launch.name: launch for launch in recorded}


def compiled(capability: int, n: int, dtype: torch.dtype = torch.float32, **options) -> dict[str, Resources]:
    return {name: compile_launch(launch, capability) for name, launch in launches(n, dtype, **options).items()}


@pytest.mark.parametrize(
    ("capability", "n"),
    [*((90, n) for n in (1, 2, 3, 4, 6, 7, 8, 12, 16, 32)), *((other, n) for other in (80, 100) for n in (2, 4, 8))],
)
def test_no_spills(capability: int, n: int) -> None:
    for name, resources in compiled(capability, n).items():
        assert resources.spill_bytes == 0, name
        assert resources.registers <= 255
        assert resources.shared_bytes <= SHARED_BYTES[capability], name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_compile(dtype: torch.dtype) -> None:
    for resources in compiled(90, 4, dtype).values():
        assert resources.registers <= 255


@pytest.mark.parametrize("n", [4, 8])
def test_damped_rows_first_and_capped_compile(n: int) -> None:
    found = compiled(90, n, method="damped", first="rows", eps_start=1e-6, eps_den=1e-6, range_cap=30.0)
    assert all(resources.spill_bytes == 0 for resources in found.values())


def loops(assembly: str) -> list[str]:
    """The bodies of loops without a branch in them: from a label to the branch back to it, with no label between."""
    return [match[0] for match in re.finditer(r"(?m)^(\$L__BB\w+):(?:(?!^\$L__BB)[\s\S])*?bra\s+\1;", assembly)]


def test_matrices_in_a_lane_exchange_nothing_while_they_iterate() -> None:
    """n = 4: shuffles only on the way from and to memory and for the program's largest range."""
    forward = compiled(90, 4)["sinkhorn_forward_kernel"]
    assert forward.registers <= 96
    found = loops(forward.assembly)
    assert len(found) >= 2 and all("rcp.approx" in loop for loop in found)
    assert not any("shfl.sync" in loop or "bar.sync" in loop for loop in found)
    assert "div.full.f32" not in forward.assembly


@pytest.mark.parametrize(("n", "edge", "doublings"), [(8, 4, 1), (12, 3, 2)])
def test_a_grid_of_lanes_exchanges_sums_alone(n: int, edge: int, doublings: int) -> None:
    """One exchange for each sum and doubling of the grid, and no barrier: no layout changes in an iteration."""
    found = loops(compiled(90, n, num_iters=7)["sinkhorn_backward_kernel"].assembly)
    linear = [loop for loop in found if "rcp.approx" in loop and "ex2.approx" not in loop]
    assert linear and all(loop.count("shfl.sync") == 2 * edge * doublings for loop in linear)
    assert not any("bar.sync" in loop for loop in found)


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_newton_does_not_spill(n: int, capability: int) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("needs TRITON_INTERPRET unset")
    with recorded_launches() as recorded:
        newton.newton_forward(torch.empty(1, n, n).expand(1 << 16, n, n))
    (launch,) = recorded
    assert compile_launch(launch, capability).spill_bytes == 0


def build(source: str, options: tuple[str, ...], folder: Path) -> str:
    """Compile CUDA C++ for sm_90 with nvcc; what the assembler reports."""
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("nvcc is not on PATH")
    file = folder / "kernel.cu"
    file.write_text(source)
    command = [compiler, "-arch=sm_90", "-cubin", "--resource-usage", *options, "-o", str(folder / "out"), str(file)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stderr


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 8, 16, 24, 32])
def test_cuda_builds_without_spills(n: int, backward: bool, tmp_path: Path) -> None:
    launch = cuda._launch(cuda._BACKWARD if backward else cuda._FORWARD, n, False)
    options = cuda.flags(n, 0, launch, backward=backward, damped=False, rows_first=False, capped=False)
    report = build(cuda.source("sinkhorn.cu"), options, tmp_path)
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill stores", report)]
    entry = "Compiling entry function 'sinkhorn_" in report.split("spill stores")[0]
    assert entry and spills[0] <= 16, report  # a few bytes around the call to the logarithms
    assert max(spills) <= 64, report


@pytest.mark.parametrize(
    ("n", "element", "switches"),
    [
        (4, 1, {"damped": False, "rows_first": True, "capped": False}),
        (3, 2, {"damped": False, "rows_first": False, "capped": True}),
        (4, 3, {"damped": True, "rows_first": True, "capped": True}),
        (7, 0, {"damped": True, "rows_first": False, "capped": False}),
        (16, 1, {"damped": True, "rows_first": True, "capped": True}),
        (32, 3, {"damped": False, "rows_first": False, "capped": False}),
    ],
)
def test_cuda_variants_build(n: int, element: int, switches: dict[str, bool], tmp_path: Path) -> None:
    for backward in (False, True):
        launch = cuda._launch(cuda._BACKWARD if backward else cuda._FORWARD, n, element == 3)
        build(cuda.source("sinkhorn.cu"), cuda.flags(n, element, launch, backward=backward, **switches), tmp_path)


@pytest.mark.parametrize(("n", "double"), [(33, False), (1001, True), (4096, False), (8192, True), (16384, False)])
def test_large_passes_build_without_spills(n: int, double: bool, tmp_path: Path) -> None:
    options, _ = large.flags(n, double)
    report = build(Path(large.__file__).with_name("large.cu").read_text(), options, tmp_path)
    assert re.findall(r"(\d+) bytes spill stores", report) == ["0"]

"""CUDA C++ kernels of the fused layer compiled ahead of time for sm_90: they build, and no register spills."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mhc_layers.kernels.cuda import boundary, launch, streams_backward


def compile_for_sm_90(name: str, macros: list[str], folder: Path) -> str:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    source = folder / f"{name}.cu"
    source.write_text(launch._source(name))
    command = [
        nvcc,
        "-std=c++17",
        "-arch=sm_90",
        "-cubin",
        "--resource-usage",
        *macros,
        "-o",
        str(folder / "out"),
        str(source),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stderr


def assert_no_spills(report: str, *kernels: str) -> None:
    assert all(f"'{kernel}'" in report for kernel in kernels), report
    spills = re.findall(r"(\d+) bytes spill stores", report)
    assert spills and all(bytes_ == "0" for bytes_ in spills), report


@pytest.mark.aot
@pytest.mark.parametrize(("n", "c"), [(4, 4096), (4, 1001), (3, 1280), (2, 1280), (6, 1280)])
@pytest.mark.parametrize("chained", [False, True])
def test_streams_backward_builds(n: int, c: int, chained: bool, tmp_path: Path) -> None:
    if chained and n == 6:
        pytest.skip("n = 6 is not chained: registers")
    num_mix, num_dz = 1 << (n + 1).bit_length(), max(16, 1 << (n * (n + 2) - 1).bit_length())
    _, shared = streams_backward._geometry(n, num_mix, num_dz, chained)
    macros = [f"-DNUM_STREAMS={n}", f"-DDIM={c}", f"-DMIX_COLUMNS={num_mix}", f"-DDZ_COLUMNS={num_dz}"]
    macros += [f"-DSHARED_BYTES={shared}", *(["-DCHAINED"] if chained else [])]
    report = compile_for_sm_90("streams_backward", macros, tmp_path)
    assert_no_spills(report, "streams_backward_kernel", "sum_dots_kernel")


@pytest.mark.aot
@pytest.mark.parametrize(("n", "c"), [(4, 4096), (4, 1001), (3, 1280), (2, 1280)])
@pytest.mark.parametrize("delayed", [False, True])
def test_boundary_builds(n: int, c: int, delayed: bool, tmp_path: Path) -> None:
    macros = [f"-DNUM_STREAMS={n}", f"-DDIM={c}", f"-DSHARED_BYTES={boundary._shared_bytes(n, delayed)}"]
    report = compile_for_sm_90("boundary", [*macros, *(["-DDELAYED"] if delayed else [])], tmp_path)
    assert_no_spills(report, "boundary_forward_kernel")

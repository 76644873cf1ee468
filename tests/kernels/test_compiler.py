"""Run-time compilation of CUDA C++: what is missing is named, wrong arguments too; both compilers launch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from birkhoff.kernels.cuda import compiler, launcher

SOURCE = r"""
extern "C" __global__ void add(const float* x, float* out, long long count, float value) {
  long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (i < count) out[i] = x[i] + SCALE * value;
}
"""


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "available", lambda: None)
    with pytest.raises(ImportError, match=r"cupy-cuda13x.*cuda-bindings"):
        compiler.load(SOURCE)


@pytest.mark.parametrize(
    ("installed", "expected"), [((), None), (("cuda", "cuda.bindings"), "cuda.bindings"), (("cupy",), "cupy")]
)
def test_available_prefers_cupy(monkeypatch: pytest.MonkeyPatch, installed: tuple[str, ...], expected: str) -> None:
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: name if name in installed else None)
    assert compiler.available() == expected


def test_rocm_builds_of_torch_are_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert compiler.available() is None


def test_a_bare_int_is_refused() -> None:
    with pytest.raises(TypeError, match=r"numpy\.int32\(3\), not 3"):
        launcher.pack([torch.zeros(1), 3])


def test_scalars_are_packed_bit_by_bit() -> None:
    words, addresses = launcher.pack([np.int32(-1), np.float32(1.5), np.float64(-2.0), np.int64(1 << 40)])
    expected = [0xFFFFFFFF, 0x3FC00000, 0xC000000000000000, 1 << 40]
    assert list(words) == expected
    assert len(addresses) == 4


@pytest.fixture(params=["cupy", "cuda.bindings"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """Each way to compile, with an empty cache of ours."""
    pytest.importorskip(request.param)
    monkeypatch.setattr(compiler, "available", lambda: request.param)
    monkeypatch.setenv("BIRKHOFF_CACHE_DIR", str(tmp_path))
    yield request.param


@pytest.mark.gpu
def test_launches_on_torch_and_its_stream(route: str) -> None:
    kernel = compiler.load(SOURCE, ("-DSCALE=2.0f",)).function("add")
    stream = torch.cuda.Stream()
    x = torch.arange(1000, dtype=torch.float32, device="cuda")
    out = torch.empty_like(x)
    with torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.default_stream())
        torch.cuda._sleep(10_000_000)
        x.add_(1)
        kernel((4,), (256,), (x, out, np.int64(1000), np.float32(0.5)))
    stream.synchronize()
    assert torch.equal(out, torch.arange(1000, device="cuda") + 2.0)


@pytest.mark.gpu
def test_a_source_that_does_not_compile_shows_the_log(route: str) -> None:
    with pytest.raises(RuntimeError, match="SCALE"):
        compiler.load(SOURCE + "// a source of its own\n").function("add")


@pytest.mark.gpu
def test_our_cache_is_read_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings")
    monkeypatch.setattr(compiler, "available", lambda: "cuda.bindings")
    monkeypatch.setenv("BIRKHOFF_CACHE_DIR", str(tmp_path))
    compiler.load(SOURCE, ("-DSCALE=3.0f",))
    assert len(list(tmp_path.glob("*.cubin"))) == 1
    compiler._load_bindings.cache_clear()
    monkeypatch.setattr(compiler, "_compile_bindings", lambda *args: pytest.fail("compiled again"))
    compiler.load(SOURCE, ("-DSCALE=3.0f",))


@pytest.mark.gpu
def test_serves_cupy_arrays_on_their_stream() -> None:
    cupy = pytest.importorskip("cupy")
    kernel = compiler.load(SOURCE, ("-DSCALE=4.0f",)).function("add")
    with cupy.cuda.Stream(non_blocking=True) as stream:
        x = cupy.arange(1000, dtype=cupy.float32)
        out = cupy.empty_like(x)
        kernel((4,), (256,), (x, out, np.int64(1000), np.float32(0.25)))
    stream.synchronize()
    assert bool((out == cupy.arange(1000) + 1).all())

"""CUDA C++ compiled at run time and launched on the memory of CuPy arrays and torch tensors.

Two ways to the same thing, tried in this order:

1. CuPy's ``RawModule`` (package ``cupy-cuda12x`` or ``cupy-cuda13x``), which keeps compiled code in a cache on disk;
2. ``cuda.bindings`` (package ``cuda-bindings``, installed with the CUDA builds of torch 2.10 and later), with a cache
   of ours under ``$BIRKHOFF_CACHE_DIR``, else ``$XDG_CACHE_HOME/birkhoff``, else ``~/.cache/birkhoff``.

Kernels are declared ``extern "C" __global__`` and specialised by ``-D`` options, so that a name is a plain string.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from birkhoff.kernels.cuda.launcher import DriverKernel, PreparedLaunch, relaxed_capture

__all__ = ["Kernel", "Module", "available", "load"]


class Kernel(Protocol):
    """One ``extern "C" __global__`` function of a compiled module."""

    def __call__(
        self, grid: Sequence[int], block: Sequence[int], arguments: Sequence[Any], *, shared_bytes: int = 0
    ) -> None:
        """Launch on the current stream of the library that owns the array arguments; returns at once."""

    def prepare(
        self, grid: Sequence[int], block: Sequence[int], arguments: Sequence[Any], *, shared_bytes: int = 0
    ) -> PreparedLaunch:
        """Everything of a launch but the addresses (None among the arguments) and the stream."""


class Module(Protocol):
    """Compiled code of one source on one device."""

    def function(self, name: str) -> Kernel:
        """Return the kernel called `name`."""


def available() -> str | None:
    """Name what :func:`load` would use.

    Returns
    -------
    str or None
        ``"cupy"``, ``"cuda.bindings"``, or None when neither is installed or torch is a ROCm build. Says nothing of a
        device being present.
    """
    torch = sys.modules.get("torch")
    if torch is not None and getattr(torch.version, "hip", None) is not None:
        return None
    if importlib.util.find_spec("cupy") is not None:
        return "cupy"
    if importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.bindings") is not None:
        return "cuda.bindings"
    return None


def load(source: str, options: Sequence[str] = (), *, cooperative: bool = False, device: int | None = None) -> Module:
    """Compile CUDA C++ for a device, or take it from the cache.

    Parameters
    ----------
    source : str
        Text of the translation unit. ``#include <cuda_bf16.h>`` and the like work where the toolkit's headers are.
    options : sequence of str, optional
        Compiler options, for example ``("-DN=4", "--use_fast_math")``. The architecture is the device's.
    cooperative : bool, default False
        Launch with all blocks resident at once, so that they may wait for each other.
    device : int, optional
        Default: the current device.

    Returns
    -------
    Module
        ``module.function(name)(grid, block, arguments, shared_bytes=0)`` launches. Arguments are torch tensors or CuPy
        arrays (passed as pointers) and NumPy scalars (``numpy.int32(3)``), whose type must be the parameter's type.

    Raises
    ------
    ImportError
        Neither CuPy nor cuda.bindings is installed.
    RuntimeError
        The source does not compile; the message holds the compiler's log.

    Notes
    -----
    The first call for a source compiles (seconds); later calls in the process are a dictionary look-up, and later
    processes read the cache on disk. A first call may come while a CUDA graph is captured.
    """
    backend = available()
    if backend is None:
        raise ImportError(
            "CUDA C++ kernels need CuPy or cuda.bindings, and neither is installed: install `cupy-cuda13x` "
            "(or `cupy-cuda12x`) to match the driver, or `cuda-bindings`"
        )
    if backend == "cupy":
        import cupy

        device = cupy.cuda.runtime.getDevice() if device is None else device
        return _load_cupy(source, tuple(options), cooperative, device)
    import torch

    device = torch.cuda.current_device() if device is None else device
    return _load_bindings(source, tuple(options), cooperative, device)


@functools.cache
def _include_options() -> tuple[str, ...]:
    """Find the toolkit's headers: in CUDA_HOME or CUDA_PATH, /usr/local/cuda, or the nvidia wheels."""
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [Path(root) / "include" for root in roots if root]
    for entry in sys.path:
        candidates += sorted(Path(entry or ".").glob("nvidia/*/include"))
    return tuple(f"-I{path}" for path in candidates if (path / "cuda_bf16.h").is_file())[:1]


# --------------------------------------------------------------------------------------------------------------------
# CuPy


class _CupyModule:
    def __init__(self, module: Any, cooperative: bool, device: int) -> None:
        self._module = module
        self._cooperative = cooperative
        self._device = device
        self._kernels: dict[str, DriverKernel] = {}

    def function(self, name: str) -> Kernel:
        if name not in self._kernels:
            import cupy

            with cupy.cuda.Device(self._device), relaxed_capture():
                self._kernels[name] = DriverKernel(self._module.get_function(name).kernel.ptr, self._cooperative)
        return self._kernels[name]


@functools.cache
def _load_cupy(source: str, options: tuple[str, ...], cooperative: bool, device: int) -> Module:
    import cupy

    module = cupy.RawModule(
        code=source, options=(*options, *_include_options()), backend="nvrtc", enable_cooperative_groups=cooperative
    )
    try:
        with cupy.cuda.Device(device), relaxed_capture():
            module.compile()
    except cupy.cuda.compiler.CompileException as error:
        raise RuntimeError(f"CUDA C++ does not compile with options {options}:\n{error}") from error
    return _CupyModule(module, cooperative, device)


# --------------------------------------------------------------------------------------------------------------------
# cuda.bindings


def _check(result: tuple[Any, ...]) -> Any:
    """Unpack what a binding returns, raising when its first item is an error code."""
    code, *values = result
    if int(code) != 0:
        raise RuntimeError(f"CUDA call failed: {code!r}")
    return values[0] if len(values) == 1 else tuple(values)


class _BindingsModule:
    def __init__(self, module: Any, cooperative: bool, device: int) -> None:
        self._module = module
        self._cooperative = cooperative
        self._device = device
        self._kernels: dict[str, DriverKernel] = {}

    def function(self, name: str) -> Kernel:
        if name not in self._kernels:
            from cuda.bindings import driver

            with _current(self._device), relaxed_capture():
                function = _check(driver.cuModuleGetFunction(self._module, name.encode()))
                self._kernels[name] = DriverKernel(int(function), self._cooperative)
        return self._kernels[name]


def _cache_directory() -> Path:
    if explicit := os.environ.get("BIRKHOFF_CACHE_DIR"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "birkhoff"


def _compile_bindings(source: str, options: tuple[str, ...]) -> bytes:
    from cuda.bindings import nvrtc

    program = _check(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], []))
    flags = [option.encode() for option in options]
    (code,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
    if int(code) != 0:
        log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program))
        _check(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"CUDA C++ does not compile with options {options}:\n{log.decode(errors='replace')}")
    cubin = b" " * _check(nvrtc.nvrtcGetCUBINSize(program))
    _check(nvrtc.nvrtcGetCUBIN(program, cubin))
    _check(nvrtc.nvrtcDestroyProgram(program))
    return cubin


@functools.cache
def _load_bindings(source: str, options: tuple[str, ...], cooperative: bool, device: int) -> Module:
    import torch
    from cuda.bindings import driver, nvrtc

    major, minor = torch.cuda.get_device_capability(device)
    flags = (f"--gpu-architecture=sm_{major}{minor}", *options, *_include_options())
    version = _check(nvrtc.nvrtcVersion())
    digest = hashlib.sha256(repr((source, flags, version)).encode()).hexdigest()
    path = _cache_directory() / f"{digest}.cubin"
    if path.is_file():
        cubin = path.read_bytes()
    else:
        cubin = _compile_bindings(source, flags)
        with contextlib.suppress(OSError):  # a read-only home costs a compilation a process, nothing else
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(cubin)
            Path(name).replace(path)
    with _current(device), relaxed_capture():
        return _BindingsModule(_check(driver.cuModuleLoadData(cubin)), cooperative, device)


@functools.cache
def _primary_context(device: int) -> Any:
    from cuda.bindings import driver

    return _check(driver.cuDevicePrimaryCtxRetain(_check(driver.cuDeviceGet(device))))


@contextlib.contextmanager
def _current(device: int) -> Iterator[None]:
    """Make a device's primary context current; a new thread has none, even where the device is the current one."""
    import torch
    from cuda.bindings import driver

    with torch.cuda.device(device):
        _check(driver.cuCtxSetCurrent(_primary_context(device)))
        yield

"""Batched Sinkhorn in CUDA C++, forward and exact backward, for n = 1..32 on CuPy arrays and torch tensors.

The source is ``sinkhorn.cu``, compiled at run time for one (n, dtype, method, order) and cached on disk. A lane holds a
whole matrix up to n = 8 (backward 4); above, a G x G grid of lanes holds blocks of it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from birkhoff.kernels.cuda import compiler

__all__ = ["MAX_SIZE", "sinkhorn_backward", "sinkhorn_forward"]

#: Largest n of these kernels.
MAX_SIZE = 32

#: Iterations whose scalings the backward keeps in shared memory at a time.
_KEPT = 24

_ELEMENTS = {"float32": 0, "bfloat16": 1, "float16": 2, "float64": 3}


@dataclass(frozen=True)
class _Launch:
    """How one kernel is specialised and launched."""

    lanes: int  # G: a matrix is spread over G x G lanes
    threads: int
    blocks: int  # blocks a multiprocessor, for the register limit
    waves: int  # grid = multiprocessors * blocks * waves, or fewer when the batch is small


def _forward_launch(n: int, double: bool) -> _Launch:
    if double:
        return _Launch(1, 128, 4, 4) if n <= 4 else _Launch(2 if n <= 8 else 4, 128, 2, 4)
    if n <= 4:
        return _Launch(1, 128, 8, 2)
    if n <= 8:
        return _Launch(1, 128, 3, 2)
    return _Launch(2 if n <= 16 else 4, 128, 3, 4)


def _backward_launch(n: int, double: bool) -> _Launch:
    if double:
        return _Launch(1, 32, 5, 4) if n <= 4 else _Launch(2 if n <= 8 else 4, 32, 4, 4)
    if n <= 4:
        return _Launch(1, 32, 10, 4)
    if n <= 16:
        return _Launch(2 if n <= 8 else 4, 32, 10, 4)
    return _Launch(4, 32, 8, 4)


@functools.cache
def _source() -> str:
    return Path(__file__).with_name("sinkhorn.cu").read_text(encoding="utf-8")


@functools.lru_cache(maxsize=256)
def _module(
    backward: bool, n: int, element: int, damped: bool, rows_first: bool, capped: bool, launch: _Launch, device: int
) -> Any:
    pairs = (n + 1) // 2
    return compiler.load(
        _source(),
        (
            "--std=c++17",
            f"-DBACKWARD={int(backward)}",
            f"-DN={n}",
            f"-DG={launch.lanes}",
            f"-DELEMENT={element}",
            f"-DDAMPED={int(damped)}",
            f"-DROWS_FIRST={int(rows_first)}",
            f"-DCAPPED={int(capped)}",
            f"-DTHREADS={launch.threads}",
            f"-DBLOCKS={launch.blocks}",
            f"-DPAIRS_A={pairs}",
            f"-DPAIRS_B={pairs}",
        ),
    )


@functools.lru_cache(maxsize=64)
def _multiprocessors(device: int) -> int:
    if compiler.available() == "cupy":
        import cupy

        return int(cupy.cuda.Device(device).attributes["MultiProcessorCount"])
    import torch

    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _dtype_name(array: Any) -> str:
    return str(array.dtype).removeprefix("torch.")


def _device_index(array: Any) -> int:
    device = array.device
    return int(device.index or 0) if hasattr(device, "index") else int(device.id)


def _aligned(array: Any) -> Any:
    """The array itself, or a copy where it does not begin on 16 bytes."""
    address = array.data_ptr() if hasattr(array, "data_ptr") else array.data.ptr
    if address % 16 == 0:
        return array
    return array.clone() if hasattr(array, "clone") else array.copy()


def _empty_like(array: Any) -> Any:
    if hasattr(array, "new_empty"):
        return array.new_empty(array.shape)
    import cupy

    return cupy.empty(array.shape, array.dtype)


def _tile_bytes(n: int, launch: _Launch, itemsize: int) -> int:
    return 32 * n * n * itemsize if launch.lanes == 1 else 0


def _grid(batch: int, launch: _Launch, device: int) -> int:
    matrices = launch.threads // 32 * (32 // launch.lanes**2)
    return min(-(-batch // matrices), _multiprocessors(device) * launch.blocks * launch.waves)


def _scalars(
    num_iters: int, kept: int | None, eps_start: float, eps_den: float, range_cap: float | None, double: bool
) -> tuple[Any, ...]:
    real = np.float64 if double else np.float32
    counts = (np.int32(num_iters),) if kept is None else (np.int32(num_iters), np.int32(kept))
    return (*counts, real(eps_start), real(eps_den), real(math.inf if range_cap is None else range_cap))


def sinkhorn_forward(
    logits: Any,
    *,
    method: str = "knopp",
    num_iters: int = 20,
    first: str = "columns",
    eps_start: float = 0.0,
    eps_den: float = 0.0,
    range_cap: float | None = None,
) -> Any:
    """Sinkhorn of a batch of logits, one launch on the current stream.

    Parameters
    ----------
    logits : torch.Tensor or cupy.ndarray, shape (batch, n, n), contiguous, n <= 32
        float32, float64, float16, and bfloat16 for torch; computed in float32 (float64 in float64).
    method : {"knopp", "log", "damped"}
        "knopp" and "log" are the same iteration: linear where the logits' range is safe, on logarithms elsewhere.
    num_iters : int
        At least 1.
    first : {"columns", "rows"}
        The side normalised first.
    eps_start, eps_den : float
        Of the damped recurrence.
    range_cap : float, optional
        As in the solvers.

    Returns
    -------
    torch.Tensor or cupy.ndarray
        Kind, shape, dtype and device of the logits.
    """
    matrix = _empty_like(logits)
    batch, n = int(logits.shape[0]), int(logits.shape[-1])
    if batch == 0 or n == 0:
        return matrix
    element, device = _ELEMENTS[_dtype_name(logits)], _device_index(logits)
    launch = _forward_launch(n, element == 3)
    module = _module(False, n, element, method == "damped", first == "rows", range_cap is not None, launch, device)
    shared = launch.threads // 32 * 2 * _tile_bytes(n, launch, logits.dtype.itemsize)
    module.function("sinkhorn_forward")(
        (_grid(batch, launch, device),),
        (launch.threads,),
        (
            _aligned(logits),
            matrix,
            np.int64(batch),
            *_scalars(num_iters, None, eps_start, eps_den, range_cap, element == 3),
        ),
        shared_bytes=shared,
    )
    return matrix


def sinkhorn_backward(
    logits: Any,
    grad_matrix: Any,
    *,
    method: str = "knopp",
    num_iters: int = 20,
    first: str = "columns",
    eps_start: float = 0.0,
    eps_den: float = 0.0,
    range_cap: float | None = None,
) -> Any:
    """Exact vector-Jacobian product of :func:`sinkhorn_forward`, one launch; arguments as there.

    Parameters
    ----------
    grad_matrix : torch.Tensor or cupy.ndarray
        Gradient of the result, like the logits.

    Returns
    -------
    torch.Tensor or cupy.ndarray
        Gradient of the logits. Nothing but the two inputs is read: no iterate is stored in device memory.
    """
    grad_logits = _empty_like(logits)
    batch, n = int(logits.shape[0]), int(logits.shape[-1])
    if batch == 0 or n == 0:
        return grad_logits
    element, device = _ELEMENTS[_dtype_name(logits)], _device_index(logits)
    launch = _backward_launch(n, element == 3)
    module = _module(True, n, element, method == "damped", first == "rows", range_cap is not None, launch, device)
    kept = -(-num_iters // -(-num_iters // _KEPT))
    side = -(-n // launch.lanes)
    history = kept * 2 * side * 32 * (8 if element == 3 else 4)
    shared = launch.threads // 32 * max(history, 2 * _tile_bytes(n, launch, logits.dtype.itemsize))
    module.function("sinkhorn_backward")(
        (_grid(batch, launch, device),),
        (launch.threads,),
        (
            _aligned(logits),
            _aligned(grad_matrix),
            grad_logits,
            np.int64(batch),
            *_scalars(num_iters, kept, eps_start, eps_den, range_cap, element == 3),
        ),
        shared_bytes=shared,
    )
    return grad_logits

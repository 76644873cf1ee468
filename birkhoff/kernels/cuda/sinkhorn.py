"""Batched Sinkhorn in CUDA C++, forward and exact backward, for n = 1..32 on CuPy arrays and torch tensors.

The source is ``tile.cuh`` and ``sinkhorn.cu``, compiled at run time for one (n, dtype, method, order) and cached on
disk. A lane holds a whole matrix up to n = 8; above, a grid of lanes holds blocks of it.
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

#: Most iterations whose scalings the backward keeps in shared memory at a time.
_KEPT = 24

_ELEMENTS = {"float32": 0, "bfloat16": 1, "float16": 2, "float64": 3}


@dataclass(frozen=True)
class _Launch:
    """How a kernel is specialised."""

    #: Grid of lanes that holds a matrix.
    lane_rows: int
    lane_columns: int
    #: Threads a block, and blocks a multiprocessor that the registers must allow.
    threads: int
    blocks: int
    #: Iterations whose scalings the backward keeps in registers (not for the damped recurrence).
    held: int = 0

    @property
    def lanes(self) -> int:
        """Lanes that hold one matrix."""
        return self.lane_rows * self.lane_columns


#: (largest n, launch), forward and backward, in float32 (and 16-bit) and float64.
_FORWARD = {
    False: (
        (4, _Launch(1, 1, 128, 12)),
        (8, _Launch(1, 1, 128, 3)),
        (16, _Launch(2, 2, 128, 4)),
        (32, _Launch(4, 4, 128, 4)),
    ),
    True: (
        (4, _Launch(1, 1, 128, 4)),
        (8, _Launch(2, 2, 128, 3)),
        (16, _Launch(4, 4, 128, 3)),
        (32, _Launch(8, 4, 128, 2)),
    ),
}
_BACKWARD = {
    False: (
        (4, _Launch(1, 1, 32, 16, held=7)),
        (5, _Launch(1, 1, 32, 12, held=6)),
        (6, _Launch(1, 1, 32, 8, held=4)),
        (7, _Launch(1, 1, 32, 8)),
        (8, _Launch(1, 1, 32, 4)),
        (16, _Launch(2, 2, 32, 8)),
        (32, _Launch(4, 4, 32, 8)),
    ),
    True: (
        (4, _Launch(1, 1, 32, 5)),
        (8, _Launch(2, 2, 32, 8)),
        (16, _Launch(4, 4, 32, 8)),
        (32, _Launch(8, 4, 32, 7)),
    ),
}


def _launch(table: dict[bool, tuple[tuple[int, _Launch], ...]], n: int, double: bool) -> _Launch:
    return next(launch for largest, launch in table[double] if n <= largest)


@functools.cache
def source(name: str) -> str:
    """Text of a translation unit: ``tile.cuh``, then the file of that name."""
    here = Path(__file__).parent
    return "\n".join((here / file).read_text(encoding="utf-8") for file in ("tile.cuh", name))


def flags(n: int, element: int, launch: _Launch, **switches: bool) -> tuple[str, ...]:
    """Options that specialise ``tile.cuh``."""
    pairs = (n + 1) // 2
    values = {
        "N": n,
        "GR": launch.lane_rows,
        "GC": launch.lane_columns,
        "ELEMENT": element,
        "THREADS": launch.threads,
        "BLOCKS": launch.blocks,
        "HELD": launch.held,
        "PAIRS_A": pairs,
        "PAIRS_B": pairs,
        **{name.upper(): int(value) for name, value in switches.items()},
    }
    return ("--std=c++17", *(f"-D{name}={value}" for name, value in values.items()))


@functools.lru_cache(maxsize=256)
def _kernel(
    backward: bool, n: int, element: int, damped: bool, rows_first: bool, capped: bool, launch: _Launch, device: int
) -> compiler.Kernel:
    options = flags(n, element, launch, backward=backward, damped=damped, rows_first=rows_first, capped=capped)
    return compiler.load(source("sinkhorn.cu"), options).function(
        "sinkhorn_backward" if backward else "sinkhorn_forward"
    )


@functools.lru_cache(maxsize=64)
def multiprocessors(device: int) -> int:
    """Multiprocessors of a device."""
    if compiler.available() == "cupy":
        import cupy

        return int(cupy.cuda.Device(device).attributes["MultiProcessorCount"])
    import torch

    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _dtype_name(array: Any) -> str:
    return str(array.dtype).removeprefix("torch.")


def device_index(array: Any) -> int:
    """Index of the CUDA device that holds a torch or CuPy array."""
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
    """Shared memory of a warp's 32 matrices; none where lanes read their blocks themselves."""
    return 32 * n * n * itemsize if launch.lanes == 1 else 0


def _history_bytes(n: int, launch: _Launch, real_bytes: int) -> int:
    """Shared memory of the scalings of one iteration, for a warp: STEP_PITCH of ``sinkhorn.cu``."""
    rows, columns = -(-n // launch.lane_rows), -(-n // launch.lane_columns)
    vector = 4 if rows % 4 == 0 and columns % 4 == 0 and real_bytes == 4 else 1
    if launch.lanes == 1:
        return 32 * (rows + columns) * real_bytes
    return 32 // launch.lanes * (rows * launch.lane_rows + columns * launch.lane_columns + vector) * real_bytes


def _blocks(batch: int, launch: _Launch) -> int:
    return -(-batch // (launch.threads // launch.lanes))


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
    element, device = _ELEMENTS[_dtype_name(logits)], device_index(logits)
    launch = _launch(_FORWARD, n, element == 3)
    kernel = _kernel(False, n, element, method == "damped", first == "rows", range_cap is not None, launch, device)
    kernel(
        (_blocks(batch, launch),),
        (launch.threads,),
        (
            _aligned(logits),
            matrix,
            np.int64(batch),
            *_scalars(num_iters, None, eps_start, eps_den, range_cap, element == 3),
        ),
        shared_bytes=launch.threads // 32 * _tile_bytes(n, launch, logits.dtype.itemsize),
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
    element, device = _ELEMENTS[_dtype_name(logits)], device_index(logits)
    launch = _launch(_BACKWARD, n, element == 3)
    kernel = _kernel(True, n, element, method == "damped", first == "rows", range_cap is not None, launch, device)
    segments = -(-num_iters // _KEPT)
    kept = -(-num_iters // segments)
    in_registers = launch.held if method != "damped" and kept > launch.held else 0
    history = (kept - in_registers) * _history_bytes(n, launch, 8 if element == 3 else 4)
    tiles = 2 * _tile_bytes(n, launch, logits.dtype.itemsize)
    kernel(
        (_blocks(batch, launch),),
        (launch.threads,),
        (
            _aligned(logits),
            _aligned(grad_matrix),
            grad_logits,
            np.int64(batch),
            *_scalars(num_iters, kept, eps_start, eps_den, range_cap, element == 3),
        ),
        shared_bytes=launch.threads // 32 * max(history, tiles),
    )
    return grad_logits

"""Batched Sinkhorn in CUDA C++, forward and exact backward, for n = 1..32 on CuPy arrays and torch tensors.

The source is ``tile.cuh`` and ``sinkhorn.cu``, compiled at run time for one (n, dtype, method, order) and cached on
disk. A lane holds a whole matrix up to n = 8; above, a grid of lanes holds blocks of it.
"""

from __future__ import annotations

import contextlib
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
    return compiler.load(source("sinkhorn.cu"), options, device=device).function(
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


def _device_of(array: Any) -> contextlib.AbstractContextManager[Any]:
    """The device of a CuPy array as the current one; torch allocates and launches where its tensors are."""
    return contextlib.nullcontext() if hasattr(array, "data_ptr") else array.device


def _run(
    inputs: tuple[Any, ...], backward: bool, method: str, num_iters: int, first: str, eps_start: float, eps_den: float,
    range_cap: float | None,
) -> Any:  # fmt: skip
    """Launch the forward on the logits, or the backward on the logits and the gradient."""
    logits = inputs[0]
    batch, n = int(logits.shape[0]), int(logits.shape[-1])
    with _device_of(logits):
        out = _empty_like(logits)
        if batch == 0 or n == 0:
            return out
        element, device, damped = _ELEMENTS[_dtype_name(logits)], device_index(logits), method == "damped"
        double = element == _ELEMENTS["float64"]
        launch = _launch(_BACKWARD if backward else _FORWARD, n, double)
        kernel = _kernel(backward, n, element, damped, first == "rows", range_cap is not None, launch, device)
        counts: tuple[int, ...] = (num_iters,)
        shared = len(inputs) * _tile_bytes(n, launch, logits.dtype.itemsize)
        if backward:
            kept = -(-num_iters // -(-num_iters // _KEPT))
            in_registers = launch.held if not damped and kept > launch.held else 0
            shared = max(shared, (kept - in_registers) * _history_bytes(n, launch, 8 if double else 4))
            counts = (num_iters, kept)
        real = np.float64 if double else np.float32
        cap = math.inf if range_cap is None else range_cap
        scalars = (np.int64(batch), *map(np.int32, counts), real(eps_start), real(eps_den), real(cap))
        kernel(
            (-(-batch // (launch.threads // launch.lanes)),),
            (launch.threads,),
            (*map(_aligned, inputs), out, *scalars),
            shared_bytes=launch.threads // 32 * shared,
        )
    return out


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
    return _run((logits,), False, method, num_iters, first, eps_start, eps_den, range_cap)


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
    return _run((logits, grad_matrix), True, method, num_iters, first, eps_start, eps_den, range_cap)

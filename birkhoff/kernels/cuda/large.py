"""Scaling passes over one large matrix on a GPU: many iterations in one launch, the matrix read once an iteration.

The blocks of the launch stay on their multiprocessors for all iterations. Each keeps some of its rows in shared memory,
and the second-level cache keeps others, so that less than the whole matrix comes from device memory in an iteration.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from birkhoff.kernels.cuda import compiler
from birkhoff.kernels.cuda.sinkhorn import device_index, multiprocessors

__all__ = ["scaling_passes"]

#: Shared memory of a block that is not for rows: the kernel's own, and some for the driver.
_OTHER_SHARED_BYTES = 7 * 1024


@functools.lru_cache(maxsize=64)
def _shared_bytes(device: int) -> int:
    """Shared memory that a block may use for rows."""
    if compiler.available() == "cupy":
        import cupy

        return int(cupy.cuda.Device(device).attributes["MaxSharedMemoryPerBlockOptin"]) - _OTHER_SHARED_BYTES
    import torch

    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin) - _OTHER_SHARED_BYTES


def flags(n: int, double: bool) -> tuple[tuple[str, ...], int]:
    """Options that specialise ``large.cu`` for an n, and its threads a block."""
    threads = 512 if n <= 8192 else 1024
    per_access = 16 // (8 if double else 4)
    vector = per_access if n % per_access == 0 else 1
    columns = -(-n // (threads * vector)) * vector
    budget = 32 if threads == 512 else 16
    group = 1
    while group < 8 and 2 * group * columns * (2 if double else 1) <= budget:
        group *= 2
    values = {"DOUBLE": int(double), "THREADS": threads, "COLUMNS": columns, "VECTOR": vector, "GROUP": group}
    return ("--std=c++17", *(f"-D{name}={value}" for name, value in values.items())), threads


@functools.lru_cache(maxsize=64)
def _kernel(n: int, double: bool, device: int) -> tuple[compiler.Kernel, int]:
    """The kernel for this n, and its threads a block."""
    options, threads = flags(n, double)
    text = Path(__file__).with_name("large.cu").read_text(encoding="utf-8")
    return compiler.load(text, options, cooperative=True, device=device).function("scaling_passes"), threads


def scaling_passes(kernel: Any, sums: Any, count: int) -> tuple[Any, Any, Any, Any, Any]:
    """`count` iterations ``right = 1 / sums; left = 1 / (K right); sums = K^T left`` without a wait for the device.

    Parameters
    ----------
    kernel : torch.Tensor or cupy.ndarray, shape (n, n), contiguous, non-negative
        float32 with n <= 16384 or float64 with n <= 8192, on a CUDA device of compute capability 8.0 or higher.
    sums : the same, shape (n,)
        Column sums of K for the scalings that the matrix has already. Not changed.
    count : int
        At least 1.

    Returns
    -------
    left, right : array, shape (n,)
        Scalings of rows and columns of the last iteration; rows of ``left K right`` sum to one.
    sums : array, shape (n,)
        Its column sums, to be divided by `right`: entry j is ``sum_i left_i K_ij``.
    errors : array, shape (count,)
        After each iteration, ``max |column sum - 1|``.
    largest : array, shape ()
        The largest ``|log|`` of any scaling of any of the iterations.
    """
    n = int(kernel.shape[0])
    double = str(kernel.dtype).endswith("float64")
    device = device_index(kernel)
    function, threads = _kernel(n, double, device)
    blocks = min(multiprocessors(device), n)
    row_bytes = n * (8 if double else 4)
    resident = min(_shared_bytes(device) // row_bytes, -(-n // blocks))
    new = _allocator(kernel)
    sums_out = sums.clone() if hasattr(sums, "clone") else sums.copy()
    left, right = new((n,)), new((n,))
    slabs, errors, extremes = new((blocks, n)), new((count, blocks)), new((blocks,))
    arrived = new((2,))  # one counter, 4 or 8 bytes of zeros
    arrived[...] = 0
    function(
        (blocks,),
        (threads,),
        (
            kernel, left, right, sums_out, slabs, errors, extremes, arrived,
            np.int32(n), np.int32(resident), np.int32(count),
        ),
        shared_bytes=resident * row_bytes,
    )  # fmt: skip
    return left, right, sums_out, _largest(errors, 1), _largest(extremes, 0)


def _allocator(array: Any) -> Any:
    """A function of a shape that returns uninitialised memory like the array's."""
    if hasattr(array, "new_empty"):
        return array.new_empty
    import cupy

    return functools.partial(cupy.empty, dtype=array.dtype)


def _largest(values: Any, axis: int) -> Any:
    return values.amax(axis) if hasattr(values, "amax") else values.max(axis=axis)

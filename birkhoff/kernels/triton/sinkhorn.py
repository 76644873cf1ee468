"""Batched Sinkhorn, forward and exact backward, for n = 1..32: one matrix a lane for small n, lanes a matrix above.

Floor: forward reads and writes the batch once, backward reads it twice and writes it once; nothing else touches memory.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl

from birkhoff.kernels.triton import tile

__all__ = ["MAX_SIZE", "device_of", "load_matrices", "sinkhorn_backward", "sinkhorn_forward", "store_matrices"]

#: Largest n of these kernels.
MAX_SIZE = 32

#: (largest n, lanes along a side of the grid that holds a matrix, matrices a program, warps); 0 lanes: see tile.py,
#: ``LANE=False``.
_FORWARD = (
    (2, 1, 128, 4),
    (8, 1, 32, 1),
    (16, 0, 2, 1),
    (32, 0, 1, 1),
)

#: The same, with the most iterations kept in registers, without and with damping (half as many in float64).
_BACKWARD = (
    (2, 1, 128, 4, 10, 10),
    (4, 1, 64, 2, 10, 9),
    (8, 2, 8, 1, 10, 6),
    (12, 4, 2, 1, 10, 9),
    (16, 0, 1, 1, 10, 9),
    (32, 0, 1, 2, 4, 4),
)

#: In float32 the usual iteration count is unrolled as a whole for these n, with one warp a program. (The damped
#: recurrence and a range cap keep more values alive: unrolled so, they spill. Blocks of 4 x 4 compile for a minute.)
_WHOLE = (1, 2, 3, 4, 5, 6, 9, 10, 11, 12)
_USUAL_COUNT = 20


@triton.jit
def _places(batch, n: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GRID: tl.constexpr):
    """Where this program's matrices begin (64 bits), their entries from there (32 bits), and which of these exist."""
    program = tl.program_id(0).to(tl.int64)
    within = tl.arange(0, BLOCK)
    exists = within < tl.minimum(batch - program * BLOCK, BLOCK).to(tl.int32)
    k = tl.arange(0, WIDTH)
    if GRID == 0:
        offsets = within[:, None, None] * (n * n) + (k[:, None] * n + k[None, :])[None, :, :]
        mask = exists[:, None, None] & (k[:, None] < n)[None, :, :] & (k[None, :] < n)[None, :, :]
    elif GRID == 1:
        offsets = within[:, None] * (n * n) + k[None, :]
        mask = exists[:, None] & (k < n * n)[None, :]
    else:
        EDGE: tl.constexpr = (n + GRID - 1) // GRID
        begin = tl.arange(0, GRID) * EDGE
        row = begin[:, None, None] + (k // EDGE)[None, None, :]
        column = begin[None, :, None] + (k % EDGE)[None, None, :]
        inside = (k < EDGE * EDGE)[None, None, :] & (row < n) & (column < n)
        offsets = within[:, None, None, None] * (n * n) + (row * n + column)[None, :, :, :]
        mask = exists[:, None, None, None] & inside[None, :, :, :]
    return program * (BLOCK * n * n), offsets, mask


@triton.jit
def load_matrices(
    pointer, batch, n: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GRID: tl.constexpr, COMPUTE: tl.constexpr
):
    """This program's matrices in the form of tile.py; GRID is 0 for ``LANE=False``."""
    begin, offsets, mask = _places(batch, n, WIDTH, BLOCK, GRID)
    values = tl.load(pointer + begin + offsets, mask=mask, other=0.0).to(COMPUTE)
    if GRID == 0:
        return values
    else:
        return tile.unpack(values, BLOCK, WIDTH)


@triton.jit
def store_matrices(
    pointer, values, batch, n: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GRID: tl.constexpr
):
    """Store this program's matrices."""
    begin, offsets, mask = _places(batch, n, WIDTH, BLOCK, GRID)
    if GRID != 0:
        EDGE: tl.constexpr = (n + GRID - 1) // GRID
        values = tile.pack(values, BLOCK, WIDTH, EDGE * EDGE)
    tl.store(pointer + begin + offsets, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["batch", "num_iters"])
def sinkhorn_forward_kernel(
    logits, matrix, batch, num_iters, n: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GRID: tl.constexpr,
    COMPUTE: tl.constexpr, METHOD: tl.constexpr, COLUMNS_FIRST: tl.constexpr, EPS_START: tl.constexpr,
    EPS_DEN: tl.constexpr, RANGE_CAP: tl.constexpr,
):  # fmt: skip
    """BLOCK matrices: load once, iterate in registers, store once."""
    x = load_matrices(logits, batch, n, WIDTH, BLOCK, GRID, COMPUTE)
    SIDE: tl.constexpr = max(GRID, 1)
    p = tile.sinkhorn(x, num_iters, n, METHOD, COLUMNS_FIRST, GRID != 0, EPS_START, EPS_DEN, RANGE_CAP, SIDE)
    store_matrices(matrix, p, batch, n, WIDTH, BLOCK, GRID)


@triton.jit(do_not_specialize=["batch", "num_iters"])
def sinkhorn_backward_kernel(
    logits, grad_matrix, grad_logits, batch, num_iters, n: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, GRID: tl.constexpr, LENGTH: tl.constexpr, COMPUTE: tl.constexpr, METHOD: tl.constexpr,
    COLUMNS_FIRST: tl.constexpr, EPS_START: tl.constexpr, EPS_DEN: tl.constexpr, RANGE_CAP: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """BLOCK matrices: the scalings are recomputed from the logits, LENGTH iterations at a time."""
    x = load_matrices(logits, batch, n, WIDTH, BLOCK, GRID, COMPUTE)
    g = load_matrices(grad_matrix, batch, n, WIDTH, BLOCK, GRID, COMPUTE)
    d = tile.sinkhorn_vjp(
        x, g, num_iters, n, METHOD, COLUMNS_FIRST, GRID != 0, LENGTH, EPS_START, EPS_DEN, RANGE_CAP, WHOLE, max(GRID, 1)
    )
    store_matrices(grad_logits, d, batch, n, WIDTH, BLOCK, GRID)


_METHODS = {"knopp": tile.KNOPP.value, "log": tile.KNOPP.value, "damped": tile.DAMPED.value}


def _constants(
    logits: torch.Tensor, method: str, first: str, eps_start: float, eps_den: float, range_cap: float | None, grid: int
) -> dict[str, Any]:
    n = logits.shape[-1]
    return {
        "n": n,
        "WIDTH": triton.next_power_of_2((-(-n // grid)) ** 2 if grid else n),
        "GRID": grid,
        "COMPUTE": tl.float64 if logits.dtype == torch.float64 else tl.float32,
        "METHOD": _METHODS[method],
        "COLUMNS_FIRST": first == "columns",
        "EPS_START": float(eps_start),
        "EPS_DEN": float(eps_den),
        "RANGE_CAP": None if range_cap is None else float(range_cap),
    }


def _entry(table: tuple[tuple[int, ...], ...], n: int) -> tuple[int, ...]:
    return next(tuple(rest) for largest, *rest in table if n <= largest)


def _segment(count: int, most: int) -> int:
    """Iterations a segment, such that few remain, each of which is replayed by itself."""
    return max(1, count // max(1, -(-count // most)))


def sinkhorn_forward(
    logits: torch.Tensor,
    *,
    method: str = "knopp",
    num_iters: int = 20,
    first: str = "columns",
    eps_start: float = 0.0,
    eps_den: float = 0.0,
    range_cap: float | None = None,
) -> torch.Tensor:
    """Sinkhorn of a batch of logits, one launch.

    Parameters
    ----------
    logits : torch.Tensor, shape (batch, n, n), contiguous, n <= 32
        float32, float64, bfloat16 or float16; computed in float32 (float64 in float64).
    method : {"knopp", "log", "damped"}
        "knopp" and "log" are the same iteration: linear where the logits' range is safe, on logarithms elsewhere.
    num_iters : int
        At least 1. A run-time value: no recompilation. (The backward is compiled for a few segment lengths.)
    first : {"columns", "rows"}
        The side normalised first.
    eps_start, eps_den : float
        Of the damped recurrence.
    range_cap : float, optional
        As in the solvers.

    Returns
    -------
    torch.Tensor
        Shape, dtype and device of the logits.
    """
    matrix = torch.empty_like(logits)
    if logits.numel() == 0:
        return matrix
    grid, block, warps = _entry(_FORWARD, logits.shape[-1])
    constants = _constants(logits, method, first, eps_start, eps_den, range_cap, grid)
    batch = logits.shape[0]
    with device_of(logits):
        sinkhorn_forward_kernel[(triton.cdiv(batch, block),)](
            logits, matrix, batch, num_iters, BLOCK=block, num_warps=warps, **constants
        )
    return matrix


def sinkhorn_backward(
    logits: torch.Tensor,
    grad_matrix: torch.Tensor,
    *,
    method: str = "knopp",
    num_iters: int = 20,
    first: str = "columns",
    eps_start: float = 0.0,
    eps_den: float = 0.0,
    range_cap: float | None = None,
) -> torch.Tensor:
    """Exact vector-Jacobian product of :func:`sinkhorn_forward`, one launch; arguments as there.

    Parameters
    ----------
    grad_matrix : torch.Tensor
        Gradient of the result, like the logits.

    Returns
    -------
    torch.Tensor
        Gradient of the logits, in their shape and dtype. Nothing but the two inputs is read: no iterate is stored.
    """
    grad_logits = torch.empty_like(logits)
    if logits.numel() == 0:
        return grad_logits
    n, batch = logits.shape[-1], logits.shape[0]
    grid, block, warps, *most = _entry(_BACKWARD, n)
    damped, double = method == "damped", logits.dtype == torch.float64
    whole = num_iters == _USUAL_COUNT and n in _WHOLE and range_cap is None and not (damped or double)
    if whole:
        block, warps, length = 32 // grid**2, 1, num_iters
    else:
        length = _segment(num_iters - damped, most[damped] // (1 + double))
    constants = _constants(logits, method, first, eps_start, eps_den, range_cap, grid)
    with device_of(logits):
        sinkhorn_backward_kernel[(triton.cdiv(batch, block),)](
            logits, grad_matrix, grad_logits, batch, num_iters, BLOCK=block, LENGTH=length, WHOLE=whole,
            num_warps=warps, **constants
        )  # fmt: skip
    return grad_logits


def device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """The tensor's device as the current one; nothing to do for the interpreter's CPU tensors."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()

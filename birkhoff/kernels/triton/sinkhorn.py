"""Batched Sinkhorn, forward and exact backward, for n = 1..32: one matrix a lane up to n = 4, lanes a matrix above.

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

#: n up to which a lane holds a whole matrix, forward and backward.
_LANE_FORWARD = 4
_LANE_BACKWARD = 4

#: Padded n -> (matrices a program, warps, iterations kept in registers by the backward).
_FORWARD = {1: (128, 4), 2: (128, 4), 4: (32, 1), 8: (8, 1), 16: (2, 1), 32: (1, 1)}
_BACKWARD = {1: (128, 4, 10), 2: (128, 4, 10), 4: (64, 2, 10), 8: (2, 1, 10), 16: (1, 1, 10), 32: (1, 2, 4)}

#: Padded n -> (matrices a program, warps) in float32 for the usual iteration count, which is unrolled as a whole. (The
#: damped recurrence and a range cap keep more values alive: unrolled so, they spill.)
_BACKWARD_WHOLE = {1: (32, 1), 2: (32, 1), 4: (32, 1)}
_USUAL_COUNT = 20


@triton.jit
def _places(batch, n: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr):
    """Where this program's matrices begin (64 bits), their entries from there (32 bits), and which of these exist."""
    program = tl.program_id(0).to(tl.int64)
    within = tl.arange(0, BLOCK)
    left = tl.minimum(batch - program * BLOCK, BLOCK).to(tl.int32)
    if LANE:
        entry = tl.arange(0, N * N)
        offsets = within[:, None] * (n * n) + entry[None, :]
        mask = (within < left)[:, None] & (entry < n * n)[None, :]
    else:
        k = tl.arange(0, N)
        offsets = within[:, None, None] * (n * n) + (k[:, None] * n + k[None, :])[None, :, :]
        inside = (k[:, None] < n)[None, :, :] & (k[None, :] < n)[None, :, :]
        mask = (within < left)[:, None, None] & inside
    return program * (BLOCK * n * n), offsets, mask


@triton.jit
def load_matrices(
    pointer, batch, n: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr, COMPUTE: tl.constexpr
):
    """This program's matrices in the form of tile.py."""
    begin, offsets, mask = _places(batch, n, N, BLOCK, LANE)
    values = tl.load(pointer + begin + offsets, mask=mask, other=0.0).to(COMPUTE)
    if LANE:
        return tile.unpack(values, BLOCK, N * N)
    else:
        return values


@triton.jit
def store_matrices(pointer, values, batch, n: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr):
    """Store this program's matrices."""
    begin, offsets, mask = _places(batch, n, N, BLOCK, LANE)
    if LANE:
        values = tile.pack(values, BLOCK, N * N, n * n)
    tl.store(pointer + begin + offsets, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["batch", "num_iters"])
def sinkhorn_forward_kernel(
    logits, matrix, batch, num_iters, n: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr,
    COMPUTE: tl.constexpr, METHOD: tl.constexpr, COLUMNS_FIRST: tl.constexpr, EPS_START: tl.constexpr,
    EPS_DEN: tl.constexpr, RANGE_CAP: tl.constexpr,
):  # fmt: skip
    """BLOCK matrices: load once, iterate in registers, store once."""
    x = load_matrices(logits, batch, n, N, BLOCK, LANE, COMPUTE)
    p = tile.sinkhorn(x, num_iters, n, METHOD, COLUMNS_FIRST, LANE, EPS_START, EPS_DEN, RANGE_CAP)
    store_matrices(matrix, p, batch, n, N, BLOCK, LANE)


@triton.jit(do_not_specialize=["batch", "num_iters"])
def sinkhorn_backward_kernel(
    logits, grad_matrix, grad_logits, batch, num_iters, n: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
    LANE: tl.constexpr, LENGTH: tl.constexpr, COMPUTE: tl.constexpr, METHOD: tl.constexpr,
    COLUMNS_FIRST: tl.constexpr, EPS_START: tl.constexpr, EPS_DEN: tl.constexpr, RANGE_CAP: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """BLOCK matrices: the scalings are recomputed from the logits, LENGTH iterations at a time."""
    x = load_matrices(logits, batch, n, N, BLOCK, LANE, COMPUTE)
    g = load_matrices(grad_matrix, batch, n, N, BLOCK, LANE, COMPUTE)
    d = tile.sinkhorn_vjp(x, g, num_iters, n, METHOD, COLUMNS_FIRST, LANE, LENGTH, EPS_START, EPS_DEN, RANGE_CAP, WHOLE)
    store_matrices(grad_logits, d, batch, n, N, BLOCK, LANE)


_METHODS = {"knopp": tile.KNOPP.value, "log": tile.KNOPP.value, "damped": tile.DAMPED.value}


def _options(
    logits: torch.Tensor, method: str, first: str, eps_start: float, eps_den: float, range_cap: float | None
) -> dict[str, Any]:
    n = logits.shape[-1]
    return {
        "n": n,
        "N": triton.next_power_of_2(n),
        "COMPUTE": tl.float64 if logits.dtype == torch.float64 else tl.float32,
        "METHOD": _METHODS[method],
        "COLUMNS_FIRST": first == "columns",
        "EPS_START": float(eps_start),
        "EPS_DEN": float(eps_den),
        "RANGE_CAP": None if range_cap is None else float(range_cap),
    }


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
        At least 1. A run-time value: no recompilation.
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
    options = _options(logits, method, first, eps_start, eps_den, range_cap)
    block, warps = _FORWARD[options["N"]]
    batch = logits.shape[0]
    with device_of(logits):
        sinkhorn_forward_kernel[(triton.cdiv(batch, block),)](
            logits,
            matrix,
            batch,
            num_iters,
            BLOCK=block,
            LANE=options["N"] <= _LANE_FORWARD,
            num_warps=warps,
            **options,
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
    options = _options(logits, method, first, eps_start, eps_den, range_cap)
    block, warps, length = _BACKWARD[options["N"]]
    plain = method != "damped" and range_cap is None and options["COMPUTE"] == tl.float32
    whole = plain and num_iters == _USUAL_COUNT and options["N"] in _BACKWARD_WHOLE
    if whole:
        (block, warps), length = _BACKWARD_WHOLE[options["N"]], num_iters
    batch = logits.shape[0]
    with device_of(logits):
        sinkhorn_backward_kernel[(triton.cdiv(batch, block),)](
            logits, grad_matrix, grad_logits, batch, num_iters, BLOCK=block, LENGTH=length,
            LANE=options["N"] <= _LANE_BACKWARD, WHOLE=whole, num_warps=warps, **options
        )  # fmt: skip
    return grad_logits


def device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """The tensor's device as the current one; nothing to do for the interpreter's CPU tensors."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()

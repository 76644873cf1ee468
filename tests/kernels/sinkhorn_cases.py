"""Inputs, the float64 oracle and the accuracy contract that the tests of the Sinkhorn kernels share."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from birkhoff import reference

__all__ = ["UNIT", "allowed", "expected", "expected_gradient", "marginal_error", "vertices"]

First = Literal["columns", "rows"]

#: Unit roundoff of what is stored.
UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def _axis(first: First) -> int:
    return -2 if first == "columns" else -1


def expected(
    logits: np.ndarray, *, method: str, num_iters: int, first: First, range_cap: float | None = None, **eps: float
) -> np.ndarray:
    """The oracle's matrix for the kernels' arguments."""
    if range_cap is not None:
        logits = np.maximum(logits, logits.max(axis=_axis(first), keepdims=True) - range_cap)
    if method == "damped":
        return reference.sinkhorn_damped(logits, num_iters, first=first, **eps)
    with np.errstate(invalid="ignore"):
        return reference.sinkhorn(logits, num_iters, first=first)


def expected_gradient(
    logits: np.ndarray,
    grad: np.ndarray,
    *,
    method: str,
    num_iters: int,
    first: First,
    range_cap: float | None = None,
    **eps: float,
) -> np.ndarray:
    """The oracle's gradient: autograd in float64 over the plain recurrence."""
    axis, last = _axis(first), -3 - _axis(first)
    x = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    y = x
    if range_cap is not None:
        floor = x.amax(axis, keepdim=True) - range_cap
        y = torch.where(x < floor, floor, x)
    if method == "damped":
        y = torch.softmax(y, axis) + eps["eps_start"]
        y = y / (y.sum(last, keepdim=True) + eps["eps_den"])
        for _ in range(num_iters - 1):
            for side in (axis, last):
                y = y / (y.sum(side, keepdim=True) + eps["eps_den"])
    else:
        for _ in range(num_iters):
            for side in (axis, last):
                y = y - torch.logsumexp(y, side, keepdim=True)
        y = y.exp()
    (out,) = torch.autograd.grad(y, x, torch.tensor(grad, dtype=torch.float64))
    return out.numpy()


def allowed(logits: np.ndarray, dtype: torch.dtype) -> float:
    """The accuracy contract, 4 n u max(1, range / 16), plus the rounding of what is stored."""
    finite = logits[np.isfinite(logits)]
    spread = max(1.0, float(finite.max() - finite.min()) / 16) if finite.size else 1.0
    compute = UNIT[torch.float64] if dtype == torch.float64 else UNIT[torch.float32]
    return 4 * logits.shape[-1] * compute * spread + (UNIT[dtype] if UNIT[dtype] > 2.0**-24 else 0.0)


def marginal_error(matrix: Any, axis: int) -> float:
    """``max |sum - 1|`` in float64."""
    return float((torch.as_tensor(matrix).double().sum(axis) - 1).abs().max())


def vertices(height: float, step: int = 1) -> torch.Tensor:
    """The 4 x 4 matrices with entries in {0, height}: every `step`-th of all 65 536."""
    codes = torch.arange(0, 1 << 16, step)
    return ((codes[:, None] >> torch.arange(16)) & 1).reshape(-1, 4, 4).float() * height

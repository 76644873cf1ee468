"""Rigorous enclosures by ball arithmetic (python-flint, Arb).

The stored logits are exact real numbers. Each ball is a midpoint with a proven radius, so what comes out contains the
value that exact arithmetic would give: no trust in any floating-point library is left, only in Arb.

>>> import numpy as np
>>> from proofs.enclosure import iterate, width
>>> balls = iterate(np.array([[0.0, 1.0], [2.0, 0.0]]), 20)
>>> width(balls) < 1e-50
True
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import numpy as np

__all__ = ["TIGHT", "available", "distance", "iterate", "width"]

TIGHT = 1e-30
"""An enclosure wider than this would say little; containment is only accepted together with narrowness."""

_MAX_SIZE = 8

Balls = list[list[Any]]


def available() -> bool:
    """Whether python-flint is installed."""
    return importlib.util.find_spec("flint") is not None


def _flint() -> Any:
    try:
        return importlib.import_module("flint")
    except ImportError as error:
        raise ImportError("enclosures need python-flint; pip install 'birkhoff-mhc[proofs]'") from error


def _precision(num_iters: int) -> int:
    """Bits that survive: a division of an interval by a sum that contains it triples the relative radius at most."""
    return 192 + 4 * num_iters


def iterate(
    logits: np.ndarray,
    num_iters: int,
    *,
    first: str = "columns",
    eps: tuple[float, float] | None = None,
    extra_bits: int = 0,
) -> Balls:
    """Enclose the iterate after `num_iters` iterations on one matrix of floats.

    Parameters
    ----------
    logits : numpy.ndarray, shape (n, n)
        n <= 8. ``-inf`` is an exact zero.
    num_iters : int
    first : {"columns", "rows"}
    eps : (eps_start, eps_den), optional
        Enclose the damped recurrence instead; the two floats are taken as exact.
    extra_bits : int
        Work with this many bits more, for more digits.

    Returns
    -------
    list of lists of flint.arb
    """
    logits = np.asarray(logits, dtype=np.float64)
    if logits.ndim != 2 or logits.shape[0] != logits.shape[1] or logits.shape[0] > _MAX_SIZE:
        raise ValueError(f"got shape {logits.shape}; give one matrix (n, n) with n <= {_MAX_SIZE}")
    flint = _flint()
    saved = flint.ctx.prec
    flint.ctx.prec = _precision(num_iters) + extra_bits
    try:
        # dividing by the largest entry first is exact in the algebra and keeps exp away from overflow
        top = max((float(v) for v in logits.ravel() if np.isfinite(v)), default=0.0)
        matrix = [[_exp(flint, value, top) for value in row] for row in logits]
        axes = (_divide_columns, _divide_rows) if first == "columns" else (_divide_rows, _divide_columns)
        if eps is None:
            for _ in range(num_iters):
                matrix = axes[1](axes[0](matrix, None), None)
            return matrix
        start, denominator = flint.arb(float(eps[0])), flint.arb(float(eps[1]))
        matrix = [[value + start for value in row] for row in axes[0](matrix, None)]
        matrix = axes[1](matrix, denominator)
        for _ in range(num_iters - 1):
            matrix = axes[1](axes[0](matrix, denominator), denominator)
        return matrix
    finally:
        flint.ctx.prec = saved


def _exp(flint: Any, value: float, top: float) -> Any:
    if value == -np.inf:
        return flint.arb(0)
    return (flint.arb(float(value)) - flint.arb(top)).exp()


def _divide_rows(matrix: Balls, eps: Any) -> Balls:
    out = []
    for row in matrix:
        total: Any = sum(row[1:], row[0])
        if eps is not None:
            total = total + eps
        out.append(row if total.is_zero() else [value / total for value in row])
    return out


def _divide_columns(matrix: Balls, eps: Any) -> Balls:
    return [list(row) for row in zip(*_divide_rows([list(c) for c in zip(*matrix, strict=True)], eps), strict=True)]


def width(balls: Balls) -> float:
    """Return an upper bound of the largest diameter."""
    return max(2 * float(value.rad().upper()) for row in balls for value in row)


def distance(balls: Balls, matrix: np.ndarray) -> float:
    """Return an upper bound of max |entry - true value|, the entries of `matrix` taken as exact; inf for NaN."""
    if not np.all(np.isfinite(matrix)):
        return float("inf")
    flint = _flint()
    saved = flint.ctx.prec
    flint.ctx.prec = 256
    try:
        largest = max(
            float(abs(ball - flint.arb(float(value))).upper())
            for row, stored in zip(balls, matrix, strict=True)
            for ball, value in zip(row, stored, strict=True)
        )
        return float(np.nextafter(largest, np.inf))
    finally:
        flint.ctx.prec = saved

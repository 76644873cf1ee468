"""Inputs that every solver meets in the contract tests, and what may be asked of each solver."""

from __future__ import annotations

from typing import Any

import numpy as np

from birkhoff import reference, solvers

__all__ = ["SINKHORN", "SOLVERS", "adversarial", "gaussian", "oracle", "solver_id", "unit"]

SOLVERS = [getattr(solvers, name) for name in solvers.__all__]
"""Every class that the library lists: a new solver is tested by being listed."""

SINKHORN = [kind for kind in SOLVERS if hasattr(kind, "trajectory")]
"""Those that promise a truncated iteration, which the oracle computes."""


def solver_id(kind: type) -> str:
    return kind.__name__


def unit(dtype: Any) -> float:
    return float(np.finfo(dtype).eps) / 2


def oracle(solver: Any, logits: np.ndarray) -> np.ndarray:
    """What the solver should give, in float64 by the reference."""
    if solver.method == "damped":
        return reference.sinkhorn_damped(
            logits, solver.num_iters, first=solver.first, eps_start=solver.eps_start, eps_den=solver.eps_den
        )
    return reference.sinkhorn(logits, solver.num_iters, first=solver.first)


def gaussian(rng: np.random.Generator, n: int, std: float, batch: int, dtype: Any) -> np.ndarray:
    return (rng.normal(size=(batch, n, n)) * std).astype(dtype)


def adversarial(n: int, dtype: Any) -> np.ndarray:
    """Triangular, concentrated, near-permutation, constant, rank-one and block matrices at three ranges."""
    stack = []
    for size in (8.0, 100.0, 1000.0):
        triangular = -size * np.tril(np.ones((n, n)), -1)
        concentrated = np.zeros((n, n))
        concentrated[:-1, 0] = size
        permutation = size * np.roll(np.eye(n), 1, axis=0)
        rank_one = np.linspace(-size, size, n)[:, None] + np.linspace(0, size, n)[None, :]
        chain = -size * np.abs(np.arange(n)[:, None] - np.arange(n)[None, :])
        stack += [triangular, concentrated, permutation, rank_one, chain, np.full((n, n), size)]
    return np.asarray(stack, dtype=dtype)

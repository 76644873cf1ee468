"""The oracle, against exact rational arithmetic, high precision and closed forms."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import pytest

from birkhoff import reference


def rational(matrix: list[list[Fraction]], num_iters: int, first: str) -> list[list[Fraction]]:
    n = len(matrix)
    for _ in range(num_iters):
        for side in ("columns", "rows") if first == "columns" else ("rows", "columns"):
            if side == "columns":
                sums = [sum(matrix[i][j] for i in range(n)) for j in range(n)]
                matrix = [[matrix[i][j] / sums[j] for j in range(n)] for i in range(n)]
            else:
                matrix = [[entry / sum(row) for entry in row] for row in matrix]
    return matrix


@pytest.mark.parametrize("first", ["columns", "rows"])
def test_truncated_iteration_is_the_rational_one(first: Any, rng: Any) -> None:
    for n, num_iters in ((2, 5), (3, 4), (4, 2)):
        whole = rng.integers(1, 9, size=(n, n))
        exact = rational([[Fraction(int(v)) for v in row] for row in whole], num_iters, first)
        got = reference.sinkhorn(np.log(whole), num_iters, first=first)
        assert np.abs(got - np.array([[float(v) for v in row] for row in exact])).max() <= 4e-16 * n


def test_wide_logits_agree_with_fifty_digits(rng: Any) -> None:
    values = rng.normal(size=(3, 3)) * 300
    with mpmath.workdps(50):
        m = [[mpmath.exp(mpmath.mpf(float(v))) for v in row] for row in values]
        for _ in range(20):
            sums = [m[0][j] + m[1][j] + m[2][j] for j in range(3)]
            m = [[m[i][j] / sums[j] for j in range(3)] for i in range(3)]
            m = [[v / sum(row) for v in row] for row in m]
        exact = np.array([[float(v) for v in row] for row in m])
    assert np.abs(reference.sinkhorn(values) - exact).max() <= 1e-12


def test_damped_without_epsilon_is_the_plain_iteration(rng: Any) -> None:
    values = rng.normal(size=(10, 4, 4))
    damped = reference.sinkhorn_damped(values, 6, eps_start=0.0, eps_den=0.0)
    assert np.abs(damped - reference.sinkhorn(values, 6, first="rows")).max() <= 1e-15
    transposed = reference.sinkhorn_damped(values.transpose(0, 2, 1), 6).transpose(0, 2, 1)
    assert np.abs(transposed - reference.sinkhorn_damped(values, 6, first="columns")).max() <= 1e-15


def test_limit_is_doubly_stochastic_and_diagonally_equivalent(rng: Any) -> None:
    values = rng.normal(size=(20, 4, 4)) * 5
    limit = reference.converged(values)
    assert np.abs(limit.sum(axis=-1) - 1).max() <= 1e-12 and np.abs(limit.sum(axis=-2) - 1).max() <= 1e-12
    scaling = np.log(limit) - values  # = f_i + g_j
    cross = scaling[:, 1:, 1:] - scaling[:, :1, 1:] - scaling[:, 1:, :1] + scaling[:, :1, :1]
    assert np.abs(cross).max() <= 1e-9


def test_gradient_is_the_limit_of_differences(rng: Any) -> None:
    values, upstream = rng.normal(size=(3, 3)), rng.normal(size=(3, 3))
    grad = reference.gradient(values, upstream, 4)
    for entry in np.ndindex(3, 3):
        change = np.zeros((3, 3))
        change[entry] = 1e-6
        ahead, behind = (reference.sinkhorn(values + sign * change, 4) for sign in (1, -1))
        assert abs(((ahead - behind) * upstream).sum() / 2e-6 - grad[entry]) <= 1e-9


def test_library_does_not_import_the_oracle() -> None:
    import subprocess
    import sys

    probe = "import sys, birkhoff; print('birkhoff.reference' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout.strip() == "False"

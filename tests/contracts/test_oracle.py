"""The accuracy contract: every Sinkhorn solver against the float64 oracle of the same iteration, on every library."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import birkhoff
from tests.backends import BACKENDS, Backend, to_numpy
from tests.contracts.cases import SINKHORN, SOLVERS, adversarial, gaussian, oracle, solver_id, unit


@pytest.mark.parametrize("kind", SINKHORN, ids=solver_id)
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("first", ["columns", "rows"])
def test_entries_are_within_the_contract(kind: type, backend: Backend, dtype: Any, first: str, rng: Any) -> None:
    solver = kind(first=first)
    for n in (1, 2, 3, 4, 8, 17):
        batch = 60 if n <= 8 else 8
        values = [gaussian(rng, n, std, batch, dtype) for std in (0.1, 1, 3, 10, 30, 100)]
        stack = np.concatenate([*values, adversarial(n, dtype)])
        spread = stack.max(axis=(-2, -1)) - stack.min(axis=(-2, -1))
        matrix = to_numpy(birkhoff.project(backend.asarray(stack), solver).matrix)
        error = np.abs(matrix - oracle(solver, stack)).max(axis=(-2, -1))
        assert (error <= 4 * n * unit(dtype) * np.maximum(1, spread / 16)).all(), n


@pytest.mark.parametrize("kind", SOLVERS, ids=solver_id)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 4, 9, 40])
def test_numpy_and_strict_give_the_same_bits(kind: type, dtype: Any, n: int, rng: Any) -> None:
    strict = next(row for row in BACKENDS if getattr(row, "name", "") == "strict")
    values = np.concatenate([gaussian(rng, n, std, 30 if n < 40 else 3, dtype) for std in (1, 10, 60)])
    expected = birkhoff.project(values, kind()).matrix
    assert (to_numpy(birkhoff.project(strict.asarray(values), kind()).matrix) == expected).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", SINKHORN, ids=solver_id)
def test_half_precision_is_the_rounded_float32_result(kind: type, dtype: str, rng: Any) -> None:
    torch = pytest.importorskip("torch")
    logits = torch.tensor(gaussian(rng, 4, 3.0, 50, np.float32)).to(getattr(torch, dtype))
    matrix = birkhoff.project(logits, kind()).matrix
    assert matrix.dtype == logits.dtype
    assert torch.equal(matrix, birkhoff.project(logits.float(), kind()).matrix.to(logits.dtype))
    if dtype == "float16":
        assert (birkhoff.project(logits.numpy(), kind()).matrix == matrix.numpy()).mean() > 0.99

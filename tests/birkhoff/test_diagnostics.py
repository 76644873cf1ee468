"""Diagnostics against NumPy's own linear algebra, on every library, without a look at the data."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

import birkhoff
from birkhoff import diagnostics
from birkhoff.errors import DtypeError, OptionError, ShapeError
from tests.backends import BACKENDS, Backend, to_numpy


def doubly_stochastic(n: int, count: int) -> np.ndarray:
    logits = np.random.default_rng(n).normal(size=(count, n, n))
    return birkhoff.project(logits, birkhoff.solvers.SinkhornLog(num_iters=300)).matrix


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 9])
def test_all_numbers(backend: Backend, dtype: str, n: int) -> None:
    matrix = doubly_stochastic(n, 40)
    matrix[0], matrix[1] = np.eye(n)[::-1], 1.0 / n
    numbers = diagnostics.diagnose(backend.asarray(matrix.astype(dtype)))
    eigenvalues = np.sort(np.abs(np.linalg.eigvals(matrix)), axis=-1)
    singular = np.linalg.svd(matrix, compute_uv=False)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.nansum(matrix * np.log(matrix), axis=(-2, -1)) / n
    expected = {
        "row_error": np.abs(matrix.sum(-1) - 1).max(-1),
        "column_error": np.abs(matrix.sum(-2) - 1).max(-1),
        "forward_gain_min": matrix.sum(-1).min(-1),
        "forward_gain_max": matrix.sum(-1).max(-1),
        "backward_gain_min": matrix.sum(-2).min(-1),
        "backward_gain_max": matrix.sum(-2).max(-1),
        "entropy": entropy,
        "effective_number": np.exp(entropy),
        "second_eigenvalue": eigenvalues[:, -2] if n > 1 else np.zeros(40),
        "second_singular_value": singular[:, 1] if n > 1 else np.zeros(40),
        "distance_to_identity": np.linalg.norm(matrix - np.eye(n), axis=(-2, -1)),
        "distance_to_uniform": np.linalg.norm(matrix - 1 / n, axis=(-2, -1)),
    }
    assert set(expected) == {field.name for field in dataclasses.fields(numbers)}
    tolerance = 2e-5 if dtype == "float32" else 4e-6  # the power 2^20 of the eigenvalue
    for name, values in expected.items():
        np.testing.assert_allclose(to_numpy(getattr(numbers, name)), values, atol=tolerance, err_msg=name)


def test_extremes() -> None:
    cycle = np.eye(5)[[1, 2, 3, 4, 0]]
    assert float(diagnostics.second_eigenvalue(cycle)) == pytest.approx(1.0, abs=4e-6)
    assert float(diagnostics.entropy(cycle)) == 0.0
    assert float(diagnostics.effective_number(np.full((5, 5), 0.2))) == pytest.approx(5.0)
    assert float(diagnostics.second_eigenvalue(np.full((4, 4), 0.25))) == 0.0
    # Not symmetric: the eigenvalue is far below the singular value, and both are right.
    skewed = np.array([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5], [0.5, 0.0, 0.5]])
    assert float(diagnostics.second_eigenvalue(skewed)) == pytest.approx(0.5, abs=4e-6)
    assert float(diagnostics.second_singular_value(skewed)) > 0.9


def test_second_singular_value_without_exact_sums() -> None:
    """Defined as the norm of W P W: both the row and the column means are taken out."""
    matrix = np.random.default_rng(0).random((20, 4, 4))
    centre = np.eye(4) - 0.25
    expected = np.linalg.norm(centre @ matrix @ centre, 2, axis=(-2, -1))
    np.testing.assert_allclose(diagnostics.second_singular_value(matrix), expected, atol=4e-6)


def test_gain_definitions() -> None:
    matrix = np.array([[2.0, -1.0], [0.0, 0.5]])
    assert diagnostics.forward_gain(matrix) == (0.5, 1.0)
    assert diagnostics.forward_gain(matrix, definition="absolute") == (0.5, 3.0)
    assert diagnostics.backward_gain(matrix) == (0.5, 2.0)
    assert diagnostics.backward_gain(matrix, definition="absolute") == (1.5, 2.0)


def test_half_precision_is_computed_in_float32() -> None:
    matrix = torch.rand(3, 4, 4).softmax(-1).bfloat16()
    numbers = diagnostics.diagnose(matrix)
    assert numbers.row_error.dtype == torch.float32
    assert torch.equal(numbers.distance_to_uniform, diagnostics.distance_to_uniform(matrix.float()))


@pytest.mark.filterwarnings("error")
def test_what_is_not_a_number_is_not_hidden() -> None:
    """A matrix of NaN is no permutation: every number of it is NaN, and its neighbour's are not."""
    matrix = np.stack([np.full((3, 3), np.nan), np.eye(3)])
    for name, numbers in dataclasses.asdict(diagnostics.diagnose(matrix)).items():
        assert np.isnan(numbers[0]) and np.isfinite(numbers[1]), name
    diagnostics.diagnose(np.full((3, 3), 1e200))  # no warning for what overflows either


@pytest.mark.parametrize("distance", [diagnostics.distance_to_identity, diagnostics.second_singular_value])
def test_distances_have_a_gradient_where_they_vanish(distance: Any) -> None:
    """As a penalty they start there."""
    matrix = (
        torch.eye(3, dtype=torch.float64) if distance is diagnostics.distance_to_identity else torch.full((3, 3), 1 / 3)
    )
    matrix.requires_grad_()
    distance(matrix).backward()
    assert torch.equal(matrix.grad, torch.zeros_like(matrix))


def test_nothing_looks_at_the_data() -> None:
    """A tensor without values goes through: so nothing waits for a device."""
    numbers = diagnostics.diagnose(torch.empty(7, 4, 4, device="meta"))
    assert numbers.second_eigenvalue.shape == (7,)


def test_misuse() -> None:
    with pytest.raises(ShapeError):
        diagnostics.diagnose(np.ones((2, 3)))
    with pytest.raises(ShapeError):
        diagnostics.entropy(np.ones((0, 0)))
    with pytest.raises(DtypeError):
        diagnostics.entropy(np.ones((2, 2), dtype=int))
    with pytest.raises(OptionError, match="signed"):
        diagnostics.forward_gain(np.eye(2), definition="norm")


def test_entropy_is_bounded() -> None:
    matrix = doubly_stochastic(6, 20)
    assert (diagnostics.entropy(matrix) <= math.log(6) + 1e-12).all()

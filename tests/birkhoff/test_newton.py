"""Newton: the converged projection to its tolerance at every logit range, in single precision too."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import birkhoff
from birkhoff import reference
from birkhoff._tangent import solve_laplacian
from birkhoff.adjoints import Implicit
from birkhoff.errors import OptionError
from birkhoff.solvers import Newton
from tests.contracts.cases import adversarial


def errors(matrix: np.ndarray) -> np.ndarray:
    exact = matrix.astype(np.float64)
    return np.maximum(np.abs(exact.sum(axis=-1) - 1).max(axis=-1), np.abs(exact.sum(axis=-2) - 1).max(axis=-1))


@pytest.mark.parametrize(("dtype", "tol"), [(np.float32, 1e-6), (np.float64, 1e-12)])
@pytest.mark.parametrize("std", [1.0, 3.0, 10.0, 30.0, 100.0, 300.0])
def test_reaches_its_tolerance_at_every_range(dtype: Any, tol: float, std: float, rng: Any) -> None:
    for n, batch in ((2, 300), (3, 300), (4, 1000), (8, 100), (16, 20), (33, 4), (64, 2)):
        values = (rng.normal(size=(batch, n, n)) * std).astype(dtype)
        result = birkhoff.project(values, Newton(tol=tol))
        assert errors(result.matrix).max() <= tol, n
        assert (result.status == 0).all()


def test_steps_are_few(rng: Any) -> None:
    for std, most in ((1.0, 4), (3.0, 8), (10.0, 18), (30.0, 20)):
        values = rng.normal(size=(2000, 4, 4)) * std
        assert birkhoff.project(values, Newton(tol=1e-6)).num_iters.max() <= most


@pytest.mark.parametrize("first", ["columns", "rows"])
def test_solves_vertices(first: str) -> None:
    vertices = np.array(list(itertools.product([0.0, 100.0], repeat=16)), dtype=np.float32).reshape(-1, 4, 4)[::17]
    result = birkhoff.project(vertices, Newton(first=first))
    assert errors(result.matrix).max() <= 1e-6 and (result.status == 0).all()


@pytest.mark.slow
def test_solves_all_vertices() -> None:
    vertices = np.array(list(itertools.product([0.0, 100.0], repeat=16)), dtype=np.float32).reshape(-1, 4, 4)
    result = birkhoff.project(vertices, Newton())
    assert errors(result.matrix).max() <= 1e-6 and (result.status == 0).all() and result.num_iters.max() <= 20


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_solves_adversarial_inputs(dtype: Any) -> None:
    for n in (3, 4, 8, 16):
        for values in (adversarial(n, dtype), adversarial(n, dtype).transpose(0, 2, 1)):
            assert errors(birkhoff.project(values, Newton()).matrix).max() <= 1e-6


def test_is_the_limit_of_the_oracle(rng: Any) -> None:
    for n, std in ((2, 3.0), (3, 2.0), (5, 4.0)):
        values = rng.normal(size=(20, n, n)) * std
        matrix = birkhoff.project(values, Newton(tol=1e-13)).matrix
        assert np.abs(matrix - reference.converged(values)).max() <= 1e-11
    values = rng.normal(size=(20, 4, 4))
    assert np.abs(birkhoff.project(values, Newton(tol=1e-13)).matrix - reference.sinkhorn(values, 2000)).max() <= 1e-11


def test_two_by_two_is_the_closed_form(rng: Any) -> None:
    values = rng.normal(size=(50, 2, 2)) * 40
    theta = values[:, 0, 0] + values[:, 1, 1] - values[:, 0, 1] - values[:, 1, 0]
    result = birkhoff.project(values, Newton())
    assert np.abs(result.matrix[:, 0, 0] - 1 / (1 + np.exp(-theta / 2))).max() <= 1e-14
    assert (result.num_iters == 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_two_by_two_does_not_hide_what_is_not_finite(bad: float) -> None:
    values = np.zeros((4, 2, 2))
    for entry, matrix in enumerate(values):
        matrix.flat[entry] = bad
    result = birkhoff.project(values, Newton())
    assert np.isnan(result.matrix).all() and (result.status == birkhoff.Status.nonfinite_input).all()


def test_a_constant_added_to_a_line_changes_nothing(rng: Any) -> None:
    values = rng.normal(size=(30, 4, 4)) * 3
    moved = values + rng.normal(size=(30, 4, 1)) * 200 + rng.normal(size=(30, 1, 4)) * 200
    plain, shifted = (birkhoff.project(v, Newton(tol=1e-12)).matrix for v in (values, moved))
    assert np.abs(plain - shifted).max() <= 1e-9


def test_range_cap_raises_small_logits() -> None:
    values = np.array([[[0.0, -50.0, -60.0], [-50.0, 0.0, -50.0], [-60.0, -50.0, 0.0]]])
    capped = birkhoff.project(values, Newton(range_cap=3.0)).matrix
    expected = birkhoff.project(np.maximum(values, -3.0), Newton()).matrix
    assert np.abs(capped - expected).max() <= 1e-12


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(OptionError, match="n <= 64"):
        birkhoff.project(np.zeros((65, 65)), Newton())
    with pytest.raises(OptionError, match="tol must be a number"):
        Newton(tol=None)


def test_laplacian_solution_is_accurate_entry_by_entry() -> None:
    """Two clusters joined by links of 1e-30: the exact rational solution, in float32, to a few roundings."""
    weight = np.zeros((4, 4, 1), dtype=np.float32)
    for i, j, w in ((0, 1, 1.0), (2, 3, 3.0), (1, 2, 1e-30)):
        weight[i, j] = weight[j, i] = w
    right = np.array([[1e-30], [0.0], [0.0], [-1e-30]], dtype=np.float32)
    solution = solve_laplacian(weight, right, np)
    expected = np.array([1e-30 + 1.0 + 1e-30 / 3.0, 1.0 + 1e-30 / 3.0, 1e-30 / 3.0, 0.0])
    assert np.abs(solution[:, 0] / np.where(expected == 0, 1, expected) - (expected != 0)).max() <= 1e-6


def test_implicit_gradient_at_a_permutation_is_zero_not_noise(rng: Any) -> None:
    values = (np.eye(4)[rng.permutation(4)] * 60.0 + rng.normal(size=(40, 4, 4))).astype(np.float32)
    grad = Implicit().vjp(values, rng.normal(size=values.shape).astype(np.float32), Newton())
    assert np.abs(grad).max() <= 1e-6


def test_implicit_gradient_is_half_lipschitz_and_annihilates_constants(rng: Any) -> None:
    for std in (0.3, 3.0, 30.0):
        values, upstream = rng.normal(size=(200, 4, 4)) * std, rng.normal(size=(200, 4, 4))
        grad = Implicit().vjp(values, upstream, Newton(tol=1e-12))
        norms = np.linalg.norm(grad, axis=(-2, -1)) / np.linalg.norm(upstream, axis=(-2, -1))
        assert norms.max() <= 0.5 * (1 + 1e-9)
        assert max(np.abs(grad.sum(axis=-1)).max(), np.abs(grad.sum(axis=-2)).max()) <= 1e-10

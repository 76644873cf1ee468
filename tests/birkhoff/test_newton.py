"""Newton: the converged projection to its tolerance at every logit range, in single precision too."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import birkhoff
from birkhoff import _math, reference
from birkhoff._layout import frame_for
from birkhoff._tangent import kl_derivative, solve_flows, solve_laplacian
from birkhoff._xp import array_namespace
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


@pytest.mark.parametrize(
    ("dtype", "tol", "n", "std", "mean", "most"),
    [
        (np.float32, 1e-6, 4, 1.0, 1.94, 3), (np.float32, 1e-6, 4, 10.0, 5.89, 14),
        (np.float32, 1e-6, 4, 30.0, 9.94, 15),
        (np.float32, 1e-6, 4, 100.0, 11.91, 17), (np.float32, 1e-6, 8, 300.0, 15.55, 19),
        (np.float64, 1e-12, 4, 10.0, 7.07, 18), (np.float64, 1e-12, 4, 100.0, 22.06, 30),
        (np.float64, 1e-12, 8, 30.0, 15.48, 28), (np.float64, 1e-12, 16, 300.0, 33.04, 41),
    ],
)  # fmt: skip
def test_steps_are_as_few_as_measured(dtype: Any, tol: float, n: int, std: float, mean: float, most: int) -> None:
    """Direction, length and stopping all tell in the number of steps: one in fifty more is a change for the worse."""
    values = (np.random.default_rng(0).normal(size=(1000 if n < 8 else 100, n, n)) * std).astype(dtype)
    counts = birkhoff.project(values, Newton(tol=tol)).num_iters
    assert counts.mean() <= 1.02 * mean + 0.005 and counts.max() <= most + 2


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


@pytest.mark.parametrize(("dtype", "tol"), [(np.float32, 1e-6), (np.float64, 1e-12)])
def test_implicit_gradient_is_half_lipschitz_and_annihilates_constants(dtype: Any, tol: float, rng: Any) -> None:
    unit = float(np.finfo(dtype).eps) / 2
    for n, std in itertools.product((2, 4, 8), (0.3, 3.0, 30.0, 100.0)):
        values, upstream = (rng.normal(size=(500, n, n)).astype(dtype) * dtype(scale) for scale in (std, 1.0))
        grad = Implicit().vjp(values, upstream, Newton(tol=tol))
        norms = np.linalg.norm(grad, axis=(-2, -1)) / np.linalg.norm(upstream, axis=(-2, -1))
        assert norms.max() <= 0.5 + tol
        assert max(np.abs(grad.sum(axis=-1)).max(), np.abs(grad.sum(axis=-2)).max()) <= 8 * n * unit


def test_float32_gradient_is_the_float64_one_at_every_range(rng: Any) -> None:
    for n, std in itertools.product((3, 4, 8), (1.0, 10.0, 30.0, 100.0)):
        values, upstream = rng.normal(size=(2, 1000, n, n)).astype(np.float32)
        values *= np.float32(std)
        single = Implicit().vjp(values, upstream, Newton())
        double = Implicit().vjp(values.astype(float), upstream.astype(float), Newton(tol=1e-12))
        assert np.abs(single - double).max() <= 1e-5, (n, std)


def exact_derivative(matrix: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """The derivative at a matrix of floats in rational arithmetic, rounded at the end."""
    n = len(matrix)
    p, g = ([[Fraction(float(v)) for v in row] for row in array] for array in (matrix, direction))
    r = [sum(row) for row in p]
    system = [[-sum(p[i][j] * p[i][k] / r[i] for i in range(n)) for k in range(n - 1)] for j in range(n - 1)]
    for j in range(n - 1):
        system[j][j] += sum(p[i][j] for i in range(n))
    right = [sum(p[i][j] * (g[i][j] - sum(p[i][k] * g[i][k] for k in range(n)) / r[i]) for i in range(n))
             for j in range(n - 1)]  # fmt: skip
    mu = [*solved(system, right), Fraction(0)]
    moved = [[g[i][j] - mu[j] for j in range(n)] for i in range(n)]
    mean = [sum(p[i][k] * moved[i][k] for k in range(n)) / r[i] for i in range(n)]
    return np.array([[float(p[i][j] * (moved[i][j] - mean[i])) for j in range(n)] for i in range(n)])


def solved(system: list[list[Fraction]], right: list[Fraction]) -> list[Fraction]:
    """Gauss-Jordan elimination."""
    rows = [[*row, b] for row, b in zip(system, right, strict=True)]
    for k in range(len(rows)):
        pivot = [value / rows[k][k] for value in rows[k]]
        rows = [pivot if i == k else [v - row[k] * w for v, w in zip(row, pivot, strict=True)]
                for i, row in enumerate(rows)]  # fmt: skip
    return [row[-1] for row in rows]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("link", [1e-3, 1e-9, 1e-18, 1e-25])
def test_derivative_across_weak_links_is_the_rational_one(dtype: Any, link: float, rng: Any) -> None:
    """Two blocks whose large inner flows cancel, joined by entries of any size: no condition number enters."""
    xp = array_namespace(np.zeros(1))
    for _ in range(10):
        blocks = np.kron(np.eye(2), np.ones((2, 2)))
        matrix = (np.where(blocks > 0, 0.5, link) * rng.uniform(0.9, 1.1, size=(4, 4))).astype(dtype)
        direction = rng.normal(size=(4, 4)).astype(dtype)
        got = kl_derivative(matrix[None], direction[None], frame_for(xp, dtype))[0]
        assert np.abs(got - exact_derivative(matrix, direction)).max() <= 32 * np.finfo(dtype).eps


def test_flows_are_solved_entry_by_entry() -> None:
    """A strong pair with cancelling flows, hung on a weak link: the summed source would lose the link's flow."""
    weight, flow = (np.zeros((3, 3, 1), dtype=np.float32) for _ in range(2))
    for i, j, w, f in ((0, 1, 1.0, 0.7), (1, 2, 1e-20, 1e-20), (0, 2, 1e-20, -3e-20)):
        weight[i, j] = weight[j, i] = w
        flow[i, j], flow[j, i] = f, -f
    # x0 - x1 = 0.7 up to 1e-20, and 1e-20 ((x0 - x2) + (x1 - x2)) = -2e-20.
    assert np.abs(solve_flows(weight, flow, np)[:, 0] - [-0.65, -1.35, 0.0]).max() <= 1e-6


def test_sources_of_the_size_of_their_noise_count_as_zero() -> None:
    weight, right = np.ones((3, 3, 2)), np.array([[1e-3, 2e-3], [0.0, 0.0], [-1e-3, -2e-3]])
    solved = solve_laplacian(weight, right, np, noise=np.full(2, 1e-3))
    assert (solved[:, 0] == 0.0).all() and np.abs(solved[:, 1] - [2e-3 / 3, 0.0, -2e-3 / 3]).max() > 1e-4


def test_a_rise_of_the_dual_within_its_rounding_does_not_shorten_the_step() -> None:
    """With a smaller allowance for the rounding these, of 30 000 wide matrices, took longest: 32 to 44 steps."""
    values = np.round(np.random.default_rng(11).normal(size=(30000, 8, 8)) * 300)
    slowest = [3973, 19009, 7164, 20958, 15699, 27266, 4146, 8112, 9237, 9364, 15932, 19072, 23934, 480, 3440, 4732]
    counts = birkhoff.project(values[slowest], Newton(tol=1e-12)).num_iters
    assert counts.mean() <= 31.5


@pytest.mark.parametrize("std", [30.0, 100.0, 300.0])
def test_the_range_that_bounds_a_step_is_that_of_the_finite_logits(std: float) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(100, 8, 8)) * std
    zeros = (rng.random(values.shape) < 0.1) & ~np.eye(8, dtype=bool)  # the diagonal keeps total support likely
    values[zeros] = -np.inf
    result = birkhoff.project(values, Newton(tol=1e-9))
    assert (result.status != int(birkhoff.Status.max_iters_reached)).all() and result.num_iters.max() <= 40


@pytest.mark.parametrize(("n", "batch", "std", "mean"), [(16, 300, 30.0, 20.0), (64, 24, 10.0, 11.5)])
def test_steps_are_few_on_a_device_without_float64(
    n: int, batch: int, std: float, mean: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There the right side keeps the rounding of its sums but for their mean and sources below sqrt(n) units."""
    monkeypatch.setattr(_math, "accumulate_dtype", lambda xp, array: array.dtype)
    values = (np.random.default_rng(21).normal(size=(batch, n, n)) * std).astype(np.float32)
    result = birkhoff.project(values, Newton())
    assert (result.status == 0).all() and result.num_iters.mean() <= mean

"""Euclidean projection: optimality conditions, an independent method, exact zeros, and its Jacobian."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import birkhoff
from birkhoff._elimination import solve_positive_definite
from birkhoff._layout import Frame
from birkhoff._xp import array_namespace
from birkhoff.adjoints import Implicit
from birkhoff.errors import OptionError
from birkhoff.solvers import Euclidean
from tests.backends import BACKENDS, Backend, to_numpy

UNIT = {"float32": 2.0**-24, "float64": 2.0**-53}


def dykstra(matrix: np.ndarray, sweeps: int) -> np.ndarray:
    """Dykstra's alternating projections: the affine set W X W + J, and the non-negative matrices."""
    n = matrix.shape[-1]
    uniform = np.full((n, n), 1.0 / n)
    centre = np.eye(n) - uniform
    point, first, second = matrix, np.zeros_like(matrix), np.zeros_like(matrix)
    for _ in range(sweeps):
        affine = centre @ (point + first) @ centre + uniform
        first = point + first - affine
        point = np.maximum(affine + second, 0)
        second = affine + second - point
    return point


def optimality_gap(matrix: np.ndarray, projected: np.ndarray) -> float:
    """max over permutations V of <X - P, V - P>: zero exactly for the projection (variational inequality)."""
    n = matrix.shape[-1]
    permutations = np.array([np.eye(n)[list(p)] for p in itertools.permutations(range(n))])
    products = np.einsum("bij,pij->bp", matrix - projected, permutations)
    own = np.einsum("bij,bij->b", matrix - projected, projected)
    return float((products - own[:, None]).max())


@pytest.mark.parametrize(
    ("n", "std", "mean", "most"),
    [
        (4, 0.3, 3.75, 5), (4, 1.0, 5.07, 8), (4, 10.0, 3.22, 9), (4, 100.0, 2.22, 9), (8, 1.0, 6.26, 10),
        (8, 10.0, 6.7, 13), (8, 100.0, 4.64, 15), (8, 1000.0, 4.21, 14), (16, 1.0, 7.34, 16), (16, 10.0, 10.51, 17),
    ],
)  # fmt: skip
def test_steps_are_as_few_as_measured(n: int, std: float, mean: float, most: int) -> None:
    """Direction, lengths, ridge and scale tell in the number of steps: one in fifty more is a change for the worse."""
    values = np.random.default_rng(0).normal(size=(400, n, n)) * std
    result = birkhoff.project(values, Euclidean(num_iters=80, tol=1e-12 * max(1.0, std)))
    assert (result.status == 0).all()
    assert result.num_iters.mean() <= 1.02 * mean + 0.005 and result.num_iters.max() <= most + 2


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("first", ["columns", "rows"])
@pytest.mark.parametrize(("n", "std"), [(1, 1.0), (2, 10.0), (4, 0.3), (4, 1.0), (4, 100.0), (9, 3.0)])
def test_optimality(backend: Backend, dtype: str, first: str, n: int, std: float) -> None:
    matrix = np.random.default_rng(n).normal(0, std, (40, n, n)).astype(dtype)
    result = birkhoff.project(backend.asarray(matrix), Euclidean(first=first))
    projected = to_numpy(result.matrix)
    assert projected.min() >= 0.0
    wide = projected.astype(np.longdouble)
    errors = np.abs(wide.sum(-1) - 1).max(), np.abs(wide.sum(-2) - 1).max()
    exact, solved = errors if first == "columns" else errors[::-1]
    assert exact <= (n + 1) * UNIT[dtype]
    assert solved <= 8 * n * UNIT[dtype] * max(1.0, 4 * std)
    assert (to_numpy(result.status) == 0).all()
    if n <= 4:
        gap = optimality_gap(matrix.astype(np.float64), projected.astype(np.float64))
        assert gap <= 64 * n * UNIT[dtype] * max(1.0, 4 * std) ** 2


def test_optimality_gap_has_teeth() -> None:
    """The KL projection, and a Euclidean one that is slightly off, fail the variational inequality."""
    matrix = np.random.default_rng(0).normal(size=(40, 4, 4))
    nearest = birkhoff.project(matrix, Euclidean()).matrix
    assert optimality_gap(matrix, nearest) < 1e-13
    assert optimality_gap(matrix, birkhoff.project(matrix, finish="exact").matrix) > 0.1
    assert optimality_gap(matrix, 0.999999 * nearest + 0.000001 / 4) > 1e-8


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_against_dykstra(n: int) -> None:
    matrix = np.random.default_rng(n).normal(size=(10, n, n))
    np.testing.assert_allclose(birkhoff.project(matrix, Euclidean()).matrix, dykstra(matrix, 3000), atol=1e-12)


@pytest.mark.parametrize("scale", [3.0, 100.0])
def test_all_vertices_converge(scale: float) -> None:
    """Every 23rd of the 65 536 matrices with entries in {0, scale}: many ties, many faces."""
    bits = (np.arange(0, 65536, 23)[:, None] >> np.arange(16)) & 1
    matrix = bits.reshape(-1, 4, 4) * scale
    result = birkhoff.project(matrix, Euclidean())
    assert result.column_error.max() <= 1e-12


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_last_side_at_n_100(dtype: str) -> None:
    matrix = np.random.default_rng(0).normal(size=(2, 100, 100)).astype(dtype)
    projected = birkhoff.project(matrix, Euclidean(num_iters=12)).matrix
    roundings = 3 if dtype == "float32" else 8  # float32 has its sums in float64, and is divided by them once more
    assert np.abs(projected.astype(np.longdouble).sum(-1) - 1).max() <= roundings * UNIT[dtype]


@pytest.mark.parametrize("first", ["columns", "rows"])
def test_a_line_without_finite_entries_becomes_zero_and_the_others_are_projected(first: str) -> None:
    matrix = np.random.default_rng(0).normal(size=(3, 3))
    matrix[1] = -np.inf
    matrix = matrix if first == "columns" else matrix.T
    projected = birkhoff.project(matrix, Euclidean(first=first)).matrix
    projected = projected if first == "columns" else projected.T
    assert (projected[1] == 0.0).all()
    assert np.abs(projected[[0, 2]].sum(axis=1) - 1).max() <= 1e-15


def _numpy_frame(accumulate: type) -> Frame:
    return Frame(array_namespace(np.zeros(1)), -2, -1, accumulate, branch=True)


@pytest.mark.parametrize(("spread", "scale"), [(0.5, 1.0), (1.0, 1.0), (1.5, 1.5), (40.0, 40.0)])
def test_the_scale_starts_at_the_spread_but_not_below_one(spread: float, scale: float) -> None:
    matrix = np.array([[[0.0, -spread], [-spread / 2, 0.0]]])
    assert Euclidean().init(matrix, _numpy_frame(np.float64))[2].item() == scale


def test_a_matrix_that_is_balanced_at_the_starting_scale_is_not_yet_solved() -> None:
    """Spread 1.6: at that scale the rows' projections have columns of sum one, at scale one they have not."""
    balanced = np.array([[0.5, 0.3, 0.2], [0.3, 0.7, 0.0], [0.2, 0.0, 0.8]])
    matrix = 1.6 * balanced - np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 0.48], [0.0, 0.1, 0.0]])
    projected = birkhoff.project(matrix, Euclidean()).matrix
    assert np.abs(projected.sum(axis=0) - 1).max() <= 1e-14
    np.testing.assert_allclose(projected, dykstra(matrix, 3000), atol=1e-12)


@pytest.mark.parametrize(("n", "std"), [(4, 1.0), (4, 100.0), (8, 10.0), (8, 100.0)])
def test_a_settled_matrix_costs_nothing_more(n: int, std: float) -> None:
    """A step returns the very state once the error is down to rounding, within as few steps as the docstring says."""
    solver, frame = Euclidean(), _numpy_frame(np.float64)
    for matrix in (np.random.default_rng(0).normal(size=(60, 1, n, n)) * std).astype(np.float32):
        state, steps = solver.init(matrix, frame), 0
        while (moved := solver.step(state, frame)) is not state:
            state, steps = moved, steps + 1
            assert steps <= 30


def test_settling_waits_for_the_last_digits_of_wide_matrices() -> None:
    """Potentials of size z round the sums by a few z roundings: no more than a quarter of z eps is left on average."""
    matrix = (np.random.default_rng(0).normal(size=(4000, 4, 4)) * 100).astype(np.float32)
    projected = birkhoff.project(matrix, Euclidean()).matrix.astype(np.float64)
    assert np.abs(projected.sum(axis=-2) - 1).max(axis=-1).mean() <= 4.2e-8


def test_vertices_need_as_few_steps_as_measured() -> None:
    """Ties and faces make the objective flat to its rounding: then the slope has to choose among the lengths."""
    bits = (np.arange(0, 65536, 61)[:, None] >> np.arange(16)) & 1
    result = birkhoff.project(bits.reshape(-1, 4, 4) * 100.0, Euclidean(num_iters=80, tol=1e-12))
    assert result.num_iters.mean() <= 5.6 and result.num_iters.max() <= 17


@pytest.mark.parametrize("std", [100.0, 1000.0])
def test_wide_matrices_need_the_falling_scale(std: float) -> None:
    """Nearly an assignment problem. Going to scale one at once leaves 3 % of those at 1000 unsolved after 100 steps."""
    matrix = np.random.default_rng(1).normal(0, std, (300, 8, 8))
    result = birkhoff.project(matrix, Euclidean(num_iters=25))
    assert result.column_error.max() <= 1e-13 * std


def test_zeros_are_exact_and_points_of_the_polytope_stay() -> None:
    matrix = np.random.default_rng(0).normal(size=(100, 6, 6))
    projected = birkhoff.project(matrix, Euclidean()).matrix
    assert 0.2 < (projected == 0).mean() < 0.8
    np.testing.assert_allclose(birkhoff.project(projected, Euclidean()).matrix, projected, atol=2e-15)
    np.testing.assert_array_equal(birkhoff.project(5.0 * np.eye(5), Euclidean()).matrix, np.eye(5))
    assert birkhoff.project(np.eye(3)[[1, 2, 0]], Euclidean()).matrix.tolist() == np.eye(3)[[1, 2, 0]].tolist()


@given(st.integers(0, 2**31), st.integers(2, 6), st.sampled_from([0.1, 1.0, 20.0]))
@settings(max_examples=40, deadline=None)
def test_firmly_nonexpansive(seed: int, n: int, std: float) -> None:
    rng = np.random.default_rng(seed)
    first, second = rng.normal(0, std, (2, n, n))
    projected = birkhoff.project(np.stack([first, second]), Euclidean()).matrix
    moved = projected[0] - projected[1]
    assert (moved * moved).sum() <= (moved * (first - second)).sum() + 1e-12 * max(1, std)


def test_shifts_do_not_matter_and_transposes_agree() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(30, 5, 5))
    projected = birkhoff.project(matrix, Euclidean()).matrix
    shifted = birkhoff.project(matrix + rng.normal(size=(5, 1)) + rng.normal(size=(1, 5)), Euclidean()).matrix
    np.testing.assert_allclose(shifted, projected, atol=1e-13)
    turned = birkhoff.project(np.swapaxes(matrix, -1, -2), Euclidean(first="rows")).matrix
    np.testing.assert_allclose(np.swapaxes(turned, -1, -2), projected, atol=1e-14)


def test_structural_zeros_and_bad_items() -> None:
    matrix = np.random.default_rng(0).normal(size=(3, 3, 3))
    matrix[0, 0, 0] = -np.inf
    matrix[1, 2, 2] = np.nan
    result = birkhoff.project(matrix, Euclidean())
    assert result.matrix[0, 0, 0] == 0.0
    assert result.column_error[0] < 1e-14
    assert np.isnan(result.matrix[1]).any()
    np.testing.assert_array_equal(result.matrix[2], birkhoff.project(matrix[2], Euclidean()).matrix)
    assert result.status.tolist() == [0, int(birkhoff.Status.nonfinite_input), 0]


def test_tolerance_stops_each_matrix() -> None:
    matrix = np.stack([np.eye(4), np.random.default_rng(0).normal(0, 10, (4, 4))])
    result = birkhoff.project(matrix, Euclidean(tol=1e-10))
    assert result.num_iters[0] < result.num_iters[1] <= 15
    assert result.column_error.max() <= 1e-10


@pytest.mark.parametrize("first", ["columns", "rows"])
def test_gradients_on_torch(first: str) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    solver = Euclidean(first=first, num_iters=12)

    def function(values: torch.Tensor) -> torch.Tensor:
        return birkhoff.project(values, solver).matrix

    assert torch.autograd.gradcheck(function, (matrix,))
    assert torch.autograd.gradgradcheck(function, (matrix,))


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_vector_jacobian_product_on_any_library(backend: Backend) -> None:
    rng = np.random.default_rng(0)
    matrix, direction, step = rng.normal(size=(20, 5, 5)), rng.normal(size=(20, 5, 5)), 1e-7
    moved = [birkhoff.project(matrix + sign * step * direction, Euclidean()).matrix for sign in (1, -1)]
    product = to_numpy(Implicit().vjp(backend.asarray(matrix), backend.asarray(direction), Euclidean()))
    np.testing.assert_allclose(product, (moved[0] - moved[1]) / (2 * step), atol=1e-7)
    # An orthogonal projection onto matrices with the zeros of P and zero sums: sums vanish, and it does not expand.
    assert np.abs(product.sum(axis=-1)).max() < 1e-13
    assert np.abs(product.sum(axis=-2)).max() < 1e-13
    assert (np.linalg.norm(product, axis=(-2, -1)) <= np.linalg.norm(direction, axis=(-2, -1)) + 1e-13).all()


def test_derivative_is_accurate_in_float32() -> None:
    rng = np.random.default_rng(0)
    matrix, direction = rng.normal(size=(2, 50, 8, 8))
    expected = Implicit().vjp(matrix, direction, Euclidean())
    single = Implicit().vjp(matrix.astype(np.float32), direction.astype(np.float32), Euclidean())
    same_face = (
        (birkhoff.project(matrix, Euclidean()).matrix > 0)
        == (birkhoff.project(matrix.astype(np.float32), Euclidean()).matrix > 0)
    ).all(axis=(-2, -1))
    assert same_face.mean() > 0.9
    assert np.abs(single - expected)[same_face].max() < 5e-6


def test_options() -> None:
    for options in ({"num_iters": 0}, {"tol": 0.0}, {"first": "diagonal"}):
        with pytest.raises(OptionError):
            Euclidean(**options)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("batch_last", [False, True])
@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_elimination(backend: Backend, batch_last: bool, n: int) -> None:
    rng = np.random.default_rng(n)
    factor = rng.normal(size=(7, n, n))
    matrix, right = factor @ np.swapaxes(factor, -1, -2) + np.eye(n), rng.normal(size=(7, n, 1))
    matrix[3] = 0.0  # singular: spoils itself only
    expected = np.linalg.solve(matrix[[0, 1, 2, 4, 5, 6]], right[[0, 1, 2, 4, 5, 6]])
    stacks = [np.moveaxis(stack, 0, -1) if batch_last else stack for stack in (matrix, right)]
    arrays = [backend.asarray(stack) for stack in stacks]
    xp = array_namespace(*arrays)
    frame = Frame(xp, 0, 1, xp.float64) if batch_last else Frame(xp, -2, -1, xp.float64)
    with np.errstate(all="ignore"):
        solution = to_numpy(solve_positive_definite(*arrays, frame))
    solution = np.moveaxis(solution, -1, 0) if batch_last else solution
    np.testing.assert_allclose(solution[[0, 1, 2, 4, 5, 6]], expected, rtol=1e-9, atol=1e-9)
    assert not np.isfinite(solution[3]).all()

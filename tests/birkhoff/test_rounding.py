"""Rounding to the polytope: sums in units of roundoff, for converged, truncated and hostile inputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from birkhoff.errors import DtypeError, ShapeError
from birkhoff.rounding import round_to_nonexpansive, round_to_polytope
from tests.backends import BACKENDS, Backend, to_numpy

UNIT = {"float32": 2.0**-24, "float64": 2.0**-53}


def inputs(dtype: str, n: int) -> np.ndarray:
    """Truncated projections at three ranges, raw positive matrices, badly scaled rows, the zero matrix and I."""
    rng = np.random.default_rng(n)
    parts = []
    for std in (1.0, 3.0, 30.0):
        matrix = np.exp(rng.normal(0, std, (200, n, n)))
        for _ in range(20):
            matrix /= matrix.sum(axis=-2, keepdims=True)
            matrix /= matrix.sum(axis=-1, keepdims=True)
        parts.append(matrix)
    parts.append(rng.random((200, n, n)))
    parts.append(rng.random((200, n, n)) * rng.random((200, n, 1)) ** 20)
    parts.append(np.zeros((1, n, n)))
    parts.append(np.eye(n)[None])
    return np.concatenate(parts).astype(dtype)


def exact_sums(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and column sums in extended precision: enough for float32 exactly, for float64 to 2**-64."""
    wide = matrix.astype(np.longdouble)
    return wide.sum(axis=-1), wide.sum(axis=-2)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [1, 2, 4, 7, 33])
def test_exact_form_has_both_marginals(backend: Backend, dtype: str, n: int) -> None:
    matrix = inputs(dtype, n)
    rounded = to_numpy(round_to_polytope(backend.asarray(matrix)))
    assert rounded.dtype == matrix.dtype
    assert rounded.min() >= 0.0
    allowed = 4 if dtype == "float32" else n + 4
    for sums in exact_sums(rounded):
        assert np.abs(sums - 1).max() <= allowed * UNIT[dtype]


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("n", [1, 2, 4, 7, 33])
def test_nonexpansive_form_of_float32_holds_to_float64_rounding(backend: Backend, n: int) -> None:
    matrix = inputs("float32", n)
    shrunk = to_numpy(round_to_nonexpansive(backend.asarray(matrix)))
    for sums in exact_sums(shrunk):
        assert sums.max() <= 1.0 + n * 2.0**-53
    assert (shrunk <= matrix).all()
    assert np.linalg.norm(shrunk.astype(np.float64), 2, axis=(-2, -1)).max() <= 1.0 + 1e-15


def test_the_plain_algorithm_would_fail_these_bounds() -> None:
    """Without the enlarged divisor, sums exceed one and the concentrated deficits overshoot: the bounds have teeth."""
    matrix = inputs("float32", 33)
    rows = matrix / np.maximum(matrix.sum(-1, keepdims=True), 1)
    shrunk = rows / np.maximum(rows.sum(-2, keepdims=True), 1)
    assert max(sums.max() for sums in exact_sums(shrunk)) > 1.0


def test_distance_bound_of_lemma_7() -> None:
    matrix = inputs("float64", 5)
    rounded = round_to_polytope(matrix)
    moved = np.abs(rounded - matrix).sum(axis=(-2, -1))
    error = np.abs(matrix.sum(-1) - 1).sum(-1) + np.abs(matrix.sum(-2) - 1).sum(-1)
    assert (moved <= 2 * error + 1e-14).all()


@given(
    hnp.arrays(np.float64, (3, 3), elements=st.floats(0, 1e6, allow_subnormal=True)),
)
@settings(max_examples=60, deadline=None)
def test_against_exact_fractions(matrix: np.ndarray) -> None:
    """The algorithm in rational arithmetic gives exactly doubly stochastic matrices, and ours is near them."""
    n = 3
    exact = [[Fraction(float(value)) for value in row] for row in matrix]
    exact = [[value / max(sum(row), 1) for value in row] for row in exact]
    column = [max(sum(exact[i][j] for i in range(n)), 1) for j in range(n)]
    exact = [[exact[i][j] / column[j] for j in range(n)] for i in range(n)]
    left = [1 - sum(row) for row in exact]
    right = [1 - sum(exact[i][j] for i in range(n)) for j in range(n)]
    total = sum(left)
    if total:
        exact = [[exact[i][j] + left[i] * right[j] / total for j in range(n)] for i in range(n)]
    assert all(sum(row) == 1 for row in exact)
    expected = np.array([[float(value) for value in row] for row in exact])
    # Where hardly anything is missing, the missing part is rounding and its place is arbitrary.
    assert np.abs(round_to_polytope(matrix) - expected).max() <= 64 * UNIT["float64"]


@pytest.mark.parametrize("function", [round_to_polytope, round_to_nonexpansive])
def test_polytope_points_stay(function: object) -> None:
    assert callable(function)
    identity = np.eye(4, dtype=np.float32)[[2, 0, 3, 1]]
    np.testing.assert_array_equal(function(identity), identity)
    uniform = np.full((4, 4), 0.25)
    np.testing.assert_array_equal(function(uniform), uniform)


def test_bad_items_poison_only_themselves_and_inputs_are_kept() -> None:
    matrix = inputs("float64", 3)[:4]
    matrix[1, 0, 2], matrix[1, 1, 1] = np.nan, np.inf
    before = matrix.copy()
    with warnings.catch_warnings(action="error"):
        rounded = round_to_polytope(matrix)
    np.testing.assert_array_equal(matrix, before)
    assert np.isnan(rounded[1]).any()
    assert np.isfinite(rounded[[0, 2, 3]]).all()
    np.testing.assert_array_equal(rounded[2], round_to_polytope(matrix[2]))


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 0), (2, 3, 1, 1), (3, 3)])
def test_shapes(shape: tuple[int, ...]) -> None:
    assert round_to_polytope(np.ones(shape)).shape == shape
    assert round_to_nonexpansive(np.ones(shape, np.float32)).shape == shape


def test_memory_layout_does_not_matter() -> None:
    matrix = np.random.default_rng(0).random((10, 8, 8))
    assert np.array_equal(round_to_polytope(np.asfortranarray(matrix)), round_to_polytope(matrix))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_round_once(dtype: torch.dtype) -> None:
    matrix = torch.rand(50, 4, 4).to(dtype)
    rounded = round_to_polytope(matrix)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, round_to_polytope(matrix.float()).to(dtype))


@pytest.mark.parametrize("function", [round_to_polytope, round_to_nonexpansive])
def test_gradients(function: object) -> None:
    torch.manual_seed(0)
    matrix = torch.rand(5, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (matrix,))
    assert torch.autograd.gradgradcheck(function, (matrix,))


@pytest.mark.parametrize("rounding", [round_to_nonexpansive, round_to_polytope])
def test_misuse(rounding: Callable[[np.ndarray], np.ndarray]) -> None:
    with pytest.raises(DtypeError, match="got int64"):
        rounding(np.ones((2, 2), dtype=np.int64))
    with pytest.raises(DtypeError, match="got complex128"):
        rounding(np.ones((2, 2), dtype=np.complex128))
    for shape in ((), (3,), (2, 3)):
        with pytest.raises(ShapeError, match="got"):
            rounding(np.ones(shape))

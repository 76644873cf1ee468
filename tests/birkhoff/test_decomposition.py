"""Birkhoff-von Neumann: convex weights, true permutations, few terms, and the matrix back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import birkhoff
from birkhoff.errors import DtypeError, OptionError, ShapeError
from tests.backends import BACKENDS, Backend, to_numpy


def doubly_stochastic(n: int, count: int = 1, std: float = 1.0) -> np.ndarray:
    logits = np.random.default_rng(n).normal(0, std, (count, n, n))
    return birkhoff.project(logits, finish="exact").matrix


def check(matrix: np.ndarray, weights: np.ndarray, permutations: np.ndarray, tol: float) -> None:
    n = matrix.shape[-1]
    assert weights.shape[-1] == permutations.shape[-2] <= (n - 1) ** 2 + 1
    assert (weights >= 0).all()
    assert np.abs(weights.sum(axis=-1) - 1).max() <= tol
    assert (np.diff(weights, axis=-1) <= 0).all()
    assert (np.sort(permutations, axis=-1) == np.arange(n)).all()
    assert np.abs(birkhoff.recompose(weights, permutations) - matrix).max() <= tol


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 16])
def test_round_trip(backend: Backend, n: int) -> None:
    matrix = doubly_stochastic(n, 3)
    weights, permutations = birkhoff.decompose(backend.asarray(matrix))
    rebuilt = to_numpy(birkhoff.recompose(weights, permutations))
    check(matrix, to_numpy(weights), to_numpy(permutations), 1e-12)
    assert np.abs(rebuilt - matrix).max() <= 1e-12


def test_few_permutations_are_found_again() -> None:
    rng = np.random.default_rng(0)
    terms = np.stack([rng.permutation(6) for _ in range(3)])
    matrix = birkhoff.recompose(np.array([0.5, 0.3, 0.2]), terms)
    weights, permutations = birkhoff.decompose(matrix)
    np.testing.assert_allclose(weights, [0.5, 0.3, 0.2], atol=1e-15)
    np.testing.assert_array_equal(permutations, terms)


def test_the_bound_on_terms_is_reached_and_kept() -> None:
    """Interior points of the polytope at n = 3 use all (n-1)^2 + 1 terms, and never more."""
    counts = []
    for matrix in doubly_stochastic(3, 50):
        weights, permutations = birkhoff.decompose(matrix)
        counts.append(len(weights))
        check(matrix, weights, permutations, 1e-13)
    assert max(counts) == 5


@given(
    st.integers(1, 6), st.integers(0, 2**31), st.sampled_from([0.1, 3.0, 30.0]), st.sampled_from(["float32", "float64"])
)
@settings(max_examples=40, deadline=None)
def test_any_truncated_projection(n: int, seed: int, std: float, dtype: str) -> None:
    """What is decomposed is the rounded matrix, so a truncated projection at any range is accepted."""
    logits = np.random.default_rng(seed).normal(0, std, (n, n)).astype(dtype)
    matrix = birkhoff.sinkhorn(logits)
    weights, permutations = birkhoff.decompose(matrix)
    assert weights.dtype == dtype
    tol = 100 * n * n * np.finfo(dtype).eps
    check(birkhoff.round_to_polytope(matrix.astype(np.float64)), weights, permutations, tol)


def test_batches_are_padded_with_weightless_identities() -> None:
    batch = np.stack([np.eye(3), doubly_stochastic(3)[0]])
    weights, permutations = birkhoff.decompose(batch)
    assert weights.shape[1] > 1
    np.testing.assert_array_equal(weights[0], np.eye(weights.shape[1])[0])
    np.testing.assert_array_equal(permutations[0], np.broadcast_to(np.arange(3), permutations[0].shape))


def test_max_terms_gives_an_approximation() -> None:
    matrix = doubly_stochastic(8)[0]
    errors = []
    for terms in (1, 5, 20, 50):
        weights, permutations = birkhoff.decompose(matrix, max_terms=terms)
        assert len(weights) == min(terms, len(weights)) <= terms
        assert weights.sum() == pytest.approx(1.0)
        errors.append(np.abs(birkhoff.recompose(weights, permutations) - matrix).max())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-13


def test_recompose_is_differentiable() -> None:
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64, requires_grad=True)
    permutations = torch.tensor([[0, 1, 2], [1, 2, 0], [2, 1, 0]])
    assert torch.autograd.gradcheck(lambda w: birkhoff.recompose(w, permutations), (weights,))


def test_misuse() -> None:
    with pytest.raises(ShapeError):
        birkhoff.decompose(np.ones((2, 3)))
    with pytest.raises(ShapeError):
        birkhoff.decompose(np.ones((0, 0)))
    with pytest.raises(TypeError, match="got int64"):
        birkhoff.decompose(np.eye(2, dtype=np.int64))
    with pytest.raises(ValueError, match="not finite"):
        birkhoff.decompose(np.full((2, 2), np.nan))
    with pytest.raises(ValueError, match="max_terms"):
        birkhoff.decompose(np.eye(2), max_terms=0)
    with pytest.raises(ValueError, match="below 1/n"):
        birkhoff.decompose(np.full((2, 2), 0.5), tol=0.9)
    for tol in (-1e-9, float("nan"), "0"):
        with pytest.raises(OptionError, match="tol must be"):
            birkhoff.decompose(np.eye(2), tol=tol)
    with pytest.raises(ShapeError, match="as many terms"):
        birkhoff.recompose(np.ones(3), np.zeros((2, 4), dtype=int))
    with pytest.raises(ShapeError, match="same batch"):
        birkhoff.recompose(np.ones((2, 2)), np.zeros((3, 2, 4), dtype=int))
    with pytest.raises(DtypeError, match="integers, got float64"):
        birkhoff.recompose(np.ones(2), np.zeros((2, 4)))


def test_empty_batch() -> None:
    weights, permutations = birkhoff.decompose(np.ones((0, 3, 3)))
    assert weights.shape[0] == 0
    assert permutations.shape[0] == 0
    assert birkhoff.recompose(weights, permutations).shape == (0, 3, 3)

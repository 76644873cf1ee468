"""Gradient rules as functions on arrays, without automatic differentiation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import birkhoff
from birkhoff import _layout, reference
from birkhoff._xp import array_namespace
from birkhoff.adjoints import Implicit, Unrolled
from birkhoff.adjoints.unrolled import unrolled_vjp
from birkhoff.errors import OptionError, ShapeError
from birkhoff.solvers import Euclidean, Newton, SinkhornDamped, SinkhornKnopp, SinkhornLog
from tests.backends import BACKENDS, Backend, to_numpy


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("solver", [SinkhornKnopp(), SinkhornLog(first="rows")], ids=lambda s: s.method)
def test_unrolled_is_the_oracle_s_gradient_on_every_library(backend: Backend, solver: Any, rng: Any) -> None:
    for n, std in ((1, 1.0), (3, 1.0), (4, 30.0), (9, 3.0), (70, 1.0)):
        values, upstream = rng.normal(size=(2, 20, n, n)) * std, rng.normal(size=(2, 20, n, n))
        grad = Unrolled().vjp(backend.asarray(values), backend.asarray(upstream), solver)
        expected = reference.gradient(values, upstream, first=solver.first)
        assert np.abs(to_numpy(grad) - expected).max() <= 1e-12 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize(
    "solver",
    [SinkhornKnopp(num_iters=5), SinkhornLog(num_iters=5, relaxation=1.5), SinkhornDamped(num_iters=5, eps_start=0.1),
     SinkhornKnopp(num_iters=5, range_cap=1.0)],
    ids=repr,
)  # fmt: skip
def test_unrolled_is_the_limit_of_differences(solver: Any, rng: Any) -> None:
    values, upstream = rng.normal(size=(3, 3)), rng.normal(size=(3, 3))
    grad = Unrolled().vjp(values, upstream, solver)
    step = 1e-6
    for entry in np.ndindex(3, 3):
        change = np.zeros((3, 3))
        change[entry] = step
        ahead, behind = (birkhoff.project(values + sign * change, solver).matrix for sign in (1, -1))
        assert abs(((ahead - behind) * upstream).sum() / (2 * step) - grad[entry]) <= 1e-8


@pytest.mark.parametrize("branch", [True, False])
def test_pieces_of_a_batch_change_nothing(branch: bool, rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Piece lengths that do not divide the batch, with and without a look at the values."""
    xp = array_namespace(np.zeros(1))
    values, upstream = rng.normal(size=(53, 5, 5)), rng.normal(size=(53, 5, 5))
    monkeypatch.setattr(_layout, "_TAPE_ENTRIES", 10 * 25)
    monkeypatch.setattr(_layout, "_PIECE_BYTES", 20 * 25 * 8)
    grad = unrolled_vjp(values, upstream, SinkhornKnopp(), xp=xp, accumulate=xp.float64, branch=branch)
    assert np.abs(grad - reference.gradient(values, upstream)).max() <= 1e-13


def test_unrolled_with_counts_treats_each_matrix_by_its_own(rng: Any) -> None:
    values = np.concatenate([rng.normal(size=(5, 3, 3)) * std for std in (0.1, 2.0)])
    upstream = rng.normal(size=values.shape)
    solver = SinkhornLog(num_iters=500, tol=1e-4)
    counts = birkhoff.project(values, solver).num_iters
    grad = Unrolled().vjp(values, upstream, solver, num_iters=counts)
    for k in range(10):
        alone = reference.gradient(values[k], upstream[k], int(counts[k]))
        assert np.abs(grad[k] - alone).max() <= 1e-13


@pytest.mark.parametrize("std", [0.1, 1.0])
def test_implicit_is_the_gradient_of_many_iterations(std: float, rng: Any) -> None:
    for n in (1, 2, 3, 6):
        values, upstream = rng.normal(size=(10, n, n)) * std, rng.normal(size=(10, n, n))
        expected = reference.gradient(values, upstream, 3000)
        for solver in (Newton(tol=1e-13), SinkhornKnopp(num_iters=3000)):
            assert np.abs(Implicit().vjp(values, upstream, solver) - expected).max() <= 1e-10


def test_implicit_refuses_an_unconverged_matrix(rng: Any) -> None:
    values, upstream = rng.normal(size=(40, 4, 4)) * 5, rng.normal(size=(40, 4, 4))
    solver = SinkhornKnopp()
    trusted = Implicit().trusts(birkhoff.project(values, solver).matrix)
    assert 0 < trusted.sum() < 40
    grad, exact = Implicit().vjp(values, upstream, solver), reference.gradient(values, upstream)
    assert np.abs(grad - exact)[~trusted].max() <= 1e-12
    assert np.abs(grad - exact)[trusted].max() <= 1e-2


def test_implicit_uses_the_derivative_of_the_solver(rng: Any) -> None:
    values, upstream = rng.normal(size=(4, 4)), rng.normal(size=(4, 4))
    grad = Implicit().vjp(values, upstream, Euclidean())
    step = 1e-6
    ahead, behind = (birkhoff.project(values + sign * step * upstream, Euclidean()).matrix for sign in (1, -1))
    assert np.abs((ahead - behind) / (2 * step) - grad).max() <= 1e-7  # the Jacobian is symmetric


def test_empty_batches_and_wrong_arguments() -> None:
    empty = np.zeros((0, 3, 3), dtype=np.float32)
    assert Unrolled().vjp(empty, empty, SinkhornKnopp()).shape == (0, 3, 3)
    assert Implicit().vjp(empty, empty, Newton()).dtype == np.float32
    for adjoint in (Unrolled(), Implicit()):
        with pytest.raises(ShapeError, match="shape of logits"):
            adjoint.vjp(np.zeros((2, 2)), np.zeros((3, 3)), SinkhornKnopp())
    with pytest.raises(OptionError, match="bound"):
        Implicit(bound=0.0)

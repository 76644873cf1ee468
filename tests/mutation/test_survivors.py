"""Tests written for mutants that survived the rest of the suite, and of the operators themselves."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import birkhoff
from birkhoff import solvers
from birkhoff.rounding import round_to_nonexpansive, round_to_polytope
from tests.mutation.operators import mutants


def test_operators_change_one_thing_each_and_leave_texts_alone() -> None:
    source = '''
def clip(x, low: int = 0):
    """Text with 1 < 2."""
    if x < low:
        raise ValueError(f"got {x + 1}")
    return -1 * x
'''
    found = [(mutant.kind, mutant.before, mutant.after) for mutant in mutants(source)]
    assert ("comparison", "x < low", "x <= low") in found
    assert ("constant", "0", "1") in found
    assert ("axis", "-1", "-2") in found
    assert ("arithmetic", "-1 * x", "-1 / x") in found
    assert not any("Text" in before or "got" in before for _, before, _ in found if "if" not in before)
    for mutant in mutants(source):
        compile(mutant.source, "mutant", "exec")
        assert mutant.source != source


@pytest.mark.parametrize("name", solvers.__all__)
def test_solvers_are_immutable_values(name: str) -> None:
    solver = getattr(solvers, name)()
    assert hash(solver) == hash(getattr(solvers, name)()) and solver == getattr(solvers, name)()
    with pytest.raises(dataclasses.FrozenInstanceError):
        solver.num_iters = 3
    with pytest.raises(TypeError):
        getattr(solvers, name)(3)


@pytest.mark.parametrize("offset", [-1e6, -2e3, 2e3, 1e6])
@pytest.mark.parametrize("name", ["SinkhornKnopp", "SinkhornLog", "SinkhornDamped"])
def test_offsets_change_neither_result_nor_gradient(name: str, offset: float) -> None:
    solver = getattr(solvers, name)()
    logits = np.round(np.random.default_rng(0).standard_normal((3, 4, 4)) * 8) / 8
    grad = np.random.default_rng(1).standard_normal(logits.shape)
    moved = logits + offset
    assert np.abs(birkhoff.project(moved, solver).matrix - birkhoff.project(logits, solver).matrix).max() < 1e-13
    adjoint = birkhoff.adjoints.Unrolled()
    assert np.abs(adjoint.vjp(moved, grad, solver) - adjoint.vjp(logits, grad, solver)).max() < 1e-13


def test_rounding_keeps_zeros_positive() -> None:
    matrix = np.array([[0.0, -0.25], [2.0, 0.5]])
    for finish in (round_to_nonexpansive, round_to_polytope):
        result = finish(matrix)
        assert not np.signbit(result).any()


def test_the_zero_matrix_is_rounded_to_the_uniform_one() -> None:
    assert np.array_equal(round_to_polytope(np.zeros((3, 3))), np.full((3, 3), 1 / 3))
    assert np.array_equal(round_to_nonexpansive(np.zeros((3, 3))), np.zeros((3, 3)))

"""Status and Projection."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import birkhoff
from birkhoff import Projection, Status
from birkhoff.diagnostics import diagnose


def test_codes_are_stable_and_only_converged_is_zero() -> None:
    assert [(s.name, int(s)) for s in Status] == [
        ("converged", 0),
        ("max_iters_reached", 1),
        ("nonfinite_input", 2),
        ("no_total_support", 3),
        ("ill_conditioned_adjoint", 4),
    ]


@pytest.mark.parametrize("status", list(Status), ids=lambda s: s.name)
def test_every_status_has_advice(status: Status) -> None:
    assert len(status.advice.split()) >= 5 and status.advice.endswith(".")


def test_a_projection_is_immutable() -> None:
    result = birkhoff.project(np.eye(2))
    assert isinstance(result, Projection)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.matrix = None  # type: ignore[misc]


def test_results_that_hold_arrays_are_equal_to_themselves_alone() -> None:
    """Not an array's "truth value is ambiguous": they can be members of a list and keys of a dictionary."""
    matrix = birkhoff.project(np.zeros((2, 3, 3))).matrix
    for make in (birkhoff.project, birkhoff.certify, diagnose):
        one, other = make(matrix), make(matrix)
        assert one == one and one != other and other in [one, other] and len({one, other}) == 2

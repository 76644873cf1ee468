"""What a claim allows is what it says: a quarter of it passes, three times as much does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from birkhoff import reference
from proofs import claims, enclosure, runner
from proofs.backends import BACKENDS, with_dtypes
from proofs.measure import accuracy_allowance
from proofs.runner import Profile
from proofs.subjects import Subject
from tests.proofs import broken

EFFORT = Profile("test", 20, shrink_budget=0)


def _scaled_sums(logits: np.ndarray, units: float) -> np.ndarray:
    return broken.right(logits) * (1 + units * (logits.shape[-1] + 1) * 2.0**-53)


def _moved_entry(logits: np.ndarray, units: float) -> np.ndarray:
    matrix = broken.right(logits)
    matrix[..., 0, 0] += units * accuracy_allowance(logits.reshape(-1, *logits.shape[-2:]), "float64").reshape(
        logits.shape[:-2]
    )
    return matrix


def _moved_by_a_limit(logits: np.ndarray, units: float) -> np.ndarray:
    matrix = broken.right(logits)
    matrix[..., 0, 0] += units * 1e-5
    return matrix


SHARP: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    **dict.fromkeys(("last_side_exact", "entries_in_unit_interval", "equal_streams_or_mean_kept"), _scaled_sums),
    **dict.fromkeys(("composite_gain_is_one", "minus_infinity_is_an_exact_zero"), _scaled_sums),
    **dict.fromkeys(("accuracy_of_the_iteration", "inside_the_enclosure", "conformance_vectors"), _moved_entry),
    **dict.fromkeys(("circulant_in_one_step", "rank_one_gives_uniform", "permutation_equivariance"), _moved_entry),
    **dict.fromkeys(("small_logits_converge", "kl_projection_of_small_logits"), _moved_by_a_limit),
    "two_by_two_closed_form": _moved_by_a_limit,
}
"""How to miss what each claim allows by a chosen number of allowances, in float64."""


@pytest.mark.parametrize("name", ["adjoint_identity", "gradient_sums_vanish"])
def test_a_gradient_may_miss_two_contracts(name: str) -> None:
    def missing(units: float) -> Subject:
        def vjp(logits: np.ndarray, grad: np.ndarray) -> np.ndarray:
            gradient = reference.gradient(logits, grad, broken.NUM_ITERS)
            gradient[:, 0, 0] += units * 2 * accuracy_allowance(logits, "float64") * np.linalg.norm(grad, axis=(-2, -1))
            return gradient

        return replace(broken.subject(broken.right, vjp=vjp), backend=with_dtypes(BACKENDS["numpy"], ["float64"]))

    for units, verdict in ((0.25, "holds"), (4.0, "broken")):
        assert runner.run_claim(claims.by_name(name), missing(units), EFFORT).verdict == verdict, units


@pytest.mark.parametrize("name", sorted(SHARP))
def test_a_few_allowances_are_too_much(name: str) -> None:
    if name == "inside_the_enclosure" and not enclosure.available():
        pytest.skip("python-flint is not installed")
    only = with_dtypes(BACKENDS["numpy"], ["float64"])
    for units, verdict in ((0.25, "holds"), (3.0, "broken")):
        subject = replace(broken.subject(lambda logits, k=units: SHARP[name](logits, k)), backend=only)
        assert runner.run_claim(claims.by_name(name), subject, EFFORT).verdict == verdict, units

"""The order in which claims are tried, so that a run that is cut has seen what matters most.

First every claim once on every backend, on the subject that stands for the others; then every claim on its second
subject, and so on, the slow subjects last. Among equals the long ones begin first, so that several processes end at
about the same time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from proofs._claim import Claim

__all__ = ["LONG_CLAIMS", "SLOW_SUBJECTS", "by_importance"]

_MAIN = ("SinkhornKnopp", "SinkhornLog", "SinkhornDamped", "sinkhorn")
"""The subjects that come first, in this order; those of :data:`SLOW_SUBJECTS` come last."""

SLOW_SUBJECTS: dict[str, float] = {"Newton": 3.0, "Euclidean": 8.0}
"""How much longer than a Sinkhorn solver these take, on a CPU."""

LONG_CLAIMS: dict[str, float] = {
    "large_stacks": 1.5,
    "last_side_exact": 1.0,
    "status_per_matrix": 0.6,
    "one_bad_matrix_poisons_only_itself": 0.6,
    "permutation_equivariance": 0.5,
    "any_batch_shape": 0.5,
    "items_are_independent": 0.5,
    "any_memory_layout": 0.4,
    "conformance_vectors": 0.8,
    "adjoint_identity": 0.4,
    "accuracy_of_the_iteration": 0.4,
    "limit_gradient_halves_the_norm": 5.0,
    "certificate_holds_in_bulk": 2.5,
    "product_certificate_is_tight": 1.5,
    "trained_site_certificate_holds": 3.5,
    "trained_depth_certificate_holds": 3.0,
    "trained_row_sums_exact": 2.5,
}
"""Seconds of the claims that take more than about 0.3 s on one subject, profile ``ci``, on a CPU."""


def by_importance(wanted: Sequence[tuple[Claim, Any]]) -> list[tuple[Claim, Any]]:
    """Return the same pairs of claim and subject in the order in which they are worth trying.

    Pairs whose claim is not made of the subject cost nothing and come first.
    """
    ranks: dict[int, int] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for at in sorted(range(len(wanted)), key=lambda at: _standing(wanted[at][1])):
        claim, subject = wanted[at]
        if claim.applies(subject) is not None:
            ranks[at] = -1
            continue
        ranks[at] = seen[claim.name, subject.backend.name]
        seen[claim.name, subject.backend.name] += 1
    order = sorted(range(len(wanted)), key=lambda at: (ranks[at], -_seconds(*wanted[at]), at))
    return [wanted[at] for at in order]


def _standing(subject: Any) -> float:
    """Place of a subject among those that a claim is made of: the main solvers first, the slow ones last."""
    if subject.name in _MAIN:
        return _MAIN.index(subject.name)
    return len(_MAIN) + SLOW_SUBJECTS.get(subject.name, 0.0)


def _seconds(claim: Claim, subject: Any) -> float:
    return LONG_CLAIMS.get(claim.name, 0.2) * SLOW_SUBJECTS.get(subject.name, 1.0)

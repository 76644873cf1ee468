"""Claims about the Birkhoff-von Neumann decomposition."""

from __future__ import annotations

import importlib.util

import numpy as np

from proofs import model, strategies
from proofs._claim import Claim, Observation, Sample, holds_where, worst, worst_of
from proofs.measure import compute_roundoff, storage_error, sums
from proofs.systems import Decomposer

__all__ = ["CLAIMS"]


def _check(subject: Decomposer, sample: Sample) -> Observation:
    matrices = strategies.round_to(model.iterate(sample.logits, 20).astype(np.float64), sample.dtype).astype(np.float64)
    weights, permutations = subject.decompose(matrices, sample.dtype)
    size, roundoff = matrices.shape[-1], compute_roundoff(sample.dtype) + storage_error(sample.dtype)
    terms = (size - 1) ** 2 + 1
    valid = np.sort(permutations, axis=-1) == np.arange(size)
    missing = np.maximum(np.abs(sums(matrices, "rows") - 1).sum(-1), np.abs(sums(matrices, "columns") - 1).sum(-1))
    rebuilt = subject.recompose(weights, permutations, sample.dtype)
    # what is not doubly stochastic is rounded first, which moves it by at most 2 (|r - 1|_1 + |c - 1|_1)
    allowed = 4 * missing + 16 * terms * size * roundoff
    return worst_of(
        (
            worst(-np.min(weights, axis=-1), 0.0, "a negative weight"),
            worst(np.abs(np.sum(weights, axis=-1) - 1), 2 * terms * roundoff, "|sum of weights - 1|"),
            holds_where(valid, "not a permutation"),
            worst(np.sum(weights > 0, axis=-1), terms, "number of terms"),
            worst(np.max(np.abs(rebuilt - matrices), axis=(-2, -1)), allowed, "|rebuilt - matrix|"),
        )
    )


def _has_matching(subject: Decomposer) -> str | None:
    return None if importlib.util.find_spec("scipy") else "scipy is not installed, which finds the matchings"


CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="decomposition_rebuilds",
        family="decomposition",
        statement="Weights are >= 0 and sum to 1, at most (n-1)^2 + 1 permutations, and they rebuild the "
        "matrix within its own marginal error (times 4) and 16 n ((n-1)^2 + 1) u.",
        reference="Birkhoff 1946; Marcus and Ree 1959",
        domain="20 iterations on finite logits up to range 1e3, n <= 5",
        method="weights and permutations checked one by one",
        provenance="sampled",
        kind="decomposition",
        lemma="bvn_step",
        lemmas=("dstoch_convex", "dstoch_perm"),
        samples=lambda subject: strategies.samples(sizes=(1, 2, 3, 4, 5), batch=3, dtypes=subject.backend.dtypes),
        check=_check,
        applies=_has_matching,
        effort=0.5,
        itemwise=True,
    ),
)

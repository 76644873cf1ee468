"""Claims about the finishes: after the closed-form rounding, what was approximate holds for every input."""

from __future__ import annotations

import functools

import numpy as np

from proofs import rational, strategies
from proofs._claim import Claim, Observation, Sample, holds_where, worst, worst_of
from proofs.certificate import stored_matrices
from proofs.measure import finish_allowance, norms_at_most, roundings, sums
from proofs.systems import Rounder

__all__ = ["CLAIMS"]


def _exact_sums(subject: Rounder, sample: Sample) -> Observation:
    matrices = stored_matrices(sample)
    rounded = subject.exact(matrices, sample.dtype)
    allowed = finish_allowance(sample.logits.shape[-1], sample.dtype)
    error = np.maximum(np.abs(sums(rounded, "rows") - 1), np.abs(sums(rounded, "columns") - 1))
    negative = np.where(rounded.min(axis=(-2, -1)) < 0, np.inf, 0.0)
    return worst_of((worst(error, allowed, "|sum - 1|"), worst(negative, allowed, "a negative entry")))


def _shrunk(subject: Rounder, sample: Sample) -> Observation:
    matrices = stored_matrices(sample)
    shrunk = subject.nonexpansive(matrices, sample.dtype)
    size = sample.logits.shape[-1]
    # float32 values are summed in float64: a sum that exceeds 1 by less than its rounding is not seen
    allowed = (size + 2) * 2.0**-53 if sample.dtype == "float32" else roundings(size + 2, size, sample.dtype)
    excess = np.maximum(sums(shrunk, "rows"), sums(shrunk, "columns")) - 1
    bound = np.full(len(matrices), (1 + allowed) * (1 + 4 * 2.0**-53))
    grown = np.max(shrunk - matrices, axis=(-2, -1))
    return worst_of(
        (
            worst(np.maximum(excess, 0), allowed, "sum above 1"),
            holds_where(norms_at_most(shrunk, bound), "norm above 1"),
            worst(grown, 0.0, "an entry grew"),
        )
    )


def _near(subject: Rounder, sample: Sample) -> Observation:
    matrices = stored_matrices(sample)
    rounded = subject.exact(matrices, sample.dtype)
    moved = np.sum(np.abs(rounded - matrices), axis=(-2, -1))
    missing = np.sum(np.abs(sums(matrices, "rows") - 1), -1) + np.sum(np.abs(sums(matrices, "columns") - 1), -1)
    size = sample.logits.shape[-1]
    # entries up to the largest sum are divided with a rounding each, and so are the stored ones
    scale = 1 + np.max(matrices, axis=(-2, -1))
    rounding = size * size * scale * roundings(size + 8, size, sample.dtype)
    return worst(moved, 2 * missing + rounding, "|B - A|_1")


def _as_rational(subject: Rounder, sample: Sample) -> Observation:
    matrices = stored_matrices(sample)
    size = sample.logits.shape[-1]
    allowed = roundings(4 * size + 16, size, sample.dtype)
    seen = []
    for item, matrix in enumerate(matrices):
        entries = rational.exact(matrix)
        for complete, run in ((True, subject.exact), (False, subject.nonexpansive)):
            known = rational.as_floats(rational.round_to_polytope(entries, complete=complete))
            result = run(matrix[None], sample.dtype)[0]
            seen.append(
                Observation(float(np.max(np.abs(result - known))), allowed, item, "distance from the exact algorithm")
            )
    return worst_of(seen)


def _samples(sizes: tuple[int, ...] = (1, 2, 3, 4, 5, 8), batch: int = 16):
    return lambda subject: strategies.samples(
        sizes=sizes, batch=batch, dtypes=(*subject.backend.dtypes, *subject.backend.halves)
    )


_claim = functools.partial(Claim, family="rounding", kind="rounding", samples=_samples())

CLAIMS: tuple[Claim, ...] = (
    _claim(
        name="rounding_makes_both_sides_exact",
        statement="round_to_polytope gives non-negative entries and both sums within (n+4) u of 1, in float64 "
        "(n^2+n+4) u, plus one cast where the result is stored in half precision.",
        reference="Altschuler, Weed and Rigollet 2017, Algorithm 2",
        domain="truncated, crude, raw and sparse matrices from all generators, n <= 8",
        method="compensated sums of the stored entries",
        provenance="sampled",
        lemma="rounding_dstoch",
        lemmas=("corrected_dstoch", "corrected_rows", "corrected_cols", "corrected_nonneg"),
        check=_exact_sums,
        itemwise=True,
    ),
    _claim(
        name="shrinking_gives_norm_at_most_one",
        statement="round_to_nonexpansive gives sums and norm at most 1, within (n+2) roundings of the sums (float64 "
        "units for float32 values), plus one cast in half precision; no entry grows.",
        reference="derivations: rounding_to_the_polytope",
        domain="as for rounding_makes_both_sides_exact",
        method="norm decided in exact arithmetic",
        provenance="exact",
        lemma="nonexpansive_norm",
        lemmas=("nonexpansive_sub", "substoch_nonexpansive", "shrink_le1", "shrink_ge0"),
        check=_shrunk,
        itemwise=True,
    ),
    _claim(
        name="rounding_moves_little",
        statement="|B - A|_1 <= 2 (|A 1 - 1|_1 + |A^T 1 - 1|_1), up to rounding.",
        reference="Altschuler, Weed and Rigollet 2017, Lemma 7",
        domain="as for rounding_makes_both_sides_exact",
        method="sums over the entries",
        provenance="sampled",
        check=_near,
        itemwise=True,
    ),
    _claim(
        name="rounding_is_the_algorithm",
        statement="Both finishes are within (4n+16) u of the algorithm in exact fractions, which leaves doubly "
        "stochastic matrices as they are.",
        reference="Altschuler, Weed and Rigollet 2017, Algorithm 2",
        domain="as for rounding_makes_both_sides_exact, n <= 5",
        method="the algorithm re-executed in fractions on the stored entries",
        provenance="exact",
        lemma="rounding_fix",
        lemmas=("nonexpansive_fix", "scale_rows_sum", "scale_cols_sum"),
        samples=_samples((1, 2, 3, 4, 5), 4),
        check=_as_rational,
        effort=0.5,
        itemwise=True,
    ),
)

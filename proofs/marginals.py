"""Claims about sums and entries: which side is exact, what is reported, how the open side falls."""

from __future__ import annotations

import functools

import numpy as np

from birkhoff import Status
from proofs import model, strategies
from proofs._claim import Claim, Observation, Sample, holds_where, worst, worst_of
from proofs.conditions import (
    adds_eps,
    exact_side,
    iterates,
    kl,
    meets,
    no_eps,
    rebuilds,
    reports,
    stops_by_tolerance,
    unfinished,
)
from proofs.measure import accuracy_allowance, compute_roundoff, marginal_allowance, sums
from proofs.subjects import Subject

__all__ = ["CLAIMS"]


def _last_side(subject: Subject, sample: Sample) -> Observation:
    runs = [subject] if rebuilds(subject) or iterates(subject) else [subject.at(1), subject]
    deviations = [np.abs(sums(run.matrix(sample), subject.last) - 1) for run in runs]
    return worst(np.stack(deviations, axis=1), subject.side_allowance(sample), f"|{subject.last} sum - 1|")


def _entries(subject: Subject, sample: Sample) -> Observation:
    matrix = subject.matrix(sample)
    allowed = subject.side_allowance(sample)
    if subject.geometry == "euclidean":
        allowed += 6 * compute_roundoff(sample.dtype)
    too_large = np.where(np.isfinite(matrix), matrix - 1, np.inf)
    below_zero = np.where(matrix < 0, np.inf, 0.0)
    return worst(np.maximum(too_large, below_zero), allowed, "entry above 1, below 0 or not finite")


def _shrunk(subject: Subject, sample: Sample) -> Observation:
    total = sums(subject.matrix(sample), subject.last)
    return worst(total - 1, marginal_allowance(sample.logits.shape[-1], sample.dtype), f"{subject.last} sum above 1")


def _converges_easily(subject: Subject, sample: Sample) -> Observation:
    matrix = subject.matrix(sample)
    error = np.maximum(np.max(np.abs(sums(matrix, "rows") - 1), -1), np.max(np.abs(sums(matrix, "columns") - 1), -1))
    size = sample.logits.shape[-1]
    slack = 2 * size * accuracy_allowance(sample.logits, sample.dtype)
    return worst(error, 1e-5 + slack, "largest marginal error")


def _honest(subject: Subject, sample: Sample) -> Observation:
    assert subject.project is not None
    result = subject.project(subject.array(sample))
    matrix = subject.backend.asnumpy(result.matrix)
    slack = marginal_allowance(sample.logits.shape[-1], sample.dtype)
    seen = []
    for side, reported in (("rows", result.row_error), ("columns", result.column_error)):
        true = np.max(np.abs(sums(matrix, side) - 1), axis=-1)
        shortfall = np.abs(true - subject.backend.asnumpy(reported))
        seen.append(worst(shortfall, slack, f"|reported - true error| of the {side}"))
    return worst_of(seen)


_truncations = meets(kl, rebuilds, iterates, no_eps, unfinished)
"""It can be run with fewer iterations, and each is an alternating normalisation."""

_COUNTS = (1, 2, 3, 5, 8, 13, 20)

_TOLERANCES = (1e-2, 1e-4)


def _within_tolerance(subject: Subject, sample: Sample) -> Observation:
    assert subject.tolerant is not None
    size = sample.logits.shape[-1]
    slack = marginal_allowance(size, sample.dtype)
    seen = []
    for tol in _TOLERANCES:
        result = subject.tolerant(tol)(subject.array(sample))
        matrix = subject.backend.asnumpy(result.matrix)
        codes = subject.backend.asnumpy(result.status)
        error = np.maximum(*(np.max(np.abs(sums(matrix, side) - 1), axis=-1) for side in ("rows", "columns")))
        converged, stopped = codes == Status.converged, codes == Status.max_iters_reached
        seen.append(worst(np.where(converged, error, 0.0), tol + slack, f"error of a converged one, {tol:g}"))
        seen.append(holds_where(~stopped | (error >= tol - slack), f"stopped although within {tol:g}"))
        seen.append(holds_where(converged | stopped, "another status on finite logits"))
    return worst_of(seen)


def _kl_falls(subject: Subject, sample: Sample) -> Observation:
    limit = model.limit(sample.logits)
    before, seen = None, []
    for count in _COUNTS:
        matrix = subject.at(count).matrix(sample)
        distance = np.sum(limit * np.log(limit / matrix), axis=(-2, -1))
        # an entry that is off by d moves the sum by limit / entry * d, at both counts
        slack = 2 * accuracy_allowance(sample.logits, sample.dtype) * np.sum(limit / matrix, axis=(-2, -1))
        if before is not None:
            seen.append(worst(distance - before, slack, f"rise of KL(limit, iterate) up to {count} iterations"))
        before = distance
    return worst_of(seen)


def _monotone(subject: Subject, sample: Sample) -> Observation:
    size = sample.logits.shape[-1]
    slack = 2 * size * size * accuracy_allowance(sample.logits, sample.dtype)
    before, seen = None, []
    for count in _COUNTS:
        error = np.sum(np.abs(sums(subject.at(count).matrix(sample), subject.first) - 1), axis=-1)
        if before is not None:
            seen.append(worst(error - before, slack, f"rise of the L1 error up to {count} iterations"))
        before = error
    return worst_of(seen)


def _hilbert_rate(subject: Subject, sample: Sample) -> Observation:
    wide = np.asarray(sample.logits, dtype=np.float64)
    cross = (
        wide[:, :, None, :, None] + wide[:, None, :, None, :] - wide[:, :, None, None, :] - wide[:, None, :, :, None]
    )
    contraction = np.tanh(np.max(cross, axis=(1, 2, 3, 4)) / 4) ** 2
    size = sample.logits.shape[-1]
    before, seen = None, []
    for count in (1, 2, 3, 4):
        total = sums(subject.at(count).matrix(sample), subject.first)
        # a sum of positive terms is as relatively accurate as its terms; rows of a column-exact matrix stay above 1/e^R
        slack = 4 * size * accuracy_allowance(sample.logits, sample.dtype) / np.min(total, axis=-1)
        spread = np.log(np.max(total, axis=-1) / np.min(total, axis=-1))
        if before is not None:
            seen.append(worst(spread - contraction * before, slack, f"Hilbert error against kappa^2 at {count}"))
        before = spread
    return worst_of(seen)


def _two_by_two(subject: Subject, sample: Sample) -> Observation:
    seen = []
    for count in (1, 2, 5, 10, 20, 50):
        error = np.max(np.abs(sums(subject.at(count).matrix(sample), subject.first) - 1), axis=-1)
        allowed = 1 / (2 * count) + 2 * accuracy_allowance(sample.logits, sample.dtype)
        seen.append(worst(error, allowed, f"open side after {count} iterations"))
    return worst_of(seen)


_claim = functools.partial(Claim, family="marginals", provenance="sampled")

CLAIMS: tuple[Claim, ...] = (
    _claim(
        name="last_side_exact",
        statement="Every sum of the side that is normalised last is within (n+1) u of 1 (plus one cast where the "
        "result is stored in half precision; after the exact finish (n+4) u, in float64 (n^2+n+4) u).",
        reference="derivations: rounding_errors",
        domain="finite logits of std up to 3e3, n <= 32, one iteration and the given number of them",
        method="compensated sums of the stored entries",
        lemma="rownorm_sum",
        lemmas=("colnorm_sum", "sk_rows_last_iter", "normalised_sum_upper", "normalised_sum_lower"),
        samples=lambda subject: strategies.samples(
            sizes=(1, 2, 3, 4, 5, 8, 16, 32),
            scales=(*strategies.SCALES, 3e3),
            dtypes=(*subject.backend.dtypes, *subject.backend.halves),
        ),
        check=_last_side,
        applies=exact_side,
        itemwise=True,
    ),
    _claim(
        name="entries_in_unit_interval",
        statement="Every entry is finite, >= 0 and <= 1 + (n+1) u (what the sums may miss after the exact finish; "
        "Euclidean: (n+7) u): no NaN and no overflow at any range.",
        reference="derivations: rounding_errors",
        domain="finite logits up to range 1e4, n <= 16",
        method="maximum over the stored entries",
        lemma="sk_iter",
        lemmas=("rownorm_pos", "colnorm_pos", "rowst_le1"),
        samples=lambda subject: strategies.samples(
            sizes=(1, 2, 3, 4, 8, 16),
            scales=(*strategies.SCALES, 3e3, 1e4),
            dtypes=(*subject.backend.dtypes, *subject.backend.halves),
        ),
        check=_entries,
        itemwise=True,
    ),
    _claim(
        name="damped_side_below_one",
        statement="With eps in every divisor the side normalised last sums to at most 1 + (n+1) u.",
        reference="arXiv 2606.19348; conventions: presets",
        domain="finite logits up to range 1e3",
        method="compensated sums of the stored entries",
        samples=lambda subject: strategies.samples(),
        check=_shrunk,
        applies=adds_eps,
        itemwise=True,
    ),
    _claim(
        name="small_logits_converge",
        statement="Both marginal errors are at most 1e-5 plus rounding.",
        reference="Franklin and Lorenz 1989",
        domain="logits in [-1/4, 1/4], at least 5 iterations",
        method="compensated sums of the stored entries",
        samples=lambda subject: strategies.samples(generators=strategies.EASY, sizes=(2, 3, 4, 8, 16)),
        check=_converges_easily,
        applies=kl,
        itemwise=True,
    ),
    _claim(
        name="reported_error_is_true",
        statement="row_error and column_error equal the errors of the returned matrix, within (n+1) u, per matrix.",
        reference="birkhoff.project",
        domain="finite logits up to range 1e3",
        method="recomputed from the stored entries",
        samples=lambda subject: strategies.samples(dtypes=subject.backend.dtypes),
        check=_honest,
        applies=reports,
        itemwise=True,
    ),
    _claim(
        name="converged_means_within_tolerance",
        statement="With a tolerance, the status of every matrix is converged or max_iters_reached: converged only if "
        "both errors are at most tol + (n+1) u, the other only if one is above tol - (n+1) u.",
        reference="birkhoff.Status",
        domain="finite logits up to range 1e3, tol 1e-2 and 1e-4",
        method="errors recomputed from the stored entries, each matrix by itself",
        samples=lambda subject: strategies.samples(dtypes=subject.backend.dtypes),
        check=_within_tolerance,
        applies=stops_by_tolerance,
        effort=0.5,
        itemwise=True,
    ),
    _claim(
        name="kl_to_the_limit_never_rises",
        statement="KL(limit, iterate) does not rise from 1 to 2, 3, 5, 8, 13, 20 iterations.",
        reference="derivations: sinkhorn_knopp",
        domain="logits of range <= 8, n <= 5",
        method="the limit iterated to 1e-15 in float64; rounding of the iterates allowed",
        samples=lambda subject: strategies.samples(
            generators=("gaussian", "small", "diagonal"), scales=(0.1, 0.3, 0.6, 1.0), sizes=(2, 3, 4, 5), batch=8
        ),
        check=_kl_falls,
        applies=_truncations,
        effort=0.5,
        itemwise=True,
    ),
    _claim(
        name="open_side_never_rises",
        statement="The L1 error of the side normalised first does not rise from 1 to 2, 3, 5, 8, 13, 20 iterations.",
        reference="derivations: sinkhorn_knopp",
        domain="finite logits up to range 1e3",
        method="compensated sums; 2 n^2 accuracy allowances of slack",
        lemma="l1_error_decreases",
        samples=lambda subject: strategies.samples(batch=8),
        check=_monotone,
        applies=_truncations,
        effort=0.5,
        itemwise=True,
    ),
    _claim(
        name="hilbert_contraction",
        statement="Each iteration multiplies log(max sum / min sum) of the open side by at most tanh(D/4)^2, D the "
        "largest log cross ratio of the input.",
        reference="Birkhoff 1957; Franklin and Lorenz 1989 (the lemmas here: D does not change from step to step)",
        domain="logits of range <= 8, n <= 5",
        method="four successive iterates",
        lemma="cross_rownorm",
        lemmas=("cross_colnorm",),
        samples=lambda subject: strategies.samples(
            generators=("gaussian", "small", "diagonal"), scales=(0.1, 0.3, 0.6), sizes=(2, 3, 4, 5), batch=8
        ),
        check=_hilbert_rate,
        applies=_truncations,
        effort=0.5,
        itemwise=True,
    ),
    _claim(
        name="two_by_two_error_below_1_over_2k",
        statement="For n = 2 the open side is within 1/(2k) of 1 after k iterations.",
        reference="measured; no proof here",
        domain="n = 2, any finite logits up to range 1e3",
        method="k = 1, 2, 5, 10, 20, 50",
        samples=lambda subject: strategies.samples(sizes=(2,), batch=16),
        check=_two_by_two,
        applies=_truncations,
        effort=0.5,
        itemwise=True,
        inside=lambda sample: sample.logits.shape[-1] == 2,
    ),
)

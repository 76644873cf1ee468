"""Claims about the spectral norm of a projection's output. Norm <= 1 is claimed only where it is true."""

from __future__ import annotations

import functools

import numpy as np

from proofs import strategies
from proofs._claim import Claim, Observation, Sample, holds_where, worst
from proofs.conditions import exact_side, finished, kl
from proofs.measure import accuracy_allowance, norm2, norms_at_most, roundings, sums
from proofs.rational import schur_holds
from proofs.subjects import Subject

__all__ = ["CLAIMS"]

_SVD = 64 * 2.0**-53


def _schur(subject: Subject, sample: Sample) -> Observation:
    right = [schur_holds(matrix) for matrix in subject.matrix(sample)]
    return holds_where(right, "norm^2 I - A^T A has a negative direction")


def _floor(subject: Subject, sample: Sample) -> Observation:
    matrix = subject.matrix(sample)
    open_side = sums(matrix, subject.first)
    floor = np.sqrt(1 + np.mean((open_side - 1) ** 2, axis=-1))
    # |A 1|^2 / n is 1 + mean (s - 1)^2 + 2 mean (s - 1), and the last mean is that of the exact side's errors
    slack = subject.side_allowance(sample) + _SVD
    return worst(floor - norm2(matrix), slack * floor, "sqrt(1 + mean (s - 1)^2) above the norm")


def _ceiling(subject: Subject, sample: Sample) -> Observation:
    matrix = subject.matrix(sample)
    ceiling = np.sqrt(np.max(sums(matrix, subject.first), axis=-1))
    slack = subject.side_allowance(sample) + _SVD
    return worst(norm2(matrix) - ceiling, slack * np.maximum(ceiling, 1), "norm above sqrt(max open sum)")


def _nonexpansive(subject: Subject, sample: Sample) -> Observation:
    matrix = subject.matrix(sample)
    size = sample.logits.shape[-1]
    allowed = subject.side_allowance(sample) if subject.finish == "exact" else roundings(size + 4, size, sample.dtype)
    bound = np.full(len(matrix), np.nextafter(1 + allowed, np.inf))
    return holds_where(norms_at_most(matrix, bound), "norm above 1")


def _easy(subject: Subject, sample: Sample) -> Observation:
    allowed = 1e-5 + 2 * sample.logits.shape[-1] * accuracy_allowance(sample.logits, sample.dtype) + _SVD
    return worst(np.abs(norm2(subject.matrix(sample)) - 1), allowed, "|norm - 1|")


_claim = functools.partial(
    Claim,
    family="spectral_norm",
    provenance="sampled",
    reference="derivations: spectral_norm_certificate",
    samples=lambda subject: strategies.samples(dtypes=subject.backend.dtypes),
)

CLAIMS: tuple[Claim, ...] = (
    _claim(
        name="schur_bounds_every_output",
        statement="norm_2^2 <= max row sum * max column sum for the stored entries, and no entry is negative.",
        domain="finite logits up to range 1e3, n <= 5",
        method="symmetric elimination over the rationals",
        provenance="exact",
        lemma="schur",
        lemmas=("wcs", "certificate"),
        samples=lambda subject: strategies.samples(sizes=(1, 2, 3, 4, 5), batch=3, dtypes=subject.backend.dtypes),
        check=_schur,
        effort=0.5,
        itemwise=True,
    ),
    _claim(
        name="open_side_error_forces_norm_above_one",
        statement="With one side exact, norm_2 >= sqrt(1 + mean (s_i - 1)^2) over the open sums s, up to what the "
        "exact side may miss, (n+1) u: any residual means a norm above 1.",
        reference="explanation: norm_after_truncation",
        domain="finite logits up to range 1e3",
        method="singular values in float64, sums compensated",
        lemma="gain_lower",
        lemmas=("truncation_expands",),
        check=_floor,
        applies=exact_side,
        itemwise=True,
    ),
    _claim(
        name="norm_at_most_sqrt_of_open_sum",
        statement="With one side exact, norm_2 <= sqrt(max open sum) <= sqrt(n), up to (n+1) u.",
        domain="finite logits up to range 1e3",
        method="singular values in float64, sums compensated",
        lemma="schur",
        check=_ceiling,
        applies=exact_side,
        itemwise=True,
    ),
    _claim(
        name="finish_is_nonexpansive",
        statement="norm_2 <= 1 + (n+4) u for every input, after finish='nonexpansive' or 'exact' (exact in float64: "
        "1 + (n^2+n+4) u, what its sums may miss).",
        reference="Altschuler, Weed and Rigollet 2017",
        domain="finite logits up to range 1e3, adversarial ones included",
        method="decided without rounding on the stored entries",
        provenance="exact",
        lemma="nonexpansive_norm",
        lemmas=("nonexpansive_sub", "substoch_nonexpansive", "rounding_norm"),
        check=_nonexpansive,
        applies=finished,
        itemwise=True,
    ),
    _claim(
        name="norm_is_one_for_small_logits",
        statement="norm_2 is within 1e-5 of 1, plus rounding.",
        domain="logits in [-1/4, 1/4], at least 5 iterations",
        method="singular values in float64",
        lemma="dstoch_nonexpansive",
        samples=lambda subject: strategies.samples(generators=strategies.EASY, sizes=(2, 3, 4, 8, 16)),
        check=_easy,
        applies=kl,
        itemwise=True,
    ),
)

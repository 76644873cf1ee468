"""Claims about the spectral norm of a projection's output. Norm <= 1 is claimed only where it is true."""

from __future__ import annotations

import numpy as np

from proofs import strategies
from proofs._claim import Claim, Observation, Sample, worst
from proofs.conditions import exact_side, finished, kl
from proofs.measure import accuracy_allowance, compute_roundoff, marginal_allowance, norm2, storage_error, sums
from proofs.rational import schur_holds
from proofs.subjects import Subject

__all__ = ["CLAIMS"]

_SVD = 64 * 2.0**-53


def _schur(subject: Subject, sample: Sample) -> Observation:
    broken = [0.0 if schur_holds(matrix) else 2.0 for matrix in subject.matrix(sample)]
    return worst(broken, 1.0, "norm^2 I - A^T A has a negative direction")


def _floor(subject: Subject, sample: Sample) -> Observation:
    matrix = subject.matrix(sample)
    size = sample.logits.shape[-1]
    open_side = sums(matrix, subject.first)
    floor = np.sqrt(1 + np.mean((open_side - 1) ** 2, axis=-1))
    slack = 2 * marginal_allowance(size, sample.dtype) * size + _SVD
    return worst(floor - norm2(matrix), slack * floor, "sqrt(1 + mean (s - 1)^2) above the norm")


def _ceiling(subject: Subject, sample: Sample) -> Observation:
    matrix = subject.matrix(sample)
    ceiling = np.sqrt(np.max(sums(matrix, subject.first), axis=-1))
    slack = marginal_allowance(sample.logits.shape[-1], sample.dtype) + _SVD
    return worst(norm2(matrix) - ceiling, slack * np.maximum(ceiling, 1), "norm above sqrt(max open sum)")


def _nonexpansive(subject: Subject, sample: Sample) -> Observation:
    size = sample.logits.shape[-1]
    allowed = (size + 4) * compute_roundoff(sample.dtype) + storage_error(sample.dtype) + _SVD
    return worst(norm2(subject.matrix(sample)) - 1, allowed, "norm - 1")


def _easy(subject: Subject, sample: Sample) -> Observation:
    allowed = 1e-5 + 2 * sample.logits.shape[-1] * accuracy_allowance(sample.logits, sample.dtype) + _SVD
    return worst(np.abs(norm2(subject.matrix(sample)) - 1), allowed, "|norm - 1|")


CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="schur_bounds_every_output",
        family="spectral_norm",
        statement="norm_2^2 <= max row sum * max column sum for the stored entries, and no entry is negative.",
        reference="derivations: spectral_norm_certificate",
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
    Claim(
        name="open_side_error_forces_norm_above_one",
        family="spectral_norm",
        statement="With one side exact, norm_2 >= sqrt(1 + mean (s_i - 1)^2) over the open sums s: any residual means "
        "a norm above 1.",
        reference="explanation: norm_after_truncation",
        domain="finite logits up to range 1e3",
        method="singular values in float64, sums compensated",
        provenance="sampled",
        lemma="gain_lower",
        lemmas=("truncation_expands",),
        samples=lambda subject: strategies.samples(dtypes=subject.backend.dtypes),
        check=_floor,
        applies=exact_side,
        itemwise=True,
    ),
    Claim(
        name="norm_at_most_sqrt_of_open_sum",
        family="spectral_norm",
        statement="With one side exact, norm_2 <= sqrt(max open sum) <= sqrt(n), up to (n+1) u.",
        reference="derivations: spectral_norm_certificate",
        domain="finite logits up to range 1e3",
        method="singular values in float64, sums compensated",
        provenance="sampled",
        lemma="schur",
        samples=lambda subject: strategies.samples(dtypes=subject.backend.dtypes),
        check=_ceiling,
        applies=exact_side,
        itemwise=True,
    ),
    Claim(
        name="finish_is_nonexpansive",
        family="spectral_norm",
        statement="norm_2 <= 1 + (n+4) u for every input, after finish='nonexpansive' or 'exact'.",
        reference="Altschuler, Weed and Rigollet 2017",
        domain="finite logits up to range 1e3, adversarial ones included",
        method="singular values in float64",
        provenance="sampled",
        lemma="nonexpansive_norm",
        lemmas=("nonexpansive_sub", "substoch_nonexpansive", "rounding_norm"),
        samples=lambda subject: strategies.samples(dtypes=subject.backend.dtypes),
        check=_nonexpansive,
        applies=finished,
        itemwise=True,
    ),
    Claim(
        name="norm_is_one_for_small_logits",
        family="spectral_norm",
        statement="norm_2 is within 1e-5 of 1, plus rounding.",
        reference="derivations: spectral_norm_certificate",
        domain="logits in [-1/4, 1/4], at least 5 iterations",
        method="singular values in float64",
        provenance="sampled",
        lemma="dstoch_nonexpansive",
        samples=lambda subject: strategies.samples(generators=strategies.EASY, sizes=(2, 3, 4, 8, 16)),
        check=_easy,
        applies=kl,
        itemwise=True,
    ),
)

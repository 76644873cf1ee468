"""Claims about the projection in the Euclidean (Frobenius) distance."""

from __future__ import annotations

import functools
import itertools

import numpy as np

from proofs import strategies
from proofs._claim import Claim, Observation, Sample, holds_where, worst, worst_of
from proofs.conditions import is_euclidean
from proofs.measure import compute_roundoff, norm2, sums
from proofs.subjects import Subject

__all__ = ["CLAIMS"]

TOLERANCE = 2e-6
"""What the solver is asked for, with its own rounding."""


def _scale(sample: Sample) -> np.ndarray:
    size = sample.logits.shape[-1]
    largest = np.max(np.abs(np.asarray(sample.logits, dtype=np.float64)), axis=(-2, -1))
    return TOLERANCE + 8 * size * compute_roundoff(sample.dtype) * (1 + largest)


def _feasible(subject: Subject, sample: Sample) -> Observation:
    matrix = subject.matrix(sample)
    error = np.maximum(np.abs(sums(matrix, "rows") - 1), np.abs(sums(matrix, "columns") - 1)).max(-1)
    norm = norm2(matrix) - 1
    return worst_of(
        (
            worst(error, _scale(sample), "|sum - 1|"),
            holds_where(matrix >= 0, "a negative entry"),
            worst(norm, _scale(sample), "norm - 1"),
        )
    )


def _variational(subject: Subject, sample: Sample) -> Observation:
    wide = np.asarray(sample.logits, dtype=np.float64)
    matrix = subject.matrix(sample)
    size = wide.shape[-1]
    vertices = np.stack([np.eye(size)[list(order)] for order in itertools.permutations(range(size))])
    residual = wide - matrix
    towards = np.einsum("bij,vij->bv", residual, vertices) - np.sum(residual * matrix, axis=(-2, -1))[:, None]
    largest = 1 + np.max(np.abs(wide), axis=(-2, -1))
    return worst(np.max(towards, axis=-1), size * largest * _scale(sample), "<G - P, V - P> over the permutations V")


def _nonexpansive(subject: Subject, sample: Sample) -> Observation:
    rng = sample.rng()
    step = strategies.round_to(rng.standard_normal(sample.logits.shape), sample.dtype)
    moved = sample.with_logits((sample.logits + step).astype(sample.logits.dtype))
    given = np.asarray(moved.logits, dtype=np.float64) - np.asarray(sample.logits, dtype=np.float64)
    before = np.sqrt(np.sum(given**2, axis=(-2, -1)))
    after = np.sqrt(np.sum((subject.matrix(moved) - subject.matrix(sample)) ** 2, axis=(-2, -1)))
    size = sample.logits.shape[-1]
    return worst(after - before, 4 * size * (_scale(sample) + _scale(moved)), "|f(X) - f(Y)| - |X - Y|")


def _idempotent(subject: Subject, sample: Sample) -> Observation:
    matrix = subject.matrix(sample)
    again = subject.matrix(sample.with_logits(matrix.astype(sample.logits.dtype)))
    size = sample.logits.shape[-1]
    return worst(np.max(np.abs(again - matrix), axis=(-2, -1)), 4 * size * _scale(sample), "|f(f(X)) - f(X)|")


_DOMAIN = ("gaussian", "vertex", "triangular", "concentrated", "near_permutation", "constant", "circulant", "small")
_SCALES = (1e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)

_claim = functools.partial(
    Claim, family="euclidean", provenance="sampled", reference="derivations: euclidean_projection"
)

CLAIMS: tuple[Claim, ...] = (
    _claim(
        name="euclidean_is_doubly_stochastic",
        statement="Entries >= 0, both sums within t of 1, norm_2 <= 1 + t, where t = 2e-6 + 8 n u (1 + max |G|).",
        domain="logits up to range 1e2, n <= 8",
        method="compensated sums, singular values",
        lemma="dstoch_nonexpansive",
        samples=lambda subject: strategies.samples(
            generators=_DOMAIN, scales=_SCALES, sizes=(1, 2, 3, 4, 8), dtypes=subject.backend.dtypes
        ),
        check=_feasible,
        applies=is_euclidean,
        itemwise=True,
    ),
    _claim(
        name="euclidean_is_nearest",
        statement="<G - P, V - P> <= n (1 + max |G|) t for every permutation matrix V: up to that, no doubly "
        "stochastic matrix is nearer to G than P.",
        domain="logits up to range 1e2, n <= 4; t as in euclidean_is_doubly_stochastic",
        method="all n! permutations, of which every doubly stochastic matrix is a mixture",
        lemma="bvn_step",
        lemmas=("dstoch_perm",),
        samples=lambda subject: strategies.samples(
            generators=_DOMAIN, scales=_SCALES, sizes=(1, 2, 3, 4), dtypes=subject.backend.dtypes
        ),
        check=_variational,
        applies=is_euclidean,
        itemwise=True,
    ),
    _claim(
        name="euclidean_is_nonexpansive",
        statement="|f(X) - f(Y)|_F <= |X - Y|_F + 4 n (t(X) + t(Y)).",
        reference="projections on convex sets are 1-Lipschitz",
        domain="logits up to range 1e2, Gaussian differences; t as in euclidean_is_doubly_stochastic",
        method="Frobenius norms",
        samples=lambda subject: strategies.samples(
            generators=_DOMAIN, scales=_SCALES, sizes=(2, 3, 4, 8), dtypes=subject.backend.dtypes
        ),
        check=_nonexpansive,
        applies=is_euclidean,
        itemwise=True,
    ),
    _claim(
        name="euclidean_is_idempotent",
        statement="f(f(X)) = f(X) within 4 n t.",
        domain="logits up to range 1e2, n <= 8; t as in euclidean_is_doubly_stochastic",
        method="largest entry of the difference",
        samples=lambda subject: strategies.samples(
            generators=_DOMAIN, scales=_SCALES, sizes=(2, 3, 4, 8), dtypes=subject.backend.dtypes
        ),
        check=_idempotent,
        applies=is_euclidean,
        itemwise=True,
    ),
)

"""Claims about products: what survives any depth, and what does not."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from proofs import strategies
from proofs._claim import Claim, Observation, Sample, holds_where, worst, worst_of
from proofs.conditions import exact_side
from proofs.measure import finish_allowance, marginal_allowance, norm2, sums
from proofs.subjects import Subject

__all__ = ["CLAIMS", "gain_is_one", "norm_at_most_sqrt_n", "prefixes"]

_U = 2.0**-53


def prefixes(stack: np.ndarray) -> np.ndarray:
    """Return the products A_l ... A_1 for every depth l, float64, shape (L, n, n)."""
    products = np.empty(stack.shape, dtype=np.float64)
    running = np.eye(stack.shape[-1])
    for depth, matrix in enumerate(stack):
        running = matrix @ running
        products[depth] = running
    return products


def _per_layer(subject: Subject, sample: Sample) -> float:
    size = sample.logits.shape[-1]
    return (finish_allowance if subject.finish == "exact" else marginal_allowance)(size, sample.dtype)


def gain_is_one(stack: np.ndarray, sides: Sequence[str], per_layer: float) -> Observation:
    """The sums of every prefix product of a stack (L, n, n) against 1; `per_layer` is what one layer may miss."""
    products = prefixes(stack)
    allowed = np.expm1(np.arange(1, len(stack) + 1) * (per_layer + 2 * stack.shape[-1] * _U))[:, None]
    seen = [worst(np.abs(sums(products, side) - 1), allowed, f"composite {side} sum") for side in sides]
    return worst_of((*seen, holds_where(products >= 0, "a negative entry of the composite")))


def norm_at_most_sqrt_n(stack: np.ndarray, per_layer: float) -> Observation:
    """The norm of every prefix product of a stack (L, n, n) against sqrt(n)."""
    size = stack.shape[-1]
    slack = np.exp(np.arange(1, len(stack) + 1) * (per_layer + 2 * size * _U)) * (1 + 8 * size * _U)
    return worst(norm2(prefixes(stack)), np.sqrt(size) * slack, "norm of the composite")


def _gain(subject: Subject, sample: Sample) -> Observation:
    return gain_is_one(subject.matrix(sample), [subject.last], _per_layer(subject, sample))


def _sqrt_n(subject: Subject, sample: Sample) -> Observation:
    return norm_at_most_sqrt_n(subject.matrix(sample), _per_layer(subject, sample))


def _both_sides(subject: Subject) -> str | None:
    if subject.finish != "exact":
        return "one side carries the error of truncation, which a product multiplies"
    return None


def _doubly(subject: Subject, sample: Sample) -> Observation:
    return gain_is_one(subject.matrix(sample), ["rows", "columns"], _per_layer(subject, sample))


_claim = functools.partial(
    Claim,
    family="closure",
    provenance="sampled",
    reference="derivations: spectral_norm_certificate",
    samples=lambda subject: strategies.samples(batch=64, dtypes=subject.backend.dtypes),
)

CLAIMS: tuple[Claim, ...] = (
    _claim(
        name="composite_gain_is_one",
        statement="In a product of any depth L the sums of the exact side are 1 within L (n+2) u: with rows last the "
        "forward gain of the whole depth is 1, with columns last the backward gain.",
        domain="finite logits up to range 1e3, depth up to 64, any truncation",
        method="products of stored matrices in float64",
        lemma="rowst_prod",
        lemmas=("rowst_mul", "colst_mul", "sub_mul"),
        check=_gain,
        applies=exact_side,
        effort=0.5,
    ),
    _claim(
        name="composite_norm_at_most_sqrt_n",
        statement="The norm of a product of any depth is at most sqrt(n), up to L (n+2) u.",
        domain="finite logits up to range 1e3, depth up to 64, any truncation",
        method="singular values of float64 products",
        lemma="rowst_prod_norm",
        lemmas=("rowst_norm", "schur"),
        check=_sqrt_n,
        applies=exact_side,
        effort=0.5,
    ),
    _claim(
        name="exact_matrices_are_closed",
        statement="Products of exactly finished matrices stay doubly stochastic: non-negative, both sums 1 within "
        "L times the allowance of one at depth L.",
        domain="finite logits up to range 1e3, depth up to 64, finish='exact'",
        method="products of stored matrices in float64",
        lemma="dstoch_mul",
        lemmas=("dstoch1", "dstoch_prod"),
        check=_doubly,
        applies=_both_sides,
        effort=0.5,
    ),
)

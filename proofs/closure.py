"""Claims about products: what survives any depth, and what does not."""

from __future__ import annotations

import numpy as np

from proofs import strategies
from proofs._claim import Claim, Observation, Sample, worst
from proofs.conditions import exact_side
from proofs.measure import finish_allowance, marginal_allowance, norm2, sums
from proofs.subjects import Subject

__all__ = ["CLAIMS", "prefixes"]


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
    allowance = finish_allowance if subject.finish == "exact" else marginal_allowance
    return allowance(size, sample.dtype) + 2 * size * 2.0**-53


def _gain(subject: Subject, sample: Sample) -> Observation:
    products = prefixes(subject.matrix(sample))
    depth = np.arange(1, len(products) + 1)
    allowed = np.expm1(depth * _per_layer(subject, sample))
    return worst(np.abs(sums(products, subject.last) - 1), allowed[:, None], f"composite {subject.last} sum")


def _sqrt_n(subject: Subject, sample: Sample) -> Observation:
    products = prefixes(subject.matrix(sample))
    depth = np.arange(1, len(products) + 1)
    size = sample.logits.shape[-1]
    allowed = np.sqrt(size) * np.exp(depth * _per_layer(subject, sample)) * (1 + 8 * size * 2.0**-53)
    return worst(norm2(products), allowed, "norm of the composite")


def _both_sides(subject: Subject) -> str | None:
    if subject.finish != "exact":
        return "one side carries the error of truncation, which a product multiplies"
    return None


def _doubly(subject: Subject, sample: Sample) -> Observation:
    products = prefixes(subject.matrix(sample))
    depth = np.arange(1, len(products) + 1)
    allowed = np.expm1(depth * _per_layer(subject, sample))
    error = np.maximum(np.abs(sums(products, "rows") - 1).max(-1), np.abs(sums(products, "columns") - 1).max(-1))
    negative = np.where(products.min(axis=(-2, -1)) < 0, np.inf, 0.0)
    return worst(np.maximum(error, negative), allowed, "composite sums")


CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="composite_gain_is_one",
        family="closure",
        statement="In a product of any depth L the sums of the exact side are 1 within L (n+2) u: with rows last the "
        "forward gain of the whole depth is 1, with columns last the backward gain.",
        reference="derivations: spectral_norm_certificate",
        domain="finite logits up to range 1e3, depth up to 64, any truncation",
        method="products of stored matrices in float64",
        provenance="sampled",
        lemma="rowst_prod",
        lemmas=("rowst_mul", "colst_mul", "sub_mul"),
        samples=lambda subject: strategies.samples(batch=64, dtypes=subject.backend.dtypes),
        check=_gain,
        applies=exact_side,
        effort=0.5,
    ),
    Claim(
        name="composite_norm_at_most_sqrt_n",
        family="closure",
        statement="The norm of a product of any depth is at most sqrt(n), up to L (n+2) u.",
        reference="derivations: spectral_norm_certificate",
        domain="finite logits up to range 1e3, depth up to 64, any truncation",
        method="singular values of float64 products",
        provenance="sampled",
        lemma="rowst_prod_norm",
        lemmas=("rowst_norm", "schur"),
        samples=lambda subject: strategies.samples(batch=64, dtypes=subject.backend.dtypes),
        check=_sqrt_n,
        applies=exact_side,
        effort=0.5,
    ),
    Claim(
        name="exact_matrices_are_closed",
        family="closure",
        statement="Products of exactly finished matrices stay doubly stochastic: non-negative, both sums 1 within "
        "L times the allowance of one at depth L.",
        reference="derivations: spectral_norm_certificate",
        domain="finite logits up to range 1e3, depth up to 64, finish='exact'",
        method="products of stored matrices in float64",
        provenance="sampled",
        lemma="dstoch_mul",
        lemmas=("dstoch1", "dstoch_prod"),
        samples=lambda subject: strategies.samples(batch=64, dtypes=subject.backend.dtypes),
        check=_doubly,
        applies=_both_sides,
        effort=0.5,
    ),
)

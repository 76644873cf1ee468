"""Claims about products: what survives any depth, and what does not."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from proofs import strategies
from proofs._claim import Claim, Observation, Sample, holds_where, worst, worst_of
from proofs.conditions import exact_side
from proofs.measure import norm2, sums
from proofs.subjects import Subject

__all__ = ["CLAIMS", "gain_is_one", "norm_at_most_sqrt_n", "prefixes"]

_U, _WIDE_U = 2.0**-53, float(np.finfo(np.longdouble).eps)


def prefixes(stack: np.ndarray) -> np.ndarray:
    """Return the products A_l ... A_1 for every depth l, shape (L, n, n): multiplied in 80 bits, rounded to float64."""
    products = np.empty(stack.shape, dtype=np.float64)
    running = np.eye(stack.shape[-1], dtype=np.longdouble)
    for depth, matrix in enumerate(stack.astype(np.longdouble)):
        running = matrix @ running
        products[depth] = running
    return products


def _growth(stack: np.ndarray, per_layer: float) -> np.ndarray:
    """What the sums of the products of the first 1 ... L matrices may miss: what one may, and u, for each of them."""
    return np.expm1(np.arange(1, len(stack) + 1) * (per_layer + _U + 2 * stack.shape[-1] * _WIDE_U))


def gain_is_one(stack: np.ndarray, sides: Sequence[str], per_layer: float) -> Observation:
    """The sums of every prefix product of a stack (L, n, n) against 1; `per_layer` is what one layer may miss."""
    products, allowed = prefixes(stack), _growth(stack, per_layer)[:, None]
    seen = [worst(np.abs(sums(products, side) - 1), allowed, f"composite {side} sum") for side in sides]
    return worst_of((*seen, holds_where(products >= 0, "a negative entry of the composite")))


def norm_at_most_sqrt_n(stack: np.ndarray, per_layer: float) -> Observation:
    """The norm of every prefix product of a stack (L, n, n) against sqrt(n)."""
    size = stack.shape[-1]
    slack = (1 + _growth(stack, per_layer)) * (1 + 8 * size * _U)  # the last for the singular values
    return worst(norm2(prefixes(stack)), np.sqrt(size) * slack, "norm of the composite")


def _gain(subject: Subject, sample: Sample) -> Observation:
    return gain_is_one(subject.matrix(sample), [subject.last], subject.side_allowance(sample))


def _sqrt_n(subject: Subject, sample: Sample) -> Observation:
    return norm_at_most_sqrt_n(subject.matrix(sample), subject.side_allowance(sample))


def _both_sides(subject: Subject) -> str | None:
    if subject.finish != "exact":
        return "one side carries the error of truncation, which a product multiplies"
    return None


def _doubly(subject: Subject, sample: Sample) -> Observation:
    return gain_is_one(subject.matrix(sample), ["rows", "columns"], subject.side_allowance(sample))


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
        statement="In a product of any depth L the sums of the exact side are 1 within L (n+2) u (after the exact "
        "finish: L times what one matrix may miss and u): with rows last the forward gain of the whole depth is 1, "
        "with columns last the backward gain.",
        domain="finite logits up to range 1e3, depth up to 64, the given number of iterations",
        method="products of stored matrices in 80-bit floats",
        lemma="rowst_prod",
        lemmas=("rowst_mul", "colst_mul", "sub_mul"),
        check=_gain,
        applies=exact_side,
        effort=0.5,
    ),
    _claim(
        name="composite_norm_at_most_sqrt_n",
        statement="The norm of a product of any depth is at most sqrt(n), up to what its sums may miss: a factor of "
        "1 + L (n+2) u.",
        domain="finite logits up to range 1e3, depth up to 64, the given number of iterations",
        method="products in 80-bit floats, singular values in float64 (8 n 2^-53 allowed)",
        lemma="rowst_prod_norm",
        lemmas=("rowst_norm", "schur"),
        check=_sqrt_n,
        applies=exact_side,
        effort=0.5,
    ),
    _claim(
        name="exact_matrices_are_closed",
        statement="Products of exactly finished matrices stay doubly stochastic: non-negative, both sums 1 within "
        "L times what one matrix may miss and u, at depth L.",
        domain="finite logits up to range 1e3, depth up to 64, finish='exact'",
        method="products of stored matrices in 80-bit floats",
        lemma="dstoch_mul",
        lemmas=("dstoch1", "dstoch_prod"),
        check=_doubly,
        applies=_both_sides,
        effort=0.5,
    ),
)

"""Claims about gradients: the adjoint is the adjoint, finite, bounded, and orthogonal to what cannot matter."""

from __future__ import annotations

import functools

import numpy as np

from proofs import strategies
from proofs._claim import Claim, Observation, Sample, holds_where, worst, worst_of
from proofs.conditions import (
    adds_exactly,
    converges,
    differentiates_twice,
    has_implicit_gradient,
    kl,
    known_iteration,
    meets,
    no_eps,
    offers_gradient,
    unfinished,
)
from proofs.measure import accuracy_allowance, compute_roundoff, limit_allowance
from proofs.subjects import Subject

__all__ = ["CLAIMS"]


def _upstream(sample: Sample) -> np.ndarray:
    grad = sample.rng().standard_normal(sample.logits.shape)
    return strategies.round_to(grad, sample.dtype).astype(np.float64)


def _norms(values: np.ndarray) -> np.ndarray:
    return np.sqrt(np.sum(np.asarray(values, dtype=np.float64) ** 2, axis=(-2, -1)))


def _pulled_allowance(sample: Sample, grad: np.ndarray) -> np.ndarray:
    """What a gradient may miss, shape (B,): twice the accuracy contract of the entries, times |G|."""
    return 2 * accuracy_allowance(sample.logits, sample.dtype) * _norms(grad)


def _dot_product(subject: Subject, sample: Sample) -> Observation:
    grad = _upstream(sample)
    pulled = subject.gradient(sample, grad)
    rng = np.random.default_rng(sample.seed + 1)
    scale = _pulled_allowance(sample, grad)
    seen = []
    for _ in range(3):
        direction = rng.standard_normal(sample.logits.shape)
        pushed = subject.tangent(sample.logits, direction)
        gap = np.abs(np.sum(grad * pushed, axis=(-2, -1)) - np.sum(pulled * direction, axis=(-2, -1)))
        seen.append(worst(gap.astype(np.float64), scale * _norms(direction), "|<G, J V> - <J^T G, V>|"))
    return worst_of(seen)


def _differences(subject: Subject, sample: Sample) -> Observation:
    grad = _upstream(sample)
    rng = np.random.default_rng(sample.seed + 1)
    step = 2.0**-14 if sample.dtype == "float64" and not subject.converged else 2.0**-7
    direction = step * rng.standard_normal(sample.logits.shape)
    ahead, behind = (
        sample.with_logits((sample.logits + sign * direction).astype(sample.logits.dtype)) for sign in (1, -1)
    )
    moved = ahead.logits.astype(np.float64) - behind.logits  # what the two differ by once they are stored
    pulled = np.sum(subject.gradient(sample, grad) * moved, axis=(-2, -1))
    pushed = np.sum(grad * (subject.matrix(ahead) - subject.matrix(behind)), axis=(-2, -1))
    rounding = subject.agreement_allowance(ahead, behind)[:, 0, 0] * np.sum(np.abs(grad), axis=(-2, -1))
    allowed = _norms(direction) ** 3 * _norms(grad) + rounding
    return worst(np.abs(pushed - pulled), allowed, "|<G, f(X + hV) - f(X - hV)> - <J^T G, 2hV>|")


def _orthogonal(subject: Subject, sample: Sample) -> Observation:
    grad = _upstream(sample)
    pulled = subject.gradient(sample, grad)
    lines = np.sum(pulled, axis=-2 if subject.first == "columns" else -1)
    return worst(
        np.abs(lines), _pulled_allowance(sample, grad)[:, None], f"sum of the gradient over each of the {subject.first}"
    )


def _contracting(subject: Subject, sample: Sample) -> Observation:
    grad = _upstream(sample)
    pulled = subject.gradient(sample, grad)
    return worst(_norms(pulled), (0.5 + 1e-5) * _norms(grad) + _pulled_allowance(sample, grad), "|J^T G|")


def _implicit(subject: Subject, sample: Sample) -> Observation:
    assert subject.implicit is not None
    grad = _upstream(sample)
    given, pulled = subject.array(sample), subject.gradient(sample, grad)
    other = subject.backend.asnumpy(subject.implicit(given, subject.backend.asarray(grad, sample.dtype)))
    # two gradients are compared, and each sums up n^2 entries in the norm
    slack = 2 * sample.logits.shape[-1] * _pulled_allowance(sample, grad)
    return worst(_norms(other - pulled), 1e-5 * _norms(grad) + slack, "|implicit - unrolled|")


def _limit(subject: Subject, sample: Sample) -> Observation:
    assert subject.implicit is not None
    grad = _upstream(sample)
    result = subject.implicit(subject.array(sample), subject.backend.asarray(grad, sample.dtype))
    pulled, size, norms = subject.backend.asnumpy(result), sample.logits.shape[-1], _norms(grad)
    lines = np.concatenate([np.sum(pulled, axis=-1), np.sum(pulled, axis=-2)], axis=-1)
    rounding = 16 * size * compute_roundoff(sample.dtype)
    return worst_of(
        (
            worst(_norms(pulled) / norms, 0.5 + limit_allowance(size) + rounding, "|J^T G| / |G|"),
            worst(np.abs(lines), (rounding * norms)[:, None], "sum of the gradient over a line"),
        )
    )


def _finite(subject: Subject, sample: Sample) -> Observation:
    pulled = subject.gradient(sample, _upstream(sample))
    return holds_where(np.isfinite(pulled), "an entry of the gradient is not finite")


def _zero(subject: Subject, sample: Sample) -> Observation:
    pulled = subject.gradient(sample, np.zeros(sample.logits.shape))
    return worst(np.abs(pulled), 0.0, "gradient of a zero upstream")


def _neighbours(subject: Subject, sample: Sample) -> Observation:
    grad = _upstream(sample)
    clean = subject.gradient(sample, grad)
    at = int(sample.rng().integers(len(sample.logits)))
    logits = sample.logits.copy()
    logits[at, 0, 0] = np.nan
    try:
        dirty = subject.gradient(sample.with_logits(logits), grad)
    except (ValueError, FloatingPointError):
        return Observation(0.0, 1.0, at, "raised")
    difference = np.abs(dirty - clean)
    difference[at] = 0
    allowed = 2 * _pulled_allowance(sample, grad)
    return worst(difference, allowed[:, None, None], "gradient next to a NaN matrix")


def _double(subject: Subject, sample: Sample) -> Observation:
    grad = _upstream(sample)
    rng = np.random.default_rng(sample.seed + 2)
    direction, other = rng.standard_normal((2, *sample.logits.shape))
    convert = subject.backend.asarray

    def second(along: np.ndarray) -> np.ndarray:
        result = subject.backend.second(
            subject.function, subject.array(sample), convert(grad, sample.dtype), convert(along, sample.dtype)
        )
        return subject.backend.asnumpy(result)

    try:
        along, across = second(direction), second(other)
    except (RuntimeError, NotImplementedError):
        if subject.rebuild is not None:
            raise
        return Observation(0.0, 1.0, 0, "double backward raises, which is allowed")
    rounding = _pulled_allowance(sample, grad)
    symmetric = np.abs(np.sum(along * other, axis=(-2, -1)) - np.sum(across * direction, axis=(-2, -1)))
    seen = [worst(symmetric, 2 * rounding * _norms(direction) * _norms(other), "|V^T H W - W^T H V|")]
    step = 2.0**-14
    ahead = subject.gradient(sample.with_logits(sample.logits + step * direction), grad)
    behind = subject.gradient(sample.with_logits(sample.logits - step * direction), grad)
    allowed = step**2 * _norms(direction) ** 3 * _norms(grad) + rounding / step
    seen.append(worst(np.abs((ahead - behind) / (2 * step) - along), allowed[:, None, None], "|H V - difference|"))
    return worst_of(seen)


_claim = functools.partial(Claim, family="gradients", provenance="sampled", reference="derivations: exact_adjoint")

CLAIMS: tuple[Claim, ...] = (
    _claim(
        name="adjoint_identity",
        statement="<G, J V> = <J^T G, V> within twice the accuracy contract times |G| |V|, J the derivative of the "
        "truncated iteration itself.",
        domain="logits up to range 1e2, n <= 8",
        method="J V by forward differentiation of the model in extended precision; three directions",
        lemma="normalised_adjoint",
        lemmas=("normalised_difference",),
        samples=lambda subject: strategies.samples(
            scales=(0.1, 0.3, 1.0, 2.0, 3.0, 4.0, 8.0, 10.0, 16.0, 24.0, 30.0), batch=8, dtypes=subject.backend.dtypes
        ),
        check=_dot_product,
        applies=meets(offers_gradient, known_iteration),
        itemwise=True,
    ),
    _claim(
        name="gradient_matches_differences",
        statement="<G, f(X + hV) - f(X - hV)> = 2 h <J^T G, V> within (h |V|)^3 |G| and the accuracy contracts of the "
        "two results: the gradient belongs to the function itself, whatever its number of iterations.",
        domain="logit std up to 2, n <= 5; h is 2^-14, in float32 and for a limit 2^-7",
        method="one Gaussian direction for each matrix, rounded with the logits",
        lemma="normalised_adjoint",
        lemmas=("normalised_difference",),
        samples=lambda subject: strategies.samples(
            generators=("gaussian", "small", "circulant", "rank_one", "diagonal", "constant"),
            scales=(0.1, 0.3, 1.0, 2.0),
            sizes=(2, 3, 4, 5),
            batch=8,
            dtypes=subject.backend.dtypes,
        ),
        check=_differences,
        applies=meets(offers_gradient, kl, unfinished, adds_exactly),
        itemwise=True,
    ),
    _claim(
        name="gradient_sums_vanish",
        statement="The gradient sums to 0 over every line of the side normalised first: constants there do not matter.",
        domain="finite logits up to range 1e2",
        method="sums against twice the accuracy contract times |G|",
        lemma="normalised_adjoint_orthogonal",
        samples=lambda subject: strategies.samples(
            scales=(0.1, 0.3, 1.0, 3.0, 8.0, 16.0, 30.0, 100.0), batch=8, dtypes=subject.backend.dtypes
        ),
        check=_orthogonal,
        applies=meets(offers_gradient, kl, no_eps, unfinished),
        itemwise=True,
    ),
    _claim(
        name="gradient_halves_the_norm",
        statement="|J^T G|_F <= 1/2 |G|_F at the limit: 0 <= J <= I/2.",
        reference="the limit is the gradient of a convex function, 0 <= J <= I/2",
        domain="logits in [-1/4, 1/4], at least 5 iterations",
        method="Frobenius norms; 1e-5 |G| and twice the accuracy contract times |G| allowed",
        samples=lambda subject: strategies.samples(generators=strategies.EASY, batch=8, dtypes=subject.backend.dtypes),
        check=_contracting,
        applies=meets(offers_gradient, kl, no_eps, unfinished),
        itemwise=True,
    ),
    _claim(
        name="implicit_equals_unrolled_when_converged",
        statement="The gradient of the limit, one linear solve at the result, equals the gradient of the iterations.",
        reference="derivations: implicit_adjoint",
        domain="logits in [-1/4, 1/4], at least 5 iterations",
        method="Frobenius norm of the difference; 1e-5 |G| and 4 n times the accuracy contract times |G| allowed",
        lemma="implicit_vjp_correct",
        samples=lambda subject: strategies.samples(generators=strategies.EASY, batch=8, dtypes=subject.backend.dtypes),
        check=_implicit,
        applies=meets(offers_gradient, has_implicit_gradient, no_eps, known_iteration),
        itemwise=True,
    ),
    _claim(
        name="limit_gradient_halves_the_norm",
        statement="The gradient of a converged projection has |J^T G|_F <= 1/2 |G|_F at every range (up to 4 n times "
        "the solver's tolerance 1e-6), and its sums over rows and over columns vanish within 16 n u |G|_F.",
        reference="the limit is the gradient of a convex function, 0 <= J <= I/2",
        domain="finite logits of std 0.3 to 100, n <= 8",
        method="Frobenius norms and sums in float64",
        lemma="implicit_vjp_correct",
        lemmas=("implicit_rows", "implicit_cols"),
        samples=lambda subject: strategies.samples(
            generators=("gaussian", "unbalanced", "near_permutation", "vertex"),
            scales=(0.3, 3.0, 10.0, 30.0, 100.0),
            batch=128,
            dtypes=subject.backend.dtypes,
        ),
        check=_limit,
        applies=meets(has_implicit_gradient, converges, kl),
        itemwise=True,
    ),
    _claim(
        name="gradient_is_finite",
        statement="Every entry of the gradient is finite.",
        domain="finite logits up to range 1e4",
        method="looked at every entry",
        samples=lambda subject: strategies.samples(
            scales=(*strategies.SCALES, 3e3), batch=8, dtypes=subject.backend.dtypes
        ),
        check=_finite,
        applies=offers_gradient,
        itemwise=True,
    ),
    _claim(
        name="zero_upstream_gives_zero",
        statement="A zero upstream gradient gives exactly zero.",
        domain="finite logits up to range 1e3",
        method="compared bit for bit",
        samples=lambda subject: strategies.samples(batch=4, dtypes=subject.backend.dtypes),
        check=_zero,
        applies=offers_gradient,
        effort=0.5,
        itemwise=True,
    ),
    _claim(
        name="bad_matrix_spares_other_gradients",
        statement="A NaN in one matrix leaves the gradients of the others as they were, or raises ValueError.",
        domain="finite logits up to range 1e2, one entry replaced",
        method="compared with the clean stack within 4 times the accuracy contract times |G|",
        samples=lambda subject: strategies.samples(
            scales=(0.1, 1.0, 3.0, 10.0, 30.0), batch=4, dtypes=subject.backend.dtypes
        ),
        check=_neighbours,
        applies=meets(unfinished, offers_gradient),
        effort=0.5,
    ),
    _claim(
        name="double_backward_works",
        statement="Second derivatives are symmetric and match differences of the gradient (a function of yours may "
        "instead raise).",
        reference="birkhoff.sinkhorn on torch",
        domain="float64 logits of std <= 2, n <= 4",
        method="two Hessian-vector products, and a central difference of step h = 2^-14 within (h |V|)^2 |V| |G| and "
        "twice the accuracy contract times |G| / h",
        samples=lambda subject: strategies.samples(
            generators=("gaussian", "small", "circulant"),
            scales=(0.3, 1.0, 2.0),
            sizes=(2, 3, 4),
            batch=2,
            dtypes=("float64",),
        ),
        check=_double,
        applies=meets(differentiates_twice, unfinished),
        effort=0.25,
        itemwise=True,
    ),
)

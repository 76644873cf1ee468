"""Claims about rounding: how far an implementation may be from the iteration it computes."""

from __future__ import annotations

import functools

import numpy as np

from proofs import enclosure, strategies, vectors
from proofs._claim import Claim, Observation, Sample, same_bits, worst, worst_of
from proofs.backends import BACKENDS
from proofs.conditions import has_halves, iterates, known_iteration, meets
from proofs.measure import accuracy_allowance, marginal_allowance
from proofs.subjects import Subject

__all__ = ["CLAIMS"]

_CONTRACT_SCALES = (0.1, 0.3, 1.0, 2.0, 3.0, 4.0, 8.0, 10.0, 16.0, 24.0, 30.0, 64.0, 100.0)


def _accuracy(subject: Subject, sample: Sample) -> Observation:
    assert subject.num_iters is not None
    counts = {subject.num_iters} if subject.rebuild is None else {1, 3, subject.num_iters}
    allowed = accuracy_allowance(sample.logits, sample.dtype)[:, None, None]
    seen = []
    for count in sorted(counts):
        run = subject if count == subject.num_iters else subject.at(count)
        difference = np.abs(run.matrix(sample) - run.model(sample.logits).astype(np.float64))
        seen.append(worst(difference, allowed, f"distance from the model after {count} iterations"))
    return worst_of(seen)


def _half(subject: Subject, sample: Sample) -> Observation:
    single = Sample(sample.logits.astype(np.float32), "float32", sample.seed, sample.note)
    expected = subject.matrix(single)
    stored = strategies.round_to(expected, sample.dtype).astype(np.float64)
    bits, least = (8, 2.0**-133) if sample.dtype == "bfloat16" else (11, 2.0**-24)
    mantissa, exponent = np.frexp(stored)
    step = np.maximum(np.where(stored == 0, 0.0, np.ldexp(1.0, exponent - bits)), least)
    # two float32 results may straddle the boundary where the next number begins; below a power of two it is nearer
    slack = subject.agreement_allowance(single)
    straddle = np.abs(expected - stored) >= np.where(mantissa == 0.5, 0.25, 0.5) * step - slack
    difference = np.abs(subject.matrix(sample) - stored)
    allowed = np.where(straddle, step + slack, 0.0)
    return worst(difference, allowed, "stored half result against the rounded float32 result")


def _strict(subject: Subject) -> str | None:
    if subject.backend.name != "array_api_strict":
        return "about the strict namespace only"
    return None if subject.elsewhere is not None else "cannot run on another backend"


def _same_bits(subject: Subject, sample: Sample) -> Observation:
    assert subject.elsewhere is not None
    other = subject.elsewhere(BACKENDS["numpy"]).matrix(sample)
    return same_bits(subject.matrix(sample), other, "bits differ from NumPy")


def _foreign(subject: Subject) -> str | None:
    if subject.elsewhere is None or subject.backend.name in ("numpy", "array_api_strict"):
        return "NumPy itself, or a function that runs on one backend only"
    return iterates(subject)


def _agreement(subject: Subject, sample: Sample) -> Observation:
    assert subject.elsewhere is not None
    other = subject.elsewhere(BACKENDS["numpy"]).matrix(sample)
    allowed = 2 * accuracy_allowance(sample.logits, sample.dtype) + marginal_allowance(
        sample.logits.shape[-1], sample.dtype
    )
    return worst(np.abs(subject.matrix(sample) - other), allowed[:, None, None], "distance from NumPy")


def _has_balls(subject: Subject) -> str | None:
    return None if enclosure.available() else "python-flint is not installed"


def _contained(subject: Subject, sample: Sample) -> Observation:
    assert subject.num_iters is not None
    matrix = subject.matrix(sample)
    allowed = accuracy_allowance(sample.logits, sample.dtype)
    seen = []
    for item, logits in enumerate(sample.logits):
        balls = enclosure.iterate(logits, subject.num_iters, first=subject.first, eps=subject.eps)
        width = enclosure.width(balls)
        seen.append(Observation(width, enclosure.TIGHT, item, "width of the enclosure"))
        distance = enclosure.distance(balls, matrix[item])
        seen.append(
            Observation(distance, float(allowed[item]), item, "upper bound of the distance from the true iterate")
        )
    return worst_of(seen)


_VECTORS = {case["name"]: case for name in ("iterates_exact", "iterates_decimal") for case in vectors.load(name)}


def _vector_samples(subject: Subject) -> list[Sample]:
    """Every stored case that the subject computes, in every dtype of the backend that holds its logits."""
    found = []
    for name, case in _VECTORS.items():
        given = (case["num_iters"], case["first"]) == (subject.num_iters, subject.first)
        if ("eps" in case) != (subject.eps is not None) or not (given or subject.rebuild is not None):
            continue
        logits = vectors.logits_of(case)[None]
        for dtype in (*subject.backend.dtypes, *subject.backend.halves):
            rounded = strategies.round_to(logits, dtype)
            if np.array_equal(rounded, logits):
                found.append(Sample(rounded, dtype, 0, name))
    return found


def _is_stored(sample: Sample) -> bool:
    return np.array_equal(sample.logits[0], vectors.logits_of(_VECTORS[sample.note]))


def _replayed(subject: Subject, sample: Sample) -> Observation:
    case = _VECTORS[sample.note]
    run = subject
    if subject.rebuild is not None:
        run = subject.rebuild(num_iters=case["num_iters"], first=case["first"])
    allowed = accuracy_allowance(sample.logits, sample.dtype)[:, None, None]
    return worst(np.abs(run.matrix(sample) - vectors.matrix_of(case)), allowed, "distance from the stored answer")


_claim = functools.partial(Claim, family="roundoff", provenance="sampled", reference="derivations: rounding_errors")

CLAIMS: tuple[Claim, ...] = (
    _claim(
        name="accuracy_of_the_iteration",
        statement="Every entry is within 4 n u max(1, logit range / 16) of the same number of iterations on the exact "
        "reals (plus one cast where the result is stored in half precision).",
        domain="logit std 0.1 to 100, all generators, 1, 3 and the given number of iterations, n <= 16",
        method="against the model in 80-bit floats",
        samples=lambda subject: strategies.samples(
            scales=_CONTRACT_SCALES,
            sizes=(1, 2, 3, 4, 5, 8, 16),
            dtypes=(*subject.backend.dtypes, *subject.backend.halves),
        ),
        check=_accuracy,
        applies=known_iteration,
        itemwise=True,
    ),
    _claim(
        name="inside_the_enclosure",
        statement="Every entry is within 4 n u max(1, logit range / 16) of a rigorous enclosure of the exact iterate, "
        "which itself is narrower than 1e-30.",
        domain="logit std 0.1 to 100, n <= 8, the given number of iterations",
        method="ball arithmetic: the stored logits are exact, exp and divisions are enclosed",
        provenance="enclosure",
        samples=lambda subject: strategies.samples(
            scales=_CONTRACT_SCALES, sizes=(1, 2, 3, 4, 5, 8), batch=2, dtypes=subject.backend.dtypes
        ),
        check=_contained,
        applies=meets(known_iteration, _has_balls),
        effort=0.5,
        itemwise=True,
    ),
    _claim(
        name="conformance_vectors",
        statement="Every entry is within 4 n u max(1, logit range / 16) of the stored answers, which are fractions or "
        "decimals proven to 60 and 1000 digits.",
        domain="67 patterns of zeros and 80 matrices of logits, n <= 8, both orders, 1 to 20 iterations",
        method="replay of all that proofs/vectors has for the method, in every dtype that holds the logits",
        provenance="exact",
        samples=_vector_samples,
        inside=_is_stored,
        check=_replayed,
        applies=known_iteration,
    ),
    _claim(
        name="half_is_float32_stored",
        statement="float16 and bfloat16 logits give the float32 result rounded once (next to a rounding boundary: "
        "within one unit in the last place and twice the accuracy contract of float32).",
        domain="logit std up to 100",
        method="against the float32 run on the same values",
        samples=lambda subject: strategies.samples(
            scales=_CONTRACT_SCALES, sizes=(2, 3, 4, 8), dtypes=subject.backend.halves or ("float32",)
        ),
        check=_half,
        applies=has_halves,
        itemwise=True,
    ),
    _claim(
        name="same_bits_on_the_strict_namespace",
        statement="array-api-strict returns the bits that NumPy returns.",
        reference="the array API standard",
        domain="finite logits up to range 1e3",
        method="compared bit for bit",
        samples=lambda subject: strategies.samples(batch=4),
        check=_same_bits,
        applies=_strict,
    ),
    _claim(
        name="agrees_with_numpy",
        statement="Another backend is within twice the accuracy contract of NumPy on the same logits.",
        domain="logit std 0.1 to 100",
        method="difference of the two results",
        samples=lambda subject: strategies.samples(scales=_CONTRACT_SCALES, sizes=(2, 3, 4, 5, 8, 16)),
        check=_agreement,
        applies=_foreign,
        itemwise=True,
    ),
)

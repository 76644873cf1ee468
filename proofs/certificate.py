"""Claims about certificates: the bound holds for the stored values, whatever they are, and it is close to the norm.

Truth is decided without rounding: ``bound^2 I - A^T A`` is positive semidefinite exactly when ``norm_2(A) <= bound``,
and elimination over the rationals decides that for stored floats.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from hypothesis import strategies as st

from proofs import model, rational, strategies
from proofs._claim import Claim, Observation, Sample, holds_where, same_bits, worst, worst_of
from proofs.measure import norm2, norms_at_most, norms_below
from proofs.systems import Certifier

__all__ = ["CLAIMS", "encloses", "encloses_product", "near", "product_of", "stored_matrices"]

Certificate = dict[str, Any]

TIGHT = 1e-6
"""Relative distance of a bound from the norm that the tightness claims allow."""

_LOWER, _UPPER = 1e-3, 1e-2
"""The same on hard matrices: 2^10 powers of the Gram matrix leave ln(n) / 2^12 below; above, blocks that are nearly
apart have been seen to leave 4e-3."""


def stored_matrices(sample: Sample) -> np.ndarray:
    """Return non-negative matrices in the sample's dtype: truncated projections, crude ones, raw kernels, sparse ones.

    The values come in float64 storage and are exact in the dtype.
    """
    wide = np.asarray(sample.logits, dtype=np.float64)
    rng = sample.rng()
    truncated = model.iterate(wide, 20).astype(np.float64)
    crude = model.iterate(wide, 1).astype(np.float64)
    raw = np.exp(wide - wide.max(axis=(-2, -1), keepdims=True)) * 10.0 ** rng.uniform(-3, 3, (len(wide), 1, 1))
    sparse = truncated * (rng.random(wide.shape) < 0.6)
    choice = np.arange(len(wide))[:, None, None] % 4
    mixed = np.select([choice == 0, choice == 1, choice == 2], [truncated, crude, raw], sparse)
    return strategies.round_to(mixed, sample.dtype).astype(np.float64)


def encloses(matrices: np.ndarray, certificate: Certificate) -> Observation:
    """Whether the bounds of a stack (B, n, n) hold for its stored values, decided without rounding."""
    lower, upper = certificate["norm2_lower"], certificate["norm2_upper"]
    return worst_of(
        (
            holds_where(norms_at_most(matrices, upper), "the norm exceeds the upper bound"),
            holds_where(~norms_below(matrices, lower), "the norm is below the lower bound"),
            holds_where(lower <= upper, "the lower bound exceeds the upper one"),
        )
    )


def product_of(layers: np.ndarray) -> rational.Matrix:
    """Multiply a stack (L, n, n) in fractions, layer 0 acting first."""
    entries = rational.exact(layers[0])
    for layer in layers[1:]:
        entries = rational.matmul(rational.exact(layer), entries)
    return entries


def encloses_product(entries: rational.Matrix, lower: float, upper: float) -> Observation:
    """Whether two bounds hold for the norm of a matrix of fractions; an infinite one always does."""
    return worst_of(
        (
            holds_where(rational.norm_at_most(entries, upper), "the norm exceeds the upper bound"),
            holds_where(not rational.norm_below(entries, lower), "the norm is below the lower bound"),
        )
    )


def near(certificate: Certificate, norm: np.ndarray, allowed: float) -> Observation:
    """How far both bounds are from a norm that is known, relatively."""
    return worst_of(
        (
            worst(certificate["norm2_upper"] / norm - 1, allowed, "upper bound above the norm, relative"),
            worst(1 - certificate["norm2_lower"] / norm, allowed, "lower bound below the norm, relative"),
        )
    )


_NOTHING = 1e-30
"""What a bound may add for underflow: reading a float32 entry may lose 2^-126, and sums of n of them are multiplied."""


def _true_sums(
    entries: rational.Matrix, certificate: Certificate, item: int | None = None, *, layers: int = 1
) -> Observation:
    """How far the reported sums are from the sums in fractions, of a matrix or of matrix `item`; and the radius."""
    at = () if item is None else item
    radius, largest, seen = float(certificate["sums_radius"][at]), 0.0, []
    for side, name in (("rows", "row_sums"), ("columns", "column_sums")):
        true = rational.exact_sums(entries, side)
        reported = [rational.Fraction(float(value)) for value in certificate[name][at]]
        distance = max(abs(a - b) for a, b in zip(true, reported, strict=True))
        seen.append(Observation(float(distance), radius, item or 0, f"true {side} sums from the reported ones"))
        largest = max(largest, float(max(true)))
    allowed = layers * 8 * (len(entries) + 4) * 2.0**-53 * largest + _NOTHING
    return worst_of((*seen, Observation(radius, allowed, item or 0, "radius")))


def _enclosure(subject: Certifier, sample: Sample) -> Observation:
    matrices = stored_matrices(sample)
    return encloses(matrices, subject.certify(matrices, sample.dtype))


_HEIGHTS = (8.0, 24.0, 64.0)
_CHUNK = 4096


def _vertices(chunk: int, height: float) -> Sample:
    """One sixteenth of the 65 536 corners of the cube [0, height]^(4 x 4)."""
    corners = strategies.all_vertices(4, height)[chunk * _CHUNK : (chunk + 1) * _CHUNK]
    return Sample(corners, "float64", chunk, f"vertices {chunk} R={height:g}")


def _bulk(subject: Certifier, sample: Sample) -> Observation:
    matrices = model.limit(sample.logits, max_iters=20, tol=0.0)
    matrices = strategies.round_to(matrices, sample.dtype).astype(np.float64)
    return encloses(matrices, subject.certify(matrices, sample.dtype))


def _truncated(sample: Sample) -> np.ndarray:
    """Return 20 exact iterations, stored in the sample's dtype."""
    return strategies.round_to(model.iterate(sample.logits, 20).astype(np.float64), sample.dtype).astype(np.float64)


def _tight(subject: Certifier, sample: Sample) -> Observation:
    matrices = _truncated(sample)
    return near(subject.certify(matrices, sample.dtype), norm2(matrices), TIGHT)


def _close(subject: Certifier, sample: Sample) -> Observation:
    matrices = stored_matrices(sample)
    certificate, norm = subject.certify(matrices, sample.dtype), norm2(matrices)
    return worst_of(
        (
            worst(certificate["norm2_upper"] - norm, _UPPER * norm + _NOTHING, "upper bound above the norm"),
            worst(norm - certificate["norm2_lower"], _LOWER * norm + _NOTHING, "lower bound below the norm"),
        )
    )


def _sums(subject: Certifier, sample: Sample) -> Observation:
    matrices = stored_matrices(sample)
    certificate = subject.certify(matrices, sample.dtype)
    return worst_of(_true_sums(rational.exact(matrix), certificate, item) for item, matrix in enumerate(matrices))


def _refuses(subject: Certifier, sample: Sample) -> Observation:
    matrices = stored_matrices(sample)
    size, rng = matrices.shape[-1], sample.rng()
    seen = []
    for bad in (-1e-3, np.nan, np.inf, -np.inf):
        spoiled = matrices.copy()
        spoiled[0, rng.integers(size), rng.integers(size)] = bad
        upper = subject.certify(spoiled, sample.dtype)["norm2_upper"]
        # with one nonzero entry a line the norm is the largest |entry|, whatever the signs
        monomial = max((spoiled[0] != 0).sum(-1).max(), (spoiled[0] != 0).sum(-2).max()) <= 1
        if np.isfinite(bad) and monomial:
            continue
        clean = subject.certify(matrices, sample.dtype)["norm2_upper"]
        seen.append(holds_where(upper[0] == np.inf, f"an entry {bad} got a finite bound"))
        seen.append(same_bits(upper[1:], clean[1:], f"an entry {bad} changed other matrices"))
    return worst_of(seen)


def _provenance(subject: Certifier, sample: Sample) -> Observation:
    matrices = stored_matrices(sample)
    certificate = subject.certify(matrices, sample.dtype)
    equal = bool(np.all(certificate["norm2_lower"] == certificate["norm2_upper"]))
    expected = "exact" if equal else "enclosure"
    right = certificate["provenance"] == expected
    identity = subject.certify(np.eye(matrices.shape[-1])[None], "float64")
    right_identity = identity["provenance"] == "exact" and float(identity["norm2_upper"][0]) == 1.0
    return holds_where(right and right_identity, f"provenance {certificate['provenance']}")


def _product(subject: Certifier, sample: Sample) -> Observation:
    layers = stored_matrices(sample)
    certificate = subject.certify_product(layers, sample.dtype)
    entries = product_of(layers)
    bounds = float(certificate["norm2_lower"]), float(certificate["norm2_upper"])
    return worst_of((encloses_product(entries, *bounds), _true_sums(entries, certificate, layers=len(layers))))


def _product_tight(subject: Certifier, sample: Sample) -> Observation:
    stored = _truncated(sample)
    running = np.eye(stored.shape[-1], dtype=np.longdouble)
    for matrix in stored:
        running = matrix.astype(np.longdouble) @ running
    certificate = subject.certify_product(stored, sample.dtype)
    apart = np.prod(subject.certify(stored, sample.dtype)["norm2_upper"])
    return worst_of(
        (
            near(certificate, norm2(running.astype(np.float64)), TIGHT),
            worst(certificate["norm2_upper"] / apart - 1, TIGHT, "bound of the product above the product of bounds"),
        )
    )


def _dtypes(subject: Certifier) -> tuple[str, ...]:
    return (*subject.backend.dtypes, *subject.backend.halves)


def _standard(
    subject: Certifier, *, batch: int, sizes: tuple[int, ...] = (1, 2, 3, 4, 5, 8)
) -> st.SearchStrategy[Sample]:
    return strategies.samples(batch=batch, sizes=sizes, dtypes=_dtypes(subject))


_claim = functools.partial(
    Claim,
    family="certificate",
    kind="certificate",
    provenance="exact",
    reference="derivations: spectral_norm_certificate",
)

CLAIMS: tuple[Claim, ...] = (
    _claim(
        name="certificate_holds",
        statement="norm2_lower <= norm_2(P) <= norm2_upper for the stored entries of any non-negative matrix.",
        domain="truncated, crude, raw and sparse matrices from all generators, any dtype, n <= 8",
        method="exact: extended precision where its sign is sure, rational elimination elsewhere",
        lemma="collatz",
        lemmas=("schur", "certificate", "wcs", "float_sum_upper", "float_sum_lower"),
        samples=lambda subject: _standard(subject, batch=24),
        check=_enclosure,
        itemwise=True,
    ),
    _claim(
        name="certificate_holds_on_every_vertex",
        statement="norm2_lower <= norm_2(P) <= norm2_upper after 20 iterations on logits in {0, R}^(4x4).",
        domain="all 65 536 corners for R = 8, 24, 64: every one in the nightly profile, some in the others",
        method="elimination in extended precision where the sign is sure, in fractions elsewhere",
        lemma="collatz",
        lemmas=("schur",),
        samples=lambda subject: st.builds(_vertices, st.sampled_from(range(16)), st.sampled_from(_HEIGHTS)),
        check=_bulk,
        effort=0.1,
    ),
    _claim(
        name="certificate_holds_in_bulk",
        statement="norm2_lower <= norm_2(P) <= norm2_upper after 20 iterations on Gaussian logits.",
        domain="n = 4, logit std 1, 3, 10, any dtype: 2^20 matrices in the nightly profile",
        method="elimination in extended precision where the sign is sure, in fractions elsewhere",
        lemma="collatz",
        lemmas=("schur",),
        samples=lambda subject: strategies.samples(
            generators=("gaussian",), scales=(1.0, 3.0, 10.0), sizes=(4,), batch=_CHUNK, dtypes=_dtypes(subject)
        ),
        check=_bulk,
        effort=0.256,
    ),
    _claim(
        name="certificate_is_tight",
        statement="Both bounds are within 1e-6 of the norm, relatively.",
        domain="20 iterations on logits of std 1, any dtype, n <= 8",
        method="against LAPACK singular values",
        provenance="sampled",
        lemma="collatz",
        samples=lambda subject: strategies.samples(
            generators=("gaussian",), scales=(1.0,), sizes=(1, 2, 3, 4, 5, 8), batch=64, dtypes=_dtypes(subject)
        ),
        check=_tight,
        itemwise=True,
    ),
    _claim(
        name="certificate_is_close_on_hard_matrices",
        statement="The lower bound is within 1e-3 of the norm, the upper one within 1e-2, relatively (up to 1e-30): no "
        "bound is true because it says little.",
        domain="as for certificate_holds: adversarial, sparse and stored half-precision matrices included",
        method="against LAPACK singular values",
        provenance="sampled",
        lemma="collatz",
        samples=lambda subject: _standard(subject, batch=24),
        check=_close,
        itemwise=True,
    ),
    _claim(
        name="certified_sums_hold",
        statement="The true row and column sums are within sums_radius of the reported ones, and sums_radius is at "
        "most 8 (n+4) 2^-53 times the largest of them, up to 1e-30.",
        domain="as for certificate_holds",
        method="exact sums of fractions",
        lemma="float_sum_upper",
        lemmas=("float_sum_lower", "pow_linear"),
        samples=lambda subject: _standard(subject, batch=6),
        check=_sums,
        effort=0.5,
        itemwise=True,
    ),
    _claim(
        name="certificate_refuses_what_it_cannot_bound",
        statement="A negative or non-finite entry gives norm2_upper = +inf for its matrix (a negative one not where "
        "every line has one nonzero entry, whose norm is known), and changes no other.",
        domain="one entry replaced by -1e-3, NaN, +inf, -inf; 2 <= n <= 8",
        method="compared bit for bit",
        provenance="sampled",
        samples=lambda subject: _standard(subject, batch=4, sizes=(2, 3, 4, 5, 8)),
        check=_refuses,
        effort=0.5,
    ),
    _claim(
        name="provenance_is_never_upgraded",
        statement="'exact' is said where the lower and upper bounds of the whole stack are equal, as for the identity "
        "in float64, and 'enclosure' elsewhere.",
        domain="as for certificate_holds",
        method="compared with the bounds",
        provenance="sampled",
        samples=lambda subject: _standard(subject, batch=4),
        check=_provenance,
        effort=0.5,
    ),
    _claim(
        name="product_certificate_holds",
        statement="certify_product bounds the norm and the sums of A_L ... A_1, factor 0 acting first; its sums_radius "
        "is at most 8 L (n+4) 2^-53 times the largest sum, up to 1e-30.",
        domain="stacks of 6 matrices as for certificate_holds, n <= 4",
        method="the product and the decision in fractions",
        lemma="chained_row_sums",
        lemmas=("chained_col_sums", "gain_mul", "gain_prod1", "sub_mul"),
        samples=lambda subject: _standard(subject, batch=6, sizes=(1, 2, 3, 4)),
        check=_product,
        effort=0.5,
    ),
    _claim(
        name="product_certificate_is_tight",
        statement="For 64 layers both bounds are within 1e-6 of the norm of the product, relatively, and the upper one "
        "is at most the product of the layers' upper bounds.",
        domain="20 iterations on logits of std 1, 64 layers, n <= 8",
        method="against the product in extended precision",
        provenance="sampled",
        lemma="chained_row_sums",
        samples=lambda subject: strategies.samples(
            generators=("gaussian",), scales=(1.0,), sizes=(2, 3, 4, 8), batch=64, dtypes=_dtypes(subject)
        ),
        check=_product_tight,
        effort=0.5,
    ),
)

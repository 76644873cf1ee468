"""Claims about certificates: the bound holds for the stored values, whatever they are, and it is close to the norm.

Truth is decided without rounding: ``bound^2 I - A^T A`` is positive semidefinite exactly when ``norm_2(A) <= bound``,
and elimination over the rationals decides that for stored floats.
"""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from proofs import model, rational, strategies
from proofs._claim import Claim, Observation, Sample, worst, worst_of
from proofs.measure import norms_at_most, norms_below
from proofs.systems import Certifier

__all__ = ["CLAIMS", "stored_matrices"]

TIGHT = 1e-6
"""Relative distance of a bound from the norm that the tightness claims allow."""


def stored_matrices(sample: Sample, num_iters: int = 20) -> np.ndarray:
    """Return non-negative matrices in the sample's dtype: truncated projections, crude ones, raw kernels, sparse ones.

    The values come in float64 storage and are exact in the dtype.
    """
    wide = np.asarray(sample.logits, dtype=np.float64)
    rng = sample.rng()
    truncated = model.iterate(wide, num_iters).astype(np.float64)
    crude = model.iterate(wide, 1).astype(np.float64)
    raw = np.exp(wide - wide.max(axis=(-2, -1), keepdims=True)) * 10.0 ** rng.uniform(-3, 3, (len(wide), 1, 1))
    sparse = truncated * (rng.random(wide.shape) < 0.6)
    choice = np.arange(len(wide))[:, None, None] % 4
    mixed = np.select([choice == 0, choice == 1, choice == 2], [truncated, crude, raw], sparse)
    return strategies.round_to(mixed, sample.dtype).astype(np.float64)


def _enclosure(subject: Certifier, sample: Sample) -> Observation:
    matrices = stored_matrices(sample)
    certificate = subject.certify(matrices, sample.dtype)
    lower, upper = certificate["norm2_lower"], certificate["norm2_upper"]
    above = norms_at_most(matrices, upper)
    below = ~norms_below(matrices, lower)
    return worst_of(
        (
            worst(np.where(above, 0.0, 2.0), 1.0, "the norm exceeds the upper bound"),
            worst(np.where(below, 0.0, 2.0), 1.0, "the norm is below the lower bound"),
            worst(np.where(lower <= upper, 0.0, 2.0), 1.0, "the lower bound exceeds the upper one"),
        )
    )


_HEIGHTS = (8.0, 24.0, 64.0)
_CHUNK = 4096


def _vertices(chunk: int, height: float) -> Sample:
    """One sixteenth of the 65 536 corners of the cube [0, height]^(4 x 4)."""
    corners = strategies.all_vertices(4, height)[chunk * _CHUNK : (chunk + 1) * _CHUNK]
    return Sample(corners, "float64", chunk, f"vertices {chunk} R={height:g}")


def _bulk(subject: Certifier, sample: Sample) -> Observation:
    matrices = model.limit(sample.logits, max_iters=20, tol=0.0)
    matrices = strategies.round_to(matrices, sample.dtype).astype(np.float64)
    certificate = subject.certify(matrices, sample.dtype)
    above = norms_at_most(matrices, certificate["norm2_upper"])
    below = ~norms_below(matrices, certificate["norm2_lower"])
    return worst(np.where(above & below, 0.0, 2.0), 1.0, "the norm is outside its bounds")


def _tight(subject: Certifier, sample: Sample) -> Observation:
    matrices = strategies.round_to(model.iterate(sample.logits, 20).astype(np.float64), sample.dtype).astype(np.float64)
    certificate = subject.certify(matrices, sample.dtype)
    lower, upper = certificate["norm2_lower"], certificate["norm2_upper"]
    norm = np.linalg.norm(matrices, ord=2, axis=(-2, -1))
    return worst_of(
        (
            worst(upper / norm - 1, TIGHT, "upper bound above the norm, relative"),
            worst(1 - lower / norm, TIGHT, "lower bound below the norm, relative"),
        )
    )


def _sums(subject: Certifier, sample: Sample) -> Observation:
    matrices = stored_matrices(sample)
    certificate = subject.certify(matrices, sample.dtype)
    seen = []
    for item, matrix in enumerate(matrices):
        entries = rational.exact(matrix)
        for side, name in (("rows", "row_sums"), ("columns", "column_sums")):
            true = rational.exact_sums(entries, side)
            reported = [rational.Fraction(float(value)) for value in certificate[name][item]]
            distance = max(abs(a - b) for a, b in zip(true, reported, strict=True))
            radius = float(certificate["sums_radius"][item])
            seen.append(Observation(float(distance), radius, item, f"true {side} sums from the reported ones"))
    return worst_of(seen)


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
        seen.append(Observation(0.0 if upper[0] == np.inf else 2.0, 1.0, 0, f"an entry {bad} got a finite bound"))
        seen.append(worst(np.where(upper[1:] == clean[1:], 0.0, 2.0), 1.0, f"an entry {bad} changed other matrices"))
    return worst_of(seen)


def _provenance(subject: Certifier, sample: Sample) -> Observation:
    matrices = stored_matrices(sample)
    certificate = subject.certify(matrices, sample.dtype)
    equal = bool(np.all(certificate["norm2_lower"] == certificate["norm2_upper"]))
    expected = "exact" if equal else "enclosure"
    right = certificate["provenance"] == expected
    identity = subject.certify(np.eye(matrices.shape[-1])[None], "float64")
    right_identity = identity["provenance"] == "exact" and float(identity["norm2_upper"][0]) == 1.0
    return Observation(0.0 if right and right_identity else 2.0, 1.0, 0, f"provenance {certificate['provenance']}")


def _product(subject: Certifier, sample: Sample) -> Observation:
    layers = stored_matrices(sample)
    certificate = subject.certify_product(layers, sample.dtype)
    entries = rational.exact(layers[0])
    for layer in layers[1:]:
        entries = rational.matmul(rational.exact(layer), entries)
    upper, lower = float(certificate["norm2_upper"]), float(certificate["norm2_lower"])
    seen = [
        Observation(0.0 if rational.norm_at_most(entries, upper) else 2.0, 1.0, 0, "the norm exceeds the upper bound"),
        Observation(2.0 if rational.norm_below(entries, lower) else 0.0, 1.0, 0, "the norm is below the lower bound"),
    ]
    for side, name in (("rows", "row_sums"), ("columns", "column_sums")):
        for true, reported in zip(rational.exact_sums(entries, side), certificate[name], strict=True):
            gap = float(abs(true - rational.Fraction(float(reported))))
            seen.append(Observation(gap, float(certificate["sums_radius"]), 0, f"true {side} sums of the composite"))
    return worst_of(seen)


def _product_tight(subject: Certifier, sample: Sample) -> Observation:
    stored = strategies.round_to(model.iterate(sample.logits, 20).astype(np.float64), sample.dtype).astype(np.float64)
    certificate = subject.certify_product(stored, sample.dtype)
    running = np.eye(stored.shape[-1], dtype=np.longdouble)
    for matrix in stored:
        running = matrix.astype(np.longdouble) @ running
    norm = float(np.linalg.norm(running.astype(np.float64), 2))
    return worst_of(
        (
            Observation(float(certificate["norm2_upper"]) / norm - 1, TIGHT, 0, "upper bound above the norm, relative"),
            Observation(1 - float(certificate["norm2_lower"]) / norm, TIGHT, 0, "lower bound below the norm, relative"),
        )
    )


def _dtypes(subject: Certifier) -> tuple[str, ...]:
    return (*subject.backend.dtypes, *subject.backend.halves)


def _standard(
    subject: Certifier, *, batch: int, sizes: tuple[int, ...] = (1, 2, 3, 4, 5, 8)
) -> st.SearchStrategy[Sample]:
    return strategies.samples(batch=batch, sizes=sizes, dtypes=_dtypes(subject))


CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="certificate_holds",
        family="certificate",
        statement="norm2_lower <= norm_2(P) <= norm2_upper for the stored entries of any non-negative matrix.",
        reference="derivations: spectral_norm_certificate",
        domain="truncated, crude, raw and sparse matrices from all generators, any dtype, n <= 8",
        method="exact: extended precision where its sign is sure, rational elimination elsewhere",
        provenance="exact",
        kind="certificate",
        lemma="collatz",
        lemmas=("schur", "certificate", "wcs", "float_sum_upper", "float_sum_lower"),
        samples=lambda subject: _standard(subject, batch=24),
        check=_enclosure,
        itemwise=True,
    ),
    Claim(
        name="certificate_holds_on_every_vertex",
        family="certificate",
        statement="norm2_lower <= norm_2(P) <= norm2_upper after 20 iterations on logits in {0, R}^(4x4).",
        reference="derivations: spectral_norm_certificate",
        domain="all 65 536 corners for R = 8, 24, 64: every one in the nightly profile, some in the others",
        method="elimination in extended precision where the sign is sure, in fractions elsewhere",
        provenance="exact",
        kind="certificate",
        lemma="collatz",
        lemmas=("schur",),
        samples=lambda subject: st.builds(_vertices, st.sampled_from(range(16)), st.sampled_from(_HEIGHTS)),
        check=_bulk,
        effort=0.1,
    ),
    Claim(
        name="certificate_holds_in_bulk",
        family="certificate",
        statement="norm2_lower <= norm_2(P) <= norm2_upper after 20 iterations on Gaussian logits.",
        reference="derivations: spectral_norm_certificate",
        domain="n = 4, logit std 1, 3, 10, any dtype: 2^20 matrices in the nightly profile",
        method="elimination in extended precision where the sign is sure, in fractions elsewhere",
        provenance="exact",
        kind="certificate",
        lemma="collatz",
        lemmas=("schur",),
        samples=lambda subject: strategies.samples(
            generators=("gaussian",), scales=(1.0, 3.0, 10.0), sizes=(4,), batch=_CHUNK, dtypes=_dtypes(subject)
        ),
        check=_bulk,
        effort=0.256,
    ),
    Claim(
        name="certificate_is_tight",
        family="certificate",
        statement="Both bounds are within 1e-6 of the norm, relatively.",
        reference="derivations: spectral_norm_certificate",
        domain="20 iterations on logits of std 1, any dtype, n <= 8",
        method="against LAPACK singular values",
        provenance="sampled",
        kind="certificate",
        lemma="collatz",
        samples=lambda subject: strategies.samples(
            generators=("gaussian",), scales=(1.0,), sizes=(1, 2, 3, 4, 5, 8), batch=64, dtypes=_dtypes(subject)
        ),
        check=_tight,
        itemwise=True,
    ),
    Claim(
        name="certified_sums_hold",
        family="certificate",
        statement="The true row and column sums are within sums_radius of the reported ones.",
        reference="derivations: spectral_norm_certificate",
        domain="as for certificate_holds",
        method="exact sums of fractions",
        provenance="exact",
        kind="certificate",
        lemma="float_sum_upper",
        lemmas=("float_sum_lower", "pow_linear"),
        samples=lambda subject: _standard(subject, batch=6),
        check=_sums,
        effort=0.5,
        itemwise=True,
    ),
    Claim(
        name="certificate_refuses_what_it_cannot_bound",
        family="certificate",
        statement="A negative or non-finite entry gives norm2_upper = +inf for its matrix (a negative one not where "
        "every line has one nonzero entry, whose norm is known), and changes no other.",
        reference="derivations: spectral_norm_certificate",
        domain="one entry replaced by -1e-3, NaN, +inf, -inf; 2 <= n <= 8",
        method="compared bit for bit",
        provenance="sampled",
        kind="certificate",
        samples=lambda subject: _standard(subject, batch=4, sizes=(2, 3, 4, 5, 8)),
        check=_refuses,
        effort=0.5,
    ),
    Claim(
        name="provenance_is_never_upgraded",
        family="certificate",
        statement="'exact' is said only when lower and upper bound are equal; it is said of the identity in float64.",
        reference="derivations: spectral_norm_certificate",
        domain="as for certificate_holds",
        method="compared with the bounds",
        provenance="sampled",
        kind="certificate",
        samples=lambda subject: _standard(subject, batch=4),
        check=_provenance,
        effort=0.5,
    ),
    Claim(
        name="product_certificate_holds",
        family="certificate",
        statement="certify_product bounds the norm and the sums of A_L ... A_1, factor 0 acting first.",
        reference="derivations: spectral_norm_certificate",
        domain="stacks of 6 matrices as for certificate_holds, n <= 4",
        method="the product and the decision in fractions",
        provenance="exact",
        kind="certificate",
        lemma="chained_row_sums",
        lemmas=("chained_col_sums", "gain_mul", "gain_prod1", "sub_mul"),
        samples=lambda subject: _standard(subject, batch=6, sizes=(1, 2, 3, 4)),
        check=_product,
        effort=0.5,
    ),
    Claim(
        name="product_certificate_is_tight",
        family="certificate",
        statement="For 64 layers both bounds are within 1e-6 of the norm of the product, relatively.",
        reference="derivations: spectral_norm_certificate",
        domain="20 iterations on logits of std 1, 64 layers, n <= 8",
        method="against the product in extended precision",
        provenance="sampled",
        kind="certificate",
        lemma="chained_row_sums",
        samples=lambda subject: strategies.samples(
            generators=("gaussian",), scales=(1.0,), sizes=(2, 3, 4, 8), batch=64, dtypes=_dtypes(subject)
        ),
        check=_product_tight,
        effort=0.5,
    ),
)

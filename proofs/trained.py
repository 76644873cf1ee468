"""Claims about trained models: what the maps of a real forward pass are worth after optimisation has moved them."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from proofs import rational
from proofs._claim import Claim, Observation, Sample, worst, worst_of
from proofs.certificate import TIGHT
from proofs.closure import prefixes
from proofs.measure import marginal_allowance, norm2, norms_at_most, norms_below, sums
from proofs.systems import Trained

__all__ = ["CLAIMS"]

_U = 2.0**-53
_U32 = 2.0**-24
_EXACT_TOKENS = 3
_SPREAD = 2.0**-14  # 1024 u of float32: copies that only rounding tells apart stay far below
_TIGHT_SITE = 1e-4


def _sample(seed: int) -> Sample:
    """Tokens are drawn from the seed; there are no logits to choose, the trained model has its own."""
    return Sample(np.zeros((1, 1, 1), dtype=np.float32), "float32", seed, "tokens")


def _samples(subject: Trained) -> st.SearchStrategy[Sample]:
    return st.builds(_sample, st.integers(0, 2**16))


def _composites(h_res: np.ndarray) -> np.ndarray:
    """Whole-depth products of every token, (N, n, n), float64."""
    return np.stack([prefixes(h_res[:, token])[-1] for token in range(h_res.shape[1])])


def _no_eps(subject: Trained) -> str | None:
    return "eps is added to every divisor, so no side is exact by design" if subject.eps else None


def _site_certificate(subject: Trained, sample: Sample) -> Observation:
    h_res = subject.trace(sample.seed).h_res
    flat = h_res.reshape(-1, *h_res.shape[-2:])
    certificate = subject.certifier.certify(flat, "float32")
    lower, upper = certificate["norm2_lower"], certificate["norm2_upper"]
    inside = norms_at_most(flat, upper) & ~norms_below(flat, lower)
    return worst_of(
        (
            worst(np.where(inside, 0.0, 2.0), 1.0, "the norm of a site is outside its bounds"),
            worst(upper / norm2(flat) - 1, _TIGHT_SITE, "upper bound above the norm of a site, relative"),
        )
    )


def _depth_certificate(subject: Trained, sample: Sample) -> Observation:
    h_res = subject.trace(sample.seed).h_res
    certificate = subject.certifier.certify_product(np.swapaxes(h_res, 0, 1), "float32")
    lower, upper = certificate["norm2_lower"], certificate["norm2_upper"]
    seen = [worst(upper / norm2(_composites(h_res)) - 1, TIGHT, "upper bound above the composite's norm, relative")]
    for token in np.linspace(0, h_res.shape[1] - 1, _EXACT_TOKENS).astype(int):
        entries = rational.exact(h_res[0, token])
        for matrix in h_res[1:, token]:
            entries = rational.matmul(rational.exact(matrix), entries)
        above = np.isfinite(upper[token]) and not rational.norm_at_most(entries, float(upper[token]))
        below = rational.norm_below(entries, float(lower[token]))
        seen.append(Observation(2.0 if above or below else 0.0, 1.0, 0, "the composite's norm is outside its bounds"))
    return worst_of(seen)


def _row_sums(subject: Trained, sample: Sample) -> Observation:
    h_res = subject.trace(sample.seed).h_res
    return worst(np.abs(sums(h_res, "rows") - 1), marginal_allowance(h_res.shape[-1], "float32"), "row sum of a site")


def _gain(subject: Trained, sample: Sample) -> Observation:
    h_res = subject.trace(sample.seed).h_res
    depth, size = len(h_res), h_res.shape[-1]
    allowed = np.expm1(depth * (marginal_allowance(size, "float32") + 2 * size * _U))
    return worst(np.abs(sums(_composites(h_res), "rows") - 1), allowed, "forward gain of the whole depth")


def _sqrt_n(subject: Trained, sample: Sample) -> Observation:
    h_res = subject.trace(sample.seed).h_res
    depth, size = len(h_res), h_res.shape[-1]
    slack = np.exp(depth * (marginal_allowance(size, "float32") + 2 * size * _U)) * (1 + 8 * size * _U)
    return worst(norm2(_composites(h_res)), np.sqrt(size) * slack, "norm of the whole depth")


def _streams_differ(subject: Trained, sample: Sample) -> Observation:
    last = subject.trace(sample.seed).streams[-1]
    spread = np.std(last, axis=-2).mean(axis=-1) / np.sqrt(np.mean(last**2, axis=(-2, -1)))
    return worst(np.full_like(spread, _SPREAD), spread, "least spread of the streams against the one found")


def _mean(subject: Trained, sample: Sample) -> Observation:
    trace = subject.trace(sample.seed)
    before, after, post = trace.streams[:-1], trace.streams[1:], trace.h_post.mean(-1)[..., None]
    size = before.shape[-2]
    flat = trace.h_res.reshape(-1, size, size)
    certificate = subject.certifier.certify(flat, "float32")
    error = np.abs(certificate["column_sums"] - 1).max(-1) + certificate["sums_radius"]
    mixed = np.einsum("snij,snjc->snic", np.abs(trace.h_res), np.abs(before)).mean(-2)
    rounding = 2 * (size + 3) * _U32 * (mixed + np.abs(post * trace.updates))
    allowed = error.reshape(trace.h_res.shape[:2])[..., None] * np.abs(before).mean(-2) + rounding
    gap = np.abs(after.mean(-2) - before.mean(-2) - post * trace.updates)
    return worst(gap, allowed, "mean of the streams after a site")


def _decode(subject: Trained, sample: Sample) -> Observation:
    full, decoded = subject.decode(sample.seed)
    return worst(np.abs(decoded - full), 1e-10 * max(1.0, float(np.abs(full).max())), "cached decoding against full")


_DOMAIN = "Transformers of 6 sites, 4 streams, trained 50 steps in float32 on the CPU; every token of fresh sequences"


CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="trained_site_certificate_holds",
        family="trained",
        statement="For every H_res of a forward pass norm2_lower <= norm_2(H_res) <= norm2_upper, and the upper bound "
        "is within 1e-4 of the norm.",
        reference="derivations: spectral_norm_certificate",
        domain=_DOMAIN,
        method="bounds decided exactly on the stored float32 values; tightness by float64 singular values",
        provenance="exact",
        kind="trained",
        lemma="collatz",
        lemmas=("schur",),
        samples=_samples,
        check=_site_certificate,
        effort=0.1,
    ),
    Claim(
        name="trained_depth_certificate_holds",
        family="trained",
        statement="The certificate of the product of all H_res of a token encloses its norm, and the upper bound is "
        "within 1e-6 of the norm.",
        reference="derivations: spectral_norm_certificate",
        domain=_DOMAIN,
        method="product and bounds in fractions for three tokens of each pass; tightness by float64 singular values",
        provenance="exact",
        kind="trained",
        lemma="collatz",
        lemmas=("chained_row_sums", "chained_col_sums"),
        samples=_samples,
        check=_depth_certificate,
        effort=0.1,
    ),
    Claim(
        name="trained_row_sums_exact",
        family="trained",
        statement="Every row of every H_res of a forward pass sums to 1 within (n+1) u.",
        reference="arXiv 2512.24880, equation 9",
        domain=_DOMAIN + "; conventions without eps",
        method="compensated sums",
        provenance="sampled",
        kind="trained",
        lemma="rownorm_sum",
        lemmas=("normalised_sum_upper", "normalised_sum_lower"),
        samples=_samples,
        check=_row_sums,
        applies=_no_eps,
        effort=0.2,
    ),
    Claim(
        name="trained_depth_gain_is_one",
        family="trained",
        statement="The forward gain of the whole depth, the row sums of the product of all H_res, is 1 "
        "within L (n+2) u.",
        reference="derivations: spectral_norm_certificate",
        domain=_DOMAIN + "; conventions without eps",
        method="products of the stored maps in float64",
        provenance="sampled",
        kind="trained",
        lemma="rowst_prod",
        samples=_samples,
        check=_gain,
        applies=_no_eps,
        effort=0.2,
    ),
    Claim(
        name="trained_depth_norm_at_most_sqrt_n",
        family="trained",
        statement="The norm of the product of all H_res is at most sqrt(n), up to L (n+2) u.",
        reference="derivations: spectral_norm_certificate",
        domain=_DOMAIN,
        method="singular values of float64 products",
        provenance="sampled",
        kind="trained",
        lemma="rowst_prod_norm",
        lemmas=("schur", "sub_mul"),
        samples=_samples,
        check=_sqrt_n,
        effort=0.2,
    ),
    Claim(
        name="trained_streams_differ",
        family="trained",
        statement="The streams that leave the last site are not copies of each other: their spread is at least 1024 u "
        "of their root mean square.",
        reference="arXiv 2512.24880",
        domain=_DOMAIN,
        method="standard deviation over streams, mean over channels, for every token",
        provenance="sampled",
        kind="trained",
        samples=_samples,
        check=_streams_differ,
        effort=0.2,
    ),
    Claim(
        name="trained_mean_is_conserved",
        family="trained",
        statement="A site moves the mean of the streams by mean(h_post) times its update and nothing else, within the "
        "certificate's distance of the column sums from 1 and float32 rounding.",
        reference="arXiv 2512.24880, equation 3",
        domain=_DOMAIN,
        method="the streams and updates of the pass itself, before and after every site",
        provenance="sampled",
        kind="trained",
        lemma="colst_mean",
        samples=_samples,
        check=_mean,
        effort=0.2,
    ),
    Claim(
        name="trained_decoding_equals_the_full_forward",
        family="trained",
        statement="With the trained weights, token-by-token decoding with caches gives the logits of one full forward "
        "within 1e-10 of the largest, in float64.",
        reference="mhc_layers.generate",
        domain=_DOMAIN + ", prompts of 1 to 11 tokens",
        method="largest difference of the logits",
        provenance="sampled",
        kind="trained",
        samples=_samples,
        check=_decode,
        effort=0.1,
    ),
)

"""Claims about trained models: what the maps of a real forward pass are worth after optimisation has moved them."""

from __future__ import annotations

import functools

import numpy as np
from hypothesis import strategies as st

from proofs._claim import Claim, Observation, Sample, worst, worst_of
from proofs.certificate import TIGHT, encloses, encloses_product, near, product_of
from proofs.closure import gain_is_one, norm_at_most_sqrt_n, prefixes
from proofs.layer import decoding_gap
from proofs.measure import marginal_allowance, norm2, sums
from proofs.systems import Trained

__all__ = ["CLAIMS"]

_U32 = 2.0**-24
_EXACT_TOKENS = 3
_SPREAD = 2.0**-14  # 1024 u of float32: copies that only rounding tells apart stay far below
_TIGHT_SITE = 1e-4


def _sample(seed: int) -> Sample:
    """Tokens are drawn from the seed; there are no logits to choose, the trained model has its own."""
    return Sample(np.zeros((1, 1, 1), dtype=np.float32), "float32", seed, "tokens")


def _samples(subject: Trained) -> st.SearchStrategy[Sample]:
    return st.builds(_sample, st.integers(0, 2**16))


def _by_token(h_res: np.ndarray) -> np.ndarray:
    """Maps (S, N, n, n) as a stack of layers for every token, (N, S, n, n)."""
    return np.swapaxes(h_res, 0, 1)


def _no_eps(subject: Trained) -> str | None:
    return "eps is added to every divisor, so no side is exact by design" if subject.eps else None


def _site_certificate(subject: Trained, sample: Sample) -> Observation:
    h_res = subject.trace(sample.seed).h_res
    flat = h_res.reshape(-1, *h_res.shape[-2:])
    certificate = subject.certifier.certify(flat, "float32")
    return worst_of((encloses(flat, certificate), near(certificate, norm2(flat), _TIGHT_SITE)))


def _depth_certificate(subject: Trained, sample: Sample) -> Observation:
    tokens = _by_token(subject.trace(sample.seed).h_res)
    certificate = subject.certifier.certify_product(tokens, "float32")
    seen = [near(certificate, norm2(np.stack([prefixes(layers)[-1] for layers in tokens])), TIGHT)]
    for at in np.linspace(0, len(tokens) - 1, _EXACT_TOKENS).astype(int):
        bounds = float(certificate["norm2_lower"][at]), float(certificate["norm2_upper"][at])
        seen.append(encloses_product(product_of(tokens[at]), *bounds))
    return worst_of(seen)


def _row_sums(subject: Trained, sample: Sample) -> Observation:
    h_res = subject.trace(sample.seed).h_res
    return worst(np.abs(sums(h_res, "rows") - 1), marginal_allowance(h_res.shape[-1], "float32"), "row sum of a site")


def _gain(subject: Trained, sample: Sample) -> Observation:
    tokens = _by_token(subject.trace(sample.seed).h_res)
    per_layer = marginal_allowance(tokens.shape[-1], "float32")
    return worst_of(gain_is_one(layers, ["rows"], per_layer) for layers in tokens)


def _sqrt_n(subject: Trained, sample: Sample) -> Observation:
    tokens = _by_token(subject.trace(sample.seed).h_res)
    per_layer = marginal_allowance(tokens.shape[-1], "float32")
    return worst_of(norm_at_most_sqrt_n(layers, per_layer) for layers in tokens)


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
    return decoding_gap(subject, sample)


_DOMAIN = "Transformers of 6 sites, 4 streams, trained 50 steps in float32 on the CPU; every token of fresh sequences"


_claim = functools.partial(Claim, family="trained", kind="trained", provenance="sampled", samples=_samples)

CLAIMS: tuple[Claim, ...] = (
    _claim(
        name="trained_site_certificate_holds",
        statement="For every H_res of a forward pass norm2_lower <= norm_2(H_res) <= norm2_upper, and both bounds "
        "are within 1e-4 of the norm.",
        reference="derivations: spectral_norm_certificate",
        domain=_DOMAIN,
        method="bounds decided exactly on the stored float32 values; tightness by float64 singular values",
        provenance="exact",
        lemma="collatz",
        lemmas=("schur",),
        check=_site_certificate,
        effort=0.1,
    ),
    _claim(
        name="trained_depth_certificate_holds",
        statement="The certificate of the product of all H_res of a token encloses its norm, and both bounds are "
        "within 1e-6 of the norm.",
        reference="derivations: spectral_norm_certificate",
        domain=_DOMAIN,
        method="product and bounds in fractions for three tokens of each pass; tightness by float64 singular values",
        provenance="exact",
        lemma="collatz",
        lemmas=("chained_row_sums", "chained_col_sums"),
        check=_depth_certificate,
        effort=0.1,
    ),
    _claim(
        name="trained_row_sums_exact",
        statement="Every row of every H_res of a forward pass sums to 1 within (n+1) u.",
        reference="arXiv 2512.24880, equation 9",
        domain=_DOMAIN + "; conventions without eps",
        method="compensated sums",
        lemma="rownorm_sum",
        lemmas=("normalised_sum_upper", "normalised_sum_lower"),
        check=_row_sums,
        applies=_no_eps,
        effort=0.2,
    ),
    _claim(
        name="trained_depth_gain_is_one",
        statement="The forward gain of any depth, the row sums of the product of its first L H_res, is 1 "
        "within L (n+2) u.",
        reference="derivations: spectral_norm_certificate",
        domain=_DOMAIN + "; conventions without eps",
        method="products of the stored maps in 80-bit floats",
        lemma="rowst_prod",
        check=_gain,
        applies=_no_eps,
        effort=0.2,
    ),
    _claim(
        name="trained_depth_norm_at_most_sqrt_n",
        statement="The norm of the product of the first L H_res is at most sqrt(n) at any depth, up to L (n+2) u.",
        reference="derivations: spectral_norm_certificate",
        domain=_DOMAIN,
        method="products in 80-bit floats, singular values in float64 (8 n 2^-53 allowed)",
        lemma="rowst_prod_norm",
        lemmas=("schur", "sub_mul"),
        check=_sqrt_n,
        effort=0.2,
    ),
    _claim(
        name="trained_streams_differ",
        statement="The streams that leave the last site are not copies of each other: their spread is at least 1024 u "
        "of their root mean square.",
        reference="arXiv 2512.24880",
        domain=_DOMAIN,
        method="standard deviation over streams, mean over channels, for every token",
        check=_streams_differ,
        effort=0.2,
    ),
    _claim(
        name="trained_mean_is_conserved",
        statement="A site moves the mean of the streams by mean(h_post) times its update and nothing else, within the "
        "certificate's distance of the column sums from 1 and float32 rounding.",
        reference="arXiv 2512.24880, equation 3",
        domain=_DOMAIN,
        method="the streams and updates of the pass itself, before and after every site",
        lemma="colst_mean",
        check=_mean,
        effort=0.2,
    ),
    _claim(
        name="trained_decoding_equals_the_full_forward",
        statement="With the trained weights, token-by-token decoding with caches gives the logits of one full forward "
        "within 1e-10, in float64.",
        reference="mhc_layers.generate",
        domain=_DOMAIN + ", prompts of 1 to 11 tokens",
        method="largest difference of the logits",
        check=_decode,
        effort=0.1,
    ),
)

"""Claims about parametrizations: doubly stochastic, or half of it, or orthogonal, by construction."""

from __future__ import annotations

import numpy as np

from proofs import strategies
from proofs._claim import Claim, Observation, Sample, holds_where, worst, worst_of
from proofs.measure import compute_roundoff, norm2, sums
from proofs.systems import Parametrized

__all__ = ["CLAIMS"]


def _parameters(subject: Parametrized, sample: Sample) -> tuple[np.ndarray, int, float]:
    """Parameters of the sample's magnitude, n, and the rounding of a sum of that many terms."""
    size = sample.logits.shape[-1]
    while subject.num_parameters(size) is None:  # an n that this map does not have
        size -= 1
    count = subject.num_parameters(size)
    assert count is not None
    scale = max(1e-3, min(1e3, float(np.max(np.abs(sample.logits)))))
    values = scale * sample.rng().standard_normal((len(sample.logits), count))
    return strategies.round_to(values, sample.dtype), size, (count + 8 * size + 8) * compute_roundoff(sample.dtype)


def _stated_sums(subject: Parametrized, sample: Sample) -> Observation:
    parameters, size, allowed = _parameters(subject, sample)
    matrix = subject.matrix(parameters, size, sample.dtype)
    sides = {"both": ("rows", "columns"), "rows": ("rows",), "columns": ("columns",), "none": ()}[subject.sums]
    seen = [worst(np.abs(sums(matrix, side) - 1), allowed, f"|{side} sum - 1|") for side in sides]
    if sides:
        seen.append(worst(np.maximum(-matrix, matrix - 1), allowed, "entry outside [0, 1]"))
        seen.append(holds_where(matrix >= 0, "a negative entry"))
    if subject.sums == "both":
        seen.append(worst(norm2(matrix) - 1, allowed + 64 * 2.0**-53, "norm - 1"))
    if not sides:
        gram = np.swapaxes(matrix, -1, -2) @ matrix - np.eye(size)
        scale = 1 + float(np.max(np.abs(parameters), initial=0))
        seen.append(worst(np.abs(gram), allowed * size * scale, "|Q^T Q - I|"))
    return worst_of(seen)


CLAIMS: tuple[Claim, ...] = (
    Claim(
        name="sums_by_construction",
        family="parametrization",
        statement="The stated sums are 1 within (p + 8n + 8) u for p parameters and entries lie in [0, 1]; with both "
        "sums norm_2 <= 1; an orthogonal map has Q^T Q = I within n (1 + |parameters|) times that.",
        reference="derivations: parametrizations",
        domain="Gaussian parameters of size 1e-3 to 1e3, n <= 5",
        method="compensated sums and singular values of the stored entries",
        provenance="sampled",
        kind="parametrization",
        lemma="dstoch_convex",
        lemmas=("dstoch_perm", "orthostochastic", "orthogonal_isometry", "circulant_dstoch", "dstoch_nonexpansive"),
        samples=lambda subject: strategies.samples(
            generators=("gaussian",), sizes=(1, 2, 3, 4, 5), batch=16, dtypes=subject.backend.dtypes
        ),
        check=_stated_sums,
    ),
)

"""Claims about symmetry and special inputs: what the map must do when the answer is known in advance."""

from __future__ import annotations

import functools

import numpy as np

from proofs import model, strategies
from proofs._claim import Claim, Observation, Sample, worst, worst_of
from proofs.conditions import adds_exactly, exact_side, kl, meets, no_eps, rebuilds
from proofs.measure import accuracy_allowance, marginal_allowance, sums
from proofs.subjects import Subject

__all__ = ["CLAIMS"]


def _single(subject: Subject, sample: Sample) -> Observation:
    if subject.eps is not None:
        allowed = 4 * max(subject.eps)
    else:
        allowed = 0.0
    return worst(np.abs(subject.matrix(sample) - 1), allowed, "|entry - 1|")


def _uniform(subject: Subject, sample: Sample) -> Observation:
    size = sample.logits.shape[-1]
    allowed = accuracy_allowance(sample.logits, sample.dtype) + marginal_allowance(size, sample.dtype)
    if subject.eps is not None:
        allowed = allowed + 4 * max(subject.eps)
    return worst(np.abs(subject.matrix(sample) - 1 / size), allowed[:, None, None], "|entry - 1/n|")


def _identity(subject: Subject, sample: Sample) -> Observation:
    size = sample.logits.shape[-1]
    seen = []
    for height in (2.0, 8.0, 20.0, 60.0, 200.0, 1000.0):
        scaled = sample.with_logits((height * np.eye(size)[None]).astype(sample.logits.dtype))
        known = np.full((size, size), np.exp(-height))
        np.fill_diagonal(known, 1.0)
        known /= 1 + (size - 1) * np.exp(-height)
        allowed = accuracy_allowance(scaled.logits, sample.dtype)[0] + marginal_allowance(size, sample.dtype)
        if subject.eps is not None:
            allowed += 2 * size * max(subject.eps)
        seen.append(
            worst(np.abs(subject.matrix(scaled) - known), allowed, f"distance from the answer at c = {height:g}")
        )
        # exp(-200) is below the smallest float32 and 1 + exp(-200) is 1: I itself, to the last bit
        if subject.eps is None and height >= 200 and sample.dtype == "float32":
            seen.append(
                worst(np.abs(subject.matrix(scaled) - np.eye(size)), marginal_allowance(size, sample.dtype), "I")
            )
    return worst_of(seen)


def _constants_kept(subject: Subject, sample: Sample) -> Observation:
    matrix = subject.matrix(sample).astype(np.longdouble)
    size = sample.logits.shape[-1]
    streams = sample.rng().standard_normal((len(matrix), size)).astype(np.longdouble)
    allowed = subject.side_allowance(sample) + 2 * size * float(np.finfo(np.longdouble).eps)
    if subject.last == "rows":
        equal = streams[:, :1]
        moved = np.sum(matrix * equal[:, None, :], axis=-1) - equal
        return worst(np.abs(moved), allowed * np.abs(equal), "equal streams moved apart")
    moved = np.mean(np.sum(matrix * streams[:, None, :], axis=-1), axis=-1) - np.mean(streams, axis=-1)
    return worst(np.abs(moved), allowed * np.mean(np.abs(streams), axis=-1), "mean over streams moved")


def _permuted(subject: Subject, sample: Sample) -> Observation:
    count, size = sample.logits.shape[:2]
    orders = np.argsort(sample.rng().random((2, count, size)), axis=-1)  # of each matrix by itself

    def shuffle(values: np.ndarray) -> np.ndarray:
        moved = np.take_along_axis(values, orders[0][:, :, None], axis=-2)
        return np.ascontiguousarray(np.take_along_axis(moved, orders[1][:, None, :], axis=-1))

    other = subject.matrix(sample.with_logits(shuffle(sample.logits)))
    difference = np.abs(other - shuffle(subject.matrix(sample)))
    return worst(difference, subject.agreement_allowance(sample), "|f(PXQ) - P f(X) Q|")


def _transposed(subject: Subject, sample: Sample) -> Observation:
    flipped = sample.with_logits(np.ascontiguousarray(np.swapaxes(sample.logits, -1, -2)))
    other = np.swapaxes(subject.dual().matrix(flipped), -1, -2)
    return worst(np.abs(subject.matrix(sample) - other), subject.agreement_allowance(sample), "|f(X) - f*(X^T)^T|")


def _on_grid(sample: Sample) -> Sample:
    """Logits rounded to multiples of 1/64 below 2^9, so that integer shifts up to 2^10 add without rounding."""
    return sample.with_logits(np.clip(np.round(sample.logits * 64) / 64, -512, 512).astype(sample.logits.dtype))


def _first_shift(subject: Subject, sample: Sample) -> Observation:
    sample = _on_grid(sample)
    shift = sample.rng().integers(-1000, 1001, sample.logits.shape[:2]).astype(sample.logits.dtype)
    moved = sample.with_logits(sample.logits + (shift[:, None, :] if subject.first == "columns" else shift[:, :, None]))
    difference = np.abs(subject.matrix(moved) - subject.matrix(sample))
    return worst(difference, subject.agreement_allowance(sample, moved), f"constants added to {subject.first}")


def _both_shifts(subject: Subject, sample: Sample) -> Observation:
    grid = sample.with_logits((np.round(sample.logits * 1024) / 1024).astype(sample.logits.dtype))
    rows, columns = sample.rng().integers(-8, 9, (2, *sample.logits.shape[:2]))
    moved = grid.with_logits((grid.logits + rows[:, :, None] + columns[:, None, :]).astype(sample.logits.dtype))
    difference = np.abs(subject.matrix(moved) - subject.matrix(grid))
    allowed = 2e-5 + subject.agreement_allowance(grid, moved)
    return worst(difference, allowed, "constants added to rows and columns")


def _fixed_point(subject: Subject, sample: Sample) -> Observation:
    rng, size = sample.rng(), sample.logits.shape[-1]
    mixture = np.full((size, size), 0.2 / size)
    for weight in 0.8 * rng.dirichlet(np.ones(size)):
        mixture[np.arange(size), rng.permutation(size)] += weight
    given = sample.with_logits(strategies.round_to(np.log(mixture)[None], sample.dtype))
    # rounding of the logits moves the matrix by u |log p| relative, hence the second term
    allowed = accuracy_allowance(given.logits, sample.dtype) * (2 + np.max(np.abs(given.logits)))
    if subject.eps is not None:
        allowed = allowed + 4 * size * max(subject.eps)
    return worst(np.abs(subject.matrix(given) - mixture), allowed[:, None, None], "|f(log P) - P|")


def _closed_two(subject: Subject, sample: Sample) -> Observation:
    wide = np.asarray(sample.logits, dtype=np.float64)
    theta = wide[:, 0, 0] + wide[:, 1, 1] - wide[:, 0, 1] - wide[:, 1, 0]
    known = 1 / (1 + np.exp(-theta / 2))
    stack = np.stack([np.stack([known, 1 - known], -1), np.stack([1 - known, known], -1)], -2)
    allowed = 1e-5 + 2 * accuracy_allowance(sample.logits, sample.dtype)
    return worst(np.abs(subject.matrix(sample) - stack), allowed[:, None, None], "|P - sigmoid(theta/2)|")


def _is_rank_one(sample: Sample) -> bool:
    wide = np.asarray(sample.logits, dtype=np.float64)
    return bool(np.all(wide - wide[:, :1, :] == wide[:, :, :1] - wide[:, :1, :1]))


def _is_circulant(sample: Sample) -> bool:
    """Whether row i is row 0, moved by i."""
    size = sample.logits.shape[-1]
    moved = sample.logits[:, 0, (np.arange(size)[None, :] - np.arange(size)[:, None]) % size]
    return bool(np.array_equal(moved, sample.logits))


def _circulant(subject: Subject, sample: Sample) -> Observation:
    wide = np.asarray(sample.logits, dtype=np.longdouble)
    line = np.exp(wide - wide.max(axis=-1, keepdims=True))
    known = (line / line.sum(axis=-1, keepdims=True)).astype(np.float64)
    allowed = 2 * accuracy_allowance(sample.logits, sample.dtype)
    return worst(np.abs(subject.matrix(sample) - known), allowed[:, None, None], "|P - softmax of a row|")


def _gap(subject: Subject, sample: Sample) -> Observation:
    matrix = subject.matrix(sample)
    wide = np.asarray(sample.logits, dtype=np.float64)
    size = wide.shape[-1]
    diagonal = np.diagonal(wide, axis1=-2, axis2=-1)
    off = np.where(np.eye(size, dtype=bool), -np.inf, wide)
    gap = np.min(diagonal[:, :, None] - off, axis=(-2, -1)) if size > 1 else np.zeros(len(wide))
    lost = np.mean(1 - np.diagonal(matrix, axis1=-2, axis2=-1), axis=-1)
    residual = np.max(np.abs(sums(matrix, subject.first) - 1), axis=-1)
    bound = (size - 1) * np.exp(1 - gap) + accuracy_allowance(sample.logits, sample.dtype) + 2 * residual
    if subject.eps is not None:
        bound = bound + 2 * size * max(subject.eps)
    near = (gap > 0) & ~(residual > 1e-6)  # NaN is not far from the limit: it is nothing
    return worst(np.where(near, lost, 0.0), np.where(near, bound, 1.0), "mean (1 - A_ii) at the limit")


def _easy_limit(subject: Subject, sample: Sample) -> Observation:
    known = model.limit(sample.logits, max_iters=60)
    allowed = 1e-5 + 2 * accuracy_allowance(sample.logits, sample.dtype)
    return worst(np.abs(subject.matrix(sample) - known), allowed[:, None, None], "distance from the KL projection")


_claim = functools.partial(Claim, family="identity", provenance="sampled", reference="derivations: sinkhorn_knopp")

CLAIMS: tuple[Claim, ...] = (
    _claim(
        name="one_by_one_is_one",
        statement="n = 1 gives exactly 1.0 (with eps: within 4 eps).",
        domain="any finite logit up to 1e4",
        method="compared bit for bit",
        lemma="rowst_n1",
        samples=lambda subject: strategies.samples(
            sizes=(1,), scales=(*strategies.SCALES, 1e4), dtypes=(*subject.backend.dtypes, *subject.backend.halves)
        ),
        check=_single,
        itemwise=True,
    ),
    _claim(
        name="rank_one_gives_uniform",
        statement="Constant logits give 1/n in every entry, and so do logits a_i + b_j (without eps, and where the "
        "sum is exact), within the accuracy contract and (n+1) u.",
        domain="constants up to 1e3; rank one up to range 1e2",
        method="compared with 1/n within the accuracy contract",
        samples=lambda subject: strategies.samples(
            generators=("constant", "rank_one") if meets(no_eps, adds_exactly)(subject) is None else ("constant",),
            scales=(0.1, 1.0, 4.0, 10.0, 24.0),
            dtypes=subject.backend.dtypes,
        ),
        check=_uniform,
        applies=kl,
        itemwise=True,
        inside=_is_rank_one,
    ),
    _claim(
        name="large_diagonal_gives_identity",
        statement="Logits c I give e^c/(e^c + n - 1) on the diagonal; c -> infinity gives I.",
        domain="c in {2, 8, 20, 60, 200, 1000}, n <= 8",
        method="compared with the closed form within the accuracy contract",
        lemma="circulant_dstoch",
        lemmas=("dstoch1",),
        samples=lambda subject: strategies.samples(generators=("constant",), batch=1, sizes=(1, 2, 3, 4, 8)),
        check=_identity,
        applies=kl,
        effort=0.5,
        itemwise=True,
    ),
    _claim(
        name="equal_streams_or_mean_kept",
        statement="Rows last: equal streams stay equal. Columns last: the mean over streams is conserved. Both within "
        "(n+1) u of the values (after the exact finish: what its sums may miss).",
        domain="finite logits up to range 1e3",
        method="matrix-vector products in 80-bit floats",
        lemma="rowst_const",
        lemmas=("colst_mean",),
        samples=lambda subject: strategies.samples(dtypes=subject.backend.dtypes),
        check=_constants_kept,
        applies=exact_side,
        itemwise=True,
    ),
    _claim(
        name="permutation_equivariance",
        statement="f(P X Q) = P f(X) Q within twice the accuracy contract.",
        domain="finite logits up to range 1e3",
        method="random row and column permutations of each matrix",
        lemma="sk_permute",
        lemmas=("rownorm_permute", "colnorm_permute"),
        samples=lambda subject: strategies.samples(),
        check=_permuted,
        itemwise=True,
    ),
    _claim(
        name="transpose_duality",
        statement="Exchanging rows and columns of the input and of the order transposes the result, within twice the "
        "accuracy contract.",
        domain="finite logits up to range 1e3",
        method="the same method with the other order on the transposed input",
        lemma="sk_transpose",
        lemmas=("rownorm_tr", "colnorm_tr"),
        samples=lambda subject: strategies.samples(),
        check=_transposed,
        applies=rebuilds,
        itemwise=True,
    ),
    _claim(
        name="first_side_shift_invariance",
        statement="Adding a constant to each line of the side normalised first changes nothing, after any number of "
        "iterations: the difference is within the accuracy contracts of the two inputs.",
        domain="logits on a grid of 1/64 up to 512, integer shifts up to 1000 (so that adding is exact)",
        method="different constants for each matrix",
        lemma="colnorm_scale",
        lemmas=("rownorm_scale",),
        samples=lambda subject: strategies.samples(scales=(0.3, 1.0, 3.0, 8.0, 16.0)),
        check=_first_shift,
        applies=meets(kl, no_eps, adds_exactly),
        itemwise=True,
    ),
    _claim(
        name="both_sides_shift_invariance",
        statement="Adding constants to rows and columns changes nothing in the limit: the difference is within 2e-5 "
        "and the accuracy contracts of the two inputs.",
        domain="logits in [-1/4, 1/4], integer shifts up to 8, at least 5 iterations",
        method="different constants for each matrix",
        lemma="rownorm_scale",
        lemmas=("colnorm_scale", "cross_rownorm", "cross_colnorm"),
        samples=lambda subject: strategies.samples(generators=strategies.EASY),
        check=_both_shifts,
        applies=meets(kl, no_eps, adds_exactly),
        itemwise=True,
    ),
    _claim(
        name="doubly_stochastic_is_fixed",
        statement="f(log P) = P for a doubly stochastic P, within the accuracy contract and the rounding of log P.",
        reference="Sinkhorn and Knopp 1967",
        domain="random mixtures of permutations with 20 % uniform",
        method="largest entry of the difference; a logit misses u |log P|, and so does an entry, relatively",
        lemma="sk_fix",
        lemmas=("dstoch_convex", "dstoch_perm"),
        samples=lambda subject: strategies.samples(generators=("constant",), batch=1),
        check=_fixed_point,
        applies=kl,
    ),
    _claim(
        name="two_by_two_closed_form",
        statement="n = 2 has the limit [[a, 1-a], [1-a, a]], a = sigmoid((x11 + x22 - x12 - x21)/2).",
        domain="logits in [-1/4, 1/4], at least 5 iterations",
        method="difference against 1e-5 plus rounding",
        lemma="two_closed_form",
        lemmas=("dstoch2",),
        samples=lambda subject: strategies.samples(generators=strategies.EASY, sizes=(2,)),
        check=_closed_two,
        applies=kl,
        itemwise=True,
        inside=lambda sample: sample.logits.shape[-1] == 2,
    ),
    _claim(
        name="circulant_in_one_step",
        statement="Circulant logits give the softmax of each row, after any number of iterations.",
        domain="circulants up to logit std 100",
        method="compared with the softmax in extended precision within twice the accuracy contract",
        lemma="circulant_dstoch",
        samples=lambda subject: strategies.samples(
            generators=("circulant",), scales=tuple(s for s in strategies.SCALES if s <= 100)
        ),
        check=_circulant,
        applies=meets(kl, no_eps),
        itemwise=True,
        inside=_is_circulant,
    ),
    _claim(
        name="diagonal_gap",
        statement="If every diagonal logit exceeds its row by g, the limit has mean(1 - A_ii) <= (n-1) e^(1-g).",
        reference="the limit maximises <A, X> + entropy(A)",
        domain="dominant diagonals with g > 0 whose open side is within 1e-6 of 1",
        method="twice the remaining error of the open side is added",
        samples=lambda subject: strategies.samples(
            generators=("diagonal",), scales=(1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 24.0), sizes=(2, 3, 4, 8)
        ),
        check=_gap,
        applies=kl,
        itemwise=True,
    ),
    _claim(
        name="kl_projection_of_small_logits",
        statement="The result is within 1e-5 of the doubly stochastic matrix nearest to exp(logits) in KL divergence.",
        reference="Sinkhorn and Knopp 1967; derivations: sinkhorn_knopp",
        domain="logits in [-1/4, 1/4], at least 5 iterations",
        method="compared with 60 iterations in float64",
        samples=lambda subject: strategies.samples(generators=strategies.EASY, sizes=(2, 3, 4, 8, 16)),
        check=_easy_limit,
        applies=kl,
        itemwise=True,
    ),
)

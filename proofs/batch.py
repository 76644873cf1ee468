"""Claims about behaviour: batches, statuses, dtypes, layouts, and what must not change."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator

import numpy as np
from hypothesis import strategies as st

from birkhoff import Status
from proofs import strategies
from proofs._claim import Claim, Observation, Sample, holds_where, same_bits, worst, worst_of
from proofs.conditions import (
    exact_side,
    iterates,
    kl,
    meets,
    no_eps,
    reports,
    returns_a_matrix_only,
    takes_stacks,
    unfinished,
)
from proofs.measure import sums
from proofs.subjects import Subject

__all__ = ["CLAIMS"]


def _agree(
    subject: Subject, sample: Sample, expected: np.ndarray, others: Iterable[tuple[str, np.ndarray]]
) -> Observation:
    """Results of the same matrices by other calls, against those of one call."""
    allowed = subject.agreement_allowance(sample)
    size = sample.logits.shape[-1]
    seen = []
    for detail, matrix in others:
        flat = matrix.reshape(-1, size, size)
        seen.append(worst(np.abs(flat - expected[: len(flat)]), allowed[: len(flat)], detail))
    return worst_of(seen)


def _one_by_one(subject: Subject, sample: Sample) -> Observation:
    single = np.stack([subject.matrix(sample.item(k))[0] for k in range(len(sample.logits))])
    return _agree(subject, sample, subject.matrix(sample), [("f(stack) - stack(f)", single)])


def _poisoned(subject: Subject, sample: Sample) -> Observation:
    rng = sample.rng()
    clean = subject.matrix(sample)
    count, size = len(sample.logits), sample.logits.shape[-1]
    at = int(rng.integers(count))
    seen = []
    for poison in (np.nan, np.inf):
        logits = sample.logits.copy()
        logits[at, rng.integers(size), rng.integers(size)] = poison
        try:
            with np.errstate(all="ignore"):
                dirty = subject.matrix(sample.with_logits(logits))
        except (ValueError, FloatingPointError):
            continue  # a raised error is not a silent wrong answer
        difference = np.abs(dirty - clean)
        difference[at] = 0
        allowed = subject.agreement_allowance(sample)
        seen.append(worst(difference, allowed, f"neighbours of a matrix with {poison}"))
        shown = np.isnan(dirty[at]).any()
        seen.append(holds_where(shown, f"a matrix with {poison} came back without NaN", at))
    return worst_of(seen) if seen else Observation(0.0, 1.0, 0, "raised")


def _unchanged(subject: Subject, sample: Sample) -> Observation:
    given = subject.array(sample)
    subject.function(given)
    before = np.asarray(sample.logits, dtype=np.float64)
    return same_bits(subject.backend.asnumpy(given), before, "the input was written to")


def _kept(subject: Subject, sample: Sample) -> Observation:
    given = subject.array(sample)
    result = subject.function(given)
    if not subject.backend.is_native(result):
        return holds_where(False, f"returned a {type(result).__name__}, or one on another device")
    reasons = []
    if subject.backend.dtype_name(result) != sample.dtype:
        reasons.append(f"{sample.dtype} came back as {subject.backend.dtype_name(result)}")
    if tuple(result.shape) != tuple(sample.logits.shape):
        reasons.append(f"shape {tuple(sample.logits.shape)} came back as {tuple(result.shape)}")
    return holds_where(not reasons, "; ".join(reasons) or "kind, dtype and shape")


def _batch_shapes(subject: Subject, sample: Sample) -> Observation:
    size = sample.logits.shape[-1]
    sample = sample.with_logits(np.resize(sample.logits, (6, size, size)))

    def others() -> Iterator[tuple[str, np.ndarray]]:
        for batch in ((2, 3), (1, 6), (3, 1, 2), ()):
            count = int(np.prod(batch))
            folded = sample.logits[:count].reshape(*batch, size, size)
            yield f"batch shape {batch}", subject.matrix(sample.with_logits(folded))

    seen = [_agree(subject, sample, subject.matrix(sample), others())]
    for none in ((0,), (2, 0)):
        shape = (*none, size, size)
        empty = subject.matrix(sample.with_logits(np.zeros(shape, dtype=sample.logits.dtype)))
        seen.append(holds_where(empty.shape == shape, f"empty batch {shape} became {empty.shape}"))
    return worst_of(seen)


_MANY = 2**16 + 7


def _large_stack(subject: Subject, sample: Sample) -> Observation:
    size = sample.logits.shape[-1]
    repeated = sample.with_logits(np.resize(sample.logits, (_MANY, size, size)))
    expected = np.resize(subject.matrix(sample), (_MANY, size, size))
    difference = np.max(np.abs(subject.matrix(repeated) - expected), axis=(-2, -1))
    allowed = np.resize(subject.agreement_allowance(sample)[:, 0, 0], _MANY)
    return worst(difference, allowed, f"a stack of {_MANY} matrices against its first {len(sample.logits)}")


def _layouts(subject: Subject, sample: Sample) -> Observation:
    arrays = subject.backend.layouts(sample.logits, sample.dtype)
    others = ((f"layout {name}", subject.backend.asnumpy(subject.function(array))) for name, array in arrays.items())
    one, count = sample.item(0), len(sample.logits)
    expanded = subject.backend.expanded(subject.array(one), count)
    repeated = subject.backend.asnumpy(subject.function(expanded))
    return worst_of(
        (
            _agree(subject, sample, subject.matrix(sample), others),
            _agree(subject, one, subject.matrix(one), ((f"expanded {k}", repeated[k : k + 1]) for k in range(count))),
        )
    )


def _repeatable(subject: Subject, sample: Sample) -> Observation:
    return same_bits(subject.matrix(sample), subject.matrix(sample), "two calls differ in bits")


def _returns_at_once(subject: Subject, sample: Sample) -> Observation:
    given = subject.array(sample)
    subject.function(given)  # compiles what there is to compile
    with subject.backend.forbids_waiting():
        subject.function(given)
    return holds_where(True, "did not wait")


def _waits_are_seen(subject: Subject) -> str | None:
    return None if subject.backend.sees_waiting else "there is no device to wait for, or its waits are not seen"


def _zeros_kept(subject: Subject, sample: Sample) -> Observation:
    matrix = subject.matrix(sample)
    holes = np.isneginf(sample.logits)
    right = np.where(holes, matrix == 0, np.isfinite(matrix))
    seen = [holds_where(right, "a structural zero is not 0, or an entry is not finite")]
    if exact_side(subject) is None:
        deviation = np.abs(sums(matrix, subject.last) - 1)
        seen.append(worst(deviation, subject.side_allowance(sample), f"{subject.last} sum with zeros"))
    return worst_of(seen)


def _keeps_zeros(subject: Subject) -> str | None:
    return "the fill of the exact finish may reach structural zeros" if subject.finish == "exact" else None


def _statuses(subject: Subject, sample: Sample) -> Observation:
    assert subject.project is not None
    size = max(2, sample.logits.shape[-1])
    logits = np.zeros((4, size, size), dtype=sample.logits.dtype)
    logits[0] = np.resize(sample.logits[0], (size, size))
    logits[1, 0, 0] = np.nan
    logits[2, -1, 0] = np.inf
    logits[3] = np.where(np.eye(size, dtype=bool), 0.0, -np.inf)
    logits[3, 0, :] = 0.0  # an arrow: entries (0, j > 0) lie on no permutation
    seen = []
    for name, array in subject.backend.layouts(logits, sample.dtype).items():
        codes = subject.backend.asnumpy(subject.project(array).status).astype(int).tolist()
        right = codes[1:3] == [Status.nonfinite_input] * 2
        right = right and codes[0] not in (Status.nonfinite_input, Status.no_total_support)
        right = right and (subject.eps is not None or codes[3] == Status.no_total_support)
        seen.append(holds_where(right, f"status codes {codes}, layout {name}"))
    return worst_of(seen)


def _has_total_support(sample: Sample) -> bool:
    """Whether every entry that is not -inf lies on a permutation of such entries, and there is one: tries all."""
    kept = sample.logits != -np.inf
    size = kept.shape[-1]
    orders = np.array(list(itertools.permutations(range(size))))
    covered = np.zeros_like(kept)
    for order in orders:
        whole = kept[:, np.arange(size), order].all(axis=-1)
        covered[:, np.arange(size), order] |= whole[:, None]
    return bool(np.array_equal(covered, kept) and np.all(kept.any(axis=(-2, -1))))


def _some(subject: Subject, *, batch: int, minimum: int = 1) -> st.SearchStrategy[Sample]:
    sizes = tuple(n for n in (1, 2, 3, 4, 5, 8) if n >= minimum)
    return strategies.samples(batch=batch, sizes=sizes, dtypes=subject.backend.dtypes, mixed=True)


_claim = functools.partial(Claim, family="batch", provenance="sampled", reference="conventions: arrays")

CLAIMS: tuple[Claim, ...] = (
    _claim(
        name="items_are_independent",
        statement="f(stack) = stack(f) within twice the accuracy contract.",
        domain="finite logits up to range 1e3, stacks of 7",
        method="the stack against its matrices one at a time",
        samples=lambda subject: _some(subject, batch=7),
        check=_one_by_one,
        effort=0.3,
    ),
    _claim(
        name="one_bad_matrix_poisons_only_itself",
        statement="A NaN or +inf leaves the other matrices of the stack as they were, and is not hidden in its own; or "
        "the call raises ValueError.",
        domain="finite logits up to range 1e3, one entry replaced",
        method="compared with the clean stack within twice the accuracy contract",
        samples=lambda subject: _some(subject, batch=5),
        check=_poisoned,
        effort=0.5,
    ),
    _claim(
        name="input_is_not_written",
        statement="The array of logits holds the same values after the call.",
        domain="finite logits up to range 1e3",
        method="compared bit for bit",
        samples=lambda subject: _some(subject, batch=4),
        check=_unchanged,
        effort=0.5,
    ),
    _claim(
        name="kind_dtype_shape_kept",
        statement="The result has the array kind, device, dtype and shape of the input; half precisions included.",
        domain="float64, float32, float16, bfloat16 where the backend has them",
        method="compared by name",
        samples=lambda subject: strategies.samples(batch=3, dtypes=(*subject.backend.dtypes, *subject.backend.halves)),
        check=_kept,
        effort=0.5,
    ),
    _claim(
        name="any_batch_shape",
        statement="Batch shapes (), (2,3), (1,6), (3,1,2), (0,) and (2,0) work and give the same matrices.",
        domain="finite logits up to range 1e3",
        method="compared with the flat stack within twice the accuracy contract",
        samples=lambda subject: _some(subject, batch=6),
        check=_batch_shapes,
        effort=0.3,
    ),
    _claim(
        name="large_stacks",
        statement="A stack of 2^16 + 7 matrices gives what its matrices give in a small stack.",
        domain="finite logits of std 10 and 1, n = 4, 2, 3, 8; not the Euclidean projection, which would take a "
        "minute, nor what loops over matrices",
        method="seven matrices over and over, compared within twice the accuracy contract",
        # the first of each is the first example, and there are few
        samples=lambda subject: strategies.samples(
            generators=("gaussian",),
            scales=(10.0, 1.0),
            sizes=(4, 2, 3, 8),
            batch=7,
            dtypes=subject.backend.dtypes[::-1],
        ),
        check=_large_stack,
        applies=meets(kl, takes_stacks),
        effort=0.06,
    ),
    _claim(
        name="any_memory_layout",
        statement="Transposed, strided, reversed, offset, unaligned, expanded (stride 0) and read-only inputs give the "
        "same matrices.",
        domain="finite logits up to range 1e3; the layouts that the array library has",
        method="compared with the contiguous copy within twice the accuracy contract",
        samples=lambda subject: _some(subject, batch=4),
        check=_layouts,
        effort=0.5,
    ),
    _claim(
        name="same_bits_twice",
        statement="Two calls on the same logits return the same bits.",
        domain="finite logits up to range 1e3",
        method="compared bit for bit",
        samples=lambda subject: _some(subject, batch=8),
        check=_repeatable,
        effort=0.5,
    ),
    _claim(
        name="does_not_wait_for_the_device",
        statement="A projection by a fixed number of iterations returns before the device has computed it: no value of "
        "the device is read on the way.",
        reference="conventions: arrays; CUDA graphs",
        domain="finite logits up to range 1e3, after a first call of the same shape; functions that return no status",
        method="torch raises where it waits for the device",
        samples=lambda subject: _some(subject, batch=4),
        check=_returns_at_once,
        applies=meets(iterates, returns_a_matrix_only, _waits_are_seen),
        effort=0.1,
    ),
    _claim(
        name="minus_infinity_is_an_exact_zero",
        statement="Logits -inf give entries 0.0, the other entries are finite, and the side normalised last is exact.",
        reference="Sinkhorn and Knopp 1967",
        domain="patterns with total support (unions of permutations), range up to 1e2",
        method="compared bit for bit; sums within (n+1) u",
        samples=lambda subject: strategies.samples(
            batch=6, sizes=(2, 3, 4, 5), scales=(0.3, 1.0, 4.0, 10.0, 30.0), dtypes=subject.backend.dtypes, zeros=True
        ),
        inside=_has_total_support,
        check=_zeros_kept,
        applies=meets(kl, no_eps, _keeps_zeros),
        itemwise=True,
    ),
    _claim(
        name="status_per_matrix",
        statement="NaN and +inf get nonfinite_input, a pattern without total support gets no_total_support, their "
        "neighbour gets neither.",
        reference="birkhoff.Status",
        domain="stacks of four with one of each, n >= 2",
        method="status codes compared",
        samples=lambda subject: _some(subject, batch=4, minimum=2),
        check=_statuses,
        applies=meets(reports, kl, unfinished),
        effort=0.5,
    ),
)

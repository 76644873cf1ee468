"""Running claims: draw examples, look for a breach, shrink it, and say what was seen.

Hypothesis draws the examples. A failing stack is then reduced to one matrix, with fewer rows and rounder entries as
long as the claim still breaks, so that the report holds the smallest example that we can find.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings

from proofs import schedule, strategies
from proofs._claim import Claim, Observation, Sample

__all__ = [
    "PROFILES",
    "Outcome",
    "Profile",
    "loses_its_device",
    "minimise",
    "observe",
    "pairs",
    "replay",
    "run",
    "run_claim",
    "untried",
]

Verdict = Literal["holds", "broken", "not claimed", "not tried"]


@dataclass(frozen=True)
class Profile:
    """How many stacks of examples a claim is tried on."""

    name: str
    max_examples: int
    shrink_budget: int = 400


PROFILES: dict[str, Profile] = {
    "quick": Profile("quick", 20),
    "ci": Profile("ci", 50),
    "nightly": Profile("nightly", 1000, 2000),
}
"""``quick`` for a first look, ``ci`` for every change (derandomised), ``nightly`` for depth."""


@dataclass(frozen=True)
class Outcome:
    """What became of one claim on one subject.

    Parameters
    ----------
    claim : Claim
    subject : str
        Its title.
    verdict : {"holds", "broken", "not claimed", "not tried"}
        "Holds" means by the claim's provenance: a sampled claim was not refuted. "Not tried" says nothing about the
        claim: the run ended before.
    examples : int
        Matrices tried.
    worst : Observation or None
        The example that came closest to breaking the claim, or broke it.
    reason : str
        Why it broke, or why it is not claimed or not tried.
    failing : Sample or None
        The shrunk example.
    seconds : float
    """

    claim: Claim
    subject: str
    verdict: Verdict
    examples: int = 0
    worst: Observation | None = None
    reason: str = ""
    failing: Sample | None = field(default=None, repr=False)
    seconds: float = 0.0


def observe(claim: Claim, subject: Any, sample: Sample) -> tuple[Observation, str]:
    """Return what the claim sees on one example; an exception of the subject counts as an infinite deviation."""
    try:
        with np.errstate(all="ignore"):
            return claim.check(subject, sample), ""
    except (Exception, SystemExit) as error:  # whatever a user's function raises is the finding
        text = "".join(c if c.isprintable() else " " for c in " ".join(str(error).split()))
        return Observation(float("inf"), 0.0, 0, "raised"), f"{type(error).__name__}: {text[:300]}"


def _supported(sample: Sample, subject: Any) -> Sample:
    """Return the sample in a dtype that the subject takes: its first one where it does not take the sample's."""
    accepted = (*subject.backend.dtypes, *subject.backend.halves)
    if sample.dtype in accepted:
        return sample
    return Sample(strategies.round_to(sample.logits, accepted[0]), accepted[0], sample.seed, sample.note)


def run_claim(claim: Claim, subject: Any, profile: Profile, *, seed_value: int | None = None) -> Outcome:
    """Try one claim on one subject.

    Parameters
    ----------
    claim : Claim
    subject : Subject
        Of the kind that the claim speaks of.
    profile : Profile
    seed_value : int, optional
        Without it the examples are the same on every run.

    Returns
    -------
    Outcome

    Examples
    --------
    >>> from birkhoff.solvers import SinkhornLog
    >>> from proofs import backends, claims, runner, subjects
    >>> subject = subjects.solver_subject(SinkhornLog(), backends.backend("numpy"))
    >>> outcome = runner.run_claim(claims.by_name("last_side_exact"), subject, runner.PROFILES["quick"])
    >>> outcome.verdict, outcome.worst.holds, outcome.examples
    ('holds', True, 320)
    """
    reason = claim.applies(subject)
    if reason is not None:
        return Outcome(claim, subject.title, "not claimed", reason=reason)
    started = time.perf_counter()
    tried, closest = 0, None
    drawn = [sample for sample in _draw(claim, subject, profile, seed_value) if _fits(sample, subject)]
    if not drawn:
        return Outcome(claim, subject.title, "not claimed", reason="no example has a size that it takes")
    for members in _groups(claim, drawn):
        stack = _joined(members)
        tried += max(1, len(stack.logits))
        seen, why = observe(claim, subject, stack)
        if closest is None or seen.ratio > closest.ratio:
            closest = seen
        if seen.holds:
            continue
        # the example that breaks by itself keeps its seed; where only the joined stack does, that is the example
        breach = next((one for one in members if not observe(claim, subject, one)[0].holds), stack)
        failing, again, why_again = minimise(claim, subject, breach, budget=profile.shrink_budget)
        if again.holds:
            reason = f"{why or seen.detail} (not when the example was tried again: it depends on more than its input)"
        else:
            seen, reason = again, why_again or again.detail
        return Outcome(claim, subject.title, "broken", tried, seen, reason, failing, time.perf_counter() - started)
    return Outcome(claim, subject.title, "holds", tried, closest, seconds=time.perf_counter() - started)


def _fits(sample: Sample, subject: Any) -> bool:
    sizes = getattr(subject, "sizes", None)
    return sizes is None or sample.logits.shape[-1] in sizes


def _draw(claim: Claim, subject: Any, profile: Profile, seed_value: int | None) -> list[Sample]:
    """Return the examples of a claim, in dtypes that the subject takes."""
    wanted = claim.samples(subject)
    if isinstance(wanted, list):
        return [_supported(sample, subject) for sample in wanted]
    drawn: list[Sample] = []
    share = 1.0 if claim.itemwise else getattr(subject, "effort", 1.0)
    test = given(wanted)(lambda sample: drawn.append(_supported(sample, subject)))
    test = settings(
        max_examples=max(1, round(profile.max_examples * claim.effort * share)),
        phases=(Phase.generate,),
        database=None,
        deadline=None,
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
        derandomize=False,
    )(test)
    # the claim's own name enters, so that claims do not all see the same stacks
    seed(zlib.crc32(f"{claim.name}|{seed_value or 0}".encode()))(test)()
    return drawn


_LARGEST_STACK = 1024


def _groups(claim: Claim, drawn: Sequence[Sample]) -> list[list[Sample]]:
    """Return the examples that are checked together: of one size and dtype where the claim judges every matrix."""
    if not claim.itemwise:
        return [[sample] for sample in drawn]
    groups: dict[tuple[int, str, int], list[Sample]] = {}
    counts: dict[tuple[int, str], int] = {}
    for sample in drawn:
        key = (int(sample.logits.shape[-1]), sample.dtype)
        counts[key] = counts.get(key, 0) + len(sample.logits)
        groups.setdefault((*key, counts[key] // _LARGEST_STACK), []).append(sample)
    return list(groups.values())


def _joined(members: Sequence[Sample]) -> Sample:
    first = members[0]
    if len(members) == 1:
        return first
    return Sample(np.concatenate([one.logits for one in members]), first.dtype, first.seed, "examples joined")


def run(
    claims: Sequence[Claim],
    subjects: Sequence[Any],
    profile: Profile,
    *,
    seed_value: int | None = None,
    deadline: float | None = None,
    progress: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Try every claim on every subject of its kind.

    Parameters
    ----------
    claims : sequence of Claim
    subjects : sequence
    profile : Profile
    seed_value : int, optional
        As for :func:`run_claim`.
    deadline : float, optional
        No claim begins at or after this ``time.time()``; what is left is "not tried", as it is once the device is lost.
    progress : callable, optional
        Is given every outcome as soon as it is known, most important claims first.

    Returns
    -------
    list of Outcome
        In the order of :func:`pairs`.
    """
    wanted = list(pairs(claims, subjects))
    outcomes = {(claim.name, subject.title): untried(claim, subject.title) for claim, subject in wanted}
    for claim, subject in schedule.by_importance(wanted):
        if deadline is not None and time.time() >= deadline:
            break
        outcome = run_claim(claim, subject, profile, seed_value=seed_value)
        outcomes[claim.name, subject.title] = outcome
        if progress is not None:
            progress(outcome)
        if loses_its_device(outcome, subject):
            break
    return list(outcomes.values())


def loses_its_device(outcome: Outcome, subject: Any) -> bool:
    """Tell whether the claim left a process in which nothing can be tried any more, whatever is true of it."""
    return outcome.verdict == "broken" and not subject.backend.answers()


def untried(claim: Claim, subject: str) -> Outcome:
    """Return the outcome of a claim that a run did not come to."""
    return Outcome(claim, subject, "not tried", reason="the run ended before")


def pairs(claims: Iterable[Claim], subjects: Sequence[Any]) -> Iterator[tuple[Claim, Any]]:
    """Return every claim with every subject of its kind, in the order of reports."""
    for claim in claims:
        for subject in subjects:
            if getattr(subject, "kind", "projection") == claim.kind:
                yield claim, subject


def replay(claim: Claim, subject: Any, sample: Sample) -> Outcome:
    """Try one stored example again."""
    reason = claim.applies(subject)
    if reason is not None:
        return Outcome(claim, subject.title, "not claimed", reason=reason)
    seen, why = observe(claim, subject, sample)
    verdict: Verdict = "holds" if seen.holds else "broken"
    kept = None if seen.holds else sample
    return Outcome(claim, subject.title, verdict, len(sample.logits), seen, why or seen.detail, kept)


_SHRINK_SECONDS = 20.0


def minimise(claim: Claim, subject: Any, sample: Sample, *, budget: int) -> tuple[Sample, Observation, str]:
    """Return a smaller example in the domain that still breaks the claim: one matrix, fewer rows, zeros, round numbers.

    It takes 20 seconds at most, and one call of the check.

    Parameters
    ----------
    budget : int
        How many examples may be tried.

    Returns
    -------
    smallest : Sample
    seen : Observation
        What was seen on it at last, which may hold where the breach does not repeat.
    why : str
        The exception, if there was one.
    """
    left, until = budget, time.perf_counter() + _SHRINK_SECONDS

    def breaks(candidate: Sample) -> bool:
        nonlocal left
        if time.perf_counter() >= until:
            left = 0
            return False
        if not (_fits(candidate, subject) and claim.inside(candidate)):
            return False
        left -= 1
        return not observe(claim, subject, candidate)[0].holds

    current = sample
    seen, _ = observe(claim, subject, current)
    for item in (seen.item, 0):
        if len(current.logits) > 1 and item < len(current.logits) and breaks(current.item(item)):
            current = current.item(item)
            break
    improved = True
    while improved and left > 0:
        improved = False
        for candidate in _smaller(current):
            if left <= 0:
                break
            if breaks(candidate):
                current, improved = candidate, True
                break
    seen, why = observe(claim, subject, current)
    return current, seen, why


def _smaller(sample: Sample) -> Iterable[Sample]:
    """Candidates in order of how much they simplify."""
    logits = sample.logits
    count, size = logits.shape[0], logits.shape[-1]
    if count > 1:
        yield sample.with_logits(logits[: count // 2])
        yield sample.with_logits(logits[count // 2 :])
        yield sample.with_logits(logits[: count - 1])
    for line in range(size if size > 1 else 0):
        keep = [k for k in range(size) if k != line]
        yield sample.with_logits(np.ascontiguousarray(logits[:, keep][:, :, keep]))
    for simpler in (np.zeros_like(logits), _shifted(logits), np.round(logits), np.round(logits / 10) * 10):
        if not _equal(simpler, logits) and _weight(simpler) < _weight(logits):
            yield sample.with_logits(simpler)
    if count == 1:
        for at in np.ndindex(logits.shape):
            value = logits[at]
            for simple in (0.0, np.round(value), np.round(value * 16) / 16):
                changed = logits.copy()
                changed[at] = simple
                if not _equal(changed, logits) and _weight(changed) < _weight(logits):
                    yield sample.with_logits(changed)


def _shifted(logits: np.ndarray) -> np.ndarray:
    finite = logits[np.isfinite(logits)]
    return logits - finite.min() if finite.size else logits


def _equal(left: np.ndarray, right: np.ndarray) -> bool:
    return bool(np.array_equal(left, right, equal_nan=True))


def _weight(logits: np.ndarray) -> tuple[int, int, float]:
    """How complicated a matrix looks: digits to write, entries that are not zero, size."""
    wide = np.asarray(logits, dtype=np.float64)
    finite = wide[np.isfinite(wide)]
    digits = sum(len(f"{value:.17g}") for value in finite)
    return digits, int(np.count_nonzero(wide)), float(np.sum(np.abs(finite)))

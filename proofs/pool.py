"""Running claims in several processes: the same outcomes in the same order, sooner.

A claim and a subject are functions, which do not travel between processes; their names do. Every process builds the
subjects of the selection once and is then sent one claim on one subject at a time. A process that dies takes the others
with it, so each marks what it begins in memory that they share. One whose device no longer answers ends itself.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields
from typing import Any

from proofs import claims as all_claims
from proofs import runner, schedule
from proofs._claim import Claim, Observation
from proofs.runner import Outcome, Profile, pairs
from proofs.selection import Selection

__all__ = ["run"]

Found = dict[str, Any]
Pair = tuple[Claim, Any]

_SUBJECTS: dict[str, Any] = {}
_BEGUN: list[Any] = []
_LOST: list[str] = []


def _prepare(selection: Selection, path: list[str], begun: Any) -> None:
    """Build the subjects of this process; Ctrl-C is for the first process, whose end is the end of this one."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.path[:] = path
    _SUBJECTS.update({subject.title: subject for subject in selection.subjects()})
    _BEGUN.append(begun)


def _end_with_parent() -> None:
    """A process that is killed cannot end those that it started."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _try(
    place: int, claim: str, subject: str, profile: Profile, seed_value: int | None, deadline: float | None
) -> Found | None:
    """Return what became of the claim, or nothing where the deadline came first."""
    if deadline is not None and time.time() >= deadline:
        return None
    _BEGUN[0][-1 if _LOST else place] = True
    if _LOST:
        os._exit(1)  # what the device said would be said of every claim; the first process starts another one
    outcome = runner.run_claim(all_claims.by_name(claim), _SUBJECTS[subject], profile, seed_value=seed_value)
    if runner.loses_its_device(outcome, _SUBJECTS[subject]):
        _LOST.append(subject)
    return {part.name: getattr(outcome, part.name) for part in fields(outcome) if part.name != "claim"}


def run(
    claims: Sequence[Claim],
    selection: Selection,
    profile: Profile,
    *,
    jobs: int,
    seed_value: int | None = None,
    deadline: float | None = None,
    progress: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Try every claim on every subject of its kind in `jobs` processes, one thread each.

    The other arguments, and what is returned, are those of :func:`proofs.runner.run`. Where a process dies, what it and
    the others were at is tried again, each in a process of its own: what kills that one too is broken.
    """
    wanted = list(pairs(claims, selection.subjects()))
    outcomes = {(claim.name, subject.title): runner.untried(claim, subject.title) for claim, subject in wanted}

    def share(work: Sequence[Pair], processes: int) -> tuple[list[Pair], list[Pair]]:
        """Try them; return those that were begun but not ended when a process died, and those not begun then."""
        begun = context.RawArray("b", len(work) + 1)  # one for a process whose device is lost
        lost: list[int] = []
        with ProcessPoolExecutor(processes, context, _prepare, (selection, list(sys.path), begun)) as pool:
            futures = {
                pool.submit(_try, place, claim.name, subject.title, profile, seed_value, deadline): place
                for place, (claim, subject) in enumerate(work)
            }
            try:
                for future in as_completed(futures):
                    place = futures[future]
                    try:
                        found = future.result()
                    except BrokenProcessPool:
                        lost.append(place)
                        continue
                    if found is not None:
                        keep(Outcome(work[place][0], **found))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():
                    process.terminate()
                raise
        lost.sort()
        if lost and not any(begun[place] for place in (*lost, -1)):
            raise BrokenProcessPool("it ended before it tried a claim")
        return [work[k] for k in lost if begun[k]], [work[k] for k in lost if not begun[k]]

    def keep(outcome: Outcome) -> None:
        outcomes[outcome.claim.name, outcome.subject] = outcome
        if progress is not None:
            progress(outcome)

    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    left = schedule.by_importance(wanted)
    with _single_threaded():
        while left:
            cut, left = share(left, jobs)
            for claim, subject in cut:
                if share([(claim, subject)], 1)[0]:
                    reason = "the process that tried it died, and so did another one that tried nothing else"
                    keep(Outcome(claim, subject.title, "broken", worst=Observation(float("inf"), 0.0), reason=reason))
    return list(outcomes.values())


@contextlib.contextmanager
def _single_threaded() -> Iterator[None]:
    """Give the processes started within it one thread each, unless the environment says otherwise."""
    chosen = [name for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS") if name not in os.environ]
    os.environ.update(dict.fromkeys(chosen, "1"))
    try:
        yield
    finally:
        for name in chosen:
            del os.environ[name]

"""``python -m proofs``: try every claim and print what was seen.

Without arguments it verifies this library: every solver of `birkhoff.solvers` on every backend that runs here, the
certificates, roundings, decompositions and layers. With ``--projection package.module:function`` it verifies a
projection of yours. The exit status is 0 if every claim holds, 1 if one is broken, 2 for wrong arguments, 130 if none
is broken but the run ended before all were tried.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from proofs import claims, pool, report, runner
from proofs._claim import Claim, Sample
from proofs.backends import BACKENDS
from proofs.runner import PROFILES, Outcome
from proofs.selection import Selection

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m proofs",
        description="Try the claims about doubly stochastic projections and print what was seen.",
        epilog="Example: python -m proofs --projection mylib.layers:sinkhorn --last rows --backend torch",
    )
    target = parser.add_argument_group("what is verified")
    target.add_argument("--projection", metavar="MODULE:FUNCTION", help="a function of an array (..., n, n) of logits")
    target.add_argument("--last", choices=("rows", "columns"), default="rows", help="the side it normalises last")
    target.add_argument("--num-iters", type=int, metavar="K", help="compare it with K exact iterations as well")
    target.add_argument(
        "--backend",
        action="append",
        choices=tuple(BACKENDS),
        help="arrays, repeatable (default: all, or numpy)",
    )
    target.add_argument("--dtype", action="append", metavar="NAME", help="only these dtypes, with --projection")
    target.add_argument("--size", action="append", type=int, metavar="N", help="only these n, with --projection")
    target.add_argument("--solver", action="append", metavar="NAME", help="only these solvers of birkhoff.solvers")
    target.add_argument("--claim", action="append", metavar="NAME", help="only these claims, or families of claims")
    effort = parser.add_argument_group("how hard")
    effort.add_argument("--profile", choices=tuple(PROFILES), default="ci", help="number of examples (default: ci)")
    effort.add_argument("--seed", type=int, help="other examples than the fixed ones")
    effort.add_argument("--jobs", type=int, default=1, metavar="N", help="processes to share the claims among")
    effort.add_argument("--seconds", type=float, metavar="S", help="begin no further claim after S seconds")
    effort.add_argument(
        "--replay", type=Path, metavar="FILE", help="try the failing examples of a JSON report again (of the same code)"
    )
    output = parser.add_argument_group("reports")
    output.add_argument("--detail", action="store_true", help="one line a claim and projection")
    output.add_argument("--json", type=Path, metavar="FILE", help="write every outcome as soon as it is known")
    output.add_argument("--commit", metavar="HASH", help="what the JSON names, where git cannot say it")
    output.add_argument("--junit", type=Path, metavar="FILE", help="write JUnit XML")
    output.add_argument("--list", action="store_true", help="print the claims and stop")
    return parser


def _selection(options: argparse.Namespace) -> Selection:
    return Selection(
        projection=options.projection,
        last=options.last,
        num_iters=options.num_iters,
        dtypes=None if options.dtype is None else tuple(options.dtype),
        sizes=None if options.size is None else tuple(options.size),
        backends=tuple(options.backend or ()),
        solvers=None if options.solver is None else tuple(options.solver),
    )


def _error(text: str) -> Text:
    return Text.assemble(("error:", "bold red"), f" {text}")  # brackets in it are no markup


def _check(options: argparse.Namespace) -> None:
    """Refuse what would be ignored, and what could only fail at the end."""
    if options.jobs < 1:
        raise ValueError(f"--jobs {options.jobs}; give 1 or more")
    if options.seconds is not None and not options.seconds > 0:
        raise ValueError(f"--seconds {options.seconds:g}; give more than 0")
    if options.projection is not None and options.solver:
        raise ValueError("--solver is about this library; with --projection there is one function")
    if options.projection is None:
        given = {"--num-iters": options.num_iters, "--dtype": options.dtype, "--size": options.size}
        given["--last columns"] = options.last == "columns" or None
        ignored = [name for name, value in given.items() if value is not None]
        if ignored:
            raise ValueError(f"{', '.join(ignored)}: about a function of yours; give --projection as well")
    for option, path in (("--json", options.json), ("--junit", options.junit)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"{option} {path}: {'a folder' if path.is_dir() else 'its folder does not exist'}")
    if options.junit:
        options.junit.touch()


def _print_list(console: Console, chosen: Sequence[Claim]) -> None:
    for claim in chosen:
        lemma = f"lemma {', '.join(filter(None, (claim.lemma, *claim.lemmas)))}" if claim.lemma else "no lemma"
        console.print(f"[bold]{claim.name}[/] ({claim.family}, {claim.provenance}, {lemma})", highlight=False)
        console.print(
            f"  {claim.statement}\n  domain: {claim.domain}\n  from: {claim.reference}", highlight=False, markup=False
        )


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C, or being asked to end, raises KeyboardInterrupt once: a second signal must not break the report."""

    def stop(number: int, frame: object) -> None:
        for one in handled:
            signal.signal(one, signal.SIG_IGN)
        raise KeyboardInterrupt

    handled = {one: signal.signal(one, stop) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, before in handled.items():
            signal.signal(one, before)


def _run(
    console: Console,
    chosen: Sequence[Claim],
    selection: Selection,
    found: Sequence[Any],
    options: argparse.Namespace,
    deadline: float | None,
    keep: Callable[[Sequence[Outcome]], None],
) -> list[Outcome]:
    """Return an outcome for each pair of claim and subject, in the order of claims, and `keep` them after each.

    What Ctrl-C, a crash or the budget of seconds left out is "not tried".
    """
    outcomes = {
        (claim.name, subject.title): runner.untried(claim, subject.title)
        for claim, subject in runner.pairs(chosen, found)
    }
    keep(list(outcomes.values()))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("claims", total=len(outcomes))

        def advance(outcome: Outcome) -> None:
            outcomes[outcome.claim.name, outcome.subject] = outcome
            keep(list(outcomes.values()))
            progress.update(task, advance=1, description=outcome.claim.name)

        profile = PROFILES[options.profile]
        how: dict[str, Any] = {"seed_value": options.seed, "deadline": deadline, "progress": advance}
        try:
            with _interruptible():
                if options.jobs > 1:
                    pool.run(chosen, selection, profile, jobs=options.jobs, **how)
                else:
                    runner.run(chosen, found, profile, **how)
        except KeyboardInterrupt:
            pass
        except BrokenProcessPool as error:
            console.print(_error(f"a process died: {error}"))
    return list(outcomes.values())


_SELECTING = ("projection", "last", "num_iters", "backend", "dtype", "size", "solver")


def _as_reported(options: argparse.Namespace, parser: argparse.ArgumentParser) -> list[tuple[str, str, Sample]]:
    """Return the failing examples of the report; options that select what is verified default to those of its run."""
    settings, failing = report.load_failures(options.replay)
    if not failing:
        raise ValueError(f"{options.replay} holds no failing example to try again")
    if all(getattr(options, name) == parser.get_default(name) for name in _SELECTING):
        for name in _SELECTING:
            setattr(options, name, settings.get(name, parser.get_default(name)))
    return failing


def _replay(found: list[Any], path: Path, failing: Sequence[tuple[str, str, Sample]]) -> list[Outcome]:
    by_title = {subject.title: subject for subject in found}
    known = {claim.name for claim in claims.CLAIMS}
    outcomes = []
    for claim_name, title, sample in failing:
        if claim_name not in known:
            raise ValueError(f"{path} is of another version: this one makes no claim {claim_name!r}")
        if title not in by_title:
            raise ValueError(
                f"{path} holds an example of {title!r}, which these options don't select; pass the same ones, or none"
            )
        outcomes.append(runner.replay(claims.by_name(claim_name), by_title[title], sample))
    return outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    sys.path.insert(0, "")  # a projection in the working directory is importable, as with python -m
    started = time.time()
    deadline = None if options.seconds is None else started + options.seconds
    try:
        chosen = claims.select(options.claim)
        if options.list:
            _print_list(console, chosen)
            return 0
        _check(options)
        failing = _as_reported(options, parser) if options.replay else []
        selection = _selection(options)
        found = selection.subjects()
        unsaid = ("json", "junit", "commit", "replay", "detail", "list")
        settings = {name: value for name, value in vars(options).items() if name not in unsaid}
        facts = report.about(settings, options.commit)

        def keep(outcomes: Sequence[Outcome]) -> None:
            settings["wall_seconds"] = round(time.time() - started, 1)
            settings["processor_seconds"] = round(sum(os.times()[:4]), 1)  # with the processes that it waited for
            settings["not_tried"] = sum(outcome.verdict == "not tried" for outcome in outcomes)
            if options.json:
                report.write_json(options.json, outcomes, facts)

        if options.replay:
            outcomes = _replay(found, options.replay, failing)
        else:
            outcomes = _run(console, chosen, selection, found, options, deadline, keep)
        keep(outcomes)
    except (ValueError, OSError) as error:
        console.print(_error(str(error)))
        return 2
    if all(outcome.verdict == "not claimed" for outcome in outcomes):
        console.print("nothing to verify: no claim applies to this selection", highlight=False)
        return 2
    report.print_table(console, outcomes, detail=options.detail)
    report.print_failures(console, outcomes)
    if options.junit:
        report.write_junit(options.junit, outcomes)
    if left := settings["not_tried"]:
        late = deadline is not None and time.time() >= deadline
        said = f"[bold red]{'out of time' if late else 'interrupted'}:[/] {left} of {len(outcomes)} were not tried"
        console.print(said, highlight=False)
    if any(outcome.verdict == "broken" for outcome in outcomes):
        return 1
    return 130 if left else 0

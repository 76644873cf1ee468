"""``python -m tests.mutation``: change the numerical core in one place at a time and see whether anything notices.

Every mutant is imported in a forked process and tried first on the claims of `proofs` (fast), then on the module's own
tests. A mutant that nothing rejects is a survivor and is listed. ``--sample N`` tries N mutants a module; without it
all are tried, which takes about an hour on two cores. ``--again FILE --effort 100`` tries survivors harder.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from proofs import claims, runner, subjects, systems
from proofs.runner import Profile
from tests.mutation.equivalent import reason
from tests.mutation.operators import Mutant, mutants

ROOT = Path(__file__).parents[2]
EFFORT = Profile("mutation", 10, shrink_budget=0)
TIMEOUT = 200


@dataclass(frozen=True)
class Target:
    """One module: what claims are tried on its mutants, and which tests."""

    module: str
    solvers: tuple[str, ...]
    systems: bool
    tests: tuple[str, ...]

    @property
    def path(self) -> Path:
        """Where its source is."""
        return ROOT / (self.module.replace(".", "/") + ".py")


_ALL = ("SinkhornKnopp", "SinkhornLog", "SinkhornDamped", "Newton", "Euclidean")
_SURVIVORS = ("tests/mutation/test_survivors.py",)
_SOLVERS = (
    *_SURVIVORS,
    "tests/birkhoff/test_solvers.py",
    "tests/birkhoff/test_project.py",
    "tests/birkhoff/test_adjoints.py",
)

TARGETS: tuple[Target, ...] = (
    Target("birkhoff.solvers.sinkhorn_knopp", ("SinkhornKnopp",), False, _SOLVERS),
    Target("birkhoff.solvers.sinkhorn_log", ("SinkhornLog",), False, _SOLVERS),
    Target("birkhoff.solvers.sinkhorn_damped", ("SinkhornDamped",), False, _SOLVERS),
    Target("birkhoff.solvers.newton", ("Newton",), False, ("tests/birkhoff/test_newton.py", *_SOLVERS)),
    Target(
        "birkhoff.solvers.euclidean",
        ("Euclidean",),
        False,
        ("tests/birkhoff/test_euclidean.py", *_SOLVERS),
    ),
    Target("birkhoff.solvers.range_cap", ("SinkhornKnopp", "SinkhornDamped"), False, _SOLVERS),
    Target("birkhoff.solvers.protocol", ("SinkhornKnopp",), False, _SOLVERS),
    Target("birkhoff._math", _ALL, False, (*_SOLVERS, "tests/birkhoff/test_newton.py")),
    Target("birkhoff.certificates", (), True, (*_SURVIVORS, "tests/birkhoff/test_certificates.py")),
    Target("birkhoff.rounding", (), True, (*_SURVIVORS, "tests/birkhoff/test_rounding.py")),
)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from changed source."""

    def __init__(self, module: str, path: Path, source: str) -> None:
        self.module, self.path, self.source = module, path, source

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self.module:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.source, str(self.path), "exec"), module.__dict__)


def _claims_reject(target: Target, effort: Profile) -> str | None:
    """Name the first claim that the changed module breaks."""
    numpy = subjects.backend("numpy")
    solvers = importlib.import_module("birkhoff.solvers")
    found: list[Any] = []
    for name in target.solvers:
        found.append(subjects.solver_subject(getattr(solvers, name)(), numpy))
    if target.systems:
        found.extend((systems.certifier(numpy), systems.rounder(numpy)))
    if not target.systems and target.module == "birkhoff.rounding":
        found.append(subjects.solver_subject(solvers.SinkhornLog(), numpy, finish="exact"))
    for claim in claims.CLAIMS:
        for subject in found:
            if getattr(subject, "kind", "projection") != claim.kind:
                continue
            if runner.run_claim(claim, subject, effort).verdict == "broken":
                return f"claim {claim.name}"
    return None


def _child(target: Target, source: str, effort: Profile, pipe: int) -> None:
    """Import the mutant and report who noticed, on a pipe."""
    for name in [
        name for name in sys.modules if name == "birkhoff" or name.startswith(("birkhoff.", "tests.birkhoff"))
    ]:
        del sys.modules[name]
    sys.meta_path.insert(0, _Finder(target.module, target.path, source))
    sys.dont_write_bytecode = True
    verdict: str | None
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            np.seterr(all="ignore")
            importlib.import_module(target.module)
            importlib.import_module("birkhoff")
            verdict = _claims_reject(target, effort)
        except BaseException as error:
            verdict = f"{type(error).__name__} on import or use"
        if verdict is None:
            quiet = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly", "--no-header", "-W", "ignore"]
            present = [test for test in target.tests if (ROOT / test).exists()]
            code = pytest.main([*quiet, *present])
            verdict = f"tests of {target.module}" if code == pytest.ExitCode.TESTS_FAILED else None
    os.write(pipe, (verdict or "survived").encode())


def try_mutant(target: Target, source: str, effort: Profile = EFFORT) -> str:
    """Return who rejected the mutant: a claim, the tests, a timeout; or ``"survived"``."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with contextlib.suppress(BaseException):
            _child(target, source, effort, writing)
        os._exit(0)
    os.close(writing)
    deadline, status = time.monotonic() + TIMEOUT, 0
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reading)
            return "timeout"
        time.sleep(0.02)
    with os.fdopen(reading, "rb") as stream:
        text = stream.read().decode()
    return text or f"crash with status {status}"


def _key(mutant: Mutant) -> tuple[str, str, str]:
    return mutant.kind, mutant.before, mutant.after


def run(
    target: Target, sample: int | None, seed: int, effort: Profile, only: set[tuple[str, str, str]] | None = None
) -> Iterator[tuple[Mutant, str]]:
    """Try the mutants of one module, a random sample of them, or those with the given kind, before and after."""
    found = list(mutants(target.path.read_text(encoding="utf-8")))
    if only is not None:
        found = [mutant for mutant in found if _key(mutant) in only]
    if sample is not None and sample < len(found):
        found = sorted(random.Random(seed).sample(found, sample), key=lambda mutant: mutant.line)
    for mutant in found:
        yield mutant, try_mutant(target, mutant.source, effort)


def _record(target: Target, mutant: Mutant, verdict: str) -> dict[str, Any]:
    return {
        "module": target.module,
        "line": mutant.line,
        "where": mutant.where,
        "kind": mutant.kind,
        "before": mutant.before,
        "after": mutant.after,
        "verdict": verdict,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 if at least 95 % of the mutants were rejected."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--module", action="append", help="only these modules")
    parser.add_argument("--sample", type=int, help="so many mutants of each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write every mutant and who rejected it")
    parser.add_argument("--again", type=Path, nargs="*", help="only the survivors in these JSON files")
    parser.add_argument("--effort", type=int, default=EFFORT.max_examples, help="stacks of examples for each claim")
    parser.add_argument("--floor", type=float, default=0.95, help="the share that must be rejected (default 0.95)")
    options = parser.parse_args(arguments)
    effort = Profile("mutation", options.effort, shrink_budget=0)
    survivors: dict[str, set[tuple[str, str, str]]] = {}
    for path in options.again or ():
        for record in json.loads(path.read_text(encoding="utf-8")):
            if record["verdict"] == "survived":
                key = (record["kind"], record["before"], record["after"])
                survivors.setdefault(record["module"], set()).add(key)
    records: list[dict[str, Any]] = []
    for target in TARGETS:
        if options.module and target.module not in options.module:
            continue
        if options.again and target.module not in survivors:
            continue
        baseline = try_mutant(target, target.path.read_text(encoding="utf-8"), effort)
        if baseline != "survived":
            print(f"{target.module}: the unchanged module is rejected by {baseline}; nothing can be learnt", flush=True)
            return 2
        started = time.monotonic()
        first = len(records)
        for mutant, verdict in run(target, options.sample, options.seed, effort, survivors.get(target.module)):
            records.append(_record(target, mutant, verdict))
            if verdict == "survived" and reason(target.module, mutant.where, mutant.before, mutant.after) is None:
                print(f"  survived: {target.module}:{mutant.line} {mutant.before}  ->  {mutant.after}", flush=True)
            if options.json:
                options.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        own = records[first:]
        killed = sum(record["verdict"] != "survived" for record in own)
        print(f"{target.module}: {killed} of {len(own)} rejected, {time.monotonic() - started:.0f} s", flush=True)
    killed = sum(record["verdict"] != "survived" for record in records)
    argued = sum(
        record["verdict"] == "survived"
        and reason(record["module"], record["where"], record["before"], record["after"]) is not None
        for record in records
    )
    share = killed / max(1, len(records) - argued)
    print(
        f"{killed} of {len(records)} rejected, {argued} argued equivalent: {100 * share:.1f} % of the rest", flush=True
    )
    return 0 if share >= options.floor else 1


if __name__ == "__main__":
    sys.exit(main())

"""Try mutants: every one in a forked process, on claims and tests that the parent has loaded once.

A claim on a subject and a test of pytest are both a *probe*. The first probe that a mutant fails rejects it. Probes
that have rejected many mutants of the module, quickly, come first; only a survivor meets all of them.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import numpy as np
import pytest
from _pytest.runner import runtestprotocol

from tests.mutation.operators import Mutant
from tests.mutation.patch import can_change, change_code
from tests.mutation.targets import ROOT, Target

__all__ = ["Broken", "try_all"]

_LIMIT = 900.0  # seconds for one mutant, against what does not even use the processor
_PATIENCE = 1.5  # seconds; a slower probe is left out, for a survivor meets them all
_SLOWDOWN = 20.0  # a probe that takes so much longer than on the unchanged module (and five seconds) rejects


class Broken(Exception):
    """The unchanged module is rejected, so that nothing can be learnt."""


@dataclass
class Probe:
    """Something that a mutant may fail, how long it takes, and how it has fared with this module."""

    name: str
    fails: Callable[[], bool]
    seconds: float = 0.1
    tries: int = 0
    kills: int = 0

    def promise(self) -> float:
        """Rejections to be expected per second."""
        return (self.kills + 0.3) / (self.tries + 1.0) / (self.seconds + 0.003)


Report = Callable[[Mutant, str], None]


def try_all(target: Target, wanted: Iterable[Mutant], effort: Any, report: Report) -> None:
    """Report each mutant with what rejected it, or ``"survived"``."""
    source = target.path.read_text(encoding="utf-8")
    quick, whole = [], []
    for mutant in wanted:
        (quick if can_change(source, mutant.source) else whole).append(mutant)
    if whole:  # before this process has loaded what cannot be loaded twice, torch's operators
        verdict = _in_child(lambda: _imported_anew(target, source, effort))
        if verdict != "survived":
            raise Broken(f"the unchanged module is rejected by {verdict}")
        for mutant in whole:
            report(mutant, _in_child(partial(_imported_anew, target, mutant.source, effort)))
    if quick:
        loop = _Loop(target, quick, effort, report)
        os.chdir(ROOT)
        pytest.main(_arguments(target), plugins=[loop])
        if loop.trouble is not None:
            raise Broken(f"the unchanged module: {loop.trouble}")


def _in_child(judge: Callable[[], str]) -> str:
    """Run ``judge`` in a forked process with its output thrown away."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        sys.dont_write_bytecode = True
        np.seterr(all="ignore")
        try:
            answer = judge()
        except BaseException as error:
            answer = f"crash: {type(error).__name__}"
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    deadline, status = time.monotonic() + _LIMIT, 0
    parts: list[bytes] = []
    with os.fdopen(reading, "rb", buffering=0) as stream:
        os.set_blocking(reading, False)
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            with contextlib.suppress(BlockingIOError):
                while part := stream.read(65536):
                    parts.append(part)
            if done:
                break
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "timeout"
            time.sleep(0.005)
    return b"".join(parts).decode() or f"crash: status {status}"


# What needs the module executed again: constants, defaults, decorators.


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


def _imported_anew(target: Target, source: str, effort: Any) -> str:
    for name in list(sys.modules):
        if name.partition(".")[0] in ("birkhoff", "proofs") or name.startswith(("tests.birkhoff", "tests.contracts")):
            del sys.modules[name]
    sys.meta_path.insert(0, _Finder(target.module, target.path, source))
    importlib.import_module(target.module)
    for probe in _claim_probes(target, effort):
        if probe.fails():
            return probe.name
    code = pytest.main(["-x", *_arguments(target)])
    return "survived" if code == pytest.ExitCode.OK else f"tests of {target.module}"


def _arguments(target: Target) -> list[str]:
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:randomly", "--no-header", "-W", "ignore", "--capture=no"]
    return [*options, *(["-k", target.chosen] if target.chosen else []), *target.tests]


def _claim_probes(target: Target, effort: Any) -> list[Probe]:
    """One probe for each claim and subject; imported late, so that a changed module may be underneath."""
    claims, runner, subjects, systems = (
        importlib.import_module(f"proofs.{name}") for name in ("claims", "runner", "subjects", "systems")
    )
    solvers = importlib.import_module("birkhoff.solvers")
    numpy = subjects.backend("numpy")
    found = [subjects.solver_subject(getattr(solvers, name)(), numpy) for name in target.solvers]
    if target.systems:
        found += [systems.certifier(numpy), systems.rounder(numpy)]

    def breaks(claim: Any, subject: Any) -> Callable[[], bool]:
        return lambda: runner.run_claim(claim, subject, effort).verdict == "broken"

    return [
        Probe(f"claim {claim.name}", breaks(claim, subject))
        for claim in claims.CLAIMS
        for subject in found
        if getattr(subject, "kind", "projection") == claim.kind
    ]


# What does not: the loaded functions are given changed code.


class _Loop:
    """Tries the mutants where pytest would run its tests: while the session is open, its fixtures work."""

    def __init__(self, target: Target, wanted: list[Mutant], effort: Any, report: Report) -> None:
        self.target, self.wanted, self.effort, self.report = target, wanted, effort, report
        self.trouble: str | None = "its tests cannot be collected"

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            return True
        tests = [Probe(f"test {item.nodeid}", _item(item)) for item in session.items]
        probes = [*_claim_probes(self.target, self.effort), *tests]
        timings = _in_child(lambda: _timings(probes))
        if not timings.startswith("{"):
            self.trouble = f"rejected by {timings}"
            return True
        self.trouble = None
        for probe in probes:
            probe.seconds = json.loads(timings)[probe.name]
        probes = [probe for probe in probes if probe.seconds <= _PATIENCE]
        module = importlib.import_module(self.target.module)
        for mutant in self.wanted:
            self.report(mutant, _judged(module, mutant, probes))
        return True


def _judged(module: ModuleType, mutant: Mutant, probes: list[Probe]) -> str:
    """The verdict on one mutant; the probes remember it."""
    order = sorted(probes, key=Probe.promise, reverse=True)
    verdict = _in_child(lambda: _patched(module, mutant.source, order))
    name = verdict.removeprefix("timeout in ")
    for probe in order:
        probe.tries += 1
        if probe.name == name:
            probe.kills += 1
            break
    return verdict


def _item(item: pytest.Item) -> Callable[[], bool]:
    return lambda: any(report.failed for report in runtestprotocol(item, log=False, nextitem=None))


def _timings(probes: list[Probe]) -> str:
    seconds = {}
    for probe in probes:
        started = time.process_time()
        if probe.fails():
            return probe.name
        seconds[probe.name] = time.process_time() - started
    return json.dumps(seconds)


def _patched(module: ModuleType, source: str, order: list[Probe]) -> str:
    change_code(module, source)
    late = False

    def ring(number: int, frame: FrameType | None) -> None:
        nonlocal late
        late = True
        raise TimeoutError("this takes much longer than it should")

    signal.signal(signal.SIGPROF, ring)
    for probe in order:
        signal.setitimer(signal.ITIMER_PROF, 5.0 + _SLOWDOWN * probe.seconds)  # of processor time
        try:
            failed = probe.fails()
        except TimeoutError:
            failed = True
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        if failed:
            return f"timeout in {probe.name}" if late else probe.name
    return "survived"

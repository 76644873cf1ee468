"""Reports of outcomes: a table to read, JSON to replay, JUnit XML for a build server."""

from __future__ import annotations

import collections
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from proofs._claim import Sample
from proofs.runner import Outcome

__all__ = [
    "about",
    "as_record",
    "describe",
    "explain",
    "load",
    "load_failures",
    "print_failures",
    "print_table",
    "versions",
    "write_json",
    "write_junit",
]

_STYLE = {"holds": "green", "broken": "bold red", "not claimed": "dim", "not tried": "yellow"}


def print_table(console: Console, outcomes: Sequence[Outcome], *, detail: bool = False) -> None:
    """Print what was seen of every claim, all subjects together; with `detail` also of each subject."""
    table = Table(header_style="bold", pad_edge=False)
    table.add_column("claim: domain; method", overflow="fold", ratio=1)
    table.add_column("verdict", no_wrap=True)
    table.add_column("examples", justify="right", no_wrap=True)
    table.add_column("worst seen / allowed", overflow="fold", max_width=34)
    family = None
    for group in _by_claim(outcomes):
        claim = group[0].claim
        if claim.family != family:
            table.add_section()
            family = claim.family
        head = Text(claim.name, style="bold")
        head.append(f"\n{claim.domain}; {claim.provenance}: {claim.method}", style="dim")
        table.add_row(head, _verdict(group), f"{sum(o.examples for o in group):,}", _worst(group))
        for outcome in group if detail else ():
            if outcome.verdict in ("holds", "broken"):
                name = Text(f"  {outcome.subject}", style=_STYLE[outcome.verdict])
                table.add_row(name, _verdict([outcome]), f"{outcome.examples:,}", _worst([outcome]))
    console.print(table)
    counts = collections.Counter(outcome.verdict for outcome in outcomes)
    held, broken = counts["holds"], counts["broken"]
    tried = sum(outcome.examples for outcome in outcomes)
    style = _STYLE["broken" if broken else "holds"]
    console.print(
        f"[{style}]{held} hold, {broken} broken[/], {counts['not claimed']} not claimed, "
        f"{counts['not tried']} not tried; {tried:,} matrices in {sum(outcome.seconds for outcome in outcomes):.1f} s",
        highlight=False,
    )


def _by_claim(outcomes: Sequence[Outcome]) -> list[list[Outcome]]:
    grouped: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        grouped.setdefault(outcome.claim.name, []).append(outcome)
    return list(grouped.values())


def _verdict(group: list[Outcome]) -> Text:
    counts = collections.Counter(outcome.verdict for outcome in group)
    held, broken, left = counts["holds"], counts["broken"], counts["not tried"]
    more = f"\n{left} not tried" if left else ""
    if broken:
        text = "broken" if len(group) == 1 else f"broken {broken}/{held + broken}{more}"
        return Text(text, style=_STYLE["broken"])
    if held:
        return Text("holds" if len(group) == 1 else f"holds {held}/{held}{more}", style=_STYLE["holds"])
    text = "not tried" if left else "not claimed"
    return Text(text, style=_STYLE[text])


def _worst(group: list[Outcome]) -> str:
    top = max(group, key=lambda outcome: outcome.worst.ratio if outcome.worst else -1.0)
    if top.worst is None:
        return group[0].reason
    text = f"{top.worst.seen:.2g} / {top.worst.allowed:.2g}"
    return text if len(group) == 1 else f"{text}\n{top.subject}"


def describe(sample: Sample) -> str:
    """Return the failing logits as text that can be pasted into Python."""
    values = np.asarray(sample.logits, dtype=np.float64)
    shown = np.array2string(values, separator=", ", precision=17, floatmode="unique", threshold=200, max_line_width=100)
    return f"{shown}  # {sample.dtype}, from {sample.note or 'a stored example'}, seed {sample.seed}"


def explain(outcome: Outcome) -> str:
    """Return statement, domain, finding and smallest example, if there is one, of a broken claim as plain text."""
    seen, allowed = (outcome.worst.seen, outcome.worst.allowed) if outcome.worst else (float("inf"), 0.0)
    lines = [
        f"{outcome.claim.name} is broken by {outcome.subject}",
        f"  claim:  {outcome.claim.statement}",
        f"  domain: {outcome.claim.domain}",
        f"  seen {seen:.6g}, allowed {allowed:.6g}: {outcome.reason}",
    ]
    if outcome.failing is not None:
        lines.append(f"  logits = {describe(outcome.failing)}")
    return "\n".join(lines)


def print_failures(console: Console, outcomes: Sequence[Outcome]) -> None:
    """Print statement, finding and smallest example of every broken claim."""
    for outcome in outcomes:
        if outcome.verdict == "broken":
            console.print(Text(explain(outcome), style=""), soft_wrap=True)
            console.print()


OWN = ("birkhoff-mhc", "numpy", "torch", "triton", "cupy-cuda13x", "cupy-cuda12x", "hypothesis", "python-flint")
_PEERS = ("POT", "hyper-connections", "transformers", "liger-kernel", "tile-kernels")


def versions(packages: Sequence[str] = (*OWN, *_PEERS)) -> dict[str, str]:
    """Return the versions of Python and of the packages that are installed, and the name of the CUDA device."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    return found


def as_record(outcome: Outcome) -> dict[str, Any]:
    """Return one outcome as plain data."""
    worst = outcome.worst
    return {
        "claim": outcome.claim.name,
        "family": outcome.claim.family,
        "subject": outcome.subject,
        "verdict": outcome.verdict,
        "reason": outcome.reason,
        "examples": outcome.examples,
        "seconds": round(outcome.seconds, 4),
        "seen": None if worst is None else _finite(worst.seen),
        "allowed": None if worst is None else _finite(worst.allowed),
        "failing": None if outcome.failing is None else outcome.failing.as_record(),
    }


def _finite(value: float) -> float | str:
    return float(value) if np.isfinite(value) else str(value)


def about(settings: dict[str, Any], commit: str | None = None) -> dict[str, Any]:
    """Return when, where and on what a run was made; `commit` is for a tree without its git folder."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": commit or _commit(),
        "settings": settings,
        "versions": versions(),
        "processors": os.cpu_count(),
    }


def _commit() -> str | None:
    with contextlib.suppress(OSError):
        here = Path(__file__).parent
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=here)
        if len(found.stdout.strip()) == 40:
            return found.stdout.strip()
    return None


def write_json(path: Path, outcomes: Sequence[Outcome], facts: dict[str, Any]) -> None:
    """Write the facts of :func:`about`, every claim once, and every outcome on a line; failing examples bit for bit.

    The file is replaced as a whole: who reads it finds the report of this call or the one before.
    """
    told = ("statement", "domain", "method", "provenance", "lemma", "family")
    chosen = {outcome.claim.name: outcome.claim for outcome in outcomes}
    claims = {name: {key: getattr(claim, key) for key in told} for name, claim in chosen.items()}
    head = json.dumps({**facts, "claims": claims}, indent=1)
    lines = ",\n".join(json.dumps(as_record(outcome)) for outcome in outcomes)
    part = path.with_name(f"{path.name}.part")
    part.write_text(f'{head.removesuffix("}").rstrip()},\n "outcomes": [\n{lines}\n]}}\n', encoding="utf-8")
    part.replace(path)


def load(path: Path) -> dict[str, Any]:
    """Return what :func:`write_json` wrote; ``ValueError`` names a file that it did not write."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        missing = {"settings", "versions", "outcomes"} - set(document)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is not a report of python -m proofs --json ({type(error).__name__}: {error})"
        ) from error
    if missing:
        raise ValueError(f"{path} is not a report of python -m proofs --json (it has no {', '.join(sorted(missing))})")
    return dict(document)


def load_failures(path: Path) -> tuple[dict[str, Any], list[tuple[str, str, Sample]]]:
    """Return the settings of a JSON report and its failing examples: (claim, subject, sample)."""
    document = load(path)
    try:
        failing = [
            (record["claim"], record["subject"], Sample.from_record(record["failing"]))
            for record in document["outcomes"]
            if record["failing"] is not None
        ]
        return document["settings"], failing
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a report of this version ({type(error).__name__}: {error})") from error


def write_junit(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Write JUnit XML: one test case a claim and subject."""
    suite = ElementTree.Element(
        "testsuite",
        name="proofs",
        tests=str(len(outcomes)),
        failures=str(sum(outcome.verdict == "broken" for outcome in outcomes)),
        errors="0",
        skipped=str(sum(outcome.verdict in ("not claimed", "not tried") for outcome in outcomes)),
        time=f"{sum(outcome.seconds for outcome in outcomes):.3f}",
    )
    for outcome in outcomes:
        case = ElementTree.SubElement(
            suite,
            "testcase",
            classname=f"proofs.{outcome.claim.family}.{outcome.subject}",
            name=outcome.claim.name,
            time=f"{outcome.seconds:.3f}",
        )
        if outcome.verdict == "broken":
            ElementTree.SubElement(case, "failure", message=outcome.reason).text = explain(outcome)
        elif outcome.verdict in ("not claimed", "not tried"):
            ElementTree.SubElement(case, "skipped", message=outcome.reason)
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)

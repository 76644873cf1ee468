"""Write the report: ``python -m tests.mutation.page docs/explanation/measured/mutation.md --json RUN.json ...``.

A later file overrides the verdicts of an earlier one, so that survivors may be tried again after new tests.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.mutation.__main__ import TARGETS
from tests.mutation.equivalent import EQUIVALENT, reason
from tests.mutation.operators import mutants

__all__ = ["main", "merged", "render"]

_HEAD = """# Measured: mutation of the numerical core

This page is written by `python -m tests.mutation.page`; do not edit it. {date}.

`python -m tests.mutation` changes one operator, constant, axis, comparison or condition of the core at a time, imports
the changed module in a process of its own, and tries the claims of `proofs` on it, then the module's tests. A mutant
that both accept has survived. Survivors were read one by one: a missing test was written
(`tests/mutation/test_survivors.py`), or the change alters nothing that is claimed, and the argument is listed below
and in `tests/mutation/equivalent.py`. Large modules were sampled with a fixed seed; the columns say how many of the
possible mutants were tried.

| module | possible | tried | rejected | by a claim | by a test | by a timeout or crash | argued equivalent | left |
|---|---|---|---|---|---|---|---|---|
"""


def merged(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Read the runs; the last verdict of a mutant counts, also where its line has moved meanwhile."""
    places: dict[tuple[Any, ...], str] = {}
    for target in TARGETS:
        for mutant in mutants(target.path.read_text(encoding="utf-8")):
            change = (target.module, mutant.kind, mutant.before, mutant.after)
            places[change] = places[(*change, mutant.line)] = mutant.where
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in paths:
        seen: collections.Counter[tuple[str, ...]] = collections.Counter()
        for record in json.loads(path.read_text(encoding="utf-8")):
            change = (record["module"], record["kind"], record["before"], record["after"])
            there = places.get((*change, record["line"]), places.get(change, "a place that is gone"))
            where = record.get("where") or there
            seen[change] += 1  # the same text may stand in several places
            found[(*change, seen[change])] = {**record, "where": where}
    return list(found.values())


def _by(record: dict[str, Any]) -> str:
    verdict = record["verdict"]
    if verdict.startswith("claim "):
        return "claim"
    if verdict.startswith("tests of"):
        return "test"
    if verdict != "survived":
        return "crash"
    known = reason(record["module"], record["where"], record["before"], record["after"])
    return "left" if known is None else "argued"


def render(records: Sequence[dict[str, Any]]) -> str:
    """Return the page."""
    lines = [_HEAD.format(date=datetime.date.today().isoformat()).rstrip()]
    total: collections.Counter[str] = collections.Counter()
    for target in TARGETS:
        own = [record for record in records if record["module"] == target.module]
        if not own:
            continue
        counts = collections.Counter(_by(record) for record in own)
        possible = len(list(mutants(target.path.read_text(encoding="utf-8"))))
        rejected = counts["claim"] + counts["test"] + counts["crash"]
        total.update(counts)
        lines.append(
            f"| `{target.module}` | {possible} | {len(own)} | {rejected} | {counts['claim']} | {counts['test']} | "
            f"{counts['crash']} | {counts['argued']} | {counts['left']} |"
        )
    rejected = total["claim"] + total["test"] + total["crash"]
    tried, others = sum(total.values()), sum(total.values()) - total["argued"]
    lines += [
        f"| **all** | | {tried} | {rejected} | {total['claim']} | {total['test']} | {total['crash']} | "
        f"{total['argued']} | {total['left']} |",
        "",
        f"{100 * rejected / max(1, tried):.1f} % of all mutants tried are rejected, "
        f"**{100 * rejected / max(1, others):.1f} %** of those that are not argued to be equivalent.",
        "",
        "## Argued equivalent",
        "",
    ]
    survived = {(r["module"], r["where"], r["before"], r["after"]) for r in records if _by(r) == "argued"}
    for entry in EQUIVALENT:
        present = [change for change in entry.changes if (entry.module, *change) in survived]
        if present:
            lines.append(f"- `{entry.module}`: {entry.why}.")
            lines += [f"  - `{where}`: `{before}` to `{after}`" for where, before, after in present]
    lines += ["", "## Left", ""]
    left = [record for record in records if _by(record) == "left"]
    lines += [
        f"- `{r['module']}`, line {r['line']}, `{r['where']}`: `{r['before']}` to `{r['after']}`" for r in left
    ] or ["None."]
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation.page", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--json", type=Path, nargs="+", required=True)
    options = parser.parse_args(arguments)
    options.page.write_text(render(merged(options.json)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Write the report: ``python -m tests.mutation.page docs/explanation/measured/mutation.md --records FILE``."""

from __future__ import annotations

import argparse
import collections
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.mutation.__main__ import known
from tests.mutation.equivalent import EQUIVALENT, reason
from tests.mutation.kernels import KERNEL_MUTANTS, known_kernels
from tests.mutation.operators import Mutant, mutants
from tests.mutation.targets import TARGETS

__all__ = ["main", "render", "render_kernels"]

_HEAD = """# Measured: mutation of the numerical core

This page is written by `python -m tests.mutation.page`; do not edit it. {date}.

`python -m tests.mutation` changes one operator, constant, axis, comparison or condition of the core at a time. It tries
each mutant in a process of its own on the claims of `proofs` and on the module's tests, those first that have rejected
most. A mutant that all of them accept has survived. {tried}

Survivors were read one by one. Where the code was redundant (a guard that nothing reaches, a constant that changes no
result, the same computed twice) it was made simpler, and the mutant is gone; where a property had no test, one was
written (most are in `tests/mutation/test_survivors.py`, `tests/birkhoff/test_certificate_formulas.py` and
`tests/birkhoff/test_euclidean.py`); what is left is argued below and in `tests/mutation/equivalent.py`. Argued does not
always mean that the program is the same: some change a tuning constant that only a test repeating it could tell. So
both shares are given: rejected of all, and rejected of those that are not argued. An argument is kept by function and
text, and covers every place in the function where the same text stands. Probes slower than 1.5 seconds were left out.
"Other" means a crash outside a test, or a test that took more than twenty times (and five seconds) longer than it
should.

| module | tried | rejected | by a claim | by a test | other | argued equivalent | left | of all | of the rest |
|---|---|---|---|---|---|---|---|---|---|
"""


_KERNELS = """## Kernels

A kernel is compiled from its text, so its mutants are texts. `python -m tests.mutation.kernels` replaces one at a time
in a copy of the sources and runs the named tests of the Triton interpreter there. The list is our own (wrong indices,
signs and orders, dropped terms, thresholds), one or more for every part of every Triton kernel. Each that survived at
first led to a test: damping large enough to count, rows of zeros, equal largest logits under a range cap, the value of
the closed form of n = 2, the bits of a rebuilt block, epsilons of a site.

| file | mutants | rejected |
|---|---|---|
"""

_CORE = ("birkhoff.solvers.", "birkhoff.certificates", "birkhoff._math")  # 95 % of these are to be rejected

Judged = tuple[str, Mutant, str]
"""Module, mutant, and what became of it: claim, test, other (who rejected it), argued, left, untried."""


def _judge(module: str, mutant: Mutant, verdict: str) -> str:
    if verdict == "untried":
        return "untried"
    if verdict == "survived":
        return "left" if reason(module, mutant.where, mutant.before, mutant.after) is None else "argued"
    return next((kind for kind in ("claim", "test") if verdict.startswith(kind)), "other")


def _row(name: str, counts: collections.Counter[str]) -> str:
    total, rejected = sum(counts.values()) - counts["untried"], counts["claim"] + counts["test"] + counts["other"]
    rest = total - counts["argued"]
    return (
        f"| {name} | {total} | {rejected} | {counts['claim']} | {counts['test']} | {counts['other']} | "
        f"{counts['argued']} | {counts['left']} | {rejected / max(1, total):.1%} | {rejected / max(1, rest):.1%} |"
    )


def render(judged: Sequence[Judged]) -> str:
    """Return the page."""
    untried = sum(kind == "untried" for *_, kind in judged)
    tried = "All mutants were tried." if not untried else f"{untried} of {len(judged)} have not been tried yet."
    lines = [_HEAD.format(date=datetime.date.today().isoformat(), tried=tried).rstrip()]
    for target in TARGETS:
        counts = collections.Counter(kind for module, _, kind in judged if module == target.module)
        lines.append(_row(f"`{target.module}`", counts))
    core = [kind for module, _, kind in judged if module.startswith(_CORE)]
    lines.append(_row("**solvers, certificates, _math**", collections.Counter(core)))
    lines += [_row("**all**", collections.Counter(kind for *_, kind in judged)), "", "## Argued equivalent", ""]
    survived = {(module, m.where, m.before, m.after) for module, m, kind in judged if kind == "argued"}
    for entry in EQUIVALENT:
        present = [change for change in entry.changes if (entry.module, *change) in survived]
        if present:
            lines.append(f"- `{entry.module}`: {entry.why}.")
            lines += [f"  - `{where}`: `{before}` to `{after}`" for where, before, after in present]
    left = [(module, mutant) for module, mutant, kind in judged if kind == "left"]
    lines += ["", "## Left", ""]
    lines += [f"- `{module}`, line {m.line}, `{m.where}`: `{m.before}` to `{m.after}`" for module, m in left] or [
        "None."
    ]
    return "\n".join(lines).rstrip() + "\n"


def render_kernels(path: Path) -> str:
    """The section on the mutants of kernels."""
    verdicts = known_kernels(path)
    counts: collections.Counter[str] = collections.Counter()
    rejected: collections.Counter[str] = collections.Counter()
    left = []
    for mutant in KERNEL_MUTANTS:
        counts[mutant.path] += 1
        if verdicts[mutant.path, mutant.before, mutant.after]:
            rejected[mutant.path] += 1
        else:
            left.append(f"- `{mutant.path}`: `{mutant.before}` to `{mutant.after}`")
    rows = [f"| `{name}` | {counts[name]} | {rejected[name]} |" for name in sorted(counts)]
    total = f"| **all** | {sum(counts.values())} | {sum(rejected.values())} |"
    return "\n".join([_KERNELS.rstrip(), *rows, total, "", *left]).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation.page", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--records", type=Path, default=Path("mutation.jsonl"))
    parser.add_argument("--kernels", type=Path, help="records of python -m tests.mutation.kernels")
    options = parser.parse_args(arguments)
    verdicts = known(options.records)
    judged: list[Judged] = []
    for target in TARGETS:
        for mutant in mutants(target.path.read_text(encoding="utf-8")):
            verdict = verdicts.get((target.module, mutant.identity), "untried")
            judged.append((target.module, mutant, _judge(target.module, mutant, verdict)))
    text = render(judged) + ("" if options.kernels is None else "\n" + render_kernels(options.kernels))
    options.page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

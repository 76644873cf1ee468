"""``python -m tests.mutation``: change the numerical core in one place at a time and see whether anything notices.

Every mutant is tried on the claims of `proofs` and on the module's own tests. A mutant that nothing rejects is a
survivor and is listed. Verdicts are written to ``--records`` as they are found; a second run tries only what the file
does not know: mutants of functions that have changed, and, with ``--again``, the survivors.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads do not live through a fork

from proofs.runner import Profile
from tests.mutation.equivalent import reason
from tests.mutation.operators import Mutant, mutants
from tests.mutation.targets import ROOT, TARGETS, Target
from tests.mutation.trial import Broken, try_all

__all__ = ["known", "main"]


def known(path: Path) -> dict[tuple[str, str], str]:
    """The last verdict on each mutant, by module and identity."""
    verdicts: dict[tuple[str, str], str] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            verdicts[record["module"], record["identity"]] = record["verdict"]
    return verdicts


def _record(target: Target, mutant: Mutant, verdict: str) -> dict[str, Any]:
    return {
        "module": target.module,
        "identity": mutant.identity,
        "where": mutant.where,
        "before": mutant.before,
        "after": mutant.after,
        "verdict": verdict,
    }


def _try_module(target: Target, wanted: list[Mutant], effort: Profile, records: Path) -> None:
    started = time.monotonic()
    with records.open("a", encoding="utf-8") as stream:

        def report(mutant: Mutant, verdict: str) -> None:
            print(json.dumps(_record(target, mutant, verdict)), file=stream, flush=True)
            if verdict == "survived" and not _argued(target, mutant):
                place = f"{target.module}:{mutant.line} {mutant.where}"
                print(f"  survived: {place}: {mutant.before}  ->  {mutant.after}", flush=True)

        try_all(target, wanted, effort, report)
    print(f"{target.module}: {len(wanted)} tried in {time.monotonic() - started:.0f} s", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 if at least ``--floor`` of the mutants were rejected."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--module", action="append", help="only these modules")
    parser.add_argument("--records", type=Path, default=Path("mutation.jsonl"), help="default mutation.jsonl")
    parser.add_argument("--part", default="0/1", help="i/k: every k-th mutant from the i-th on, for several processes")
    parser.add_argument("--again", action="store_true", help="try survivors again that are not argued equivalent")
    parser.add_argument("--effort", type=int, default=10, help="stacks of examples for each claim")
    parser.add_argument("--floor", type=float, default=0.95, help="the share that must be rejected (default 0.95)")
    options = parser.parse_args(arguments)
    effort = Profile("mutation", options.effort, shrink_budget=0)
    chosen = [target for target in TARGETS if not options.module or target.module in options.module]
    if len(chosen) > 1:  # a process for each module: what one has loaded would be in the way of the next
        same = ["--records", str(options.records.resolve()), "--effort", str(options.effort), "--floor", "0"]
        for target in chosen:
            call = [sys.executable, "-m", "tests.mutation", *same, "--module", target.module]
            if subprocess.run(call + ["--again"] * options.again, cwd=ROOT, check=False).returncode:
                return 2
    killed = argued = total = 0
    for target in chosen:
        found, verdicts = list(mutants(target.path.read_text(encoding="utf-8"))), known(options.records)
        skip = set(verdicts)
        if options.again:
            argued_ones = {(target.module, mutant.identity) for mutant in found if _argued(target, mutant)}
            skip -= {key for key, verdict in verdicts.items() if verdict == "survived"} - argued_ones
        wanted = [mutant for mutant in found if (target.module, mutant.identity) not in skip]
        first, step = (int(number) for number in options.part.split("/"))
        wanted = wanted[first::step]
        try:
            if wanted and len(chosen) == 1:
                _try_module(target, wanted, effort, options.records)
        except Broken as error:
            print(f"{target.module}: {error}; nothing can be learnt", flush=True)
            return 2
        verdicts = known(options.records)
        total += len(found)
        for mutant in found:
            survived = verdicts.get((target.module, mutant.identity), "survived") == "survived"
            killed += not survived
            argued += survived and _argued(target, mutant)
    share = killed / max(1, total - argued)
    print(f"{killed} of {total} rejected; {argued} argued equivalent: {share:.1%} of the rest", flush=True)
    return 0 if share >= options.floor else 1


def _argued(target: Target, mutant: Mutant) -> bool:
    return reason(target.module, mutant.where, mutant.before, mutant.after) is not None


if __name__ == "__main__":
    sys.exit(main())

"""Try the claims on other libraries and write a page of what holds: ``python -m proofs.peers PAGE.md``.

Adapters that cannot run here are left out, unless ``--add`` names JSON reports of ``python -m proofs --json`` that were
made elsewhere, on a machine with a GPU for example.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from proofs import adapters, claims, report, runner
from proofs._claim import Sample
from proofs.subjects import load_function, user_subject

__all__ = ["main", "run_peer"]

_DISTRIBUTIONS = {
    "ot": "POT",
    "hyper_connections": "hyper-connections",
    "transformers": "transformers",
    "liger_kernel": "liger-kernel",
    "tile_kernels": "tile-kernels",
}

_HEAD = """# What other projections do

This page is written by `python -m proofs.peers`; do not edit it. The same claims that this library is held to are tried
on the projections of other libraries, through the adapters of `proofs/adapters.py`; written on {date}.

**A cross is not a bug report.** A library that adds eps to its sums, or stops at a tolerance, computes another function
on purpose; the table says in which statements the difference shows. What a cross does mean: code that relies on that
statement must not rely on that function.

`holds`: not refuted by the examples tried: profile `quick` tries 20 stacks of them for a claim, `ci` 50. `BROKEN`:
refuted; the smallest failing example found is below. `-`: not claimed, for instance gradients of a NumPy function.
`not tried`: the run ended before, or at an n that the function does not take, or had no memory left on a device that
others used as well; none of them is a breach. A breach may be an error, which its reason names.
"""


def run_peer(peer: adapters.Peer, profile: runner.Profile) -> list[dict[str, Any]]:
    """Try every claim about projections on one adapter; returns the records of a JSON report."""
    subject = user_subject(
        load_function(f"proofs.adapters:{peer.function}"),
        name=f"proofs.adapters:{peer.function}",
        last=peer.last,
        backend_name=peer.backend,
        num_iters=peer.num_iters,
        dtypes=peer.dtypes,
        sizes=peer.sizes,
    )
    outcomes = runner.run(claims.PROJECTION_CLAIMS, [subject], profile)
    return [report.as_record(outcome) for outcome in outcomes]


def _excused(record: dict[str, Any]) -> dict[str, Any]:
    """What a device had no memory for was not tried: others used it at the same time."""
    if record["verdict"] == "broken" and "out of memory" in record["reason"]:
        return {**record, "verdict": "not tried", "failing": None}
    return record


def _version(package: str) -> str:
    name = _DISTRIBUTIONS[package]
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return name


def _page(
    results: dict[str, list[dict[str, Any]]],
    versions: dict[str, str],
    sizes: dict[str, list[int]],
    profiles: dict[str, str],
) -> str:
    peers = [peer for peer in adapters.PEERS if peer.function in results]
    lines = [_HEAD.format(date=datetime.date.today().isoformat()), "## The projections", ""]
    lines += ["| name | what is called | package | last side | dtypes | n | profile |", "|---|---|---|---|---|---|---|"]
    for peer in peers:
        dtypes = ", ".join(peer.dtypes) if peer.dtypes else "all that the backend has"
        tried = sizes.get(peer.function) or peer.sizes
        tried_sizes = ", ".join(map(str, tried)) if tried else "any"
        version = versions[peer.function]
        facts = version, peer.last, dtypes, tried_sizes, profiles[peer.function]
        lines.append(f"| `{peer.function}` | {peer.about} | {' | '.join(facts)} |")
    lines += ["", "## Which claim holds for which", ""]
    lines += ["| claim | " + " | ".join(f"`{peer.function}`" for peer in peers) + " |"]
    lines += ["|---|" + "---|" * len(peers)]
    words = {"holds": "holds", "broken": "**BROKEN**", "not claimed": "-", "not tried": "not tried"}
    table = {peer.function: {record["claim"]: record for record in results[peer.function]} for peer in peers}
    for claim in claims.PROJECTION_CLAIMS:
        records = [table[peer.function].get(claim.name) for peer in peers]
        cells = ["not tried" if record is None else words[record["verdict"]] for record in records]
        if set(cells) & {"holds", "**BROKEN**"}:
            lines.append(f"| {claim.name} | " + " | ".join(cells) + " |")
    lines += ["", "## Smallest failing examples", ""]
    for peer in peers:
        broken = [record for record in results[peer.function] if record["verdict"] == "broken"]
        tried = sum(record["examples"] for record in results[peer.function])
        lines += [f"### {peer.function}", "", f"{tried:,} matrices tried, {len(broken)} claims broken.", ""]
        for record in broken:
            seen, allowed = (f"{float(record[key]):.3g}" for key in ("seen", "allowed"))
            lines += [f"- **{record['claim']}**: seen {seen}, allowed {allowed} ({record['reason']})", ""]
            if record["failing"] is None:
                continue
            sample = Sample.from_record(record["failing"])
            lines += [
                "  ```text",
                *(f"  {line}" for line in f"logits = {report.describe(sample)}".splitlines()),
                "  ```",
                "",
            ]
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m proofs.peers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("page", type=Path, help="the Markdown file to write")
    parser.add_argument("--profile", choices=tuple(runner.PROFILES), default="quick")
    parser.add_argument("--add", type=Path, nargs="*", default=[], metavar="JSON", help="reports made elsewhere")
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="keep each report there, for --add")
    options = parser.parse_args(arguments)
    results: dict[str, list[dict[str, Any]]] = {}
    versions: dict[str, str] = {}
    sizes: dict[str, list[int]] = {}
    profiles: dict[str, str] = {}
    packages = {peer.function: peer.package for peer in adapters.PEERS}
    for path in options.add:
        try:
            document = report.load(path)
        except ValueError as error:
            parser.error(str(error))
        name = str(document["settings"]["projection"]).rpartition(":")[2]
        if name not in packages:
            parser.error(f"{path} is a report of {name}, which is none of {', '.join(packages)}")
        package = _DISTRIBUTIONS[packages[name]]
        results[name] = [_excused(record) for record in document["outcomes"]]
        sizes[name] = document["settings"].get("size") or []
        profiles[name] = document["settings"]["profile"]
        found = document["versions"]
        versions[name] = f"{package} {found.get(package, '')}".strip() + f" on {found.get('device', 'a CPU')}"
    for peer in adapters.PEERS:
        reason = peer.missing()
        if peer.function in results:
            continue
        if reason:
            print(f"{peer.function}: left out, {reason}")
            continue
        profiles[peer.function] = options.profile
        results[peer.function] = run_peer(peer, runner.PROFILES[options.profile])
        if options.json:
            facts = report.about({"projection": f"proofs.adapters:{peer.function}", "profile": options.profile})
            document = {**facts, "outcomes": results[peer.function]}
            (options.json / f"{peer.function}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        versions[peer.function] = _version(peer.package)
        print(f"{peer.function}: {sum(r['verdict'] == 'broken' for r in results[peer.function])} claims broken")
    options.page.write_text(_page(results, versions, sizes, profiles), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Write the page of all claims, ``python -m proofs.page PAGE.md``; of all theorems: ``--theorems``; of measurements:
``--measured``, ``--report``.
"""

from __future__ import annotations

import argparse
import collections
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from proofs import claims, docstrings, report, theorems
from proofs._claim import Claim
from proofs.properties import PROPERTIES

__all__ = ["main", "render", "render_measured", "render_report", "render_theorems"]

_SHOWN = ("python", "machine", "device")

_FAMILIES: dict[str, tuple[str, str]] = {
    "marginals": ("Sums and entries", "sinkhorn_knopp, rounding_errors"),
    "spectral_norm": ("Spectral norm", "spectral_norm_certificate"),
    "closure": ("Products", "spectral_norm_certificate"),
    "identity": ("Known answers and symmetries", "sinkhorn_knopp"),
    "roundoff": ("Rounding", "rounding_errors, log_domain"),
    "gradients": ("Gradients", "exact_adjoint"),
    "batch": ("Behaviour", ""),
    "euclidean": ("Euclidean projection", "euclidean_projection"),
    "certificate": ("Certificates", "spectral_norm_certificate"),
    "rounding": ("Finishes", "rounding_to_the_polytope"),
    "decomposition": ("Decomposition", "birkhoff_von_neumann"),
    "parametrization": ("Parametrizations", "parametrizations"),
    "layer": ("The layer", "layer_forward, layer_backward"),
    "trained": ("Trained models", "spectral_norm_certificate, layer_forward"),
}
"""Heading and derivation pages of each family."""

_HEAD = """# The claims

This page is written by `python -m proofs.page`; do not edit it. It lists every statement that the library makes about
its numbers: {count} claims, {lemmas} machine-checked lemmas behind them ({doc}`theorems`).

How to read an entry:

- **Domain**: the inputs that the statement is about. Outside of it nothing is claimed.
- **Checked by**: `exact` means decided without rounding on each example, `enclosure` by ball arithmetic on each
  example, `sampled` by floating-point measurement on each example. In all three cases the *examples* are samples of the
  domain: a claim that holds has not been refuted, which is no proof. What is proved is the lemma, about real numbers.
- **Lemma**: the theorem about exact arithmetic that the statement rests on, word for word on {doc}`statements`. It does
  not cover `exp`, a compiler, or that the code computes the model; that gap is what the examples look for.
- **Promised by**: the functions and classes whose documentation links to the claim.
- u is the unit roundoff of the dtype that is computed in: 2^-53 for float64, 2^-24 for float32 and half precisions.
  The *accuracy contract* is 4 n u max(1, logit range / 16). Two results of one input may differ by twice the contract:
  four times that where a finish follows or the distance is Euclidean, and by 4 n 1e-6 more where a limit is computed.

Every claim is tried on code that is wrong in its way and must reject it: `tests/proofs/test_broken_projections.py`,
`tests/proofs/test_broken_systems.py` and `tests/proofs/test_broken_models.py`. {doc}`how_claims_are_checked` says
more, and {doc}`peers` shows the same claims on other libraries.
""".replace("{doc}", "{{doc}}")


_THEOREMS = """# The theorems, word for word

This page is written by `python -m proofs.page --theorems` from the sources in `proofs/formal`; do not edit it. It holds
the {count} lemmas as the prover reads them, in their order, with the definitions that they speak of and without their
proofs. {doc}`theorems` says in words what the important ones mean, and what they do not cover.

`R` is any ordered field, `n` any size, `'M[R]_n` an n x n matrix over R, `*m` its product, `^T` its transpose. A
`Variable` or `Hypothesis` is a premise of every lemma after it that uses it, up to the end of its section: no lemma
rests on an axiom, which `make formal` checks for each.
""".replace("{doc}", "{{doc}}")

_MEASURED = """# Measured: the claims

This page is written by `python -m proofs.page --measured` from reports of `python -m proofs --json`, profile `ci`.
{doc}`/explanation/guarantees/claims` says what each claim states, {doc}`claims_on_a_gpu` what the runs on a GPU found.
100 % would be a deviation as large as the claim allows.
"""

_REPORT = """# Claims, measured: {devices}

Command: `python -m proofs {command}`. {date}, commit {commit}, {processors} processors, {wall} s from start to
end{spent}.

{held} hold, {broken} broken, {skipped} not claimed, {left} not tried; {matrices:,} matrices. `seen / allowed` is the
example that came closest to breaking the claim.
"""


def _lemmas(claim: Claim) -> list[str]:
    return [name for name in (claim.lemma, *claim.lemmas) if name is not None]


def _entry(claim: Claim) -> list[str]:
    lemmas = ", ".join(map(_lemma_link, _lemmas(claim))) or "none"
    promised = ", ".join(f"{{py:obj}}`{name}`" for name in docstrings.promises().get(claim.name, ()))
    return [
        f"(claim-{claim.name.replace('_', '-')})=",
        f"### {claim.name}",
        "",
        _plain(claim.statement),
        "",
        f"- Domain: {_plain(claim.domain)}.",
        f"- Checked by: `{claim.provenance}`; {_plain(claim.method)}.",
        f"- Lemma: {lemmas}.",
        f"- From: {_plain(claim.reference)}.",
        *([f"- Promised by: {promised}."] if promised else []),
        "",
    ]


def _plain(text: str) -> str:
    """Keep Markdown from reading formulas as markup."""
    for character in ("_", "*", "|", "<", ">", "[", "]", "$"):
        text = text.replace(character, f"\\{character}")
    return text


def render() -> str:
    """Return the page."""
    named = {name for claim in claims.CLAIMS for name in _lemmas(claim)}
    lines = [_HEAD.format(count=len(claims.CLAIMS), lemmas=len(named))]
    for family, (heading, derivations) in _FAMILIES.items():
        chosen = claims.select([family])
        lines += [f"(claims-{family.replace('_', '-')})=", f"## {heading}", "", f"Module `proofs.{family}`.", ""]
        if derivations:
            pages = ", ".join(f"{{doc}}`/derivations/{page.strip()}`" for page in derivations.split(","))
            lines += [f"Derivation: {pages}.", ""]
        for claim in chosen:
            lines += _entry(claim)
    lines += _properties()
    lines += ["## Lemma by lemma", "", "| lemma | claims that rest on it |", "|---|---|"]
    for name in sorted(named):
        lines.append(f"| {_lemma_link(name)} | {_links(c.name for c in claims.CLAIMS if name in _lemmas(c))} |")
    return "\n".join(lines).rstrip() + "\n"


def _links(names: Iterable[str]) -> str:
    return ", ".join(f"[{_plain(name)}](#claim-{name.replace('_', '-')})" for name in names)


def _lemma_link(name: str) -> str:
    return f"[`{name}`](#lemma-{name.replace('_', '-')})"


def render_theorems() -> str:
    """Return the page of the theorems' statements, read from the sources."""
    found = theorems.lemmas()
    lines = [_THEOREMS.format(count=len(found))]
    for file in theorems.FILES:
        lines += [f"## {file}.v", "", _plain(theorems.introduction(file)), ""]
        for entry in theorems.entries(file):
            if entry.name:
                lines += [f"(lemma-{entry.name.replace('_', '-')})=", f"### {entry.name}", ""]
            if entry.says:
                lines += [_plain(entry.says), ""]
            if not (entry.name or entry.says) and lines[-2:] == ["```", ""]:
                lines[-2:] = [entry.text, "```", ""]  # one block of definitions
                continue
            lines += ["```coq", entry.text, "```", ""]
            resting = [claim.name for claim in claims.CLAIMS if entry.name and entry.name in _lemmas(claim)]
            if resting:
                lines += [f"Claims: {_links(resting)}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _properties() -> list[str]:
    lines = [
        "## Property by property",
        "",
        "What a projection should do, what a breach looks like, who looks for it.",
        "",
    ]
    lines += ["| | property | catches | claims |", "|---|---|---|---|"]
    lines += [
        f"| P{one.number} | {_plain(one.statement)} | {_plain(one.catches)} | {_links(one.claims)} |"
        for one in PROPERTIES
    ]
    return [*lines, ""]


def render_measured(paths: Sequence[Path]) -> str:
    """Return a page of what the reports of ``python -m proofs --json`` hold, a table for each backend."""
    latest: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    runs: dict[str, list[dict[str, Any]]] = {}
    for path in paths:
        document = report.load(path)
        for record in document["outcomes"]:
            backend = _backend(record)
            known = latest.setdefault(backend, {})
            key = record["claim"], record["subject"]
            if record["verdict"] == "not tried":
                known.setdefault(key, record)
            else:
                known[key] = record  # a later report counts
            if document not in runs.setdefault(backend, []):
                runs[backend].append(document)
    lines = [_MEASURED]
    for backend, found in latest.items():
        lines += [f"## {backend}", "", *_by_family(list(found.values()), runs[backend]), ""]
    return "\n".join(lines).rstrip() + "\n"


def render_report(path: Path) -> str:
    """Return what one report of ``python -m proofs --json`` holds: a table of backends, and a row for each claim."""
    document = report.load(path)
    records, settings = document["outcomes"], document["settings"]
    verdicts = collections.Counter(record["verdict"] for record in records)
    backends = list(dict.fromkeys(_backend(record) for record in records))
    lines = [
        _REPORT.format(
            devices=document["versions"].get("device", document["versions"]["machine"]),
            command=_command(settings),
            date=document["date"],
            commit=document["commit"] or "unknown",
            processors=document["processors"],
            wall=settings["wall_seconds"],
            spent=_processor(settings),
            held=verdicts["holds"],
            broken=verdicts["broken"],
            skipped=verdicts["not claimed"],
            left=settings["not_tried"],
            matrices=sum(record["examples"] for record in records),
        )
    ]
    for backend in backends:
        lines += [f"## {backend}", "", *_by_family([r for r in records if _backend(r) == backend], [document]), ""]
    lines += ["## Claim by claim", "", "| claim | " + " | ".join(backends) + " | closest |"]
    lines.append("|---|" + "---|" * len(backends) + "---|")
    for name in dict.fromkeys(record["claim"] for record in records):
        claimed = [r for r in records if r["claim"] == name and r["verdict"] != "not claimed"]
        if claimed:
            cells = [_cell([record for record in claimed if _backend(record) == backend]) for backend in backends]
            tried, closest = _tried(claimed), "-"
            if tried:
                top = max(tried, key=_ratio)
                closest = f"{float(top['seen']):.2g} / {float(top['allowed']):.2g}, {top['subject']}"
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {closest} |")
    return "\n".join(lines).rstrip() + "\n"


def _backend(record: dict[str, Any]) -> str:
    return str(record["subject"]).rpartition(" on ")[2]


def _tried(group: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in group if record["verdict"] in ("holds", "broken")]


def _cell(group: list[dict[str, Any]]) -> str:
    counts = collections.Counter(record["verdict"] for record in group)
    held, broken, left = counts["holds"], counts["broken"], counts["not tried"]
    parts = (
        f"**broken {broken}/{held + broken}**" if broken else f"{held} hold" if held else "",
        f"{left} not tried" if left else "",
    )
    return ", ".join(filter(None, parts)) or "-"


_OPTIONS = (
    "projection", "last", "num_iters", "backend", "dtype", "size", "solver", "claim",
    "profile", "seed", "jobs", "seconds",
)  # fmt: skip


def _command(settings: dict[str, Any]) -> str:
    """The options that a run was given, as they are typed."""
    words = []
    for name in _OPTIONS:
        given = settings.get(name)
        if name == "last" and settings.get("projection") is None:
            continue  # a default that says nothing of this library
        for value in given if isinstance(given, list) else [] if given is None else [given]:
            words += [f"--{name.replace('_', '-')}", f"{value:g}" if isinstance(value, float) else str(value)]
    return " ".join(words)


def _by_family(found: list[dict[str, Any]], runs: list[dict[str, Any]]) -> list[str]:
    """A line of counts and versions, a row for each family, and what is broken."""
    tried = _tried(found)
    broken = [record for record in tried if record["verdict"] == "broken"]
    left = sum(record["verdict"] == "not tried" for record in found)
    counts = f"{len(tried) - len(broken)} hold, {len(broken)} broken" + (f", {left} not tried" if left else "")
    versions = {name: text for name, text in runs[-1]["versions"].items() if name in (*_SHOWN, *report.OWN)}
    spent = ", then ".join(_spent(document) for document in runs)
    lines = [
        f"{counts}; {sum(r['examples'] for r in tried):,} matrices in "
        f"{sum(r['seconds'] for r in tried):.0f} s of claims; {spent}. {runs[-1]['date']}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
        "",
        "| family | claims x subjects | broken | matrices | closest to its allowance |",
        "|---|---|---|---|---|",
    ]
    for family in _FAMILIES:
        group = [record for record in tried if record["family"] == family]
        if not group:
            continue
        closest = max(group, key=_ratio)
        lines.append(
            f"| {family} | {len(group)} | {sum(r['verdict'] == 'broken' for r in group)} | "
            f"{sum(r['examples'] for r in group):,} | {100 * _ratio(closest):.3g} %: {_plain(closest['claim'])}, "
            f"{closest['subject'].rpartition(' on ')[0]} |"
        )
    return [*lines, "", *(f"- broken: {_plain(r['claim'])}, {r['subject']}: {_plain(r['reason'])}" for r in broken)]


def _spent(document: dict[str, Any]) -> str:
    settings = document["settings"]
    return (
        f"the whole run {settings['wall_seconds']:.0f} s with {settings['jobs']} at a time{_processor(settings)}, "
        f"commit {(document['commit'] or 'unknown')[:7]}"
    )


def _processor(settings: dict[str, Any]) -> str:
    """Nothing for a run that was cut: what its processes used is known of those only that had ended."""
    return "" if settings["not_tried"] else f", {settings['processor_seconds']:.0f} s of processor time"


def _ratio(record: dict[str, Any]) -> float:
    seen, allowed = float(record["seen"]), float(record["allowed"])
    return seen / allowed if allowed else (0.0 if seen <= 0 else float("inf"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m proofs.page", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("page", type=Path, help="the Markdown file to write")
    parser.add_argument(
        "--measured", type=Path, nargs="+", metavar="JSON", help="write what these reports hold instead"
    )
    parser.add_argument("--theorems", action="store_true", help="write the statements of the theorems instead")
    parser.add_argument("--report", type=Path, metavar="JSON", help="write what this one report holds, claim by claim")
    options = parser.parse_args(arguments)
    try:
        if options.report:
            text = render_report(options.report)
        elif options.measured:
            text = render_measured(options.measured)
        else:
            text = render_theorems() if options.theorems else render()
    except ValueError as error:  # a file that is no report
        parser.error(str(error))
    options.page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

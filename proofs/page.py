"""Write the page of all claims, ``python -m proofs.page PAGE.md``, or of what was measured, ``--measured JSON``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from proofs import claims
from proofs._claim import Claim
from proofs.properties import PROPERTIES

__all__ = ["main", "render", "render_measured"]

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
- **Lemma**: the theorem about exact arithmetic that the statement rests on. It does not cover `exp`, a compiler, or
  that the code computes the model; that gap is what the examples look for.
- u is the unit roundoff of the dtype that is computed in: 2^-53 for float64, 2^-24 for float32 and half precisions.
  The *accuracy contract* is 4 n u max(1, logit range / 16).

Every claim is tried on code that is wrong in its way and must reject it: `tests/proofs/test_broken_projections.py`,
`tests/proofs/test_broken_systems.py` and `tests/proofs/test_broken_models.py`. {doc}`how_claims_are_checked` says
more, and {doc}`peers` shows the same claims on other libraries.
""".replace("{doc}", "{{doc}}")


_MEASURED = """# Measured: the claims

This page is written by `python -m proofs.page --measured` from reports of `python -m proofs --json`, profile `ci`.
{doc}`/explanation/guarantees/claims` says what each claim states. 100 % would be a deviation as large as the
claim allows.
"""


def _lemmas(claim: Claim) -> list[str]:
    return [name for name in (claim.lemma, *claim.lemmas) if name is not None]


def _entry(claim: Claim) -> list[str]:
    lemmas = ", ".join(f"`{name}`" for name in _lemmas(claim)) or "none"
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
        lines.append(f"| `{name}` | {_links(c.name for c in claims.CLAIMS if name in _lemmas(c))} |")
    return "\n".join(lines).rstrip() + "\n"


def _links(names: Iterable[str]) -> str:
    return ", ".join(f"[{_plain(name)}](#claim-{name.replace('_', '-')})" for name in names)


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
    versions: dict[str, dict[str, str]] = {}
    for path in paths:
        document = json.loads(path.read_text(encoding="utf-8"))
        for record in document["outcomes"]:
            backend = record["subject"].rpartition(" on ")[2]
            latest.setdefault(backend, {})[record["claim"], record["subject"]] = record  # a later report counts
            versions[backend] = document["versions"]
    lines = [_MEASURED]
    for backend, found in latest.items():
        tried = [record for record in found.values() if record["verdict"] != "not claimed"]
        broken = [record for record in tried if record["verdict"] == "broken"]
        lines += [
            f"## {backend}",
            "",
            f"{len(tried) - len(broken)} hold, {len(broken)} broken; {sum(r['examples'] for r in tried):,} matrices in "
            f"{sum(r['seconds'] for r in tried):.0f} s of claims. "
            + ", ".join(f"{name} {version}" for name, version in versions[backend].items())
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
        lines += ["", *(f"- broken: {_plain(r['claim'])}, {r['subject']}: {_plain(r['reason'])}" for r in broken), ""]
    return "\n".join(lines).rstrip() + "\n"


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
    options = parser.parse_args(arguments)
    options.page.write_text(render_measured(options.measured) if options.measured else render(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The machine-checked theorems as text, read from their sources in ``proofs/formal``.

>>> from proofs import theorems
>>> print(theorems.lemmas()["dstoch_nonexpansive"].text)
Lemma dstoch_nonexpansive A (x : 'cV[R]_n) : dstoch A -> sqn (A *m x) <= sqn x.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FILES", "Entry", "entries", "introduction", "lemmas"]

FILES: tuple[str, ...] = (
    "stochastic", "spectral", "sinkhorn", "rounding", "floatsum", "gradients", "parametrizations",
)  # fmt: skip
"""The sources, in the order in which they build on each other."""

_FORMAL = Path(__file__).with_name("formal")
_ENTRY = re.compile(
    r"""^(?:\(\*\*\ (?P<says>(?:[^*]|\*(?!\)))*)\*\)\n)?  # the comment above it
        (?P<text>Lemma\ (?P<name>\w+)(?s:.*?)\.(?=\s+Proof\b)
        |(?:Definition|Fixpoint|Inductive|Variable|Hypothesis)\b.*(?:\n\ \ .*)*\.(?=\n))""",
    re.MULTILINE | re.VERBOSE,
)


@dataclass(frozen=True)
class Entry:
    """A lemma, or a definition or hypothesis (whose `name` is empty), as the prover reads it, and its comment."""

    text: str
    name: str
    says: str


def _source(file: str) -> str:
    return (_FORMAL / f"{file}.v").read_text(encoding="utf-8")


def entries(file: str) -> Iterator[Entry]:
    """Return what one file says, in its order, proofs left out."""
    for match in _ENTRY.finditer(_source(file)):
        says = " ".join((match["says"] or "").replace("**", "").split())
        yield Entry(match["text"], match["name"] or "", says)


def lemmas() -> dict[str, Entry]:
    """Return every lemma by name, in the order of the sources."""
    return {entry.name: entry for file in FILES for entry in entries(file) if entry.name}


def introduction(file: str) -> str:
    """Return the comment that a file begins with."""
    comment = re.match(r"\(\*\* (.*?)\*\)", _source(file), re.DOTALL)
    return " ".join(comment[1].split()) if comment else ""

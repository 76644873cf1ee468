"""The machine-checked theorems: every lemma that a page names exists, and (marked `formal`) all are proved."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from proofs import page, theorems

ROOT = Path(__file__).parents[2]
FORMAL = ROOT / "proofs" / "formal"


STATED = r"^(?:Lemma|Theorem|Corollary|Fact|Remark|Proposition)\s+(\w+)"


def lemmas() -> set[str]:
    return {name for path in FORMAL.glob("*.v") for name in re.findall(STATED, path.read_text(), re.MULTILINE)}


def test_every_lemma_is_read_with_its_whole_statement() -> None:
    assert {f"{file}.v" for file in theorems.FILES} == {p.name for p in FORMAL.glob("*.v")} - {"check_axioms.v"}
    found = theorems.lemmas()
    assert set(found) == lemmas()
    sources = " ".join("\n".join(path.read_text() for path in FORMAL.glob("*.v")).split())
    for name, entry in found.items():
        flat = " ".join(entry.text.split())
        assert flat.startswith(f"Lemma {name}") and f"{flat} Proof" in sources and "Proof" not in flat, name


def test_the_committed_statements_are_those_of_the_sources() -> None:
    committed = ROOT / "docs" / "explanation" / "guarantees" / "statements.md"
    assert committed.read_text(encoding="utf-8") == page.render_theorems(), "run python -m proofs.page --theorems on it"


def test_the_page_in_words_says_what_each_file_holds() -> None:
    words = (ROOT / "docs" / "explanation" / "guarantees" / "theorems.md").read_text()
    for file in theorems.FILES:
        assert f"`{file}.v`" in words


def test_the_page_names_existing_lemmas() -> None:
    page = (ROOT / "docs" / "explanation" / "guarantees" / "theorems.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and "lemma" not in line]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[2])}
    assert len(named) >= 40
    assert named - lemmas() == set()


def test_sources_hold_no_axiom_and_no_gap() -> None:
    for path in FORMAL.glob("*.v"):
        if path.name != "check_axioms.v":
            assert not re.search(
                r"^\s*(Axiom|Parameter|Conjecture|Admitted)\b|\badmit\b", path.read_text(), re.MULTILINE
            )


@pytest.mark.formal
@pytest.mark.timeout(600)
def test_every_lemma_is_proved_without_axioms() -> None:
    subprocess.run(["make", "-C", str(FORMAL), "clean"], check=True, capture_output=True)
    output = subprocess.run(["make", "-C", str(FORMAL)], check=True, capture_output=True, text=True).stdout
    match = re.search(r"(\d+) lemmas checked, no axioms", output)
    assert match is not None and int(match.group(1)) == len(lemmas()) >= 30

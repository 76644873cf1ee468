"""The machine-checked theorems: every lemma that a page names exists, and (marked `formal`) all are proved."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORMAL = ROOT / "proofs" / "formal"


def lemmas() -> set[str]:
    return {name for path in FORMAL.glob("*.v") for name in re.findall(r"^Lemma (\w+)", path.read_text(), re.MULTILINE)}


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

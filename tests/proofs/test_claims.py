"""The list of claims itself: names, lemmas, and what holds of this library."""

from __future__ import annotations

from pathlib import Path

import pytest

from proofs import claims, docstrings, page, runner, subjects, systems
from proofs.backends import BACKENDS
from proofs.properties import PROPERTIES
from proofs.runner import Profile
from tests.proofs.test_formal import lemmas


def test_names_are_unique_and_families_are_modules() -> None:
    names = [claim.name for claim in claims.CLAIMS]
    assert len(names) == len(set(names))
    for claim in claims.CLAIMS:
        assert claim.samples.__module__ == claim.check.__module__ == f"proofs.{claim.family}", claim.name
        assert claim.statement.endswith(".") and claim.domain and claim.method and claim.reference


def test_every_lemma_that_a_claim_names_is_proved() -> None:
    named = {name for claim in claims.CLAIMS for name in (claim.lemma, *claim.lemmas) if name is not None}
    assert named - lemmas() == set()
    assert len(named) >= 30


def test_every_property_has_claims() -> None:
    assert [one.number for one in PROPERTIES] == list(range(1, 21))
    for one in PROPERTIES:
        assert one.claims and one.statement and one.catches
        for name in one.claims:
            claims.by_name(name)


def test_select_takes_names_and_families() -> None:
    assert claims.select(None) == claims.CLAIMS
    assert claims.select(["last_side_exact"]) == (claims.by_name("last_side_exact"),)
    assert {claim.family for claim in claims.select(["closure"])} == {"closure"}
    assert claims.select(["composite_gain_is_one", "closure"]) == claims.select(["closure"])
    with pytest.raises(ValueError, match="last_side_exact"):
        claims.by_name("last_side")


@pytest.mark.parametrize("backend", ["numpy", "array_api_strict", "torch"])
def test_every_claim_holds_for_this_library(backend: str) -> None:
    reason = BACKENDS[backend].missing()
    if reason:
        pytest.skip(reason)
    found = [*subjects.builtin_subjects([backend]), *systems.builtin_systems([backend])]
    chosen, effort = claims.CLAIMS, Profile("test", 3)
    if backend == "array_api_strict":  # runs NumPy's code slowly: what it adds is the calls, and that the bits agree
        chosen = tuple(one for one in claims.select(["roundoff", "batch"]) if one.name != "conformance_vectors")
        effort = Profile("test", 2)
    outcomes = runner.run(chosen, found, effort)
    broken = [f"{outcome.claim.name}: {outcome.subject}" for outcome in outcomes if outcome.verdict == "broken"]
    assert broken == []
    assert sum(outcome.verdict == "holds" for outcome in outcomes) > 50


def test_the_committed_page_is_current() -> None:
    committed = Path(__file__).parents[2] / "docs" / "explanation" / "guarantees" / "claims.md"
    assert committed.read_text(encoding="utf-8") == page.render(), "run python -m proofs.page on it"


def test_docstrings_link_to_claims_that_exist() -> None:
    pytest.importorskip("torch")
    found = docstrings.promises()
    assert set(found) <= {claim.name for claim in claims.CLAIMS} and len(found) >= 30
    assert found["last_side_exact"] == ["birkhoff.sinkhorn"]  # not once more for another name of the same object
    text = page.render()
    for name, promised in found.items():
        entry = text.split(f"(claim-{name.replace('_', '-')})=")[1].split("(claim-")[0]
        assert all(f"{{py:obj}}`{one}`" in entry for one in promised), name

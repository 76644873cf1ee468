"""Adapters to other libraries, and the page that is written from them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from proofs import adapters, claims, peers, report, runner
from proofs.runner import Profile
from proofs.subjects import user_subject


@pytest.mark.parametrize("peer", adapters.PEERS, ids=lambda peer: peer.function)
def test_adapters_return_matrices_that_nearly_sum_to_one(peer: adapters.Peer) -> None:
    reason = peer.missing()
    if reason:
        pytest.skip(reason)
    backend = user_subject(lambda x: x, name="", backend_name=peer.backend).backend
    logits = backend.asarray(0.1 * np.random.default_rng(0).standard_normal((2, 3, 4, 4)), "float32")
    matrix = backend.asnumpy(getattr(adapters, peer.function)(logits))
    assert matrix.shape == (2, 3, 4, 4)
    for axis in (-1, -2):
        assert np.abs(matrix.sum(axis=axis) - 1).max() < 1e-4
    last = np.abs(matrix.sum(axis=-1 if peer.last == "rows" else -2) - 1).max()
    assert last < 5e-6


def test_every_adapter_is_exported_and_described() -> None:
    assert {peer.function for peer in adapters.PEERS} <= set(adapters.__all__)
    for peer in adapters.PEERS:
        assert peer.last in ("rows", "columns") and peer.about and getattr(adapters, peer.function).__doc__


def test_the_page_shows_verdicts_and_examples_made_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(logits: np.ndarray) -> np.ndarray:
        return np.full_like(logits, 1 / logits.shape[-1])

    subject = user_subject(wrong, name="liger", last="columns")
    chosen = claims.select(["last_side_exact", "kl_projection_of_small_logits"])
    outcomes = runner.run(chosen, [subject], Profile("test", 5, shrink_budget=50))
    stored, page = tmp_path / "liger.json", tmp_path / "peers.md"
    report.write_json(stored, outcomes, report.about({"projection": "proofs.adapters:liger", "profile": "ci"}))
    monkeypatch.setattr(adapters.Peer, "missing", lambda self: "left out of this test")
    assert peers.main([str(page), "--add", str(stored)]) == 0
    text = page.read_text()
    assert "| last_side_exact | holds |" in text
    assert "| kl_projection_of_small_logits | **BROKEN** |" in text
    assert "permutation_equivariance" not in text  # nobody tried it
    assert "logits = [[[" in text and "`lucidrains`" not in text
    assert json.loads(stored.read_text())["outcomes"][0]["claim"] == "last_side_exact"

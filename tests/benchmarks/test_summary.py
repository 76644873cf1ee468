"""README and the measured pages say what the committed reports say."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")

from benchmarks import summary


@pytest.mark.parametrize("page", summary.pages(), ids=lambda page: page.name)
def test_pages_quote_the_committed_reports(page: Path) -> None:
    text = page.read_text()
    assert summary.fill(text) == text, f"python -m benchmarks summary rewrites {page.name}"


def test_every_block_is_on_a_page() -> None:
    text = "".join(page.read_text() for page in summary.pages())
    assert [name for name in summary.BLOCKS if f"<!-- measured: {name} -->" not in text] == []


def test_only_what_is_between_the_marks_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(summary.BLOCKS, "x", lambda: ["new"])
    text = "before\n<!-- measured: x -->\nold\n<!-- end -->\nafter <!-- end -->\n"
    filled = "before\n<!-- measured: x -->\n\nnew\n\n<!-- end -->\nafter <!-- end -->\n"
    assert summary.fill(text) == filled == summary.fill(filled)
    with pytest.raises(KeyError):
        summary.fill(text.replace("x", "y"))


def test_a_block_without_its_report_is_empty_or_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(summary, "ROOT", tmp_path)
    assert summary.BLOCKS["which solver"]() == ["Not measured yet."]
    assert len(summary.BLOCKS["readme"]()) == 2 and summary.BLOCKS["training"]() == []

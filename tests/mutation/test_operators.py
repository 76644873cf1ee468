"""The mutation operators, and the list of mutants that are argued to be equivalent."""

from __future__ import annotations

import pytest

from tests.mutation.__main__ import TARGETS
from tests.mutation.equivalent import EQUIVALENT
from tests.mutation.operators import mutants


def test_operators_change_one_thing_each_and_leave_texts_alone() -> None:
    source = '''
def clip(x, low: int = 0):
    """Text with 1 < 2."""
    if x < low:
        raise ValueError(f"got {x + 1}")
    return -1 * x
'''
    found = [(mutant.kind, mutant.before, mutant.after) for mutant in mutants(source)]
    assert ("comparison", "x < low", "x <= low") in found
    assert ("constant", "0", "1") in found
    assert ("axis", "-1", "-2") in found
    assert ("arithmetic", "-1 * x", "-1 / x") in found
    assert not any("Text" in before or "got" in before for _, before, _ in found if "if" not in before)
    for mutant in mutants(source):
        compile(mutant.source, "mutant", "exec")
        assert mutant.source != source


@pytest.mark.slow
def test_every_argued_mutant_exists() -> None:
    found = {
        (target.module, mutant.where, mutant.before, mutant.after)
        for target in TARGETS
        for mutant in mutants(target.path.read_text(encoding="utf-8"))
    }
    listed = {(entry.module, *change) for entry in EQUIVALENT for change in entry.changes}
    assert listed - found == set(), "the code has changed: take these from tests/mutation/equivalent.py"

"""The mutation operators, and the list of mutants that are argued to be equivalent."""

from __future__ import annotations

import types
from pathlib import Path

import pytest

from tests.mutation.equivalent import EQUIVALENT
from tests.mutation.operators import mutants
from tests.mutation.patch import can_change, change_code
from tests.mutation.targets import TARGETS


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


def test_an_identity_moves_with_its_function() -> None:
    one, other = ("def f(x):\n    return x + 1\n", "def g(x):\n    return x - 1\n")
    identities = [{m.identity for m in mutants(source)} for source in (one + other, other + one)]
    assert identities[0] == identities[1] and len(identities[0]) == len(list(mutants(one + other)))
    changed = {m.identity for m in mutants(one + other.replace("- 1", "- 2"))}
    assert len(identities[0] & changed) == len(list(mutants(one)))


SOURCE = """
from functools import cache

LIMIT = 3
_OFFSET = 10

@cache
def double(x):
    return 2 * x

class Scale:
    factor = 2

    @property
    def shown(self):
        return self.factor + LIMIT + _OFFSET

    @staticmethod
    def halve(x):
        return x / 2
"""


def test_changed_code_reaches_every_name_of_a_function(tmp_path: Path) -> None:
    (tmp_path / "changed.py").write_text(SOURCE, encoding="utf-8")
    module = types.ModuleType("changed")
    module.__file__ = str(tmp_path / "changed.py")
    exec(SOURCE, module.__dict__)
    kept, instance = module.double, module.Scale()
    assert (kept(4), instance.shown, instance.halve(4)) == (8, 15, 2)
    changed = SOURCE.replace("2 * x", "3 * x").replace("factor + LIMIT", "factor - LIMIT").replace("x / 2", "x / 4")
    changed = changed.replace("_OFFSET = 10", "_OFFSET = 20")
    assert can_change(SOURCE, changed)
    change_code(module, changed)
    assert (kept(4), instance.shown, instance.halve(4)) == (12, 19, 1)
    for before, after in (("LIMIT = 3", "LIMIT = 4"), ("factor = 2", "factor = 3"), ("@cache\n", "")):
        assert not can_change(SOURCE, SOURCE.replace(before, after))


@pytest.mark.slow
def test_every_argued_mutant_exists() -> None:
    found = {
        (target.module, mutant.where, mutant.before, mutant.after)
        for target in TARGETS
        for mutant in mutants(target.path.read_text(encoding="utf-8"))
    }
    listed = {(entry.module, *change) for entry in EQUIVALENT for change in entry.changes}
    assert listed - found == set(), "the code has changed: take these from tests/mutation/equivalent.py"

"""The pytest plugin, in a pytest of its own; and that it imports nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

TESTS = """
import numpy as np

def projection(logits):
    matrix = np.exp(logits - logits.max(axis=(-2, -1), keepdims=True, initial=-np.inf))
    for _ in range(20):
        matrix = matrix / matrix.sum(axis=-2, keepdims=True)
        matrix = matrix / matrix.sum(axis=-1, keepdims=True)
    return matrix

def test_rows(verify_projection):
    verify_projection(projection, last="rows", claims=["small_logits_converge", "input_is_not_written"])

def test_columns(verify_projection):
    verify_projection(projection, last="columns", claims=["last_side_exact"])

def test_small(verify_projection):
    verify_projection(projection, sizes=(4,), dtypes=("float64",), claims=["small_logits_converge"])

def test_nothing(verify_projection):
    verify_projection(projection, claims=["double_backward_works"])

def test_another_kind(verify_projection):
    verify_projection(projection, claims=["certificate"])

def test_each(birkhoff_claim):
    if birkhoff_claim.name in ("small_logits_converge", "two_by_two_closed_form", "double_backward_works"):
        birkhoff_claim.check(projection)
"""


def _pytest(folder: Path, *arguments: str) -> str:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(folder),
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False).stdout


def test_fixtures_verify_and_explain(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(TESTS)
    loaded = _pytest(tmp_path, "--birkhoff-profile", "quick", "test_mine.py")
    assert "last_side_exact is broken by projection" in loaded
    assert "logits = [[[" in loaded
    assert "3 failed" in loaded and "1 skipped" in loaded
    assert "nothing to verify" in loaded and "not about projections" in loaded
    assert "its backend has no automatic differentiation" in loaded


WRONG_OPTIONS = """
import pytest

def projection(logits):
    return logits

@pytest.mark.parametrize("options", [
    {"last": "row"}, {"backend": "nonsense"}, {"num_iters": 0}, {"sizes": 4}, {"sizes": (33,)}, {"sizes": ()},
    {"dtypes": "float32"}, {"claims": "marginals"}, {"claims": ["nonsense"]},
])
def test_options(verify_projection, options):
    with pytest.raises(ValueError, match="give|choose|prints all"):
        verify_projection(projection, **options)

@pytest.mark.parametrize("wrong", [3, None, lambda: 0, lambda x, y: x])
def test_functions(verify_projection, wrong):
    with pytest.raises(ValueError, match="function of an array|cannot be called"):
        verify_projection(wrong)
"""


def test_wrong_options_are_said_before_a_claim_is_tried(tmp_path: Path) -> None:
    (tmp_path / "test_options.py").write_text(WRONG_OPTIONS)
    assert "13 passed" in _pytest(tmp_path, "test_options.py")


@pytest.mark.parametrize("fixture", ["verify_projection", "birkhoff_claim"])
def test_what_is_not_installed_is_named_in_one_line(fixture: str, tmp_path: Path) -> None:
    (tmp_path / "hypothesis").mkdir()
    (tmp_path / "hypothesis" / "__init__.py").write_text("raise ModuleNotFoundError('no', name='hypothesis')")
    (tmp_path / "test_mine.py").write_text(
        f"def test_mine({fixture}):\n    {fixture}(abs)\n\ndef test_other():\n    pass"
    )
    said = _pytest(tmp_path, "-p", "no:hypothesispytest", "test_mine.py")
    assert "hypothesis is not installed; pip install 'birkhoff-mhc[proofs]'" in said and "Traceback" not in said
    assert len(said.splitlines()) < 12, said


def test_the_plugin_is_light() -> None:
    code = (
        "import sys, proofs.pytest_plugin\n"
        "heavy = {'numpy', 'torch', 'hypothesis', 'rich', 'birkhoff', 'flint', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

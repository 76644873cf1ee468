"""The repository itself: the README runs, its commands exist, and the top level holds what it should."""

from __future__ import annotations

import doctest
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = {"birkhoff", "mhc_layers", "proofs", "tests", "docs", "benchmarks"}
SMALL_FILES = {
    "README.md", "pyproject.toml", "Makefile", "LICENSE", "CONTRIBUTING.md", "CITATION.cff", "CHANGELOG.md",
    "constraints-ci.txt",
}  # fmt: skip


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [name for name in listed.splitlines() if (ROOT / name).exists()]


def test_top_level_holds_the_rooms_and_customary_files_only() -> None:
    top = {name.split("/")[0] for name in tracked()}
    assert {name for name in top if not name.startswith(".")} == ROOMS | SMALL_FILES


def test_readme_examples_run() -> None:
    text = (ROOT / "README.md").read_text()
    examples = "\n".join(re.findall(r"```(?:python|pycon)\n(.*?)```", text, flags=re.DOTALL))
    test = doctest.DocTestParser().get_doctest(examples, {}, "README.md", "README.md", 0)
    assert len(test.examples) >= 5
    failures = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed
    assert failures == 0


def test_readme_commands_are_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    readme = (ROOT / "README.md").read_text()
    named = set(re.findall(r"`?make ([a-z-]+)", readme))
    assert {"train", "test"} <= named <= targets
    # `.ci/run` runs the README's test command.
    assert re.search(r"^make test$", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)


def test_no_file_is_a_drawer() -> None:
    drawers = {"utils.py", "util.py", "common.py", "helpers.py", "misc.py"}
    assert [name for name in tracked() if name.split("/")[-1] in drawers] == []

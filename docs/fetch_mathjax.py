"""Puts MathJax 3 into `_static/mathjax` so that the built pages show formulas offline.

Uses npm when the machine has it. Without npm the pages load MathJax from Sphinx's default address instead:
nothing else of the build changes.
"""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "mathjax@3.2.2"
TARGET = Path(__file__).parent / "_static" / "mathjax"


def main() -> None:
    if (TARGET / "tex-chtml-full.js").exists():
        return
    npm = shutil.which("npm")
    if npm is None:
        print("npm not found: formulas in the built pages need a network connection")
        return
    with tempfile.TemporaryDirectory() as folder:
        packed = subprocess.run([npm, "pack", "--silent", PACKAGE], cwd=folder, capture_output=True, text=True)
        if packed.returncode != 0:
            print(f"npm pack {PACKAGE} failed; formulas in the built pages need a network connection")
            return
        with tarfile.open(Path(folder) / packed.stdout.strip().splitlines()[-1]) as archive:
            archive.extractall(folder, filter="data")
        shutil.copytree(Path(folder) / "package" / "es5", TARGET)


if __name__ == "__main__":
    main()

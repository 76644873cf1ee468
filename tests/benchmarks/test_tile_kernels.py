"""TileKernels is importable with a tilelang that has moved what it imports."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from benchmarks import tile_kernels


@pytest.mark.skipif(importlib.util.find_spec("tilelang") is not None, reason="the real tilelang is installed")
@pytest.mark.parametrize("where", ["utils", "backend"])
def test_the_moved_module_is_found(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("utils", "backend"):
        (tmp_path / "tilelang" / folder).mkdir(parents=True)
        (tmp_path / "tilelang" / folder / "__init__.py").touch()
    (tmp_path / "tilelang" / "__init__.py").touch()
    (tmp_path / "tilelang" / where / "target.py").write_text(f"PLACE = {where!r}\n")
    (tmp_path / "needs_target.py").write_text("from tilelang.utils.target import PLACE\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert where == tile_kernels.load("needs_target").PLACE
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] in ("tilelang", "needs_target")]:
            del sys.modules[name]

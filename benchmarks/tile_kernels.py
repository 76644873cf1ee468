"""TileKernels 1.0.0 with the tilelang that has moved a module which it imports."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

__all__ = ["load"]


def load(module: str) -> ModuleType:
    """Import a module of TileKernels; ``tilelang.utils.target`` is found where tilelang 0.1.15 has it."""
    if importlib.util.find_spec("tilelang.utils.target") is None:
        sys.modules["tilelang.utils.target"] = importlib.import_module("tilelang.backend.target")
    return importlib.import_module(module)

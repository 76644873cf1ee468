"""Which docstrings promise which claims.

A docstring of the library links to the claims that hold the code to its word; the page of all claims links back.

>>> from proofs import docstrings
>>> docstrings.promises()["product_certificate_holds"]
['birkhoff.certify_product']
"""

from __future__ import annotations

import importlib
import inspect
import re

__all__ = ["MODULES", "promises"]

MODULES: tuple[str, ...] = (
    "birkhoff", "birkhoff.solvers", "birkhoff.adjoints", "birkhoff.rounding", "mhc_layers",
)  # fmt: skip
"""Modules whose public objects are read; what two of them export counts for the first."""

_LINK = re.compile(r":ref:`(\w+)\s+<claim-[\w-]+>`")


def promises() -> dict[str, list[str]]:
    """Return the names of the objects whose docstring links to a claim, for every claim that has such links."""
    found: dict[str, list[str]] = {}
    read: set[int] = set()
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in module.__all__:
            promised = getattr(module, name)
            if inspect.ismodule(promised) or id(promised) in read:
                continue
            read.add(id(promised))
            for claim in _LINK.findall(promised.__doc__ or ""):
                found.setdefault(claim, []).append(f"{module_name}.{name}")
    return found

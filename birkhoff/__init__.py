"""Doubly stochastic matrices on any array library: projection, certificates, decomposition.

>>> import numpy as np, birkhoff
>>> P = birkhoff.sinkhorn(np.random.default_rng(0).normal(size=(2, 4, 4)))
>>> P.shape, bool(abs(P.sum(axis=-1) - 1).max() < 1e-15)
((2, 4, 4), True)
"""

import importlib
import importlib.metadata
from typing import Any

from birkhoff import adjoints, errors, parametrizations, precision, solvers
from birkhoff._dispatch import explain
from birkhoff._project import project, sinkhorn
from birkhoff._result import Projection, Status
from birkhoff.certificates import Certificate, certify, certify_product
from birkhoff.decomposition import decompose, recompose
from birkhoff.precision import Precision
from birkhoff.rounding import round_to_polytope


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("birkhoff-mhc")
    if name in ("diagnostics", "large", "reference", "sparse"):  # imported when they are first used
        return importlib.import_module(f"birkhoff.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Certificate",
    "Precision",
    "Projection",
    "Status",
    "adjoints",
    "certify",
    "certify_product",
    "decompose",
    "errors",
    "explain",
    "parametrizations",
    "precision",
    "project",
    "recompose",
    "round_to_polytope",
    "sinkhorn",
    "solvers",
]

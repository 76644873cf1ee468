"""Conformance vectors: inputs with answers that need no trust in floating point, for any implementation to replay.

``iterates_exact.json``
    Logits 0 and -inf, where exp is 1 and 0: the iterate is a fraction, written ``"p/q"``.
``iterates_decimal.json``
    Logits that every floating type holds (as hexadecimal floats), and the iterate in decimals, proven to the last digit
    but one by ball arithmetic.
``matrices.json``
    Matrices of multiples of 1/16, their exact sums and roundings as fractions, and their spectral norm in decimals,
    proven by elimination over the fractions.

``python -m proofs.vectors.generate`` writes them again, byte for byte.

>>> from proofs.vectors import load
>>> exact = load("iterates_exact")
>>> exact[0]["name"], exact[0]["matrix"]
('uniform n=1', [['1']])
"""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["NAMES", "load", "logits_of", "matrix_of"]

NAMES: tuple[str, ...] = ("iterates_exact", "iterates_decimal", "matrices")


def load(name: str) -> list[dict[str, Any]]:
    """Return the cases of one file; ``ValueError`` lists the names."""
    if name not in NAMES:
        raise ValueError(f"unknown vectors {name!r}; there is {', '.join(NAMES)}")
    path = Path(__file__).with_name(f"{name}.json")
    return list(json.loads(path.read_text(encoding="utf-8"))["cases"])


def logits_of(case: dict[str, Any]) -> np.ndarray:
    """Return the logits of a case in float64, exactly."""
    return np.array([[float.fromhex(value) for value in row] for row in case["logits"]])


def matrix_of(case: dict[str, Any], key: str = "matrix") -> np.ndarray:
    """Return a stored matrix, fractions or decimals, rounded once to float64."""
    return np.array([[float(Fraction(value)) for value in row] for row in case[key]])

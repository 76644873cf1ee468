"""The array libraries that behaviour is tested on: one row each. A library that follows the standard needs no more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import array_api_strict
import numpy as np
import pytest
import torch

from birkhoff._xp import to_numpy

__all__ = ["BACKENDS", "Backend", "to_numpy"]


@dataclass(frozen=True)
class Backend:
    """``asarray`` turns a NumPy array into one of this library, on this device; ``to_numpy`` brings it back."""

    name: str
    asarray: Callable[[np.ndarray], Any]

    def __str__(self) -> str:
        return self.name


def _read_only(values: np.ndarray) -> np.ndarray:
    copy = np.array(values)
    copy.flags.writeable = False
    return copy


def _strict_device(values: np.ndarray) -> Any:
    return array_api_strict.asarray(values, device=array_api_strict.Device("device1"))


def _cupy(values: np.ndarray) -> Any:
    import cupy

    return cupy.asarray(values)


BACKENDS = [
    Backend("numpy", _read_only),
    Backend("strict", array_api_strict.asarray),
    Backend("strict_device", _strict_device),
    Backend("torch", lambda values: torch.tensor(np.array(values))),
    pytest.param(
        Backend("torch_cuda", lambda values: torch.tensor(np.array(values), device="cuda")), marks=pytest.mark.gpu
    ),
    pytest.param(Backend("cupy", _cupy), marks=pytest.mark.gpu),
]
"""For ``pytest.mark.parametrize("backend", BACKENDS, ids=str)``; the GPU rows run with ``-m gpu``."""

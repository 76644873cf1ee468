"""How processes are arranged: one named axis per technique.

"axis" is a direction of the mesh of processes, "dim" a dimension of a tensor. The axes are, from the slowest to the
fastest varying rank: ``pipeline``, ``replicate``, ``shard``, ``tensor``; so that tensor-parallel neighbours are
nearest, and pipeline stages, which talk least, are furthest apart.
"""

from __future__ import annotations

import gc
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

__all__ = ["AXES", "ParallelConfig", "World", "build_mesh", "end_process", "join_processes", "leave_processes"]

AXES = ("pipeline", "replicate", "shard", "tensor")
"""Names of the mesh axes, slowest first."""

_GROUP_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets and a group needs


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the work of a step is spread over processes and over memory.

    Parameters
    ----------
    replicate : int
        Processes that hold a full copy of their parameters and share the batch (DDP). 0 takes what the number of
        processes leaves over.
    shard : int
        Processes that share the batch and the parameters (FSDP2). 0 takes what the other axes leave over, one process
        too; 1 turns sharding off.
    tensor : int
        Processes that share the heads and hidden units of each sublayer; streams are replicated among them.
    pipeline : int
        Pipeline stages; the n streams of a token cross each border.
    micro_batches : int
        Micro-batches of a pipelined step; 0 means twice the number of stages.
    recompute : {"none", "auto"} or int
        Sites of a recompute block: the connections' intermediates are dropped and rebuilt in the backward pass, the
        sublayers are not run again. ``auto`` takes the argmin of the memory formula.

    Raises
    ------
    ValueError
        If an axis or a block is smaller than 1 (0 for ``replicate``, ``shard`` and ``micro_batches``), or ``recompute``
        is another word.
    """

    replicate: int = 0
    shard: int = 1
    tensor: int = 1
    pipeline: int = 1
    micro_batches: int = 0
    recompute: Literal["none", "auto"] | int = "none"

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("replicate", "shard", "micro_batches"):
            if getattr(self, name) < 0:
                raise ValueError(f"parallel.{name} is {getattr(self, name)}; it must be 0 (automatic) or more")
        if isinstance(self.recompute, str):
            if self.recompute not in ("none", "auto"):
                raise ValueError(f"parallel.recompute is {self.recompute!r}; accepted are 'none', 'auto' and a number")
        elif self.recompute < 1:
            raise ValueError(f"parallel.recompute is {self.recompute}; a block has 1 site or more")

    @property
    def shards(self) -> bool:
        """Whether parameters are sharded, if only over one process."""
        return self.shard != 1

    def sizes(self, world_size: int) -> dict[str, int]:
        """Return the size of each axis for a number of processes.

        Raises
        ------
        ValueError
            If the product of the axes is not the number of processes.

        Examples
        --------
        >>> from mhc_layers.parallel.mesh import ParallelConfig
        >>> ParallelConfig(shard=2, tensor=2).sizes(8)
        {'pipeline': 1, 'replicate': 2, 'shard': 2, 'tensor': 2}
        >>> ParallelConfig(replicate=2, shard=0).sizes(8)
        {'pipeline': 1, 'replicate': 2, 'shard': 4, 'tensor': 1}
        """
        fixed = self.tensor * self.pipeline
        shard = self.shard or max(1, world_size // (fixed * (self.replicate or 1)))
        replicate = self.replicate or max(1, world_size // (fixed * shard))
        total = fixed * shard * replicate
        if total != world_size:
            raise ValueError(
                f"pipeline {self.pipeline} x replicate {replicate} x shard {shard} x tensor {self.tensor} = {total} "
                f"processes, but {world_size} are running; start {total} with torchrun --nproc-per-node, or change the "
                "axes"
            )
        return {"pipeline": self.pipeline, "replicate": replicate, "shard": shard, "tensor": self.tensor}


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among all.

    Attributes
    ----------
    rank, size, local_rank : int
        Number of this process, number of processes, and number of this process on its machine.
    in_group : bool
        Whether the processes form a group of :mod:`torch.distributed`; one process can be a group too.
    owns_group : bool
        Whether :func:`leave_processes` must end the group.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    in_group: bool = False
    owns_group: bool = False

    @property
    def is_main(self) -> bool:
        """True for the one process that writes logs and reports."""
        return self.rank == 0


def join_processes(device_type: str, *, timeout: timedelta = timedelta(minutes=10)) -> World:
    """Join the other processes that ``torchrun`` started; alone without it. One started process is a group of one.

    Parameters
    ----------
    device_type : str
        "cuda" uses NCCL, everything else gloo.
    timeout : datetime.timedelta
        How long a process waits for the others.

    Returns
    -------
    World
        This process's place.
    """
    if dist.is_initialized():
        local = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
        return World(rank=dist.get_rank(), size=dist.get_world_size(), local_rank=local, in_group=True)
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1 and not all(name in os.environ for name in _GROUP_VARIABLES):
        return World()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device_type == "cuda":
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=timeout)
    return World(
        rank=dist.get_rank(), size=dist.get_world_size(), local_rank=local_rank, in_group=True, owns_group=True
    )


def leave_processes(world: World) -> None:
    """Leave the group that :func:`join_processes` joined; meshes of its processes can't be used any more.

    A group of gloo ends its threads when nothing refers to it any more. Meshes do, and after a sharded step the caches
    of :mod:`torch.distributed.tensor` refer to meshes for ever. So meshes let go of their groups here.
    """
    if world.owns_group and dist.is_initialized():
        dist.destroy_process_group()
        for mesh in [item for item in gc.get_objects() if type(item) is DeviceMesh]:
            getattr(mesh, "_pg_registry", {}).clear()


def end_process(code: int) -> NoReturn:
    """End the program, after the threads of the groups that it left.

    A thread of gloo that finishes a sum gives back the tensor and may need the interpreter for it. If that shuts down
    meanwhile, Python ends the thread by unwinding its stack through a destructor, and the process aborts: "terminate
    called without an active exception". So the threads of all groups must have ended before. What still refers to a
    group when :func:`leave_processes` has returned are reference cycles of models and engines, collected here.

    Parameters
    ----------
    code : int
        Exit status.
    """
    gc.collect()
    sys.exit(code)


def build_mesh(config: ParallelConfig, device_type: str) -> DeviceMesh:
    """Arrange the processes of the running group.

    Parameters
    ----------
    config : ParallelConfig
        Sizes of the axes.
    device_type : str
        "cuda" or "cpu".

    Returns
    -------
    torch.distributed.device_mesh.DeviceMesh
        A mesh with the axes :data:`AXES`, those of size 1 included.
    """
    sizes = config.sizes(dist.get_world_size())
    return init_device_mesh(device_type, tuple(sizes[axis] for axis in AXES), mesh_dim_names=AXES)

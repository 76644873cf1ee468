"""Checkpoints that every process writes a part of, for models too large to gather.

Tensors are stored by :mod:`torch.distributed.checkpoint` under the names and shapes of the whole model, so they can be
read with another number of processes, or by one process without a group. Nothing but tensors is stored.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

__all__ = ["load_shards", "save_shards"]


def save_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write named tensors, each process its part; all processes must call it.

    Parameters
    ----------
    folder : pathlib.Path
        Made when everything is written; an interruption leaves no folder of this name.
    tensors : dict of str to torch.Tensor
        Sharded tensors (``DTensor``) and tensors that are equal on every process.

    Raises
    ------
    FileExistsError
        If the folder exists.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; sharded checkpoints are not written over others")
    part = folder.with_name(f".{folder.name}.part")
    if _is_main():
        shutil.rmtree(part, ignore_errors=True)
        part.parent.mkdir(parents=True, exist_ok=True)
    _wait()
    dcp.save({name: tensor.detach() for name, tensor in tensors.items()}, checkpoint_id=str(part))
    _wait()
    if _is_main():
        os.replace(part, folder)
    _wait()


def load_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Read named tensors in place, whatever number of processes wrote them.

    Parameters
    ----------
    folder : pathlib.Path
        What :func:`save_shards` wrote.
    tensors : dict of str to torch.Tensor
        Where the values go; each tensor's own sharding decides which part this process reads.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no sharded checkpoint {folder}")
    with torch.no_grad():
        dcp.load({name: tensor.detach() for name, tensor in tensors.items()}, checkpoint_id=str(folder))


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()

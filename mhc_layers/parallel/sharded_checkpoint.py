"""Checkpoints that every process writes a part of, for models too large to gather.

Tensors are stored by :mod:`torch.distributed.checkpoint` under the names and shapes of the whole model, so they can be
read with another number of processes, or by one process without a group. Nothing but tensors is stored.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

__all__ = ["hash_shards", "load_shards", "read_shards", "save_shards", "stored_shapes", "wait_for_all"]


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
    OSError
        If a process can't write its part; raised on all of them.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; sharded checkpoints are not written over others")
    part = folder.with_name(f".{folder.name}.part")
    if _is_main():
        shutil.rmtree(part, ignore_errors=True)
        part.parent.mkdir(parents=True, exist_ok=True)
    wait_for_all()
    values = {name: tensor.detach() for name, tensor in tensors.items()}
    try:
        with _alone_or_not() as alone:
            dcp.save(values, checkpoint_id=str(part), no_dist=alone)
    except CheckpointException as error:
        rank, failure = min(error.failures.items())
        raise OSError(f"process {rank} can't write its part of {folder}: {failure[0]}") from error
    wait_for_all()
    if _is_main():
        os.replace(part, folder)
    wait_for_all()


def load_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Read named tensors in place, whatever number of processes wrote them; all processes must call it.

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
    _check_folder(folder)
    with torch.no_grad(), _alone_or_not() as alone:
        values = {name: tensor.detach() for name, tensor in tensors.items()}
        dcp.load(values, checkpoint_id=str(folder), no_dist=alone)


def read_shards(folder: Path) -> dict[str, Tensor]:
    """Read everything as whole tensors on the CPU; no other process takes part.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    """
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in stored_shapes(folder).items()}
    with _alone_or_not():
        dcp.load(tensors, checkpoint_id=str(folder), no_dist=True)
    return tensors


def stored_shapes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the shape and dtype of every whole tensor in a folder of shards, by name.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    """
    _check_folder(folder)
    entries = dcp.FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def hash_shards(folder: Path, *, together: bool = True) -> dict[str, str]:
    """Return the SHA-256 of every file of a folder of shards, by file name.

    Parameters
    ----------
    folder : pathlib.Path
        What :func:`save_shards` wrote.
    together : bool
        Share the files among the processes of the group, if there is one; all of them must call it then.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    """
    _check_folder(folder)
    together = together and dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    hashes = {}
    for path in sorted(folder.iterdir())[rank::size]:
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    if not together:
        return hashes
    parts: list[dict[str, str]] = [{} for _ in range(size)]
    dist.all_gather_object(parts, hashes)
    return {name: value for part in parts for name, value in part.items()}


def wait_for_all() -> None:
    """Return when every process of the group, if there is one, has come here."""
    if dist.is_initialized():
        on_gpus = dist.get_backend() == "nccl"
        dist.barrier(device_ids=[torch.cuda.current_device()] if on_gpus else None)  # else NCCL warns that it guesses


@contextmanager
def _alone_or_not() -> Iterator[bool]:
    """Say whether there is no group; torch's warning that there is none is left out, because it is meant so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield not dist.is_initialized()


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no sharded checkpoint {folder}")


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0

"""Checkpoints: tensors as safetensors, the rest as JSON, written so that an interruption never leaves half a one.

A checkpoint is a folder ``step_00000200`` with ``model.safetensors`` (parameters), ``optimizer.safetensors`` (moments
and random-number states) and ``state.json`` (format, step, configuration, hashes of the other files). It is written
under a temporary name, flushed to the disk and renamed, so a folder with a final name is complete. Nothing in it is
pickled: loading such a checkpoint cannot run code.

A run whose parameters are sharded writes a *sharded* checkpoint: ``shards/`` (parameters and moments, each process its
part, see :mod:`mhc_layers.parallel.sharded_checkpoint`) and ``random.safetensors`` in place of the two files. The index
of the shards is a pickle (the format of :mod:`torch.distributed.checkpoint`): load sharded checkpoints only from people
you trust.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mhc_layers.parallel.mesh import World
from mhc_layers.parallel.sharded_checkpoint import (
    hash_shards,
    load_shards,
    read_shards,
    save_shards,
    stored_shapes,
    wait_for_all,
)
from mhc_layers.training.config import TrainConfig, decode
from mhc_layers.training.errors import CheckpointError

__all__ = [
    "FORMAT",
    "Checkpoint",
    "find_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "load_parameters",
    "random_state",
    "restore_random_state",
    "restore_shards",
    "resumed_config",
    "save_checkpoint",
    "save_sharded_checkpoint",
    "write_atomically",
]

FORMAT = 1
"""Version of the layout; a reader refuses others."""

_PREFIX = "step_"
_STATE = "state.json"
_SHARDS = "shards"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The content of one checkpoint folder.

    Attributes
    ----------
    step : int
        Steps that were done.
    config : dict
        The run's configuration as JSON values.
    model, optimizer : dict of str to torch.Tensor
        Named parameters; named optimizer state.
    progress : dict
        Counters of the run that are not tensors.
    corpus : dict
        Record of the data the run reads.
    random : dict of str to torch.Tensor
        States of the random generators.
    path : pathlib.Path, optional
        The folder it was read from.
    shards : dict of str to str, optional
        Hashes of the shards that hold model and optimizer, if they are there and were not read.
    """

    step: int
    config: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)
    corpus: dict[str, Any] = field(default_factory=dict)
    random: dict[str, Tensor] = field(default_factory=dict)
    path: Path | None = None
    shards: dict[str, str] | None = None


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int | None = None) -> Path:
    """Write a checkpoint below ``folder`` and, if it is complete, delete the oldest ones.

    Parameters
    ----------
    folder : pathlib.Path
        The folder of a run's checkpoints; made if needed.
    checkpoint : Checkpoint
        What to write.
    keep : int, optional
        Newest checkpoints to keep; all by default.

    Returns
    -------
    pathlib.Path
        The new checkpoint's folder.

    Raises
    ------
    CheckpointError
        If it can't be written, for want of room or permission.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{_PREFIX}{checkpoint.step:08d}"
    files = {
        "model.safetensors": checkpoint.model,
        "optimizer.safetensors": {
            **{f"optimizer/{name}": tensor for name, tensor in checkpoint.optimizer.items()},
            **{f"random/{name}": tensor for name, tensor in checkpoint.random.items()},
        },
    }
    with _completed(final, folder / f".{final.name}.{os.getpid()}.part", keep) as part:
        part.mkdir()
        _write_files(part, files, checkpoint)
    return final


def save_sharded_checkpoint(folder: Path, checkpoint: Checkpoint, world: World, *, keep: int | None = None) -> Path:
    """Write a checkpoint of which every process holds a part; all processes must call it.

    Parameters
    ----------
    folder : pathlib.Path
        The folder of a run's checkpoints, on a file system that all processes see.
    checkpoint : Checkpoint
        What to write. ``model`` and ``optimizer`` hold this process's sharded tensors; the rest is the main process's.
    world : World
        This process among all.
    keep : int, optional
        Newest checkpoints to keep; all by default.

    Returns
    -------
    pathlib.Path
        The new checkpoint's folder, complete on return.

    Raises
    ------
    CheckpointError
        If a process can't write its part.
    """
    final = folder / f"{_PREFIX}{checkpoint.step:08d}"
    part = folder / f".{final.name}.part"
    tensors = {f"model/{name}": tensor for name, tensor in checkpoint.model.items()}
    tensors |= {f"optimizer/{name}": tensor for name, tensor in checkpoint.optimizer.items()}
    if world.is_main:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    wait_for_all()
    try:
        save_shards(part / _SHARDS, tensors)
    except OSError as error:
        if world.is_main:
            shutil.rmtree(part, ignore_errors=True)
        raise _not_written(final, error) from error
    hashes = hash_shards(part / _SHARDS)
    if world.is_main:
        with _completed(final, part, keep):
            random = {f"random/{name}": tensor for name, tensor in checkpoint.random.items()}
            _write_files(part, {"random.safetensors": random}, checkpoint, shards=hashes)
    wait_for_all()
    return final


def load_checkpoint(path: Path, *, read_sharded: bool = True) -> Checkpoint:
    """Read a checkpoint and check it against its hashes.

    Parameters
    ----------
    path : pathlib.Path
        A checkpoint folder, a run directory or its ``checkpoints`` folder (then the newest one is taken).
    read_sharded : bool
        Read the shards of a sharded checkpoint, as whole tensors. Otherwise they are left to :func:`restore_shards`.

    Returns
    -------
    Checkpoint
        Its content, on the CPU.

    Raises
    ------
    CheckpointError
        If it is missing, damaged or of another format. The message names the newest intact one beside it.
    """
    path = find_checkpoint(path)
    try:
        return _read(path, read_sharded)
    except CheckpointError as error:
        for other in reversed(list_checkpoints(path.parent)):
            if other != path:
                try:
                    _read(other, True)
                except CheckpointError:
                    continue
                raise CheckpointError(f"{error}. The checkpoint {other} is intact: give its path instead") from error
        raise CheckpointError(f"{error}. There is no intact checkpoint beside it; start the run again") from error


def resumed_config(checkpoint: Checkpoint) -> TrainConfig:
    """Return the configuration of a checkpoint's run.

    Raises
    ------
    CheckpointError
        If this version cannot read it.
    """
    try:
        return decode(TrainConfig, checkpoint.config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the configuration in {checkpoint.path} does not fit this version: {error}") from error


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint folder that a path means: itself, or the newest one of a run directory.

    Raises
    ------
    CheckpointError
        If there is none.
    """
    path = Path(path)
    if (path / _STATE).is_file() or path.name.startswith(_PREFIX):
        if not path.is_dir():
            raise CheckpointError(f"there is no checkpoint folder {path}")
        return path
    for folder in (path / "checkpoints", path):
        if folder.is_dir() and (found := list_checkpoints(folder)):
            return found[-1]
    what = "holds no checkpoint" if path.is_dir() else "is a file" if path.exists() else "does not exist"
    raise CheckpointError(f"{path} {what}; give a run directory or a folder named {_PREFIX}<number> inside one")


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders below ``folder``, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name.startswith(_PREFIX))


def load_parameters(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy named tensors into a model's parameters.

    Raises
    ------
    CheckpointError
        If names or shapes differ; the message lists the first ones.
    """
    parameters = dict(model.named_parameters())
    _check_names({name: tensor.shape for name, tensor in tensors.items()}, parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def _check_names(stored: dict[str, torch.Size], parameters: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint whose names or shapes are not those of the parameters."""
    missing, unknown = sorted(set(parameters) - set(stored)), sorted(set(stored) - set(parameters))
    if missing or unknown:
        raise CheckpointError(
            f"the checkpoint is of another model: {len(missing)} parameters are missing {missing[:3]}, "
            f"{len(unknown)} are unknown {unknown[:3]}. Build the model from the checkpoint's own configuration"
        )
    for name, parameter in parameters.items():
        if parameter.shape != stored[name]:
            raise CheckpointError(
                f"the parameter {name} has shape {tuple(stored[name])} in the checkpoint and "
                f"{tuple(parameter.shape)} in the model. Build the model from the checkpoint's own configuration"
            )


def restore_shards(
    checkpoint: Checkpoint, parameters: dict[str, Tensor], *, in_place: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read the parameters and the optimizer state of a sharded checkpoint; all processes must call it.

    Parameters
    ----------
    checkpoint : Checkpoint
        Read with ``read_sharded=False``.
    parameters : dict of str to torch.Tensor
        This process's parameters, whole or sharded.
    in_place : bool
        Read each process's part only, straight into ``parameters`` and into optimizer state that is sharded like them.
        Otherwise everything is read as whole tensors on the CPU.

    Returns
    -------
    model, optimizer : dict of str to torch.Tensor
        Named parameters; named optimizer state.

    Raises
    ------
    CheckpointError
        If a file is missing or damaged, or the checkpoint is of another model.
    """
    folder = (checkpoint.path or Path()) / _SHARDS
    _verify_shards(folder, checkpoint.shards or {}, together=True)
    if not in_place:
        return _split_groups(read_shards(folder))
    shapes = stored_shapes(folder)
    stored = {name.removeprefix("model/"): shape for name, (shape, _) in shapes.items() if name.startswith("model/")}
    _check_names(stored, parameters)
    tensors = {f"model/{name}": tensor for name, tensor in parameters.items()}
    for name, (shape, dtype) in shapes.items():
        if name.startswith("optimizer/"):
            parameter = parameters[name.rpartition("/")[2]]
            like = parameter.shape == shape and len(shape) > 0
            tensors[name] = torch.zeros_like(parameter) if like else torch.zeros(shape, dtype=dtype)
    load_shards(folder, tensors)
    return _split_groups(tensors)


def random_state() -> dict[str, Tensor]:
    """Return the states of Python's, NumPy's and torch's random generators as tensors."""
    version, words, gauss = random.getstate()
    legacy = np.random.get_state(legacy=False)  # noqa: NPY002
    state = {
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([gauss is not None, gauss or 0.0], dtype=torch.float64),
        "numpy": torch.tensor([*legacy["state"]["key"].tolist(), legacy["state"]["pos"], legacy["has_gauss"]]),
        "numpy_gauss": torch.tensor([legacy["gauss"]], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Tensor]) -> None:
    """Put the states of :func:`random_state` back."""
    version, *words = state["python"].tolist()
    has_gauss, gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss if has_gauss else None))
    *keys, position, has_gauss = state["numpy"].tolist()
    np.random.set_state(  # noqa: NPY002
        ("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, float(state["numpy_gauss"]))
    )
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new one, never a part."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    _flush(part)
    os.replace(part, path)


@contextmanager
def _completed(final: Path, part: Path, keep: int | None) -> Iterator[Path]:
    """Let the context fill the folder ``part``, then give it its final name and delete old and half-written ones."""
    folder = final.parent
    try:
        yield part
        if final.exists():
            old = folder / f".{final.name}.{os.getpid()}.old"
            os.replace(final, old)
            os.replace(part, final)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(part, final)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        raise _not_written(final, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    unwanted = [] if keep is None else list_checkpoints(folder)[:-keep]
    for old in [*unwanted, *folder.glob(f".{_PREFIX}*")]:  # hidden: left by a process that was killed while writing
        shutil.rmtree(old, ignore_errors=True)


def _not_written(final: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint {final} can't be written ({error}); those before it are as they were. Make room, or choose a "
        "folder that can be written to, and continue with --resume"
    )


def _write_files(
    part: Path, files: dict[str, dict[str, Tensor]], checkpoint: Checkpoint, shards: dict[str, str] | None = None
) -> None:
    """Write the tensors of one process, and ``state.json`` with the hashes of all files."""
    hashes = {}
    for name, tensors in files.items():
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, part / name)
        _flush(part / name)
        hashes[name] = _sha256(part / name)
    state = {
        "format": FORMAT,
        "step": checkpoint.step,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "config": checkpoint.config,
        "progress": checkpoint.progress,
        "corpus": checkpoint.corpus,
        "sha256": hashes,
        **({} if shards is None else {"shards_sha256": shards}),
    }
    (part / _STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    _flush(part / _STATE)


def _verify_shards(folder: Path, expected: dict[str, str], *, together: bool) -> None:
    """Refuse shards that are not the ones that were written; all processes share the hashing, or one does it all."""
    try:
        found = hash_shards(folder, together=together)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint {folder.parent} is damaged: {_SHARDS} cannot be read ({error})"
        ) from error
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise CheckpointError(
            f"the checkpoint {folder.parent} is damaged: the hash of {_SHARDS}/{wrong[0]} is not the recorded one"
        )


def _split_groups(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Part the tensors of shards into parameters and optimizer state."""
    model, optimizer = (
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for prefix in ("model/", "optimizer/")
    )
    return model, optimizer


def _read(path: Path, read_sharded: bool) -> Checkpoint:
    """Read and verify one checkpoint folder."""
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the checkpoint {path} is damaged: its {_STATE} cannot be read ({error})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else None
        raise CheckpointError(
            f"the checkpoint {path} has format {found}; this version reads format {FORMAT}. Use the version that wrote "
            "it"
        )
    tensors = {}
    for name, expected in state["sha256"].items():
        try:
            actual = _sha256(path / name)
        except OSError as error:
            raise CheckpointError(f"the checkpoint {path} is damaged: {name} cannot be read ({error})") from error
        if actual != expected:
            raise CheckpointError(f"the checkpoint {path} is damaged: the hash of {name} is not the recorded one")
        try:
            tensors[name] = load_file(path / name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"the checkpoint {path} is damaged: {name} ({error})") from error
    shards = state.get("shards_sha256")
    model, other = tensors.get("model.safetensors", {}), tensors.get("optimizer.safetensors", {})
    optimizer = {k.removeprefix("optimizer/"): v for k, v in other.items() if k.startswith("optimizer/")}
    if shards is not None:
        other = tensors["random.safetensors"]
        if read_sharded:
            _verify_shards(path / _SHARDS, shards, together=False)
            model, optimizer = _split_groups(read_shards(path / _SHARDS))
    return Checkpoint(
        step=state["step"],
        config=state["config"],
        model=model,
        optimizer=optimizer,
        random={k.removeprefix("random/"): v for k, v in other.items() if k.startswith("random/")},
        progress=state["progress"],
        corpus=state["corpus"],
        path=path,
        shards=None if read_sharded else shards,
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Ask the system to put a file or folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

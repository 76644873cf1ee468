"""Checkpoints: tensors as safetensors, the rest as JSON, written so that an interruption never leaves half a one.

A checkpoint is a folder ``step_00000200`` with ``model.safetensors`` (parameters), ``optimizer.safetensors`` (moments
and random-number states) and ``state.json`` (format, step, configuration, hashes of the other files). It is written
under a temporary name, flushed to the disk and renamed, so a folder with a final name is complete. Nothing is
pickled: loading a checkpoint cannot run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

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
    "save_checkpoint",
    "write_atomically",
]

FORMAT = 1
"""Version of the layout; a reader refuses others."""

_PREFIX = "step_"
_STATE = "state.json"


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
    """

    step: int
    config: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)
    corpus: dict[str, Any] = field(default_factory=dict)
    random: dict[str, Tensor] = field(default_factory=dict)
    path: Path | None = None


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
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{_PREFIX}{checkpoint.step:08d}"
    part = folder / f".{final.name}.{os.getpid()}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        files = {
            "model.safetensors": checkpoint.model,
            "optimizer.safetensors": {
                **{f"optimizer/{name}": tensor for name, tensor in checkpoint.optimizer.items()},
                **{f"random/{name}": tensor for name, tensor in checkpoint.random.items()},
            },
        }
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
        }
        (part / _STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        _flush(part / _STATE)
        if final.exists():
            old = folder / f".{final.name}.{os.getpid()}.old"
            os.replace(final, old)
            os.replace(part, final)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(part, final)
        _flush(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    if keep is not None:
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and check it against its hashes.

    Parameters
    ----------
    path : pathlib.Path
        A checkpoint folder, a run directory or its ``checkpoints`` folder (then the newest one is taken).

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
        return _read(path)
    except CheckpointError as error:
        for other in reversed(list_checkpoints(path.parent)):
            if other != path:
                try:
                    _read(other)
                except CheckpointError:
                    continue
                raise CheckpointError(f"{error}. The checkpoint {other} is intact: give its path instead") from error
        raise CheckpointError(f"{error}. There is no intact checkpoint beside it; start the run again") from error


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
    what = "holds no checkpoint" if path.is_dir() else "does not exist"
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
    missing, unknown = sorted(set(parameters) - set(tensors)), sorted(set(tensors) - set(parameters))
    if missing or unknown:
        raise CheckpointError(
            f"the checkpoint is of another model: {len(missing)} parameters are missing {missing[:3]}, "
            f"{len(unknown)} are unknown {unknown[:3]}. Build the model from the checkpoint's own configuration"
        )
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise CheckpointError(
                f"the parameter {name} has shape {tuple(tensors[name].shape)} in the checkpoint and "
                f"{tuple(parameter.shape)} in the model. Build the model from the checkpoint's own configuration"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


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


def _read(path: Path) -> Checkpoint:
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
    other = tensors["optimizer.safetensors"]
    return Checkpoint(
        step=state["step"],
        config=state["config"],
        model=tensors["model.safetensors"],
        optimizer={k.removeprefix("optimizer/"): v for k, v in other.items() if k.startswith("optimizer/")},
        random={k.removeprefix("random/"): v for k, v in other.items() if k.startswith("random/")},
        progress=state["progress"],
        corpus=state["corpus"],
        path=path,
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

"""A run from beginning to end: its directory, its record, training, report and plots."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from mhc_layers import plots
from mhc_layers.parallel.mesh import World, join_processes, leave_processes
from mhc_layers.training.checkpoint import (
    Checkpoint,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    write_atomically,
)
from mhc_layers.training.config import TrainConfig, encode
from mhc_layers.training.data import Corpus, load_corpus
from mhc_layers.training.errors import CheckpointError, ResumeError
from mhc_layers.training.loop import StopRequest, Trainer, choose_device
from mhc_layers.training.progress import ProgressView
from mhc_layers.training.report import Report, make_report, show_report, write_report

__all__ = ["RunResult", "check_resumable", "latest_run", "load_for_resume", "new_folder", "run"]

_MAY_CHANGE = (
    "device",
    "threads",
    "log_every",
    "eval",
    "monitor",
    "checkpoint",
    "steps",
    "parallel",
    "compile",
    "deterministic",
)


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What :func:`run` did: the run directory, whether the last step was reached, and the report if it was."""

    folder: Path
    complete: bool
    report: Report | None = None


def run(
    config: TrainConfig,
    folder: Path,
    *,
    resume: Checkpoint | None = None,
    console: Console | None = None,
    stop: StopRequest | None = None,
) -> RunResult:
    """Train, then report.

    Parameters
    ----------
    config : TrainConfig
        What to do.
    folder : pathlib.Path
        The run directory; made if needed.
    resume : Checkpoint, optional
        Continue from here.
    console : rich.console.Console, optional
        Where progress and report are shown; standard output by default.
    stop : StopRequest, optional
        Asks for an early stop; Ctrl-C and SIGTERM are also listened to.

    Returns
    -------
    RunResult
        With the report if the last step was reached.

    Raises
    ------
    ValueError
        If ``folder`` holds a run already and ``resume`` is not given.
    """
    if resume is None:
        _check_fresh(folder)
    console = console or Console()
    world = join_processes(choose_device(config.device).type)
    try:
        corpus = load_corpus(
            config.data.path,
            held_out=config.data.held_out,
            suffixes=config.data.suffixes,
            min_bytes=config.data.seq_len + 1,
        )
        start = 0 if resume is None else resume.step
        view = ProgressView(config.steps, start, console=console, enabled=world.is_main)
        trainer = Trainer(config, corpus, folder, resume=resume, world=world, view=view)
        if world.is_main:
            _write_record(config, corpus, folder, trainer, world, start)
            _announce(config, corpus, folder, trainer, view, start)
        with (stop or StopRequest()).listening() as listener:
            complete = trainer.train(listener)
        if not complete:
            view.say(f"stopped after step {trainer.step} of {config.steps}; a checkpoint is saved. Continue with")
            view.say(f"  python -m mhc_layers train --resume {folder}")
            return RunResult(folder=folder, complete=False)
        report = _finish(trainer, folder, console)
        return RunResult(folder=folder, complete=True, report=report)
    finally:
        leave_processes(world)


def _check_fresh(folder: Path) -> None:
    """Refuse a folder with a run in it: two logs would become one."""
    if list_checkpoints(folder / "checkpoints"):
        raise ValueError(f"{folder} already holds a run; continue it with --resume {folder}, or choose another --out")
    if (folder / "metrics.jsonl").exists():
        raise ValueError(
            f"{folder} already holds a run, which ended before its first checkpoint; delete it or choose another --out"
        )


def new_folder(root: Path, config: TrainConfig) -> Path:
    """Return a run directory below ``root`` that does not exist yet: ``<recipe>-<connection>``, then ``-2``, ``-3``.

    Examples
    --------
    >>> from mhc_layers.training.run import new_folder
    >>> from pathlib import Path
    >>> from mhc_layers.recipes import tiny_cpu
    >>> new_folder(Path("no-such-folder"), tiny_cpu()).name
    'tiny_cpu-mhc'
    """
    stem = f"{config.name}-{config.model.connection}"
    folder, number = root / stem, 2
    while folder.exists():
        folder, number = root / f"{stem}-{number}", number + 1
    return folder


def latest_run(root: Path) -> Path:
    """Return the run directory below ``root`` whose newest checkpoint is the newest of all.

    Raises
    ------
    CheckpointError
        If there is none.
    """
    found: list[tuple[float, Path]] = []
    for folder in root.iterdir() if root.is_dir() else ():
        try:
            found.append((find_checkpoint(folder).stat().st_mtime, folder))
        except CheckpointError:
            continue
    if not found:
        raise CheckpointError(f"there is no run with a checkpoint in {root}; name one, or start a run with --recipe")
    return max(found)[1]


def check_resumable(before: TrainConfig, after: TrainConfig) -> list[str]:
    """Compare a run's configuration with the one asked for when resuming it.

    Parameters
    ----------
    before, after : TrainConfig
        Of the checkpoint, and with the command line's changes.

    Returns
    -------
    list of str
        Notes about changes that are allowed.

    Raises
    ------
    ResumeError
        If a change would make the run another one.
    """
    old, new = encode(before), encode(after)
    changed = [name for name in old if old[name] != new[name]]
    refused = [name for name in changed if name not in _MAY_CHANGE and name != "data"]
    if "data" in changed:
        refused += [f"data.{k}" for k in old["data"] if old["data"][k] != new["data"][k] and k != "path"]
    if refused:
        raise ResumeError(
            f"a resumed run cannot change {', '.join(refused)}: it would not continue the same run. Leave these "
            "options out, or start a new run with --recipe"
        )
    notes = [f"changed since the checkpoint: {name}" for name in changed]
    if "steps" in changed:
        notes.append("the learning rate follows the schedule of the new number of steps from here on")
    return notes


def _finish(trainer: Trainer, folder: Path, console: Console) -> Report | None:
    """Make the report and the plots on the main process; the others only help to gather the model."""
    model = trainer.whole_model()
    bits = trainer.evaluate(trainer.config.eval.final_bytes)
    if not trainer.world.is_main:
        return None
    report = make_report(trainer, model, bits_per_byte=bits)
    write_report(folder, report)
    figures = plots.plot_run(folder)
    show_report(report, console)
    console.print(f"run directory {folder}, plots {', '.join(path.name for path in figures)}", highlight=False)
    return report


def _write_record(
    config: TrainConfig, corpus: Corpus, folder: Path, trainer: Trainer, world: World, start: int
) -> None:
    """Write the resolved configuration, and append what was started where to ``run.json``."""
    write_atomically(folder / "config.json", json.dumps(encode(config), indent=1) + "\n")
    path = folder / "run.json"
    try:
        sessions = json.loads(path.read_text(encoding="utf-8"))["sessions"] if start else []
    except (OSError, ValueError, KeyError):
        sessions = []
    sessions.append(
        {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "from_step": start,
            "command": ["python", "-m", "mhc_layers", *sys.argv[1:]],
            "processes": world.size,
            "device": str(trainer.device),
            "device_name": torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": np.__version__,
            },
        }
    )
    record: dict[str, Any] = {
        "corpus": dataclasses.asdict(corpus.record),
        "parameters": trainer.num_parameters,
        "sessions": sessions,
    }
    write_atomically(path, json.dumps(record, indent=1) + "\n")


def _announce(
    config: TrainConfig, corpus: Corpus, folder: Path, trainer: Trainer, view: ProgressView, start: int
) -> None:
    record, model = corpus.record, config.model
    view.say(f"run directory {folder}" + (f", from step {start}" if start else ""))
    view.say(
        f"model: {model.connection}, {model.num_streams} streams x {model.dim} channels, {model.num_layers} layers, "
        f"{trainer.num_parameters:,} parameters on {trainer.device}"
    )
    view.say(
        f"text: {record.source}, {record.num_files} files, {record.train_bytes:,} bytes to train on, "
        f"{record.held_out_bytes:,} held out, sha256 {record.sha256[:16]}"
    )


def load_for_resume(path: Path) -> tuple[Checkpoint, Path]:
    """Return a checkpoint, without its shards if it has some, and the run directory that it belongs to."""
    checkpoint = load_checkpoint(path, read_sharded=False)
    folder = (checkpoint.path or path).parent
    return checkpoint, folder.parent if folder.name == "checkpoints" else folder

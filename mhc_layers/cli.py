"""Command line: ``python -m mhc_layers train | generate | inspect | compare | bench``.

Options are the fields of frozen dataclasses. ``train`` starts from a recipe, which is a function that returns a full
configuration, and every field of it can be changed by its path, such as ``--optim.learning-rate 1e-3``.
"""

from __future__ import annotations

import dataclasses
import errno
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console

from mhc_layers.config import TransformerConfig
from mhc_layers.conventions import get_convention
from mhc_layers.recipes import RECIPES, get_recipe
from mhc_layers.training.bench import time_connections, timing_table
from mhc_layers.training.checkpoint import Checkpoint, resumed_config
from mhc_layers.training.compare import compare_runs, comparison_table
from mhc_layers.training.config import TrainConfig
from mhc_layers.training.data import load_corpus
from mhc_layers.training.errors import TrainingError
from mhc_layers.training.inspection import inspect_model, load_model
from mhc_layers.training.loop import choose_device, choose_precision
from mhc_layers.training.report import inspection_table, rounded_down, rounded_up, sample_text
from mhc_layers.training.run import (
    check_resumable,
    latest_run,
    load_for_resume,
    new_folder,
    run,
)
from mhc_layers.training.traffic import traffic_table

__all__ = ["Bench", "Compare", "Generate", "Inspect", "Train", "main"]

Connection = Literal["mhc", "mhc_static", "identity", "hc", "hc_static", "residual"]

_INTERRUPTED = 130
_PLAIN_WIDTH = 120  # where output goes to a file or a pipe, which have no width of their own


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a byte-level model, or continue a run that was stopped."""

    config: Annotated[tyro.conf.AvoidSubcommands[TrainConfig], tyro.conf.arg(name="")]
    recipe: str = "tiny_cpu"
    """Recipe to start from."""
    connection: Connection | None = None
    """Kind of connection; short for --model.connection."""
    convention: str | None = None
    """Preset of the connections' conventions: paper, deepseek_v4 or deepseek_v41; short for all --model.convention.*"""
    data: Path | None = None
    """File or folder to train on; short for --data.path. Default: the Python standard library's source."""
    out: Path | None = None
    """Run directory. Default: a new one below --runs."""
    runs: Path = Path("runs")
    """Folder of the run directories."""
    resume: str | None = None
    """Run directory or checkpoint to continue; alone or 'latest': the newest one below --runs."""


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Let a trained model continue a text."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Run directory or checkpoint."""
    prompt: str = "def "
    """Start of the text."""
    num_bytes: int = 400
    """Bytes to add, at most what the model's max_seq_len leaves."""
    temperature: float = 0.7
    """0 takes the most likely byte."""
    top_k: int | None = None
    """Draw from the k most likely bytes only."""
    seed: int = 0
    """Seed of the drawing."""
    device: str = "auto"
    """'auto', 'cpu' or 'cuda'."""


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Certify the connections of a trained model on real data: every site, and the whole depth."""

    checkpoint: Annotated[Path | None, tyro.conf.Positional] = None
    """Run directory or checkpoint. Only --io works without it, for a recipe."""
    data: Path | None = None
    """File or folder whose held-out part is read. Default: the data of the run."""
    tokens: int = 256
    """Tokens whose operators are certified."""
    device: str = "auto"
    """'auto', 'cpu' or 'cuda'; streams have the dtype that a run has there."""
    io: bool = False
    """Print the memory traffic of the connections instead."""
    recipe: str = "tiny_cpu"
    """Recipe whose model --io describes if no checkpoint is given."""
    dim: int | None = None
    """Channels C for --io, instead of the model's."""
    streams: int | None = None
    """Streams n for --io, instead of the model's."""
    element_size: int = 2
    """Bytes of a stream element for --io."""
    bandwidth: float | None = None
    """Memory bandwidth in bytes per second for --io; adds times."""


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Print and plot finished runs side by side."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run directories."""
    figure: Path = Path("runs/comparison.png")
    """PNG file to write."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Time one connection of each kind on this machine."""

    dim: int = 512
    """Channels C."""
    streams: int = 4
    """Streams n."""
    tokens: int = 2048
    """Tokens."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the streams."""
    device: str = "auto"
    """'auto', 'cpu' or 'cuda'."""
    repeats: int = 20
    """Timed runs of each kind."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments : sequence of str, optional
        Words after the program's name; ``sys.argv`` by default.

    Returns
    -------
    int
        0 for success, 1 for an error that was explained, 130 if training was stopped and can be continued.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    try:
        command, resumed = _parse(_with_bare_resume(arguments))
        if isinstance(command, Train):
            return _train(command, resumed, console)
        return {Generate: _generate, Inspect: _inspect, Compare: _compare, Bench: _bench}[type(command)](  # type: ignore[operator]
            command, console
        )
    except (ValueError, TypeError, OSError, TrainingError) as error:
        text = _escaped(_explained(error))
        Console(stderr=True).print(f"[bold red]error:[/] {text}", highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED


def _parse(arguments: list[str]) -> tuple[object, tuple[Checkpoint, Path] | None]:
    """Parse the words; the defaults of ``train`` come from the recipe or from the checkpoint to resume."""
    resumed = None
    default = None
    if arguments[:1] == ["train"] and not {"-h", "--help"} & set(arguments):
        resume = _value(arguments, "--resume")
        if resume is not None:
            for option, why in (("--out", "it stays in its directory"), ("--recipe", "it has its configuration")):
                if _value(arguments, option) is not None:
                    raise ValueError(f"{option} can't be given with --resume: a run is continued, and {why}")
            where = Path(_value(arguments, "--runs") or "runs")
            resumed = load_for_resume(latest_run(where) if resume == "latest" else Path(resume))
            default = resumed_config(resumed[0])
    if default is None:
        default = get_recipe(_value(arguments, "--recipe") or "tiny_cpu")
    if resumed is None:
        arguments = _with_derived_sizes(arguments, default.model)
    program = "python -m mhc_layers"
    if arguments[:1] == ["train"]:  # by itself: a choice of commands shows tyro's own name for it in messages
        return tyro.cli(Train, default=Train(config=default), args=arguments[1:], prog=f"{program} train"), resumed
    recipes = ", ".join(sorted(RECIPES))
    command: object = tyro.cli(
        Annotated[Train, tyro.conf.subcommand("train", default=Train(config=default))]
        | Annotated[Generate, tyro.conf.subcommand("generate")]
        | Annotated[Inspect, tyro.conf.subcommand("inspect")]
        | Annotated[Compare, tyro.conf.subcommand("compare")]
        | Annotated[Bench, tyro.conf.subcommand("bench")],
        args=arguments,
        prog=program,
        description=f"Manifold-Constrained Hyper-Connections. Recipes: {recipes}.",
    )
    return command, None


def _train(command: Train, resumed: tuple[Checkpoint, Path] | None, console: Console) -> int:
    config = command.config
    if command.connection is not None:
        config = dataclasses.replace(config, model=config.model.replace(connection=command.connection))
    if command.convention is not None:
        convention = get_convention(command.convention)
        config = dataclasses.replace(config, model=config.model.replace(convention=convention))
    if command.data is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=command.data))
    if resumed is None:
        result = run(config, command.out or new_folder(command.runs, config), console=console)
    else:
        checkpoint, folder = resumed
        for note in check_resumable(resumed_config(checkpoint), config):
            console.print(note, highlight=False)
        result = run(config, folder, resume=checkpoint, console=console)
    return 0 if result.complete else _INTERRUPTED


def _generate(command: Generate, console: Console) -> int:
    if command.num_bytes < 0:
        raise ValueError(f"--num-bytes is {command.num_bytes}; it must be 0 or more")
    if not 0 <= command.seed < 2**63:
        raise ValueError(f"--seed is {command.seed}; it must be 0 or more and below 2^63")
    model, _, _ = load_model(command.checkpoint, device=choose_device(command.device))
    text = sample_text(
        model,
        command.prompt,
        num_bytes=command.num_bytes,
        temperature=command.temperature,
        top_k=command.top_k,
        seed=command.seed,
    )
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return 0


def _inspect(command: Inspect, console: Console) -> int:
    if command.io:
        if command.element_size < 1 or (command.bandwidth is not None and not 0.0 < command.bandwidth < math.inf):
            raise ValueError(
                f"--element-size is {command.element_size}, --bandwidth {command.bandwidth}; both must be above 0 and "
                "finite"
            )
        console.print(traffic_table(_io_model(command), element_size=command.element_size, bandwidth=command.bandwidth))
        return 0
    for option in ("dim", "streams", "bandwidth"):
        if getattr(command, option) is not None:
            raise ValueError(f"--{option} belongs to --io: without it, the model of the checkpoint is inspected")
    if command.checkpoint is None:
        raise ValueError("inspect needs a run directory or a checkpoint, such as runs/tiny_cpu-mhc; or --io")
    if command.tokens < 1:
        raise ValueError(f"--tokens is {command.tokens}; it must be 1 or more")
    device = choose_device(command.device)
    model, config, checkpoint = load_model(command.checkpoint, device=device)
    precision = choose_precision(config, device)
    dtype = str(precision.stream_dtype).removeprefix("torch.")
    corpus = load_corpus(
        command.data or config.data.path,
        held_out=config.data.held_out,
        suffixes=config.data.suffixes,
        min_bytes=config.data.seq_len + 1,
    )
    inspection = inspect_model(
        model, corpus.held_out, seq_len=config.data.seq_len, tokens=command.tokens, precision=precision
    )
    console.print(inspection_table(inspection))
    certificate = inspection.measurement.certificate
    if certificate is not None:
        bound, reached = rounded_up(certificate.norm2_upper), rounded_down(certificate.norm2_lower)
        what = "product of the absolute values of" if certificate.absolute else "composite of"
        console.print(
            f"whole depth: the {what} {certificate.sites} sites has norm_2 <= {bound} for each "
            f"of {certificate.tokens} tokens ({certificate.provenance}); the largest is at least "
            f"{reached}",
            highlight=False,
            soft_wrap=True,
        )
    console.print(
        f"checkpoint of step {checkpoint.step}, {dtype} streams on {device}, text {corpus.record.source} (held-out "
        f"part), sha256 {corpus.record.sha256}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _io_model(command: Inspect) -> TransformerConfig:
    """Return the model that ``inspect --io`` describes."""
    if command.checkpoint is not None:
        model = load_model(command.checkpoint)[1].model
    else:
        model = get_recipe(command.recipe).model
    changes: dict[str, int] = {}
    if command.dim is not None:
        changes.update(dim=command.dim, num_heads=1, num_kv_heads=1)
    if command.streams is not None:
        changes.update(num_streams=command.streams)
    return model.replace(**changes) if changes else model


def _compare(command: Compare, console: Console) -> int:
    comparison = compare_runs(command.runs, command.figure)
    console.print(comparison_table(comparison))
    for warning in comparison.warnings:
        console.print(f"note: {warning}", highlight=False, soft_wrap=True)
    console.print(f"figure {comparison.figure}", highlight=False)
    return 0


def _bench(command: Bench, console: Console) -> int:
    if command.repeats < 1 or command.tokens < 1:
        raise ValueError(f"--repeats is {command.repeats}, --tokens {command.tokens}; both must be 1 or more")
    device = choose_device(command.device)
    timings = time_connections(
        dim=command.dim,
        num_streams=command.streams,
        tokens=command.tokens,
        dtype=command.dtype,
        device=device,
        repeats=command.repeats,
    )
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    title = f"one site: n = {command.streams}, C = {command.dim}, {command.tokens} tokens, {command.dtype}, {where}"
    console.print(timing_table(timings, title=title))
    return 0


def _value(arguments: list[str], option: str) -> str | None:
    """Return the value of an option among the words, before they are parsed."""
    for index, word in enumerate(arguments):
        if word == option and index + 1 < len(arguments):
            return arguments[index + 1]
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None


def _with_bare_resume(arguments: list[str]) -> list[str]:
    """Let ``--resume`` stand alone for ``--resume latest``."""
    words: list[str] = []
    for index, word in enumerate(arguments):
        words.append(word)
        following = arguments[index + 1 : index + 2]
        if word == "--resume" and (not following or following[0].startswith("--")):
            words.append("latest")
    return words


def _with_derived_sizes(arguments: list[str], model: TransformerConfig) -> list[str]:
    """Derive key-value heads and hidden width anew where their source is changed and the recipe left them derived."""
    fresh = model.replace(num_kv_heads=None, hidden_dim=None)
    words = list(arguments)
    for source, derived in (("num_heads", "num_kv_heads"), ("dim", "hidden_dim")):
        option = f"--model.{derived.replace('_', '-')}"
        changed = _value(arguments, f"--model.{source.replace('_', '-')}") is not None
        if changed and _value(arguments, option) is None and getattr(model, derived) == getattr(fresh, derived):
            words += [option, "None"]
    return words


def _explained(error: Exception) -> str:
    """The message; for one of the operating system, which names no remedy and a path at best, a sentence."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    what = error.filename or "a file"
    remedy = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "give another path"
    return f"{what} can't be read or written ({error.strerror}); {remedy}, or change what is there"


def _escaped(text: str) -> str:
    """Keep square brackets of a message from being read as markup."""
    return text.replace("[", r"\[")

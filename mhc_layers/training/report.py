"""The report at the end of a run: what was reached, what is guaranteed, what the model writes."""

from __future__ import annotations

import json
import math
import unicodedata
from dataclasses import asdict, dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mhc_layers.models.generation import generate
from mhc_layers.models.transformer import Transformer
from mhc_layers.training.checkpoint import write_atomically
from mhc_layers.training.inspection import Inspection, inspect_model
from mhc_layers.training.loop import Trainer

__all__ = [
    "Report",
    "inspection_table",
    "make_report",
    "read_report",
    "rounded_down",
    "rounded_up",
    "sample_text",
    "show_report",
    "write_report",
]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Numbers of a finished run.

    Attributes
    ----------
    name, connection : str
        Recipe and kind of connection.
    parameters : int
        Trained numbers.
    steps : int
        Optimizer steps.
    seconds : float
        Time in the training loop.
    tokens_per_second : float
        Trained tokens over that time.
    first_bits_per_byte, bits_per_byte : float
        On held-out files, before the first step and at the end.
    norm2_lower, norm2_upper : float
        Certified bounds of the spectral norm of the composite of all sites, the worst of ``certified_tokens`` held-out
        tokens.
    provenance : str
        ``sampled``: the bounds are rigorous for these tokens and say nothing about others.
    absolute : bool
        The bound is of the product of absolute values, because the operators have negative entries.
    certified_tokens, sites : int
        Size of the certificate.
    forward_gain_min, forward_gain_max, backward_gain_min, backward_gain_max : float
        Gains of the same composites: absolute row sums and column sums.
    stream_cosine, stream_difference, effective_streams : float
        Of the last streams: mean pairwise cosine, norm of the deviations from their mean relative to their norm, and
        exponential of the entropy of the squared singular values.
    monitor_share : float
        Host time of measuring and certifying over the training time, but for the first measurement.
    monitor_setup_seconds : float
        Host time of the first measurement of each start of the run, which loads kernels and libraries.
    corpus_sha256 : str
        Hash of the text.
    sample : str
        What the model writes after the prompt.
    """

    name: str
    connection: str
    parameters: int
    steps: int
    seconds: float
    tokens_per_second: float
    first_bits_per_byte: float
    bits_per_byte: float
    norm2_lower: float
    norm2_upper: float
    provenance: str
    absolute: bool
    certified_tokens: int
    sites: int
    forward_gain_min: float
    forward_gain_max: float
    backward_gain_min: float
    backward_gain_max: float
    stream_cosine: float
    stream_difference: float
    effective_streams: float
    monitor_share: float
    monitor_setup_seconds: float = 0.0
    corpus_sha256: str
    sample: str


def make_report(trainer: Trainer, model: Transformer, *, bits_per_byte: float) -> Report:
    """Inspect a trained model on held-out bytes.

    Parameters
    ----------
    trainer : Trainer
        A run that has reached its last step.
    model : Transformer
        Its whole model.
    bits_per_byte : float
        Of the final validation.

    Returns
    -------
    Report
        Certificate, gains, streams and sample are made now, on held-out data.
    """
    config = trainer.config
    inspection = inspect_model(model, trainer.corpus.held_out, seq_len=config.data.seq_len, precision=trainer.precision)
    certificate = inspection.measurement.certificate
    composite, streams = inspection.measurement.composite, inspection.measurement.streams
    if certificate is None:
        raise ValueError("the inspection holds no certificate; call inspect_model, which always certifies")
    tokens = trainer.step * config.data.batch_size * config.data.seq_len
    return Report(
        name=config.name,
        connection=config.model.connection,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        steps=trainer.step,
        seconds=trainer.seconds,
        tokens_per_second=tokens / max(trainer.seconds, 1e-9),
        first_bits_per_byte=trainer.first_bits if trainer.first_bits is not None else math.nan,
        bits_per_byte=bits_per_byte,
        norm2_lower=certificate.norm2_lower,
        norm2_upper=certificate.norm2_upper,
        provenance=certificate.provenance,
        absolute=certificate.absolute,
        certified_tokens=certificate.tokens,
        sites=certificate.sites,
        forward_gain_min=float(composite["prefix_forward_gain_min"][-1]),
        forward_gain_max=float(composite["prefix_forward_gain_max"][-1]),
        backward_gain_min=float(composite["prefix_backward_gain_min"][-1]),
        backward_gain_max=float(composite["prefix_backward_gain_max"][-1]),
        stream_cosine=float(streams["cosine_mean"][-1]),
        stream_difference=float(streams["difference"][-1]),
        effective_streams=float(streams["effective_streams"][-1]),
        monitor_share=trainer.monitor.seconds / max(trainer.seconds, 1e-9),
        monitor_setup_seconds=trainer.monitor.setup_seconds,
        corpus_sha256=trainer.corpus.record.sha256,
        sample=sample_text(
            model,
            config.eval.prompt,
            num_bytes=config.eval.sample_bytes,
            temperature=config.eval.temperature,
            seed=config.seed,
        ),
    )


def sample_text(
    model: Transformer,
    prompt: str,
    *,
    num_bytes: int,
    temperature: float = 0.7,
    top_k: int | None = None,
    seed: int = 0,
) -> str:
    """Let a byte-level model continue a text.

    Parameters
    ----------
    model : Transformer
        A model whose tokens are bytes.
    prompt : str
        The text to continue; a document's start is put before it.
    num_bytes : int
        Bytes to add, at most what ``max_seq_len`` leaves.
    temperature : float
        0 takes the most likely byte.
    top_k : int, optional
        Draw from the k most likely bytes only.
    seed : int
        Seed of the drawing.

    Returns
    -------
    str
        Prompt and continuation; bytes that are not UTF-8, and control characters, are replaced.

    Raises
    ------
    ValueError
        If the prompt leaves no room.
    """
    device = next(model.parameters()).device
    start = b"\0" + prompt.encode("utf-8")
    room = model.config.max_seq_len - len(start)
    if num_bytes > 0 and room < 1:
        raise ValueError(
            f"the prompt has {len(start)} bytes with the document start, and max_seq_len is "
            f"{model.config.max_seq_len}; shorten the prompt"
        )
    if num_bytes < 1:
        return prompt
    tokens = torch.tensor([list(start)], device=device)
    generator = torch.Generator(device=device).manual_seed(seed)
    was_training = model.training
    model.eval()
    result = generate(model, tokens, min(num_bytes, room), temperature=temperature, top_k=top_k, generator=generator)
    model.train(was_training)
    text = bytes(result[0, 1:].tolist()).decode("utf-8", "replace")
    return "".join("\N{REPLACEMENT CHARACTER}" if _is_control(character) else character for character in text)


def _is_control(character: str) -> bool:
    """Whether a terminal would obey a character instead of showing it."""
    return unicodedata.category(character) == "Cc" and character not in "\n\r\t"


def write_report(folder: Path, report: Report) -> None:
    """Write ``report.json`` and ``sample.txt`` to a run directory."""
    write_atomically(folder / "report.json", json.dumps(asdict(report), indent=1) + "\n")
    write_atomically(folder / "sample.txt", report.sample + "\n")


def read_report(folder: Path) -> Report:
    """Read the report of a finished run.

    Raises
    ------
    FileNotFoundError
        If the run has none, because it was not finished.
    ValueError
        If it is damaged or of another version.
    """
    path = folder / "report.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no report.json; the run is not finished (train --resume {folder})")
    try:
        return Report(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or of another version ({error}); write it again with train --resume {folder}"
        ) from error


def show_report(report: Report, console: Console) -> None:
    """Print a report."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    for label, value in report_lines(report):
        table.add_row(label, value)
    console.print(Panel(table, title=f"{report.name} · {report.connection}", expand=False))
    console.print(Panel(Text(report.sample), title="sample", expand=False))


def rounded_up(value: float, digits: int = 9) -> str:
    """Write an upper bound with some decimals such that what is written is an upper bound too.

    Examples
    --------
    >>> from mhc_layers.training.report import rounded_down, rounded_up
    >>> rounded_up(1.00000000012), rounded_down(1.00000000012)
    ('1.000000001', '1.000000000')
    """
    return str(Decimal(value).quantize(Decimal(1).scaleb(-digits), rounding=ROUND_CEILING))


def rounded_down(value: float, digits: int = 9) -> str:
    """Write a lower bound with some decimals such that what is written is a lower bound too."""
    return str(Decimal(value).quantize(Decimal(1).scaleb(-digits), rounding=ROUND_FLOOR))


def report_lines(report: Report) -> list[tuple[str, str]]:
    """Return the lines of a report as label and text."""
    what = "product of absolute values" if report.absolute else "composite"
    bound, reached = rounded_up(report.norm2_upper), rounded_down(report.norm2_lower)
    setup = f" and {report.monitor_setup_seconds:.1f} s once" if report.monitor_setup_seconds >= 0.05 else ""
    return [
        ("validation", f"{report.bits_per_byte:.3f} bits per byte (before training {report.first_bits_per_byte:.3f})"),
        (
            "certified norm",
            f"||{what} of {report.sites} sites||_2 <= {bound} for each of {report.certified_tokens} "
            f"held-out tokens ({report.provenance}); the largest is at least {reached}",
        ),
        (
            "composite gain",
            f"forward {report.forward_gain_min:.4f} to {report.forward_gain_max:.4f}, "
            f"backward {report.backward_gain_min:.4f} to {report.backward_gain_max:.4f}",
        ),
        (
            "streams",
            f"cosine {report.stream_cosine:.4f}, relative difference {report.stream_difference:.4f}, "
            f"effective number {report.effective_streams:.3f}",
        ),
        ("size", f"{report.parameters:,} parameters, {report.steps} steps"),
        (
            "time",
            f"{report.seconds:.1f} s, {report.tokens_per_second:,.0f} tokens/s, "
            f"monitor {100.0 * report.monitor_share:.2f} % of it{setup}",
        ),
        ("text", f"sha256 {report.corpus_sha256}"),
    ]


def inspection_table(inspection: Inspection) -> Table:
    """Return the certificates and gains of every site as a table."""
    table = Table(title=f"operators of {inspection.tokens} tokens", box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in (
        "site",
        "norm_2 at most",
        "at least",
        "provenance",
        "forward gain",
        "backward gain",
        "|lambda_2|",
        "to I",
        "to J",
    ):
        table.add_column(heading, justify="left" if heading in ("site", "provenance") else "right")
    values = inspection.measurement.sites
    for index, site in enumerate(inspection.sites):
        table.add_row(
            site.name,
            rounded_up(site.norm2_upper),
            rounded_down(site.norm2_lower),
            site.provenance,
            f"{values['forward_gain_min'][index]:.4f} - {values['forward_gain_max'][index]:.4f}",
            f"{values['backward_gain_min'][index]:.4f} - {values['backward_gain_max'][index]:.4f}",
            f"{values['lambda2'][index]:.4f}",
            f"{values['distance_identity'][index]:.4f}",
            f"{values['distance_uniform'][index]:.4f}",
        )
    return table

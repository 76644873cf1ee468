"""What a trained model's connections do to real data, with certified bounds for every site and for the whole depth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import birkhoff
from mhc_layers.capture import capture_coefficients
from mhc_layers.models.transformer import Transformer
from mhc_layers.parallel.engine import Precision
from mhc_layers.training.checkpoint import Checkpoint, load_checkpoint, load_parameters, resumed_config
from mhc_layers.training.config import TrainConfig
from mhc_layers.training.data import evaluation_windows
from mhc_layers.training.monitor import Measurement, fetch, measure

__all__ = ["Inspection", "SiteCertificate", "inspect_model", "load_model"]


@dataclass(frozen=True, kw_only=True)
class SiteCertificate:
    """Certified norm of one site's operator, the worst over the tokens looked at.

    ``provenance`` is the weakest among the tokens: ``exact`` only if every token's bounds coincide.
    """

    name: str
    norm2_lower: float
    norm2_upper: float
    provenance: str


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Certificates per site, and the measurement with the whole depth's certificate."""

    sites: list[SiteCertificate]
    measurement: Measurement
    tokens: int


def load_model(path: Path, *, device: torch.device | None = None) -> tuple[Transformer, TrainConfig, Checkpoint]:
    """Build the model of a checkpoint.

    Parameters
    ----------
    path : pathlib.Path
        A checkpoint folder, or a run directory (then its newest checkpoint).
    device : torch.device, optional
        Where the parameters go; the CPU by default.

    Returns
    -------
    model : Transformer
        In evaluation mode.
    config : TrainConfig
        The run's configuration.
    checkpoint : Checkpoint
        What was read.

    Raises
    ------
    CheckpointError
        If the checkpoint is missing, damaged or of another format, or this version cannot read its configuration.
    """
    checkpoint = load_checkpoint(path)
    config = resumed_config(checkpoint)
    model = Transformer(config.model)
    load_parameters(model, checkpoint.model)
    return model.to(device or torch.device("cpu")).eval(), config, checkpoint


def inspect_model(
    model: Transformer, data: np.ndarray, *, seq_len: int, tokens: int = 256, precision: Precision | None = None
) -> Inspection:
    """Run a model on real bytes and certify its operators.

    Parameters
    ----------
    model : Transformer
        A model with at least one site.
    data : numpy.ndarray
        1-D ``uint8`` array, at least ``seq_len + 1`` long.
    seq_len : int
        Bytes of a sequence.
    tokens : int
        Tokens whose operators are certified, spread over several sequences.
    precision : Precision, optional
        Dtype of the streams, float32 by default. Give that of the run to certify the operators that it applies.

    Returns
    -------
    Inspection
        All sums and bounds are about the float32 values that the forward pass used.
    """
    windows = evaluation_windows(data, seq_len=seq_len, max_bytes=max(tokens, 4 * seq_len))
    device = next(model.parameters()).device
    precision = precision or Precision(device_type=device.type)
    with torch.no_grad(), precision.context(), capture_coefficients(model) as captured:
        model(torch.from_numpy(windows[:, :-1]).to(device).long())
    coefficients = fetch(captured, tokens=tokens)
    measurement = measure(coefficients, certify=True)
    sites = []
    for index, h_res in enumerate(coefficients.h_res):
        certificate = birkhoff.certify(np.abs(h_res))
        signed = bool((h_res < 0.0).any())
        exact = not signed and bool(np.all(certificate.norm2_lower == certificate.norm2_upper))
        sites.append(
            SiteCertificate(
                name=f"{index // 2}.{'attention' if index % 2 == 0 else 'feed-forward'}",
                norm2_lower=0.0 if signed else float(np.max(certificate.norm2_lower)),
                norm2_upper=float(np.max(certificate.norm2_upper)),
                provenance="exact" if exact else "enclosure",
            )
        )
    return Inspection(sites=sites, measurement=measurement, tokens=coefficients.h_res.shape[1])

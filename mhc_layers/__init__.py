"""Manifold-Constrained Hyper-Connections on torch: the layer, its conventions, and Transformers built on it."""

import importlib
from typing import Any

from mhc_layers.capture import capture_coefficients
from mhc_layers.config import TransformerConfig
from mhc_layers.conventions import CONVENTIONS, DEEPSEEK_V4, DEEPSEEK_V41, PAPER, Convention, get_convention
from mhc_layers.functional import collapse_streams, expand_streams
from mhc_layers.grouping import param_groups
from mhc_layers.hyper_connection import HyperConnection
from mhc_layers.models.generation import generate
from mhc_layers.models.transformer import Transformer


def __getattr__(name: str) -> Any:
    if name in ("hub", "parallel", "plots", "recipes", "reference", "training"):  # imported when they are first used
        return importlib.import_module(f"mhc_layers.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CONVENTIONS",
    "DEEPSEEK_V4",
    "DEEPSEEK_V41",
    "PAPER",
    "Convention",
    "HyperConnection",
    "Transformer",
    "TransformerConfig",
    "capture_coefficients",
    "collapse_streams",
    "expand_streams",
    "generate",
    "get_convention",
    "param_groups",
]

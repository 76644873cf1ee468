"""Manifold-Constrained Hyper-Connections on torch: the layer, its conventions, and Transformers built on it."""

from mhc_layers.capture import capture_coefficients
from mhc_layers.config import TransformerConfig
from mhc_layers.conventions import CONVENTIONS, DEEPSEEK_V4, DEEPSEEK_V41, PAPER, Convention, get_convention
from mhc_layers.functional import collapse_streams, expand_streams
from mhc_layers.grouping import param_groups
from mhc_layers.hyper_connection import HyperConnection
from mhc_layers.models.generation import generate
from mhc_layers.models.transformer import Transformer

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

"""Rotary position embedding in the half-split layout (channel c turns with channel c + D/2).

Shape legend: B batch, H heads, T tokens, D channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhc_layers.precision import KeepsFloat32

__all__ = ["RotaryEmbedding", "rotate"]


class RotaryEmbedding(KeepsFloat32):
    """Cosines and sines of the positions up to ``max_seq_len``; they stay float32 when the model is cast.

    Parameters
    ----------
    head_dim : int
        Even number of channels D of a head.
    max_seq_len : int
        Number of positions.
    theta : float
        Base of the frequencies ``theta^(-2 c / D)``.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, max_seq_len: int, theta: float = 10000.0) -> None:
        super().__init__()
        self.head_dim, self.max_seq_len, self.theta = head_dim, max_seq_len, theta
        self.register_buffer("cos", torch.empty(max_seq_len, head_dim // 2), persistent=False)
        self.register_buffer("sin", torch.empty(max_seq_len, head_dim // 2), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the tables; needed again after ``to_empty`` from the meta device."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=self.cos.device) / self.head_dim
        positions = torch.arange(self.max_seq_len, dtype=torch.float64, device=self.cos.device)
        angles = torch.outer(positions, self.theta**-exponents)
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())

    def forward(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines ``(T, D/2)`` of the positions ``start .. start + length - 1``."""
        return self.cos[start : start + length], self.sin[start : start + length]


def rotate(x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Turn each pair of channels by its position's angle, in float32 or better; keeps the dtype of ``x``."""
    low, high = x_BHTD.to(torch.promote_types(x_BHTD.dtype, cos_TD.dtype)).chunk(2, dim=-1)
    turned = torch.cat([low * cos_TD - high * sin_TD, high * cos_TD + low * sin_TD], dim=-1)
    return turned.to(x_BHTD.dtype)

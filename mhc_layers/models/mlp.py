"""SwiGLU feed-forward layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SwiGLU"]


class SwiGLU(nn.Module):
    """``down(silu(gate(u)) * up(u))``, ``(..., C)`` to ``(..., C)``.

    Parameters
    ----------
    dim, hidden_dim : int
        Channels and width.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.output = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        gate, up = self.gate_up(u).chunk(2, dim=-1)
        return self.output(F.silu(gate) * up)

"""Readouts: how a model collapses its streams before the final norm.

Shape legend: ``...`` tokens, n streams, C channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mhc_layers import functional
from mhc_layers.conventions import Convention
from mhc_layers.precision import KeepsFloat32

__all__ = ["HyperHead", "LastPreReadout", "LearnedReadout", "MeanReadout", "SumReadout", "make_readout"]


class MeanReadout(nn.Module):
    """The mean over streams, which doubly stochastic mixing conserves."""

    def forward(self, x: Tensor, last_pre: Tensor | None = None) -> Tensor:
        return functional.collapse_streams(x)


class SumReadout(nn.Module):
    """The sum over streams, as in Hyper-Connections (arXiv 2409.19606)."""

    def forward(self, x: Tensor, last_pre: Tensor | None = None) -> Tensor:
        return functional.collapse_streams(x, reduce="sum")


class LearnedReadout(KeepsFloat32):
    """A learned convex combination, ``softmax(logits)``, the same for every token; starts as the mean.

    Parameters
    ----------
    num_streams : int
        Number of streams n.
    """

    def __init__(self, num_streams: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.empty(num_streams))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as the mean."""
        nn.init.zeros_(self.logits)

    def forward(self, x: Tensor, last_pre: Tensor | None = None) -> Tensor:
        return functional.collapse_streams(x, torch.softmax(self.logits, dim=0))


class HyperHead(KeepsFloat32):
    """DeepSeek-V4's ``hc_head``: weights ``sigmoid(scale * fn x / r + base) + eps_pre`` for every token.

    Parameters
    ----------
    dim, num_streams : int
        Channels C and streams n.
    convention : Convention
        Gives ``eps_pre`` and ``norm_eps``.

    Attributes
    ----------
    fn : Parameter
        ``(n, n C)``; starts at zero.
    base : Parameter
        ``(n,)``; starts where every weight is ``1 / n`` (for n = 1, just below 1).
    scale : Parameter
        ``(1,)``; starts at 0.01.
    """

    def __init__(self, dim: int, num_streams: int, convention: Convention) -> None:
        super().__init__()
        self.convention = convention
        self.fn = nn.Parameter(torch.empty(num_streams, num_streams * dim))
        self.base = nn.Parameter(torch.empty(num_streams))
        self.scale = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as the mean, or for one stream just below it, since a sigmoid does not reach 1."""
        weight = min(1.0 / self.base.numel(), 1.0 - 2.0**-7) - self.convention.eps_pre
        nn.init.zeros_(self.fn)
        nn.init.constant_(self.base, math.log(weight / (1.0 - weight)))
        nn.init.constant_(self.scale, 0.01)

    def forward(self, x: Tensor, last_pre: Tensor | None = None) -> Tensor:
        weights = functional.hc_head_weights(x, self.fn, self.base, self.scale, self.convention)
        return functional.collapse_streams(x, weights)


class LastPreReadout(nn.Module):
    """DeepSeek-V4.1: the ``h_pre`` of the last site, which no site has read with."""

    def forward(self, x: Tensor, last_pre: Tensor | None = None) -> Tensor:
        if last_pre is None:
            raise ValueError("The readout 'last_pre' needs the h_pre of the last site; pass last_pre.")
        return functional.collapse_streams(x, last_pre)


def make_readout(convention: Convention, dim: int, num_streams: int) -> nn.Module:
    """Build the readout that the convention names; its ``forward(x, last_pre)`` collapses the streams."""
    if convention.readout == "hc_head":
        return HyperHead(dim, num_streams, convention)
    if convention.readout == "learned":
        return LearnedReadout(num_streams)
    return {"mean": MeanReadout, "sum": SumReadout, "last_pre": LastPreReadout}[convention.readout]()

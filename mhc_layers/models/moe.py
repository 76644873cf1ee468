"""Mixture of experts: top-k routing without dropped tokens, and a load-balancing loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mhc_layers.models.mlp import SwiGLU

__all__ = ["MixtureOfExperts"]


class MixtureOfExperts(nn.Module):
    """Each token uses its ``experts_per_token`` best experts, weighted by their renormalised probabilities.

    No token is dropped and no capacity is set, so the output of a token does not depend on the others, and decoding
    step by step equals the full forward pass.

    Parameters
    ----------
    dim, hidden_dim : int
        Channels and width of one expert.
    num_experts, experts_per_token : int
        Number of experts, and how many a token uses.

    Notes
    -----
    The balance loss is ``E * sum_e f_e p_e`` with f_e the share of assignments of expert e and p_e its mean
    probability (Switch Transformer, Eq. 4); it is 1 for a uniform router.
    """

    def __init__(self, dim: int, hidden_dim: int, num_experts: int, experts_per_token: int) -> None:
        super().__init__()
        self.num_experts, self.experts_per_token = num_experts, experts_per_token
        self.router = nn.Linear(dim, num_experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(dim, hidden_dim) for _ in range(num_experts))

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output ``(..., C)`` and the 0-d balance loss."""
        tokens = u.reshape(-1, u.shape[-1])
        probabilities = torch.softmax(self.router(tokens).float(), dim=-1)
        weights, chosen = probabilities.topk(self.experts_per_token, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == index)
            result = expert(tokens[token]) * weights[token, slot].unsqueeze(-1).to(tokens.dtype)
            out = out.index_add(0, token, result.to(out.dtype))
        ones = probabilities.new_ones(chosen.numel())
        assigned = probabilities.new_zeros(self.num_experts).index_add(0, chosen.flatten(), ones)
        share = assigned / max(chosen.numel(), 1)
        mean_probability = probabilities.sum(dim=0) / max(len(tokens), 1)
        balance = self.num_experts * (share * mean_probability).sum()
        return out.view(u.shape), balance

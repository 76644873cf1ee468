"""Causal grouped-query attention with rotary positions and a key-value cache.

Shape legend: B batch, T new tokens, S tokens seen so far, H query heads, G key-value heads, D head channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_layers.models.rotary import rotate

__all__ = ["Attention", "LayerCache", "causal_mask"]


@dataclass
class LayerCache:
    """Keys and values of one attention layer, ``(B, G, max_len, D)`` each, of which ``length`` tokens are filled."""

    keys: Tensor
    values: Tensor
    length: int = 0

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append ``(B, G, T, D)`` and return all keys and values so far, as views.

        Raises
        ------
        ValueError
            If the cache is too short.
        """
        end = self.length + keys.shape[2]
        if end > self.keys.shape[2]:
            raise ValueError(
                f"The cache holds {self.keys.shape[2]} tokens and {end} are needed; make it longer, or raise "
                "max_seq_len of the configuration."
            )
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


def causal_mask(num_new: int, num_seen: int, device: torch.device) -> Tensor:
    """Return ``(T, S)``, True where new token t may look at token s: the last T of S tokens are the new ones."""
    new = torch.arange(num_seen - num_new, num_seen, device=device)
    return torch.arange(num_seen, device=device) <= new[:, None]


class Attention(nn.Module):
    """Multi-head attention in which each group of query heads shares a key-value head.

    Parameters
    ----------
    dim, num_heads, num_kv_heads : int
        Channels, query heads H, key-value heads G; H is a multiple of G.
    """

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, dim // num_heads
        self.qkv = nn.Linear(dim, (num_heads + 2 * num_kv_heads) * self.head_dim, bias=False)
        self.output = nn.Linear(num_heads * self.head_dim, dim, bias=False)

    def forward(self, u: Tensor, rotary: tuple[Tensor, Tensor], cache: LayerCache | None = None) -> Tensor:
        """Attend ``u (B, T, C)`` to itself and to what ``cache`` holds; returns ``(B, T, C)``."""
        batch, num_new, _ = u.shape
        num_all = self.num_heads + 2 * self.num_kv_heads
        heads = self.qkv(u).view(batch, num_new, num_all, self.head_dim).transpose(1, 2)
        turned, v = heads.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=1)
        q, k = rotate(turned, *rotary).split([self.num_heads, self.num_kv_heads], dim=1)
        if cache is not None:
            k, v = cache.extend(k, v)
        grouped = self.num_heads != self.num_kv_heads
        num_seen = k.shape[2]
        if cache is None or num_new == num_seen:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        else:
            mask = None if num_new == 1 else causal_mask(num_new, num_seen, u.device)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        return self.output(out.transpose(1, 2).flatten(2))

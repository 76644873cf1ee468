"""A decoder-only Transformer whose sublayers are wrapped in hyper-connections.

The streams are made once, after the embedding, and collapsed once, before the head; every site reads from them and
writes to them. The forward pass is three steps that a pipeline can cut between: ``embed``, ``walk``, ``readout``.

Shape legend: B batch, T tokens, n streams, C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mhc_layers import functional
from mhc_layers._streams import autocast_is_on
from mhc_layers.config import TransformerConfig
from mhc_layers.conventions import get_convention
from mhc_layers.grouping import param_groups
from mhc_layers.hyper_connection import HyperConnection
from mhc_layers.models.attention import Attention, LayerCache
from mhc_layers.models.mlp import SwiGLU
from mhc_layers.models.moe import MixtureOfExperts
from mhc_layers.models.norm import RMSNorm
from mhc_layers.models.readout import make_readout
from mhc_layers.models.rotary import RotaryEmbedding

__all__ = ["AttentionSublayer", "FeedForwardSublayer", "StepContext", "Transformer", "WalkState"]


@dataclass
class StepContext:
    """What the sublayers of one forward pass share: the rotary tables of its positions, and the caches."""

    rotary: tuple[Tensor, Tensor]
    caches: Sequence[LayerCache] | None = None


class WalkState(NamedTuple):
    """What passes from one stretch of sites to the next.

    ``x (B, T, n, C)``, or ``(B, T, 1, C)`` for equal streams before the first site; ``h_pre (B, T, n)`` of the last
    site, or None (needed where reads are delayed); the summed auxiliary loss, 0-d, or None.
    """

    x: Tensor
    h_pre: Tensor | None = None
    aux_loss: Tensor | None = None


class AttentionSublayer(nn.Module):
    """Attention of a normalised input: ``(B, T, C)`` to ``(B, T, C)``. It holds the norm; its site applies it."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config.dim, config.num_heads, cast(int, config.num_kv_heads))

    def forward(self, u: Tensor, context: StepContext) -> Tensor:
        cache = None if context.caches is None else context.caches[self.layer]
        return self.attention(u, context.rotary, cache)


class FeedForwardSublayer(nn.Module):
    """SwiGLU, or a mixture of experts, which also returns its balance loss. It holds the norm; its site applies it."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.dim, config.norm_eps)
        hidden_dim = cast(int, config.hidden_dim)
        if config.num_experts:
            self.feed_forward: nn.Module = MixtureOfExperts(
                config.dim, hidden_dim, config.num_experts, config.experts_per_token
            )
        else:
            self.feed_forward = SwiGLU(config.dim, hidden_dim)

    def forward(self, u: Tensor, context: StepContext) -> Tensor | tuple[Tensor, Tensor]:
        return self.feed_forward(u)


class Transformer(nn.Module):
    """Decoder with rotary grouped-query attention and SwiGLU feed-forward layers in hyper-connections.

    Parameters
    ----------
    config : TransformerConfig
        Shape and wiring.

    Attributes
    ----------
    sites : ModuleList of HyperConnection
        In depth order: attention and feed-forward of layer 0, of layer 1, and so on.

    Notes
    -----
    Claims: :ref:`decoding_equals_the_full_forward <claim-decoding-equals-the-full-forward>`,
    :ref:`trained_depth_certificate_holds <claim-trained-depth-certificate-holds>`,
    :ref:`trained_depth_norm_at_most_sqrt_n <claim-trained-depth-norm-at-most-sqrt-n>`,
    :ref:`trained_streams_differ <claim-trained-streams-differ>`.

    Examples
    --------
    >>> import torch
    >>> from mhc_layers import Transformer, TransformerConfig
    >>> model = Transformer(TransformerConfig(vocab_size=256, dim=32, num_layers=2, num_heads=4))
    >>> model(torch.randint(256, (2, 10))).shape
    torch.Size([2, 10, 256])
    >>> len(model.sites)
    4
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        sites: list[HyperConnection] = []
        for layer in range(config.num_layers):
            for sublayer in (AttentionSublayer(config, layer), FeedForwardSublayer(config)):
                site = HyperConnection(
                    config.dim,
                    config.num_streams,
                    sublayer,
                    norm="norm",
                    convention=config.convention,
                    connection=config.connection,
                    res_map=config.res_map,
                    init=config.init,
                    index=len(sites),
                    implementation=config.implementation,
                )
                sites.append(site)
        self.sites = nn.ModuleList(sites)
        self.rotary = RotaryEmbedding(config.head_dim, config.max_seq_len, config.rope_theta)
        self.readout_streams = make_readout(get_convention(config.convention), config.dim, config.num_streams)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.register_load_state_dict_post_hook(_tie)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise every parameter and table; needed again after ``to_empty`` from the meta device."""
        _tie(self)
        std, depth = self.config.init_std, (2 * self.config.num_layers) ** -0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(std=std * depth if name.endswith(".output") else std)
            elif module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens ``(B, T)`` to streams ``(B, T, n, C)``, all equal; in autocast they have its dtype."""
        return functional.expand_streams(self._embeddings(tokens), self.config.num_streams)

    def first_streams(self, tokens: Tensor, site: HyperConnection | None = None) -> Tensor:
        """:meth:`embed`, or ``(B, T, 1, C)`` in place of equal streams where the first site reads them as one.

        ``site`` is the first site, where the model has given its sites to stages of a pipeline.
        """
        site = cast(HyperConnection, self.sites[0]) if site is None else site
        if getattr(site.implementation, "folds_broadcast", False):
            return self._embeddings(tokens).unsqueeze(-2)
        return self.embed(tokens)

    def _embeddings(self, tokens: Tensor) -> Tensor:
        e = self.embedding(tokens)
        if autocast_is_on(e.device.type):
            e = e.to(torch.get_autocast_dtype(e.device.type))
        return e

    def context(self, num_tokens: int, caches: Sequence[LayerCache] | None = None) -> StepContext:
        """Prepare what the sublayers need for ``num_tokens`` new tokens.

        Raises
        ------
        ValueError
            If the sequence is longer than ``max_seq_len``.
        """
        start = caches[0].length if caches else 0
        if start + num_tokens > self.config.max_seq_len:
            raise ValueError(
                f"The sequence has {start + num_tokens} tokens and max_seq_len is {self.config.max_seq_len}; "
                "shorten it or build the model with a larger max_seq_len."
            )
        return StepContext(self.rotary(start, num_tokens), caches)

    def walk(self, state: WalkState, context: StepContext, sites: Sequence[HyperConnection] | None = None) -> WalkState:
        """Pass the streams through consecutive sites (all of them by default), fusing across their boundaries."""
        if sites is None:
            sites = cast("Sequence[HyperConnection]", self.sites)
        if not sites:
            return state
        x, h_pre, aux_loss = state
        u, site_state = sites[0].pre(x, h_pre, broadcast=x.shape[-2] < sites[0].num_streams)
        for index, site in enumerate(sites):
            result = cast(Callable[..., Any], site.sublayer)(u, context)
            if isinstance(result, tuple):
                result, aux = result
                aux_loss = aux if aux_loss is None else aux_loss + aux
            if index + 1 < len(sites):
                x, u, site_state = site.boundary(x, result, site_state, sites[index + 1])
            else:
                x = site.post(x, result, site_state)
        return WalkState(x, site_state.h_pre, aux_loss)

    def readout(self, x: Tensor, last_pre: Tensor | None = None) -> Tensor:
        """Streams ``(B, T, n, C)`` to logits ``(B, T, V)``."""
        return self.head(self.norm(self.readout_streams(x, last_pre)))

    def run(self, tokens: Tensor, caches: Sequence[LayerCache] | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the logits and the weighted auxiliary loss (None for a dense model) of tokens ``(B, T)``."""
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise TypeError(
                f"Tokens must be integers below vocab_size, got {tokens.dtype}; tokens.long() converts them."
            )
        if tokens.dim() != 2:
            raise ValueError(
                f"Tokens must have shape (B, T), got {tuple(tokens.shape)}; tokens[None] adds a batch axis."
            )
        state, context = WalkState(self.first_streams(tokens)), self.context(tokens.shape[1], caches)
        block = 2 * self.config.recompute_layers
        if block and torch.is_grad_enabled() and caches is None:
            for start in range(0, len(self.sites), block):
                sites = list(self.sites)[start : start + block]
                state = WalkState(*checkpoint(self.walk, state, context, sites, use_reentrant=False))
        else:
            state = self.walk(state, context)
        aux_loss = None if state.aux_loss is None else self.config.balance_weight * state.aux_loss
        return self.readout(state.x, state.h_pre), aux_loss

    def forward(self, tokens: Tensor, caches: Sequence[LayerCache] | None = None) -> Tensor:
        """Compute next-token logits.

        Parameters
        ----------
        tokens : Tensor
            ``(B, T)`` integers below ``vocab_size``.
        caches : sequence of LayerCache, optional
            One for each layer, from :meth:`make_caches`; extended in place.

        Returns
        -------
        Tensor
            ``(B, T, V)``.

        Raises
        ------
        TypeError
            If ``tokens`` are not integers.
        ValueError
            If ``tokens`` are not ``(B, T)``, or more than ``max_seq_len`` with those of the caches.
        """
        return self.run(tokens, caches)[0]

    def loss(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return (the training loss, the mean cross-entropy in nats); they differ by the auxiliary loss.

        Raises
        ------
        TypeError, ValueError
            If ``tokens`` are not integers ``(B, T)``, or ``targets`` have another shape.
        """
        if targets.shape != tokens.shape:
            raise ValueError(
                f"Targets must have the shape of the tokens, {tuple(tokens.shape)}, got {tuple(targets.shape)}; they "
                "are the tokens one step later."
            )
        logits, aux_loss = self.run(tokens)
        cross_entropy = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())
        return (cross_entropy if aux_loss is None else cross_entropy + aux_loss), cross_entropy

    def make_caches(self, batch_size: int, max_len: int | None = None) -> list[LayerCache]:
        """Allocate an empty key-value cache for each layer, in the dtype and on the device of the weights."""
        config, weight = self.config, self.embedding.weight
        shape = (batch_size, cast(int, config.num_kv_heads), max_len or config.max_seq_len, config.head_dim)
        return [LayerCache(weight.new_empty(shape), weight.new_empty(shape)) for _ in range(config.num_layers)]

    def param_groups(self, weight_decay: float = 0.1) -> list[dict[str, Any]]:
        """Split the parameters for an optimizer, see :func:`mhc_layers.grouping.param_groups`."""
        return param_groups(self, weight_decay)


def _tie(model: Transformer, _: Any = None) -> None:
    """Make the head share the embedding's weight where the configuration says so: ``assign=True`` parts them."""
    if model.config.tie_embeddings:
        model.head.weight = model.embedding.weight

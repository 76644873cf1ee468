"""Frozen, keyword-only configurations; a wrong value fails when they are made, with the fix in the message."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from birkhoff._checks import as_count
from mhc_layers.conventions import PAPER, Convention, get_convention
from mhc_layers.initialization import INITS
from mhc_layers.residual_maps import res_map_names

__all__ = ["CONNECTION_KINDS", "TransformerConfig"]

CONNECTION_KINDS = ("mhc", "mhc_static", "identity", "hc", "hc_static", "residual")
"""Kinds of connection: constrained (dynamic or static), identity mixing, free (dynamic or static), none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape and wiring of a decoder :class:`~mhc_layers.Transformer`.

    Parameters
    ----------
    vocab_size, dim, num_layers, num_heads : int
        Vocabulary, channels C, blocks (two sites each), query heads.
    num_kv_heads : int, optional
        Key and value heads; a divisor of ``num_heads``, which is the default.
    hidden_dim : int, optional
        Width of the feed-forward layer; by default ``8/3 dim`` rounded up to a multiple of 32.
    max_seq_len : int
        Longest sequence, prompt and generated tokens together.
    connection : str
        Kind of the sites, one of :data:`CONNECTION_KINDS`.
    num_streams : int
        Streams n; "residual" always has 1, and the convention PAPER.
    convention : Convention or str
        Orientation, epsilons, readout and read delay of the sites.
    res_map : str, optional
        Name of what replaces the projection, see :func:`mhc_layers.residual_maps.get_res_map`.
    init : str
        Initial values of the sites, a name of :data:`mhc_layers.initialization.INITS`.
    tie_embeddings : bool
        The head shares the embedding's weight.
    rope_theta, norm_eps : float
        Base of the rotary frequencies; epsilon of the sublayers' norms.
    init_std : float
        Standard deviation of the initial weights; output projections are divided by ``sqrt(2 num_layers)``.
    num_experts, experts_per_token : int
        Experts of every feed-forward layer (0: dense), and how many each token uses.
    balance_weight : float
        Weight of the load-balancing loss.
    recompute_layers : int
        Recompute activations in blocks of this many layers in the backward pass; 0 keeps everything.
    implementation : str
        Row of the table of site implementations; "auto" takes the first that accepts the site.

    Raises
    ------
    ValueError
        If a value is out of range or two values do not fit together.

    Examples
    --------
    >>> from mhc_layers import TransformerConfig
    >>> config = TransformerConfig(vocab_size=256, dim=64, num_layers=2, num_heads=4)
    >>> config.hidden_dim, config.num_kv_heads, config.head_dim
    (192, 4, 16)
    >>> TransformerConfig.from_dict(config.to_dict()) == config
    True
    """

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    hidden_dim: int | None = None
    max_seq_len: int = 1024
    connection: str = "mhc"
    num_streams: int = 4
    convention: Convention | str = PAPER
    res_map: str | None = None
    init: str = "prenorm"
    tie_embeddings: bool = True
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    init_std: float = 0.02
    num_experts: int = 0
    experts_per_token: int = 2
    balance_weight: float = 0.01
    recompute_layers: int = 0
    implementation: str = "auto"

    def __post_init__(self) -> None:
        def put(field: str, value: Any) -> None:
            object.__setattr__(self, field, value)

        put("convention", get_convention(self.convention))
        for field in ("vocab_size", "dim", "num_layers", "num_heads", "max_seq_len", "num_streams"):
            put(field, as_count(getattr(self, field), field, least=1))
        for field in ("num_experts", "experts_per_token", "recompute_layers"):
            put(field, as_count(getattr(self, field), field, least=0))
        for field in ("norm_eps", "init_std", "balance_weight"):
            if not 0.0 <= getattr(self, field) < math.inf:
                raise ValueError(f"{field} is {getattr(self, field)}; it must not be negative.")
        if not 0.0 < self.rope_theta < math.inf:
            raise ValueError(f"rope_theta is {self.rope_theta}; it must be positive.")
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(
                f"dim={self.dim} must be num_heads={self.num_heads} times an even head size: "
                "rotary embeddings turn pairs of channels."
            )
        if self.num_kv_heads is None:
            put("num_kv_heads", self.num_heads)
        elif self.num_heads % as_count(self.num_kv_heads, "num_kv_heads", least=1):
            raise ValueError(f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}.")
        if self.hidden_dim is None:
            put("hidden_dim", 32 * -(-8 * self.dim // 96))
        else:
            put("hidden_dim", as_count(self.hidden_dim, "hidden_dim", least=1))
        if self.connection not in CONNECTION_KINDS:
            raise ValueError(f"Unknown connection {self.connection!r}; accepted: {', '.join(CONNECTION_KINDS)}.")
        if self.connection == "residual":
            put("num_streams", 1)
            put("convention", PAPER)  # one stream and no maps: no convention applies
        if self.res_map is not None and self.connection not in ("mhc", "mhc_static"):
            raise ValueError(
                f"res_map={self.res_map!r} replaces the projection of 'mhc' and 'mhc_static'; "
                f"got connection={self.connection!r}."
            )
        if self.res_map is not None and self.res_map not in res_map_names():
            raise ValueError(f"Unknown res_map {self.res_map!r}; accepted: {', '.join(res_map_names())}.")
        if self.init not in INITS:
            raise ValueError(f"Unknown init {self.init!r}; presets: {', '.join(INITS)}.")
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} must lie between 1 and num_experts={self.num_experts}."
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.num_heads

    def replace(self, **changes: Any) -> TransformerConfig:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values; the convention becomes a dictionary."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> TransformerConfig:
        """Build a configuration from :meth:`to_dict`'s value.

        Raises
        ------
        ValueError
            If a key is not a field.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(f"Unknown fields of a TransformerConfig: {unknown}; accepted: {sorted(known)}.")
        fields = dict(fields)
        if isinstance(fields.get("convention"), dict):
            fields["convention"] = Convention.from_dict(fields["convention"])
        return cls(**fields)

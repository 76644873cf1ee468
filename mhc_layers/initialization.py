"""Initial values of a site's parameters, as named presets.

The paper gives ``alpha = 0.01`` and nothing else, so every preset below is somebody's choice, named as such.
Two properties matter. At the start the model should compute what a pre-norm Transformer computes. And the streams,
which start as copies, must be able to become different: with ``phi = 0`` and the same biases for every stream, the
gradients of all streams are equal and they stay copies for ever.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["INITS", "Init", "get_init"]


@dataclass(frozen=True, kw_only=True)
class Init:
    """Initial values of ``phi``, ``alpha`` and the biases of one site.

    Every site favours one stream, its index modulo n, so that depth breaks the symmetry between streams.

    Parameters
    ----------
    name : str
        Name in configs.
    phi_std : float
        Standard deviation of the normal entries of ``phi``; 0 gives zeros.
    alpha : float
        Initial value of the three gates.
    read_weight : float or None
        ``h_pre`` of the favoured stream; the others share ``1 - read_weight`` equally. None: use ``read_biases``.
    read_biases, write_biases : tuple of float
        Bias of ``h_pre`` and of ``h_post`` for (the favoured stream, the other streams).
    off_diagonal : float
        Bias of the residual logits off the diagonal; the diagonal has 0.

    Examples
    --------
    >>> from mhc_layers.initialization import get_init
    >>> get_init("prenorm").read_weights(num_streams=4, index=5)
    [0.16666666666666666, 0.5, 0.16666666666666666, 0.16666666666666666]
    """

    name: str
    phi_std: float = 0.0
    alpha: float = 0.01
    read_weight: float | None = None
    read_biases: tuple[float, float] = (0.0, 0.0)
    write_biases: tuple[float, float] = (0.0, 0.0)
    off_diagonal: float = 0.0

    def read_weights(self, num_streams: int, index: int) -> list[float]:
        """Return the initial ``h_pre`` of each stream, before any epsilon."""
        favoured = index % num_streams
        if self.read_weight is None:
            high, low = (1.0 / (1.0 + math.exp(-bias)) for bias in self.read_biases)
        elif num_streams == 1:
            high = low = 1.0 - 2.0**-7  # one cannot be reached by a sigmoid; the sublayer's norm removes the factor
        else:
            high, low = self.read_weight, (1.0 - self.read_weight) / (num_streams - 1)
        return [high if stream == favoured else low for stream in range(num_streams)]

    def pre_bias(self, num_streams: int, index: int, eps_pre: float = 0.0) -> list[float]:
        """Return the bias for which ``sigmoid(bias) + eps_pre`` is :meth:`read_weights`."""
        weights = (weight - eps_pre for weight in self.read_weights(num_streams, index))
        return [math.log(weight / (1.0 - weight)) for weight in weights]

    def post_bias(self, num_streams: int, index: int) -> list[float]:
        """Return the bias of ``h_post``."""
        high, low = self.write_biases
        return [high if stream == index % num_streams else low for stream in range(num_streams)]

    def off_diagonal_mass(self, num_streams: int) -> float:
        """Return the share of a row off the diagonal, ``(n - 1) e^b / (1 + (n - 1) e^b)`` for the bias b there."""
        off = max(num_streams - 1, 1) * math.exp(self.off_diagonal)
        return off / (1.0 + off)


INITS: dict[str, Init] = {
    init.name: init
    for init in (
        # Ours, the default: pre-norm to rounding, near-identity mixing that still has a usable gradient.
        Init(name="prenorm", read_weight=0.5, off_diagonal=-4.0),
        # The mHC-lite authors' values: near-identity mixing, one stream favoured for reading and writing.
        Init(name="hc_like", read_biases=(1.0, -1.0), write_biases=(1.0, -1.0), off_diagonal=-8.0),
        # Zero biases with a random phi, as several ports start: uniform mixing.
        Init(name="uniform", phi_std=0.02),
        # The initial values of transformers' DeepSeek-V4 classes: gates of 1, so the maps start random.
        Init(name="transformers", phi_std=0.02, alpha=1.0),
    )
}
"""The presets by name."""


def get_init(init: Init | str) -> Init:
    """Return a preset by name; an :class:`Init` is returned as it is.

    Raises
    ------
    ValueError
        If the name is not a preset.

    Examples
    --------
    >>> from mhc_layers.initialization import get_init
    >>> get_init("hc_like").off_diagonal
    -8.0
    """
    if isinstance(init, Init):
        return init
    if init not in INITS:
        raise ValueError(f"Unknown init {init!r}; presets: {', '.join(INITS)}.")
    return INITS[init]

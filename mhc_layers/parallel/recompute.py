r"""Recomputation: drop what the connections can rebuild cheaply, keep what only the sublayers can make.

The streams are n times as wide as the model, so keeping them for the backward pass at every site is what makes
hyper-connections expensive in memory. A *recompute block* keeps the streams that enter it and the output f of every
sublayer in it; in the backward pass the block's streams, coefficients and sublayer inputs are rebuilt from these
without running a sublayer again (mHC paper, section 4.3.2). For L layers in blocks of :math:`L_r`, in elements per
token,

.. math:: L_r^* = \arg\min_{L_r} \; n C \lceil L / L_r \rceil + (n + 2) C L_r .
   :label: recompute-argmin

The minimum is taken over integers; rounding :math:`\sqrt{n L / (n + 2)}` misses it for some L.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["block_boundaries", "block_size", "recompute_elements"]


def recompute_elements(num_layers: int, block: int, *, num_streams: int, dim: int = 1) -> int:
    """Count the elements per token that a block size keeps or rebuilds at once.

    Parameters
    ----------
    num_layers : int
        Layers L that are cut into blocks.
    block : int
        Layers of a block.
    num_streams : int
        Streams n.
    dim : int
        Channels C.

    Returns
    -------
    int
        ``n C ceil(L / block) + (n + 2) C block``, the objective of the paper's Eq. 20.

    Examples
    --------
    >>> recompute_elements(60, 6, num_streams=4)
    76
    """
    return num_streams * dim * -(-num_layers // block) + (num_streams + 2) * dim * block


def block_size(num_layers: int, *, num_streams: int) -> int:
    """Return the number of layers in a block that keeps the least memory.

    Parameters
    ----------
    num_layers : int
        Layers L of one pipeline stage.
    num_streams : int
        Streams n.

    Returns
    -------
    int
        The smallest minimiser of :func:`recompute_elements` over 1 .. L.

    Raises
    ------
    ValueError
        If a number is smaller than 1.

    Examples
    --------
    >>> [block_size(layers, num_streams=4) for layers in (60, 36, 30, 24, 12)]
    [6, 4, 5, 4, 3]
    """
    if num_layers < 1 or num_streams < 1:
        raise ValueError(f"num_layers is {num_layers}, num_streams {num_streams}; both must be 1 or more")
    return min(
        range(1, num_layers + 1), key=lambda block: recompute_elements(num_layers, block, num_streams=num_streams)
    )


def block_boundaries(stages: Sequence[int], *, num_streams: int, block: int | None = None) -> list[tuple[int, int]]:
    """Cut the layers of every pipeline stage into recompute blocks; no block straddles a stage border.

    Parameters
    ----------
    stages : sequence of int
        Layers of each stage, in depth order.
    num_streams : int
        Streams n.
    block : int, optional
        Layers of a block; the best size of each stage by default.

    Returns
    -------
    list of (int, int)
        First and one-past-last layer of each block.

    Examples
    --------
    >>> block_boundaries([5, 4], num_streams=4, block=3)
    [(0, 3), (3, 5), (5, 8), (8, 9)]
    """
    boundaries: list[tuple[int, int]] = []
    start = 0
    for layers in stages:
        size = block or block_size(layers, num_streams=num_streams)
        boundaries.extend((first, min(first + size, start + layers)) for first in range(start, start + layers, size))
        start += layers
    return boundaries

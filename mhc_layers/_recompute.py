"""Rebuild the streams and the sublayer inputs of a block of fused sites in one pass.

A block keeps the streams that entered it, and of each site the sublayer's output and the coefficients: C values and
4 (2N + 1) bytes a token, N = n(n + 2), where a site that keeps everything holds (n + 2) C values. The policy (which
sites form a block) is :mod:`mhc_layers.parallel.recompute`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mhc_layers._fused_state import FusedState, fused_norm, token_rows
from mhc_layers._operators import register
from mhc_layers._sharding import is_distributed
from mhc_layers._streams import without_autocast
from mhc_layers._torch_ops import FusedSite, first_stream
from mhc_layers.kernels.cost import register_formulas
from mhc_layers.kernels.table import leaf

if TYPE_CHECKING:
    from mhc_layers.hyper_connection import HyperConnection

__all__ = ["StreamRebuilder", "kept_bytes"]


def recompute_block(
    x: Tensor, fs: list[Tensor], coefs: list[Tensor], reads: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Streams that entered every site of a block but the first, and the inputs of all its sublayers."""
    with without_autocast(x.device.type):
        return leaf("recompute_block", x)(
            x.contiguous(),
            [f.contiguous() for f in fs],
            [coef.contiguous() for coef in coefs],
            [token_rows(read) for read in reads],
        )


def _fake_recompute_block(
    x: Tensor, fs: list[Tensor], coefs: list[Tensor], reads: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    return [x.new_empty(x.shape) for _ in fs], [x.new_empty((*x.shape[:-2], x.shape[-1])) for _ in reads]


RECOMPUTE_BLOCK = register(recompute_block, _fake_recompute_block, replays=False)
register_formulas("recompute_block")


def kept_bytes(num_tokens: int, num_sites: int, num_streams: int, dim: int, item_size: int = 2) -> int:
    """Bytes that a block of fused sites keeps from its forward to its backward, beside what the sublayers keep.

    Examples
    --------
    For bf16 streams, n = 4, C = 4096: 32 KiB for the streams and 8 KiB + 196 bytes for each site.

    >>> from mhc_layers._recompute import kept_bytes
    >>> kept_bytes(1, 1, 4, 4096), kept_bytes(1, 2, 4, 4096) - kept_bytes(1, 1, 4, 4096)
    (41156, 8388)
    """
    rows = num_streams * (num_streams + 2)
    per_site = dim * item_size + 4 * (2 * rows + 1)
    return num_tokens * (num_streams * dim * item_size + num_sites * per_site)


class StreamRebuilder:
    """Tells the streams that a block's sites save from everything else they save, and rebuilds these streams.

    Streams are numbered in the order in which the sites save them: 0 entered the block, 1 entered its second site, and
    so on. What else the sites save is small and is kept.

    Parameters
    ----------
    sites : sequence of HyperConnection
        The block.
    x : Tensor
        Streams that enter it, detached; ``(..., 1, C)`` where they are copies of one.
    h_pre : Tensor or None
        Of the site before, where reads are delayed.
    """

    def __init__(self, sites: Sequence[HyperConnection], x: Tensor, h_pre: Tensor | None) -> None:
        self._x = x
        self._sites = sites
        self._coefs: list[Tensor] = []
        self._last: tuple[int, int] | None = None
        self._delayed = bool(sites[0].convention.read_delay)
        self._first_read = (
            (first_stream(self._entering) if h_pre is None else h_pre.detach()) if self._delayed else None
        )

    @property
    def _entering(self) -> Tensor:
        """The streams that enter the block, all of them."""
        return self._x.expand(*self._x.shape[:-2], self._sites[0].num_streams, -1)

    @staticmethod
    def serves(sites: Sequence[HyperConnection], x: Tensor) -> bool:
        """Whether every site of a block runs fused on these streams, which one process has."""
        fused = all(isinstance(site.implementation, FusedSite) and not is_distributed(site.phi) for site in sites)
        return fused and x.dtype != torch.float64

    def see(self, state: Any) -> None:
        """Keep the coefficients of the next site, from the state that its read returned.

        Raises
        ------
        TypeError
            If the site did not run fused.
        """
        if not isinstance(state, FusedState):
            raise TypeError(
                f"a block of fused sites keeps FusedState, got {type(state).__name__}: streams of its sites must have "
                "one dtype, not float64"
            )
        self._coefs.append(state.coef.detach())

    def number(self, tensor: Tensor) -> int | None:
        """Number of the streams that a site saves; None for any other tensor.

        A site saves the streams that it has, then those it makes: a new address is the next number. Older streams may
        have been freed and their address reused, so only the last one is compared.
        """
        if tensor.dtype != self._x.dtype or tensor.shape not in (self._x.shape, self._entering.shape):
            return None
        pointer = tensor.data_ptr()
        if self._last is None:
            self._last = (pointer, 0)
        elif pointer != self._last[0]:
            self._last = (pointer, self._last[1] + 1)
        return self._last[1]

    def rebuild(self, outputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the streams by number, and the inputs of the sublayers, from the kept sublayer ``outputs``."""
        coefs = self._coefs
        reads = coefs if self._first_read is None else [self._first_read, *coefs[:-1]]
        fs = [output.detach().to(self._x.dtype) for output in outputs[: len(coefs) - 1]]
        with torch.no_grad():
            xs, us = RECOMPUTE_BLOCK(self._entering, fs, coefs[:-1], list(reads))
            us = [self._normed(site, u) for site, u in zip(self._sites, us, strict=True)]
        return [self._x, *xs], us

    def _normed(self, site: HyperConnection, u: Tensor) -> Tensor:
        """What the sublayer was given, normalised by the kernel of the read that was fused with the norm."""
        norm, eps = fused_norm(site, self._x)
        if norm is None:
            return site.normed(u)
        with without_autocast(u.device.type):
            return leaf("norm_rows", self._x)(u, norm.contiguous(), eps)[0]

"""The write of a site fused with the projection of the next.

Tokens M (any leading axes), streams n, channels C, K = nC, N = n(n + 2). Everything contiguous.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from birkhoff.kernels.cuda.launcher import PreparedLaunch
from mhc_layers.kernels.cuda.launch import kernels, refuse, start, token_splits

__all__ = ["applies", "boundary_forward", "boundary_read_forward"]

_TOKENS = 16
_WARPS = 8
_BLOCK_C = 32 * _WARPS


def applies(x: Tensor) -> str | None:
    """Return why :func:`boundary_forward` does not run on streams ``x (M, n, C)``, or None if it does."""
    return refuse(x, (2, 3, 4), "CUDA boundary_forward")


def _shared_bytes(num_streams: int, delayed: bool) -> int:
    """Bytes of shared memory of a block; the source asserts them."""
    n, jt = num_streams, -(-num_streams * (num_streams + 2) // 8)
    coefficients = n + n * n + (n if delayed else 0)
    stage = (n + 1) * _TOKENS * (2 * _BLOCK_C + 64) + _TOKENS * 4 * ((coefficients + 3) // 8 * 8 + 4)
    return 2 * _WARPS * n * jt * 32 * 16 + 2 * stage + 2 * _WARPS * _TOKENS * (8 * jt + 2) * 4


@functools.lru_cache(maxsize=1024)
def _prepare(num_tokens: int, num_streams: int, dim: int, delayed: bool, device: int) -> PreparedLaunch:
    """The launch of one kind of boundary on one device, but for its tensors."""
    shared = _shared_bytes(num_streams, delayed)
    macros = (f"-DSHARED_BYTES={shared}", *(("-DDELAYED",) if delayed else ()))
    kernel = kernels("boundary", num_streams, dim, macros, device).function("boundary_forward_kernel")
    groups = -(-dim // _BLOCK_C)
    splits = token_splits(num_tokens, _TOKENS, groups, 3, device)
    arguments = (*[None] * 8, np.int32(num_tokens))
    with torch.cuda.device(device):
        return kernel.prepare((groups, splits), (32 * _WARPS,), arguments, shared_bytes=shared)


def _launch(x: Tensor, f: Tensor, coef: Tensor, phi: Tensor, delayed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (n, c), big_n = x.shape[-2:], phi.shape[0]
    m = x.numel() // (n * c)
    groups = -(-c // _BLOCK_C)
    out, u = torch.empty_like(x), torch.empty_like(f) if delayed else f
    slabs = torch.empty((groups, m, big_n), dtype=torch.float32, device=x.device)
    squares = torch.empty((groups, m), dtype=torch.float32, device=x.device)
    if m:
        start(_prepare(m, n, c, delayed, x.get_device()), x, f, coef, phi, out, u, slabs, squares)
    return out, u, slabs, squares


def boundary_forward(x: Tensor, f: Tensor, coef: Tensor, phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Write the next streams, and project them for the next site while they are in registers.

    Parameters
    ----------
    x : Tensor
        Streams ``(M, n, C)`` bfloat16.
    f : Tensor
        The sublayer's output ``(M, C)`` bfloat16.
    coef : Tensor
        ``(M, N)`` float32: ``h_pre | h_post | h_res``.
    phi : Tensor
        The next site's, ``(N, K)`` float32; enters as two bfloat16 terms.

    Returns
    -------
    x_next : Tensor
        ``(M, n, C)`` bfloat16.
    slabs : Tensor
        ``(S, M, N)`` float32: partial projections of ``x_next``, as it is stored, over blocks of channels.
    squares : Tensor
        ``(S, M)`` float32: its partial sums of squares.
    """
    out, _, slabs, squares = _launch(x, f, coef, phi, False)
    return out, slabs, squares


def boundary_read_forward(x: Tensor, f: Tensor, coef: Tensor, phi: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`boundary_forward` where the next site reads with this site's ``h_pre``.

    Returns ``x_next``, ``u_next``, ``slabs`` and ``squares``.
    ``u_next = sum_o h_pre[o] x_next[o]`` ``(M, C)`` comes from the same registers, so nothing is read twice.
    """
    return _launch(x, f, coef, phi, True)

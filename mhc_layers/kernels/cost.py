"""What the fused operators compute and move: flop formulas for torch's counter, and bytes of device memory.

Tokens M, streams n, channels C, K = nC, N = n(n + 2). Coefficients are float32; ``phi`` is counted once a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from mhc_layers.kernels.options import streams_of

__all__ = ["bytes_moved", "register_formulas"]


def _sizes(x: tuple[int, ...]) -> tuple[int, int, int]:
    *lead, n, c = x
    tokens = 1
    for size in lead:
        tokens *= size
    return tokens, n, c


def _pre_forward_flops(x: tuple[int, ...], phi: tuple[int, ...], *_: Any, **__: Any) -> int:
    tokens, n, c = _sizes(x)
    return 2 * tokens * n * c * (phi[0] + 1) + 2 * tokens * n * c


def _post_forward_flops(x: tuple[int, ...], *_: Any, **__: Any) -> int:
    tokens, n, c = _sizes(x)
    return 2 * tokens * n * (n + 1) * c


def _post_backward_flops(g: tuple[int, ...], *_: Any, **__: Any) -> int:
    tokens, n, c = _sizes(g)
    return 2 * tokens * n * c + 2 * tokens * n * (n + 1) * c


def _pre_backward_flops(x: tuple[int, ...], phi: tuple[int, ...], *_: Any, **__: Any) -> int:
    tokens, n, c = _sizes(x)
    return 2 * tokens * n * c + 2 * tokens * n * c * (2 * phi[0] + n + 2)


def _boundary_forward_flops(
    x: tuple[int, ...], f: tuple[int, ...], coef: tuple[int, ...], phi: tuple[int, ...], *_: Any, **__: Any
) -> int:
    return _post_forward_flops(x) + _pre_forward_flops(x, phi)


def _boundary_backward_flops(*shapes: Any, **_: Any) -> int:
    x, phi = shapes[0], shapes[14]  # x, ..., next_phi: see the operator's schema
    return _post_backward_flops(x) + _pre_backward_flops(x, phi)


def _recompute_block_flops(x: tuple[int, ...], fs: Any, coefs: Any, reads: Any, *_: Any, **__: Any) -> int:
    tokens, n, c = _sizes(x)
    return len(reads) * 2 * tokens * n * c + len(fs) * _post_forward_flops(x)


def _broadcast_pre_forward_flops(e: tuple[int, ...], phi: tuple[int, ...], *_: Any, **__: Any) -> int:
    tokens, _, c = _sizes(e)
    return 2 * tokens * c * (phi[0] + 1 + streams_of(phi[0]))


def _broadcast_post_forward_flops(
    e: tuple[int, ...], f: tuple[int, ...], coef: tuple[int, ...], *_: Any, **__: Any
) -> int:
    tokens, _, c = _sizes(e)
    n = streams_of(coef[-1])
    return 2 * tokens * n * (n + 1) * c


def _broadcast_post_backward_flops(g: tuple[int, ...], *_: Any, **__: Any) -> int:
    tokens, n, c = _sizes(g)
    return 2 * tokens * 3 * n * c


def _broadcast_pre_backward_flops(e: tuple[int, ...], phi: tuple[int, ...], *_: Any, **__: Any) -> int:
    tokens, _, c = _sizes(e)
    return 2 * tokens * c * (2 * phi[0] + streams_of(phi[0]) + 3)


_FORMULAS: dict[str, Callable[..., int]] = {
    "pre_forward": _pre_forward_flops,
    "post_forward": _post_forward_flops,
    "post_backward": _post_backward_flops,
    "pre_backward": _pre_backward_flops,
    "boundary_forward": _boundary_forward_flops,
    "boundary_backward": _boundary_backward_flops,
    "recompute_block": _recompute_block_flops,
    "broadcast_pre_forward": _broadcast_pre_forward_flops,
    "broadcast_post_forward": _broadcast_post_forward_flops,
    "broadcast_post_backward": _broadcast_post_backward_flops,
    "broadcast_pre_backward": _broadcast_pre_backward_flops,
}


def register_formulas(*names: str) -> None:
    """Tell :class:`torch.utils.flop_counter.FlopCounterMode` about operators, by their names."""
    for name in names:
        register_flop_formula(getattr(torch.ops.mhc_layers, name))(_FORMULAS[name])


def bytes_moved(
    step: str, num_tokens: int, num_streams: int, dim: int, item_size: int = 2, *, norm: bool = False
) -> int:
    """Bytes of device memory that a fused step reads and writes, each tensor once a pass.

    Parameters
    ----------
    step : str
        The operator: ``"pre_forward"``, ``"post_forward"``, ``"post_backward"``, ``"pre_backward"``; a fused boundary,
        ``"boundary_forward"`` (write with the next projection, then the read), ``"boundary_read_forward"`` (the single
        pass of a delayed read) and ``"boundary_backward"`` (B1, then B2 with A); and ``"broadcast_"`` with one of the
        first four, for a first site of equal streams.
    num_tokens, num_streams, dim : int
        M, n, C.
    item_size : int
        Bytes of one value of the streams.
    norm : bool
        Whether the read ends with the sublayer's norm: B1 then also writes the gradient of what was read, and the
        single pass reads and writes that once more.

    Returns
    -------
    int
        Bytes of one call, coefficients and ``phi`` included.

    Raises
    ------
    ValueError
        If there is no such step.

    Examples
    --------
    With E the bytes of one stream, n = 4 moves 9E for the read, 9E for the write, 10E and 18E for the backward:

    >>> from mhc_layers.kernels.cost import bytes_moved
    >>> E = 2 * 8192 * 4096
    >>> [bytes_moved(step, 8192, 4, 4096) // E for step in ("pre_forward", "post_forward", "post_backward")]
    [9, 9, 10]
    >>> [bytes_moved(f"boundary_{step}", 8192, 4, 4096) // E for step in ("forward", "read_forward", "backward")]
    [14, 10, 24]
    >>> [bytes_moved("pre_backward", 8192, 4, 4096, norm=norm) // E for norm in (False, True)]
    [18, 19]
    """
    n = num_streams
    rows = n * (n + 2)
    stream = num_tokens * dim * item_size
    row = 4 * num_tokens * rows
    phi = 4 * rows * n * dim
    steps = {
        "pre_forward": (2 * n + 1, 5, 1),
        "post_forward": (2 * n + 1, 1, 0),
        "post_backward": (2 * n + 2, 2, 0),
        "pre_backward": (4 * n + 2, 5, 2),
        "boundary_forward": (3 * n + 2, 6, 1),
        "boundary_read_forward": (2 * n + 2, 5, 1),
        "boundary_backward": (5 * n + 4, 7, 2),
        "broadcast_pre_forward": (3, 5, 1),
        "broadcast_post_forward": (n + 2, 1, 0),
        "broadcast_post_backward": (n + 3, 2, 0),
        "broadcast_pre_backward": (n + 5, 5, 2),
    }
    if step not in steps:
        raise ValueError(f"step is {step!r}; accepted: {', '.join(map(repr, steps))}.")
    passes, rows_moved, phis = steps[step]
    if norm:
        passes += 2 if step == "boundary_read_forward" else step.endswith(("pre_backward", "boundary_backward"))
    return passes * stream + rows_moved * row + phis * phi

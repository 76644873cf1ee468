"""Range cap: raise logits that lie more than a given distance below the maximum of their line.

The line is the one normalised first, along which a constant does not change the result. A capped matrix has entries no
smaller than exp(-cap) relative to the largest of its line, which bounds how slowly Sinkhorn's iteration converges.
"""

from __future__ import annotations

from typing import Any

from birkhoff import _math
from birkhoff._layout import Frame

__all__ = ["cap", "pull_cap", "push_cap"]


def cap(logits: Any, range_cap: float | None, axis: int, frame: Frame) -> Any:
    """``max(X, max_axis(X) - range_cap)``; the logits themselves without a cap."""
    if range_cap is None:
        return logits
    return _math.lower_bound(frame.xp, logits, frame.xp.max(logits, axis=axis, keepdims=True) - range_cap)


def _masks(logits: Any, range_cap: float, axis: int, frame: Frame) -> tuple[Any, Any]:
    """1 where an entry is kept, and the share of each entry in the maximum of its line (ties share equally)."""
    xp = frame.xp
    peak = xp.max(logits, axis=axis, keepdims=True)
    one, zero = xp.ones_like(logits), xp.zeros_like(logits)
    kept = xp.where(logits < peak - range_cap, zero, one)
    at_peak = xp.where(logits == peak, one, zero)
    return kept, at_peak / xp.sum(at_peak, axis=axis, keepdims=True)


def pull_cap(logits: Any, grad: Any, range_cap: float | None, axis: int, frame: Frame) -> Any:
    """Gradient through :func:`cap`: a raised entry hands its gradient to the maximum of its line."""
    if range_cap is None:
        return grad
    kept, share = _masks(logits, range_cap, axis, frame)
    return kept * grad + share * frame.xp.sum((1.0 - kept) * grad, axis=axis, keepdims=True)


def push_cap(logits: Any, tangent: Any, range_cap: float | None, axis: int, frame: Frame) -> Any:
    """Tangent through :func:`cap`."""
    if range_cap is None:
        return tangent
    kept, share = _masks(logits, range_cap, axis, frame)
    return kept * tangent + (1.0 - kept) * frame.xp.sum(share * tangent, axis=axis, keepdims=True)

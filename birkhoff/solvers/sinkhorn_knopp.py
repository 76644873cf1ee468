r"""Sinkhorn-Knopp on probabilities: two scaling vectors, one multiplication per entry and half step.

.. math:: K = \exp(X - \max X), \qquad v = 1 / (K^\top w), \quad w = 1 / (K v), \qquad M = \operatorname{diag}(w) K
          \operatorname{diag}(v)

with the maximum taken over each column (exact for columns first). The matrix K is never rewritten, so rounding does not
pile up in it. Within the logit range R the scalings stay below :math:`n e^{2R}`; if w is rescaled to a largest entry of
one, both stay below :math:`n e^R`. From this follow the ranges for which linear arithmetic is safe, listed below; a
matrix beyond them, or with exact zeros, is handed to :class:`SinkhornLog`, which computes the same iteration.
Derivation: ``docs/derivations/sinkhorn_knopp``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from birkhoff import _math
from birkhoff._layout import Frame
from birkhoff.solvers.protocol import First, check_options
from birkhoff.solvers.range_cap import cap, pull_cap
from birkhoff.solvers.sinkhorn_log import SinkhornLog

__all__ = ["SinkhornKnopp"]

_PLAIN = {"float32": 40.0, "float64": 340.0}  # 2 R + log n below the log of the largest number
_RESCALED = {"float32": 80.0, "float64": 680.0}  # R + log n below it


@dataclass(frozen=True, kw_only=True)
class SinkhornKnopp:
    """The classical iteration, stabilised: the default, and the fastest for logits of moderate range.

    Parameters
    ----------
    num_iters : int, default 20
        Full iterations (the limit, with ``tol``).
    tol : float, optional
        Stop a matrix once ``max |sum - 1|`` of its first-normalised side is at most this. None runs ``num_iters``.
    first : {"columns", "rows"}, default "columns"
        The side normalised first; the other one is exact at the end. The paper's order is columns first.
    range_cap : float, optional
        Raise logits more than this below the largest of their (first-normalised) line. Changes the result.

    Raises
    ------
    OptionError
        For values outside these domains.

    Notes
    -----
    Computes the iteration (R4) of :mod:`birkhoff.reference` within ``4 n u max(1, range / 16)`` for every finite input:
    matrices whose range is too wide for linear arithmetic in float32 are computed in float64, or in the log domain.
    Where reading the range would stall a device, all are computed in the log domain.

    Examples
    --------
    >>> import numpy as np, birkhoff
    >>> birkhoff.project(np.eye(2), birkhoff.solvers.SinkhornKnopp()).matrix.round(4)
    array([[0.7311, 0.2689],
           [0.2689, 0.7311]])
    """

    num_iters: int = 20
    tol: float | None = None
    first: First = "columns"
    range_cap: float | None = None
    method: ClassVar[str] = "knopp"
    products_from: ClassVar[int] = 12  # from this n on a matrix product beats a multiplication and a sum

    def __post_init__(self) -> None:
        check_options(self)

    def arithmetics(self, dtype_name: str) -> Iterator[tuple[float | None, Any, str]]:
        """Largest logit range, solver and dtype of each arithmetic, cheapest first; the last serves every range."""
        yield _PLAIN[dtype_name], self, dtype_name
        yield _RESCALED[dtype_name], self._as(_Rescaled), dtype_name
        if dtype_name == "float32":  # double precision costs less than logarithms
            yield _PLAIN["float64"], self, "float64"
        yield None, self.for_any_range(), dtype_name

    def for_any_range(self) -> SinkhornLog:
        """The solver that computes the same for every logit range."""
        return self._as(SinkhornLog)

    def _as(self, kind: Any) -> Any:
        return kind(num_iters=self.num_iters, tol=self.tol, first=self.first, range_cap=self.range_cap)

    def init(self, logits: Any, frame: Frame) -> tuple[Any, ...]:
        """The kernel K, a placeholder for v, and w = 1."""
        first, last = frame.order(self.first)
        logits = cap(logits, self.range_cap, first, frame)
        peak = frame.xp.max(logits, axis=first, keepdims=True)
        kernel = frame.xp.exp(logits - peak)
        return kernel, peak, frame.xp.ones_like(frame.sum(kernel, last))

    def step(self, state: tuple[Any, ...], frame: Frame) -> tuple[Any, ...]:
        """Both scalings anew."""
        kernel, _, w = state
        first, last = frame.order(self.first)
        v = _math.reciprocal(frame.weighted_sum(kernel, w, first))
        return kernel, v, self._inverse(frame.weighted_sum(kernel, v, last), frame)

    def matrix(self, state: tuple[Any, ...], frame: Frame) -> Any:
        """The columns scaled, then the rows divided by their sums (for columns first)."""
        kernel, v, _ = state
        scaled = kernel * v
        return scaled / frame.sum(scaled, frame.order(self.first)[1])

    def trajectory(self, logits: Any, frame: Frame) -> Iterator[tuple[Any, int, float]]:
        """Every half step as a matrix."""
        matrix, _, _ = self.init(logits, frame)
        for _ in range(self.num_iters):
            for axis in frame.order(self.first):
                matrix = matrix / frame.sum(matrix, axis)
                yield matrix, axis, 1.0

    def pull_start(self, logits: Any, grad_log: Any, frame: Frame) -> Any:
        """Through the cap; the subtracted maximum changes nothing."""
        return pull_cap(logits, grad_log, self.range_cap, frame.order(self.first)[0], frame)

    def _inverse(self, sums: Any, frame: Frame) -> Any:
        return _math.reciprocal(sums)


class _Rescaled(SinkhornKnopp):
    """The same with w rescaled to a largest entry of one: safe for twice the range, at a seventh more time."""

    def _inverse(self, sums: Any, frame: Frame) -> Any:
        return frame.xp.min(sums, axis=frame.order(self.first)[0], keepdims=True) / sums

    def trajectory(self, logits: Any, frame: Frame) -> Iterator[tuple[Any, int, float]]:
        """In the log domain: here every iterate is written out, and its small entries would underflow."""
        return self.for_any_range().trajectory(logits, frame)

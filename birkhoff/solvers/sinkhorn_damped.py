r"""The damped recurrence of DeepSeek-V4: a softmax, and an epsilon in the start and in every denominator.

.. math:: M_0 = \operatorname{softmax}(X) + \epsilon_s, \qquad M \leftarrow M / (\textstyle\sum M + \epsilon_d)

It is another function than Sinkhorn's iteration: its sums end slightly below one, and it differs from the undamped one
by up to 0.03 at logit standard deviation 3. Use it to reproduce models that were trained with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from birkhoff import _math
from birkhoff._layout import Frame
from birkhoff.errors import OptionError
from birkhoff.solvers.protocol import First, check_options
from birkhoff.solvers.range_cap import cap, pull_cap, push_cap

__all__ = ["SinkhornDamped"]


@dataclass(frozen=True, kw_only=True)
class SinkhornDamped:
    """Softmax, then alternating divisions by (sum + epsilon): DeepSeek-V4's recurrence on the stored matrix.

    Parameters
    ----------
    num_iters : int, default 20
        Full iterations; the softmax counts as the first half step.
    tol : float, optional
        Stop a matrix once ``max |sum - 1|`` of its first-normalised side is at most this. The damping keeps all sums
        ``eps_den`` below one, so a smaller ``tol`` is never met.
    first : {"rows", "columns"}, default "rows"
        The axis of the softmax: "rows" is DeepSeek's softmax over the last axis.
    range_cap : float, optional
        Raise logits more than this below the largest of their line before the softmax.
    eps_start : float, default 1e-6
        Added to the softmax.
    eps_den : float, default 1e-6
        Added to every later sum.

    Raises
    ------
    OptionError
        For values outside these domains.

    Notes
    -----
    Computes (R5)-(R7) of :mod:`birkhoff.reference` within ``4 n u max(1, range / 16)``. The result is the *stored*
    matrix; DeepSeek applies its transpose. The limit of every sum is ``1 - eps_den`` (the fixed point of
    ``s / (s + eps_den)``); without a ``tol``, :func:`birkhoff.project` calls a matrix converged that is as near to it
    as it asks other solvers to be near one.
    Claims: :ref:`damped_side_below_one <claim-damped-side-below-one>`.

    Examples
    --------
    >>> import numpy as np, birkhoff
    >>> matrix = birkhoff.project(np.eye(2), birkhoff.solvers.SinkhornDamped()).matrix
    >>> bool(abs(matrix.sum(axis=0) - 1).max() < 2e-6)
    True
    """

    num_iters: int = 20
    tol: float | None = None
    first: First = "rows"
    range_cap: float | None = None
    eps_start: float = 1e-6
    eps_den: float = 1e-6
    method: ClassVar[str] = "damped"

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("eps_start", "eps_den"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise OptionError(f"SinkhornDamped: {name} must be >= 0, got {getattr(self, name)!r}")

    @property
    def bias(self) -> float:
        """How far from one the sums end, however many iterations run."""
        return self.eps_den

    def init(self, logits: Any, frame: Frame) -> tuple[Any, ...]:
        """The start twice: as the matrix before any iteration, and as what the next half step divides."""
        start = self._softmax(logits, frame) + self.eps_start
        return start, start

    def step(self, state: tuple[Any, ...], frame: Frame) -> tuple[Any, ...]:
        """The last side, which ends the iteration, and the first side of the next one."""
        first, last = frame.order(self.first)
        ended = self._divide(state[1], last, frame)
        return ended, self._divide(ended, first, frame)

    def matrix(self, state: tuple[Any, ...], frame: Frame) -> Any:
        """The matrix after its last side."""
        return state[0]

    def trajectory(self, logits: Any, frame: Frame) -> Iterator[tuple[Any, int, float]]:
        """Every half step after the softmax."""
        first, last = frame.order(self.first)
        matrix = self._softmax(logits, frame) + self.eps_start
        for half in range(2 * self.num_iters - 1):
            axis = first if half % 2 else last
            matrix = self._divide(matrix, axis, frame)
            yield matrix, axis, 1.0

    def pull_start(self, logits: Any, grad_log: Any, frame: Frame) -> Any:
        """Through ``log(softmax + eps)`` and the cap."""
        first, _ = frame.order(self.first)
        soft = self._softmax(logits, frame)
        grad = grad_log * self._share(soft, frame)  # d log(s + e) = s / (s + e) d log s
        grad = grad - soft * frame.xp.sum(grad, axis=first, keepdims=True)
        return pull_cap(logits, grad, self.range_cap, first, frame)

    def pull_start_tangent(self, logits: Any, grad_log: Any, tangent: Any, grad_tangent: Any, frame: Frame) -> Any:
        """The product rule on :meth:`pull_start`, whose softmax moves with the logits."""
        first, _ = frame.order(self.first)
        total = frame.xp.sum
        soft = self._softmax(logits, frame)
        share = self._share(soft, frame)
        moved = push_cap(logits, tangent, self.range_cap, first, frame)
        log_moved = moved - total(soft * moved, axis=first, keepdims=True)
        soft_moved = soft * log_moved
        grad = grad_log * share
        grad_moved = grad_tangent * share + grad_log * (1.0 - share) * share * log_moved
        grad_moved = (
            grad_moved
            - soft_moved * total(grad, axis=first, keepdims=True)
            - soft * total(grad_moved, axis=first, keepdims=True)
        )
        return pull_cap(logits, grad_moved, self.range_cap, first, frame)

    def push_start(self, logits: Any, tangent: Any, frame: Frame) -> Any:
        """Through the cap and ``log(softmax + eps)``."""
        first, _ = frame.order(self.first)
        soft = self._softmax(logits, frame)
        tangent = push_cap(logits, tangent, self.range_cap, first, frame)
        tangent = tangent - frame.xp.sum(soft * tangent, axis=first, keepdims=True)
        return tangent * self._share(soft, frame)

    def _softmax(self, logits: Any, frame: Frame) -> Any:
        first, _ = frame.order(self.first)
        return _math.softmax(frame.xp, cap(logits, self.range_cap, first, frame), first, frame.accumulate)

    def _divide(self, matrix: Any, axis: int, frame: Frame) -> Any:
        sums = frame.sum(matrix, axis) + self.eps_den
        if self.eps_den == 0.0:  # a line of zeros stays
            sums = frame.xp.where(sums == 0.0, frame.xp.ones_like(sums), sums)
        return matrix / sums

    def _share(self, soft: Any, frame: Frame) -> Any:
        if self.eps_start == 0.0:
            return frame.xp.ones_like(soft)
        return soft / (soft + self.eps_start)

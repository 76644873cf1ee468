r"""Sinkhorn's iteration on logarithms: any logit range, one exponential per entry and half step.

.. math:: L \leftarrow L - \omega \log \textstyle\sum \exp L \quad\text{over columns, then rows}, \qquad L_0 = X

The iterate itself is kept (not the potentials): its dominant entries stay near zero, where rounding is smallest. The
end is one shifted exponential and a linear division, so the last side is exact to rounding. Derivation:
``docs/derivations/log_domain``; relaxation: ``docs/derivations/over_relaxation``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from birkhoff import _math
from birkhoff._layout import Frame
from birkhoff.errors import OptionError
from birkhoff.solvers.protocol import First, check_options
from birkhoff.solvers.range_cap import cap, pull_cap, push_cap

__all__ = ["SinkhornLog"]


@dataclass(frozen=True, kw_only=True)
class SinkhornLog:
    r"""Sinkhorn-Knopp in the log domain: the method for logits of any range.

    Parameters
    ----------
    num_iters : int, default 20
        Full iterations (the limit, with ``tol``).
    tol : float, optional
        Stop a matrix once ``max |sum - 1|`` of its first-normalised side is at most this. None runs ``num_iters``.
    first : {"columns", "rows"}, default "columns"
        The side normalised first; the other one is exact at the end.
    range_cap : float, optional
        Raise logits more than this below the largest of their (first-normalised) line. Changes the result.
    relaxation : float, default 1.0
        Over-relaxation weight :math:`\omega \in (0, 2)` of every half step but the first and the last. 1 is Sinkhorn's
        iteration; 1.2 to 1.6 reaches the limit in fewer iterations where 1 is slow. Changes the truncated result.

    Raises
    ------
    OptionError
        For values outside these domains.

    Notes
    -----
    Computes the iteration (R4) of :mod:`birkhoff.reference` within ``4 n u max(1, range / 16)`` for every finite input.
    Claims: :ref:`accuracy_of_the_iteration <claim-accuracy-of-the-iteration>`,
    :ref:`inside_the_enclosure <claim-inside-the-enclosure>`, :ref:`conformance_vectors <claim-conformance-vectors>`.

    Examples
    --------
    >>> import numpy as np, birkhoff
    >>> result = birkhoff.project(np.array([[0.0, -300.0], [200.0, 0.0]]), birkhoff.solvers.SinkhornLog(num_iters=5))
    >>> result.matrix.sum(axis=1)
    array([1., 1.])
    """

    num_iters: int = 20
    tol: float | None = None
    first: First = "columns"
    range_cap: float | None = None
    relaxation: float = 1.0
    method: ClassVar[str] = "log"

    def __post_init__(self) -> None:
        check_options(self)
        if not 0.0 < self.relaxation < 2.0:
            raise OptionError(f"SinkhornLog: relaxation must lie between 0 and 2, got {self.relaxation!r}")

    def init(self, logits: Any, frame: Frame) -> tuple[Any, ...]:
        """The logits less the maximum of each first-normalised line; with relaxation, less the log of its sum."""
        axis, _ = frame.order(self.first)
        logits = cap(logits, self.range_cap, axis, frame)
        if self.relaxation != 1.0:
            return (_math.log_divide(frame.xp, logits, axis, frame.accumulate, branch=frame.branch),)
        return (logits - _math.maximum_along(frame.xp, logits, axis),)

    def step(self, state: tuple[Any, ...], frame: Frame) -> tuple[Any, ...]:
        """Both half steps."""
        (log_matrix,) = state
        for axis in frame.order(self.first):
            divided = _math.log_divide(frame.xp, log_matrix, axis, frame.accumulate, branch=frame.branch)
            log_matrix = self._relax(log_matrix, divided, frame)
        return (log_matrix,)

    def matrix(self, state: tuple[Any, ...], frame: Frame) -> Any:
        """One shifted exponential and a linear division over the last side."""
        return _math.softmax(frame.xp, state[0], frame.order(self.first)[1], frame.accumulate)

    def trajectory(self, logits: Any, frame: Frame) -> Iterator[tuple[Any, int, float]]:
        """Every half step, ending with the exact last side."""
        (log_matrix,) = self.init(logits, frame)
        if self.relaxation != 1.0:
            yield frame.xp.exp(log_matrix), frame.order(self.first)[0], 1.0
        for _ in range(self.num_iters):
            for axis in frame.order(self.first):
                divided = _math.log_divide(frame.xp, log_matrix, axis, frame.accumulate, branch=frame.branch)
                yield frame.xp.exp(divided), axis, self.relaxation
                log_matrix = self._relax(log_matrix, divided, frame)
        if self.relaxation != 1.0:
            last = frame.order(self.first)[1]
            yield _math.softmax(frame.xp, log_matrix, last, frame.accumulate), last, 1.0

    def pull_start(self, logits: Any, grad_log: Any, frame: Frame) -> Any:
        """Through the cap; the subtracted maximum changes nothing."""
        return pull_cap(logits, grad_log, self.range_cap, frame.order(self.first)[0], frame)

    def pull_start_tangent(self, logits: Any, grad_log: Any, tangent: Any, grad_tangent: Any, frame: Frame) -> Any:
        """The cap is piecewise linear: its pull-back does not move."""
        return self.pull_start(logits, grad_tangent, frame)

    def push_start(self, logits: Any, tangent: Any, frame: Frame) -> Any:
        """Through the cap; the subtracted maximum changes nothing."""
        return push_cap(logits, tangent, self.range_cap, frame.order(self.first)[0], frame)

    def _relax(self, before: Any, after: Any, frame: Frame) -> Any:
        if self.relaxation == 1.0:
            return after
        xp = frame.xp
        return xp.where(before == -xp.inf, before, before + self.relaxation * (after - before))  # a zero stays one

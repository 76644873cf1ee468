r"""Newton's method on the reduced dual: the converged KL projection at any logit range, in a few steps.

Eliminate the exact side (rows, for columns first): with :math:`P = \operatorname{softmax}_{\text{rows}}(X + 1 g^\top)`
minimise

.. math:: \varphi(g) = \sum_i \log \textstyle\sum_j \exp(x_{ij} + g_j) - \sum_j g_j, \qquad
          \nabla\varphi = P^\top 1 - 1, \qquad \nabla^2\varphi = \operatorname{diag}(P^\top 1) - P^\top P

Three things make it work in float32 at every range. The Hessian is a graph Laplacian and is solved without
subtraction (:mod:`birkhoff._tangent`). The iterate is kept as :math:`\log P`, whose large entries are near zero, so
steps are not lost in large potentials. A step moves no potential much further than the logit range, is halved until the
dual falls, and is followed by one Sinkhorn iteration, which never raises it. Derivation:
``docs/derivations/newton_dual``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from birkhoff import _math, _tangent, _xp
from birkhoff._layout import Frame
from birkhoff.errors import OptionError
from birkhoff.precision import unit_roundoff
from birkhoff.solvers.protocol import First, check_options
from birkhoff.solvers.range_cap import cap

__all__ = ["Newton"]

_HALVINGS = 12
_SURE_STEP = 0.2  # a Newton step that moves no potential by more than this lowers the dual for certain


@dataclass(frozen=True, kw_only=True)
class Newton:
    """Damped Newton on the dual with one side eliminated: exact to ``tol`` where Sinkhorn's iteration is not.

    Parameters
    ----------
    num_iters : int, default 100
        Limit of Newton steps. Typical: 3 at logit standard deviation 1, 6 at 10, 12 at 30, 14 at 100.
    tol : float, default 1e-6
        A matrix is finished once ``max |sum - 1|`` of its first-normalised side is at most half of this, so that the
        sums of the result hold ``tol`` with their own rounding. In float64 anything down to 1e-14 is reached.
    first : {"columns", "rows"}, default "columns"
        The side that holds to ``tol``; the other one is exact to rounding.
    range_cap : float, optional
        Raise logits more than this below the largest of their (first-normalised) line. Changes the result.

    Raises
    ------
    OptionError
        For values outside these domains; n above 64 when it runs.

    Notes
    -----
    The result is the limit of Sinkhorn's iteration, not a truncation of it. n = 2 uses the closed form
    ``sigmoid((x11 + x22 - x12 - x21) / 2)``. The gradient is the implicit one, evaluated with the actual sums.
    Claims: :ref:`two_by_two_closed_form <claim-two-by-two-closed-form>`,
    :ref:`limit_gradient_halves_the_norm <claim-limit-gradient-halves-the-norm>`.

    Examples
    --------
    >>> import numpy as np, birkhoff
    >>> logits = np.random.default_rng(0).normal(size=(100, 4, 4)).astype(np.float32) * 30
    >>> result = birkhoff.project(logits, birkhoff.solvers.Newton())
    >>> bool((result.column_error <= 1e-6).all()), bool((birkhoff.project(logits).column_error <= 1e-6).all())
    (True, False)
    """

    num_iters: int = 100
    tol: float | None = 1e-6
    first: First = "columns"
    range_cap: float | None = None
    method: ClassVar[str] = "newton"
    largest_n: ClassVar[int] = 64

    def __post_init__(self) -> None:
        check_options(self)
        if self.tol is None:
            raise OptionError("Newton: tol must be a number > 0; it is a converging method, and stops by its tolerance")

    def target(self) -> float:
        """The error at which the loop stops a matrix."""
        assert self.tol is not None
        return 0.5 * self.tol

    def init(self, logits: Any, frame: Frame) -> tuple[Any, ...]:
        """Log of the matrix after two Sinkhorn iterations (n = 2: of the solution), and the longest step."""
        xp, n = frame.xp, logits.shape[frame.i]
        if n > self.largest_n:
            raise OptionError(
                f"Newton solves dense n x n systems for n <= {self.largest_n}, got n = {n}; use SinkhornLog"
            )
        first, _ = frame.order(self.first)
        logits = cap(logits, self.range_cap, first, frame)
        centred = logits - _math.maximum_along(xp, logits, first)
        finite = xp.where(centred > -xp.inf, centred, xp.zeros_like(centred))
        reach = n - xp.min(finite, axis=(frame.i, frame.j), keepdims=True)
        log_matrix = self._sinkhorn(self._sinkhorn(centred, frame), frame)
        return (self._closed_form(logits, log_matrix, frame) if n == 2 else log_matrix), reach

    def step(self, state: tuple[Any, ...], frame: Frame) -> tuple[Any, ...]:
        """One Newton step with its line search, and one Sinkhorn iteration."""
        log_matrix, reach = state
        step = self._direction(log_matrix, reach, frame)
        return self._sinkhorn(self._move(log_matrix, step, frame), frame), reach

    def error(self, state: tuple[Any, ...], frame: Frame) -> Any:
        """``max |sum - 1|`` of the first-normalised side."""
        sums = frame.sum(_math.exp_in_sum(frame.xp, state[0], frame.branch), frame.order(self.first)[0])
        return frame.xp.max(frame.xp.abs(sums - 1.0), axis=(frame.i, frame.j))

    def matrix(self, state: tuple[Any, ...], frame: Frame) -> Any:
        """One shifted exponential and a linear division over the last side."""
        return _math.softmax(frame.xp, state[0], frame.order(self.first)[1], frame.accumulate)

    def derivative(self, matrix: Any, direction: Any, frame: Frame) -> Any:
        """The (symmetric) derivative of the projection at its solution."""
        return _tangent.kl_derivative(matrix, direction, frame)

    def _sinkhorn(self, log_matrix: Any, frame: Frame) -> Any:
        for axis in frame.order(self.first):
            log_matrix = _math.log_divide(frame.xp, log_matrix, axis, frame.accumulate, branch=frame.branch)
        return log_matrix

    def _direction(self, log_matrix: Any, reach: Any, frame: Frame) -> Any:
        """The Newton step as a change of logits, none of them by more than ``reach``."""
        xp = frame.xp
        matrix = _tangent.lines_first(_math.exp_in_sum(xp, log_matrix, frame.branch), self.first, frame)
        gap, rounding = self._gap(matrix, xp)
        noise = log_matrix.shape[frame.i] ** 0.5 * rounding
        step = _tangent.solve_laplacian(_tangent.weights(matrix, xp), gap, xp, noise=noise)
        step = _tangent.per_free_line(step, self.first, frame)
        step = step - 0.5 * (_peak(step, frame) - _peak(-step, frame))
        return step / _math.lower_bound(xp, _peak(step, frame) / reach, 1.0)

    def _gap(self, matrix: Any, xp: Any) -> tuple[Any, Any]:
        """What each free line lacks to one, and the rounding of one term of it, ``(n, B)`` and ``(B,)``.

        The exact lines are divided once more in the widest dtype: their own rounding would otherwise pile up in
        clusters of lines that are weakly linked to the rest.
        """
        widest = _math.accumulate_dtype(xp, matrix)
        wide = _xp.astype(xp, matrix, widest)
        wide = wide / _math.lower_bound(xp, xp.sum(wide, axis=1, keepdims=True), 0.5)
        gap = 1.0 - xp.sum(wide, axis=0)
        gap = _xp.astype(xp, gap - xp.mean(gap, axis=0), matrix.dtype)
        largest = xp.max(xp.abs(gap), axis=0)
        return gap, unit_roundoff(widest) + unit_roundoff(matrix.dtype) * largest

    def _move(self, log_matrix: Any, step: Any, frame: Frame) -> Any:
        """Halve the step until the dual falls, take it, and normalise the exact side."""
        xp = frame.xp
        _, last = frame.order(self.first)
        n = log_matrix.shape[frame.i]
        length = xp.ones_like(_peak(step, frame))
        rounding = n * n * unit_roundoff(log_matrix.dtype)  # of the dual's terms, relative to the potentials
        for _ in range(_HALVINGS):
            moved = length * step
            span = _peak(moved, frame)
            shifted = log_matrix + moved
            peak = _math.maximum_along(xp, shifted, last)
            lines = peak + xp.log(
                _math.lower_bound(xp, frame.sum(_math.exp_in_sum(xp, shifted - peak, frame.branch), last), 1.0)
            )
            dual = xp.sum(lines, axis=(frame.i, frame.j), keepdims=True) - xp.sum(
                moved, axis=(frame.i, frame.j), keepdims=True
            )
            accepted = xp.logical_or(dual <= rounding * span, span <= _SURE_STEP)
            if frame.branch and bool(xp.all(accepted)):
                break
            length = xp.where(accepted, length, 0.5 * length)
        return _math.log_divide(xp, log_matrix + length * step, last, frame.accumulate, branch=frame.branch)

    def _closed_form(self, logits: Any, otherwise: Any, frame: Frame) -> Any:
        r""":math:`\log \sigma(\pm\theta/2)` on and off the diagonal; ``otherwise`` where it or theta is undefined."""
        xp = frame.xp
        take = (lambda i, j: logits[:, i, j]) if frame.batch == 0 else (lambda i, j: logits[i, j, :])
        half = 0.5 * ((take(0, 0) - take(0, 1)) + (take(1, 1) - take(1, 0)))
        same, other = -_softplus(xp, -half), -_softplus(xp, half)
        closed = xp.stack([xp.stack([same, other]), xp.stack([other, same])])
        closed = closed if frame.batch == 2 else xp.permute_dims(closed, (2, 0, 1))
        defined = xp.logical_and(frame.per_matrix(half == half), otherwise == otherwise)
        return xp.where(defined, closed, otherwise)


def _softplus(xp: Any, values: Any) -> Any:
    """``log(1 + exp(x))`` without overflow."""
    return _math.lower_bound(xp, values, 0.0) + xp.log1p(xp.exp(-xp.abs(values)))


def _peak(step: Any, frame: Frame) -> Any:
    return frame.xp.max(step, axis=(frame.i, frame.j), keepdims=True)

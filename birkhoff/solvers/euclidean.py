r"""Euclidean projection onto the Birkhoff polytope: the nearest doubly stochastic matrix in the Frobenius norm.

.. math:: \min_P \tfrac12 \lVert P - X\rVert_F^2 \quad\text{s.t.}\quad P 1 = 1,\ P^\top 1 = 1,\ P \ge 0

With one potential for each line of the first side, each line of the last side is a projection onto the simplex; the
potentials minimise a convex, piecewise quadratic function whose gradient is the error of the first side's sums. A
regularised semismooth Newton method finds them, started on a scaled-down matrix whose scale is taken back to one step
by step. Derivation: ``docs/derivations/euclidean_projection``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from birkhoff import _math, _xp
from birkhoff._elimination import solve_positive_definite
from birkhoff._layout import Frame
from birkhoff.solvers.protocol import First, check_options

__all__ = ["Euclidean"]

_STEP_SIZES = (1.0, 0.5, 0.25, 0.0625)
_SHRINK = 4.0  # the scale falls by this factor ...
_SETTLED = 0.3  # ... once the sums are this close to one
_RIDGE = 0.1  # largest regularisation, and its ratio to the error


@dataclass(frozen=True, kw_only=True)
class Euclidean:
    r"""Nearest doubly stochastic matrix in the Frobenius norm, by semismooth Newton.

    Unlike the Sinkhorn solvers it reads its argument as the matrix itself, not as logarithms, and it sets entries to
    zero exactly. ``X = c I`` with ``c >= 1`` gives the identity exactly for n = 2, ``c >= n`` for every n.

    Parameters
    ----------
    num_iters : int, default 40
        Newton steps (the limit, with ``tol``). Each costs one solve with an n x n matrix and five trial evaluations.
    tol : float, optional
        Stop a matrix once ``max |sum - 1|`` of its first side is at most this. None runs ``num_iters``.
    first : {"columns", "rows"}, default "columns"
        The side solved for. The other side is exact to rounding for any number of steps.

    Raises
    ------
    OptionError
        For values outside these domains.

    Notes
    -----
    A few Newton steps reach roundoff: half of all Gaussian matrices with n <= 32 need at most 15, all that were tried
    (standard deviation 1 to 100, and the vertices {0, 100}^(4x4)) at most 30. The result satisfies the optimality
    conditions (:math:`P = \max(X + y1^\top + 1z^\top, 0)`) by construction; only the first side's sums carry an error.
    The projection is firmly non-expansive: 1-Lipschitz, with a symmetric Jacobian between 0 and I (an element of the
    generalised Jacobian of Han and Sun), constant while the set of zeros does not change.
    Claims: :ref:`euclidean_is_doubly_stochastic <claim-euclidean-is-doubly-stochastic>`,
    :ref:`euclidean_is_nearest <claim-euclidean-is-nearest>`,
    :ref:`euclidean_is_nonexpansive <claim-euclidean-is-nonexpansive>`.

    References
    ----------
    .. [1] X. Li, D. Sun, K.-C. Toh, "On the efficient computation of a generalized Jacobian of the projector over the
       Birkhoff polytope", Mathematical Programming 179, 2020.

    Examples
    --------
    >>> import numpy as np, birkhoff
    >>> X = np.array([[1.0, 0.2], [0.0, 0.4]])
    >>> birkhoff.project(X, birkhoff.solvers.Euclidean()).matrix
    array([[0.8, 0.2],
           [0.2, 0.8]])
    """

    num_iters: int = 40
    tol: float | None = None
    first: First = "columns"
    method: ClassVar[str] = "euclidean"

    def __post_init__(self) -> None:
        check_options(self)

    def init(self, logits: Any, frame: Frame) -> tuple[Any, ...]:
        """The matrix, potentials at zero, and a scale at which every entry can be positive."""
        xp = frame.xp
        over, last = frame.order(self.first)
        values = logits - _math.maximum_along(xp, logits, last)
        finite = xp.where(xp.isfinite(values), values, xp.zeros_like(values))
        spread = -xp.min(finite, axis=(frame.i, frame.j), keepdims=True)
        scale = _math.lower_bound(xp, spread, 1.0)
        return values, xp.zeros_like(xp.sum(values, axis=over, keepdims=True)), scale

    def step(self, state: tuple[Any, ...], frame: Frame) -> tuple[Any, ...]:
        """One regularised Newton step on the potentials, the best of a few lengths; then perhaps a smaller scale."""
        xp = frame.xp
        values, potentials, scale = state
        over, last = frame.order(self.first)  # sums over `over` are the first side's, over `last` the other's
        n = values.shape[last]
        objective, matrix = self._dual(values, potentials, scale, frame)
        residual = frame.sum(matrix, over) - 1.0
        error = xp.max(xp.abs(residual), axis=last, keepdims=True)
        # Potentials of size z round the entries by eps z, so little is gained below that.
        reach = xp.max(xp.abs(potentials), axis=last, keepdims=True)
        settled = (error <= xp.finfo(values.dtype).eps * (n + 0.25 * reach)) & (scale <= 1.0)
        if frame.branch and bool(xp.all(settled)):
            return state
        ridge = _RIDGE * xp.clip(error, max=1.0)
        newton = -scale * self._solve(matrix, residual, ridge, frame)
        rounding = n * n * xp.finfo(values.dtype).eps  # of the objective's terms
        # Without a better candidate a gradient step is taken: it always descends, since the Hessian is at most n.
        best = potentials - scale / n * residual
        best_objective, matrix = self._dual(values, best, scale, frame)
        best_objective = xp.minimum(best_objective, objective)
        best_error = xp.max(xp.abs(frame.sum(matrix, over) - 1.0), axis=last, keepdims=True)
        best_slope = xp.abs(xp.sum(residual * newton, axis=last, keepdims=True))
        for length in _STEP_SIZES:
            trial = potentials + length * newton
            value, matrix = self._dual(values, trial, scale, frame)
            excess = frame.sum(matrix, over) - 1.0
            # Where the objective is flat to rounding, the slope at the end of the step still tells: it is zero at the
            # minimum along the step.
            slope = xp.abs(xp.sum(excess * newton, axis=last, keepdims=True))
            margin = rounding * (scale + xp.abs(best_objective))
            better = (value < best_objective - margin) | ((value <= best_objective + margin) & (slope < best_slope))
            best = xp.where(better, trial, best)
            best_objective = xp.where(better, value, best_objective)
            best_slope = xp.where(better, slope, best_slope)
            best_error = xp.where(better, xp.max(xp.abs(excess), axis=last, keepdims=True), best_error)
        best = xp.where(settled, potentials, best)  # so that no matrix depends on how long its neighbours take
        smaller = _math.lower_bound(xp, scale / _SHRINK, 1.0)
        return values, best, xp.where(best_error < _SETTLED, smaller, scale)

    def matrix(self, state: tuple[Any, ...], frame: Frame) -> Any:
        """The lines of the last side projected onto the simplex, at scale one, and divided by their sums."""
        values, potentials, scale = state
        matrix = self._lines(values, potentials, frame.xp.ones_like(scale), frame)
        total = frame.sum(matrix, frame.order(self.first)[1])
        return matrix / frame.xp.where(total > 0, total, frame.xp.ones_like(total))

    def derivative(self, matrix: Any, direction: Any, frame: Frame) -> Any:
        r"""Apply the Jacobian at the projected ``matrix``: the derivative and, being symmetric, its adjoint.

        It projects the direction, in the Frobenius norm, onto the matrices that vanish where P does and whose sums are
        zero.

        Parameters
        ----------
        matrix : array, a stack in the given frame
            The result of the projection; only its zeros matter.
        direction : array, same shape
            A tangent of the argument, or a gradient of the result.
        frame : Frame

        Returns
        -------
        array, same shape
        """
        xp = frame.xp
        over, last = frame.order(self.first)
        zero = xp.zeros_like(direction)
        active = matrix > 0
        kept = xp.where(active, direction, zero)
        ones = xp.where(active, xp.ones_like(matrix), xp.zeros_like(matrix))
        per_line = _math.lower_bound(xp, frame.sum(ones, last), 1.0)
        centred = kept - ones * (frame.sum(kept, last) / per_line)
        result = centred
        for _ in range(2):  # the second pass removes what the ridge left of the first
            shift = self._solve(matrix, frame.sum(result, over), 0.0, frame)
            moved = ones * shift
            result = result - (moved - ones * (frame.sum(moved, last) / per_line))
        return result

    def _lines(self, values: Any, potentials: Any, scale: Any, frame: Frame) -> Any:
        r"""Project each line of ``(X + z) / scale`` onto the simplex: :math:`\max(v - \tau, 0)`.

        With v sorted downwards, :math:`\tau = \max_k (v_1 + \dots + v_k - 1) / k`. A line of -inf becomes zero.
        """
        xp = frame.xp
        _, last = frame.order(self.first)
        lines = (values + potentials) / scale
        lines = _math.lower_bound(xp, lines - _math.maximum_along(xp, lines, last), xp.finfo(lines.dtype).min)
        sums = xp.cumulative_sum(xp.sort(lines, axis=last, descending=True), axis=last)
        n = lines.shape[last]
        counts = _xp.astype(xp, xp.arange(1, n + 1, device=_xp.device(lines)), lines.dtype)
        shape = [1, 1, 1]
        shape[last] = n
        threshold = xp.max((sums - 1.0) / xp.reshape(counts, tuple(shape)), axis=last, keepdims=True)
        return _math.lower_bound(xp, lines - threshold, 0.0)

    def _dual(self, values: Any, potentials: Any, scale: Any, frame: Frame) -> tuple[Any, Any]:
        r"""The convex function of potentials of sum zero, :math:`s \sum_i \psi((x_i + z)/s)`, and the matrix.

        :math:`\psi(v) = \max_{a \in \Delta} \langle a, v\rangle - \tfrac12 \lVert a\rVert^2`, attained at the
        projection of v onto the simplex.
        """
        xp = frame.xp
        matrix = self._lines(values, potentials, scale, frame)
        zero = xp.zeros_like(matrix)
        payoff = xp.where(matrix > 0, matrix * (values + potentials) - 0.5 * scale * matrix * matrix, zero)
        return xp.sum(payoff, axis=(frame.i, frame.j), keepdims=True), matrix

    def _solve(self, matrix: Any, residual: Any, ridge: Any, frame: Frame) -> Any:
        r"""Solve :math:`(H + \delta I + 11^\top/n)\, d = r` with the generalised Hessian of the potentials,

        :math:`H = \operatorname{diag}(O^\top 1) - O^\top \operatorname{diag}(O1)^{-1} O`, :math:`O = [P > 0]`.
        """
        xp = frame.xp
        _, last = frame.order(self.first)
        n = matrix.shape[last]
        ones = xp.where(matrix > 0, xp.ones_like(matrix), xp.zeros_like(matrix))
        weighted = ones / _math.lower_bound(xp, frame.sum(ones, last), 1.0)
        # Entry (p, q) of H for lines p, q of the first side; the lines of the other side are summed over.
        left, right = (ones, weighted) if self.first == "columns" else (_swap(frame, ones), _swap(frame, weighted))
        overlap = _gram(frame, left, right)
        counts = frame.sum(left, frame.i)  # one row
        eye = xp.eye(n, dtype=matrix.dtype, device=_xp.device(matrix))
        eye = xp.reshape(eye, (n, n, 1)) if frame.batch == 2 else eye
        floor = 1e2 * xp.finfo(matrix.dtype).eps
        hessian = eye * (counts + ridge + floor) - overlap + 1.0 / n
        column = _swap(frame, residual) if self.first == "columns" else residual
        solution = solve_positive_definite(hessian, column, frame)
        return _swap(frame, solution) if self.first == "columns" else solution


def _swap(frame: Frame, stack: Any) -> Any:
    """Transpose each matrix of a stack."""
    return frame.xp.permute_dims(stack, (0, 2, 1) if frame.batch == 0 else (1, 0, 2))


def _gram(frame: Frame, left: Any, right: Any) -> Any:
    """The products L^T R of a stack."""
    xp = frame.xp
    if frame.batch == 0:
        return _xp.matmul(xp, _swap(frame, left), right)
    return xp.sum(left[:, :, None, :] * right[:, None, :, :], axis=0)

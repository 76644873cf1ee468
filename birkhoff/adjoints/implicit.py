r"""The gradient of the converged projection: one linear solve at the result, whatever number of steps led there.

At the solution P, with upstream gradient G,

.. math:: \bar X = P \circ (G - \lambda 1^\top - 1 \mu^\top)

with the multipliers that make the row and column sums of :math:`\bar X` zero (the actual sums of P are used). It says
nothing about an iteration that was cut short: at 20 iterations and logit standard deviation 4 it is wrong by more than
half in one matrix of a hundred. So it is used only where the residual is below a bound, and the exact gradient of the
iterations elsewhere. Derivation: ``docs/derivations/implicit_adjoint``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from birkhoff import _layout, _math, _tangent, _xp
from birkhoff._checks import as_precision, as_real, check_solver, matching_gradient
from birkhoff.adjoints.unrolled import Unrolled
from birkhoff.errors import OptionError
from birkhoff.precision import DEFAULT, Precision

__all__ = ["Implicit", "implicit_vjp"]


@dataclass(frozen=True, kw_only=True)
class Implicit:
    """The implicit gradient, where the projection has converged well enough to have one.

    Parameters
    ----------
    bound : float, default 1e-4
        Largest ``max |sum - 1|``, over both sides, for which it is used. A matrix above it gets the exact gradient of
        its iterations (:class:`Unrolled`), and the status ``ill_conditioned_adjoint`` from :func:`birkhoff.project`.

    Raises
    ------
    OptionError
        If ``bound`` is not a positive number.

    Notes
    -----
    Claims: :ref:`implicit_equals_unrolled_when_converged <claim-implicit-equals-unrolled-when-converged>`,
    :ref:`limit_gradient_halves_the_norm <claim-limit-gradient-halves-the-norm>`.

    Examples
    --------
    >>> import numpy as np, birkhoff
    >>> from birkhoff.adjoints import Implicit
    >>> grad = Implicit().vjp(np.zeros((2, 2)), np.array([[1.0, 0.0], [0.0, 0.0]]), birkhoff.solvers.Newton())
    >>> grad
    array([[ 0.125, -0.125],
           [-0.125,  0.125]])
    """

    bound: float = 1e-4

    def __post_init__(self) -> None:
        object.__setattr__(self, "bound", as_real(self.bound, "Implicit: bound"))
        if not self.bound > 0:
            raise OptionError(f"Implicit: bound must be > 0, got {self.bound!r}")
        object.__setattr__(self, "_text", repr(self.bound))  # a tracer may turn the number into a symbol

    def trusts(self, matrix: Any) -> Any:
        """Whether each matrix of a batch is converged to the bound: a boolean array of the batch's shape."""
        xp = _xp.array_namespace(matrix)
        rows, columns = _math.marginal_errors(xp, _xp.astype(xp, matrix, _math.compute_dtype(xp, matrix)))
        bound = float(self._text)  # type: ignore[attr-defined]
        return xp.logical_and(rows <= bound, columns <= bound)

    def vjp(self, logits: Any, grad_matrix: Any, solver: Any, *, precision: Precision = DEFAULT) -> Any:
        """Vector-Jacobian product on any array library: the gradient with respect to ``logits``.

        Parameters
        ----------
        logits, grad_matrix : array, shape (..., n, n)
            The input of the projection and the gradient of its result, of one library.
        solver : solver
            It is run to its end to find the matrix.
        precision : Precision, optional

        Returns
        -------
        array, shape (..., n, n)
            In the dtype of ``logits``.

        Raises
        ------
        ArrayTypeError, DtypeError, ShapeError
            For logits that :func:`birkhoff.project` refuses, gradients that are not real floating, and arrays of
            different libraries or shapes.
        OptionError
            For what is no precision or no solver.
        """
        xp = matching_gradient(logits, grad_matrix)
        check_solver(solver)
        precision = as_precision(precision)
        if 0 in logits.shape:
            return xp.zeros_like(logits)
        settled = precision.resolve(logits.dtype)
        compute, accumulate = (_xp.dtype_of(xp, str(name)) for name in (settled.compute, settled.accumulate))
        n = logits.shape[-1]
        stack, grad = (_xp.astype(xp, xp.reshape(array, (-1, n, n)), compute) for array in (logits, grad_matrix))
        frame = _layout.frame_for(xp, accumulate, branch=_xp.can_branch(logits))
        with _xp.quiet(logits):
            matrix = _solution(solver, stack, frame)
            result = implicit_vjp(matrix, grad, solver, frame)
            if hasattr(solver, "trajectory"):
                exact = Unrolled().vjp(stack, grad, solver, precision=precision)
                result = xp.where(frame.per_matrix(self.trusts(matrix)), result, exact)
        return _xp.astype(xp, xp.reshape(result, logits.shape), logits.dtype)


def implicit_vjp(matrix: Any, direction: Any, solver: Any, frame: _layout.Frame) -> Any:
    """The derivative at the solution: the solver's own, else the formula above. Symmetric, so it serves both modes."""
    if hasattr(solver, "derivative"):
        return solver.derivative(matrix, direction, frame)
    return _tangent.kl_derivative(matrix, direction, frame)


def _solution(solver: Any, stack: Any, frame: _layout.Frame) -> Any:
    """The solver's matrix after all its iterations, or earlier if the whole stack is within its target."""
    method = _layout.any_range(solver)
    state = method.init(stack, frame)
    for _ in range(method.num_iters):
        if (
            frame.branch
            and hasattr(method, "error")
            and not bool(frame.xp.any(method.error(state, frame) > method.target()))
        ):
            break
        state = method.step(state, frame)
    return method.matrix(state, frame)

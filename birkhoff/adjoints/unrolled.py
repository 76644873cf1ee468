r"""The exact gradient of the truncated iteration: every half step run backwards, iterates recomputed.

A half step divides a positive matrix by its sums. With P the normalised matrix and :math:`\bar L` the gradient with
respect to the *logarithm* of the matrix,

.. math:: \bar L \leftarrow \bar L - \omega\, P \circ \textstyle\sum \bar L

(sums over the normalised axis, kept; :math:`\omega` the relaxation weight), from :math:`P_T \circ G` down to the start.
The damped recurrence has the same half steps and differs in its start alone. Derivation:
``docs/derivations/exact_adjoint``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from birkhoff import _layout, _xp
from birkhoff._checks import as_precision, check_solver, matching_gradient
from birkhoff._layout import Frame
from birkhoff._registry import load
from birkhoff.errors import DtypeError, OptionError, ShapeError
from birkhoff.precision import DEFAULT, Precision

__all__ = ["Unrolled", "unrolled_jvp", "unrolled_matrix", "unrolled_vjp", "unrolled_vjp_tangent"]


@dataclass(frozen=True)
class Unrolled:
    """The exact gradient of the iterations that ran. The default.

    Notes
    -----
    Claims: :ref:`adjoint_identity <claim-adjoint-identity>`,
    :ref:`gradient_matches_differences <claim-gradient-matches-differences>`,
    :ref:`gradient_sums_vanish <claim-gradient-sums-vanish>`.

    Examples
    --------
    >>> import numpy as np, birkhoff
    >>> from birkhoff.adjoints import Unrolled
    >>> grad = Unrolled().vjp(np.zeros((2, 2)), np.array([[1.0, 0.0], [0.0, 0.0]]), birkhoff.solvers.SinkhornKnopp())
    >>> grad
    array([[ 0.125, -0.125],
           [-0.125,  0.125]])
    """

    def vjp(
        self, logits: Any, grad_matrix: Any, solver: Any, *, num_iters: Any = None, precision: Precision = DEFAULT
    ) -> Any:
        """Vector-Jacobian product on any array library: the gradient with respect to ``logits``.

        Parameters
        ----------
        logits, grad_matrix : array, shape (..., n, n)
            The input of the projection and the gradient of its result, of one library.
        solver : SinkhornKnopp, SinkhornLog or SinkhornDamped
        num_iters : integer array, shape (...), optional
            Iterations that each matrix took, ``Projection.num_iters``; default ``solver.num_iters`` for all.
        precision : Precision, optional

        Returns
        -------
        array, shape (..., n, n)
            In the dtype of ``logits``.

        Raises
        ------
        ArrayTypeError, DtypeError, ShapeError
            For logits that :func:`birkhoff.project` refuses, gradients that are not real floating, arrays of different
            libraries or shapes, and ``num_iters`` that are not integers of the batch's shape.
        OptionError
            For what is no precision or no solver, or one that converges (``Newton``, ``Euclidean``).
        """
        xp = matching_gradient(logits, grad_matrix)
        check_solver(solver)
        precision = as_precision(precision)
        if not hasattr(solver, "trajectory"):
            raise OptionError(
                f"Unrolled: {type(solver).__name__} converges and has no iteration to run backwards; use Implicit()"
            )
        if 0 in logits.shape:
            return xp.zeros_like(logits)
        n = logits.shape[-1]
        stacks = [xp.reshape(array, (-1, n, n)) for array in (logits, grad_matrix)]
        run = load("birkhoff._project:stack_vjp")  # the front door knows the fused kernels, and torch's operators

        def sweep(method: Any, *parts: Any) -> Any:
            return run(*parts, method, precision)

        if num_iters is None:
            grad = sweep(replace(solver, tol=None), *stacks)
        else:
            _check_counts(num_iters, logits)
            grad = by_iterations(solver, xp.reshape(num_iters, (-1,)), xp, sweep, *stacks)
        return xp.reshape(grad, logits.shape)


def _check_counts(counts: Any, logits: Any) -> None:
    shape, batch = getattr(counts, "shape", None), tuple(logits.shape[:-2])
    if shape is None or tuple(shape) != batch:
        raise ShapeError(
            f"num_iters must be an array of the batch's shape {batch}, such as Projection.num_iters, got "
            f"{type(counts).__name__ if shape is None else tuple(shape)}; for one number use the solver's num_iters"
        )
    if not _xp.array_namespace(logits, counts).isdtype(counts.dtype, "integral"):
        raise DtypeError(f"num_iters must hold integers, got {_xp.dtype_name(counts.dtype)}")


def by_iterations(solver: Any, counts: Any, xp: Any, function: Any, *stacks: Any) -> Any:
    """``function(solver with c iterations, *stacks)`` on the matrices whose count is c, put back in place."""
    parts, order = [], []
    for count in sorted(int(c) for c in xp.unique_values(counts)):
        (where,) = xp.nonzero(counts == count)
        order.append(where)
        parts.append(function(replace(solver, tol=None, num_iters=count), *(xp.take(s, where, axis=0) for s in stacks)))
    return xp.take(xp.concat(parts, axis=0), xp.argsort(xp.concat(order)), axis=0)


def unrolled_vjp(logits: Any, grad_matrix: Any, solver: Any, *, xp: Any, accumulate: Any, branch: bool) -> Any:
    """Gradient with respect to a stack of logits ``(B, n, n)``; the iterates live as long as one piece of the batch."""

    def sweep(method: Any, frame: Frame, part: Any, grad: Any) -> tuple[Any, ...]:
        tape = list(method.trajectory(part, frame))
        grad_log = tape[-1][0] * grad
        for matrix, axis, weight in reversed(tape):
            grad_log = grad_log - _weighted(weight, matrix * frame.sum(grad_log, axis))
        return (method.pull_start(part, grad_log, frame),)

    def piece(frame: Frame, *parts: Any) -> tuple[Any, ...]:
        return _layout.split_by_range(solver, frame, parts, sweep)

    with _xp.quiet(logits):
        stacks = (logits, grad_matrix)
        return _layout.map_pieces(piece, xp, stacks, accumulate, branch=branch, keeps_tape=True)[0]


def unrolled_matrix(logits: Any, solver: Any, *, xp: Any, accumulate: Any) -> Any:
    """The matrix itself, in differentiable array calls without any branch."""
    tape = list(_layout.any_range(solver).trajectory(logits, _layout.frame_for(xp, accumulate)))
    return tape[-1][0]


def unrolled_jvp(logits: Any, tangent: Any, solver: Any, *, xp: Any, accumulate: Any) -> Any:
    r"""Tangent of the matrix: :math:`\dot L \leftarrow \dot L - \omega \sum P \circ \dot L` forwards, then
    :math:`\dot P = P \circ \dot L`. Made of differentiable array calls without any branch."""
    frame, method = _layout.frame_for(xp, accumulate), _layout.any_range(solver)
    moved, matrix = method.push_start(logits, tangent, frame), None
    for matrix, axis, weight in method.trajectory(logits, frame):
        moved = moved - _weighted(weight, frame.sum(matrix * moved, axis))
    return matrix * moved


def unrolled_vjp_tangent(
    logits: Any, grad_matrix: Any, tangent: Any, grad_tangent: Any, solver: Any, *, xp: Any, accumulate: Any
) -> Any:
    r"""Tangent of :func:`unrolled_vjp` along ``tangent`` (logits) and ``grad_tangent`` (upstream gradient).

    The second-order rule, by differentiating both sweeps: with :math:`\dot P = P \circ \dot L`,

    .. math:: \dot{\bar L} \leftarrow \dot{\bar L}
              - \omega (\dot P \circ \textstyle\sum \bar L + P \circ \sum \dot{\bar L})

    Symmetric second derivatives make it the gradient of ``<grad_matrix, jvp(tangent)>`` too, which double backward
    uses.
    """
    frame, method = _layout.frame_for(xp, accumulate), _layout.any_range(solver)
    moved, tape = method.push_start(logits, tangent, frame), []
    for matrix, axis, weight in method.trajectory(logits, frame):
        # The normalised matrix moves with weight one, the relaxed iterate with its weight.
        share = frame.sum(matrix * moved, axis)
        tape.append((matrix, matrix * (moved - share), axis, weight))
        moved = moved - _weighted(weight, share)
    matrix, matrix_moved, _, _ = tape[-1]
    grad_log = matrix * grad_matrix
    grad_moved = matrix_moved * grad_matrix + matrix * grad_tangent
    for matrix, matrix_moved, axis, weight in reversed(tape):
        total = frame.sum(grad_log, axis)
        grad_moved = grad_moved - _weighted(weight, matrix_moved * total + matrix * frame.sum(grad_moved, axis))
        grad_log = grad_log - _weighted(weight, matrix * total)
    return method.pull_start_tangent(logits, grad_log, tangent, grad_moved, frame)


def _weighted(weight: float, array: Any) -> Any:
    return array if weight == 1.0 else weight * array

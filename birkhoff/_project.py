"""The front doors: validate, find the namespace, choose the implementation, run, and report."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np

from birkhoff import _dispatch, _math, _xp, rounding
from birkhoff._checks import as_precision, check_solver, square_matrices
from birkhoff._iterate import Trace
from birkhoff._result import Projection, Status
from birkhoff.adjoints import Implicit
from birkhoff.errors import OptionError, ProjectionError
from birkhoff.precision import Precision, unit_roundoff
from birkhoff.solvers import SinkhornKnopp
from birkhoff.solvers.protocol import Solver
from birkhoff.support import Support, diagnose_support

__all__ = ["matrix", "project", "sinkhorn", "stack_vjp"]

Finish = Literal["none", "nonexpansive", "exact"]
_FINISHES = {"none": None, "nonexpansive": rounding.round_to_nonexpansive, "exact": rounding.round_to_polytope}


def sinkhorn(
    logits: Any,
    num_iters: int = 20,
    *,
    first: Literal["columns", "rows"] = "columns",
    precision: Precision | None = None,
) -> Any:
    r"""Make matrices doubly stochastic by ``num_iters`` Sinkhorn-Knopp iterations on ``exp(logits)``.

    .. math:: M_0 = \exp(X), \qquad M_t = T_r(T_c(M_{t-1}))

    with :math:`T_c` dividing columns, and :math:`T_r` rows, by their sums.

    Parameters
    ----------
    logits : array, shape (..., n, n)
        Real floating, of any array-API library. -inf is an exact zero of the matrix.
    num_iters : int, default 20
        Full iterations.
    first : {"columns", "rows"}, default "columns"
        The side normalised first. The other side's sums are exact to rounding; truncation shows in the first side.
    precision : Precision, optional
        Dtypes to compute in, sum in, and return. Default: float32 for half precisions; the result keeps the dtype.

    Returns
    -------
    array, shape (..., n, n)
        Same library, device and dtype as ``logits``, which is not changed. A matrix with a NaN or +inf
        becomes NaN.

    Raises
    ------
    ArrayTypeError, DtypeError, ShapeError, OptionError
        For what is not an array, not real floating, not a batch of square matrices, or an option outside its domain.

    Notes
    -----
    Guarantees: sums of the last side within ``n + 1`` units of roundoff of one, and every entry within ``4 n u max(1,
    range / 16)`` of the same iteration in exact arithmetic, for all finite logits, u of the compute dtype; storing in a
    half precision adds one cast.
    Claims: :ref:`last_side_exact <claim-last-side-exact>`,
    :ref:`entries_in_unit_interval <claim-entries-in-unit-interval>`,
    :ref:`accuracy_of_the_iteration <claim-accuracy-of-the-iteration>`,
    :ref:`composite_norm_at_most_sqrt_n <claim-composite-norm-at-most-sqrt-n>`.
    After finitely many iterations the spectral norm may exceed one; :func:`birkhoff.certify` bounds it.
    On torch it is differentiable (exact gradient of the iterations) and compiles without graph breaks.

    See Also
    --------
    project : other methods, tolerances, exact finishes, and a status per matrix.

    Examples
    --------
    >>> import numpy as np, birkhoff
    >>> birkhoff.sinkhorn(np.array([[1.0, 0.0], [0.0, 1.0]])).round(4)
    array([[0.7311, 0.2689],
           [0.2689, 0.7311]])
    """
    return matrix(logits, SinkhornKnopp(num_iters=num_iters, first=first), precision)


def matrix(logits: Any, solver: Solver, precision: Precision | None = None, *, adjoint: Any = None) -> Any:
    """The matrix of :func:`project` alone: no status and no errors, so nothing reads the data of a fixed iteration."""
    xp = square_matrices(logits, "logits")
    if solver.tol is None or 0 in logits.shape:
        return _fixed(logits, solver, xp, as_precision(precision), adjoint)
    return _solve(logits, solver, xp, as_precision(precision), adjoint, None)[0]


def project(
    logits: Any,
    solver: Solver | None = None,
    *,
    finish: Finish = "none",
    adjoint: Any = None,
    precision: Precision | None = None,
    throw: bool = False,
    trace: Trace | None = None,
) -> Projection:
    """Make matrices doubly stochastic by any solver, and say for each matrix how well it went.

    Parameters
    ----------
    logits : array, shape (..., n, n)
        Real floating, of any array-API library. -inf is an exact zero of the matrix.
    solver : solver, optional
        A value from :mod:`birkhoff.solvers`; default ``SinkhornKnopp()``, 20 iterations, columns first.
    finish : {"none", "nonexpansive", "exact"}
        What follows the solver: nothing; shrinking to spectral norm at most one
        (:func:`birkhoff.rounding.round_to_nonexpansive`); or rounding to both marginals exact
        (:func:`birkhoff.round_to_polytope`).
    adjoint : adjoint, optional
        A value from :mod:`birkhoff.adjoints`: the gradient rule on torch. Default: the solver's own, exact one.
    precision : Precision, optional
        Dtypes to compute in, sum in, and return.
    throw : bool, default False
        Raise :class:`ProjectionError` if a matrix has a status other than ``converged`` (``max_iters_reached``
        counts only if the solver has a ``tol``). Waits for a device.
    trace : callable, optional
        Called as ``trace(iteration, errors)`` after each iteration, ``errors`` the array of ``max |sum - 1|`` of the
        first-normalised side, shape ``(B,)`` for the flattened batch. Slower; for looking, not for training.

    Returns
    -------
    Projection
        ``matrix`` of the input's library, device and dtype; ``status``, ``num_iters``, ``row_error``, ``column_error``,
        arrays of the batch's shape. Without a ``tol``, ``converged`` means errors at most the square root of the unit
        roundoff of the compute dtype (2.4e-4 in float32, 1e-8 in float64), plus ``eps_den`` for ``SinkhornDamped``. A
        result stored in a half precision is allowed one more unit of roundoff of that, from its last cast.

    Raises
    ------
    ArrayTypeError, DtypeError, ShapeError, OptionError
        For what is not an array, not real floating, not a batch of square matrices, or an option outside its domain.
    ProjectionError
        With ``throw``, as said there.

    Notes
    -----
    A NaN or +inf poisons its own matrix alone (``Status.nonfinite_input``). If the logits hold -inf, the pattern of
    zeros is analysed on the host (which waits for a device): without total support the status is ``no_total_support``,
    and the matrix is the iterate, its zeros kept. Under ``torch.compile`` and functional transforms, and for a
    ``DTensor``, that analysis is left out. An empty batch gives an empty result, and so does n = 0, for whatever maps
    matrices to matrices; what answers a question about a matrix (certificates, decompositions, diagnostics) refuses n =
    0.
    Claims: :ref:`status_per_matrix <claim-status-per-matrix>`,
    :ref:`reported_error_is_true <claim-reported-error-is-true>`,
    :ref:`converged_means_within_tolerance <claim-converged-means-within-tolerance>`,
    :ref:`finish_is_nonexpansive <claim-finish-is-nonexpansive>`.

    Examples
    --------
    >>> import numpy as np, birkhoff
    >>> logits = np.array([[0.0, 30.0], [0.0, 0.0]])
    >>> result = birkhoff.project(logits, finish="exact")
    >>> birkhoff.Status(int(result.status)).name, float(result.row_error) < 1e-15
    ('converged', True)
    """
    xp = square_matrices(logits, "logits")
    method: Solver = SinkhornKnopp() if solver is None else solver
    check_solver(method)
    if adjoint is not None and (isinstance(adjoint, type) or not hasattr(adjoint, "vjp")):
        raise OptionError(f"adjoint must be None or a value of birkhoff.adjoints, such as Implicit(), got {adjoint!r}")
    if adjoint is not None and not isinstance(adjoint, Implicit) and not hasattr(method, "trajectory"):
        raise OptionError(
            f"adjoint must be None or Implicit() for {type(method).__name__}, which is differentiated at its solution, "
            f"got {adjoint!r}"
        )
    if trace is not None and not callable(trace):
        raise OptionError(f"trace must be None or callable as trace(iteration, errors), got {trace!r}")
    precision = as_precision(precision)
    if finish not in tuple(_FINISHES):
        raise OptionError(f"finish must be one of {tuple(_FINISHES)}, got {finish!r}")
    settled = precision.resolve(logits.dtype)
    finisher = _FINISHES[finish]
    # A finish works on the unrounded matrix, so that only the last cast rounds.
    running = precision if finisher is None else replace(settled, store=settled.compute)
    solved, counts = _solve(logits, method, xp, running, adjoint, trace)
    finished = solved
    if finisher is not None:
        finished = _xp.astype(xp, finisher(solved), _xp.dtype_of(xp, str(settled.store)))
    result = _report(logits, finished, counts, method, xp, settled)
    if isinstance(adjoint, Implicit) and hasattr(method, "trajectory"):
        result = replace(result, status=_refused(solved, result.status, adjoint, xp))
    if throw:
        _raise_on_trouble(result, method)
    return result


def _fixed(logits: Any, solver: Solver, xp: Any, precision: Precision, adjoint: Any) -> Any:
    """A fixed number of iterations."""
    n = logits.shape[-1]
    if 0 in logits.shape:
        return _xp.astype(xp, logits, _xp.dtype_of(xp, str(precision.resolve(logits.dtype).store)))
    stack = xp.reshape(logits, (-1, n, n))
    return xp.reshape(_binding(xp, "forward")(stack, solver, precision, adjoint), logits.shape)


def _solve(
    logits: Any, solver: Solver, xp: Any, precision: Precision, adjoint: Any, trace: Trace | None
) -> tuple[Any, Any]:
    """The matrix, and the iterations of each matrix, both in the batch's shape."""
    batch = tuple(logits.shape[:-2])
    if 0 in logits.shape or (solver.tol is None and trace is None):
        counts = xp.full(batch, solver.num_iters, dtype=xp.int32, device=_xp.device(logits))
        return _fixed(logits, solver, xp, precision, adjoint), counts
    n = logits.shape[-1]
    stack = xp.reshape(logits, (-1, n, n))
    solved, counts = _binding(xp, "to_tolerance")(stack, solver, precision, adjoint, trace)
    return xp.reshape(solved, logits.shape), xp.reshape(counts, batch)


def _forward_arrays(stack: Any, solver: Solver, precision: Precision, adjoint: Any) -> Any:
    return _dispatch.stack_forward(stack, solver, precision, branch=_xp.can_branch(stack))


def _to_tolerance_arrays(
    stack: Any, solver: Solver, precision: Precision, adjoint: Any, trace: Trace | None
) -> tuple[Any, Any]:
    return _dispatch.stack_to_tolerance(stack, solver, precision, trace, branch=_xp.can_branch(stack))


def stack_vjp(stack: Any, grad_matrix: Any, solver: Solver, precision: Precision) -> Any:
    """Exact gradient of a fixed number of iterations for a stack ``(B, n, n)``, by whatever serves it best."""
    return _binding(_xp.array_namespace(stack), "vjp")(stack, grad_matrix, solver, precision)


def _vjp_arrays(stack: Any, grad_matrix: Any, solver: Solver, precision: Precision) -> Any:
    return _dispatch.stack_vjp(stack, grad_matrix, solver, precision, branch=_xp.can_branch(stack))


def _may_read_arrays(stack: Any) -> bool:
    return True


_ARRAYS: dict[str, Any] = {
    "forward": _forward_arrays,
    "to_tolerance": _to_tolerance_arrays,
    "vjp": _vjp_arrays,
    "may_read": _may_read_arrays,
}


def _torch_binding() -> dict[str, Any]:
    from birkhoff._torch_ops import BINDING  # imports torch, which the caller's array has already done

    return BINDING


_BINDINGS = {"torch": _torch_binding}  # libraries with automatic differentiation


def _binding(xp: Any, role: str) -> Any:
    binding = _BINDINGS.get(_xp.library_name(xp))
    return (_ARRAYS if binding is None else binding())[role]


def _report(logits: Any, projected: Any, counts: Any, solver: Solver, xp: Any, settled: Precision) -> Projection:
    batch = tuple(logits.shape[:-2])
    plain, values = _xp.detach(logits), _xp.detach(projected)
    values = _xp.astype(xp, values, _math.compute_dtype(xp, values))
    if 0 in logits.shape:
        zeros = xp.zeros(batch, dtype=values.dtype, device=_xp.device(values))
        status = xp.zeros(batch, dtype=xp.int32, device=_xp.device(values))
        return Projection(projected, status, counts, zeros, zeros)
    with _xp.quiet(values):
        rows, columns = _math.marginal_errors(xp, values)
    target = solver.tol
    if target is None:
        target = unit_roundoff(settled.compute) ** 0.5 + getattr(solver, "bias", 0.0)
    if settled.store in ("bfloat16", "float16"):  # the iteration cannot answer for the rounding of the last cast
        target += 1.01 * unit_roundoff(settled.store)
    within = xp.logical_and(rows <= target, columns <= target)
    status = _xp.astype(xp, xp.logical_not(within), xp.int32)  # converged is 0, max_iters_reached 1
    zero_pattern = plain == -xp.inf
    if _binding(xp, "may_read")(plain) and bool(xp.any(zero_pattern)):
        total = diagnose_support(xp.logical_not(zero_pattern)) == Support.total
        supported = xp.asarray(total, device=_xp.device(values))
        status = xp.where(supported, status, xp.full_like(status, int(Status.no_total_support)))
    finite = xp.all(plain < xp.inf, axis=(-2, -1))  # false for NaN as well
    status = xp.where(finite, status, xp.full_like(status, int(Status.nonfinite_input)))
    return Projection(projected, status, counts, rows, columns)


def _refused(solved: Any, status: Any, adjoint: Implicit, xp: Any) -> Any:
    """The status with ``ill_conditioned_adjoint`` where the residual is too large for the adjoint."""
    sound = status <= int(Status.max_iters_reached)  # the other two concern the input, and matter more
    refused = xp.logical_and(sound, xp.logical_not(adjoint.trusts(_xp.detach(solved))))
    return xp.where(refused, xp.full_like(status, int(Status.ill_conditioned_adjoint)), status)


def _raise_on_trouble(result: Projection, solver: Solver) -> None:
    codes = _xp.to_numpy(result.status)
    ignored = {Status.converged} | ({Status.max_iters_reached} if solver.tol is None else set())
    for status in sorted(set(codes.reshape(-1).tolist()) - {int(s) for s in ignored}, reverse=True):
        where = np.argwhere(codes == status)
        shown = ", ".join(str(tuple(int(k) for k in index)) for index in where[:5]) + (
            ", ..." if len(where) > 5 else ""
        )
        raise ProjectionError(
            f"{len(where)} of {codes.size} matrices: {Status(status).name} (batch index {shown}). "
            f"{Status(status).advice}",
            status=result.status,
        )

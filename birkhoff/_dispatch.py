"""Choose the implementation of a projection, and say why: the only reader of the table in ``_registry``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from birkhoff import _iterate, _xp
from birkhoff._checks import as_precision, check_solver, square_matrices
from birkhoff._registry import PROJECTIONS, Facts, Resolution
from birkhoff.adjoints.unrolled import unrolled_vjp
from birkhoff.precision import DEFAULT, Precision

__all__ = [
    "explain",
    "facts_of",
    "kernel_arguments",
    "resolve",
    "stack_forward",
    "stack_to_tolerance",
    "stack_vjp",
    "with_dtypes",
]


def facts_of(logits: Any, solver: Any, precision: Precision = DEFAULT) -> Facts:
    """The static facts of a call."""
    library = _xp.library_name(_xp.array_namespace(logits))  # first: it says what is wrong with what is not an array
    settled = precision.resolve(logits.dtype)
    return Facts(
        method=solver.method,
        library=library,
        device=_xp.device_kind(logits),
        dtype=_xp.dtype_name(logits.dtype),
        n=int(logits.shape[-1]),
        precision=(str(settled.compute), str(settled.accumulate), str(settled.store)),
        to_tolerance=solver.tol is not None,
        relaxed=getattr(solver, "relaxation", 1.0) != 1.0,
    )


def resolve(logits: Any, solver: Any, precision: Precision = DEFAULT) -> Resolution[Facts]:
    """The row that serves a call, with the refusals of the rows before it."""
    return PROJECTIONS.resolve(facts_of(logits, solver, precision))


def kernel_arguments(solver: Any) -> dict[str, Any]:
    """A Sinkhorn solver as the keyword arguments of a fused kernel."""
    return {
        "method": solver.method,
        "num_iters": solver.num_iters,
        "first": solver.first,
        "eps_start": getattr(solver, "eps_start", 0.0),
        "eps_den": getattr(solver, "eps_den", 0.0),
        "range_cap": solver.range_cap,
    }


def stack_forward(logits: Any, solver: Any, precision: Precision, *, branch: bool) -> Any:
    """Project a stack ``(B, n, n)`` of real arrays by the row that serves it; the result in the dtype to store.

    Kernels address a contiguous stack; for the others the order of a sum depends on strides, and so would its bits.
    """
    logits = _xp.contiguous(logits)
    resolution = resolve(logits, solver, precision)
    if resolution.row.targets:
        return resolution.row.load("forward")(logits, **kernel_arguments(solver))
    xp, compute, accumulate, store = _dtypes(logits, precision)
    matrix = _iterate.run(solver, _xp.astype(xp, logits, compute), xp=xp, accumulate=accumulate, branch=branch)
    return _xp.astype(xp, matrix, store)


def stack_vjp(logits: Any, grad_matrix: Any, solver: Any, precision: Precision, *, branch: bool) -> Any:
    """Exact gradient of :func:`stack_forward`, in the dtype of the logits."""
    logits, grad_matrix = _xp.contiguous(logits), _xp.contiguous(grad_matrix)
    resolution = resolve(logits, solver, precision)
    if resolution.row.targets:
        return resolution.row.load("backward")(logits, grad_matrix, **kernel_arguments(solver))
    xp, compute, accumulate, _ = _dtypes(logits, precision)
    stacks = (_xp.astype(xp, logits, compute), _xp.astype(xp, grad_matrix, compute))
    grad = unrolled_vjp(*stacks, solver, xp=xp, accumulate=accumulate, branch=branch)
    return _xp.astype(xp, grad, logits.dtype)


def stack_to_tolerance(
    logits: Any, solver: Any, precision: Precision, trace: _iterate.Trace | None = None, *, branch: bool
) -> tuple[Any, Any]:
    """Project a stack until each matrix is within ``solver.tol``; also the iterations that each took."""
    logits = _xp.contiguous(logits)
    resolution = resolve(logits, solver, precision)
    if trace is None and "to_tolerance" in resolution.row.targets:
        options = {name: getattr(solver, name) for name in ("num_iters", "tol", "first", "range_cap")}
        matrix, counts = resolution.row.load("to_tolerance")(logits, **options)
        return matrix, counts
    xp, compute, accumulate, store = _dtypes(logits, precision)
    matrix, counts = _iterate.run_to_tolerance(
        solver, _xp.astype(xp, logits, compute), xp=xp, accumulate=accumulate, branch=branch, trace=trace
    )
    return _xp.astype(xp, matrix, store), counts


def with_dtypes(function: Callable[..., Any], stacks: tuple[Any, ...], solver: Any, precision: Precision) -> Any:
    """Call ``function(*stacks, solver, xp=, accumulate=)`` with the stacks in the compute dtype."""
    xp, compute, accumulate, _ = _dtypes(stacks[0], precision)
    return function(*(_xp.astype(xp, stack, compute) for stack in stacks), solver, xp=xp, accumulate=accumulate)


def _dtypes(logits: Any, precision: Precision) -> tuple[Any, Any, Any, Any]:
    xp, settled = _xp.array_namespace(logits), precision.resolve(logits.dtype)
    return xp, *(_xp.dtype_of(xp, str(name)) for name in (settled.compute, settled.accumulate, settled.store))


def explain(logits: Any, solver: Any, *, precision: Precision = DEFAULT) -> Resolution[Facts]:
    """Say which implementation serves a projection, and why the others refused.

    Parameters
    ----------
    logits : array, shape (..., n, n)
        Only its library, device, dtype and n matter.
    solver : solver
        A value from :mod:`birkhoff.solvers`.
    precision : Precision, optional

    Returns
    -------
    Resolution
        ``row``, ``refusals`` (each with ``row`` and ``reason``) and ``facts``; printing it gives the same in words.

    Raises
    ------
    ArrayTypeError, DtypeError, ShapeError, OptionError
        For what :func:`birkhoff.project` refuses too.

    Examples
    --------
    >>> import numpy as np, birkhoff
    >>> print(birkhoff.explain(np.zeros((4, 4)), birkhoff.solvers.SinkhornKnopp()))
    chosen: array (standard array calls)
    refused: cuda: serves arrays of torch and cupy, got numpy
    refused: triton: serves arrays of torch, got numpy
    refused: triton-newton: serves arrays of torch, got numpy
    """
    square_matrices(logits, "logits")
    check_solver(solver)
    return resolve(logits, solver, as_precision(precision))

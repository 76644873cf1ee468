"""The one loop: start, step, stop at ``num_iters`` or per matrix at ``tol``, with an optional trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from birkhoff import _layout, _math, _xp
from birkhoff._layout import Frame

__all__ = ["Trace", "run", "run_to_tolerance"]

Trace = Callable[[int, Any], None]
"""Called after each iteration with its number and the array of errors of the first-normalised side, shape ``(B,)``."""


def run(solver: Any, logits: Any, *, xp: Any, accumulate: Any, branch: bool) -> Any:
    """Project a stack ``(B, n, n)`` with ``num_iters`` iterations.

    With ``branch`` the values may be looked at: the stack is processed in cache-sized pieces, and each matrix by the
    arithmetic that its range allows. Without it nothing depends on data, and the method for any range is used.
    """

    def piece(frame: Frame, part: Any) -> Any:
        return _layout.split_by_range(solver, frame, (part,), iterate, branch=branch)

    def iterate(method: Any, frame: Frame, part: Any) -> Any:
        state = method.init(part, frame)
        for _ in range(method.num_iters):
            state = method.step(state, frame)
        return method.matrix(state, frame)

    with _xp.quiet(logits):
        return _layout.map_pieces(piece, xp, (logits,), accumulate, split=branch)


def run_to_tolerance(
    solver: Any, logits: Any, *, xp: Any, accumulate: Any, trace: Trace | None = None
) -> tuple[Any, Any]:
    """Project a stack ``(B, n, n)``, each matrix until its error is at most ``tol``; return (matrix, iterations).

    A matrix that has converged is frozen: neither its value nor its count changes after that. Looks at the errors
    once per iteration, which waits for a device.
    """
    method = solver.wide() if hasattr(solver, "wide") else solver
    frame = _layout.frame_for(xp, accumulate)
    where = _xp.device(logits)
    with _xp.quiet(logits):
        state = method.init(logits, frame)
        counts = xp.zeros((logits.shape[0],), dtype=xp.int32, device=where)
        active = xp.ones((logits.shape[0],), dtype=xp.bool, device=where)
        for iteration in range(1, method.num_iters + 1):
            mask = frame.per_matrix(active)
            state = tuple(xp.where(mask, new, old) for new, old in zip(method.step(state, frame), state, strict=True))
            counts = counts + _xp.astype(xp, active, xp.int32)
            rows, columns = _math.marginal_errors(xp, method.matrix(state, frame))
            error = columns if solver.first == "columns" else rows
            if trace is not None:
                trace(iteration, error)
            if solver.tol is not None:
                active = xp.logical_and(active, xp.logical_not(error <= solver.tol))
                if not bool(xp.any(active)):
                    break
        return method.matrix(state, frame), counts

"""The one loop: start, step, stop at ``num_iters`` or per matrix at ``tol``, with an optional trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from birkhoff import _layout, _xp
from birkhoff._layout import Frame

__all__ = ["Trace", "run", "run_to_tolerance"]

Trace = Callable[[int, Any], None]
"""Called after each iteration with its number and the array of errors of the first-normalised side, shape ``(B,)``."""


def run(solver: Any, logits: Any, *, xp: Any, accumulate: Any, branch: bool) -> Any:
    """Project a stack ``(B, n, n)`` with ``num_iters`` iterations.

    With ``branch`` the values may be looked at: the stack is processed in cache-sized pieces, and each matrix by the
    arithmetic that its range allows. Without it nothing depends on data, and the method for any range is used.
    """

    def iterate(method: Any, frame: Frame, part: Any) -> tuple[Any, ...]:
        state = method.init(part, frame)
        for _ in range(method.num_iters):
            state = method.step(state, frame)
        return (method.matrix(state, frame),)

    def piece(frame: Frame, part: Any) -> tuple[Any, ...]:
        return _layout.split_by_range(solver, frame, (part,), iterate)

    with _xp.quiet(logits):
        gains = getattr(solver, "products_from", None)
        return _layout.map_pieces(piece, xp, (logits,), accumulate, branch=branch, products_from=gains)[0]


def run_to_tolerance(
    solver: Any, logits: Any, *, xp: Any, accumulate: Any, branch: bool, trace: Trace | None = None
) -> tuple[Any, Any]:
    """Project a stack ``(B, n, n)``, each matrix until its error is at most ``tol``; return (matrix, iterations).

    A matrix that has converged is frozen: neither its value nor its count changes after that, whatever its neighbours
    need. Looks at the errors once per iteration, which waits for a device. With a trace the batch is one piece.
    """

    def iterate(method: Any, frame: Frame, part: Any) -> tuple[Any, ...]:
        return _iterate_to_tolerance(method, frame, part, trace)

    def piece(frame: Frame, part: Any) -> tuple[Any, ...]:
        return _layout.split_by_range(solver, frame, (part,), iterate)

    with _xp.quiet(logits):
        if trace is None:
            matrix, counts = _layout.map_pieces(piece, xp, (logits,), accumulate, branch=branch)
        else:
            method = _layout.any_range(solver)
            matrix, counts = iterate(method, _layout.frame_for(xp, accumulate, branch=branch), logits)
    return matrix, xp.reshape(counts, (-1,))


def _iterate_to_tolerance(solver: Any, frame: Frame, logits: Any, trace: Trace | None) -> tuple[Any, Any]:
    """The loop on one piece. Finished matrices are set aside once they are a quarter of those that still run."""
    xp, where = frame.xp, _xp.device(logits)
    state = solver.init(logits, frame)
    size = logits.shape[frame.batch]
    positions = xp.arange(size, dtype=xp.int32, device=where)
    counts = xp.zeros((size,), dtype=xp.int32, device=where)
    active = _unfinished(solver, state, frame) if hasattr(solver, "target") else xp.ones_like(counts, dtype=xp.bool)
    done: list[tuple[Any, ...]] = []
    order: list[Any] = []

    for iteration in range(1, solver.num_iters + 1):
        if not bool(xp.any(active)):
            break
        if frame.branch and trace is None:
            (running,), (finished,) = xp.nonzero(active), xp.nonzero(xp.logical_not(active))
            if 4 * finished.shape[0] >= active.shape[0]:
                order.append(xp.take(positions, finished))
                done.append(_answer(solver, [frame.take(array, finished) for array in state], counts, finished, frame))
                state = tuple(frame.take(array, running) for array in state)
                positions, counts, active = (xp.take(a, running) for a in (positions, counts, active))
        mask = frame.per_matrix(active)
        moved = solver.step(state, frame)
        state = tuple(xp.where(mask, new, old) for new, old in zip(moved, state, strict=True))
        counts = counts + _xp.astype(xp, active, xp.int32)
        if trace is not None:
            trace(iteration, _error(solver, state, frame))
        if solver.tol is not None:
            active = xp.logical_and(active, _unfinished(solver, state, frame))

    order.append(positions)
    done.append(_answer(solver, list(state), counts, None, frame))
    return frame.gather(done, order) if len(done) > 1 else done[0]


def _answer(solver: Any, state: list[Any], counts: Any, chosen: Any, frame: Frame) -> tuple[Any, ...]:
    taken = counts if chosen is None else frame.xp.take(counts, chosen)
    return solver.matrix(tuple(state), frame), frame.per_matrix(taken)


def _unfinished(solver: Any, state: tuple[Any, ...], frame: Frame) -> Any:
    """True where the error is above the target; false for NaN, which no iteration repairs."""
    target = solver.target() if hasattr(solver, "target") else solver.tol
    return _error(solver, state, frame) > target


def _error(solver: Any, state: tuple[Any, ...], frame: Frame) -> Any:
    """``max |sum - 1|`` of the first-normalised side of each matrix."""
    if hasattr(solver, "error"):
        return solver.error(state, frame)
    sums = frame.sum(solver.matrix(state, frame), frame.order(solver.first)[0])
    return frame.xp.max(frame.xp.abs(sums - 1.0), axis=(frame.i, frame.j))

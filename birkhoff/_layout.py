"""Where a stack of matrices lives in memory, and how the processor walks through it.

Solvers are written once for any position of the two matrix axes (:class:`Frame`). On the host, small matrices are
processed in pieces that fit the second-level cache, with the batch as the *last* axis: every operation then runs over
long contiguous lines instead of over n = 4 numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from birkhoff import _math, _xp

__all__ = ["Frame", "any_range", "frame_for", "map_pieces", "split_by_range"]

_PIECE_BYTES = 3 << 17  # of one stack of matrices, in float32; a step touches about four
_TAPE_ENTRIES = 1 << 22  # of one iterate where all of them are kept, on a device
_SMALL_ORDER = 64
_SMALL_BATCH = 16


@dataclass(frozen=True)
class Frame:
    """Namespace, matrix axes and sum dtype that a solver works with.

    Summing over axis ``i`` runs over the rows, and gives column sums; over axis ``j``, row sums. With ``branch`` the
    values may be looked at. With ``products`` sums of products are matrix products, in full precision.
    """

    xp: Any
    i: int
    j: int
    accumulate: Any
    branch: bool = False
    products: bool = False

    def order(self, first: str) -> tuple[int, int]:
        """The axes to sum over, in the order of normalisation: ``first="columns"`` sums over rows first."""
        return (self.i, self.j) if first == "columns" else (self.j, self.i)

    @property
    def batch(self) -> int:
        """The axis of the batch in a three-dimensional stack."""
        return 0 if self.i == -2 else 2

    def sum(self, array: Any, axis: int) -> Any:
        """Sum kept as an axis of length one, in the accumulation dtype."""
        return _math.reduce_sum(self.xp, array, axis, self.accumulate)

    def weighted_sum(self, stack: Any, vector: Any, axis: int) -> Any:
        """``sum(stack * vector, axis)``; the vector has length one along the other matrix axis."""
        if not self.products:
            return self.sum(stack * vector, axis)
        line = self.xp.matrix_transpose(vector)
        return self.xp.matmul(stack, line) if axis == self.j else self.xp.matmul(line, stack)

    def per_matrix(self, values: Any) -> Any:
        """Reshape a vector over the batch so that it broadcasts against the stack."""
        return self.xp.reshape(values, (-1, 1, 1) if self.batch == 0 else (1, 1, -1))

    def take(self, stack: Any, where: Any) -> Any:
        """The matrices at the positions ``where`` of the batch."""
        return self.xp.take(stack, where, axis=self.batch)

    def gather(self, parts: Sequence[tuple[Any, ...]], positions: Sequence[Any]) -> tuple[Any, ...]:
        """Undo :meth:`take`: put the matrices of each part back at its positions, for each array of a tuple."""
        back = self.xp.argsort(self.xp.concat(list(positions)))
        joined = (self.xp.concat(list(arrays), axis=self.batch) for arrays in zip(*parts, strict=True))
        return tuple(self.take(array, back) for array in joined)


def frame_for(xp: Any, accumulate: Any, *, branch: bool = False) -> Frame:
    """The frame of arrays ``(B, n, n)`` as users hold them."""
    return Frame(xp, -2, -1, accumulate, branch)


def map_pieces(
    function: Callable[..., tuple[Any, ...]],
    xp: Any,
    stacks: Sequence[Any],
    accumulate: Any,
    *,
    branch: bool,
    keeps_tape: bool = False,
    products_from: int | None = None,
) -> tuple[Any, ...]:
    """Apply ``function(frame, *stacks)`` to a batch, in pieces where that is faster or saves memory.

    ``stacks`` have shape ``(B, n, n)``, results ``(B, n, n)`` or ``(B, 1, 1)``. With ``branch`` pieces fit the
    second-level cache, small matrices with the batch as the last axis. Without it the batch is one piece, except for a
    function that keeps every iterate: its pieces bound the memory that these take. From n = ``products_from`` on the
    function gains by matrix products, which NumPy (and what wraps it) computes in the precision it is given.
    """
    batch, n = stacks[0].shape[0], stacks[0].shape[-1]
    products = products_from is not None and n >= products_from and branch and stacks[0].dtype == accumulate
    products = products and _xp.library_name(xp) in ("numpy", "array_api_strict")
    lanes = branch and n <= _SMALL_ORDER and batch >= _SMALL_BATCH and not products
    frame = Frame(xp, *((0, 1) if lanes else (-2, -1)), accumulate, branch, products)
    entries = (_PIECE_BYTES >> keeps_tape) // 4 if branch else _TAPE_ENTRIES if keeps_tape else batch * n * n
    length = max(_SMALL_BATCH if lanes else 1, entries // (n * n))
    if length >= batch and not lanes:
        return function(frame, *stacks)

    def run(start: int) -> tuple[Any, ...]:
        pieces = [stack[start : min(start + length, batch), ...] for stack in stacks]
        with _xp.quiet(stacks[0]):  # a thread starts with NumPy's own error state
            if not lanes:
                return function(frame, *pieces)
            moved = function(frame, *(_batch_last(xp, piece) for piece in pieces))
            return tuple(xp.permute_dims(array, (2, 0, 1)) for array in moved)

    results: list[Any] = []
    starts = range(0, batch, length)
    for start, arrays in zip(starts, _in_threads(run, starts, xp), strict=True):
        if not results:
            where = _xp.device(stacks[0])
            results = [xp.empty((batch, *array.shape[1:]), dtype=array.dtype, device=where) for array in arrays]
        for result, array in zip(results, arrays, strict=True):
            result[start : min(start + length, batch), ...] = array
    return tuple(results)


def _in_threads(run: Callable[[int], Any], starts: range, xp: Any) -> Iterator[Any]:
    """``map(run, starts)``; NumPy, which has no threads of its own, is given as many as BLAS would take."""
    workers = min(_num_threads(), len(starts)) if _xp.library_name(xp) == "numpy" else 1
    if workers == 1:
        yield from map(run, starts)
    else:
        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(run, starts)


@cache
def _num_threads() -> int:
    """``OMP_NUM_THREADS`` where it is a number, else the processors that this process may use."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _batch_last(xp: Any, stack: Any) -> Any:
    """``(b, n, n)`` to a contiguous ``(n, n, b)``; flattening in between is what forces the copy."""
    moved = xp.permute_dims(stack, (1, 2, 0))
    return xp.reshape(xp.reshape(moved, (-1,)), moved.shape)


def any_range(solver: Any) -> Any:
    """The solver itself, or, where its own arithmetic is limited, the one that computes the same for every range."""
    return solver.for_any_range() if hasattr(solver, "for_any_range") else solver


def split_by_range(
    solver: Any, frame: Frame, stacks: tuple[Any, ...], function: Callable[..., tuple[Any, ...]]
) -> tuple[Any, ...]:
    """``function(method, frame, *stacks)`` with each matrix treated by the arithmetic its logit range allows.

    ``stacks[0]`` are the logits. A solver without ``arithmetics`` is good for every range. The choice for a matrix
    depends on that matrix alone, so a batch gives what its parts give.
    """
    if not (hasattr(solver, "arithmetics") and frame.branch):
        return function(any_range(solver), frame, *stacks)
    xp, logits = frame.xp, stacks[0]
    span = xp.max(logits, axis=(frame.i, frame.j)) - xp.min(logits, axis=(frame.i, frame.j))
    own_dtype = _xp.dtype_name(logits.dtype)
    rest: Any = None  # the matrices without an arithmetic yet; None means all
    parts: list[tuple[Any, ...]] = []
    positions: list[Any] = []
    for limit, method, name in solver.arithmetics(own_dtype):
        if name != own_dtype and _math.accumulate_dtype(xp, logits) != xp.float64:
            continue
        fits = xp.ones_like(span, dtype=xp.bool) if limit is None else span <= limit  # false for NaN and for -inf
        dtype = _xp.dtype_of(xp, name)
        own = frame if name == own_dtype else replace(frame, accumulate=dtype)
        if rest is None and bool(xp.all(fits)):
            return _cast(xp, function(method, own, *_cast(xp, stacks, dtype)), logits.dtype)
        chosen = fits if rest is None else xp.logical_and(rest, fits)
        if not bool(xp.any(chosen)):
            continue
        (where,) = xp.nonzero(chosen)
        taken = _cast(xp, tuple(frame.take(stack, where) for stack in stacks), dtype)
        parts.append(_cast(xp, function(method, own, *taken), logits.dtype))
        positions.append(where)
        left = xp.logical_not(chosen)
        rest = left if rest is None else xp.logical_and(rest, left)
        if not bool(xp.any(rest)):
            break
    return frame.gather(parts, positions)


def _cast(xp: Any, arrays: tuple[Any, ...], dtype: Any) -> tuple[Any, ...]:
    """Floating arrays in ``dtype``; counts stay as they are."""
    return tuple(_xp.astype(xp, array, dtype) if _xp.is_floating(array.dtype) else array for array in arrays)

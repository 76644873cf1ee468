"""Projections that are wrong in one way each, and the right one that they were made from.

Every function takes an array (..., n, n) of logits; the right one normalises rows last in float64 or float32.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from proofs.backends import BACKENDS
from proofs.subjects import Subject

NUM_ITERS = 20


def _half(log_matrix: np.ndarray, axis: int) -> np.ndarray:
    top = np.max(log_matrix, axis=axis, keepdims=True, initial=-np.inf)
    top = np.where(np.isneginf(top), 0, top)
    return log_matrix - (top + np.log(np.sum(np.exp(log_matrix - top), axis=axis, keepdims=True)))


def _finish(log_matrix: np.ndarray, axis: int) -> np.ndarray:
    matrix = np.exp(log_matrix - np.max(log_matrix, axis=axis, keepdims=True, initial=-np.inf))
    return matrix / np.sum(matrix, axis=axis, keepdims=True)


def right(logits: np.ndarray, num_iters: int = NUM_ITERS, first: int = -2, last: int = -1) -> np.ndarray:
    """Iterate in log, finish with one max-shifted exp and a division."""
    given = np.asarray(logits)
    log_matrix = given.astype(np.float64)
    with np.errstate(all="ignore"):
        for step in range(num_iters):
            log_matrix = _half(log_matrix, first)
            if step < num_iters - 1:
                log_matrix = _half(log_matrix, last)
        return _finish(log_matrix, last).astype(given.dtype)


def rows_and_columns_swapped(logits: np.ndarray) -> np.ndarray:
    return right(logits, first=-1, last=-2)


def one_axis_twice(logits: np.ndarray) -> np.ndarray:
    """Normalises rows each time: a softmax."""
    return right(logits, first=-1, last=-1)


def transposed_output(logits: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.swapaxes(right(logits), -1, -2))


def transposed_input(logits: np.ndarray) -> np.ndarray:
    return right(np.swapaxes(logits, -1, -2))


def no_shift(logits: np.ndarray) -> np.ndarray:
    """exp without subtracting a maximum."""
    matrix = np.exp(logits)
    for _ in range(NUM_ITERS):
        matrix = matrix / matrix.sum(axis=-2, keepdims=True)
        matrix = matrix / matrix.sum(axis=-1, keepdims=True)
    return matrix


def added_eps(logits: np.ndarray) -> np.ndarray:
    matrix = np.exp(logits - logits.max(axis=(-2, -1), keepdims=True, initial=-np.inf))
    for _ in range(NUM_ITERS):
        matrix = matrix / (matrix.sum(axis=-2, keepdims=True) + logits.dtype.type(1e-6))
        matrix = matrix / (matrix.sum(axis=-1, keepdims=True) + logits.dtype.type(1e-6))
    return matrix


def clamped_sums(logits: np.ndarray) -> np.ndarray:
    """Divides by max(sum, 1e-3), as some kernels clamp."""
    matrix = np.exp(logits - logits.max(axis=(-2, -1), keepdims=True, initial=-np.inf))
    for _ in range(NUM_ITERS):
        matrix = matrix / np.maximum(matrix.sum(axis=-2, keepdims=True), logits.dtype.type(1e-3))
        matrix = matrix / np.maximum(matrix.sum(axis=-1, keepdims=True), logits.dtype.type(1e-3))
    return matrix


def half_a_step_missing(logits: np.ndarray) -> np.ndarray:
    """Ends on the columns."""
    log_matrix = np.asarray(logits).astype(np.float64)
    with np.errstate(all="ignore"):
        for _ in range(NUM_ITERS - 1):
            log_matrix = _half(_half(log_matrix, -2), -1)
        return _finish(log_matrix, -2).astype(logits.dtype)


def one_iteration_short(logits: np.ndarray) -> np.ndarray:
    return right(logits, num_iters=NUM_ITERS - 1)


def absolute_value(logits: np.ndarray) -> np.ndarray:
    """|x| instead of exp(x)."""
    matrix = np.abs(logits) + logits.dtype.type(1e-30)
    for _ in range(NUM_ITERS):
        matrix = matrix / matrix.sum(axis=-2, keepdims=True)
        matrix = matrix / matrix.sum(axis=-1, keepdims=True)
    return matrix


def row_max_shift(logits: np.ndarray) -> np.ndarray:
    """Softmax of the rows as the start of a columns-first iteration: another function."""
    return right(_half(np.asarray(logits, dtype=np.float64), -1)).astype(logits.dtype)


def half_temperature(logits: np.ndarray) -> np.ndarray:
    return right(logits / 2)


def clipped_logits(logits: np.ndarray) -> np.ndarray:
    """A range cap that nobody asked for."""
    return right(np.clip(logits, logits.max(axis=(-2, -1), keepdims=True, initial=-np.inf) - 8, None))


def square_root(logits: np.ndarray) -> np.ndarray:
    """Rows normalised in the 2-norm."""
    return np.sqrt(right(logits))


def scaled_up(logits: np.ndarray) -> np.ndarray:
    return right(logits) * logits.dtype.type(1.001)


def scaled_down(logits: np.ndarray) -> np.ndarray:
    return right(logits) * logits.dtype.type(0.999)


def negative_entries(logits: np.ndarray) -> np.ndarray:
    """Sums are right, one entry is negative."""
    matrix = right(logits)
    n = matrix.shape[-1]
    shift = np.zeros((n, n), dtype=matrix.dtype)
    if n > 1:
        shift[0, 0], shift[0, 1], shift[1, 0], shift[1, 1] = 2, -2, -2, 2
    return matrix + shift


def column_zero_only(logits: np.ndarray) -> np.ndarray:
    """All mass in the first column: row-stochastic, far from doubly stochastic."""
    matrix = np.zeros_like(logits)
    matrix[..., 0] = 1
    return matrix


def mean_of_batch(logits: np.ndarray) -> np.ndarray:
    """One NaN spreads, and matrices see their neighbours."""
    return right(logits - np.max(logits)) + 0 * np.sum(logits)


def normalised_over_the_batch(logits: np.ndarray) -> np.ndarray:
    """Takes the first axis of a stack for the rows."""
    if logits.ndim < 3 or 0 in logits.shape:
        return right(logits)
    return right(logits - 0.1 * np.mean(np.tanh(logits), axis=0, keepdims=True))


def hides_nan(logits: np.ndarray) -> np.ndarray:
    return np.nan_to_num(right(logits), nan=0.0)


def writes_input(logits: np.ndarray) -> np.ndarray:
    result = right(logits)
    if logits.flags.writeable:
        logits[...] = result
    return result


def returns_float32(logits: np.ndarray) -> np.ndarray:
    return right(logits).astype(np.float32)


def returns_float64(logits: np.ndarray) -> np.ndarray:
    return right(np.asarray(logits, dtype=np.float64))


def drops_batch(logits: np.ndarray) -> np.ndarray:
    n = logits.shape[-1]
    return right(logits).reshape(-1, n, n)


def fails_on_empty(logits: np.ndarray) -> np.ndarray:
    if 0 in logits.shape:
        raise IndexError("empty")
    return right(logits)


def reads_memory_order(logits: np.ndarray) -> np.ndarray:
    """Ignores strides: reads the buffer as if it were contiguous."""
    if logits.flags.c_contiguous:
        return right(logits)
    return right(np.ravel(logits, order="K").reshape(logits.shape))


def reads_sixteen_bytes_at_a_time(logits: np.ndarray) -> np.ndarray:
    """Takes an address for a multiple of 16 bytes, as vector loads do."""
    return right(logits if logits.ctypes.data % 16 == 0 or 0 in logits.shape else np.roll(logits, 1, axis=-1))


def reads_past_an_expanded_matrix(logits: np.ndarray) -> np.ndarray:
    """Reads on behind a matrix that is there once, with a stride of 0."""
    matrix = right(logits)
    if logits.ndim == 3 and logits.strides[0] == 0:
        matrix[1:] = 0
    return matrix


_CALLS = [0]


def changes_from_call_to_call(logits: np.ndarray) -> np.ndarray:
    _CALLS[0] += 1
    matrix = right(logits)
    return np.nextafter(matrix, np.asarray(_CALLS[0] % 2, dtype=matrix.dtype))


def fills_zeros(logits: np.ndarray) -> np.ndarray:
    return right(np.maximum(logits, -700))


def low_precision(logits: np.ndarray) -> np.ndarray:
    """Computed in float16."""
    matrix = np.exp((logits - logits.max(axis=(-2, -1), keepdims=True, initial=-np.inf)).astype(np.float16))
    for _ in range(NUM_ITERS):
        matrix = matrix / matrix.sum(axis=-2, keepdims=True)
        matrix = matrix / matrix.sum(axis=-1, keepdims=True)
    return matrix.astype(logits.dtype)


def exponential_of_potentials(logits: np.ndarray) -> np.ndarray:
    """Ends with exp(x - lse) in the input's precision instead of a division: sums drift with the range."""
    log_matrix = np.asarray(logits)
    for _ in range(NUM_ITERS):
        column = np.log(np.sum(np.exp(log_matrix - log_matrix.max(-2, keepdims=True)), axis=-2, keepdims=True))
        log_matrix = log_matrix - (log_matrix.max(-2, keepdims=True) + column)
        row = np.log(np.sum(np.exp(log_matrix), axis=-1, keepdims=True))
        log_matrix = log_matrix - row
    return np.exp(log_matrix)


def favours_the_first_row(logits: np.ndarray) -> np.ndarray:
    """Not equivariant: the first row's logits are nudged."""
    nudged = np.array(logits)
    nudged[..., 0, :] *= logits.dtype.type(1.01)
    return right(nudged)


def rounded_logits(logits: np.ndarray) -> np.ndarray:
    return right(np.round(logits * 64) / 64)


def shifted_by_a_constant_table(logits: np.ndarray) -> np.ndarray:
    """tanh squashes the logits: adding constants to a line changes the result."""
    return right(8 * np.tanh(logits / 8))


def ends_the_process(*arguments: object) -> np.ndarray:
    """What a crash in a kernel does; only for processes of their own."""
    os._exit(3)


def ends_the_process_at_one(logits: np.ndarray) -> np.ndarray:
    """Crashes on 1 x 1 only."""
    return ends_the_process() if logits.shape[-1] == 1 else right(logits)


def loses_the_device(logits: np.ndarray) -> np.ndarray:
    """After a 1 x 1 no array works in this process any more, as after an illegal access on a GPU."""

    def fails(*arguments: object) -> np.ndarray:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    if logits.shape[-1] == 1:
        BACKENDS["numpy"].asarray = fails  # type: ignore[method-assign]
        return fails()
    return right(logits)


def exits(logits: np.ndarray) -> np.ndarray:
    """What a script does that was written for the command line."""
    raise SystemExit(0)


def never_ends_at_two(logits: np.ndarray) -> np.ndarray:
    """Right for 1 x 1, and then a kernel that hangs; only for processes that are killed."""
    while logits.shape[-1] == 2:
        time.sleep(1)
    return right(logits)


FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    function.__name__: function
    for function in (
        rows_and_columns_swapped,
        one_axis_twice,
        transposed_output,
        transposed_input,
        no_shift,
        added_eps,
        clamped_sums,
        half_a_step_missing,
        one_iteration_short,
        absolute_value,
        row_max_shift,
        half_temperature,
        clipped_logits,
        square_root,
        scaled_up,
        scaled_down,
        negative_entries,
        column_zero_only,
        mean_of_batch,
        normalised_over_the_batch,
        hides_nan,
        writes_input,
        returns_float32,
        returns_float64,
        drops_batch,
        fails_on_empty,
        reads_memory_order,
        reads_sixteen_bytes_at_a_time,
        reads_past_an_expanded_matrix,
        changes_from_call_to_call,
        fills_zeros,
        low_precision,
        exponential_of_potentials,
        favours_the_first_row,
        rounded_logits,
        shifted_by_a_constant_table,
    )
}


def subject(function: Callable[[np.ndarray], Any], **changes: Any) -> Subject:
    """Wrap a NumPy function, with everything known that the right one would tell."""
    facts: dict[str, Any] = {"num_iters": NUM_ITERS}
    facts.update(changes)
    return Subject(
        name=getattr(function, "__name__", "function"), function=function, backend=BACKENDS["numpy"], **facts
    )


def family(**changes: Any) -> Subject:
    """The right projection with its iteration count and order open: the claims that vary them apply."""

    def rebuild(*, num_iters: int | None, first: str) -> Subject:
        count = NUM_ITERS if num_iters is None else num_iters
        axes = (-2, -1) if first == "columns" else (-1, -2)
        return replace(
            subject(lambda logits: right(logits, count, *axes)),
            num_iters=count,
            last="rows" if first == "columns" else "columns",
            rebuild=rebuild,
        )

    return replace(rebuild(num_iters=NUM_ITERS, first="columns"), name="right", **changes)

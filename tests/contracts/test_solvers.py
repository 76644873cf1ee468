"""Every property that a solver must have, over ``solvers.__all__`` and every array library of ``tests/backends.py``."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

import birkhoff
from birkhoff import Status
from birkhoff._xp import array_namespace
from tests.backends import BACKENDS, Backend, to_numpy
from tests.contracts.cases import SOLVERS, adversarial, gaussian, solver_id, unit

pytestmark = [
    pytest.mark.parametrize("kind", SOLVERS, ids=solver_id),
    pytest.mark.parametrize("backend", BACKENDS, ids=str),
]
DTYPES = [np.float32, np.float64]


def run(backend: Backend, values: np.ndarray, solver: Any, **options: Any) -> birkhoff.Projection:
    return birkhoff.project(backend.asarray(values), solver, **options)


def last_axis(solver: Any) -> int:
    """The axis whose sums are exact: rows' (-1) if columns come first."""
    return -1 if solver.first == "columns" else -2


@pytest.mark.parametrize("dtype", DTYPES)
def test_last_side_is_exact_and_entries_are_probabilities(kind: type, backend: Backend, dtype: Any, rng: Any) -> None:
    for n in (1, 2, 3, 8):
        solver = kind()
        values = np.concatenate([adversarial(n, dtype), gaussian(rng, n, 5.0, 20, dtype)])
        matrix = to_numpy(run(backend, values, solver).matrix)
        assert np.isfinite(matrix).all()
        assert (matrix >= 0).all() and (matrix <= 1 + 2 * (n + 1) * unit(dtype)).all()
        sums = matrix.astype(np.float64).sum(axis=last_axis(solver))
        if solver.method == "damped":  # every sum is s / (s + eps): below one, and near it once s is
            assert (sums <= 1 + (n + 1) * unit(dtype)).all()
        else:
            assert (np.abs(sums - 1) <= (n + 1) * unit(dtype)).all()


def test_reported_errors_are_those_of_the_returned_matrix(kind: type, backend: Backend, rng: Any) -> None:
    values = gaussian(rng, 4, 3.0, 50, np.float32)
    result = run(backend, values, kind())
    exact = to_numpy(result.matrix).astype(np.float64)
    for reported, axis in ((result.row_error, -1), (result.column_error, -2)):
        true = np.abs(exact.sum(axis=axis) - 1).max(axis=-1)
        assert np.abs(to_numpy(reported) - true).max() <= 8 * unit(np.float32)


def test_result_has_the_library_the_dtype_and_the_shape_of_the_input(kind: type, backend: Backend, rng: Any) -> None:
    for shape in ((3, 3), (1, 3, 3), (2, 0, 3, 3), (2, 5, 3, 3), (17, 3, 3)):
        values = backend.asarray(rng.normal(size=shape).astype(np.float32))
        result = birkhoff.project(values, kind())
        assert type(result.matrix) is type(values)
        assert result.matrix.dtype == values.dtype
        assert tuple(result.matrix.shape) == shape
        assert getattr(result.matrix, "device", None) == getattr(values, "device", None)
        for part in (result.status, result.num_iters, result.row_error, result.column_error):
            assert tuple(part.shape) == shape[:-2]


def test_input_is_not_changed_and_layout_does_not_matter(kind: type, backend: Backend, rng: Any) -> None:
    for batch, n in ((40, 4), (3, 4), (2, 40)):
        values = rng.normal(size=(batch, n, n))
        given = backend.asarray(values)
        expected = to_numpy(birkhoff.project(given, kind()).matrix)
        assert (to_numpy(given) == values).all()
        transposed = backend.asarray(np.ascontiguousarray(values.transpose(0, 2, 1)))
        swapped = array_namespace(transposed).permute_dims(transposed, (0, 2, 1))
        strided = backend.asarray(np.repeat(values, 2, axis=0))[::2, ...]
        for layout in (swapped, strided):
            assert (to_numpy(birkhoff.project(layout, kind()).matrix) == expected).all(), (batch, n)
    single = np.full((80, 1, 1), np.nan)
    single[::2] = rng.normal(size=(40, 1, 1))  # every second number: a vector with a stride and nothing in between
    gaps = birkhoff.project(backend.asarray(single)[::2, ...], kind()).matrix
    assert np.abs(to_numpy(gaps) - 1.0).max() <= 3e-6


def test_a_batch_gives_what_its_parts_give(kind: type, backend: Backend, rng: Any) -> None:
    values = np.concatenate([gaussian(rng, 3, std, 6, np.float32) for std in (0.5, 20.0, 80.0)])
    solver = kind()
    whole = to_numpy(run(backend, values, solver).matrix)
    parts = np.stack([to_numpy(run(backend, values[k], solver).matrix) for k in range(len(values))])
    assert np.abs(whole - parts).max() <= 4 * unit(np.float32)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_matrix_poisons_only_itself(kind: type, backend: Backend, bad: float, rng: Any) -> None:
    values = gaussian(rng, 3, 1.0, 24, np.float64)
    clean = to_numpy(run(backend, values, kind()).matrix)
    values[7, 1, 2] = bad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = run(backend, values, kind())
    matrix, status = to_numpy(result.matrix), to_numpy(result.status)
    assert status[7] == Status.nonfinite_input
    assert np.isnan(matrix[7]).all()
    others = np.arange(24) != 7
    assert np.abs(matrix[others] - clean[others]).max() <= 4 * unit(np.float64)
    assert (status[others] != Status.nonfinite_input).all()
    with pytest.raises(birkhoff.errors.ProjectionError, match="nonfinite_input"):
        run(backend, values, kind(), throw=True)


def test_infinite_logits_are_exact_zeros(kind: type, backend: Backend) -> None:
    if kind.method in ("damped", "euclidean"):
        pytest.skip("adds an epsilon to zeros, or reads its input as the matrix itself")
    total = np.array([[0.0, 1.0, -np.inf], [-np.inf, 0.0, 2.0], [1.0, -np.inf, 0.0]])
    partial = np.array([[0.0, 0.0, -np.inf], [-np.inf, 0.0, -np.inf], [0.0, 0.0, 0.0]])
    none = np.array([[0.0, -np.inf, -np.inf], [1.0, -np.inf, -np.inf], [0.0, 0.0, 0.0]])
    empty_row = np.array([[-np.inf] * 3, [0.0] * 3, [0.0] * 3])
    values = np.stack([total, partial, none, empty_row] * 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = run(backend, values, kind(num_iters=100))
    matrix, status = to_numpy(result.matrix), to_numpy(result.status)
    assert (matrix[np.isneginf(values)] == 0).all()
    assert np.isfinite(matrix).all()
    assert (status[::4] == Status.converged).all()
    for offset in (1, 2, 3):
        assert (status[offset::4] == Status.no_total_support).all()
    assert np.abs(matrix[0].sum(axis=0) - 1).max() <= 1e-6


@pytest.mark.parametrize("finish", ["nonexpansive", "exact"])
def test_finishes_hold_for_every_input(kind: type, backend: Backend, finish: str) -> None:
    values = np.concatenate([adversarial(4, np.float32), adversarial(4, np.float32).transpose(0, 2, 1)])
    matrix = to_numpy(run(backend, values, kind(num_iters=5), finish=finish).matrix).astype(np.float64)
    if finish == "nonexpansive":
        assert np.linalg.norm(matrix, 2, axis=(-2, -1)).max() <= 1 + 4 * unit(np.float32)
    else:
        assert np.abs(matrix.sum(axis=-1) - 1).max() <= 8 * unit(np.float32)
        assert np.abs(matrix.sum(axis=-2) - 1).max() <= 8 * unit(np.float32)


def test_tolerance_stops_each_matrix_by_itself(kind: type, backend: Backend, rng: Any) -> None:
    values = np.concatenate([gaussian(rng, 4, std, 30, np.float64) for std in (0.3, 2.0)])
    solver = kind(num_iters=400, tol=1e-5)
    result = run(backend, values, solver)
    first = result.column_error if solver.first == "columns" else result.row_error
    assert (to_numpy(first) <= 1e-5).all()
    assert (to_numpy(result.status) == Status.converged).all()
    counts = to_numpy(result.num_iters)
    assert counts[:30].mean() <= counts[30:].mean() and counts.max() < 400
    alone = run(backend, values[45], solver)
    assert int(to_numpy(alone.num_iters)) == counts[45]
    assert np.abs(to_numpy(alone.matrix) - to_numpy(result.matrix)[45]).max() <= 8 * unit(np.float64)


def test_trace_sees_every_iteration(kind: type, backend: Backend, rng: Any) -> None:
    seen: list[tuple[int, float]] = []
    values = gaussian(rng, 4, 1.0, 6, np.float64)

    def trace(iteration: int, errors: Any) -> None:
        assert tuple(errors.shape) == (6,)
        seen.append((iteration, float(to_numpy(errors).max())))

    run(backend, values, kind(num_iters=30, tol=1e-9), trace=trace)
    assert [iteration for iteration, _ in seen] == list(range(1, len(seen) + 1))
    assert not seen or seen[-1][1] < 1e-4


def test_transposing_swaps_the_order(kind: type, backend: Backend, rng: Any) -> None:
    values = gaussian(rng, 4, 2.0, 20, np.float64)
    columns_first = to_numpy(run(backend, values, kind(first="columns")).matrix)
    rows_first = to_numpy(run(backend, np.ascontiguousarray(values.transpose(0, 2, 1)), kind(first="rows")).matrix)
    assert np.abs(columns_first - rows_first.transpose(0, 2, 1)).max() <= 16 * unit(np.float64)


def test_permuting_rows_and_columns_permutes_the_result(kind: type, backend: Backend, rng: Any) -> None:
    values = gaussian(rng, 5, 2.0, 10, np.float64)
    rows, columns = rng.permutation(5), rng.permutation(5)
    expected = to_numpy(run(backend, values, kind()).matrix)[:, rows][:, :, columns]
    permuted = to_numpy(run(backend, np.ascontiguousarray(values[:, rows][:, :, columns]), kind()).matrix)
    assert np.abs(permuted - expected).max() <= (2e-6 if kind.method == "newton" else 20 * unit(np.float64))


def test_one_by_one_is_exactly_one(kind: type, backend: Backend) -> None:
    matrix = to_numpy(run(backend, np.array([[[3.0]], [[-700.0]]]), kind()).matrix)
    bias = 0.0 if kind.method != "damped" else 3e-6
    assert (np.abs(matrix - 1.0) <= bias).all()

"""Large dense matrices: the same iterates as the log-domain oracle, in blocks, at any range."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import birkhoff
from birkhoff import large, reference
from birkhoff._registry import Row, Table
from birkhoff._xp import array_namespace, device_kind, library_name
from birkhoff.errors import DtypeError, OptionError, ProjectionError, ShapeError
from birkhoff.large import PASSES, PassFacts, project_large, scaling_passes
from tests.backends import BACKENDS, Backend, to_numpy


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("first", ["columns", "rows"])
@pytest.mark.parametrize(("n", "std"), [(1, 1.0), (3, 30.0), (40, 3.0), (70, 300.0)])
def test_iterates_are_those_of_the_oracle(backend: Backend, dtype: str, first: str, n: int, std: float) -> None:
    logits = np.random.default_rng(n).normal(0, std, (n, n)).astype(dtype)
    result = project_large(backend.asarray(logits), num_iters=15, tol=1e-300, first=first)
    expected = reference.sinkhorn(logits.astype(np.float64), int(to_numpy(result.num_iters)), first=first)
    matrix = to_numpy(result.matrix)
    unit = np.finfo(dtype).eps / 2
    assert matrix.dtype == dtype
    assert np.abs(matrix - expected).max() <= 4 * n * unit * max(1.0, np.ptp(logits) / 16)
    last = -1 if first == "columns" else -2
    assert np.abs(matrix.astype(np.longdouble).sum(axis=last) - 1).max() <= (n + 1) * unit
    errors = (result.row_error, result.column_error)
    for error, axis in zip(errors, (-1, -2), strict=True):
        actual = np.abs(matrix.astype(np.longdouble).sum(axis=axis) - 1).max()
        assert abs(float(to_numpy(error)) - actual) <= 2 * n * unit


def test_tolerance_and_progress() -> None:
    logits = np.random.default_rng(0).normal(0, 2, (200, 200))
    seen: list[tuple[int, float]] = []
    result = project_large(logits, tol=1e-9, progress=lambda iteration, error: seen.append((iteration, error)))
    assert result.column_error <= 1e-9
    assert [iteration for iteration, _ in seen] == list(range(1, int(result.num_iters) + 1))
    assert seen[-1][1] <= 1e-9 < seen[-2][1]
    short = project_large(logits, tol=1e-9, num_iters=3)
    assert birkhoff.Status(int(short.status)) is birkhoff.Status.max_iters_reached
    with pytest.raises(ProjectionError, match="max_iters_reached after 3"):
        project_large(logits, tol=1e-9, num_iters=3, throw=True)


def test_mass_that_crosses_a_gap() -> None:
    """Rows 0 .. n-2 want one column at logit 1000: scaling factors pass e^20 many times, so absorption must work."""
    logits = np.zeros((64, 64))
    logits[:-1, 0] = 1000.0
    for dtype in ("float32", "float64"):
        result = project_large(logits.astype(dtype), num_iters=2000)
        assert int(result.status) == 0
    expected = np.full((64, 64), 1 / 63)
    expected[:, 0] = 0
    expected[-1] = 0
    expected[-1, 0] = 1
    np.testing.assert_allclose(result.matrix.sum(axis=0), 1, atol=2e-8)


@pytest.mark.parametrize("std", [1.0, 30.0])
@pytest.mark.parametrize("block_bytes", [1, 3000, 1 << 20])
def test_blocks_do_not_matter(block_bytes: int, std: float, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = np.random.default_rng(0).normal(0, std, (57, 57))
    expected = project_large(logits, num_iters=30, tol=1e-300)
    monkeypatch.setattr(large, "_BLOCK_BYTES", {"cpu": block_bytes})
    result = project_large(logits, num_iters=30, tol=1e-300)
    assert result.num_iters == expected.num_iters
    np.testing.assert_allclose(result.matrix, expected.matrix, atol=1e-13)


def plain_passes(kernel: np.ndarray, sums: np.ndarray, count: int) -> tuple[np.ndarray, ...]:
    errors, extremes = [], []
    for _ in range(count):
        right = 1 / sums
        left = 1 / (kernel @ right)
        sums = kernel.T @ left
        errors.append(np.abs(sums * right - 1).max())
        extremes.append(max(np.abs(np.log(left)).max(), np.abs(np.log(right)).max()))
    return left, right, sums, np.array(errors), np.array(max(extremes))


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_row_of_the_table(backend: Backend, count: int, dtype: str) -> None:
    """Whatever implementation the table names for this library and device computes the same passes."""
    rng = np.random.default_rng(0)
    kernel, sums = rng.random((300, 300)).astype(dtype), (1 + rng.random(300)).astype(dtype)
    arrays = backend.asarray(kernel), backend.asarray(sums)
    xp = array_namespace(*arrays)
    for row in PASSES.rows:
        if row.refuse(PassFacts(library_name(xp), device_kind(arrays[0]), dtype, 300)) is None:
            results = row.load("passes")(*arrays, count)
            expected = plain_passes(kernel.astype(np.float64), sums.astype(np.float64), count)
            for result, value in zip(results, expected, strict=True):
                found = to_numpy(result) if result.ndim else float(result)
                np.testing.assert_allclose(found, value, rtol=300 * np.finfo(dtype).eps, atol=1e-5)
    np.testing.assert_array_equal(to_numpy(arrays[1]), sums)


def test_the_table_of_passes() -> None:
    assert PASSES.resolve(PassFacts("numpy", "cpu", "float32", 4096)).row.name == "array"
    refusals = {
        refusal.row: refusal.reason for refusal in PASSES.resolve(PassFacts("torch", "cuda", "float64", 9000)).refusals
    }
    assert set(refusals) == {"cuda"}
    assert scaling_passes is PASSES.rows[-1].load("passes")


@pytest.mark.parametrize("longest", [1, 2, 7, 16])
def test_runs_of_passes_do_not_matter(longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: several iterations between looks, still stopped where the tolerance is reached."""
    logits = np.random.default_rng(0).normal(0, 3, (60, 60))
    expected = project_large(logits, tol=1e-6)

    def in_runs(kernel: np.ndarray, sums: np.ndarray, count: int) -> tuple[np.ndarray, ...]:
        return scaling_passes(kernel, sums, count)

    row = Row(name="runs", targets={"passes": "x:y"}, refuse=lambda facts: None)
    monkeypatch.setattr(Row, "load", lambda self, role: in_runs)
    monkeypatch.setattr(large, "PASSES", Table("runs", (row,)))
    monkeypatch.setattr(large, "_LONGEST_RUN", longest)
    seen: list[tuple[int, float]] = []
    result = project_large(logits, tol=1e-6, progress=lambda k, error: seen.append((k, error)))
    assert result.num_iters == expected.num_iters
    np.testing.assert_array_equal(result.matrix, expected.matrix)
    assert [k for k, _ in seen] == list(range(1, int(result.num_iters) + 1))
    wide = np.random.default_rng(0).normal(0, 300, (60, 60))
    result = project_large(wide, num_iters=37, tol=1e-300)
    assert result.num_iters == 37
    assert np.abs(result.matrix - reference.sinkhorn(wide, 37)).max() < 1e-11


def test_zero_patterns() -> None:
    logits = np.zeros((4, 6, 6))
    logits[1, 0, 1:] = logits[1, 1:, 0] = -np.inf  # block diagonal: total support
    logits[2, 5, :5] = -np.inf  # row 5 has one column, which others use too: partial
    logits[3, :, 0] = -np.inf  # an empty column: none
    result = project_large(logits, num_iters=50, tol=1e-6)
    names = [birkhoff.Status(int(code)).name for code in result.status]
    assert names == ["converged", "converged", "no_total_support", "no_total_support"]
    assert np.isfinite(result.matrix).all()
    assert (result.matrix[logits == -np.inf] == 0).all()


def test_batches_bad_items_and_dtypes() -> None:
    logits = np.random.default_rng(0).normal(size=(2, 2, 40, 40))
    logits[1, 0, 3, 3] = np.nan
    result = project_large(logits)
    assert result.status.shape == (2, 2)
    assert result.status[1, 0] == birkhoff.Status.nonfinite_input
    assert (np.delete(result.status.reshape(-1), 2) == 0).all()
    np.testing.assert_array_equal(result.matrix[0, 1], project_large(logits[0, 1]).matrix)
    half = project_large(torch.randn(40, 40).bfloat16())
    assert half.matrix.dtype == torch.bfloat16
    assert float(half.row_error) > 1e-4  # the error of what is stored
    assert project_large(np.ones((0, 40, 40))).matrix.shape == (0, 40, 40)


def test_misuse() -> None:
    square = np.ones((3, 3))
    with pytest.raises(ShapeError):
        project_large(np.ones((3, 4)))
    with pytest.raises(DtypeError):
        project_large(square.astype(int))
    for options in ({"num_iters": 0}, {"tol": -1.0}, {"first": "both"}):
        with pytest.raises(OptionError):
            project_large(square, **options)

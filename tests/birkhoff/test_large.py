"""Large dense matrices: the same iterates as the log-domain oracle, in blocks, at any range."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import birkhoff
from birkhoff import large, reference
from birkhoff.errors import DtypeError, OptionError, ProjectionError, ShapeError
from birkhoff.large import PASSES, PassFacts, project_large, scaling_pass
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


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_one_pass(backend: Backend) -> None:
    rng = np.random.default_rng(0)
    kernel, right = rng.random((30, 30)), rng.random(30)
    left, sums = (to_numpy(part) for part in scaling_pass(backend.asarray(kernel), backend.asarray(right)))
    np.testing.assert_allclose(left, 1 / (kernel @ right), rtol=1e-13)
    np.testing.assert_allclose(sums, kernel.T @ left, rtol=1e-13)


def test_the_table_of_passes_serves_every_library() -> None:
    for library, device in (("numpy", "cpu"), ("torch", "cuda"), ("cupy", "cuda")):
        resolution = PASSES.resolve(PassFacts(library, device, "float32", 4096))
        assert callable(resolution.row.load("pass"))


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

"""Sparse matrices: CSR in and out, against the dense oracle with the same zeros."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse as sparse

import birkhoff
from birkhoff import reference
from birkhoff.errors import ArrayTypeError, DtypeError, OptionError, ProjectionError, ShapeError
from birkhoff.sparse import project_sparse
from birkhoff.support import total_support_pattern


def random_sparse(n: int, density: float, std: float, seed: int = 0) -> np.ndarray:
    """A dense array with zeros, with total support: a sum of a few scaled permutations and their neighbours."""
    rng = np.random.default_rng(seed)
    mask = rng.random((n, n)) < density
    mask |= np.eye(n, dtype=bool) | np.eye(n, dtype=bool)[np.r_[1:n, 0]]
    return np.where(total_support_pattern(mask), np.exp(rng.normal(0, std, (n, n))), 0.0)


@pytest.mark.parametrize("kind", [sparse.csr_array, sparse.csr_matrix, sparse.csc_array, sparse.coo_array])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("first", ["columns", "rows"])
@pytest.mark.parametrize(("n", "std"), [(1, 1.0), (6, 3.0), (60, 3.0), (60, 12.0)])
def test_iterates_are_those_of_the_dense_oracle(kind: Any, dtype: str, first: str, n: int, std: float) -> None:
    dense = random_sparse(n, 0.1, std).astype(dtype)
    result = project_sparse(kind(dense), num_iters=15, tol=1e-300, first=first)
    with np.errstate(divide="ignore"):
        logits = np.log(dense.astype(np.float64))
    expected = reference.sinkhorn(logits, int(result.num_iters), first=first)
    matrix = result.matrix
    assert matrix.format == "csr"
    assert matrix.dtype == dtype
    assert isinstance(matrix, sparse.sparray) == issubclass(kind, sparse.sparray)
    unit = np.finfo(dtype).eps / 2
    finite = logits[np.isfinite(logits)]
    assert np.abs(matrix.toarray() - expected).max() <= 4 * n * unit * max(1.0, np.ptp(finite) / 16)
    np.testing.assert_array_equal(matrix.toarray() != 0, dense != 0)
    assert abs(result.row_error - np.abs(matrix.toarray().sum(1) - 1).max()) <= n * unit


def test_logits_of_any_range() -> None:
    rng = np.random.default_rng(0)
    dense = random_sparse(40, 0.2, 1.0)
    matrix = sparse.csr_array(dense)
    matrix.data = rng.normal(0, 300, matrix.nnz)
    logits = np.full(dense.shape, -np.inf)
    logits[dense != 0] = matrix.data
    result = project_sparse(matrix, entries="logits", num_iters=40, tol=1e-300)
    expected = reference.sinkhorn(logits, int(result.num_iters))
    assert np.abs(result.matrix.toarray() - expected).max() < 1e-11


def test_partial_support_and_its_restriction() -> None:
    triangular = sparse.csr_array(np.array([[1.0, 1.0], [0.0, 1.0]]))
    plain = project_sparse(triangular, num_iters=100)
    assert birkhoff.Status(int(plain.status)) is birkhoff.Status.no_total_support
    assert plain.column_error == pytest.approx(1 / 201, rel=0.02)  # the slow 1/k that it warns of
    restricted = project_sparse(triangular, restrict=True)
    assert restricted.status == 0
    assert restricted.matrix.nnz == 2
    np.testing.assert_array_equal(restricted.matrix.toarray(), np.eye(2))
    nothing = sparse.csr_array(np.array([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
    for restrict in (False, True):
        result = project_sparse(nothing, restrict=restrict, num_iters=30)
        assert result.status == birkhoff.Status.no_total_support
    with pytest.raises(ProjectionError, match="no_total_support"):
        project_sparse(nothing, num_iters=5, throw=True)


def test_zero_lines_and_stored_zeros() -> None:
    stored = sparse.csr_array((np.array([2.0, 0.0, 3.0]), np.array([0, 1, 1]), np.array([0, 2, 3])), shape=(2, 2))
    result = project_sparse(stored)
    assert result.status == 0
    np.testing.assert_array_equal(result.matrix.toarray(), np.eye(2))
    empty_row = sparse.csr_array(np.array([[1.0, 1.0], [0.0, 0.0]]))
    result = project_sparse(empty_row, num_iters=5)
    assert result.status == birkhoff.Status.no_total_support
    assert np.isfinite(result.matrix.data).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_bad_values(bad: float) -> None:
    matrix = sparse.csr_array(np.array([[1.0, 2.0], [bad, 1.0]]))
    assert project_sparse(matrix, num_iters=3).status == birkhoff.Status.nonfinite_input


def test_inputs_are_kept_and_progress_is_reported() -> None:
    matrix = sparse.csr_array(random_sparse(50, 0.1, 2.0))
    before = matrix.copy()
    seen: list[int] = []
    result = project_sparse(matrix, tol=1e-8, progress=lambda iteration, _: seen.append(iteration))
    assert (matrix != before).nnz == 0
    assert seen == list(range(1, int(result.num_iters) + 1))
    assert result.column_error <= 1e-8


def test_misuse() -> None:
    square = sparse.csr_array(np.eye(3))
    with pytest.raises(ArrayTypeError, match="dense"):
        project_sparse(np.eye(3))
    with pytest.raises(ShapeError):
        project_sparse(sparse.csr_array(np.ones((2, 3))))
    for shape in ((3,), (2, 2, 2)):
        with pytest.raises(ShapeError, match=r"\(n, n\) with n >= 1, got \("):
            project_sparse(sparse.coo_array(np.ones(shape)))
    with pytest.raises(DtypeError):
        project_sparse(square.astype(int))
    for options in ({"num_iters": 0}, {"tol": 0.0}, {"first": "x"}, {"entries": "log"}):
        with pytest.raises(OptionError):
            project_sparse(square, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("first", ["columns", "rows"])
def test_cupy(dtype: str, first: str) -> None:
    cupy_sparse = pytest.importorskip("cupyx.scipy.sparse")
    dense = random_sparse(80, 0.1, 5.0).astype(dtype)
    expected = project_sparse(sparse.csr_matrix(dense), num_iters=20, tol=1e-300, first=first)
    result = project_sparse(cupy_sparse.csr_matrix(sparse.csr_matrix(dense)), num_iters=20, tol=1e-300, first=first)
    assert type(result.matrix).__module__.startswith("cupyx")
    difference = np.abs(result.matrix.get().toarray() - expected.matrix.toarray()).max()
    assert difference <= 1000 * np.finfo(dtype).eps

"""Support and total support against enumeration of all permutations."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import scipy.sparse as sparse

import birkhoff
from birkhoff.errors import MissingPackageError, ShapeError
from birkhoff.sparse import project_sparse
from birkhoff.support import Support, diagnose_support, sparse_total_support, total_support_pattern
from tests.backends import BACKENDS, Backend


def enumerated(masks: np.ndarray) -> np.ndarray:
    """Entries that lie on a permutation inside each pattern, by trying all n! of them."""
    n = masks.shape[-1]
    kept = np.zeros_like(masks)
    for columns in itertools.permutations(range(n)):
        permutation = np.eye(n, dtype=bool)[list(columns)]
        inside = (~permutation | masks).all(axis=(-2, -1))
        kept |= permutation & inside[:, None, None]
    return kept


def patterns(n: int) -> np.ndarray:
    if n <= 3:
        return np.array(list(itertools.product([False, True], repeat=n * n))).reshape(-1, n, n)
    rng = np.random.default_rng(n)
    return rng.random((1500, n, n)) < rng.uniform(0.2, 0.9, (1500, 1, 1))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_dense_patterns(n: int) -> None:
    masks = patterns(n)
    expected = enumerated(masks)
    np.testing.assert_array_equal(total_support_pattern(masks), expected)
    codes = np.where(
        expected.any(axis=(-2, -1)),
        np.where((expected == masks).all(axis=(-2, -1)), Support.total, Support.partial),
        Support.none,
    )
    np.testing.assert_array_equal(diagnose_support(masks), codes)
    assert {int(code) for code in codes} == ({0, 2} if n == 1 else {0, 1, 2})


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_sparse_patterns(n: int) -> None:
    masks = patterns(n)[:300]
    for mask, expected in zip(masks, enumerated(masks), strict=True):
        support, kept = sparse_total_support(sparse.csr_array(mask.astype(float)))
        rebuilt = np.zeros_like(mask)
        rebuilt[mask] = kept
        np.testing.assert_array_equal(rebuilt, expected)
        assert support == int(diagnose_support(mask))


def test_stored_zeros_are_zeros() -> None:
    matrix = sparse.csr_array((np.array([1.0, 0.0, 1.0]), np.array([0, 1, 1]), np.array([0, 2, 3])), shape=(2, 2))
    support, kept = sparse_total_support(matrix)
    assert support is Support.total
    np.testing.assert_array_equal(kept, [True, False, True])


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_every_library_and_layout(backend: Backend) -> None:
    logits = np.zeros((2, 3, 2, 2))
    logits[0, 1, 1, 0] = -np.inf  # triangular: partial
    logits[1, 2, 0, :] = -np.inf  # an empty row: none
    expected = np.full((2, 3), 2)
    expected[0, 1], expected[1, 2] = 1, 0
    array = backend.asarray(logits)
    np.testing.assert_array_equal(diagnose_support(array > -np.inf), expected)
    batch_last = np.moveaxis(np.ascontiguousarray(np.moveaxis(logits, (0, 1), (-2, -1))), (-2, -1), (0, 1))
    np.testing.assert_array_equal(diagnose_support(batch_last > -np.inf), expected)


def test_block_structure_at_n_400() -> None:
    """Cyclic blocks on the diagonal have total support; one entry above them does not belong, and closes no cycle."""
    n = 400
    mask = np.kron(np.eye(n // 4, dtype=bool), np.ones((4, 4), dtype=bool))
    assert diagnose_support(mask) == Support.total
    mask[0, n - 1] = True
    assert diagnose_support(mask) == Support.partial
    kept = total_support_pattern(mask)
    assert not kept[0, n - 1]
    assert kept.sum() == mask.sum() - 1
    mask[n - 1, 0] = True  # now it does
    assert diagnose_support(mask) == Support.total


def test_what_project_reports() -> None:
    logits = np.zeros((3, 2, 2))
    logits[1, 1, 0] = logits[2, 0, 0] = logits[2, 0, 1] = -np.inf
    status = birkhoff.project(logits, birkhoff.solvers.SinkhornLog()).status
    assert [birkhoff.Status(int(code)).name for code in status] == ["converged", "no_total_support", "no_total_support"]


def test_empty_and_misuse() -> None:
    assert diagnose_support(np.ones((0, 3, 3))).shape == (0,)
    np.testing.assert_array_equal(diagnose_support(np.ones((2, 0, 0))), [Support.total, Support.total])
    with pytest.raises(ShapeError, match="n, n"):
        diagnose_support(np.ones((2, 3)))
    with pytest.raises(ShapeError, match=r"\(n, n\), got \(2, 3\)"):
        sparse_total_support(sparse.csr_array(np.ones((2, 3))))


def test_what_needs_scipy_says_so_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Foreign:
        """A sparse matrix of a library that is not SciPy, as CuPy's are."""

        shape, nnz = (2, 2), 4
        data, indices, indptr = np.ones(4), np.array([0, 1, 0, 1]), np.array([0, 2, 4])
        dtype = data.dtype

        def tocsr(self, copy: bool) -> Foreign:
            return self

        def sum_duplicates(self) -> None:
            """There are none."""

    for module in [name for name in sys.modules if name.partition(".")[0] == "scipy"]:
        monkeypatch.setitem(sys.modules, module, None)
    for call in (
        lambda: sparse_total_support(np.ones((2, 2))),
        lambda: project_sparse(Foreign()),
        lambda: birkhoff.decompose(np.full((2, 2), 0.5)),
    ):
        with pytest.raises(MissingPackageError, match="pip install scipy"):
            call()

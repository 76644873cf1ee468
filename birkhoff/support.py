"""Support of a zero pattern: which patterns of zeros a diagonal scaling can make doubly stochastic.

A pattern *has support* if one permutation avoids its zeros, and *total support* if every nonzero lies on such a
permutation. Sinkhorn and Knopp (1967): the scaled matrix exists exactly for total support; the iteration converges
exactly for support, and then drives the entries outside the total support to zero, slowly.

Everything here runs on the host, on exact patterns. Dense patterns use integers as bit sets and need NumPy alone;
sparse matrices use ``scipy.sparse.csgraph``.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import numpy as np

from birkhoff import _xp
from birkhoff.errors import MissingPackageError, ShapeError

__all__ = ["Support", "diagnose_support", "sparse_total_support", "total_support_pattern"]


class Support(IntEnum):
    """How much of a zero pattern lies on permutations that avoid its zeros.

    ``none``: no permutation does; no scaling exists and the iteration does not converge.
    ``partial``: some do; the iteration converges, but only at rate 1/k and only by driving entries to zero.
    ``total``: every nonzero does; the scaling exists and the iteration converges linearly.
    """

    none = 0
    partial = 1
    total = 2


def diagnose_support(pattern: Any) -> Any:
    """Say for every matrix of a batch whether its pattern of nonzeros has no, partial or total support.

    Parameters
    ----------
    pattern : array, shape (..., n, n), bool or real
        True or nonzero where an entry may be positive. For logits pass ``logits > -inf``. Copied to the host.

    Returns
    -------
    numpy.ndarray of int8, shape (...)
        Codes of :class:`Support`.

    Raises
    ------
    ShapeError
        If the last two axes do not form a square.

    Notes
    -----
    Equal patterns of a batch are analysed once: a matching by augmenting paths, then the strongly connected components
    of the matched graph, on n-bit integers.

    Examples
    --------
    >>> import numpy as np
    >>> from birkhoff.support import Support, diagnose_support
    >>> triangular = np.array([[True, True], [False, True]])
    >>> Support(int(diagnose_support(triangular))).name
    'partial'
    """
    masks, shape = _host_patterns(pattern)
    kept = _on_unique(masks)
    full = kept.any(axis=(-2, -1))
    total = (kept == masks).all(axis=(-2, -1))
    if shape[-1] == 0:
        return np.full(shape[:-2], Support.total, dtype=np.int8)
    codes = np.where(full, np.where(total, Support.total, Support.partial), Support.none)
    return codes.astype(np.int8).reshape(shape[:-2])


def total_support_pattern(pattern: Any) -> Any:
    """Keep the nonzeros that lie on a permutation avoiding the zeros: the support of the iteration's limit.

    Parameters
    ----------
    pattern : array, shape (..., n, n), bool or real
        As for :func:`diagnose_support`.

    Returns
    -------
    numpy.ndarray of bool, shape (..., n, n)
        All False for a matrix whose pattern has no support.

    Examples
    --------
    >>> import numpy as np
    >>> from birkhoff.support import total_support_pattern
    >>> total_support_pattern(np.array([[1.0, 1.0], [0.0, 1.0]])).astype(int)
    array([[1, 0],
           [0, 1]])
    """
    masks, shape = _host_patterns(pattern)
    return _on_unique(masks).reshape(shape)


def sparse_total_support(matrix: Any) -> tuple[Support, Any]:
    """Diagnose a SciPy sparse matrix, keeping the entries on its total support.

    Parameters
    ----------
    matrix : scipy.sparse array or matrix, shape (n, n)
        Explicitly stored zeros count as zeros.

    Returns
    -------
    support : Support
    kept : numpy.ndarray of bool, shape (nnz,)
        For the entries of ``matrix.tocsr()``, in its order: whether the entry lies on a zero-avoiding permutation.

    Raises
    ------
    MissingPackageError
        If SciPy is not installed.
    ShapeError
        If the matrix is not square.

    Notes
    -----
    Hopcroft-Karp matching and strongly connected components from ``scipy.sparse.csgraph``: O(nnz sqrt(n)).

    Examples
    --------
    >>> import scipy.sparse as sparse
    >>> from birkhoff.support import sparse_total_support
    >>> support, kept = sparse_total_support(sparse.csr_array([[1.0, 1.0], [0.0, 1.0]]))
    >>> support.name, kept
    ('partial', array([ True, False,  True]))
    """
    sparse, csgraph = require_scipy("the support diagnosis of sparse matrices")
    shape = tuple(matrix.shape)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ShapeError(f"matrix must have shape (n, n), got {shape}")
    rows = sparse.csr_array(matrix)
    n = rows.shape[0]
    stored = rows.data != 0
    row_of = np.repeat(np.arange(n), np.diff(rows.indptr))
    edges = sparse.csr_array((np.ones(int(stored.sum()), np.int8), (row_of[stored], rows.indices[stored])), (n, n))
    column_of_row = csgraph.maximum_bipartite_matching(edges, perm_type="column")
    kept = np.zeros(rows.nnz, dtype=bool)
    if n and (column_of_row < 0).any():
        return Support.none, kept
    # Edge (i, j) becomes i -> the row matched with j; it lies on a permutation iff that arc lies on a cycle.
    row_of_column = np.empty(n, dtype=np.int64)
    row_of_column[column_of_row] = np.arange(n)
    heads = row_of_column[rows.indices]
    graph = sparse.csr_array((np.ones(int(stored.sum()), np.int8), (row_of[stored], heads[stored])), (n, n))
    component = csgraph.connected_components(graph, directed=True, connection="strong")[1]
    kept = stored & (component[row_of] == component[heads])
    return (Support.total if (kept == stored).all() else Support.partial), kept


def require_scipy(needed_by: str) -> tuple[Any, Any]:
    """``scipy.sparse`` and its ``csgraph``, or :class:`MissingPackageError`."""
    try:
        from scipy import sparse
        from scipy.sparse import csgraph
    except ImportError as error:
        raise MissingPackageError("scipy", needed_by=needed_by) from error
    return sparse, csgraph


def _host_patterns(pattern: Any) -> tuple[np.ndarray, tuple[int, ...]]:
    values = _xp.to_numpy(pattern)
    if values.ndim < 2 or values.shape[-1] != values.shape[-2]:
        raise ShapeError(f"pattern must have shape (..., n, n), got {values.shape}; pass square matrices")
    count = int(np.prod(values.shape[:-2], dtype=np.int64))
    return (values != 0).reshape(count, *values.shape[-2:]), values.shape


def _on_unique(masks: np.ndarray) -> np.ndarray:
    """Total support of each pattern, each distinct pattern analysed once."""
    if masks.size == 0:
        return masks
    packed = np.ascontiguousarray(np.packbits(masks.reshape(len(masks), -1), axis=-1))
    keys = packed.view(np.dtype((np.void, packed.shape[-1]))).reshape(-1)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    kept = np.stack([_total_support(masks[index]) for index in first])
    return kept[inverse.reshape(-1)]


def _total_support(mask: np.ndarray) -> np.ndarray:
    n = mask.shape[-1]
    if mask.all():
        return mask
    column_of_row = _perfect_matching(_bit_sets(mask), n)
    if column_of_row is None:
        return np.zeros_like(mask)
    # Permute the matching to the diagonal: arc i -> k when row i may use the column matched with row k. An entry lies
    # on a permutation iff its arc lies on a cycle, that is, inside a strongly connected component.
    arcs = mask[:, column_of_row]
    component = _strong_components(_bit_sets(arcs), _bit_sets(arcs.T), n)
    kept = np.zeros_like(mask)
    kept[:, column_of_row] = arcs & (component[:, None] == component[None, :])
    return kept


def _bit_sets(mask: np.ndarray) -> list[int]:
    """Each row of a boolean matrix as one integer, column j as bit j."""
    return [int.from_bytes(np.packbits(row, bitorder="little").tobytes(), "little") for row in mask]


def _members(bits: int) -> Iterator[int]:
    while bits:
        yield (bits & -bits).bit_length() - 1
        bits &= bits - 1


def _strong_components(heads: list[int], tails: list[int], n: int) -> np.ndarray:
    """Label of each node's component: what a node reaches and is reached from, among the nodes still unlabelled."""
    component = np.zeros(n, dtype=np.int64)
    rest = (1 << n) - 1
    while rest:
        start = rest & -rest
        found = _reachable(start, heads, rest) & _reachable(start, tails, rest)
        component[list(_members(found))] = start.bit_length()
        rest &= ~found
    return component


def _reachable(start: int, arcs: list[int], within: int) -> int:
    seen = frontier = start
    while frontier:
        new = 0
        for node in _members(frontier):
            new |= arcs[node]
        frontier = new & within & ~seen
        seen |= frontier
    return seen


def _perfect_matching(allowed: list[int], n: int) -> list[int] | None:
    """Columns of a perfect matching, row by row, by breadth-first augmenting paths; None if there is none."""
    column_of_row = [-1] * n
    row_of_column = [-1] * n
    for start in range(n):
        came_from: dict[int, int] = {}  # column -> the row from which the search reached it
        free_column = _search(start, allowed, row_of_column, came_from)
        if free_column < 0:
            return None
        row, column = -1, free_column
        while row != start:  # flip the path, from the free column back to its start
            row = came_from[column]
            row_of_column[column] = row
            column_of_row[row], column = column, column_of_row[row]
    return column_of_row


def _search(start: int, allowed: list[int], row_of_column: list[int], came_from: dict[int, int]) -> int:
    """First free column that an alternating path from ``start`` reaches, or -1."""
    frontier, unseen = [start], -1
    while frontier:
        following = []
        for row in frontier:
            new = allowed[row] & unseen
            unseen &= ~new
            for column in _members(new):
                came_from[column] = row
                if row_of_column[column] < 0:
                    return column
                following.append(row_of_column[column])
        frontier = following
    return -1

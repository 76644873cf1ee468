"""Birkhoff-von Neumann: a doubly stochastic matrix as a convex combination of permutations, and back."""

from __future__ import annotations

from typing import Any

import numpy as np

from birkhoff import _xp
from birkhoff._checks import square_matrices
from birkhoff.errors import MissingPackageError, ShapeError
from birkhoff.rounding import round_to_polytope

__all__ = ["decompose", "recompose", "round_to_polytope"]


def decompose(matrix: Any, *, tol: float | None = None, max_terms: int | None = None) -> tuple[Any, Any]:
    r"""Write a doubly stochastic matrix as a convex combination of permutation matrices.

    .. math:: P = \sum_{t=1}^{k} w_t\, \Pi_t, \qquad w_t > 0, \quad \sum_t w_t = 1, \quad k \le (n-1)^2 + 1

    Greedy bottleneck peeling: each step takes the permutation inside the remaining support whose smallest entry is
    largest, and subtracts as much of it as it can. The weights therefore come in non-increasing order and few terms
    carry most of the mass. (The smallest possible number of terms is NP-hard to find.)

    Parameters
    ----------
    matrix : array, shape (..., n, n)
        Non-negative. It is rounded to the polytope first (:func:`round_to_polytope`), so a truncated projection is
        accepted; what is decomposed is the rounded matrix.
    tol : float, optional
        Weights up to ``tol`` are dropped and the rest rescaled. Default: the largest of :math:`8 n` units of roundoff
        of the input dtype and zero, which the rounding of the input cannot tell from zero.
    max_terms : int, optional
        Stop after this many terms and rescale the weights: an approximation by few permutations.

    Returns
    -------
    weights : array, shape (..., k)
        Same library, device and dtype. In a batch, k is the largest number of terms and shorter rows end in zeros.
    permutations : array of int64, shape (..., k, n)
        ``permutations[..., t, i]`` is the column of row i. Padding is the identity, with weight zero.

    Raises
    ------
    MissingPackageError
        If SciPy, whose bipartite matching is used, is not installed.
    ArrayTypeError, DtypeError
        If ``matrix`` is not an array, or not real floating.
    ShapeError, ValueError
        If the matrices are not square, ``n`` is 0, an entry is not finite, or ``max_terms`` is less than 1.

    Notes
    -----
    Runs on the host in float64; a GPU array is copied there and the result copied back. The bound on the number of
    terms holds in floating point too: each step empties an entry that lay on a permutation, so the remaining face of
    the polytope loses at least one dimension (see the derivation page).

    Examples
    --------
    >>> import numpy as np
    >>> import birkhoff
    >>> weights, permutations = birkhoff.decompose(np.array([[0.75, 0.25], [0.25, 0.75]]))
    >>> weights, permutations
    (array([0.75, 0.25]), array([[0, 1],
           [1, 0]]))
    >>> birkhoff.recompose(weights, permutations)
    array([[0.75, 0.25],
           [0.25, 0.75]])
    """
    xp = square_matrices(matrix, "matrix", nonempty=True)
    if max_terms is not None and max_terms < 1:
        raise ValueError(f"max_terms must be at least 1, got {max_terms}")
    n = matrix.shape[-1]
    if tol is None:
        tol = 8 * n * float(xp.finfo(matrix.dtype).eps) / 2
    host = np.asarray(_xp.to_numpy(matrix), dtype=np.float64)
    if not np.isfinite(host).all():
        raise ValueError("matrix has entries that are not finite; decompose the finite matrices only")
    batch = host.shape[:-2]
    terms = [_peel(item, tol, max_terms) for item in round_to_polytope(host).reshape(-1, n, n)]
    longest = max((len(weights) for weights, _ in terms), default=1)
    weights = np.zeros((len(terms), longest))
    permutations = np.broadcast_to(np.arange(n), (len(terms), longest, n)).copy()
    for index, (item_weights, item_permutations) in enumerate(terms):
        weights[index, : len(item_weights)] = item_weights
        permutations[index, : len(item_weights)] = item_permutations
    device = _xp.device(matrix)
    return (
        _xp.astype(xp, xp.asarray(weights.reshape(*batch, longest), device=device), matrix.dtype),
        xp.asarray(permutations.reshape(*batch, longest, n), device=device),
    )


def recompose(weights: Any, permutations: Any) -> Any:
    r"""Sum weighted permutation matrices, :math:`\sum_t w_t \Pi_t`.

    Parameters
    ----------
    weights : array, shape (..., k)
        Real floating. Convex weights give a doubly stochastic matrix; others are summed all the same.
    permutations : array of integers, shape (..., k, n)
        ``permutations[..., t, i]`` is the column of row i; same library and device as ``weights``.

    Returns
    -------
    array, shape (..., n, n)
        In the dtype of ``weights``, differentiable with respect to them.

    Raises
    ------
    ShapeError
        If the number of terms differs.

    Examples
    --------
    >>> import numpy as np
    >>> import birkhoff
    >>> birkhoff.recompose(np.array([0.5, 0.5]), np.array([[0, 1], [1, 0]]))
    array([[0.5, 0.5],
           [0.5, 0.5]])
    """
    xp = _xp.array_namespace(weights, permutations)
    if permutations.ndim < 2 or weights.ndim < 1 or weights.shape[-1] != permutations.shape[-2]:
        raise ShapeError(
            f"weights (..., k) and permutations (..., k, n) must have as many terms, got {tuple(weights.shape)} and "
            f"{tuple(permutations.shape)}"
        )
    n = permutations.shape[-1]
    columns = xp.arange(n, dtype=permutations.dtype, device=_xp.device(permutations))
    one_hot = permutations[..., None] == columns  # (..., k, n, n)
    zero = xp.zeros_like(weights)
    return xp.sum(xp.where(one_hot, weights[..., None, None], zero[..., None, None]), axis=-3)


def _peel(matrix: np.ndarray, tol: float, max_terms: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Greedy bottleneck decomposition of one float64 matrix whose marginals are exact up to rounding."""
    n = matrix.shape[-1]
    rest = np.where(matrix > tol, matrix, 0.0)
    limit = (n - 1) ** 2 + 1 if max_terms is None else min(max_terms, (n - 1) ** 2 + 1)
    rows = np.arange(n)
    weights: list[float] = []
    permutations: list[np.ndarray] = []
    while len(weights) < limit:
        columns = _bottleneck_permutation(rest)
        if columns is None:
            break
        entries = rest[rows, columns]
        weight = float(entries.min())
        rest[rows, columns] = np.where(entries - weight > tol, entries - weight, 0.0)
        weights.append(weight)
        permutations.append(columns)
    if not weights:  # every entry is within tol of zero: only possible when tol was chosen above 1/n
        raise ValueError(f"tol={tol} drops every permutation; choose it below 1/n = {1 / n}")
    kept = np.asarray(weights)
    return kept / kept.sum(), np.stack(permutations)


def _bottleneck_permutation(matrix: np.ndarray) -> np.ndarray | None:
    """The permutation inside the support whose smallest entry is largest, by bisection over the entries."""
    try:
        from scipy import sparse
        from scipy.sparse.csgraph import maximum_bipartite_matching
    except ImportError as error:
        raise MissingPackageError("scipy", needed_by="decompose") from error
    levels = np.unique(matrix[matrix > 0])
    best: np.ndarray | None = None
    low, high = 0, len(levels) - 1
    if high >= 0:  # no permutation has a smallest entry above the smallest of the row and column maxima
        cap = min(matrix.max(axis=0).min(), matrix.max(axis=1).min())
        high = int(np.searchsorted(levels, cap, side="right")) - 1
    middle = high
    while low <= high:
        columns = maximum_bipartite_matching(sparse.csr_array(matrix >= levels[middle]), perm_type="column")
        if (columns >= 0).all():
            best, low = columns.astype(np.int64), middle + 1
        else:
            high = middle - 1
        middle = (low + high) // 2
    return best

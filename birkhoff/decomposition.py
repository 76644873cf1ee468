"""Birkhoff-von Neumann: a doubly stochastic matrix as a convex combination of permutations, and back."""

from __future__ import annotations

from typing import Any

import numpy as np

from birkhoff import _xp
from birkhoff._checks import as_count, as_real, square_matrices
from birkhoff.errors import DtypeError, NonFiniteError, OptionError, ShapeError
from birkhoff.rounding import round_to_polytope
from birkhoff.support import require_scipy

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
        Weights up to ``tol`` are dropped and the rest rescaled; at least 0 and below 1/n. Default: :math:`8 n` units of
        roundoff of the input dtype, which the rounding of the input cannot tell from zero.
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
        If ``matrix`` is not a dense array, or not real floating.
    ShapeError, NonFiniteError, OptionError
        If the matrices are not square or ``n`` is 0, an entry is not finite, or an option is out of its domain.

    Notes
    -----
    Runs on the host in float64; a GPU array is copied there and the result copied back. The bound on the number of
    terms holds in floating point too: each step empties an entry that lay on a permutation, so the remaining face of
    the polytope loses at least one dimension (see the derivation page).
    Claims: :ref:`decomposition_rebuilds <claim-decomposition-rebuilds>`.

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
    max_terms = None if max_terms is None else as_count(max_terms, "max_terms", least=1)
    if tol is not None and not 0.0 <= as_real(tol, "tol") < 1.0 / matrix.shape[-1]:
        raise OptionError(f"tol must be at least 0 and below 1/n, where no permutation is left to take, got {tol!r}")
    n = matrix.shape[-1]
    if tol is None:
        tol = 8 * n * float(xp.finfo(matrix.dtype).eps) / 2
    host = np.asarray(_xp.to_numpy(matrix), dtype=np.float64)
    if not np.isfinite(host).all():
        raise NonFiniteError("matrix has entries that are not finite; decompose the finite matrices only")
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
        ``permutations[..., t, i]`` is the column of row i; same library and device as ``weights``. The values are not
        looked at: a column outside 0 to n - 1 is nowhere, and adds nothing.

    Returns
    -------
    array, shape (..., n, n)
        In the dtype of ``weights``, differentiable with respect to them.

    Raises
    ------
    ShapeError
        If the number of terms or the batches differ.
    DtypeError
        If ``permutations`` are not integers.

    Examples
    --------
    >>> import numpy as np
    >>> import birkhoff
    >>> birkhoff.recompose(np.array([0.5, 0.5]), np.array([[0, 1], [1, 0]]))
    array([[0.5, 0.5],
           [0.5, 0.5]])
    """
    xp = _xp.array_namespace(weights, permutations)
    if permutations.ndim < 2 or tuple(weights.shape) != tuple(permutations.shape[:-1]):
        raise ShapeError(
            f"weights (..., k) and permutations (..., k, n) must have as many terms in the same batch, got "
            f"{tuple(weights.shape)} and {tuple(permutations.shape)}"
        )
    if not xp.isdtype(permutations.dtype, "integral"):
        raise DtypeError(f"permutations must be integers, got {_xp.dtype_name(permutations.dtype)}")
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
    kept = np.asarray(weights)
    return kept / kept.sum(), np.stack(permutations)


def _bottleneck_permutation(matrix: np.ndarray) -> np.ndarray | None:
    """The permutation inside the support whose smallest entry is largest, by bisection over the entries."""
    sparse, csgraph = require_scipy("decompose")
    levels = np.unique(matrix[matrix > 0])
    best: np.ndarray | None = None
    low, high = 0, len(levels) - 1
    if high >= 0:  # no permutation has a smallest entry above the smallest of the row and column maxima
        cap = min(matrix.max(axis=0).min(), matrix.max(axis=1).min())
        high = int(np.searchsorted(levels, cap, side="right")) - 1
    middle = high
    while low <= high:
        columns = csgraph.maximum_bipartite_matching(sparse.csr_array(matrix >= levels[middle]), perm_type="column")
        if (columns >= 0).all():
            best, low = columns.astype(np.int64), middle + 1
        else:
            high = middle - 1
        middle = (low + high) // 2
    return best

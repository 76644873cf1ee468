"""The algebra, done again in exact fractions.

Floats are rational numbers, so what is claimed of a *stored* matrix can be decided without rounding. The steps of the
iteration are rational too once exp has been taken: on logits 0 and -inf, where exp is 1 and 0, the whole iterate is an
exact fraction that every implementation can be compared with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np

__all__ = [
    "as_floats",
    "exact",
    "exact_sums",
    "is_positive_definite",
    "is_positive_semidefinite",
    "iterate",
    "matmul",
    "norm_at_most",
    "norm_below",
    "normalise_columns",
    "normalise_rows",
    "round_to_polytope",
    "schur_holds",
]

Matrix = list[list[Fraction]]


def exact(matrix: np.ndarray) -> Matrix:
    """Return the stored floats as fractions.

    >>> import numpy as np
    >>> from proofs.rational import exact
    >>> exact(np.array([[0.5]]))
    [[Fraction(1, 2)]]
    """
    return [[Fraction(float(value)) for value in row] for row in np.asarray(matrix, dtype=np.float64)]


def as_floats(matrix: Matrix) -> np.ndarray:
    """Return the nearest float64 of every entry."""
    return np.array([[float(value) for value in row] for row in matrix])


def transpose(matrix: Matrix) -> Matrix:
    """Return the transposed matrix."""
    return [list(column) for column in zip(*matrix, strict=True)]


def exact_sums(matrix: Matrix, side: str) -> list[Fraction]:
    """Return the exact row or column sums."""
    lines = matrix if side == "rows" else transpose(matrix)
    return [sum(line, Fraction(0)) for line in lines]


def matmul(left: Matrix, right: Matrix) -> Matrix:
    """Return the exact product."""
    columns = transpose(right)
    return [[sum((a * b for a, b in zip(row, col, strict=True)), Fraction(0)) for col in columns] for row in left]


def normalise_rows(matrix: Matrix) -> Matrix:
    """Divide every row by its sum; a zero row stays zero."""
    return [[value / total if (total := sum(row, Fraction(0))) else value for value in row] for row in matrix]


def normalise_columns(matrix: Matrix) -> Matrix:
    """Divide every column by its sum; a zero column stays zero."""
    return transpose(normalise_rows(transpose(matrix)))


def iterate(kernel: Matrix, num_iters: int, first: str = "columns") -> Matrix:
    """Return `num_iters` exact iterations on a non-negative matrix.

    >>> from proofs.rational import iterate
    >>> from fractions import Fraction
    >>> iterate([[Fraction(1), Fraction(1)], [Fraction(0), Fraction(1)]], 1, first="columns")
    [[Fraction(2, 3), Fraction(1, 3)], [Fraction(0, 1), Fraction(1, 1)]]
    """
    steps = (normalise_columns, normalise_rows) if first == "columns" else (normalise_rows, normalise_columns)
    for _ in range(num_iters):
        for step in steps:
            kernel = step(kernel)
    return kernel


def round_to_polytope(matrix: Matrix, *, complete: bool = True) -> Matrix:
    """Return the Altschuler-Weed-Rigollet rounding: rows, then columns, shrunk to sums <= 1, then a rank-one fill.

    ``complete=False`` stops before the fill: every sum at most 1, so non-expansive.
    """
    one = Fraction(1)
    rows = [[value * min(one / total, one) if (total := sum(row, Fraction(0))) else value for value in row]
            for row in matrix]  # fmt: skip
    both = transpose(
        [[value * min(one / total, one) if (total := sum(col, Fraction(0))) else value for value in col]
         for col in transpose(rows)]
    )  # fmt: skip
    if not complete:
        return both
    row_missing = [one - total for total in exact_sums(both, "rows")]
    column_missing = [one - total for total in exact_sums(both, "columns")]
    mass = sum(row_missing, Fraction(0))
    if not mass:
        return both
    return [
        [value + row_missing[i] * column_missing[j] / mass for j, value in enumerate(row)] for i, row in enumerate(both)
    ]


def schur_holds(matrix: np.ndarray) -> bool:
    """Decide ``norm_2^2 <= max row sum * max column sum`` and non-negativity for the stored floats, exactly."""
    if not np.all(np.isfinite(matrix)):
        return False
    entries = exact(matrix)
    if any(value < 0 for row in entries for value in row):
        return False
    bound = max(exact_sums(entries, "rows")) * max(exact_sums(entries, "columns"))
    return is_positive_semidefinite(gram_below(entries, bound))


def gram_below(entries: Matrix, square: Fraction) -> Matrix:
    """Return ``square * I - A^T A``."""
    columns = transpose(entries)
    size = len(entries)
    return [
        [(square if i == j else Fraction(0)) - _dot(columns[i], columns[j]) for j in range(size)] for i in range(size)
    ]


def _dot(left: Sequence[Fraction], right: Sequence[Fraction]) -> Fraction:
    return sum((a * b for a, b in zip(left, right, strict=True)), Fraction(0))


def norm_at_most(matrix: np.ndarray | Matrix, bound: float) -> bool:
    """Decide ``norm_2(matrix) <= bound`` for stored floats or fractions, without rounding.

    ``bound^2 I - A^T A`` is positive semidefinite exactly when the bound holds.

    >>> import numpy as np
    >>> from proofs.rational import norm_at_most
    >>> norm_at_most(np.eye(2), 1.0), norm_at_most(np.eye(2), 0.9999999999999999)
    (True, False)
    """
    if np.isposinf(bound):
        return True
    entries = matrix if isinstance(matrix, list) else exact(matrix)
    return bound >= 0 and is_positive_semidefinite(gram_below(entries, Fraction(float(bound)) ** 2))


def norm_below(matrix: np.ndarray | Matrix, bound: float) -> bool:
    """Decide ``norm_2(matrix) < bound``, without rounding.

    >>> import numpy as np
    >>> from proofs.rational import norm_below
    >>> norm_below(np.eye(2), 1.0), norm_below(np.eye(2), 1.0000000000000002)
    (False, True)
    """
    entries = matrix if isinstance(matrix, list) else exact(matrix)
    return bound > 0 and is_positive_definite(gram_below(entries, Fraction(float(bound)) ** 2))


def _pivots(gram: Matrix) -> Iterator[tuple[Fraction, list[Fraction]]]:
    """Eliminate a symmetric matrix; yield each pivot and what stands beside it in its row."""
    gram = [list(row) for row in gram]
    size = len(gram)
    for k in range(size):
        pivot = gram[k][k]
        yield pivot, gram[k][k + 1 :]
        for i in range(k + 1, size):
            factor = gram[i][k] / pivot if pivot else Fraction(0)
            for j in range(i, size) if factor else ():
                gram[i][j] -= factor * gram[k][j]
                gram[j][i] = gram[i][j]


def is_positive_definite(gram: Matrix) -> bool:
    """Decide by symmetric elimination: every pivot is positive."""
    return all(pivot > 0 for pivot, _ in _pivots(gram))


def is_positive_semidefinite(gram: Matrix) -> bool:
    """Decide by symmetric elimination: a negative pivot refutes, a zero pivot needs a zero row."""
    return all(pivot > 0 or (pivot == 0 and not any(beside)) for pivot, beside in _pivots(gram))

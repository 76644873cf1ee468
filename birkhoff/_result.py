"""What a projection answers: the matrix, how well it did, and a status with advice."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

__all__ = ["Projection", "Status"]


class Status(IntEnum):
    """How the projection of one matrix ended. ``status.advice`` says what to do about it.

    Arrays of results hold the integer codes; ``Status(int(code))`` gives the name back. Only ``converged`` is zero, so
    ``(result.status == 0).all()`` asks whether the whole batch is fine.

    Examples
    --------
    >>> from birkhoff import Status
    >>> Status(3).name
    'no_total_support'
    """

    converged = 0
    max_iters_reached = 1
    nonfinite_input = 2
    no_total_support = 3
    ill_conditioned_adjoint = 4

    @property
    def advice(self) -> str:
        """One sentence on what the status means and what to try."""
        return _ADVICE[self]


_ADVICE = {
    Status.converged: "Both marginals are within the tolerance.",
    Status.max_iters_reached: (
        "The marginals are not within the tolerance after the last iteration. Wide logits need many Sinkhorn "
        "iterations: use solvers.Newton(), finish='exact', more iterations, or a range_cap."
    ),
    Status.nonfinite_input: (
        "The logits hold NaN or +inf, so this matrix is NaN. -inf is allowed: it is an exact zero of the matrix."
    ),
    Status.no_total_support: (
        "No doubly stochastic matrix has exactly the zeros that the -inf logits ask for. Replace -inf by a large "
        "negative number, allow a permutation through every remaining entry, or use finish='exact'."
    ),
    Status.ill_conditioned_adjoint: (
        "The implicit gradient was refused because the matrix is not converged to its bound; the exact gradient of the "
        "iterations was used instead. Use solvers.Newton(), or adjoint=None."
    ),
}


@dataclass(frozen=True, eq=False)
class Projection:
    """The result of :func:`birkhoff.project` on a batch of matrices.

    Compared by identity: an equality of arrays has no one answer.

    Attributes
    ----------
    matrix : array, shape (..., n, n)
        The projected matrices, of the input's library, device and dtype.
    status : integer array, shape (...)
        Codes of :class:`Status`, one for each matrix.
    num_iters : integer array, shape (...)
        Iterations spent on each matrix.
    row_error, column_error : array, shape (...)
        ``max |sum - 1|`` over the rows, and over the columns, of the matrix **as returned**, rounded to its dtype.
    """

    matrix: Any
    status: Any
    num_iters: Any
    row_error: Any
    column_error: Any

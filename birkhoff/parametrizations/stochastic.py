"""Row-stochastic and column-stochastic matrices: a softmax along one axis, nothing asked of the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from birkhoff import _xp
from birkhoff.parametrizations.protocol import Sums, begin, check_order, leading_logit, softmax

__all__ = ["ColumnStochastic", "RowStochastic"]


@dataclass(frozen=True)
class _OneSided:
    """Softmax of n*n logits along ``axis``."""

    sums: ClassVar[Sums]
    axis: ClassVar[int]

    def num_parameters(self, n: int) -> int:
        """n*n, the matrix of logits read row by row."""
        check_order(type(self).__name__, n)
        return n * n

    def initial_parameters(self, n: int, *, mass: float = 0.01) -> np.ndarray:
        """The diagonal has weight ``1 - mass``."""
        self.num_parameters(n)
        return (np.eye(n) * (leading_logit(mass, n) if n > 1 else 0.0)).reshape(-1)

    def matrix(self, parameters: Any, n: int) -> Any:
        """The softmax of parameters (..., n*n)."""
        xp, theta = begin(self, parameters, n)
        logits = xp.reshape(theta, (*theta.shape[:-1], n, n))
        return _xp.astype(xp, softmax(xp, logits, self.axis), parameters.dtype)


@dataclass(frozen=True)
class RowStochastic(_OneSided):
    r"""Softmax over each row of n*n logits: row sums are one, so all-equal streams stay equal.

    Notes
    -----
    Exactness: row sums are within (n + 1) units of roundoff of one. The column sums, and with them the spectral norm
    (at most :math:`\sqrt n`), are free. Row-stochastic matrices are closed under products: the norm of a product of any
    number of them is at most :math:`\sqrt n` too.

    Examples
    --------
    >>> import numpy as np
    >>> from birkhoff.parametrizations import RowStochastic
    >>> RowStochastic().matrix(np.zeros(4), 2)
    array([[0.5, 0.5],
           [0.5, 0.5]])
    """

    sums: ClassVar[Sums] = "rows"
    axis: ClassVar[int] = -1


@dataclass(frozen=True)
class ColumnStochastic(_OneSided):
    r"""Softmax over each column of n*n logits: column sums are one, so the mean over streams is kept.

    Notes
    -----
    Exactness: column sums are within (n + 1) units of roundoff of one. The row sums, and with them the spectral norm
    (at most :math:`\sqrt n`), are free.

    Examples
    --------
    >>> import numpy as np
    >>> from birkhoff.parametrizations import ColumnStochastic
    >>> ColumnStochastic().matrix(np.zeros(4), 2)
    array([[0.5, 0.5],
           [0.5, 0.5]])
    """

    sums: ClassVar[Sums] = "columns"
    axis: ClassVar[int] = -2

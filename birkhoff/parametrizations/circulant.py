"""Circulant matrices: one softmax vector, shifted from row to row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from birkhoff import _xp
from birkhoff.parametrizations.protocol import Sums, begin, check_order, leading_logit, softmax

__all__ = ["Circulant"]


@dataclass(frozen=True)
class Circulant:
    r"""Convex combination of the n cyclic shifts.

    .. math:: P_{ij} = \operatorname{softmax}(\theta)_{(j - i) \bmod n}

    Notes
    -----
    Exactness: every row and column holds the same n numbers, which a softmax makes add to one within (n + 1) units of
    roundoff. Normal matrices that all commute; a product of circulants is circulant.

    Examples
    --------
    >>> import numpy as np
    >>> from birkhoff.parametrizations import Circulant
    >>> Circulant().matrix(np.log(np.array([0.5, 0.25, 0.25])), 3)
    array([[0.5 , 0.25, 0.25],
           [0.25, 0.5 , 0.25],
           [0.25, 0.25, 0.5 ]])
    """

    sums: ClassVar[Sums] = "both"

    def num_parameters(self, n: int) -> int:
        """n, one for each shift."""
        check_order("Circulant", n)
        return n

    def initial_parameters(self, n: int, *, mass: float = 0.01) -> np.ndarray:
        """The shift by zero has weight ``1 - mass``."""
        theta = np.zeros(self.num_parameters(n))
        if n > 1:
            theta[0] = leading_logit(mass, n)
        return theta

    def matrix(self, parameters: Any, n: int) -> Any:
        """The circulants of parameters (..., n)."""
        xp, theta = begin(self, parameters, n)
        weights = softmax(xp, theta, -1)
        shifts = [(j - i) % n for i in range(n) for j in range(n)]
        index = xp.asarray(shifts, device=_xp.device(theta))
        values = xp.reshape(xp.take(weights, index, axis=-1), (*theta.shape[:-1], n, n))
        return _xp.astype(xp, values, parameters.dtype)

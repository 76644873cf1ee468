r"""Convex combinations of all permutations (mHC-lite): every doubly stochastic matrix, n! parameters."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from birkhoff import _xp
from birkhoff.parametrizations.protocol import Sums, begin, check_order, leading_logit, softmax

__all__ = ["Permutations"]

_LARGEST = 5


def _gathered(n: int) -> list[int]:
    """For each entry (i, j), row by row, the numbers of the permutations that send i to j."""
    permutations = list(itertools.permutations(range(n)))
    return [k for i in range(n) for j in range(n) for k, columns in enumerate(permutations) if columns[i] == j]


_GATHERED = {n: _gathered(n) for n in range(1, _LARGEST + 1)}


@dataclass(frozen=True)
class Permutations:
    r"""Softmax weights over the n! permutation matrices, n <= 5.

    .. math:: P = \sum_{\sigma \in S_n} \operatorname{softmax}(\theta)_\sigma \, \Pi_\sigma

    Onto the interior of the Birkhoff polytope, by Birkhoff's theorem. Permutations are in lexicographic order, the
    identity first.

    Notes
    -----
    Exactness: each sum adds all n! weights, which add to one within the rounding of one softmax: sums are within
    :math:`n!\,u` of one, u of the compute dtype.

    References
    ----------
    .. [1] "mHC-lite", arXiv 2601.05732.

    Examples
    --------
    >>> import numpy as np
    >>> from birkhoff.parametrizations import Permutations
    >>> Permutations().matrix(np.zeros(6), 3)
    array([[0.33333333, 0.33333333, 0.33333333],
           [0.33333333, 0.33333333, 0.33333333],
           [0.33333333, 0.33333333, 0.33333333]])
    """

    sums: ClassVar[Sums] = "both"

    def num_parameters(self, n: int) -> int:
        """n!, for n at most 5."""
        check_order("Permutations", n, largest=_LARGEST)
        return math.factorial(n)

    def initial_parameters(self, n: int, *, mass: float = 0.01) -> np.ndarray:
        """The identity has weight ``1 - mass``, the others share the rest."""
        theta = np.zeros(self.num_parameters(n))
        if n > 1:
            theta[0] = leading_logit(mass, theta.size)
        return theta

    def matrix(self, parameters: Any, n: int) -> Any:
        """The convex combinations of parameters (..., n!)."""
        xp, theta = begin(self, parameters, n)
        weights = softmax(xp, theta, -1)
        # Entry (i, j) gathers the (n-1)! permutations that send i to j.
        index = xp.asarray(_GATHERED[n], device=_xp.device(theta))
        chosen = xp.reshape(xp.take(weights, index, axis=-1), (*theta.shape[:-1], n, n, math.factorial(n - 1)))
        return _xp.astype(xp, xp.sum(chosen, axis=-1), parameters.dtype)

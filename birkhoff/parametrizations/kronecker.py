r"""Kronecker products of small doubly stochastic factors (KromHC): few parameters, a thin subset."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from birkhoff import _xp
from birkhoff.errors import OptionError
from birkhoff.parametrizations.permutations import Permutations
from birkhoff.parametrizations.protocol import Sums, begin, check_mass, check_order

__all__ = ["Kronecker"]


@dataclass(frozen=True)
class Kronecker:
    r"""Product of one doubly stochastic factor for each prime factor 2, 3 or 5 of n.

    .. math:: P = F_1 \otimes F_2 \otimes \cdots, \qquad
       F = \begin{pmatrix} s & 1-s \\ 1-s & s \end{pmatrix},\ s = \operatorname{sigmoid}(\theta) \text{ for a factor } 2

    A factor p = 3 or 5 is a convex combination of p! permutations. For n = 4: two parameters. The Kronecker product of
    doubly stochastic matrices is doubly stochastic; not every doubly stochastic matrix is of this form. It is the
    construction known as KromHC.

    Notes
    -----
    Exactness: sums are within :math:`(4 m + \sum p!)\,u` of one for m factors.

    Examples
    --------
    >>> import numpy as np
    >>> from birkhoff.parametrizations import Kronecker
    >>> Kronecker().num_parameters(8)
    3
    >>> Kronecker().matrix(np.array([0.0]), 2)
    array([[0.5, 0.5],
           [0.5, 0.5]])
    """

    sums: ClassVar[Sums] = "both"

    def num_parameters(self, n: int) -> int:
        """One for each factor 2, p! for each factor p = 3, 5; other prime factors are refused."""
        return sum(_count(p) for p in _factors(n))

    def initial_parameters(self, n: int, *, mass: float = 0.01) -> np.ndarray:
        """Every factor near its identity, sharing ``mass`` equally."""
        factors = _factors(n)
        if not factors:
            return np.zeros(0)
        share = 1.0 - (1.0 - check_mass(mass)) ** (1.0 / len(factors))
        small = Permutations()
        parts = [small.initial_parameters(p, mass=share) for p in factors]
        return np.concatenate([part[:1] if len(part) == 2 else part for part in parts])

    def matrix(self, parameters: Any, n: int) -> Any:
        """The Kronecker products of parameters (..., num_parameters(n)), the largest prime factor first."""
        xp, theta = begin(self, parameters, n)
        batch = theta.shape[:-1]
        result = xp.ones((*batch, 1, 1), dtype=theta.dtype, device=_xp.device(theta))
        start = 0
        for p in _factors(n):
            part = theta[..., start : start + _count(p)]
            start += _count(p)
            # sigmoid(theta) is the softmax over the logits (theta, 0).
            logits = xp.concat([part, xp.zeros_like(part)], axis=-1) if p == 2 else part
            factor = Permutations().matrix(logits, p)
            size = result.shape[-1] * p
            blocks = result[..., :, None, :, None] * factor[..., None, :, None, :]
            result = xp.reshape(blocks, (*batch, size, size))
        return _xp.astype(xp, result, parameters.dtype)


def _count(p: int) -> int:
    return 1 if p == 2 else math.factorial(p)


def _factors(n: int) -> list[int]:
    """Prime factors of n among 5, 3, 2, largest first."""
    check_order("Kronecker", n)
    factors, rest = [], n
    for p in (5, 3, 2):
        while rest % p == 0:
            factors.append(p)
            rest //= p
    if rest != 1:
        raise OptionError(f"Kronecker: n must have no prime factor but 2, 3 and 5, got {n}")
    return factors

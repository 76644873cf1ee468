"""Orthostochastic matrices: the squares of the entries of an orthogonal matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from birkhoff import _xp
from birkhoff.parametrizations.cayley import orthogonal
from birkhoff.parametrizations.protocol import Sums, begin, check_mass, check_order

__all__ = ["Orthostochastic"]


@dataclass(frozen=True)
class Orthostochastic:
    r"""Entrywise square of an orthogonal matrix, whose rows and columns have length one.

    .. math:: P = Q \circ Q, \qquad Q = (I - S)^{-1} (I + S), \qquad S^\top = -S

    n(n-1)/2 parameters. Onto the doubly stochastic matrices for n = 2 (up to the swap itself, a limit); a proper subset
    for n >= 3.

    Notes
    -----
    Exactness: sums are within a few n units of roundoff of one for parameters of any size. **The identity is a critical
    point**: the derivative at zero parameters is zero, so training must start elsewhere (``initial_parameters`` does).

    Examples
    --------
    >>> import numpy as np
    >>> from birkhoff.parametrizations import Orthostochastic
    >>> Orthostochastic().matrix(np.array([0.5]), 2)
    array([[0.36, 0.64],
           [0.64, 0.36]])
    """

    sums: ClassVar[Sums] = "both"

    def num_parameters(self, n: int) -> int:
        """n(n-1)/2."""
        check_order("Orthostochastic", n)
        return n * (n - 1) // 2

    def initial_parameters(self, n: int, *, mass: float = 0.01) -> np.ndarray:
        """All equal, such that each row has off-diagonal mass of about ``mass``."""
        count = self.num_parameters(n)
        return np.full(count, math.sqrt(check_mass(mass) / (4.0 * max(1, n - 1))))

    def matrix(self, parameters: Any, n: int) -> Any:
        """The squared rotations of parameters (..., n(n-1)/2)."""
        xp, theta = begin(self, parameters, n)
        rotation = orthogonal(xp, theta, n)
        return _xp.astype(xp, rotation * rotation, parameters.dtype)

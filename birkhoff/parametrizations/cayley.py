r"""Orthogonal matrices by the Cayley transform of a skew-symmetric one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from birkhoff import _xp
from birkhoff.parametrizations.protocol import Sums, begin, check_order, product

__all__ = ["Cayley", "orthogonal"]


@dataclass(frozen=True)
class Cayley:
    r"""Orthogonal, hence norm-preserving; not stochastic: entries have signs, and no sum is kept.

    .. math:: Q = (I - S)^{-1} (I + S), \qquad S^\top = -S

    S holds the n(n-1)/2 parameters above its diagonal, row by row. Onto the rotations without eigenvalue -1.

    Notes
    -----
    Exactness: :math:`\lVert Q^\top Q - I\rVert` is a few n units of roundoff for parameters of any size: the solve is
    followed by one Newton-Schulz step, which squares its error. Zero parameters give the identity exactly.

    Examples
    --------
    >>> import numpy as np
    >>> from birkhoff.parametrizations import Cayley
    >>> Cayley().matrix(np.array([1.0]), 2)
    array([[ 0.,  1.],
           [-1.,  0.]])
    """

    sums: ClassVar[Sums] = "none"

    def num_parameters(self, n: int) -> int:
        """n(n-1)/2."""
        check_order("Cayley", n)
        return n * (n - 1) // 2

    def initial_parameters(self, n: int, *, mass: float = 0.01) -> np.ndarray:
        """Zeros: the identity exactly, with a gradient that is not zero there; ``mass`` is not used."""
        return np.zeros(self.num_parameters(n))

    def matrix(self, parameters: Any, n: int) -> Any:
        """The orthogonal matrices of parameters (..., n(n-1)/2)."""
        xp, theta = begin(self, parameters, n)
        return _xp.astype(xp, orthogonal(xp, theta, n), parameters.dtype)


def orthogonal(xp: Any, theta: Any, n: int) -> Any:
    """The Cayley transform of parameters (..., n(n-1)/2), polished to roundoff."""
    eye = xp.eye(n, dtype=theta.dtype, device=_xp.device(theta))
    if n == 1:
        return xp.broadcast_to(eye, (*theta.shape[:-1], 1, 1))
    # Entry (i, j) of S: parameter k with sign + above the diagonal, - below, and zero on it.
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    number = {pair: k for k, pair in enumerate(pairs)}
    entries = [(min(i, j), max(i, j)) for i in range(n) for j in range(n)]
    signs = [float((j > i) - (j < i)) for i in range(n) for j in range(n)]
    where = _xp.device(theta)
    index = xp.asarray([number.get(pair, 0) for pair in entries], device=where)
    sign = xp.asarray(signs, dtype=theta.dtype, device=where)
    skew = xp.reshape(xp.take(theta, index, axis=-1) * sign, (*theta.shape[:-1], n, n))
    rotation = xp.linalg.solve(eye - skew, eye + skew)
    defect = eye - product(xp, xp.matrix_transpose(rotation), rotation)
    return rotation + 0.5 * product(xp, rotation, defect)

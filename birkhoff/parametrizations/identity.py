"""The identity matrix: no mixing, no parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from birkhoff import _xp
from birkhoff.parametrizations.protocol import Sums, begin, check_order

__all__ = ["Identity"]


@dataclass(frozen=True)
class Identity:
    """The identity for every parameter: the plain residual connection as a parametrization. Exact.

    Examples
    --------
    >>> import numpy as np
    >>> from birkhoff.parametrizations import Identity
    >>> Identity().matrix(np.zeros((0,)), 2)
    array([[1., 0.],
           [0., 1.]])
    """

    sums: ClassVar[Sums] = "both"

    def num_parameters(self, n: int) -> int:
        """None at all."""
        check_order("Identity", n)
        return 0

    def initial_parameters(self, n: int, *, mass: float = 0.01) -> np.ndarray:
        """An empty vector; the matrix is the identity whatever ``mass`` is."""
        return np.zeros(self.num_parameters(n))

    def matrix(self, parameters: Any, n: int) -> Any:
        """The identity, in the batch shape of ``parameters`` (..., 0)."""
        xp, values = begin(self, parameters, n)
        eye = xp.eye(n, dtype=parameters.dtype, device=_xp.device(parameters))
        return xp.broadcast_to(eye, (*values.shape[:-1], n, n))

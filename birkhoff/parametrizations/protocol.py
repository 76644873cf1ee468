"""What a parametrization is: an immutable value that maps free parameters to a matrix with stated sums."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from birkhoff import _math, _xp
from birkhoff._checks import as_count, as_real
from birkhoff.errors import DtypeError, OptionError, ShapeError

__all__ = ["Parametrization", "Sums", "begin", "check_mass", "check_order", "leading_logit", "product", "softmax"]

Sums = Literal["both", "rows", "columns", "none"]
"""Which sums are one by construction."""


class Parametrization(Protocol):
    """A map from parameters (..., num_parameters(n)) to matrices (..., n, n), on any array library.

    Nothing iterates and nothing looks at data; torch differentiates every map. The result has the library, device and
    dtype of the parameters; half precisions are computed in float32.

    Attributes
    ----------
    sums : {"both", "rows", "columns", "none"}
        Which sums are one by construction, up to the rounding that each class states.
    """

    sums: ClassVar[Sums]

    def num_parameters(self, n: int) -> int:
        """Length of the parameter axis for matrices of order n; OptionError if this n is not possible."""

    def initial_parameters(self, n: int, *, mass: float = 0.01) -> np.ndarray:
        """Parameters in float64 whose matrix is near the identity: about ``mass`` of each row lies off the diagonal."""

    def matrix(self, parameters: Any, n: int) -> Any:
        """The matrices of a batch of parameters."""


def check_order(name: str, n: int, *, largest: int | None = None) -> None:
    """Raise :class:`OptionError` for an order that is not an integer in [1, largest]."""
    as_count(n, f"{name}: n", least=1)
    if largest is not None and n > largest:
        raise OptionError(f"{name}: n must be at most {largest}, got {n}; choose another parametrization or a solver")


def begin(parametrization: Parametrization, parameters: Any, n: int) -> tuple[Any, Any]:
    """Validate; return the namespace and the parameters in the compute dtype."""
    name, count = type(parametrization).__name__, parametrization.num_parameters(n)
    xp = _xp.array_namespace(parameters)
    if parameters.ndim < 1 or parameters.shape[-1] != count:
        raise ShapeError(
            f"{name}: parameters must have shape (..., {count}) for n = {n}, got {tuple(parameters.shape)}; "
            "num_parameters(n) gives the length"
        )
    if not _xp.is_floating(parameters.dtype):
        raise DtypeError(f"{name}: parameters must be real floating, got {_xp.dtype_name(parameters.dtype)}")
    return xp, _xp.astype(xp, parameters, _math.compute_dtype(xp, parameters))


def softmax(xp: Any, values: Any, axis: int) -> Any:
    """Softmax with the sum accumulated as precisely as the device allows."""
    return _math.softmax(xp, values, axis, _math.accumulate_dtype(xp, values))


def product(xp: Any, left: Any, right: Any) -> Any:
    """Product of small matrices by plain sums: no reduced-precision matrix units, whatever the library's settings."""
    return xp.sum(left[..., :, :, None] * right[..., None, :, :], axis=-2)


def leading_logit(mass: float, count: int) -> float:
    """First logit, the others being zero, that leaves ``mass`` to the other ``count - 1`` entries of a softmax."""
    mass = check_mass(mass)
    return math.log((1.0 - mass) * (count - 1) / mass)


def check_mass(mass: float) -> float:
    """Return ``mass`` as a Python float, or raise :class:`OptionError` for what is not a share between 0 and 1."""
    if not 0.0 < as_real(mass, "mass") < 1.0:
        raise OptionError(f"mass must be in (0, 1), got {mass!r}")
    return float(mass)

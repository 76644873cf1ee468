"""Precision said out loud: the dtypes a projection computes in, sums in, and returns.

The rule without any argument: float32 and float64 are computed as they are; bfloat16 and float16 are computed in
float32; the result has the input's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from birkhoff import _xp
from birkhoff.errors import DtypeError, OptionError

__all__ = ["DEFAULT", "DOUBLE", "DOUBLE_SUMS", "Precision", "unit_roundoff"]

_UNIT_ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24, "float64": 2.0**-53}
_COMPUTE = ("float32", "float64")


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The three dtypes of a projection, by name or as any library's dtype; None follows the input.

    Parameters
    ----------
    compute : {"float32", "float64"}, optional
        Dtype of the iteration. None: the input's dtype, or float32 for bfloat16 and float16.
    accumulate : {"float32", "float64"}, optional
        Dtype in which row and column sums are accumulated. None: as ``compute``.
    store : {"bfloat16", "float16", "float32", "float64"}, optional
        Dtype of the result. None: the input's dtype. Note that storing rounds the marginals: an exactly doubly
        stochastic matrix cast to bfloat16 has sums wrong by up to 3.9e-3 (one unit of roundoff).

    Raises
    ------
    OptionError
        For a name that is not listed above.

    Examples
    --------
    >>> import numpy as np, birkhoff
    >>> logits = np.zeros((3, 3), dtype=np.float16)
    >>> birkhoff.project(logits, precision=birkhoff.Precision(store="float32")).matrix.dtype
    dtype('float32')
    """

    compute: str | None = None
    accumulate: str | None = None
    store: str | None = None

    def __post_init__(self) -> None:
        for field, accepted in (("compute", _COMPUTE), ("accumulate", _COMPUTE), ("store", tuple(_UNIT_ROUNDOFF))):
            value = getattr(self, field)
            if value is None:
                continue
            name = _xp.dtype_name(value)
            if name not in accepted:
                raise OptionError(f"Precision.{field} must be None or one of {accepted}, got {value!r}")
            object.__setattr__(self, field, name)

    def resolve(self, dtype: Any) -> Precision:
        """Fill in what is None for an input of ``dtype`` (a dtype object of any library, or its name)."""
        name = _xp.dtype_name(dtype)
        compute = self.compute or (name if name in _COMPUTE else "float32")
        return Precision(compute=compute, accumulate=self.accumulate or compute, store=self.store or name)


DEFAULT = Precision()
"""Follow the input: half precisions are computed in float32, everything is returned in its own dtype."""

DOUBLE_SUMS = Precision(accumulate="float64")
"""Sums in float64, everything else as the input."""

DOUBLE = Precision(compute="float64", accumulate="float64")
"""The whole iteration in float64, returned in the input's dtype."""


def unit_roundoff(dtype: Any) -> float:
    """Return u, half the distance from 1 to the next larger number: 2**-24 for float32.

    Parameters
    ----------
    dtype : dtype or str
        A floating dtype of any array library, or its name.

    Raises
    ------
    DtypeError
        For a dtype that this package does not work with.

    Examples
    --------
    >>> from birkhoff.precision import unit_roundoff
    >>> unit_roundoff("bfloat16")
    0.00390625
    """
    name = _xp.dtype_name(dtype)
    if name not in _UNIT_ROUNDOFF:
        raise DtypeError(f"expected one of {tuple(_UNIT_ROUNDOFF)}, got {name}")
    return _UNIT_ROUNDOFF[name]

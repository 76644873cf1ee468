"""Errors: misuse raises one of these. Numerical trouble is not an error but a :class:`birkhoff.Status`.

Each class is also the built-in error a NumPy user would catch (``TypeError``, ``ValueError``, ``ImportError``).
Messages say what was got, what is accepted and what to do.
"""

from __future__ import annotations

from functools import partial
from typing import Any

__all__ = [
    "ArrayTypeError",
    "BirkhoffError",
    "DtypeError",
    "MissingPackageError",
    "NonFiniteError",
    "OptionError",
    "ProjectionError",
    "ShapeError",
]


class BirkhoffError(Exception):
    """Base of every error that this package raises on purpose."""


class ArrayTypeError(BirkhoffError, TypeError):
    """The argument is not an array, or arrays of different libraries were mixed.

    Try: ``numpy.asarray`` (or ``torch.as_tensor``, ``cupy.asarray``) first; convert all arguments to one library.
    """


class DtypeError(BirkhoffError, TypeError):
    """The array does not hold real floating-point numbers.

    Try: ``x.astype("float32")`` for integers and booleans; take ``x.real`` or ``abs(x)`` of complex numbers.
    """


class ShapeError(BirkhoffError, ValueError):
    """The array is not a batch of square matrices ``(..., n, n)``.

    Try: ``x[None]`` adds a batch axis; a flat vector of n*n logits needs ``x.reshape(..., n, n)``.
    """


class OptionError(BirkhoffError, ValueError):
    """An option has a value outside its domain. The message lists the accepted ones."""


class NonFiniteError(BirkhoffError, ValueError):
    """The array holds NaN or infinite entries, which this function has no answer for."""


class MissingPackageError(BirkhoffError, ImportError):
    """An optional package is not installed.

    Parameters
    ----------
    package : str
        What to install.
    needed_by : str
        The function or feature that needs it.
    """

    def __init__(self, package: str, *, needed_by: str) -> None:
        super().__init__(
            f"{needed_by} needs the package {package!r}, which is not installed; run `pip install {package}`"
        )
        self.package = package
        self.needed_by = needed_by

    def __reduce__(self) -> tuple[Any, ...]:
        """Unpickled from what it was made of: a worker's error has to reach its parent."""
        return partial(type(self), self.package, needed_by=self.needed_by), ()


class ProjectionError(BirkhoffError, ArithmeticError):
    """Raised by ``project(..., throw=True)`` when a matrix of the batch did not end well.

    Parameters
    ----------
    message : str
        Which matrices, which status, and the advice of the status.
    status : array, optional
        The status codes of the batch.
    """

    def __init__(self, message: str, status: Any = None) -> None:
        super().__init__(message)
        self.status = status

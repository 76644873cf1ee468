r"""Cheap numbers about a matrix that mixes streams: how doubly stochastic, how mixing, how far from I and from J.

Plain estimates in the compute dtype, on any array library, without looking at data (nothing waits for a device).
Rigorous bounds are in :mod:`birkhoff.certificates`.

Two definitions of a gain are in use. The *signed* one is the absolute value of a row (or column) sum, which is what the
mHC paper plots; the *absolute* one is the sum of absolute values, an operator norm. They agree for non-negative
matrices. Each name says which it is; the default is signed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from birkhoff import _math, _xp
from birkhoff._checks import square_matrices
from birkhoff.errors import OptionError

__all__ = [
    "Diagnostics",
    "backward_gain",
    "diagnose",
    "distance_to_identity",
    "distance_to_uniform",
    "effective_number",
    "entropy",
    "forward_gain",
    "marginal_errors",
    "second_eigenvalue",
    "second_singular_value",
]

Definition = Literal["signed", "absolute"]
_SQUARINGS = 20  # the spectral radius is read from the power 2^20: relative error below n^(2^-20) - 1 < 4e-6 for n = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class Diagnostics:
    """All numbers of this module for a batch of matrices, each an array of shape (...).

    Attributes
    ----------
    row_error, column_error
        Largest distance of a row, column sum from one.
    forward_gain_min, forward_gain_max, backward_gain_min, backward_gain_max
        Signed gains: smallest and largest absolute value of a row sum, of a column sum.
    entropy, effective_number
        Mean entropy of the rows in nats, and its exponential: 1 for a permutation, n for J.
    second_eigenvalue, second_singular_value
        Largest modulus of the eigenvalues (singular values) other than the one of the constant state.
    distance_to_identity, distance_to_uniform
        Frobenius distances to I and to J.
    """

    row_error: Any
    column_error: Any
    forward_gain_min: Any
    forward_gain_max: Any
    backward_gain_min: Any
    backward_gain_max: Any
    entropy: Any
    effective_number: Any
    second_eigenvalue: Any
    second_singular_value: Any
    distance_to_identity: Any
    distance_to_uniform: Any


def diagnose(matrix: Any) -> Diagnostics:
    """Compute every diagnostic of this module.

    Parameters
    ----------
    matrix : array, shape (..., n, n), n >= 1
        Real floating; half precisions are computed in float32.

    Returns
    -------
    Diagnostics
        Arrays of shape (...).

    Raises
    ------
    ArrayTypeError, ShapeError, DtypeError
        For what is not a dense array; if the last two axes are not a non-empty square; if the values are not real
        floating.

    Examples
    --------
    >>> import numpy as np
    >>> from birkhoff.diagnostics import diagnose
    >>> numbers = diagnose(np.array([[0.75, 0.25], [0.25, 0.75]]))
    >>> round(float(numbers.second_eigenvalue), 6), round(float(numbers.effective_number), 3)
    (0.5, 1.755)
    """
    row_error, column_error = marginal_errors(matrix)
    forward_min, forward_max = forward_gain(matrix)
    backward_min, backward_max = backward_gain(matrix)
    return Diagnostics(
        row_error=row_error,
        column_error=column_error,
        forward_gain_min=forward_min,
        forward_gain_max=forward_max,
        backward_gain_min=backward_min,
        backward_gain_max=backward_max,
        entropy=entropy(matrix),
        effective_number=effective_number(matrix),
        second_eigenvalue=second_eigenvalue(matrix),
        second_singular_value=second_singular_value(matrix),
        distance_to_identity=distance_to_identity(matrix),
        distance_to_uniform=distance_to_uniform(matrix),
    )


def marginal_errors(matrix: Any) -> tuple[Any, Any]:
    """Largest distance from one of the row sums, and of the column sums.

    Parameters
    ----------
    matrix : array, shape (..., n, n)

    Returns
    -------
    row_error, column_error : array, shape (...)

    Examples
    --------
    >>> import numpy as np
    >>> from birkhoff.diagnostics import marginal_errors
    >>> marginal_errors(np.array([[0.5, 0.5], [0.25, 0.75]]))
    (np.float64(0.0), np.float64(0.25))
    """
    return _math.marginal_errors(*_prepare(matrix))


def forward_gain(matrix: Any, *, definition: Definition = "signed") -> tuple[Any, Any]:
    r"""Smallest and largest row gain.

    Parameters
    ----------
    matrix : array, shape (..., n, n)
    definition : {"signed", "absolute"}
        ``"signed"``: :math:`|\sum_j m_{ij}|`. ``"absolute"``: :math:`\sum_j |m_{ij}|`, whose maximum is the operator
        norm :math:`\lVert M\rVert_\infty`.

    Returns
    -------
    smallest, largest : array, shape (...)

    Raises
    ------
    OptionError
        For another definition.

    Examples
    --------
    >>> import numpy as np
    >>> from birkhoff.diagnostics import forward_gain
    >>> forward_gain(np.array([[2.0, -1.0], [0.0, 0.5]]))
    (np.float64(0.5), np.float64(1.0))
    >>> forward_gain(np.array([[2.0, -1.0], [0.0, 0.5]]), definition="absolute")
    (np.float64(0.5), np.float64(3.0))
    """
    return _gain(matrix, -1, definition)


def backward_gain(matrix: Any, *, definition: Definition = "signed") -> tuple[Any, Any]:
    r"""Smallest and largest column gain: how much a gradient that is equal on all streams shrinks or grows.

    Parameters
    ----------
    matrix : array, shape (..., n, n)
    definition : {"signed", "absolute"}
        As for :func:`forward_gain`, over columns.

    Returns
    -------
    smallest, largest : array, shape (...)

    Examples
    --------
    >>> import numpy as np
    >>> from birkhoff.diagnostics import backward_gain
    >>> backward_gain(np.array([[0.5, 0.5], [0.75, 0.25]]))
    (np.float64(0.75), np.float64(1.25))
    """
    return _gain(matrix, -2, definition)


def entropy(matrix: Any) -> Any:
    r"""Mean entropy of the rows in nats, :math:`-\tfrac1n \sum_{ij} p_{ij} \log p_{ij}` with :math:`0 \log 0 = 0`.

    Parameters
    ----------
    matrix : array, shape (..., n, n)
        Rows that sum to one; entries that are not positive count as zero.

    Returns
    -------
    array, shape (...)
        In [0, log n] for row-stochastic matrices.

    Examples
    --------
    >>> import numpy as np
    >>> from birkhoff.diagnostics import entropy
    >>> float(entropy(np.eye(3)))
    0.0
    """
    xp, values = _prepare(matrix)
    kept = xp.where(values <= 0, xp.ones_like(values), values)  # 1 log 1 = 0; NaN passes
    return xp.abs(xp.sum(kept * xp.log(kept), axis=(-2, -1))) / values.shape[-1]


def effective_number(matrix: Any) -> Any:
    """How many source streams a destination mixes, on average: the exponential of :func:`entropy`.

    Parameters
    ----------
    matrix : array, shape (..., n, n)

    Returns
    -------
    array, shape (...)
        1 for a permutation, n for the uniform matrix.

    Examples
    --------
    >>> import numpy as np
    >>> from birkhoff.diagnostics import effective_number
    >>> round(float(effective_number(np.full((4, 4), 0.25))), 6)
    4.0
    """
    result = entropy(matrix)
    with _xp.quiet(matrix):
        return _xp.array_namespace(matrix).exp(result)


def distance_to_identity(matrix: Any) -> Any:
    r"""Frobenius distance :math:`\lVert P - I\rVert_F`.

    Parameters
    ----------
    matrix : array, shape (..., n, n)

    Returns
    -------
    array, shape (...)

    Examples
    --------
    >>> import numpy as np
    >>> from birkhoff.diagnostics import distance_to_identity
    >>> float(distance_to_identity(np.eye(2)[::-1].copy()))
    2.0
    """
    _xp.refuse_shards(matrix)
    xp, values = _prepare(matrix)
    identity = xp.eye(values.shape[-1], dtype=values.dtype, device=_xp.device(values))
    return _frobenius(xp, values - identity)[..., 0, 0]


def distance_to_uniform(matrix: Any) -> Any:
    r"""Frobenius distance :math:`\lVert P - J\rVert_F` to the matrix of equal entries :math:`1/n`.

    Parameters
    ----------
    matrix : array, shape (..., n, n)

    Returns
    -------
    array, shape (...)

    Examples
    --------
    >>> import numpy as np
    >>> from birkhoff.diagnostics import distance_to_uniform
    >>> float(distance_to_uniform(np.eye(2)))
    1.0
    """
    xp, values = _prepare(matrix)
    return _frobenius(xp, values - 1.0 / values.shape[-1])[..., 0, 0]


def second_eigenvalue(matrix: Any) -> Any:
    r"""Modulus of the second eigenvalue :math:`|\lambda_2|`: how fast repeated mixing forgets differences.

    It is the spectral radius of :math:`W P W`, :math:`W = I - 11^\top/n`, read from its power :math:`2^{20}` by
    repeated squaring, so that no eigenvalue routine is needed.

    Parameters
    ----------
    matrix : array, shape (..., n, n)
        Rows or columns that sum to one: then W removes exactly the eigenvalue one of the constant state.

    Returns
    -------
    array, shape (...)
        0 for n = 1. Like every eigenvalue of a nonsymmetric matrix it is ill-conditioned near a nilpotent one: a true
        zero comes out as up to :math:`u^{1/(n-1)}`.

    Examples
    --------
    >>> import numpy as np
    >>> from birkhoff.diagnostics import second_eigenvalue
    >>> round(float(second_eigenvalue(np.array([[0.9, 0.1], [0.1, 0.9]]))), 6)
    0.8
    """
    xp, centred = _centred(matrix)
    return _spectral_radius(xp, centred)


def second_singular_value(matrix: Any) -> Any:
    r"""Second singular value :math:`\sigma_2`; Sinkhorn's iteration converges locally at the rate :math:`\sigma_2^2`.

    Parameters
    ----------
    matrix : array, shape (..., n, n)
        Doubly stochastic; for other matrices the largest singular value of :math:`W P W`.

    Returns
    -------
    array, shape (...)
        In [0, 1] for doubly stochastic matrices.

    Examples
    --------
    >>> import numpy as np
    >>> from birkhoff.diagnostics import second_singular_value
    >>> round(float(second_singular_value(np.array([[0.9, 0.1], [0.1, 0.9]]))), 6)
    0.8
    """
    xp, centred = _centred(matrix)
    return xp.sqrt(_spectral_radius(xp, _xp.matmul(xp, xp.matrix_transpose(centred), centred)))


def _prepare(matrix: Any) -> tuple[Any, Any]:
    xp = square_matrices(matrix, "matrix", nonempty=True)
    return xp, _xp.astype(xp, matrix, _math.compute_dtype(xp, matrix))


def _gain(matrix: Any, axis: int, definition: Definition) -> tuple[Any, Any]:
    if definition not in ("signed", "absolute"):
        raise OptionError(f"definition must be 'signed' or 'absolute', got {definition!r}")
    xp, values = _prepare(matrix)
    sums = xp.abs(xp.sum(xp.abs(values) if definition == "absolute" else values, axis=axis))
    return xp.min(sums, axis=-1), xp.max(sums, axis=-1)


def _centred(matrix: Any) -> tuple[Any, Any]:
    """W P W: row means, then column means, removed."""
    xp, values = _prepare(matrix)
    values = values - xp.mean(values, axis=-1, keepdims=True)
    return xp, values - xp.mean(values, axis=-2, keepdims=True)


def _frobenius(xp: Any, values: Any) -> Any:
    """Frobenius norm, with the matrix axes kept; its derivative at zero is taken as zero."""
    with _xp.quiet(values):
        squared = xp.sum(values * values, axis=(-2, -1), keepdims=True)
        zero = squared == 0
        return xp.where(zero, squared, xp.sqrt(xp.where(zero, xp.ones_like(squared), squared)))


def _spectral_radius(xp: Any, matrix: Any) -> Any:
    r"""Limit of :math:`\lVert M^k\rVert_F^{1/k}` along k = 1, 2, 4, ...; the scale is kept as a logarithm."""
    log_scale = xp.zeros_like(matrix[..., :1, :1])
    exponent = 1.0
    for squaring in range(_SQUARINGS + 1):
        if squaring:
            matrix = _xp.matmul(xp, matrix, matrix)
            exponent /= 2.0
        norm = _frobenius(xp, matrix)
        safe = xp.where(norm == 0, xp.ones_like(norm), norm)
        with _xp.quiet(matrix):
            matrix = matrix / safe
            log_scale = log_scale + exponent * xp.log(safe)
    with _xp.quiet(matrix):
        return xp.where(norm == 0, xp.zeros_like(norm), xp.exp(log_scale))[..., 0, 0]

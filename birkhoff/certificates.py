r"""Rigorous bounds on the spectral norm of a stored non-negative matrix, and of a product of many.

Nothing is assumed about where the values came from. They are read as exact real numbers, all sums are taken in
float64, and every result is moved outward by a bound on its own rounding error, so that

.. math:: \texttt{norm2\_lower} \le \lVert P \rVert_2 \le \texttt{norm2\_upper}

is a statement about the array in memory. The derivation page on the spectral-norm certificate has the inequalities; the
lemmas that they rest on are machine-checked in ``proofs/formal``.

One step carries the rigour: :meth:`_Product.enclose` applies a non-negative matrix to a non-negative vector that is
known between two bounds, and returns two bounds. Its sums may be taken in any order (pairwise, blocked, by a tree on a
GPU, fused or not). It does not call a matrix product, because a library may compute one by a scheme whose error is
bounded for the whole matrix and not for each entry.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import numpy as np

from birkhoff import _math, _xp
from birkhoff._checks import as_count, square_matrices
from birkhoff.errors import OptionError, ShapeError

__all__ = ["Certificate", "Provenance", "certify", "certify_product"]

Order = Literal["application", "written"]

_EPS = 2.0**-52  # twice the unit roundoff u of float64: 1 + k _EPS bounds 1/(1-u)^k while k u <= 1/2
_TINY64 = 2.0**-1022  # bounds what one float64 operation loses to underflow, whether or not subnormals are flushed
_TINY32 = 2.0**-126  # bounds what reading one float32 or bfloat16 entry loses where subnormals are flushed
_ABOVE_LOSS = 2.0**-70  # least entry of a Collatz vector there: what is lost is divided by it
_INF = float("inf")
_SMALL = 32  # up to this n the Collatz vector comes from repeated squaring of the Gram matrix
_BLOCK_ENTRIES = {"cpu": 2**20, "cuda": 2**25}  # of one float64 temporary: the cache's size, or enough work for a GPU


class Provenance(StrEnum):
    """How the bounds of a certificate are to be read.

    ``exact``: lower and upper bound are equal for every matrix (n = 1, or at most one nonzero per row and column).
    ``enclosure``: each norm lies between its two bounds.
    ``sampled``: enclosures of some matrices of the batch; nothing is said about the others.
    """

    exact = "exact"
    enclosure = "enclosure"
    sampled = "sampled"


@dataclass(frozen=True, kw_only=True, eq=False)
class Certificate:
    r"""Bounds on a batch of stored matrices, or on products of them.

    Arrays are float64, of the library and device of the input; on a device without float64 they are NumPy arrays.

    Parameters
    ----------
    norm2_lower, norm2_upper : array, shape (...)
        Bounds of the spectral norm. ``norm2_upper`` is +inf where an entry is negative or not finite, except for a
        finite matrix with at most one nonzero in each row and column.
    row_sums, column_sums : array, shape (..., n)
        The signed sums :math:`\sum_j m_{ij}` and :math:`\sum_i m_{ij}`, to nearest.
    absolute_row_sums, absolute_column_sums : array, shape (..., n)
        Upper bounds of :math:`\sum_j |m_{ij}|` and :math:`\sum_i |m_{ij}|`; for a product, of the sums of
        :math:`|A_L| \cdots |A_1|`, which is the same thing when no entry is negative.
    sums_radius : array, shape (...)
        Every reported signed sum is within this distance of the true one.
    num_layers : int
        How many matrices were multiplied (1 for :func:`certify`).
    sampled : bool
        Whether only part of the batch was looked at.
    """

    norm2_lower: Any
    norm2_upper: Any
    row_sums: Any
    column_sums: Any
    absolute_row_sums: Any
    absolute_column_sums: Any
    sums_radius: Any
    num_layers: int = 1
    sampled: bool = False

    @property
    def provenance(self) -> Provenance:
        """``sampled``, ``exact`` or ``enclosure``. Reads the bounds, so it waits for the device."""
        if self.sampled:
            return Provenance.sampled
        xp = _xp.array_namespace(self.norm2_upper)
        return Provenance.exact if bool(xp.all(self.norm2_lower == self.norm2_upper)) else Provenance.enclosure

    @property
    def row_error(self) -> Any:
        """Upper bound of the largest distance of a row sum from one, shape (...)."""
        return self._largest_distance_from_one(self.row_sums)

    @property
    def column_error(self) -> Any:
        """Upper bound of the largest distance of a column sum from one, shape (...)."""
        return self._largest_distance_from_one(self.column_sums)

    @property
    def forward_gain_min(self) -> Any:
        """Smallest absolute value of a signed row sum, shape (...): what an all-equal state shrinks to."""
        return _extreme(self.row_sums, "min")

    @property
    def forward_gain_max(self) -> Any:
        """Largest absolute value of a signed row sum, shape (...): the gain that the mHC paper reports."""
        return _extreme(self.row_sums, "max")

    @property
    def backward_gain_min(self) -> Any:
        """Smallest absolute value of a signed column sum, shape (...)."""
        return _extreme(self.column_sums, "min")

    @property
    def backward_gain_max(self) -> Any:
        """Largest absolute value of a signed column sum, shape (...)."""
        return _extreme(self.column_sums, "max")

    @property
    def norm_inf_upper(self) -> Any:
        """Upper bound of the largest absolute row sum, the operator norm on max-norm states, shape (...)."""
        return _extreme(self.absolute_row_sums, "max")

    @property
    def norm_1_upper(self) -> Any:
        """Upper bound of the largest absolute column sum, the operator norm on gradients' max-norm, shape (...)."""
        return _extreme(self.absolute_column_sums, "max")

    def _largest_distance_from_one(self, sums: Any) -> Any:
        return (_extreme(sums - 1.0, "max") + self.sums_radius) * (1.0 + 4 * _EPS)

    def __str__(self) -> str:
        xp = _xp.array_namespace(self.norm2_upper)
        count = int(np.prod(tuple(self.norm2_upper.shape), dtype=np.int64))
        if count == 0:
            return f"Certificate of an empty batch ({self.provenance})"
        low, high = float(xp.max(self.norm2_lower)), float(xp.max(self.norm2_upper))
        one, many = ("matrix", "matrices") if self.num_layers == 1 else ("product", "products")
        factors = "" if self.num_layers == 1 else f" of {self.num_layers} matrices"
        what = (
            f"spectral norm of a {one}{factors}" if count == 1 else f"largest spectral norm of {count} {many}{factors}"
        )
        return f"{what} in [{low:.9f}, {high:.9f}] ({self.provenance})"


def certify(matrix: Any, *, num_steps: int = 10, num_samples: int | None = None) -> Certificate:
    r"""Bound the spectral norm of stored non-negative matrices from both sides, rigorously.

    Parameters
    ----------
    matrix : array, shape (..., n, n), n >= 1
        Real floating, any dtype (bfloat16 and float16 included), any array library and device. The values are taken as
        they are: certify what is stored, after any cast. Gradients are not tracked.
    num_steps : int, default 10
        Effort spent on the Collatz-Wielandt vector, a power iterate of :math:`P^\top P`: ``num_steps`` squarings of
        that matrix for n <= 32 (:math:`2^{\mathtt{num\_steps}}` power steps), ``num_steps`` power steps above. It
        changes how tight the bounds are, never whether they hold. 0 uses the vector of ones alone.
    num_samples : int, optional
        Look only at this many matrices, evenly spread over the batch. The result has shape (num_samples,) and
        provenance ``sampled``.

    Returns
    -------
    Certificate

    Raises
    ------
    ArrayTypeError, ShapeError, DtypeError, OptionError
        For what is not a dense array; if the matrices are not square or n is 0; if they are not real floating; if an
        option is out of range.

    Notes
    -----
    The upper bound is the smaller of the Schur bound and the Collatz-Wielandt bounds (any positive x),

    .. math::
       \lVert P\rVert_2^2 \le \max_i (P1)_i \cdot \max_j (P^\top 1)_j, \qquad
       \lVert P\rVert_2^2 \le \max_j \frac{(P^\top P x)_j}{x_j},

    the lower bound the largest of :math:`\lVert Px\rVert/\lVert x\rVert`,
    :math:`\lVert P^\top y\rVert/\lVert y\rVert` with :math:`y = Px`, and :math:`\max|p_{ij}|`.
    **A matrix with a negative or non-finite entry gets the upper bound +inf**, because the inequalities need
    :math:`P \ge 0`. (Exception: a finite matrix with at most one nonzero in each row and column, whose norm is known.)
    For signed matrices ``certify(abs(P))`` is valid, since :math:`\lVert P\rVert_2 \le \lVert\,|P|\,\rVert_2`.

    Guarantee: the bounds hold for every stored input and every summation order, subnormal numbers included.
    Claims: :ref:`certificate_holds <claim-certificate-holds>`,
    :ref:`certificate_is_tight <claim-certificate-is-tight>`, :ref:`certified_sums_hold <claim-certified-sums-hold>`,
    :ref:`provenance_is_never_upgraded <claim-provenance-is-never-upgraded>`.

    Examples
    --------
    >>> import numpy as np
    >>> import birkhoff
    >>> cert = birkhoff.certify(np.array([[0.5, 0.5], [0.75, 0.25]]))
    >>> print(cert)
    spectral norm of a matrix in [1.032662147, 1.032662147] (enclosure)
    >>> cert.row_sums, cert.column_sums
    (array([1., 1.]), array([1.25, 0.75]))
    >>> birkhoff.certify(np.eye(3)).provenance
    <Provenance.exact: 'exact'>
    """
    return _certify([matrix], num_steps, num_samples)


def certify_product(
    stack: Any, *, order: Order = "application", num_steps: int = 10, num_samples: int | None = None
) -> Certificate:
    r"""Bound the spectral norm of a product of stored non-negative matrices, without forming it.

    Bounds are chained through matrix-vector products. Norms of the factors are never multiplied: for 128 truncated
    projections at logit standard deviation 10, that product is near 9 while the true norm is near 1.06.

    Parameters
    ----------
    stack : array, shape (..., L, n, n), or sequence of L arrays of shape (..., n, n)
        L >= 1 factors.
    order : {"application", "written"}
        ``"application"``: factor 0 acts first, :math:`M = A_{L-1} \cdots A_1 A_0`, the order of depth in a model.
        ``"written"``: :math:`M = A_0 A_1 \cdots A_{L-1}`, the order in which a product is written.
    num_steps, num_samples
        As in :func:`certify`.

    Returns
    -------
    Certificate
        Of M. ``row_sums`` is :math:`M1`, the forward gains of the composite; ``column_sums`` is :math:`M^\top 1`, its
        backward gains.

    Raises
    ------
    ArrayTypeError, ShapeError, DtypeError, OptionError
        As in :func:`certify`; also if the stack is empty or its factors differ in shape, or for an unknown order.

    Notes
    -----
    Because all factors are non-negative, :math:`\lVert M\rVert_\infty = \max_i (A_{L-1}(\cdots(A_0 1)))_i` exactly, and
    the same with transposes for :math:`\lVert M\rVert_1`; Schur and Collatz-Wielandt then apply to M.
    The cost is a fixed number of passes over the stack with matrix-vector products. For n <= 32 the product is also
    formed once, in plain float64, only to choose x, which need not be trusted.
    Claims: :ref:`product_certificate_holds <claim-product-certificate-holds>`,
    :ref:`product_certificate_is_tight <claim-product-certificate-is-tight>`.

    Examples
    --------
    >>> import numpy as np
    >>> import birkhoff
    >>> stack = birkhoff.sinkhorn(np.random.default_rng(0).normal(0, 3, (64, 4, 4)))
    >>> cert = birkhoff.certify_product(stack)
    >>> bool(cert.norm2_upper < 1.01), bool(cert.norm2_lower > 0.99)
    (True, True)
    """
    if order not in ("application", "written"):
        raise OptionError(f"order must be 'application' or 'written', got {order!r}")
    if isinstance(stack, Sequence):
        layers = list(stack)
    elif len(getattr(stack, "shape", ())) < 3:
        raise ShapeError(
            f"stack must be a list of matrices or an array (..., L, n, n), got {type(stack).__name__} of shape "
            f"{tuple(getattr(stack, 'shape', ()))}; certify takes one matrix"
        )
    else:
        layers = [stack[..., index, :, :] for index in range(stack.shape[-3])]
    return _certify(layers if order == "application" else layers[::-1], num_steps, num_samples)


def _certify(layers: list[Any], num_steps: int, num_samples: int | None) -> Certificate:
    """Validate, move to float64 hardware, go through the batch in chunks."""
    if not layers:
        raise ShapeError("a product needs at least one factor, got an empty stack")
    num_steps = as_count(num_steps, "num_steps", least=0)
    num_samples = None if num_samples is None else as_count(num_samples, "num_samples", least=1)
    xp = _xp.array_namespace(*layers)
    shape = tuple(layers[0].shape)
    for layer in layers:
        square_matrices(layer, "matrix", nonempty=True)
        _xp.refuse_shards(layer)
        if tuple(layer.shape) != shape:
            raise ShapeError(f"factors must have one shape (..., n, n), got {shape} and {tuple(layer.shape)}")
    layers = [_xp.detach(layer) for layer in layers]
    if _math.accumulate_dtype(xp, layers[0]) != xp.float64:
        layers = [_xp.to_numpy(layer) for layer in layers]
        xp = _xp.array_namespace(*layers)
    *batch, n, _ = shape
    count = int(np.prod(batch, dtype=np.int64))
    layers = [xp.reshape(layer, (count, n, n)) for layer in layers]
    sampled = num_samples is not None and num_samples < count
    if sampled:
        assert num_samples is not None
        picks = xp.asarray(np.linspace(0, count - 1, num_samples).astype(np.int64), device=_xp.device(layers[0]))
        layers = [xp.take(layer, picks, axis=0) for layer in layers]
        batch, count = [num_samples], num_samples
    block = _BLOCK_ENTRIES.get(_xp.device_kind(layers[0]), _BLOCK_ENTRIES["cpu"])
    fitting = block // (len(layers) * n * n)
    size = max(1, fitting)
    rows = None if fitting else max(1, block // n)
    with _xp.quiet(layers[0]):
        parts = [
            _bounds(_Product(xp, [layer[start : min(start + size, count), :, :] for layer in layers], rows), num_steps)
            for start in range(0, max(count, size), size)
        ]
    joined = {key: xp.concat([part[key] for part in parts], axis=0) for key in parts[0]}
    shaped = {key: xp.reshape(value, (*batch, *value.shape[1:])) for key, value in joined.items()}
    return Certificate(**shaped, num_layers=len(layers), sampled=sampled)


class _Product:
    """A chunk of products :math:`A_L ... A_1`, factors in order of application, each of shape (B, n, n).

    Inside, the batch is the last axis: factors are (n, n, B), vectors (n, B), so that sums over short axes are sums of
    long contiguous rows. The factors are converted to float64 once, or, if one product alone is too large for that,
    whenever they are read, ``rows_per_block`` rows at a time.
    """

    def __init__(self, xp: Any, layers: list[Any], rows_per_block: int | None) -> None:
        self.xp = xp
        self.batch, self.n = layers[0].shape[:2]
        self.device = _xp.device(layers[0])
        single = any(_xp.dtype_name(layer.dtype) in ("float32", "bfloat16") for layer in layers)
        self.flushes = self._flushes_subnormals(single)
        self.read_loss = (_TINY32 if single else _TINY64) if self.flushes else 0.0
        self.small = self.n <= _SMALL
        self.rows_per_block = rows_per_block or self.n
        self.layers = [self._batch_last(layer, rows_per_block is None) for layer in layers]
        self._check()

    def _batch_last(self, layer: Any, convert: bool) -> Any:
        xp = self.xp
        flat = xp.reshape(xp.permute_dims(layer, (1, 2, 0)), (-1,))  # contiguous, whatever the input's strides
        flat = _xp.astype(xp, flat, xp.float64) if convert else flat
        return xp.reshape(flat, (self.n, self.n, self.batch))

    def _flushes_subnormals(self, single: bool) -> bool:
        """Whether this device, in its present mode, takes subnormal numbers for zero."""
        xp = self.xp
        tiny, dtype = (_TINY32, xp.float32) if single else (_TINY64, xp.float64)
        subnormal = xp.full((), tiny, dtype=dtype, device=self.device) * 0.5
        return not bool(_xp.astype(xp, subnormal, xp.float64))

    def _check(self) -> None:
        """Look once at every entry: which products the bounds hold for, and whose norm is known exactly."""
        xp = self.xp
        yes = xp.ones((self.batch,), dtype=xp.bool, device=self.device)
        self.non_negative, self.finite, one_per_line = yes, yes, yes
        self.largest = xp.zeros((self.batch,), dtype=xp.float64, device=self.device)
        per_column = xp.zeros((self.n, self.batch), dtype=xp.int64, device=self.device)
        for layer in self.layers:
            for _, block in self.blocks(layer):
                self.non_negative = self.non_negative & xp.all(block >= 0, axis=(0, 1))
                self.finite = self.finite & xp.all(xp.isfinite(block), axis=(0, 1))
                self.largest = xp.maximum(self.largest, xp.max(xp.abs(block), axis=(0, 1)))
                nonzero = xp.astype(block != 0, xp.int64)
                one_per_line = one_per_line & xp.all(xp.sum(nonzero, axis=1) <= 1, axis=0)
                per_column = per_column + xp.sum(nonzero, axis=0)
        self.valid = self.non_negative & self.finite
        self.signed = not bool(xp.all(self.non_negative))
        known = len(self.layers) == 1 and not self.flushes
        self.exact = (one_per_line & xp.all(per_column <= 1, axis=0) & self.finite) if known else ~yes

    def ones(self) -> Any:
        return self.xp.ones((self.n, self.batch), dtype=self.xp.float64, device=self.device)

    def blocks(self, layer: Any) -> Iterator[tuple[slice, Any]]:
        """The rows of one factor in float64, a block at a time."""
        for start in range(0, self.n, self.rows_per_block):
            rows = slice(start, min(start + self.rows_per_block, self.n))
            yield rows, _xp.astype(self.xp, layer[rows, :, :], self.xp.float64)

    def apply(self, layer: Any, vector: Any, *, transposed: bool, absolute: bool = True) -> Any:
        """The absolute value of one factor, or its transpose, times a vector: plain float64 sums."""
        xp = self.xp
        parts = []
        for rows, block in self.blocks(layer):
            values = xp.abs(block) if absolute and self.signed else block
            if transposed:
                parts.append(xp.sum(values * vector[rows, None, :], axis=0))
            elif self.small:
                parts.append(_sum([values[:, column, :] * vector[column, :] for column in range(self.n)]))
            else:
                parts.append(xp.sum(values * vector[None, :, :], axis=1))
        return _sum(parts) if transposed else xp.concat(parts, axis=0)

    def enclose(self, layer: Any, lower: Any, upper: Any, *, transposed: bool) -> tuple[Any, Any]:
        r"""Bounds of :math:`|A| x` (or :math:`|A|^\top x`) for all x between two non-negative bounds.

        A sum of n products in any order satisfies :math:`\hat s = s (1 + \theta)`, :math:`|\theta| \le \gamma_n`, up to
        what underflow takes: at most the smallest normal number in each operation and each entry read.
        """
        xp = self.xp
        factor = (self.n + 4) * _EPS
        lost = 4 * self.n * _TINY64
        high = self.apply(layer, upper, transposed=transposed)
        low = high if lower is upper else self.apply(layer, lower, transposed=transposed)
        high = high * (1.0 + factor) + (lost + 2 * self.n * self.read_loss * xp.max(upper, axis=0))
        low = _math.lower_bound(xp, low * (1.0 - factor) - lost, 0.0)
        return low, xp.where(xp.isnan(high), xp.full_like(high, _INF), high)

    def forward(self, lower: Any, upper: Any) -> tuple[Any, Any]:
        for layer in self.layers:
            lower, upper = self.enclose(layer, lower, upper, transposed=False)
        return lower, upper

    def backward(self, lower: Any, upper: Any) -> tuple[Any, Any]:
        for layer in reversed(self.layers):
            lower, upper = self.enclose(layer, lower, upper, transposed=True)
        return lower, upper

    def sums(self, *, transposed: bool) -> Any:
        """Signed row or column sums of the product, to nearest."""
        vector = self.ones()
        for layer in reversed(self.layers) if transposed else self.layers:
            vector = self.apply(layer, vector, transposed=transposed, absolute=False)
        return vector

    def dominant_vector(self, num_steps: int) -> Any:
        """A positive vector near the first right singular vector. Plain arithmetic: it need not be trusted."""
        xp, x = self.xp, self.ones()
        if not self.small:
            for _ in range(num_steps):
                for layer in self.layers:
                    x = self.apply(layer, x, transposed=False)
                for layer in reversed(self.layers):
                    x = self.apply(layer, x, transposed=True)
                x = self._positive(x)
            return x
        matrix = None
        for layer in self.layers:
            factor = xp.abs(_xp.astype(xp, xp.permute_dims(layer, (2, 0, 1)), xp.float64))
            matrix = factor if matrix is None else _rescaled(xp, xp.matmul(factor, matrix))
        power = xp.matmul(xp.matrix_transpose(matrix), matrix)
        for _ in range(num_steps):
            power = _rescaled(xp, power)
            power = xp.matmul(power, power)
        return self._positive(xp.permute_dims(xp.sum(power, axis=-1), (1, 0)))

    def _positive(self, vector: Any) -> Any:
        """Scale to a largest entry of one, and lift what is tiny or no number: any positive vector is valid."""
        xp = self.xp
        least = _ABOVE_LOSS if self.read_loss else _TINY32
        scaled = vector / xp.max(vector, axis=0)
        return xp.where(scaled > least, scaled, xp.full_like(scaled, least))


def _bounds(product: _Product, num_steps: int) -> dict[str, Any]:
    """All fields of a certificate for one chunk, the batch first again."""
    xp = product.xp
    ones = product.ones()
    row_low, row_high = product.forward(ones, ones)
    column_low, column_high = product.backward(ones, ones)
    radius = xp.maximum(xp.max(row_high - row_low, axis=0), xp.max(column_high - column_low, axis=0))
    radius = radius * (1.0 + 2 * _EPS)

    # Schur: ||M||_2^2 <= ||M||_inf ||M||_1. The roots are taken first, so that nothing under- or overflows.
    upper = xp.sqrt(xp.max(row_high, axis=0)) * xp.sqrt(xp.max(column_high, axis=0)) * (1.0 + 4 * _EPS)
    lower = _ratio_below(xp, column_low, ones)
    for step, x in enumerate([ones] if num_steps == 0 else [ones, product.dominant_vector(num_steps)]):
        y_low, y_high = product.forward(x, x) if step else (row_low, row_high)
        z_low, z_high = product.backward(y_low, y_high)
        # Collatz-Wielandt: M^T M x <= lambda x for one x > 0 gives ||M||_2^2 <= lambda. No quotient underflows, since x
        # is at most one and z_high at least 4 n of the smallest normal number.
        collatz = xp.sqrt(xp.max(z_high / x, axis=0)) * (1.0 + 2 * _EPS)
        upper = xp.minimum(collatz, upper)
        lower = xp.maximum(lower, xp.maximum(_ratio_below(xp, y_low, x), _ratio_below(xp, z_low, y_high)))

    zero, unbounded = xp.zeros_like(upper), xp.full_like(upper, _INF)
    lower = xp.where(product.valid, lower, zero)
    if len(product.layers) == 1:
        lower = xp.where(product.finite, xp.maximum(lower, product.largest), zero)
        lower = xp.where(product.exact, product.largest, lower)
    upper = xp.where(product.exact, product.largest, xp.where(product.valid & ~xp.isnan(upper), upper, unbounded))
    return {
        "norm2_lower": lower,
        "norm2_upper": upper,
        "row_sums": xp.permute_dims(product.sums(transposed=False), (1, 0)),
        "column_sums": xp.permute_dims(product.sums(transposed=True), (1, 0)),
        "absolute_row_sums": xp.permute_dims(row_high, (1, 0)),
        "absolute_column_sums": xp.permute_dims(column_high, (1, 0)),
        "sums_radius": xp.where(product.finite & ~xp.isnan(radius), radius, unbounded),
    }


def _sum(parts: list[Any]) -> Any:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _rescaled(xp: Any, matrix: Any) -> Any:
    return matrix / xp.max(matrix, axis=(-2, -1), keepdims=True)


def _ratio_below(xp: Any, numerator: Any, denominator: Any) -> Any:
    """A lower bound of the quotient of two Euclidean norms over the first axis; 0 where it is not a number."""
    above = (denominator.shape[0] + 10) * _EPS
    quotient = _scaled_norm(xp, numerator) * (1.0 - above) / (_scaled_norm(xp, denominator) * (1.0 + above))
    return xp.where(xp.isfinite(quotient), quotient, xp.zeros_like(quotient))


def _scaled_norm(xp: Any, vector: Any) -> Any:
    """Euclidean norm within (n + 8) units of roundoff, free of overflow and underflow; NaN for zero and infinity."""
    peak = xp.max(vector, axis=0)
    scaled = vector / peak
    return peak * xp.sqrt(xp.sum(scaled * scaled, axis=0))


def _extreme(sums: Any, which: Literal["min", "max"]) -> Any:
    xp = _xp.array_namespace(sums)
    return xp.min(xp.abs(sums), axis=-1) if which == "min" else xp.max(xp.abs(sums), axis=-1)

"""Hypothesis strategies of logits, shapes, dtypes and layouts, for anyone's tests.

>>> from hypothesis import given, settings
>>> from proofs import strategies
>>> @settings(max_examples=5, database=None, derandomize=True)
... @given(strategies.logits(sizes=(2, 4), dtype="float32"))
... def rows_are_finite(values):
...     assert values.shape[-1] == values.shape[-2] and values.dtype == "float32"
>>> rows_are_finite()

Each strategy draws a recipe (a generator's name, a size, a scale, a seed) and NumPy fills the arrays, so that one
example holds a stack of matrices and costs microseconds; a report shrinks the failing matrix itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from proofs._claim import Sample

__all__ = [
    "DTYPES",
    "EASY",
    "GENERATORS",
    "LAYOUTS",
    "SCALES",
    "SIZES",
    "all_vertices",
    "dtypes",
    "layout",
    "layouts",
    "logits",
    "round_to",
    "samples",
    "shapes",
]

Generator = Callable[[np.random.Generator, tuple[int, ...], int, float], np.ndarray]

SCALES: tuple[float, ...] = (
    1e-3,
    1e-2,
    0.1,
    0.3,
    1.0,
    2.0,
    3.0,
    4.0,
    8.0,
    10.0,
    16.0,
    24.0,
    30.0,
    64.0,
    100.0,
    300.0,
    1e3,
)
"""Standard deviation, or height R of a gap, that the generators are scaled by."""

SIZES: tuple[int, ...] = (1, 2, 3, 4, 5, 8, 16, 32)
"""Every n that a claim has examples of."""

DTYPES: tuple[str, ...] = ("float64", "float32", "float16", "bfloat16")


def _gaussian(rng: np.random.Generator, batch: tuple[int, ...], n: int, scale: float) -> np.ndarray:
    return scale * rng.standard_normal((*batch, n, n))


def _vertex(rng: np.random.Generator, batch: tuple[int, ...], n: int, scale: float) -> np.ndarray:
    """Corners of the cube [0, R]^(n x n)."""
    return scale * rng.integers(0, 2, (*batch, n, n)).astype(np.float64)


def _triangular(rng: np.random.Generator, batch: tuple[int, ...], n: int, scale: float) -> np.ndarray:
    """Zero on and above the diagonal, -L below, rows and columns shuffled: slow, error about 1/(2k)."""
    base = np.where(np.tri(n, k=-1) > 0, -scale, 0.0)
    return _shuffled(rng, batch, base)


def _concentrated(rng: np.random.Generator, batch: tuple[int, ...], n: int, scale: float) -> np.ndarray:
    """All rows but one want the same column: mass has to cross a gap of L."""
    base = np.zeros((n, n))
    base[:-1, 0] = scale
    return _shuffled(rng, batch, base)


def _shuffled(rng: np.random.Generator, batch: tuple[int, ...], base: np.ndarray) -> np.ndarray:
    n = base.shape[0]
    out = np.empty((int(np.prod(batch, dtype=int)), n, n))
    for k in range(out.shape[0]):
        out[k] = base[rng.permutation(n)][:, rng.permutation(n)]
    return out.reshape(*batch, n, n)


def _near_permutation(rng: np.random.Generator, batch: tuple[int, ...], n: int, scale: float) -> np.ndarray:
    """A permutation R above a small Gaussian."""
    return _shuffled(rng, batch, scale * np.eye(n)) + 0.1 * rng.standard_normal((*batch, n, n))


def _diagonal(rng: np.random.Generator, batch: tuple[int, ...], n: int, scale: float) -> np.ndarray:
    """A dominant diagonal: the identity-like start of training."""
    return scale * np.eye(n) + 0.1 * rng.standard_normal((*batch, n, n))


def _rank_one(rng: np.random.Generator, batch: tuple[int, ...], n: int, scale: float) -> np.ndarray:
    """a_i + b_j, exact in float32: exp of it has rank one, the answer is 1/n."""
    rows, columns = rng.standard_normal((*batch, n, 1)), rng.standard_normal((*batch, 1, n))
    return np.round(scale * rows * 1024) / 1024 + np.round(scale * columns * 1024) / 1024


def _constant(rng: np.random.Generator, batch: tuple[int, ...], n: int, scale: float) -> np.ndarray:
    return np.broadcast_to(scale * rng.standard_normal((*batch, 1, 1)), (*batch, n, n)).copy()


def _circulant(rng: np.random.Generator, batch: tuple[int, ...], n: int, scale: float) -> np.ndarray:
    """x_ij = v_(j-i mod n): doubly stochastic after one normalisation."""
    line = scale * rng.standard_normal((*batch, n))
    return line[..., (np.arange(n)[None, :] - np.arange(n)[:, None]) % n]


def _unbalanced(rng: np.random.Generator, batch: tuple[int, ...], n: int, scale: float) -> np.ndarray:
    """A Gaussian whose rows and columns sit at very different heights."""
    return rng.standard_normal((*batch, n, n)) + _rank_one(rng, batch, n, scale)


def _small(rng: np.random.Generator, batch: tuple[int, ...], n: int, scale: float) -> np.ndarray:
    """Logits in [-1/4, 1/4]: five iterations are within 1e-6 of the limit."""
    return rng.uniform(-0.25, 0.25, (*batch, n, n))


GENERATORS: dict[str, Generator] = {
    "gaussian": _gaussian,
    "vertex": _vertex,
    "triangular": _triangular,
    "concentrated": _concentrated,
    "near_permutation": _near_permutation,
    "diagonal": _diagonal,
    "rank_one": _rank_one,
    "constant": _constant,
    "circulant": _circulant,
    "unbalanced": _unbalanced,
    "small": _small,
}
"""Every generator by name; each maps ``(rng, batch, n, scale)`` to an array of shape ``(*batch, n, n)``."""

EASY: tuple[str, ...] = ("small",)
"""What converges within five iterations: for claims about the limit."""


def round_to(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round an array to values that `dtype` holds; bfloat16 comes back in float32 storage.

    >>> import numpy as np
    >>> from proofs.strategies import round_to
    >>> round_to(np.array([1.00390625 * 1.5]), "bfloat16")
    array([1.5078125], dtype=float32)
    """
    with np.errstate(over="ignore"):
        if dtype != "bfloat16":
            return np.asarray(values).astype(dtype)
        single = np.ascontiguousarray(values, dtype=np.float32)
        bits = single.view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)) << np.uint64(16)
        return np.where(np.isfinite(single), rounded.astype(np.uint32).view(np.float32), single)


def shapes(max_batch: int = 3, sizes: Sequence[int] = (1, 2, 3, 4, 5, 8)) -> SearchStrategy[tuple[int, ...]]:
    """Return shapes ``(..., n, n)``: no batch axis, one, two, and empty ones."""
    batches = st.one_of(
        st.just(()), st.tuples(st.integers(0, max_batch)), st.tuples(st.integers(1, max_batch), st.integers(1, 2))
    )
    return st.builds(lambda batch, n: (*batch, n, n), batches, st.sampled_from(list(sizes)))


def dtypes(names: Sequence[str] = DTYPES) -> SearchStrategy[str]:
    """Return dtype names."""
    return st.sampled_from(list(names))


LAYOUTS: tuple[str, ...] = (
    "contiguous",
    "transposed",
    "batch_last",
    "strided",
    "fortran",
    "offset",
    "unaligned",
    "reversed",
    "read_only",
)
"""Memory layouts that :func:`layout` makes; the values are the same in each."""


def layout(values: np.ndarray, name: str) -> np.ndarray:
    """Return the same values in another memory layout.

    >>> import numpy as np
    >>> from proofs.strategies import layout
    >>> same = layout(np.arange(8.0).reshape(2, 2, 2), "strided")
    >>> same.flags.c_contiguous, same.tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    (False, True)
    """
    if name == "contiguous":
        return np.ascontiguousarray(values)
    if name == "transposed":
        return np.ascontiguousarray(np.swapaxes(values, -1, -2)).swapaxes(-1, -2)
    if name == "batch_last":
        return np.moveaxis(np.ascontiguousarray(np.moveaxis(values, 0, -1)), -1, 0)
    if name == "fortran":
        return np.asfortranarray(values)
    if name == "strided":
        wide = np.full((*values.shape[:-1], 2 * values.shape[-1]), np.nan, dtype=values.dtype)
        wide[..., ::2] = values
        return wide[..., ::2]
    if name == "offset":
        wide = np.full((*values.shape[:-2], values.shape[-2] + 1, values.shape[-1] + 1), np.nan, dtype=values.dtype)
        wide[..., 1:, 1:] = values
        return wide[..., 1:, 1:]
    if name == "unaligned":  # contiguous, but one element after where an allocator begins
        flat = np.concatenate([np.full(1, np.nan, dtype=values.dtype), values.ravel()])
        return flat[1:].reshape(values.shape)
    if name == "reversed":
        return np.ascontiguousarray(values[..., ::-1, ::-1])[..., ::-1, ::-1]
    if name == "read_only":
        copy = np.array(values)
        copy.flags.writeable = False
        return copy
    raise ValueError(f"unknown layout {name!r}; choose one of {', '.join(LAYOUTS)}")


def layouts(names: Sequence[str] = LAYOUTS) -> SearchStrategy[str]:
    """Return layout names for :func:`layout`."""
    return st.sampled_from(list(names))


def logits(
    *,
    generators: Sequence[str] = tuple(GENERATORS),
    sizes: Sequence[int] = (2, 3, 4, 5, 8),
    scales: Sequence[float] = SCALES,
    batch: Sequence[int] = (),
    dtype: str = "float64",
) -> SearchStrategy[np.ndarray]:
    """Return arrays ``(*batch, n, n)`` of logits of every difficulty.

    Parameters
    ----------
    generators : sequence of str
        Names from :data:`GENERATORS`; an unknown one raises ``ValueError``.
    sizes, scales : sequences
        What n and the scale are drawn from.
    batch : sequence of int
        Leading shape.
    dtype : str
        The values are exact in it.
    """
    unknown = [name for name in generators if name not in GENERATORS]
    if unknown:
        raise ValueError(f"unknown generators {unknown}; choose from {', '.join(GENERATORS)}")

    def make(name: str, n: int, scale: float, seed: int) -> np.ndarray:
        return round_to(GENERATORS[name](np.random.default_rng(seed), tuple(batch), n, scale), dtype)

    return st.builds(
        make,
        st.sampled_from(list(generators)),
        st.sampled_from(list(sizes)),
        st.sampled_from(list(scales)),
        st.integers(0, 2**32 - 1),
    )


def samples(
    *,
    generators: Sequence[str] = tuple(GENERATORS),
    sizes: Sequence[int] = (2, 3, 4, 5, 8),
    scales: Sequence[float] = SCALES,
    batch: int = 16,
    dtypes: Sequence[str] = ("float64", "float32"),
    zeros: bool = False,
    mixed: bool = False,
) -> SearchStrategy[Sample]:
    """Return the examples of a claim: stacks of `batch` matrices, each made by one generator at one scale.

    With ``mixed=True`` every matrix of a stack has a generator and a scale of its own, so that hard ones stand beside
    easy ones: what looks at the whole stack shows.
    With ``zeros=True`` entries off a union of up to three permutations are ``-inf``, so that a doubly stochastic matrix
    with that pattern exists.
    """

    def make(name: str, n: int, scale: float, seed: int, dtype: str) -> Sample:
        rng = np.random.default_rng(seed)
        if mixed:
            each = [(GENERATORS[rng.choice(generators)], float(rng.choice(scales))) for _ in range(batch)]
            values = np.concatenate([generate(rng, (1,), n, height) for generate, height in each])
        else:
            values = GENERATORS[name](rng, (batch,), n, scale)
        if zeros:
            values = np.where(_patterns(rng, batch, n), values, -np.inf)
        top = 6e4 if dtype == "float16" else np.inf
        values = np.where(np.isfinite(values), np.clip(values, -top, top), values)
        note = f"mixed n={n}" if mixed else f"{name} n={n} scale={scale:g}"
        return Sample(round_to(values, dtype), dtype, seed, note)

    return st.builds(
        make,
        st.sampled_from(list(generators)),
        st.sampled_from(list(sizes)),
        st.sampled_from(list(scales)),
        st.integers(0, 2**32 - 1),
        st.sampled_from(list(dtypes)),
    )


def _patterns(rng: np.random.Generator, batch: int, n: int) -> np.ndarray:
    """Supports that are unions of up to three permutations: they have total support."""
    keep = np.zeros((batch, n, n), dtype=bool)
    for k in range(batch):
        for _ in range(int(rng.integers(1, 4))):
            keep[k, np.arange(n), rng.permutation(n)] = True
    return keep


def all_vertices(n: int, height: float) -> np.ndarray:
    """Return all 2^(n^2) matrices with entries in {0, height}; n <= 4.

    >>> from proofs.strategies import all_vertices
    >>> all_vertices(2, 8.0).shape
    (16, 2, 2)
    """
    if n > 4:
        raise ValueError(f"n = {n} has 2^{n * n} vertices; give n <= 4")
    codes = np.arange(2 ** (n * n), dtype=np.int64)
    bits = (codes[:, None] >> np.arange(n * n)[None, :]) & 1
    return height * bits.reshape(-1, n, n).astype(np.float64)

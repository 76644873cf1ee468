"""What a convention asks of the kernels, as plain values, and which conventions they refuse."""

from __future__ import annotations

import functools
from typing import NamedTuple

from mhc_layers.conventions import Convention

__all__ = [
    "LARGEST_STREAMS",
    "SiteOptions",
    "mix_width",
    "options_key",
    "padded_rows",
    "refuse_convention",
    "site_options",
    "streams_of",
]

LARGEST_STREAMS = 8
"""Largest n of the fused kernels: an n x n operator and n streams of a tile live in registers."""


class SiteOptions(NamedTuple):
    """The numbers of a :class:`~mhc_layers.conventions.Convention` that reach a kernel.

    ``method`` is ``"knopp"`` (exponential start, no epsilon) or ``"damped"`` (softmax start, epsilons); ``first`` is
    the side of the *stored* logits that is divided first; ``transposed`` says that the operator is the transpose of the
    stored matrix.
    """

    method: str
    first: str
    transposed: bool
    num_iters: int
    norm_eps: float
    eps_pre: float
    post_multiplier: float
    eps_start: float
    eps_den: float


def padded_rows(num_rows: int) -> int:
    """Rows of phi as an operand of the tensor cores: a power of two, at least 16."""
    return max(16, 1 << (num_rows - 1).bit_length())


def streams_of(num_rows: int) -> int:
    """Return the n with n (n + 2) rows."""
    return round((num_rows + 1) ** 0.5) - 1


def mix_width(num_streams: int) -> int:
    """Length of a row of ``mix``: n + 2 values, padded to a power of two."""
    return 1 << (num_streams + 1).bit_length()


@functools.lru_cache(maxsize=64)
def options_key(convention: Convention) -> str:
    """Encode a convention's kernel options as one string, the form in which custom ops take them."""
    options = SiteOptions(
        method="knopp" if convention.start == "exp" else "damped",
        first=convention.stored_first,
        transposed=convention.transposed,
        num_iters=convention.num_iters,
        norm_eps=convention.norm_eps,
        eps_pre=convention.eps_pre,
        post_multiplier=convention.post_multiplier,
        eps_start=convention.eps_start,
        eps_den=convention.eps_den,
    )
    return ",".join(str(int(value)) if isinstance(value, bool) else repr(value).strip("'") for value in options)


@functools.lru_cache(maxsize=64)
def site_options(key: str) -> SiteOptions:
    """Decode :func:`options_key`.

    Examples
    --------
    >>> from mhc_layers.conventions import DEEPSEEK_V4
    >>> from mhc_layers.kernels.options import options_key, site_options
    >>> site_options(options_key(DEEPSEEK_V4))[:4]
    ('damped', 'rows', True, 20)
    """
    method, first, transposed, num_iters, *numbers = key.split(",")
    return SiteOptions(method, first, transposed == "1", int(num_iters), *(float(number) for number in numbers))


def refuse_convention(convention: Convention) -> str | None:
    """Reason why the fused kernels do not run a convention, or None if they do."""
    if convention.norm_eps_place != "inside":
        return f"norm_eps_place is {convention.norm_eps_place!r}; the kernels have the epsilon inside the root"
    if convention.apply_dtype != "float32":
        return f"apply_dtype is {convention.apply_dtype!r}; the kernels write in float32 with one rounding"
    return None

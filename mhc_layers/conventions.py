"""Conventions as values: which way the operator acts, where every epsilon goes, how streams are read out.

Two implementations of "the same" layer differ in the transpose of one n x n matrix, the order of two
normalisations, or an epsilon, and all of them train. A :class:`Convention` writes these choices down, so that a
checkpoint, a kernel and a test can agree on them. The three presets are the paper (:data:`PAPER`), the released
DeepSeek-V4 code (:data:`DEEPSEEK_V4`) and the single-pass wiring of V4.1 (:data:`DEEPSEEK_V41`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

from birkhoff._checks import as_count

__all__ = ["CONVENTIONS", "DEEPSEEK_V4", "DEEPSEEK_V41", "PAPER", "Convention", "get_convention"]

Side = Literal["columns", "rows"]
Start = Literal["exp", "softmax"]
NormEpsPlace = Literal["inside", "outside"]
ApplyDtype = Literal["float32", "activation"]
Readout = Literal["mean", "sum", "learned", "hc_head", "last_pre"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convention:
    """Every choice that the equations of a hyper-connection leave open.

    The operator always acts from the left, output stream first:
    ``x_next[o] = sum_i h_res[o, i] * x[i] + h_post[o] * f``. ``first`` names the side that the first normalisation
    of *this* operator divides; ``transposed`` says whether the stored logits describe the operator or its transpose.

    Parameters
    ----------
    name : str
        Name in messages, configs and checkpoints.
    transposed : bool
        False: logit ``[o, i]`` of the residual block belongs to output stream o and input stream i. True: the block
        is stored as ``comb[j, k]`` with j the source and k the destination, and the operator is its transpose.
    first : {"columns", "rows"}
        Side of the acting operator that is normalised first; the other side is normalised last and is exact.
    start : {"exp", "softmax"}
        Starting matrix: the exponential of the logits, or a softmax over the sources' destinations (the stored
        rows) with ``eps_start`` added to every entry. The softmax is then the first normalisation.
    num_iters : int
        Number of pairs of normalisations.
    eps_pre, eps_start, eps_den : float
        Added to ``h_pre``, to the softmax entries, and to every divisor.
    norm_eps : float
        Epsilon of the root mean square over all ``n * C`` values of a token.
    norm_eps_place : {"inside", "outside"}
        ``sqrt(mean(x^2) + eps)`` or ``sqrt(mean(x^2)) + eps``.
    post_multiplier : float
        ``h_post = post_multiplier * sigmoid(.)``.
    apply_dtype : {"float32", "activation"}
        Dtype of the write. "float32" rounds once at the end; "activation" rounds the coefficients and every product
        to the dtype of the streams first, as transformers does.
    readout : {"mean", "sum", "learned", "hc_head", "last_pre"}
        How a model collapses its streams at the end.
    read_delay : {0, 1}
        0: a site reads with its own ``h_pre``. 1: it reads with the ``h_pre`` of the site before it, and the first
        site reads stream 0.

    Raises
    ------
    ValueError
        If a field is outside its accepted values.

    Examples
    --------
    >>> from mhc_layers import PAPER
    >>> PAPER.first, PAPER.last, PAPER.num_iters
    ('columns', 'rows', 20)
    >>> PAPER.replace(readout="learned").readout
    'learned'
    """

    name: str = "custom"
    transposed: bool = False
    first: Side = "columns"
    start: Start = "exp"
    num_iters: int = 20
    eps_pre: float = 0.0
    eps_start: float = 0.0
    eps_den: float = 0.0
    norm_eps: float = 1e-20
    norm_eps_place: NormEpsPlace = "inside"
    post_multiplier: float = 2.0
    apply_dtype: ApplyDtype = "float32"
    readout: Readout = "mean"
    read_delay: Literal[0, 1] = 0

    def __post_init__(self) -> None:
        choices: dict[str, tuple[Any, ...]] = {
            "first": get_args(Side),
            "start": get_args(Start),
            "norm_eps_place": get_args(NormEpsPlace),
            "apply_dtype": get_args(ApplyDtype),
            "readout": get_args(Readout),
            "read_delay": (0, 1),
        }
        for field, accepted in choices.items():
            value = getattr(self, field)
            if value not in accepted:
                raise ValueError(f"Convention.{field} is {value!r}; accepted: {', '.join(map(repr, accepted))}.")
        object.__setattr__(self, "num_iters", as_count(self.num_iters, "Convention.num_iters", least=1))
        for field in ("eps_pre", "eps_start", "eps_den", "norm_eps"):
            if not 0.0 <= getattr(self, field) < 1.0:
                raise ValueError(f"Convention.{field} is {getattr(self, field)}; accepted: 0 <= eps < 1.")
        if self.start == "exp" and (self.eps_start or self.eps_den):
            raise ValueError(
                f"Convention(start='exp') has no epsilons, got eps_start={self.eps_start}, eps_den={self.eps_den}; "
                "use start='softmax' for the recurrence with epsilons, or set both to 0."
            )
        if self.start == "softmax" and self.stored_first != "rows":
            raise ValueError(
                "Convention(start='softmax') takes the softmax over the stored rows, so the stored matrix is "
                f"normalised by rows first; got first={self.first!r} with transposed={self.transposed}. "
                "Use transposed=True with first='columns', or transposed=False with first='rows'."
            )
        if self.readout == "last_pre" and not self.read_delay:
            raise ValueError(
                "Convention(readout='last_pre') needs read_delay=1: without the delay the last site's h_pre has "
                "already been used by that site. Use readout='mean' or 'hc_head'."
            )

    @property
    def last(self) -> Side:
        """Side of the acting operator that is normalised last, hence exact to rounding."""
        return "rows" if self.first == "columns" else "columns"

    @property
    def stored_first(self) -> Side:
        """Side of the *stored* logits that is normalised first."""
        return self.last if self.transposed else self.first

    def replace(self, **changes: Any) -> Convention:
        """Return a copy with some fields changed; the name becomes "custom" unless given."""
        changes.setdefault("name", "custom")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for a config file or a checkpoint."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Convention:
        """Build a convention from :meth:`to_dict`'s value.

        Raises
        ------
        ValueError
            If a key is not a field of the convention.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(f"Unknown fields of a Convention: {unknown}; accepted: {sorted(known)}.")
        return cls(**fields)


PAPER = Convention(name="paper")
"""The mHC paper (arXiv 2512.24880, Eq. 7-9, 14-19): no epsilon in the maps, rows last, mean readout."""

DEEPSEEK_V4 = Convention(
    name="deepseek_v4",
    transposed=True,
    start="softmax",
    eps_pre=1e-6,
    eps_start=1e-6,
    eps_den=1e-6,
    norm_eps=1e-6,
    readout="hc_head",
)
"""The released DeepSeek-V4 layer: stored ``comb`` applied transposed, epsilons of 1e-6, learned head."""

DEEPSEEK_V41 = DEEPSEEK_V4.replace(name="deepseek_v41", readout="last_pre", read_delay=1)
"""DeepSeek-V4.1, single pass: V4's maps, but each site reads with the ``h_pre`` of the site before it."""

CONVENTIONS: dict[str, Convention] = {preset.name: preset for preset in (PAPER, DEEPSEEK_V4, DEEPSEEK_V41)}


def get_convention(convention: Convention | str) -> Convention:
    """Return a preset by name; a :class:`Convention` is returned as it is.

    Raises
    ------
    ValueError
        If the name is not a preset.

    Examples
    --------
    >>> from mhc_layers import get_convention
    >>> get_convention("deepseek_v4").transposed
    True
    """
    if isinstance(convention, Convention):
        return convention
    if convention not in CONVENTIONS:
        raise ValueError(f"Unknown convention {convention!r}; presets: {', '.join(CONVENTIONS)}.")
    return CONVENTIONS[convention]

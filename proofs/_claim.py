"""The vocabulary of a claim: what is said, what it is tried on, and what was seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = ["Claim", "Observation", "Provenance", "Sample", "holds_where", "same_bits", "worst", "worst_of"]

Provenance = Literal["exact", "enclosure", "sampled"]
"""How a verdict was reached: by exact arithmetic, by ball arithmetic, or by trying examples."""

Kind = Literal[
    "projection", "certificate", "product", "rounding", "decomposition", "parametrization", "layer", "trained"
]


@dataclass(frozen=True)
class Sample:
    """One example: a stack of logit matrices and a seed for whatever else the claim draws.

    Parameters
    ----------
    logits : numpy.ndarray, shape (B, n, n)
        Values that `dtype` represents exactly, held in an array that NumPy has (float32 for bfloat16).
    dtype : str
        ``"float64"``, ``"float32"``, ``"float16"`` or ``"bfloat16"``.
    seed : int
        Seed of the permutations, shifts and upstream gradients that a claim adds.
    note : str
        Which generator made it.

    Examples
    --------
    >>> import numpy as np
    >>> from proofs.claims import Sample
    >>> sample = Sample(np.array([[[0.5, -np.inf], [0.0, 1.0]]], dtype=np.float32), "float32", seed=7)
    >>> Sample.from_record(sample.as_record()).logits
    array([[[ 0.5, -inf],
            [ 0. ,  1. ]]], dtype=float32)
    """

    logits: np.ndarray
    dtype: str = "float64"
    seed: int = 0
    note: str = ""

    def rng(self) -> np.random.Generator:
        """Return the generator of everything else that the example needs."""
        return np.random.default_rng(self.seed)

    def item(self, index: int) -> Sample:
        """Return the example that keeps only matrix number `index` of the stack."""
        return Sample(self.logits[index : index + 1], self.dtype, self.seed, self.note)

    def with_logits(self, logits: np.ndarray) -> Sample:
        """Return the same example on other logits."""
        return Sample(logits, self.dtype, self.seed, self.note)

    def as_record(self) -> dict[str, Any]:
        """Return plain data that :meth:`from_record` reads back bit for bit."""
        wide = np.asarray(self.logits, dtype=np.float64)
        return {
            "logits": [[[_text(value) for value in row] for row in matrix] for matrix in wide],
            "shape": list(wide.shape),
            "dtype": self.dtype,
            "seed": self.seed,
            "note": self.note,
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Sample:
        """Rebuild an example from :meth:`as_record`."""
        wide = np.array(
            [[[float.fromhex(value) for value in row] for row in matrix] for matrix in record["logits"]],
            dtype=np.float64,
        ).reshape(record["shape"])
        storage = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": np.float32}
        return cls(wide.astype(storage[record["dtype"]]), record["dtype"], int(record["seed"]), record["note"])


def _text(value: float) -> str:
    return float(value).hex()


@dataclass(frozen=True)
class Observation:
    """The largest deviation seen on one example, and how much the claim allows there.

    Parameters
    ----------
    seen, allowed : float
        The claim holds on the example when ``seen <= allowed``; NaN never does, and an infinite allowance allows
        nothing: it comes from a matrix that the claim cannot measure.
    item : int
        Which matrix of the stack it was.
    detail : str
        A few words for the report.

    Examples
    --------
    >>> from proofs.claims import Observation
    >>> Observation(3e-16, 4e-16).holds, Observation(float("nan"), 1.0).holds, Observation(1.0, float("inf")).holds
    (True, False, False)
    """

    seen: float
    allowed: float
    item: int = 0
    detail: str = ""

    @property
    def holds(self) -> bool:
        """Whether the deviation stays within what is allowed."""
        return bool(self.seen <= self.allowed < np.inf)

    @property
    def ratio(self) -> float:
        """Seen over allowed: above 1 the claim is broken."""
        if np.isnan(self.seen) or not self.allowed < np.inf:
            return float("inf")
        if self.allowed > 0:
            return float(self.seen / self.allowed)
        return 0.0 if self.holds else float("inf")


def worst(seen: Any, allowed: Any, detail: str = "") -> Observation:
    """Return the observation of the matrix that comes closest to breaking the claim, or breaks it most.

    Parameters
    ----------
    seen, allowed : array_like, shape (B, ...)
        Deviation and allowance; broadcast, then reduced over all axes but the first. NaN and an infinite allowance
        count as a breach.

    Examples
    --------
    >>> from proofs.claims import worst
    >>> worst([1.0, 3.0, 2.0], [4.0, 4.0, 1.0], "distance")
    Observation(seen=2.0, allowed=1.0, item=2, detail='distance')
    """
    seen, allowed = np.broadcast_arrays(np.asarray(seen, dtype=np.float64), np.asarray(allowed, dtype=np.float64))
    if seen.size == 0:
        return Observation(0.0, 0.0, 0, "empty")
    flat_seen, flat_allowed = seen.reshape(-1), allowed.reshape(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(flat_allowed > 0, flat_seen / flat_allowed, np.where(flat_seen <= flat_allowed, 0.0, np.inf))
    ratio = np.where(np.isnan(flat_seen) | ~(flat_allowed < np.inf), np.inf, ratio)
    at = int(np.argmax(ratio))
    per_item = max(1, seen.size // seen.shape[0]) if seen.ndim else 1
    return Observation(float(flat_seen[at]), float(flat_allowed[at]), at // per_item, detail)


def holds_where(right: Any, detail: str, item: int = 0) -> Observation:
    """Return the observation of a statement that is true or false: of one thing, or of every matrix of a stack."""
    seen = np.where(right, 0.0, 2.0)
    return worst(seen, 1.0, detail) if seen.ndim else Observation(float(seen), 1.0, item, detail)


def same_bits(one: np.ndarray, two: np.ndarray, detail: str) -> Observation:
    """Return the observation that two arrays hold the same numbers: zeros of one sign, NaN where the other has NaN."""
    same = (one == two) & (np.signbit(one) == np.signbit(two))
    return holds_where(same | (np.isnan(one) & np.isnan(two)), detail)


def worst_of(observations: Iterable[Observation]) -> Observation:
    """Return the observation with the largest ratio."""
    return max(observations, key=lambda observation: observation.ratio)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement about a piece of code, its domain, and the check that could refute it.

    Parameters
    ----------
    name : str
        Identifier, used on the command line and in reports.
    family : str
        The module of `proofs` that holds it.
    statement : str
        What is claimed, in words and formulas that the check implements literally.
    reference : str
        Where it comes from: a section of the specification, a property number, an equation, a paper.
    domain : str
        On which inputs it is claimed.
    method : str
        How it is checked.
    lemma : str or None
        The machine-checked theorem behind it, by its name in ``proofs/formal``; ``None`` if there is none.
    lemmas : tuple of str
        Further theorems that the argument uses.
    provenance : {"exact", "enclosure", "sampled"}
        What a verdict of "holds" means. Sampled never proves.
    samples : callable
        ``samples(subject)`` is the Hypothesis strategy of its examples, or a list of all there are.
    check : callable
        ``check(subject, sample)`` returns an :class:`Observation`; an exception is a breach.
    applies : callable
        ``applies(subject)`` is ``None`` if the claim is made of the subject, else the reason why not.
    kind : str
        Which kind of subject it speaks of.
    effort : float
        Multiplies the number of examples of the profile; below 1 for expensive checks.
    itemwise : bool
        Every matrix of a stack is judged by itself, so examples of one size and dtype may be checked as one stack.
    inside : callable
        ``inside(sample)`` tells whether an example that was cut down still lies in the domain.
    """

    name: str
    family: str
    statement: str
    reference: str
    domain: str
    method: str
    provenance: Provenance
    samples: Callable[[Any], SearchStrategy[Sample] | list[Sample]] = field(repr=False)
    check: Callable[[Any, Sample], Observation] = field(repr=False)
    lemma: str | None = None
    lemmas: tuple[str, ...] = ()
    applies: Callable[[Any], str | None] = field(default=lambda subject: None, repr=False)
    kind: Kind = "projection"
    effort: float = 1.0
    itemwise: bool = False
    inside: Callable[[Sample], bool] = field(default=lambda sample: True, repr=False)

"""The list of claims: every statement that the library makes about its numbers, and the check that could refute it.

>>> from proofs import claims
>>> claims.by_name("last_side_exact").lemma
'rownorm_sum'
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from proofs import (
    batch,
    certificate,
    closure,
    decomposition,
    euclidean,
    gradients,
    identity,
    layer,
    marginals,
    parametrization,
    rounding,
    roundoff,
    spectral_norm,
    trained,
)
from proofs._claim import Claim, Observation, Provenance, Sample, worst, worst_of

__all__ = [
    "CLAIMS",
    "PROJECTION_CLAIMS",
    "Claim",
    "Observation",
    "Provenance",
    "Sample",
    "by_name",
    "select",
    "worst",
    "worst_of",
]

CLAIMS: tuple[Claim, ...] = (
    *marginals.CLAIMS,
    *spectral_norm.CLAIMS,
    *closure.CLAIMS,
    *identity.CLAIMS,
    *roundoff.CLAIMS,
    *gradients.CLAIMS,
    *batch.CLAIMS,
    *euclidean.CLAIMS,
    *certificate.CLAIMS,
    *rounding.CLAIMS,
    *decomposition.CLAIMS,
    *parametrization.CLAIMS,
    *layer.CLAIMS,
    *trained.CLAIMS,
)
"""Every claim, by family."""

PROJECTION_CLAIMS: tuple[Claim, ...] = tuple(claim for claim in CLAIMS if claim.kind == "projection")
"""The claims that can be made of anybody's projection."""


def by_name(name: str) -> Claim:
    """Return one claim; ``ValueError`` lists the names that come close."""
    names = [claim.name for claim in CLAIMS]
    if name in names:
        return CLAIMS[names.index(name)]
    close = [one for one in names if name and name in one] or difflib.get_close_matches(name, names)
    hint = f"there is {', '.join(close)}" if close else "python -m proofs --list prints all"
    raise ValueError(f"unknown claim {name!r}; {hint}")


def select(names: Sequence[str] | None) -> tuple[Claim, ...]:
    """Return the claims with these names, or of these families, each once; all of them for ``None``.

    >>> from proofs import claims
    >>> [claim.name for claim in claims.select(["one_by_one_is_one", "decomposition"])]
    ['one_by_one_is_one', 'decomposition_rebuilds']
    """
    if isinstance(names, str):
        raise ValueError(f"got the text {names!r}; give a list of names of claims or families")
    if not names:
        return CLAIMS
    chosen: dict[str, Claim] = {}
    for name in names:
        family = [claim for claim in CLAIMS if claim.family == name]
        chosen.update({claim.name: claim for claim in family or [by_name(name)]})
    return tuple(chosen.values())

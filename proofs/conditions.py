"""Why a claim is not made of a projection: each condition returns the reason in a few words, or ``None``."""

from __future__ import annotations

from collections.abc import Callable

from proofs.subjects import Subject

__all__ = [
    "Condition",
    "adds_eps",
    "adds_exactly",
    "converges",
    "differentiates_twice",
    "exact_side",
    "finished",
    "has_halves",
    "has_implicit_gradient",
    "is_euclidean",
    "iterates",
    "kl",
    "known_iteration",
    "meets",
    "no_eps",
    "offers_gradient",
    "rebuilds",
    "reports",
    "returns_a_matrix_only",
    "stops_by_tolerance",
    "takes_stacks",
    "unfinished",
]

Condition = Callable[[Subject], str | None]


def meets(*conditions: Condition) -> Condition:
    """Return the condition that all of these hold; its reason is that of the first that does not."""

    def all_of_them(subject: Subject) -> str | None:
        return next((reason for condition in conditions if (reason := condition(subject)) is not None), None)

    return all_of_them


def kl(subject: Subject) -> str | None:
    """It minimises the KL divergence in the limit."""
    return None if subject.geometry == "kl" else "projects in the Euclidean distance"


def is_euclidean(subject: Subject) -> str | None:
    """It minimises the Frobenius distance."""
    return None if subject.geometry == "euclidean" else "projects in KL divergence"


def no_eps(subject: Subject) -> str | None:
    """Its divisors are the sums themselves."""
    return None if subject.eps is None else "eps is added to every divisor, which is another function"


def adds_eps(subject: Subject) -> str | None:
    """Its divisors are the sums plus eps."""
    return None if subject.eps is not None else "adds no eps to its divisors"


def adds_exactly(subject: Subject) -> str | None:
    """It takes a dtype in which sums of short numbers do not round."""
    if {"float64", "float32"} & set(subject.backend.dtypes):
        return None
    return "constants added to half-precision logits round them"


def takes_stacks(subject: Subject) -> str | None:
    """It takes the matrices of a stack together."""
    return "loops over the matrices, so that a large stack would take minutes" if subject.one_by_one else None


def unfinished(subject: Subject) -> str | None:
    """The result is what the iteration left."""
    return None if subject.finish == "none" else "rounded after the iteration"


def finished(subject: Subject) -> str | None:
    """The result was rounded after the iteration, so that its norm is at most 1."""
    if subject.finish in ("nonexpansive", "exact"):
        return None
    if kl(subject) is None and no_eps(subject) is None and not subject.converged:
        return "not claimed of a truncated iteration: 1.21 is reached at logit std 10"
    return "claimed only after a finish"


def _not_shrunk(subject: Subject) -> str | None:
    return "the non-expansive finish shrinks both sides below 1" if subject.finish == "nonexpansive" else None


exact_side = meets(kl, no_eps, _not_shrunk)
"""The side that is normalised last sums to 1 up to rounding."""


def iterates(subject: Subject) -> str | None:
    """It is an iterate of a known number."""
    return None if subject.num_iters is not None else "its number of iterations is unknown, or it returns the limit"


def converges(subject: Subject) -> str | None:
    """It returns the limit, up to its tolerance."""
    return None if subject.converged else "returns an iterate, not the limit"


known_iteration = meets(kl, iterates, unfinished)
"""There is a model of exactly what it computes."""


def rebuilds(subject: Subject) -> str | None:
    """The same method can be run with another number of iterations or another order."""
    return None if subject.rebuild is not None else "its number of iterations and its order are not ours to choose"


def reports(subject: Subject) -> str | None:
    """It returns errors and statuses beside the matrix."""
    return None if subject.project is not None else "returns a matrix only, no errors and no status"


def returns_a_matrix_only(subject: Subject) -> str | None:
    """It returns no status, for which values of the input have to be looked at."""
    return None if subject.project is None else "reads its input on the host to give it a status"


def stops_by_tolerance(subject: Subject) -> str | None:
    """It can stop at a given error."""
    return None if subject.tolerant is not None else "takes no tolerance"


def has_implicit_gradient(subject: Subject) -> str | None:
    """It can differentiate its limit without its iterations."""
    return None if subject.implicit is not None else "offers no implicit gradient"


def offers_gradient(subject: Subject) -> str | None:
    """It has a vector-Jacobian product."""
    return None if subject.vjp is not None else "offers no gradient on this backend"


def differentiates_twice(subject: Subject) -> str | None:
    """Its backend can differentiate the gradient, in float64."""
    if subject.vjp is None or not subject.backend.differentiates:
        return "its backend has no automatic differentiation"
    if "float64" not in subject.backend.dtypes:
        return "its second derivative is compared in float64"
    return "the gradient of a limit is an adjoint of its own" if subject.converged else None


def has_halves(subject: Subject) -> str | None:
    """Its backend has float16 or bfloat16."""
    return None if subject.backend.halves else f"{subject.backend.name} has no half precision"

"""Survivors that change nothing that is claimed, each with the argument why.

A mutant is listed by its module, the function that holds it, and the text before and after the change, so that the list
stays right when lines move. It is looked up only after claims and tests have let the mutant pass: a listed mutant that
something rejects counts as rejected.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EQUIVALENT", "Equivalent", "reason"]


@dataclass(frozen=True)
class Equivalent:
    """Mutants of one kind, as (function, before, after), and why nothing can notice."""

    module: str
    changes: tuple[tuple[str, str, str], ...]
    why: str


_TIE = "where equal, both give the same number"
_TUNING = "tuning: as few steps as measured with either, and no result depends on which"

EQUIVALENT: tuple[Equivalent, ...] = (
    Equivalent("birkhoff.certificates", (("module", "2 ** 25", "2 * 25"), ("module", "2", "3"), ("module", "25", "26")),
               "the size of a block on a GPU: time and memory there, not values"),
    Equivalent("birkhoff.certificates", (
        ("apply", "if self.small: parts.append(_sum([values[:, column, :] * vector[col...",
         "if not self.small: parts.append(_sum([values[:, column, :] * vector..."),
    ), "which of two ways to the same sums: time, and bounds hold for any order of summation"),
    Equivalent("birkhoff.certificates", (("dominant_vector", "-1", "-2"), ("dominant_vector", "1", "2")),
               "the sums of a symmetric matrix over its rows are those over its columns"),
    Equivalent("birkhoff.certificates", (
        ("_flushes_subnormals", "(_TINY32, xp.float32) if single else (_TINY64, xp.float64)",
         "(_TINY32, xp.float32) if not single else (_TINY64, xp.float64)"),
    ), "a processor takes subnormal numbers of both precisions for zero, or of neither; only a GPU tells them apart"),
    Equivalent("birkhoff.certificates", (("_positive", "scaled > least", "scaled >= least"),), _TIE),
    Equivalent("birkhoff.certificates", (("module", "70", "71"),),
               "halfway between what is lost and what rounds: any bound it gives is valid, and as close to 1e-14"),
    Equivalent("birkhoff.solvers.sinkhorn_knopp", (("SinkhornKnopp", "12", "13"),),
               "from which n on sums are matrix products: time"),
    Equivalent("birkhoff.solvers.sinkhorn_knopp", (("_inverse", "frame.xp.min", "frame.xp.max"),),
               "a factor of w that v takes back; within the range of this arithmetic neither over- nor underflows"),
    Equivalent("birkhoff.solvers.newton", (("module", "12", "13"), ("module", "0.2", "0.4")), _TUNING),
    Equivalent("birkhoff.solvers.newton", (
        ("_move", "dual <= rounding * span", "dual < rounding * span"),
        ("_move", "span <= _SURE_STEP", "span < _SURE_STEP"),
    ), "a step that meets a threshold exactly may be taken or halved"),
    Equivalent("birkhoff.solvers.euclidean", (("module", "0.3", "0.6"), ("step", "1.0", "2.0")), _TUNING),
    Equivalent("birkhoff.solvers.euclidean", (
        ("step", "value < best_objective - margin", "value <= best_objective - margin"),
        ("step", "value <= best_objective + margin", "value < best_objective + margin"),
        ("step", "slope < best_slope", "slope <= best_slope"),
        ("step", "best_error < _SETTLED", "best_error <= _SETTLED"),
        ("step", "error <= xp.finfo(values.dtype).eps * (n + 0.25 * reach)",
         "error < xp.finfo(values.dtype).eps * (n + 0.25 * reach)"),
    ), "a threshold met exactly: either choice is as good"),
    Equivalent("birkhoff.solvers.euclidean", (("derivative", "2", "3"),),
               "a third pass on what the second left: rounding"),
    Equivalent("birkhoff._tangent", (("module", "1e-37", "2e-37"),),
               "the least weight: below every weight that matters"),
    Equivalent("birkhoff._tangent", (("solve_flows", "0", "1"),), "the other axis of a square"),
)  # fmt: skip


def reason(module: str, where: str, before: str, after: str) -> str | None:
    """Return the argument for a mutant, or ``None``."""
    for entry in EQUIVALENT:
        if entry.module == module and (where, before, after) in entry.changes:
            return entry.why
    return None

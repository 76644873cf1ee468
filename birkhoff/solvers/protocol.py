"""What a solver is: an immutable value with three methods that one loop drives."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import math
from collections.abc import Iterator
from functools import cache
from typing import Any, ClassVar, Literal, Protocol, cast

from birkhoff._checks import as_count, as_real
from birkhoff._layout import Frame
from birkhoff.errors import OptionError

__all__ = ["First", "Solver", "TracedSolver", "check_options", "from_text", "to_text"]

First = Literal["columns", "rows"]


class Solver(Protocol):
    """A method of projection: ``init``, then ``step`` up to ``num_iters`` times, then ``matrix``.

    States are tuples of three-dimensional arrays that broadcast against the stack of matrices in the given frame, so
    that the loop can freeze the matrices that have converged.
    """

    method: ClassVar[str]

    @property
    def num_iters(self) -> int:
        """Iterations to run, or the limit with ``tol``."""

    @property
    def tol(self) -> float | None:
        """Largest accepted error of the first-normalised side, or None for a fixed number of iterations."""

    @property
    def first(self) -> First:
        """The side normalised first; the other one is exact at the end."""

    def init(self, logits: Any, frame: Frame) -> tuple[Any, ...]:
        """State before the first iteration."""

    def step(self, state: tuple[Any, ...], frame: Frame) -> tuple[Any, ...]:
        """One full iteration."""

    def matrix(self, state: tuple[Any, ...], frame: Frame) -> Any:
        """The matrix of a state, its last-normalised side exact."""


class TracedSolver(Solver, Protocol):
    """A solver whose every half step divides a positive matrix by its sums, which gives it an exact adjoint.

    Tangents are computed without a look at the values, by the arithmetic for any range: a solver that leaves that to
    another one (the last of its ``arithmetics``) needs neither ``push_start`` nor ``pull_start_tangent``.
    """

    def trajectory(self, logits: Any, frame: Frame) -> Iterator[tuple[Any, int, float]]:
        """Yield (normalised matrix, axis of its sums, relaxation weight) for each half step."""

    def pull_start(self, logits: Any, grad_log: Any, frame: Frame) -> Any:
        """Gradient with respect to the logits, from the one with respect to the log of the first matrix."""

    def pull_start_tangent(self, logits: Any, grad_log: Any, tangent: Any, grad_tangent: Any, frame: Frame) -> Any:
        """Tangent of :meth:`pull_start` as logits move along ``tangent`` and ``grad_log`` along ``grad_tangent``."""

    def push_start(self, logits: Any, tangent: Any, frame: Frame) -> Any:
        """Tangent of the log of the first matrix, from the one of the logits."""


def check_options(solver: Any) -> None:
    """Make numbers Python's own, and raise :class:`OptionError` for what no solver accepts; ends every construction."""
    name = type(solver).__name__
    object.__setattr__(solver, "num_iters", as_count(solver.num_iters, f"{name}: num_iters", least=1))
    for option in [o for o in ("tol", "range_cap", "relaxation", "eps_start", "eps_den") if hasattr(solver, o)]:
        value = getattr(solver, option)
        left_out = value is None and option in ("tol", "range_cap")
        if type(value) is not float and not left_out:  # a scalar of an array library has another text
            object.__setattr__(solver, option, as_real(value, f"{name}: {option}"))
    if solver.tol is not None and not 0.0 < solver.tol < math.inf:
        raise OptionError(f"{name}: tol must be None (always run num_iters) or a number > 0, got {solver.tol!r}")
    if solver.first not in ("columns", "rows"):
        raise OptionError(f"{name}: first must be 'columns' or 'rows', got {solver.first!r}")
    range_cap = getattr(solver, "range_cap", None)
    if range_cap is not None and not 0.0 < range_cap < math.inf:
        raise OptionError(f"{name}: range_cap must be None or a number > 0, got {range_cap!r}")
    object.__setattr__(solver, "_text", _write(solver))  # written once: a tracer may turn the numbers into symbols


def to_text(solver: Any) -> str:
    """A solver as ``"package.module:Class(field=value, ...)"``, for the schema of a registered operator."""
    text: str | None = getattr(solver, "_text", None)
    return _write(solver) if text is None else text


def _write(solver: Any) -> str:
    fields = ", ".join([f"{field.name}={getattr(solver, field.name)!r}" for field in dataclasses.fields(solver)])
    return f"{type(solver).__module__}:{type(solver).__name__}({fields})"


@cache
def from_text(text: str) -> Any:
    """The solver that :func:`to_text` wrote down."""
    module, _, call = text.partition(":")
    parsed = cast(ast.Call, ast.parse(call, mode="eval").body)
    kind = getattr(importlib.import_module(module), ast.unparse(parsed.func))
    return kind(**{str(keyword.arg): ast.literal_eval(keyword.value) for keyword in parsed.keywords})

"""Tables of implementations: rows are data, targets are dotted strings, and a refusal gives its reason.

``Row`` and ``Table`` know nothing of projections; :mod:`mhc_layers` has a table of its own. A target is imported when
it is first chosen, so a table costs nothing and names packages that need not be installed.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Generic, TypeVar

__all__ = ["PROJECTIONS", "Facts", "Refusal", "Resolution", "Row", "Table", "installed", "load", "no_cuda_compiler"]

F = TypeVar("F")


@cache
def load(target: str) -> Any:
    """Import ``"package.module:attribute"``."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


@cache
def installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


@dataclass(frozen=True, kw_only=True)
class Row(Generic[F]):
    """One implementation.

    Attributes
    ----------
    name : str
        What reports and :func:`birkhoff.explain` call it.
    targets : mapping of str to str
        Role (``"forward"``, ``"backward"``, ...) to ``"package.module:attribute"``. Empty for the plain path that the
        reader of the table holds itself.
    refuse : callable
        Takes the facts of a call; returns None if this row can serve it, else the reason in a few words.
    note : str
        What it is, for the capability table.
    """

    name: str
    targets: Mapping[str, str]
    refuse: Callable[[F], str | None]
    note: str = ""

    def load(self, role: str) -> Any:
        """Import the target of a role."""
        return load(self.targets[role])

    def __hash__(self) -> int:
        return hash(self.name)


@dataclass(frozen=True)
class Refusal:
    """A row that cannot serve a call, and why."""

    row: str
    reason: str


@dataclass(frozen=True)
class Resolution(Generic[F]):
    """The chosen row, and the rows before it that refused."""

    facts: F
    row: Row[F]
    refusals: tuple[Refusal, ...] = ()

    def __str__(self) -> str:
        lines = [f"chosen: {self.row.name}" + (f" ({self.row.note})" if self.row.note else "")]
        lines += [f"refused: {refusal.row}: {refusal.reason}" for refusal in self.refusals]
        return "\n".join(lines)


@dataclass(frozen=True)
class Table(Generic[F]):
    """Rows in order of preference; the last one must accept every call.

    Parameters
    ----------
    name : str
        What the table chooses.
    rows : tuple of Row
    """

    name: str
    rows: tuple[Row[F], ...]
    _chosen: dict[F, Resolution[F]] = field(default_factory=dict, compare=False, repr=False)

    def resolve(self, facts: F) -> Resolution[F]:
        """The first row that does not refuse ``facts`` (hashable). Remembered."""
        found = self._chosen.get(facts)
        if found is None:
            found = self._chosen[facts] = self._walk(facts)
        return found

    def _walk(self, facts: F) -> Resolution[F]:
        refusals: list[Refusal] = []
        for row in self.rows:
            reason = row.refuse(facts)
            if reason is None:
                return Resolution(facts, row, tuple(refusals))
            refusals.append(Refusal(row.name, reason))
        reasons = "; ".join(f"{refusal.row}: {refusal.reason}" for refusal in refusals)
        raise LookupError(f"no implementation in the table {self.name!r} serves {facts}: {reasons}")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The static facts of a projection that its implementation is chosen by. No data, no batch size."""

    method: str
    library: str
    device: str
    dtype: str
    n: int
    precision: tuple[str, str, str]
    to_tolerance: bool = False
    relaxed: bool = False


_SINKHORN = ("knopp", "log", "damped")
_KERNEL_DTYPES = ("float32", "float64", "bfloat16", "float16")


def _fused(
    libraries: tuple[str, ...], missing: Callable[[], str | None], largest: int, *, methods: tuple[str, ...] = _SINKHORN
) -> Callable[[Facts], str | None]:
    """The conditions that every fused kernel has; the rows differ in libraries, packages, methods and largest n."""

    def reasons(facts: Facts) -> Iterator[str | None]:  # packages are looked for after what costs nothing to know
        compute = facts.dtype if facts.dtype == "float64" else "float32"
        if facts.library not in libraries:
            yield f"serves arrays of {' and '.join(libraries)}, got {facts.library}"
        if facts.device != "cuda":
            yield f"needs a CUDA device, got {facts.device}"
        if facts.method not in methods:
            yield f"has no kernel for the method {facts.method!r}"
        if facts.to_tolerance and methods is _SINKHORN:
            yield "runs a fixed number of iterations, and tol was given"
        if facts.relaxed:
            yield "has no over-relaxation"
        if facts.dtype not in _KERNEL_DTYPES:
            yield f"has no kernel for {facts.dtype}"
        if not 1 <= facts.n <= largest:
            yield f"keeps a matrix in registers up to n = {largest}, got n = {facts.n}"
        if facts.precision != (compute, compute, facts.dtype):
            yield f"computes and sums in {compute} and stores {facts.dtype}; other precisions were asked for"
        yield missing()

    return lambda facts: next(reasons(facts))


def _no_triton() -> str | None:
    return None if installed("triton") else "the package triton is not installed"


def no_cuda_compiler() -> str | None:
    """Why CUDA C++ cannot be compiled here, or None if it can."""
    available = load("birkhoff.kernels.cuda.compiler:available")
    return None if available() else "needs cupy or cuda-bindings to compile CUDA C++"


PROJECTIONS: Table[Facts] = Table(
    "projections",
    (
        Row(
            name="cuda",
            targets={
                "forward": "birkhoff.kernels.cuda.sinkhorn:sinkhorn_forward",
                "backward": "birkhoff.kernels.cuda.sinkhorn:sinkhorn_backward",
            },
            refuse=_fused(("torch", "cupy"), no_cuda_compiler, 32),
            note="fused CUDA C++ kernel, compiled at run time",
        ),
        Row(
            name="triton",
            targets={
                "forward": "birkhoff.kernels.triton.sinkhorn:sinkhorn_forward",
                "backward": "birkhoff.kernels.triton.sinkhorn:sinkhorn_backward",
            },
            refuse=_fused(("torch",), _no_triton, 32),
            note="fused Triton kernel",
        ),
        Row(
            name="triton-newton",
            targets={"to_tolerance": "birkhoff.kernels.triton.newton:newton_forward"},
            refuse=_fused(("torch",), _no_triton, 8, methods=("newton",)),
            note="fused Triton kernel, each matrix to its tolerance",
        ),
        Row(
            name="array",
            targets={},
            refuse=lambda facts: None,
            note="standard array calls",
        ),
    ),
)

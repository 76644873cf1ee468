"""What is mutated, and what is tried on its mutants."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROOT", "TARGETS", "Target"]

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Target:
    """One module: what claims are tried on its mutants, and which tests (those whose name holds ``chosen``)."""

    module: str
    solvers: tuple[str, ...]
    systems: bool
    tests: tuple[str, ...]
    chosen: str = ""

    @property
    def path(self) -> Path:
        """Where its source is."""
        return ROOT / (self.module.replace(".", "/") + ".py")


_ALL = ("SinkhornKnopp", "SinkhornLog", "SinkhornDamped", "Newton", "Euclidean")
_SURVIVORS = ("tests/mutation/test_survivors.py",)
_SOLVERS = (
    *_SURVIVORS,
    "tests/birkhoff/test_solvers.py",
    "tests/birkhoff/test_project.py",
    "tests/birkhoff/test_adjoints.py",
    "tests/birkhoff/test_errors.py",
    "tests/contracts/test_solvers.py",
    "tests/contracts/test_oracle.py",
)
_NEWTON = ("tests/birkhoff/test_newton.py", *_SOLVERS)
_EUCLIDEAN = ("tests/birkhoff/test_euclidean.py", *_SOLVERS)

_CERTIFICATES = ("tests/birkhoff/test_certificate_formulas.py", "tests/birkhoff/test_certificates.py")
_LIBRARIES = "not strict and not torch- and not is_quick"  # NumPy is enough: the libraries run the same lines


def _only(name: str) -> str:
    others = " or ".join(other for other in _ALL if other != name)
    return f"{_LIBRARIES} and not ({others})"


TARGETS: tuple[Target, ...] = (
    Target("birkhoff.solvers.sinkhorn_knopp", ("SinkhornKnopp",), False, _SOLVERS, _only("SinkhornKnopp")),
    Target("birkhoff.solvers.sinkhorn_log", ("SinkhornLog",), False, _SOLVERS, _only("SinkhornLog")),
    Target("birkhoff.solvers.sinkhorn_damped", ("SinkhornDamped",), False, _SOLVERS, _only("SinkhornDamped")),
    Target("birkhoff.solvers.newton", ("Newton",), False, _NEWTON, _only("Newton")),
    Target("birkhoff.solvers.euclidean", ("Euclidean",), False, _EUCLIDEAN, _only("Euclidean")),
    Target("birkhoff.solvers.range_cap", ("SinkhornKnopp", "SinkhornDamped"), False, _SOLVERS, _LIBRARIES),
    Target("birkhoff.solvers.protocol", ("SinkhornKnopp",), False, _SOLVERS, _LIBRARIES),
    Target("birkhoff._math", _ALL, False, _NEWTON, "not torch- and not is_quick"),
    Target("birkhoff._tangent", ("Newton",), False, _NEWTON, _only("Newton")),
    Target("birkhoff._elimination", ("Euclidean",), False, _EUCLIDEAN, _only("Euclidean")),
    Target("birkhoff.certificates", (), True, (*_SURVIVORS, *_CERTIFICATES)),
    Target("birkhoff.rounding", (), True, (*_SURVIVORS, "tests/birkhoff/test_rounding.py")),
)

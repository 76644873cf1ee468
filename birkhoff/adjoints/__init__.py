"""Gradient rules, apart from the solvers: pass one as ``adjoint=`` to :func:`birkhoff.project`, or call its ``vjp``."""

from birkhoff.adjoints.implicit import Implicit
from birkhoff.adjoints.unrolled import Unrolled

__all__ = ["Implicit", "Unrolled"]

"""Methods of projection, each an immutable value: pass one to :func:`birkhoff.project`.

Everything that must hold for every method (contract tests, claims, benchmarks) iterates over ``__all__``.
"""

from birkhoff.solvers.euclidean import Euclidean
from birkhoff.solvers.newton import Newton
from birkhoff.solvers.sinkhorn_damped import SinkhornDamped
from birkhoff.solvers.sinkhorn_knopp import SinkhornKnopp
from birkhoff.solvers.sinkhorn_log import SinkhornLog

__all__ = ["Euclidean", "Newton", "SinkhornDamped", "SinkhornKnopp", "SinkhornLog"]

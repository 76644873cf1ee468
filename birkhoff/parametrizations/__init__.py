"""Maps that are doubly stochastic (or half of it, or orthogonal) by construction: nothing iterates.

Each is a frozen class with ``num_parameters(n)``, ``initial_parameters(n)`` near the identity, and
``matrix(parameters, n)``. Everything that must hold for all of them iterates over ``__all__``.
"""

from birkhoff.parametrizations.cayley import Cayley
from birkhoff.parametrizations.circulant import Circulant
from birkhoff.parametrizations.identity import Identity
from birkhoff.parametrizations.kronecker import Kronecker
from birkhoff.parametrizations.orthostochastic import Orthostochastic
from birkhoff.parametrizations.permutations import Permutations
from birkhoff.parametrizations.stochastic import ColumnStochastic, RowStochastic

__all__ = [
    "Cayley",
    "Circulant",
    "ColumnStochastic",
    "Identity",
    "Kronecker",
    "Orthostochastic",
    "Permutations",
    "RowStochastic",
]

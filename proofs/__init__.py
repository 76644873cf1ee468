"""Claims about doubly stochastic projections and the layers built on them, and the means to check them on any code.

Command: ``python -m proofs`` prints the table of claims for this library, ``python -m proofs --projection
pkg.module:function`` for yours. In tests: ``from proofs import claims, strategies``. Importing the package itself
loads neither Hypothesis nor NumPy, because the pytest plugin lives in it.
"""

__all__ = ["claims", "strategies"]

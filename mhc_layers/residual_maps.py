"""What may stand in for the projection of the residual logits: constructions, other solvers, and no constraint at all.

Every map has the interface of the parametrizations of birkhoff: ``num_parameters(n)``,
``initial_parameters(n, mass=...)`` and ``matrix(parameters (..., k), n) -> (..., n, n)``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

import birkhoff
from birkhoff import parametrizations, solvers
from birkhoff._project import matrix as solve

__all__ = ["Free", "ResidualMap", "Solved", "Tanh", "get_res_map", "res_map_names"]


class ResidualMap(Protocol):
    """From k numbers for each token to the operator ``(..., n, n)`` that acts from the left."""

    def num_parameters(self, n: int) -> int:
        """Length k of the parameter axis."""

    def initial_parameters(self, n: int, *, mass: float = 0.01) -> np.ndarray:
        """Parameters near the identity: about ``mass`` of each row lies off the diagonal."""

    def matrix(self, parameters: Any, n: int) -> Any:
        """The operators of a batch of parameters."""


@dataclasses.dataclass(frozen=True)
class Free:
    """The parameters are the operator: no constraint, as in Hyper-Connections without tanh.

    Examples
    --------
    >>> import torch
    >>> from mhc_layers.residual_maps import Free
    >>> Free().matrix(torch.tensor([1.0, 2.0, 3.0, 4.0]), 2)
    tensor([[1., 2.],
            [3., 4.]])
    """

    sums: ClassVar[str] = "none"

    def num_parameters(self, n: int) -> int:
        """``n * n``."""
        return n * n

    def initial_parameters(self, n: int, *, mass: float = 0.01) -> np.ndarray:
        """The identity, exactly; ``mass`` is not used."""
        return np.eye(n).ravel()

    def matrix(self, parameters: Tensor, n: int) -> Tensor:
        """The parameters, as a matrix."""
        return parameters.unflatten(-1, (n, n))


@dataclasses.dataclass(frozen=True)
class Tanh:
    """``I + tanh(parameters)``: a bounded free map around the identity.

    Examples
    --------
    >>> import torch
    >>> from mhc_layers.residual_maps import Tanh
    >>> Tanh().matrix(torch.zeros(4), 2)
    tensor([[1., 0.],
            [0., 1.]])
    """

    sums: ClassVar[str] = "none"

    def num_parameters(self, n: int) -> int:
        """``n * n``."""
        return n * n

    def initial_parameters(self, n: int, *, mass: float = 0.01) -> np.ndarray:
        """Zeros: the identity; ``mass`` is not used."""
        return np.zeros(n * n)

    def matrix(self, parameters: Tensor, n: int) -> Tensor:
        """The operators of parameters ``(..., n * n)``."""
        eye = torch.eye(n, dtype=parameters.dtype, device=parameters.device)
        return eye + torch.tanh(parameters).unflatten(-1, (n, n))


@dataclasses.dataclass(frozen=True)
class Solved:
    """A solver of :mod:`birkhoff.solvers` in place of the convention's own.

    Parameters
    ----------
    solver : object
        For example ``birkhoff.solvers.SinkhornKnopp(num_iters=50)``.
    finish : {"none", "nonexpansive", "exact"}
        What :func:`birkhoff.project` does after the solver.
    """

    solver: Any
    finish: Literal["none", "nonexpansive", "exact"] = "none"
    sums: ClassVar[str] = "none"

    def num_parameters(self, n: int) -> int:
        """``n * n`` logits."""
        return n * n

    def initial_parameters(self, n: int, *, mass: float = 0.01) -> np.ndarray:
        """Logits of a matrix with ``1 - mass`` on the diagonal."""
        if n == 1:
            return np.zeros(1)
        return (math.log(mass / (1.0 - mass) / (n - 1)) * (1.0 - np.eye(n))).ravel()

    def matrix(self, parameters: Tensor, n: int) -> Tensor:
        """The projections of logits ``(..., n * n)``."""
        logits = parameters.unflatten(-1, (n, n))
        if self.finish == "none":
            return solve(logits, self.solver)
        return birkhoff.project(logits, self.solver, finish=self.finish).matrix


def res_map_names() -> tuple[str, ...]:
    """Names that :func:`get_res_map` accepts."""
    return (*parametrizations.__all__, *solvers.__all__, "Free", "Tanh")


def get_res_map(res_map: Any) -> ResidualMap | None:
    """Return a residual map: by name, from a solver, or as it is.

    Parameters
    ----------
    res_map : str, solver, ResidualMap or None
        A class name of :mod:`birkhoff.parametrizations` or :mod:`birkhoff.solvers`, "Free", "Tanh"; an object of
        these; None stays None.

    Raises
    ------
    ValueError
        If the name is unknown.
    TypeError
        If an object is neither a map nor a solver.

    Examples
    --------
    >>> from mhc_layers.residual_maps import get_res_map
    >>> get_res_map("Permutations").num_parameters(4)
    24
    """
    if isinstance(res_map, str):
        if res_map not in res_map_names():
            raise ValueError(f"Unknown residual map {res_map!r}; accepted: {', '.join(res_map_names())}.")
        if res_map in parametrizations.__all__:
            return getattr(parametrizations, res_map)()
        if res_map in solvers.__all__:
            return Solved(getattr(solvers, res_map)())
        return Free() if res_map == "Free" else Tanh()
    if res_map is None or hasattr(res_map, "num_parameters"):
        return res_map
    if type(res_map).__name__ in solvers.__all__:
        return Solved(res_map)
    raise TypeError(
        f"A residual map needs num_parameters, initial_parameters and matrix, or is a solver of birkhoff.solvers; "
        f"got {type(res_map).__name__}."
    )

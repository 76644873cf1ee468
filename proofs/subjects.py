"""What claims are made of: a projection on a backend, together with what is known about it.

A claim reads these facts to decide whether it applies.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from proofs import model, strategies
from proofs._claim import Sample
from proofs.backends import Backend, Projector, backend, with_dtypes
from proofs.measure import accuracy_allowance, finish_allowance, limit_allowance, marginal_allowance

__all__ = [
    "Subject",
    "backend",
    "builtin_subjects",
    "load_function",
    "sinkhorn_subject",
    "solver_subject",
    "user_subject",
]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One projection on one backend, and what is known about it.

    Parameters
    ----------
    name : str
        Shown in reports.
    function : callable
        Array of logits (..., n, n) to its projection.
    backend : Backend
        Which arrays `function` takes and returns.
    last : {"rows", "columns"}
        The side that is normalised last, hence exact.
    num_iters : int or None
        Number of iterations (two normalisations each); ``None``: unknown, or converged.
    geometry : {"kl", "euclidean"}
        The distance that the projection minimises in the limit.
    converged : bool
        The result is the limit, not a truncated iterate.
    finish : {"none", "nonexpansive", "exact"}
        What was done to the result afterwards.
    eps : tuple of float or None
        ``(eps_start, eps_den)`` of a damped recurrence.
    sizes : tuple of int or None
        The n that it takes; ``None``: every n.
    one_by_one : bool
        It loops over the matrices of a stack, so that a large one would take minutes.
    effort : float
        Multiplies the number of examples of claims that take them one by one; below 1 for what is slow.
    project : callable or None
        Array to a full `birkhoff.Projection`.
    vjp : callable or None
        ``vjp(logits, grad_matrix)``; ``None``: no gradient is offered.
    tolerant : callable or None
        ``tolerant(tol)`` returns `project` stopping a matrix once its error is at most `tol`.
    implicit : callable or None
        ``implicit(logits, grad_matrix)``: the vector-Jacobian product of the limit at the result.
    rebuild : callable or None
        ``rebuild(num_iters=..., first=...)`` returns the same method with other options.
    elsewhere : callable or None
        ``elsewhere(backend)`` returns the same method on another backend.
    """

    name: str
    function: Projector = field(repr=False)
    backend: Backend = field(repr=False)
    last: str = "rows"
    num_iters: int | None = None
    geometry: str = "kl"
    converged: bool = False
    finish: str = "none"
    eps: tuple[float, float] | None = None
    sizes: tuple[int, ...] | None = None
    one_by_one: bool = False
    effort: float = 1.0
    project: Projector | None = field(default=None, repr=False)
    vjp: Callable[[Any, Any], Any] | None = field(default=None, repr=False)
    tolerant: Callable[[float], Projector] | None = field(default=None, repr=False)
    implicit: Callable[[Any, Any], Any] | None = field(default=None, repr=False)
    rebuild: Callable[..., Subject] | None = field(default=None, repr=False)
    elsewhere: Callable[[Backend], Subject] | None = field(default=None, repr=False)

    @property
    def first(self) -> str:
        """The side that is normalised first."""
        return "columns" if self.last == "rows" else "rows"

    @property
    def title(self) -> str:
        """Name and backend, for reports."""
        return f"{self.name} on {self.backend.name}"

    def array(self, sample: Sample) -> Any:
        """Return the sample's logits as an array of the backend."""
        return self.backend.asarray(sample.logits, sample.dtype)

    def matrix(self, sample: Sample) -> np.ndarray:
        """Project the sample; the result comes back in float64, converted exactly."""
        result = self.function(self.array(sample))
        shape = getattr(result, "shape", None)
        if shape is None:
            raise TypeError(f"it returned a {type(result).__name__}, not an array")
        if tuple(shape) != sample.logits.shape:
            raise ValueError(f"it returned shape {tuple(shape)} for logits of shape {sample.logits.shape}")
        return self.backend.asnumpy(result)

    def side_allowance(self, sample: Sample) -> float:
        """Return how far the sums of the side that is exact may be from 1."""
        allowance = finish_allowance if self.finish == "exact" else marginal_allowance
        return allowance(sample.logits.shape[-1], sample.dtype)

    def agreement_allowance(self, *samples: Sample) -> np.ndarray:
        """Return how far two results that approximate one matrix may be apart, shape (B, 1, 1).

        Each run may miss it by the accuracy contract of its sample (one sample stands for both runs); four times that
        where there is more than the iteration, a finish or the Euclidean distance; and a limit is known to its
        tolerance only.
        """
        one, other = samples[0], samples[-1]
        contract = accuracy_allowance(one.logits, one.dtype) + accuracy_allowance(other.logits, other.dtype)
        factor = 1.0 if self.finish == "none" and self.geometry == "kl" else 4.0
        tolerance = limit_allowance(one.logits.shape[-1]) if self.converged else 0.0
        return (factor * contract + tolerance)[:, None, None]

    def gradient(self, sample: Sample, grad: np.ndarray) -> np.ndarray:
        """Return the vector-Jacobian product at the sample, in float64."""
        if self.vjp is None:
            raise NotImplementedError(f"{self.title} offers no gradient")
        return self.backend.asnumpy(self.vjp(self.array(sample), self.backend.asarray(grad, sample.dtype)))

    def at(self, num_iters: int) -> Subject:
        """Return the same method with another number of iterations."""
        if self.rebuild is None:
            raise NotImplementedError(f"the number of iterations of {self.title} is not ours to choose")
        return self.rebuild(num_iters=num_iters, first=self.first)

    def dual(self) -> Subject:
        """Return the same method with rows and columns exchanged."""
        if self.rebuild is None:
            raise NotImplementedError(f"the order of {self.title} is not ours to choose")
        return self.rebuild(num_iters=self.num_iters, first=self.last)

    def tangent(self, logits: np.ndarray, direction: np.ndarray) -> np.ndarray:
        """Return the directional derivative of :meth:`model`, in extended precision."""
        if self.num_iters is None:
            raise NotImplementedError(f"the number of iterations of {self.title} is unknown")
        if self.eps is not None:
            return model.damped_derivative(logits, direction, self.num_iters, *self.eps, first=self.first)
        return model.derivative(logits, direction, self.num_iters, self.first)

    def model(self, logits: np.ndarray) -> np.ndarray:
        """Return what the method computes on exact reals: extended precision, same number of iterations."""
        if self.num_iters is None:
            raise NotImplementedError(f"the number of iterations of {self.title} is unknown")
        if self.eps is not None:
            return model.damped_iterate(logits, self.num_iters, *self.eps, first=self.first)
        return model.iterate(logits, self.num_iters, self.first)


def load_function(spec: str) -> Projector:
    """Import ``"package.module:function"``; ``ValueError`` says what is wrong with the text.

    >>> from proofs.subjects import load_function
    >>> load_function("math:exp")(0.0)
    1.0
    """
    module_name, separator, attribute = spec.partition(":")
    if not separator or not module_name or not attribute:
        raise ValueError(f"got {spec!r}; a projection is given as package.module:function, e.g. mylib.layers:sinkhorn")
    try:
        target: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"cannot import {module_name!r} ({error}); run from the folder that holds it, or install it"
        ) from error
    except (Exception, SystemExit) as error:  # a module runs what its author wrote
        raise ValueError(f"importing {module_name!r} raised {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(target, part):
            raise ValueError(f"{module_name!r} has no attribute {attribute!r}")
        target = getattr(target, part)
    return target


def user_subject(
    function: Projector,
    *,
    name: str,
    last: str = "rows",
    backend_name: str = "numpy",
    num_iters: int | None = None,
    dtypes: Sequence[str] | None = None,
    sizes: Sequence[int] | None = None,
) -> Subject:
    """Wrap anybody's function, so that claims can be tried on it.

    Parameters
    ----------
    function : callable
        Array (..., n, n) of logits to an array of the same kind, shape and dtype. An attribute ``one_by_one = True``
        says that it loops over the matrices of a stack.
    name : str
        Shown in reports.
    last : {"rows", "columns"}
        The side that it normalises last.
    backend_name : str
        Which arrays it takes: a name that ``--backend`` takes.
    num_iters : int, optional
        Compare it with that many exact iterations as well.
    dtypes : sequence of str, optional
        Try only these of the backend's.
    sizes : sequence of int, optional
        Try only these n.

    Raises
    ------
    ValueError
        It cannot be called with one array, or an option is none of those above.

    Examples
    --------
    >>> import numpy as np
    >>> from proofs import claims, runner, subjects
    >>> def uniform(logits):
    ...     return np.full_like(logits, 1 / logits.shape[-1])
    >>> subject = subjects.user_subject(uniform, name="uniform")
    >>> runner.run_claim(claims.by_name("last_side_exact"), subject, runner.PROFILES["quick"]).verdict
    'holds'
    >>> runner.run_claim(claims.by_name("doubly_stochastic_is_fixed"), subject, runner.PROFILES["quick"]).verdict
    'broken'
    """
    _refuse_other_calls(function, name)
    if last not in ("rows", "columns"):
        raise ValueError(f"last = {last!r}; give 'rows' or 'columns': the side that is normalised last")
    if num_iters is not None and num_iters < 1:
        raise ValueError(f"num_iters = {num_iters}; give 1 or more")
    known = strategies.SIZES
    if sizes is not None and not (isinstance(sizes, Sequence) and sizes and set(sizes) <= set(known)):
        raise ValueError(f"sizes = {sizes!r}; give some of {', '.join(map(str, known))}")
    chosen = backend(backend_name) if dtypes is None else with_dtypes(backend(backend_name), dtypes)
    vjp = (lambda logits, grad: chosen.autograd(function, logits, grad)) if chosen.differentiates else None
    return Subject(
        name=name,
        function=function,
        backend=chosen,
        last=last,
        num_iters=num_iters,
        sizes=None if sizes is None else tuple(sizes),
        one_by_one=bool(getattr(function, "one_by_one", False)),
        vjp=vjp,
    )


def _refuse_other_calls(function: Any, name: str) -> None:
    """A projection takes one array; what a signature cannot say, the first claim finds out."""
    if not callable(function):
        raise ValueError(f"{name} is a {type(function).__name__}, not a function of an array of logits")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions of compiled modules have none
        return
    try:
        signature.bind(None)
    except TypeError as error:
        raise ValueError(f"{name}{signature} cannot be called with one array of logits: {error}") from None


def builtin_subjects(backend_names: Sequence[str], solver_names: Sequence[str] | None = None) -> list[Subject]:
    """Return every solver of ``birkhoff.solvers.__all__`` on every named backend, the finishes, `birkhoff.sinkhorn`."""
    solvers = importlib.import_module("birkhoff.solvers")
    wanted = list(solvers.__all__) if solver_names is None else list(solver_names)
    unknown = [name for name in wanted if name not in solvers.__all__]
    if unknown:
        raise ValueError(f"unknown solvers {unknown}; birkhoff.solvers has {', '.join(solvers.__all__)}")
    found = []
    for backend_name in backend_names:
        chosen = backend(backend_name)
        for name in wanted:
            found.append(solver_subject(getattr(solvers, name)(), chosen))
        if solver_names is None:
            for finish in ("nonexpansive", "exact"):
                found.append(solver_subject(solvers.SinkhornLog(), chosen, finish=finish))
            found.append(sinkhorn_subject(chosen))
    return found


def sinkhorn_subject(chosen: Backend, num_iters: int = 20, first: str = "columns") -> Subject:
    """Wrap `birkhoff.sinkhorn`, which returns the matrix alone, on one backend."""
    birkhoff = importlib.import_module("birkhoff")

    def function(logits: Any) -> Any:
        with chosen.kernels():
            return birkhoff.sinkhorn(logits, num_iters, first=first)

    def automatic(logits: Any, grad: Any) -> Any:
        return chosen.autograd(function, logits, grad)

    def rebuild(*, num_iters: int | None, first: str) -> Subject:
        return sinkhorn_subject(chosen, 20 if num_iters is None else num_iters, first)

    return Subject(
        name="sinkhorn",
        function=function,
        backend=chosen,
        last="columns" if first == "rows" else "rows",
        num_iters=num_iters,
        vjp=automatic if chosen.differentiates else None,
        rebuild=rebuild,
        elsewhere=lambda other: sinkhorn_subject(other, num_iters, first),
    )


def solver_subject(solver: Any, chosen: Backend, *, finish: str = "none") -> Subject:
    """Wrap one solver of the library on one backend."""
    birkhoff = importlib.import_module("birkhoff")
    name = type(solver).__name__
    converged = name in ("Newton", "Euclidean")

    def project(logits: Any, tol: float | None = solver.tol) -> Any:
        with chosen.kernels():
            return birkhoff.project(logits, replace(solver, tol=tol), finish=finish)

    def function(logits: Any) -> Any:
        return project(logits).matrix

    def rebuild(*, num_iters: int | None, first: str) -> Subject:
        options = {"first": first} if num_iters is None else {"first": first, "num_iters": num_iters}
        return solver_subject(replace(solver, **options), chosen, finish=finish)

    def unrolled(logits: Any, grad: Any) -> Any:
        adjoint = importlib.import_module("birkhoff.adjoints.unrolled").Unrolled()
        with chosen.kernels():
            return adjoint.vjp(logits, grad, solver)

    def implicit(logits: Any, grad: Any) -> Any:
        adjoint = importlib.import_module("birkhoff.adjoints.implicit").Implicit()
        with chosen.kernels():
            return adjoint.vjp(logits, grad, solver)

    def automatic(logits: Any, grad: Any) -> Any:
        return chosen.autograd(function, logits, grad)

    offers_gradient = chosen.differentiates or (finish == "none" and not converged)
    return Subject(
        name=name if finish == "none" else f"{name}+{finish}",
        function=function,
        backend=chosen,
        last="columns" if solver.first == "rows" else "rows",
        num_iters=None if converged else solver.num_iters,
        geometry="euclidean" if name == "Euclidean" else "kl",
        converged=converged,
        effort=0.25 if name == "Euclidean" else 1.0,
        finish=finish,
        eps=(solver.eps_start, solver.eps_den) if name == "SinkhornDamped" else None,
        project=project,
        tolerant=(lambda tol: lambda logits: project(logits, tol)) if finish == "none" else None,
        implicit=implicit if finish == "none" else None,
        vjp=(automatic if chosen.differentiates else unrolled) if offers_gradient else None,
        rebuild=rebuild,
        elsewhere=lambda other: solver_subject(solver, other, finish=finish),
    )

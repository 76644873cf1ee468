"""What claims are made of: projections on a backend, and the library's certificates, roundings and decompositions.

A :class:`Backend` turns NumPy values into another library's arrays and back. A :class:`Subject` is one projection on
one backend together with what is known about it; a claim reads these facts to decide whether it applies.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from proofs import model, strategies
from proofs._claim import Sample

__all__ = [
    "BACKENDS",
    "Backend",
    "Subject",
    "backend",
    "builtin_subjects",
    "installed_backends",
    "load_function",
    "user_subject",
    "with_dtypes",
]

Projector = Callable[[Any], Any]


class Backend:
    """NumPy in and out; the base class of the others."""

    name = "numpy"
    module = "numpy"
    dtypes: tuple[str, ...] = ("float64", "float32")
    halves: tuple[str, ...] = ("float16",)

    def missing(self) -> str | None:
        """Return why this backend cannot run here, or ``None``."""
        return None if importlib.util.find_spec(self.module) else f"{self.module} is not installed"

    def asarray(self, values: np.ndarray, dtype: str) -> Any:
        """Return `values` as this library's array of `dtype` in C order; never shares memory with the argument."""
        return np.array(values, dtype=dtype, order="C")

    def asnumpy(self, array: Any) -> np.ndarray:
        """Return the values in float64."""
        return np.asarray(array).astype(np.float64)

    def dtype_name(self, array: Any) -> str:
        """Return ``"float32"`` and the like."""
        return str(array.dtype).rsplit(".", maxsplit=1)[-1]

    def is_native(self, array: Any) -> bool:
        """Whether `array` is of this library, on the device that :meth:`asarray` uses."""
        return isinstance(array, np.ndarray)

    def layouts(self, values: np.ndarray, dtype: str) -> dict[str, Any]:
        """Return the same values in the memory layouts that this library knows."""
        return {name: strategies.layout(self.asarray(values, dtype), name) for name in strategies.LAYOUTS}

    def autograd(self, function: Projector, logits: Any, grad: Any) -> Any:
        """Return the vector-Jacobian product by the library's own differentiation."""
        raise NotImplementedError(f"{self.name} has no automatic differentiation")

    def second(self, function: Projector, logits: Any, grad: Any, direction: Any) -> Any:
        """Return the gradient of <vjp(logits, grad), direction> with respect to the logits: double backward."""
        raise NotImplementedError(f"{self.name} has no automatic differentiation")

    @property
    def differentiates(self) -> bool:
        """Whether :meth:`autograd` works."""
        return False


class StrictBackend(Backend):
    """array-api-strict: the standard and nothing else."""

    name = "array_api_strict"
    module = "array_api_strict"
    halves = ()

    def asarray(self, values: np.ndarray, dtype: str) -> Any:
        strict = importlib.import_module("array_api_strict")
        return strict.asarray(np.array(values, dtype=dtype, order="C"), copy=True)

    def is_native(self, array: Any) -> bool:
        return type(array).__module__.startswith("array_api_strict")

    def layouts(self, values: np.ndarray, dtype: str) -> dict[str, Any]:
        return {"contiguous": self.asarray(values, dtype)}


class TorchBackend(Backend):
    """PyTorch on one device."""

    name = "torch"
    module = "torch"
    device = "cpu"
    halves = ("float16", "bfloat16")

    def asarray(self, values: np.ndarray, dtype: str) -> Any:
        torch = importlib.import_module("torch")
        return torch.from_numpy(np.array(values, order="C")).to(device=self.device, dtype=getattr(torch, dtype))

    def asnumpy(self, array: Any) -> np.ndarray:
        torch = importlib.import_module("torch")
        return array.detach().to(dtype=torch.float64).cpu().numpy()

    def is_native(self, array: Any) -> bool:
        return type(array).__module__.startswith("torch") and array.device.type == self.device

    def layouts(self, values: np.ndarray, dtype: str) -> dict[str, Any]:
        base = self.asarray(values, dtype)
        size = base.shape[-1]
        wide = base.new_full((*base.shape[:-1], 2 * size), float("nan"))
        wide[..., ::2] = base
        return {
            "contiguous": base,
            "transposed": base.mT.contiguous().mT,
            "strided": wide[..., ::2],
            "batch_last": base.movedim(0, -1).contiguous().movedim(-1, 0),
        }

    def autograd(self, function: Projector, logits: Any, grad: Any) -> Any:
        torch = importlib.import_module("torch")
        with torch.enable_grad():
            leaf = logits.detach().clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(function(leaf), leaf, grad)
        return gradient

    def second(self, function: Projector, logits: Any, grad: Any, direction: Any) -> Any:
        torch = importlib.import_module("torch")
        with torch.enable_grad():
            leaf = logits.detach().clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(function(leaf), leaf, grad, create_graph=True)
            (second,) = torch.autograd.grad((gradient * direction).sum(), leaf)
        return second

    @property
    def differentiates(self) -> bool:
        return True


class TritonBackend(TorchBackend):
    """PyTorch on a CUDA device, where the Triton rows of the library's table apply."""

    name = "triton"
    module = "triton"
    device = "cuda"

    def missing(self) -> str | None:
        if importlib.util.find_spec("torch") is None:
            return "torch is not installed"
        if not importlib.import_module("torch").cuda.is_available():
            return "torch sees no CUDA device"
        return super().missing()


class CuPyBackend(Backend):
    """CuPy on the current device."""

    name = "cupy"
    module = "cupy"

    def missing(self) -> str | None:
        absent = super().missing()
        if absent:
            return absent
        try:
            count = importlib.import_module("cupy").cuda.runtime.getDeviceCount()
        except Exception as error:
            return f"cupy sees no CUDA device ({type(error).__name__})"
        return None if count else "cupy sees no CUDA device"

    def asarray(self, values: np.ndarray, dtype: str) -> Any:
        return importlib.import_module("cupy").array(np.array(values, dtype=dtype, order="C"))

    def asnumpy(self, array: Any) -> np.ndarray:
        return importlib.import_module("cupy").asnumpy(array).astype(np.float64)

    def is_native(self, array: Any) -> bool:
        return type(array).__module__.startswith("cupy")

    def layouts(self, values: np.ndarray, dtype: str) -> dict[str, Any]:
        cupy = importlib.import_module("cupy")
        base = self.asarray(values, dtype)
        wide = cupy.full((*base.shape[:-1], 2 * base.shape[-1]), cupy.nan, dtype=base.dtype)
        wide[..., ::2] = base
        return {
            "contiguous": base,
            "transposed": cupy.ascontiguousarray(base.swapaxes(-1, -2)).swapaxes(-1, -2),
            "strided": wide[..., ::2],
            "reversed": cupy.ascontiguousarray(base[..., ::-1, ::-1])[..., ::-1, ::-1],
        }


BACKENDS: dict[str, Backend] = {
    one.name: one for one in (Backend(), StrictBackend(), TorchBackend(), CuPyBackend(), TritonBackend())
}
"""Every backend that the claims know, by the name that ``--backend`` takes."""


def backend(name: str) -> Backend:
    """Return a backend by name; ``ValueError`` lists the names, or says what is missing on this machine."""
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    reason = BACKENDS[name].missing()
    if reason:
        raise ValueError(f"backend {name!r} cannot run here: {reason}")
    return BACKENDS[name]


def installed_backends() -> list[str]:
    """Return the names of the backends that can run on this machine.

    array-api-strict is left out: it runs NumPy's code slowly, and is tried when it is named.
    """
    return [name for name, one in BACKENDS.items() if one.missing() is None and not isinstance(one, StrictBackend)]


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
    project : callable or None
        Array to a full `birkhoff.Projection`.
    vjp : callable or None
        ``vjp(logits, grad_matrix)``; ``None``: no gradient is offered.
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
    project: Projector | None = field(default=None, repr=False)
    vjp: Callable[[Any, Any], Any] | None = field(default=None, repr=False)
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
        return self.backend.asnumpy(self.function(self.array(sample)))

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
    for part in attribute.split("."):
        if not hasattr(target, part):
            raise ValueError(f"{module_name!r} has no attribute {attribute!r}")
        target = getattr(target, part)
    if not callable(target):
        raise ValueError(f"{spec!r} is a {type(target).__name__}, not a function of an array of logits")
    return target


def with_dtypes(chosen: Backend, names: Sequence[str]) -> Backend:
    """Return the same backend, trying only these dtypes; ``ValueError`` lists those it has."""
    known = (*chosen.dtypes, *chosen.halves)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"dtypes {list(names)} on {chosen.name}; choose from {', '.join(known)}")
    narrowed = copy.copy(chosen)
    narrowed.dtypes = tuple(name for name in names if name in chosen.dtypes) or tuple(names)
    narrowed.halves = tuple(name for name in names if name in chosen.halves)
    return narrowed


def user_subject(
    function: Projector,
    *,
    name: str,
    last: str = "rows",
    backend_name: str = "numpy",
    num_iters: int | None = None,
    dtypes: Sequence[str] | None = None,
) -> Subject:
    """Wrap anybody's function.

    With `num_iters` it is also compared with the model of that many iterations; `dtypes` narrows what it is tried on.
    """
    if last not in ("rows", "columns"):
        raise ValueError(f"last = {last!r}; give 'rows' or 'columns': the side that is normalised last")
    chosen = backend(backend_name) if dtypes is None else with_dtypes(backend(backend_name), dtypes)
    vjp = (lambda logits, grad: chosen.autograd(function, logits, grad)) if chosen.differentiates else None
    return Subject(name=name, function=function, backend=chosen, last=last, num_iters=num_iters, vjp=vjp)


def builtin_subjects(backend_names: Sequence[str], solver_names: Sequence[str] | None = None) -> list[Subject]:
    """Return every solver of ``birkhoff.solvers.__all__`` on every named backend, and the two finishes."""
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
    return found


def solver_subject(solver: Any, chosen: Backend, *, finish: str = "none") -> Subject:
    """Wrap one solver of the library on one backend."""
    birkhoff = importlib.import_module("birkhoff")
    name = type(solver).__name__
    converged = name in ("Newton", "Euclidean")

    def project(logits: Any) -> Any:
        return birkhoff.project(logits, solver, finish=finish)

    def function(logits: Any) -> Any:
        return project(logits).matrix

    def rebuild(*, num_iters: int | None, first: str) -> Subject:
        options = {"first": first} if num_iters is None else {"first": first, "num_iters": num_iters}
        return solver_subject(replace(solver, **options), chosen, finish=finish)

    def unrolled(logits: Any, grad: Any) -> Any:
        adjoint = importlib.import_module("birkhoff.adjoints.unrolled").Unrolled()
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
        finish=finish,
        eps=(solver.eps_start, solver.eps_den) if name == "SinkhornDamped" else None,
        project=project,
        vjp=(automatic if chosen.differentiates else unrolled) if offers_gradient else None,
        rebuild=rebuild,
        elsewhere=lambda other: solver_subject(solver, other, finish=finish),
    )

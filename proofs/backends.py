"""The array libraries that claims are tried on: NumPy values become another library's arrays, and come back."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from proofs import strategies

__all__ = ["BACKENDS", "Backend", "Projector", "backend", "installed_backends", "with_dtypes"]

Projector = Callable[[Any], Any]


@functools.cache
def _table_without(names: tuple[str, ...]) -> Any:
    registry: Any = importlib.import_module("birkhoff._registry")
    whole = registry.PROJECTIONS
    return registry.Table(whole.name, tuple(row for row in whole.rows if row.name not in names)) if names else whole


class Backend:
    """NumPy in and out; the base class of the others."""

    name = "numpy"
    module = "numpy"
    dtypes: tuple[str, ...] = ("float64", "float32")
    halves: tuple[str, ...] = ("float16",)
    leaves_out: tuple[str, ...] = ()
    """Rows of the library's table of implementations that :meth:`kernels` leaves out."""

    @contextlib.contextmanager
    def kernels(self) -> Iterator[None]:
        """Within it the library chooses among the implementations that this backend is about."""
        dispatch: Any = importlib.import_module("birkhoff._dispatch")
        before = dispatch.PROJECTIONS
        dispatch.PROJECTIONS = _table_without(self.leaves_out)
        try:
            yield
        finally:
            dispatch.PROJECTIONS = before

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

    def expanded(self, array: Any, count: int) -> Any:
        """Return `array`, of shape (1, n, n), `count` times: an array (count, n, n) whose first stride is 0."""
        return importlib.import_module(self.module).broadcast_to(array, (count, *array.shape[1:]))

    def autograd(self, function: Projector, logits: Any, grad: Any) -> Any:
        """Return the vector-Jacobian product by the library's own differentiation; torch has one, NumPy and CuPy none.

        Raises
        ------
        NotImplementedError
            Where :attr:`differentiates` is False, which claims ask first: they are then "not claimed".
        """
        raise NotImplementedError(f"{self.name} has no automatic differentiation; ask `differentiates` first")

    def second(self, function: Projector, logits: Any, grad: Any, direction: Any) -> Any:
        """Return the gradient of <vjp(logits, grad), direction> for the logits; raises as `autograd` does."""
        raise NotImplementedError(f"{self.name} has no automatic differentiation; ask `differentiates` first")

    @property
    def differentiates(self) -> bool:
        """Whether :meth:`autograd` works."""
        return False

    def answers(self) -> bool:
        """Whether arrays still work: after an illegal access, a process has lost its device."""
        try:
            return bool(np.all(self.asnumpy(self.asarray(np.zeros(1), self.dtypes[0])) == 0))
        except Exception:
            return False

    sees_waiting = False
    """Whether :meth:`forbids_waiting` can tell."""

    def forbids_waiting(self) -> contextlib.AbstractContextManager[None]:
        """Within it, waiting for a device raises ``RuntimeError``, on backends where that is seen."""
        return contextlib.nullcontext()


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


def _differentiable(result: Any) -> Any:
    if not getattr(result, "requires_grad", False):
        raise RuntimeError("no gradient flows through it: to torch.autograd its result is a constant")
    return result


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
        *batch, size, _ = base.shape
        wide = base.new_full((*batch, size, 2 * size), float("nan"))
        wide[..., ::2] = base
        framed = base.new_full((*batch, size + 1, size + 1), float("nan"))
        framed[..., 1:, 1:] = base
        shifted = base.new_full((base.numel() + 1,), float("nan"))
        shifted[1:] = base.flatten()
        return {
            "contiguous": base,
            "transposed": base.mT.contiguous().mT,
            "strided": wide[..., ::2],
            "batch_last": base.movedim(0, -1).contiguous().movedim(-1, 0),
            "offset": framed[..., 1:, 1:],
            "unaligned": shifted[1:].view(base.shape),
        }

    def expanded(self, array: Any, count: int) -> Any:
        return array.expand(count, *array.shape[1:])

    def autograd(self, function: Projector, logits: Any, grad: Any) -> Any:
        torch = importlib.import_module("torch")
        with torch.enable_grad(), self.kernels():
            leaf = logits.detach().clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(_differentiable(function(leaf)), leaf, grad)
        return gradient

    def second(self, function: Projector, logits: Any, grad: Any, direction: Any) -> Any:
        torch = importlib.import_module("torch")
        with torch.enable_grad(), self.kernels():
            leaf = logits.detach().clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(_differentiable(function(leaf)), leaf, grad, create_graph=True)
            (second,) = torch.autograd.grad((gradient * direction).sum(), leaf)
        return second

    @property
    def differentiates(self) -> bool:
        return True


class CudaBackend(TorchBackend):
    """PyTorch on a CUDA device: kernels of CUDA C++ compiled at run time, array calls where there is none."""

    name = "cuda"
    device = "cuda"
    leaves_out: tuple[str, ...] = ("triton", "triton-newton")
    sees_waiting = True

    @contextlib.contextmanager
    def forbids_waiting(self) -> Iterator[None]:
        torch = importlib.import_module("torch")
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def missing(self) -> str | None:
        if importlib.util.find_spec("torch") is None:
            return "torch is not installed"
        if not importlib.import_module("torch").cuda.is_available():
            return "torch sees no CUDA device"
        return super().missing()


class TritonBackend(CudaBackend):
    """PyTorch on a CUDA device: Triton kernels, array calls where there is none."""

    name = "triton"
    module = "triton"
    leaves_out = ("cuda",)


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
        *batch, size, _ = base.shape
        wide = cupy.full((*batch, size, 2 * size), cupy.nan, dtype=base.dtype)
        wide[..., ::2] = base
        framed = cupy.full((*batch, size + 1, size + 1), cupy.nan, dtype=base.dtype)
        framed[..., 1:, 1:] = base
        shifted = cupy.full(base.size + 1, cupy.nan, dtype=base.dtype)
        shifted[1:] = base.ravel()
        return {
            "contiguous": base,
            "transposed": cupy.ascontiguousarray(base.swapaxes(-1, -2)).swapaxes(-1, -2),
            "strided": wide[..., ::2],
            "reversed": cupy.ascontiguousarray(base[..., ::-1, ::-1])[..., ::-1, ::-1],
            "offset": framed[..., 1:, 1:],
            "unaligned": shifted[1:].reshape(base.shape),
        }


BACKENDS: dict[str, Backend] = {
    one.name: one for one in (Backend(), StrictBackend(), TorchBackend(), CuPyBackend(), CudaBackend(), TritonBackend())
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


def with_dtypes(chosen: Backend, names: Sequence[str]) -> Backend:
    """Return the same backend, trying only these dtypes; ``ValueError`` lists those it has."""
    known = (*chosen.dtypes, *chosen.halves)
    if isinstance(names, str) or not names or not set(names) <= set(known):
        raise ValueError(f"dtypes = {names!r} on {chosen.name}; give a list of {', '.join(known)}")
    narrowed = copy.copy(chosen)
    narrowed.dtypes = tuple(name for name in names if name in chosen.dtypes) or tuple(names)
    narrowed.halves = tuple(name for name in names if name in chosen.halves)
    return narrowed

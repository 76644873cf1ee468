"""Which array library is this, and what can it do: the only import of array-api-compat.

Nothing here imports torch or CuPy: a library is recognised by the arrays that the caller brings.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import array_api_compat
import numpy as np

from birkhoff.errors import ArrayTypeError, DtypeError

__all__ = [
    "array_namespace",
    "astype",
    "can_branch",
    "contiguous",
    "detach",
    "device",
    "device_kind",
    "dtype_name",
    "dtype_of",
    "is_floating",
    "library_name",
    "matmul",
    "quiet",
    "refuse_shards",
    "to_numpy",
]

_FLOATING = frozenset({"bfloat16", "float16", "float32", "float64"})


_NAMESPACES: dict[type, Any] = {}  # array class -> namespace, filled by the first array of each class


def array_namespace(*arrays: Any) -> Any:
    """Return the array-API namespace that all ``arrays`` belong to, or raise :class:`ArrayTypeError`."""
    if len(arrays) == 1:
        if type(arrays[0]).__module__.partition(".")[0] == "torch":
            import array_api_compat.torch  # no memo: a tracer would guard on it, and trace again once it has grown

            return array_api_compat.torch
        known = _NAMESPACES.get(type(arrays[0]))
        if known is None:
            known = _NAMESPACES[type(arrays[0])] = _ask_namespace(arrays)
        return known
    return _ask_namespace(arrays)


def _ask_namespace(arrays: tuple[Any, ...]) -> Any:
    for array in arrays:
        if isinstance(array, np.matrix | np.ma.MaskedArray):  # arrays by inheritance, with another meaning of sums
            raise ArrayTypeError(
                f"expected a plain array, got numpy.{type(array).__name__}; convert with numpy.asarray "
                "(a mask is dropped by that: fill the masked entries first)"
            )
    try:
        return array_api_compat.array_namespace(*arrays)
    except TypeError as error:
        got = ", ".join(sorted({f"{type(a).__module__.split('.')[0]}.{type(a).__qualname__}" for a in arrays}))
        raise ArrayTypeError(
            f"expected arrays of one array-API library (NumPy, CuPy, PyTorch, ...), got {got}; "
            "convert with numpy.asarray, torch.as_tensor or cupy.asarray first, all arguments to the same library"
        ) from error


def library_name(xp: Any) -> str:
    """``"numpy"``, ``"torch"``, ``"cupy"``, ``"array_api_strict"``, ...: the top package behind a namespace."""
    return str(xp.__name__).removeprefix("array_api_compat.").split(".")[0]


def device(array: Any) -> Any:
    """Device object of an array, in its own library's terms."""
    return "cpu" if isinstance(array, np.ndarray) else array.device


def device_kind(array: Any) -> str:
    """``"cpu"``, ``"cuda"``, ``"mps"``, ...: CuPy counts as ``"cuda"``, array-api-strict's devices as ``"cpu"``."""
    where = device(array)
    library = type(where).__module__.partition(".")[0]
    return _DEVICE_KINDS.get(library) or str(getattr(where, "type", where))


_DEVICE_KINDS = {"cupy": "cuda", "array_api_strict": "cpu"}


def dtype_name(dtype: Any) -> str:
    """``"float32"`` for ``numpy.float32``, ``torch.float32``, ``array_api_strict.float32`` alike."""
    if isinstance(dtype, np.dtype):
        return _numpy_name(dtype)
    if isinstance(dtype, type):  # NumPy's and CuPy's scalar classes
        return dtype.__name__
    return str(dtype).rsplit(".", 1)[-1]


@cache
def _numpy_name(dtype: np.dtype[Any]) -> str:
    return dtype.name


def dtype_of(xp: Any, name: str) -> Any:
    """The dtype called ``name`` in the namespace ``xp``, half precisions included where the library has them."""
    found = getattr(xp, name, None)
    if found is None:
        raise DtypeError(f"{library_name(xp)} has no dtype {name!r}; use 'float32' or 'float64'")
    return found


def is_floating(dtype: Any) -> bool:
    """Whether ``dtype`` is one of the real floating dtypes that this package works with."""
    return dtype_name(dtype) in _FLOATING


def astype(xp: Any, array: Any, dtype: Any) -> Any:
    """``xp.astype`` without a copy where nothing changes."""
    return array if array.dtype == dtype else xp.astype(array, dtype)


def matmul(xp: Any, left: Any, right: Any) -> Any:
    """``xp.matmul`` in the dtype of its arguments, where torch's autocast would compute it in a half precision too."""
    kind = left.device.type if library_name(xp) == "torch" else None
    if kind is None or not xp.amp.is_autocast_available(kind):
        return xp.matmul(left, right)
    with xp.autocast(kind, enabled=False):
        return xp.matmul(left, right)


def detach(array: Any) -> Any:
    """The same values outside automatic differentiation (the array itself where the library has none)."""
    method = getattr(array, "detach", None)
    return array if method is None else method()


def contiguous(array: Any) -> Any:
    """The array in C order without gaps, as a kernel addresses it; the array itself where it is so.

    Flattening and unflattening is not enough: a vector with a stride flattens to a view of itself. For a library that
    has no more than the standard it has to be, and serves: no kernel addresses its memory.
    """
    if hasattr(array, "contiguous"):
        return array.contiguous()
    if isinstance(array, np.ndarray):
        return np.ascontiguousarray(array)  # of the base class
    if hasattr(array, "flags"):
        return array if array.flags.c_contiguous else array.copy()  # CuPy's copy is in C order
    xp = array_namespace(array)
    return xp.reshape(xp.reshape(array, (-1,)), array.shape)


def can_branch(array: Any) -> bool:
    """Whether Python may look at the values at no cost: host arrays of a library that does not trace.

    Looking means sorting by index too, so a device without 64-bit integers does not count.
    """
    if isinstance(array, np.ndarray):
        return True
    if not type(array).__module__.startswith("array_api_strict"):
        return False
    info = array.__array_namespace__().__array_namespace_info__()
    return "int64" in info.dtypes(device=array.device, kind="signed integer")


def to_numpy(array: Any) -> np.ndarray:
    """Copy to the host as NumPy, from any device. Waits for the device. bfloat16 becomes float32."""
    if isinstance(array, np.ndarray):
        return array
    if array_api_compat.is_torch_array(array):
        refuse_shards(array)
        tensor = array.detach().cpu()
        return np.asarray((tensor.float() if dtype_name(tensor.dtype) == "bfloat16" else tensor).numpy())
    if array_api_compat.is_cupy_array(array):
        return np.asarray(array.get())
    xp = array_namespace(array)
    if array_api_compat.is_array_api_strict_namespace(xp):
        return np.from_dlpack(array_api_compat.to_device(array, xp.Device("CPU_DEVICE")))
    return np.from_dlpack(array)


def refuse_shards(array: Any) -> None:
    """Raise for a ``DTensor`` in a function that has to see all values of a matrix's batch in one process."""
    if hasattr(array, "placements"):
        raise ArrayTypeError(
            f"expected an array of one process, got a DTensor of shape {tuple(array.shape)}; give full_tensor(), or "
            "to_local() for the matrices of this process"
        )


def quiet(array: Any) -> AbstractContextManager[Any]:
    """No floating-point warnings from NumPy: NaN and infinities are reported by ``Status``, per matrix."""
    return np.errstate(all="ignore") if can_branch(array) else nullcontext()

"""Launch a compiled CUDA kernel through the driver, with little work on the host.

Both ways of compiling (:mod:`birkhoff.kernels.cuda.compiler`) end in a driver handle; the launch is one call of
``cuLaunchKernel`` with the arguments packed here, a few microseconds, where the libraries' own launchers take tens.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

__all__ = ["DriverKernel", "PreparedLaunch", "pack", "relaxed_capture"]

#: Dynamic shared memory that a kernel may ask for without opting in.
_DEFAULT_SHARED_BYTES = 48 * 1024
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED

_SCALARS = (np.int32, np.uint32, np.int64, np.uint64, np.float32, np.float64)


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@contextlib.contextmanager
def relaxed_capture() -> Iterator[None]:
    """Let this thread load code while a stream is captured, which the stricter modes of a capture refuse."""
    driver, mode = _driver(), ctypes.c_int(_RELAXED)
    driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


def _current_context() -> int:
    context = ctypes.c_void_p()
    _driver().cuCtxGetCurrent(ctypes.byref(context))
    return context.value or 0


def _in_context(context: int, call: Callable[[], int]) -> None:
    """A call of the driver; in a thread where no context is current yet, again with this one."""
    code = call()
    if code == _INVALID_CONTEXT and context and not _current_context():
        _check(_driver().cuCtxSetCurrent(ctypes.c_void_p(context)))
        code = call()
    _check(code)


def _word(argument: Any) -> int:
    """The eight bytes of one argument as an integer: an address, or a scalar's bits in the low bytes."""
    try:
        address: int = argument.data_ptr()
        return address
    except AttributeError:
        pass
    if isinstance(argument, _SCALARS):
        return int.from_bytes(argument.tobytes(), "little")
    if hasattr(argument, "__cuda_array_interface__"):
        return int(argument.__cuda_array_interface__["data"][0])
    raise TypeError(
        f"a kernel argument is {type(argument).__name__}; accepted: torch tensors, CuPy arrays and NumPy scalars of "
        f"{', '.join(kind.__name__ for kind in _SCALARS)} (write numpy.int32(3), not 3)"
    )


@functools.lru_cache(maxsize=64)
def _arrays(count: int) -> tuple[Any, Any, range]:
    return ctypes.c_uint64 * count, ctypes.c_void_p * count, range(0, 8 * count, 8)


def pack(arguments: Sequence[Any]) -> tuple[ctypes.Array[ctypes.c_uint64], ctypes.Array[ctypes.c_void_p]]:
    """Pack kernel arguments: one eight-byte word each, and the addresses of the words.

    Parameters
    ----------
    arguments : sequence
        torch tensors and CuPy arrays, passed as pointers, and NumPy scalars.

    Returns
    -------
    words, addresses : ctypes arrays
        The words must outlive the launch.

    Raises
    ------
    TypeError
        For anything else.
    """
    return _places_of([_word(argument) for argument in arguments])


def _places_of(
    values: Sequence[int],
) -> tuple[ctypes.Array[ctypes.c_uint64], ctypes.Array[ctypes.c_void_p]]:
    word_array, address_array, offsets = _arrays(len(values))
    words = word_array(*values)
    base = ctypes.addressof(words)
    return words, address_array(*[base + offset for offset in offsets])


def _three(sizes: Sequence[int]) -> list[ctypes.c_uint]:
    return [ctypes.c_uint(size) for size in (*sizes, 1, 1)[:3]]


class PreparedLaunch:
    """A kernel by its driver handle, with everything of a launch but the addresses and the stream.

    Parameters
    ----------
    handle : int
        ``CUfunction``.
    grid, block : sequence of int
        One to three sizes each.
    arguments : sequence
        In the order of the kernel's parameters: None for an address that each call brings, else a NumPy scalar or an
        array that all calls share.
    shared_bytes : int
        Dynamic shared memory; more than 48 KiB must have been allowed for the kernel before.
    context : int
        ``CUcontext`` that the kernel was loaded into, for threads in which none is current yet.

    Notes
    -----
    Threads may launch at once: each call takes a set of argument words of its own, and the driver copies them.
    """

    __slots__ = ("_context", "_free", "_handle", "_places", "_shape", "_template")

    def __init__(
        self, handle: int, grid: Sequence[int], block: Sequence[int], arguments: Sequence[Any], shared_bytes: int = 0,
        context: int = 0,
    ) -> None:  # fmt: skip
        self._context = context
        self._handle = ctypes.c_void_p(handle)
        self._shape = (*_three(grid), *_three(block), ctypes.c_uint(shared_bytes))
        self._places = [place for place, argument in enumerate(arguments) if argument is None]
        self._template = [0 if argument is None else _word(argument) for argument in arguments]
        self._free: list[tuple[ctypes.Array[ctypes.c_uint64], ctypes.Array[ctypes.c_void_p]]] = []

    def __call__(self, addresses: Sequence[int], stream: int) -> None:
        """Launch on a stream, by its driver handle; returns at once."""
        try:
            words, places = self._free.pop()
        except IndexError:
            words, places = _places_of(self._template)
        for place, address in zip(self._places, addresses, strict=True):
            words[place] = address
        start = (self._handle, *self._shape, ctypes.c_void_p(stream), places, None)
        if _driver().cuLaunchKernel(*start) != 0:
            _in_context(self._context, functools.partial(_driver().cuLaunchKernel, *start))
        self._free.append((words, places))


class DriverKernel:
    """A kernel by its driver handle.

    Parameters
    ----------
    handle : int
        ``CUfunction``.
    cooperative : bool
        Launch with ``cuLaunchCooperativeKernel``: all blocks are resident together.
    """

    def __init__(self, handle: int, cooperative: bool = False) -> None:
        self._handle = ctypes.c_void_p(handle)
        self._cooperative = cooperative
        self._context = _current_context()
        self._shared_bytes = _DEFAULT_SHARED_BYTES
        self._allowing = threading.Lock()

    def __call__(
        self, grid: Sequence[int], block: Sequence[int], arguments: Sequence[Any], *, shared_bytes: int = 0
    ) -> None:
        """Launch on the current stream of the library that owns the arrays; returns at once."""
        device = next((argument.device for argument in arguments if hasattr(argument, "data_ptr")), None)
        if device is None:
            import cupy

            self._launch(grid, block, arguments, shared_bytes, cupy.cuda.get_current_stream().ptr)
            return
        import torch

        stream = torch.cuda.current_stream(device).cuda_stream
        elsewhere = device.index is not None and device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
            self._launch(grid, block, arguments, shared_bytes, stream)

    def _launch(
        self, grid: Sequence[int], block: Sequence[int], arguments: Sequence[Any], shared_bytes: int, stream: int
    ) -> None:
        words, addresses = pack(arguments)
        driver = _driver()
        self._allow(shared_bytes)
        shape = (*_three(grid), *_three(block), ctypes.c_uint(shared_bytes), ctypes.c_void_p(stream))
        start: Callable[[], int]
        if self._cooperative:
            start = functools.partial(driver.cuLaunchCooperativeKernel, self._handle, *shape, addresses)
        else:
            start = functools.partial(driver.cuLaunchKernel, self._handle, *shape, addresses, None)
        _in_context(self._context, start)
        del words  # the driver has copied the arguments

    def prepare(
        self, grid: Sequence[int], block: Sequence[int], arguments: Sequence[Any], *, shared_bytes: int = 0
    ) -> PreparedLaunch:
        """Everything of a launch but the addresses and the stream; see :class:`PreparedLaunch` for the arguments."""
        if self._cooperative:
            raise ValueError("a cooperative kernel is launched by calling it; prepare() is for ordinary launches")
        self._allow(shared_bytes)
        return PreparedLaunch(self._handle.value or 0, grid, block, arguments, shared_bytes, self._context)

    def _allow(self, shared_bytes: int) -> None:
        if shared_bytes <= self._shared_bytes:
            return
        with self._allowing:  # another thread may have allowed more meanwhile
            if shared_bytes > self._shared_bytes:
                attribute = (self._handle, _MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)
                _in_context(self._context, functools.partial(_driver().cuFuncSetAttribute, *attribute))
                self._shared_bytes = shared_bytes


def _check(code: int) -> None:
    if code == 0:
        return
    text = ctypes.c_char_p()
    _driver().cuGetErrorString(code, ctypes.byref(text))
    hint = "; no CUDA context is current in this thread" if code == _INVALID_CONTEXT else ""
    raise RuntimeError(f"CUDA launch failed with {code}: {(text.value or b'').decode()}{hint}")

"""Launch a Triton kernel with little work on the host.

``kernel[grid](...)`` inspects every argument of every call. The kernels of this package are specialised by dtypes and
compile-time constants only, so what a launch needs beyond the addresses is prepared once for a shape, and a call goes
straight to the compiled kernel's launcher, with addresses as integers. Pointers that are not aligned to 16 bytes, and
the interpreter, take Triton's own way.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
import triton

from mhc_layers.kernels.replay import Start, note

__all__ = ["Launch"]

_COMPILED: dict[tuple[Any, ...], Any] = {}

#: The same bits from every Triton version: the default of contraction to fused multiply-adds changes.
_OPTIONS = {"enable_fp_fusion": True}

_address = torch.Tensor.data_ptr
_dtype = operator.attrgetter("dtype")


class Launch:
    """A kernel with its grid, run-time scalars and constants; call it with the pointers.

    It remembers how to start on one device: who keeps launches keeps one for each device.

    Parameters
    ----------
    kernel : JITFunction
        Its parameters are pointers, then run-time scalars that it does not specialise, then compile-time constants.
    grid : tuple of int
        One to three sizes.
    scalars, constants
        Arguments in the order of the parameters.
    num_warps : int
        Of a program.
    """

    __slots__ = ("_constants", "_grid", "_kernel", "_num_warps", "_options", "_ready", "_scalars")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        scalars: tuple[int | float, ...],
        constants: dict[str, Any],
        num_warps: int,
    ) -> None:
        self._kernel, self._grid, self._scalars = kernel, grid, scalars
        self._constants, self._num_warps = constants, num_warps
        self._options = _OPTIONS | {"launch_pdl": True} if constants["OVERLAP"] else _OPTIONS
        # dtypes and device that the start is for; one attribute, so that threads see all of it or nothing
        self._ready: tuple[tuple[torch.dtype, ...], int, Start] | None = None

    def __call__(self, *tensors: torch.Tensor) -> None:
        """Launch on the current stream of the tensors' device."""
        note(self.start_on, tensors)
        dtypes, addresses = tuple(map(_dtype, tensors)), tuple(map(_address, tensors))
        ready = self._ready
        if ready is not None and not functools.reduce(operator.or_, addresses) & 15:
            expected, index, start = ready
            if dtypes == expected and tensors[0].get_device() == index == torch.cuda.current_device():
                start(torch._C._cuda_getCurrentRawStream(index), *addresses)
                return
        self._first(tensors, dtypes, addresses)

    def start_on(self, index: int) -> Start | None:
        """What launches on a device, given aligned addresses of the dtypes seen first; None before a first launch."""
        ready = self._ready
        return ready[2] if ready is not None and ready[1] == index else None

    def _first(
        self, tensors: tuple[torch.Tensor, ...], dtypes: tuple[torch.dtype, ...], addresses: tuple[int, ...]
    ) -> None:
        """Launch in Triton's own way, or with what it compiled for another shape, and remember how."""
        index = tensors[0].get_device()
        if index >= 0 and index != torch.cuda.current_device():
            with torch.cuda.device(index):
                self(*tensors)
            return
        plain = index < 0 or functools.reduce(operator.or_, addresses) & 15
        key = (id(self._kernel), index, self._num_warps, dtypes, *self._constants.values())
        compiled = None if plain else _COMPILED.get(key)
        if compiled is None:
            compiled = self._kernel[self._grid](
                *tensors, *self._scalars, **self._constants, num_warps=self._num_warps, **self._options
            )
            if plain or compiled is None:
                return
            _COMPILED[key] = compiled
            self._ready = (dtypes, index, self._start(compiled))
            return
        start = self._start(compiled)
        self._ready = (dtypes, index, start)
        start(torch._C._cuda_getCurrentRawStream(index), *addresses)

    def _start(self, compiled: Any) -> Start:
        """Triton's launcher, with everything but the stream and the addresses filled in."""
        x, y, z = (*self._grid, 1, 1)[:3]
        function, rest = compiled.function, (*self._scalars, *self._constants.values())
        launch, options = _launcher(compiled.run)
        options += (compiled.packed_metadata, None, None, None)

        def start(stream: int, *addresses: int) -> None:
            launch(x, y, z, stream, function, *options, *addresses, *rest)

        return start


def _launcher(run: Any) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """A launcher of Triton, and what it takes between the kernel and its metadata.

    Triton 3.5 and 3.6 end in a C function, and the Python around it only allocates scratch memory, which our kernels do
    not use. The launchers of other versions are called as they are.
    """
    known = triton.__version__.startswith(("3.5.", "3.6.")) and torch.version.cuda is not None
    if known and not run.global_scratch_size and not run.profile_scratch_size:
        return run.launch, (run.launch_cooperative_grid, run.launch_pdl, None, None)
    return run, ()

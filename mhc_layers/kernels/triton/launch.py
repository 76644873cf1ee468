"""Launch a Triton kernel with little work on the host.

``kernel[grid](...)`` inspects every argument of every call. The kernels of this package are specialised by dtypes and
compile-time constants only, so a compiled kernel can be remembered by those and launched directly. Pointers that are
not aligned to 16 bytes, and the interpreter, take Triton's own way.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["launch"]

_COMPILED: dict[tuple[Any, ...], Any] = {}

#: The same bits from every Triton version: the default of contraction to fused multiply-adds changes.
_OPTIONS = {"enable_fp_fusion": True}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    pointers: tuple[torch.Tensor, ...],
    scalars: tuple[int | float, ...],
    constants: dict[str, Any],
    num_warps: int,
) -> None:
    """Launch on the current stream of the tensors' device.

    Parameters
    ----------
    kernel : JITFunction
        Its parameters are pointers, then run-time scalars that it does not specialise, then compile-time constants.
    grid : tuple of int
        One to three sizes.
    pointers, scalars, constants
        Arguments in the order of the parameters.
    num_warps : int
        Of a program.
    """
    first = pointers[0]
    index = first.get_device()
    if index < 0:
        kernel[grid](*pointers, *scalars, **constants, num_warps=num_warps, **_OPTIONS)
        return
    if index != torch.cuda.current_device():
        with torch.cuda.device(index):
            launch(kernel, grid, pointers, scalars, constants, num_warps)
        return
    values = tuple(constants.values())
    aligned = True
    dtypes = []
    for pointer in pointers:
        aligned &= pointer.data_ptr() % 16 == 0
        dtypes.append(pointer.dtype)
    key = (id(kernel), index, aligned, num_warps, *dtypes, *values)
    compiled = _COMPILED.get(key)
    if compiled is None or not aligned:
        compiled = kernel[grid](*pointers, *scalars, **constants, num_warps=num_warps, **_OPTIONS)
        if compiled is not None and aligned:
            _COMPILED[key] = compiled
        return
    compiled[(*grid, 1, 1)[:3]](*pointers, *scalars, *values)

"""Parameters and buffers that stay float32 when a model is cast to a narrower dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

__all__ = ["KeepsFloat32"]

Module = TypeVar("Module", bound="KeepsFloat32")


class KeepsFloat32(nn.Module):
    """A module whose *own* parameters and buffers ignore casts below float32; its children are cast as usual.

    ``model.bfloat16()``, ``model.half()`` and ``model.to(dtype)`` go through :meth:`torch.nn.Module._apply`. A cast to
    float64 is followed, and so is every move to another device.
    """

    def _apply(self: Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
        if recurse:
            for child in self.children():
                child._apply(fn)

        def keep_float32(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            narrowed = result.is_floating_point() and result.dtype.itemsize < torch.float32.itemsize
            return tensor.to(result.device) if narrowed and tensor.is_floating_point() else result

        super()._apply(keep_float32, recurse=False)
        return self

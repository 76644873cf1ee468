"""Where the operators ``torch.ops.mhc_layers.*`` are registered, and the ``vmap`` rule of the Functions around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import Parameter

from mhc_layers.kernels.replay import replayed

__all__ = ["apply", "batched", "optional_gradient", "register"]

_LIBRARY = torch.library.Library("mhc_layers", "FRAGMENT")

#: Types of the arguments of a call that no tensor subclass takes part in.
_PLAIN = frozenset((Tensor, Parameter, type(None), str, bool, float, int))


def register(function: Callable[..., Any], fake: Callable[..., Any], *, replays: bool = True) -> Callable[..., Any]:
    """Register an operator of this package from its Python implementation and its fake, and return what calls it.

    No autograd kernel: the callers are Functions. One implementation serves every device, because the leaves choose;
    on a GPU its launches are replayed (:mod:`mhc_layers.kernels.replay`), unless it takes lists of tensors.
    The dispatcher would take longer than a launch, so it is asked only where somebody could be listening: modes,
    subclasses, transforms, the compiler, a profiler.
    """
    name = function.__name__
    schema = torch.library.infer_schema(function, mutates_args=())
    if replays:
        function = replayed(function)
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mhc_layers::{name}", fake, lib=_LIBRARY)
    operator = getattr(torch.ops.mhc_layers, name).default

    def call(*args: Any) -> Any:
        unheard = (
            not torch.compiler.is_compiling()
            and not torch._C._len_torch_dispatch_stack()
            and not torch._C._are_functorch_transforms_active()
            and not torch.autograd._profiler_enabled()
            and _PLAIN.issuperset(map(type, args))
        )
        return function(*args) if unheard else operator(*args)

    return call


def apply(function: type[Function], *args: Any) -> Any:
    """``function.apply(*args)`` with all arguments given, without the host time of binding them again.

    A Function with a ``setup_context`` looks up the signature of its ``forward`` in every call, some 60 microseconds.
    It is needed for default arguments only, and for transforms, which take the usual way.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(Function, function).apply(*args)  # type: ignore[misc]


def optional_gradient(found: Tensor | None, wanted: Tensor | None, like: Tensor) -> Tensor:
    """What an operator returns as the gradient of an optional input: operators have no optional outputs.

    Empty, in the dtype of ``like``, where the input is absent; zeros where no gradient reached it.
    """
    if wanted is None:
        return like.new_empty((0,))
    return torch.zeros_like(wanted, memory_format=torch.contiguous_format) if found is None else found


def batched(
    function: type[Function],
    info: Any,
    in_dims: tuple[Any, ...],
    args: tuple[Any, ...],
    num_data: int,
    optional_data: tuple[int, ...] = (),
) -> tuple[Any, Any]:
    """``vmap`` rule: a batch of data is one more leading axis; a batch of parameters is a loop, stacked."""
    data = {*range(num_data), *optional_data}
    if all(in_dims[index] is None for index in range(len(args)) if index not in data):
        moved = [
            _leading(value, dim, info.batch_size) if index in data else value
            for index, (value, dim) in enumerate(zip(args, in_dims, strict=True))
        ]
        out = function.apply(*moved)
        return out, (0,) * len(out) if isinstance(out, tuple) else 0
    calls = []
    for item in range(info.batch_size):
        chosen = [v if d is None else v.select(d, item) for v, d in zip(args, in_dims, strict=True)]
        calls.append(function.apply(*chosen))
    if not isinstance(calls[0], tuple):
        return torch.stack(calls), 0
    return tuple(torch.stack(parts) for parts in zip(*calls, strict=True)), (0,) * len(calls[0])


def _leading(value: Any, dim: int | None, size: int) -> Any:
    if value is None:
        return None
    return value.movedim(dim, 0) if dim is not None else value.expand(size, *value.shape)

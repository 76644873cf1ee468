"""Run an operator again from the launches of its first call, with little work on the host.

An operator of the fused layer is Python around launches: leaves are looked up, intermediates allocated, launches
prepared and their tensors checked, one by one. For tensors of the same kind all of it comes out the same. So the first
call is recorded: which kernels it launched, and where each of their pointers lies, in an argument, in an output or in
an intermediate tensor. Later calls allocate the outputs and one buffer for all intermediates, check the arguments once,
and launch.

Only launches can be replayed. A call that also computes with torch (a copy to make a tensor contiguous, ``dx + gx``)
runs its body every time, and so do tensors outside the current CUDA device, addresses that are not aligned to 16 bytes,
and calls without tokens.
"""

from __future__ import annotations

import functools
import inspect
import operator
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mhc_layers.kernels.table import restriction

__all__ = ["Start", "note", "replayed"]

#: Launches, given the stream and the addresses.
Start = Callable[..., None]

#: Kinds of calls that an operator remembers before it forgets all of them.
_LARGEST = 1024

_address = torch.Tensor.data_ptr
_empty_like = torch.empty_like
_shape = operator.attrgetter("shape")
_strides = torch.Tensor.stride
_dtype = operator.attrgetter("dtype")

_ALLOCATIONS = frozenset(
    (
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.new_empty_strided.default,
    )
)


class _Tape(TorchDispatchMode):
    """Notes the launches of one call, and whether it does anything else to tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[tuple[Callable[[int], Start | None], tuple[Tensor, ...]]] = []
        self.computes = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _ALLOCATIONS and not func.is_view:
            self.computes = True
        return func(*args, **(kwargs or {}))


_LOCAL = threading.local()


def note(start_on: Callable[[int], Start | None], tensors: tuple[Tensor, ...]) -> None:
    """Tell a recording, if there is one in this thread, of a launch on tensors.

    ``start_on(device index)`` is asked when the call has ended; None means that this launch cannot be replayed.
    """
    tape: _Tape | None = getattr(_LOCAL, "tape", None)
    if tape is not None:
        tape.launches.append((start_on, tensors))


class _Output(NamedTuple):
    """An output is allocated like an argument of its dtype, or is one empty tensor for all calls.

    ``shape`` is None where it is the argument's own, which takes less time.
    """

    like: int
    shape: tuple[int, ...] | None
    strides: tuple[int, ...]
    empty: Tensor | None


class _Plan(NamedTuple):
    """What a kind of call allocates and launches.

    Addresses are numbered: the arguments, the outputs, then those at the ``offsets`` into one buffer of ``size`` values
    of the first argument, which holds all intermediates. A launch picks its own.
    """

    outputs: tuple[_Output, ...]
    size: int
    offsets: tuple[int, ...]
    launches: tuple[tuple[Start, Callable[[Any], tuple[Any, ...]]], ...]
    single: bool

    def run(self, tensors: list[Tensor], addresses: list[int], device: int) -> Any:
        """Allocate, launch, and return the outputs."""
        out = [
            empty
            if empty is not None
            else _empty_like(tensors[like])
            if shape is None
            else tensors[like].new_empty_strided(shape, strides)
            for like, shape, strides, empty in self.outputs
        ]
        at = [*addresses, *map(_address, out)]
        if self.offsets:
            buffer = tensors[0].new_empty_strided((self.size,), (1,))  # alive until all is launched
            begin = _address(buffer)
            at += [begin + offset for offset in self.offsets]
        stream = _stream(device)
        for start, pick in self.launches:
            start(stream, *pick(at))
        return out[0] if self.single else tuple(out)


def replayed(body: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an operator, all of whose arguments are given by position, so that repeated calls are replayed.

    Its first argument is a tensor; which others are is read from the annotations of the body.
    """
    parameters = list(inspect.signature(body, eval_str=True).parameters.values())
    defaults = tuple(parameter.default for parameter in parameters)
    is_tensor = [parameter.annotation in (Tensor, Tensor | None) for parameter in parameters]
    pick_tensors = _picker([place for place, tensor in enumerate(is_tensor) if tensor])
    pick_values = _picker([place for place, tensor in enumerate(is_tensor) if not tensor])
    plans: dict[tuple[Any, ...], _Plan | None] = {}

    @functools.wraps(body)
    def call(*args: Any) -> Any:
        device = args[0].get_device()
        if not _runs_here(device):
            return body(*args)
        args += defaults[len(args) :]
        given = pick_tensors(args)
        tensors = [tensor for tensor in given if tensor is not None]
        addresses = list(map(_address, tensors))
        if functools.reduce(operator.or_, addresses) & 15:
            return body(*args)
        key = (
            tuple(map(_shape, tensors)),
            tuple(map(_strides, tensors)),
            tuple(map(_dtype, tensors)),
            device,
            None if len(tensors) == len(given) else tuple([tensor is None for tensor in given]),
            pick_values(args),
            restriction(),
        )
        plan = plans.get(key)
        if plan is not None:
            return plan.run(tensors, addresses, device)
        if key in plans or 0 in addresses or len(set(addresses)) < len(addresses):
            return body(*args)
        if len(plans) >= _LARGEST:
            plans.clear()
        result, plans[key] = _record(body, args, tensors)
        return result

    return call


def _picker(places: list[int]) -> Callable[[Any], tuple[Any, ...]]:
    """What takes the items at these places, always as a tuple."""
    if len(places) < 2:
        return lambda items: tuple([items[place] for place in places])
    return operator.itemgetter(*places)


def _runs_here(device: int) -> bool:
    """Whether launches on tensors of a device, -1 for the CPU, go to the current one."""
    return device >= 0 and device == torch._C._cuda_getDevice()


def _stream(device: int) -> int:
    return int(torch._C._cuda_getCurrentRawStream(device))


def _record(body: Callable[..., Any], args: tuple[Any, ...], tensors: list[Tensor]) -> tuple[Any, _Plan | None]:
    """Run the body; return its result, and how to replay the call, or None where it cannot be."""
    before, tape = getattr(_LOCAL, "tape", None), _Tape()
    _LOCAL.tape = tape
    try:
        with tape:
            result = body(*args)
    finally:
        _LOCAL.tape = before
    if tape.computes:
        return result, None
    outputs = (result,) if isinstance(result, Tensor) else result
    return result, _plan(tensors, outputs, tape, isinstance(result, Tensor))


def _plan(tensors: list[Tensor], outputs: tuple[Tensor, ...], tape: _Tape, single: bool) -> _Plan | None:
    """Find what every pointer of every launch points into."""
    made = [_output(out, tensors) for out in outputs]
    owned = [tensor for tensor in (*tensors, *outputs) if tensor.numel()]
    places = {_address(tensor): place for place, tensor in enumerate((*tensors, *outputs)) if tensor.numel()}
    if None in made or not tape.launches or len(places) < len(owned):
        return None
    storages = {_storage(tensor) for tensor in owned}
    size, begins = 0, {}
    offsets: dict[int, int] = {}
    launches: list[tuple[Start, Callable[[Any], tuple[Any, ...]]]] = []
    for start_on, pointers in tape.launches:
        start, picked = start_on(tensors[0].get_device()), []
        for tensor in pointers:
            address, storage = _address(tensor), _storage(tensor)
            if address in places:
                picked.append(places[address])
                continue
            if storage in storages or address % 16:
                return None  # inside of a tensor that several arguments may share, or not for this launch
            if storage not in begins:
                begins[storage] = size
                size += -(-tensor.untyped_storage().nbytes() // 256) * 256
            offset = begins[storage] + address - storage
            picked.append(offsets.setdefault(offset, len(tensors) + len(outputs) + len(offsets)))
        if start is None:
            return None
        launches.append((start, _picker(picked)))
    return _Plan(tuple(made), size // tensors[0].itemsize, tuple(offsets), tuple(launches), single)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _output(out: Tensor, tensors: list[Tensor]) -> _Output | None:
    """How to allocate an output; None for a view of something larger, or a dtype that no argument has."""
    like = next((place for place, tensor in enumerate(tensors) if tensor.dtype == out.dtype), None)
    if like is None or _storage(out) != _address(out) or not out.is_contiguous():
        return None
    with torch.inference_mode(False):
        empty = torch.empty(out.shape, dtype=out.dtype, device=out.device) if out.numel() == 0 else None
    twin = next((place for place, tensor in enumerate(tensors) if _same_kind(tensor, out)), None)
    if twin is not None:
        return _Output(twin, None, out.stride(), empty)
    return _Output(like, tuple(out.shape), out.stride(), empty)


def _same_kind(tensor: Tensor, out: Tensor) -> bool:
    return tensor.dtype == out.dtype and tensor.shape == out.shape and tensor.is_contiguous()

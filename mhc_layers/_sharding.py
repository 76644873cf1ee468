"""How the operators of a site run on distributed tensors: tokens may be sharded, everything else is whole.

Every operator treats tokens one by one, except that the gradients of parameters are sums over tokens. So streams may be
sharded along any axis before the last two, parameters are replicated, and their gradients are partial sums. Along the
streams and the channels nothing can be sharded.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

__all__ = ["is_distributed", "register_rules", "replicated_like"]

#: Of each operator: kinds of its outputs and of its inputs, in the order of the schema. "t" has the tokens' axes,
#: "p" is a parameter or another replicated tensor, "s" a sum over tokens (a partial one where tokens are sharded),
#: "." is not a tensor. A capital letter is an optional input, or an output that is empty without that input; outputs
#: name the place of this input after their letter.
_RULES: dict[str, tuple[str, str]] = {
    "pre_forward": ("t t t t T8", "t p p p p p T . P ."),
    "post_forward": ("t", "t t t"),
    "post_backward": ("t t", "t t t t p p ."),
    "pre_backward": ("t s s T6 S13", "t p p p p p T t t T T T . P T"),
    "boundary_forward": ("t t t t t T10", "t t t p p p p p . . P ."),
    "boundary_backward": ("t t t s s S20", "t T T T T t T t p p . t t t p p p p p . P T"),
    "broadcast_pre_forward": ("t t t t T8", "t p p p p p T . P ."),
    "broadcast_pre_backward": ("t s s T6 S13", "t p p p p p T t t T T T . P T"),
    "broadcast_post_forward": ("t", "t t t"),
    "broadcast_post_backward": ("t t", "t t t t p p ."),
}


def is_distributed(x: Tensor) -> bool:
    """Whether a tensor is a ``DTensor``, without importing it."""
    return hasattr(x, "placements")


@functools.cache
def register_rules() -> bool:
    """Tell ``torch.distributed.tensor`` about the operators that are registered by now; False where it cannot be told.

    ``register_sharding`` is experimental in every version of torch that has it (2.6 and later).
    """
    try:
        from torch.distributed.tensor.experimental import register_sharding
    except ImportError:
        return False
    for name, (outputs, inputs) in _RULES.items():
        operator = getattr(torch.ops.mhc_layers, name).default
        register_sharding(operator)(functools.partial(_placements, outputs.split(), inputs.split()))
    return True


def replicated_like(value: Tensor, x: Tensor) -> Tensor:
    """A value that every process has, as a tensor that can meet ``x``: replicated where x is distributed."""
    if not is_distributed(x):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh = x.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _placements(outputs: list[str], inputs: list[str], *args: Any) -> list[tuple[list[Any], list[Any]]]:
    """Every way to place the tensors of a call along one axis of the mesh: all whole, or one token axis sharded."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    given = [*args, *[None] * (len(inputs) - len(args))]
    whole = {"t": Replicate(), "p": Replicate(), "s": Replicate(), ".": None}
    streams = next(arg for kind, arg in zip(inputs, given, strict=True) if kind == "t")
    found = []
    for axis in (None, *range(streams.ndim - 2)):
        kinds = whole if axis is None else {**whole, "t": Shard(axis), "s": Partial()}
        placed = [
            None if arg is None else kinds[kind.lower()] for kind, arg in zip(inputs[: len(args)], args, strict=True)
        ]
        made = [
            Replicate() if len(kind) > 1 and given[int(kind[1:])] is None else kinds[kind[0].lower()]
            for kind in outputs
        ]
        found.append((made, placed))
    return found

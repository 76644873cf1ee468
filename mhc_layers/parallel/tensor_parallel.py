"""Tensor parallelism: the heads and hidden units of every sublayer are shared by a group of processes.

Streams and connections are replicated in the group: a connection moves bytes and multiplies little, so sharing it
would cost more communication than it saves. A sublayer copies its normalised input to the group (backward: sums the
gradients) and sums the group's outputs (backward: passes the gradient on), which is one sum per sublayer and pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from mhc_layers.models.attention import Attention
from mhc_layers.models.mlp import SwiGLU
from mhc_layers.models.transformer import Transformer

__all__ = ["TensorParallel"]


class _Copy(torch.autograd.Function):
    """The identity, whose gradient is the sum over the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _Sum(torch.autograd.Function):
    """The sum over the group, whose gradient is the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class TensorParallel:
    """Splits a model's sublayers over a group, in place, and joins tensors of the parts again.

    Parameters
    ----------
    model : Transformer
        Its attention and SwiGLU layers keep their share of heads and hidden units.
    group : torch.distributed.ProcessGroup
        The processes that share them.

    Raises
    ------
    ValueError
        If heads or hidden units do not divide by the size of the group, or a feed-forward layer is of another kind.
    """

    def __init__(self, model: Transformer, group: ProcessGroup) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self._pieces: dict[str, tuple[int, list[int]]] = {}
        for name, module in list(model.named_modules()):
            if isinstance(module, Attention):
                self._split_attention(name, module)
            elif isinstance(module, SwiGLU) and ".experts." not in name:
                self._split_swiglu(name, module)
            elif isinstance(module, SwiGLU):
                raise ValueError("parallel.tensor shares SwiGLU layers, not mixtures of experts; set it to 1")

    def is_split(self, name: str) -> bool:
        """Say whether a parameter is shared out (True) or replicated in the group."""
        return name in self._pieces

    def join(self, name: str, value: Tensor) -> Tensor:
        """Return the whole tensor of a parameter, or of optimizer state of its shape, from the group's parts."""
        if name not in self._pieces or value.ndim == 0:
            return value
        dim, sizes = self._pieces[name]
        parts = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, value.contiguous(), group=self.group)
        local = [size // self.size for size in sizes]
        split = [part.split(local, dim) for part in parts]
        return torch.cat([split[rank][piece] for piece in range(len(sizes)) for rank in range(self.size)], dim)

    def cut(self, name: str, value: Tensor) -> Tensor:
        """Return this process's part of a whole tensor; the inverse of :meth:`join`."""
        if name not in self._pieces or value.ndim == 0:
            return value
        dim, sizes = self._pieces[name]
        pieces = value.split(sizes, dim)
        return torch.cat([piece.chunk(self.size, dim)[self.rank] for piece in pieces], dim).contiguous()

    def _split_attention(self, name: str, module: Attention) -> None:
        heads, kv_heads, width = module.num_heads, module.num_kv_heads, module.head_dim
        if heads % self.size or kv_heads % self.size:
            raise ValueError(
                f"parallel.tensor is {self.size}, which must divide num_heads {heads} and num_kv_heads {kv_heads}"
            )
        self._split_linear(f"{name}.qkv", module.qkv, 0, [heads * width, kv_heads * width, kv_heads * width])
        self._split_linear(f"{name}.output", module.output, 1, [heads * width])
        module.num_heads, module.num_kv_heads = heads // self.size, kv_heads // self.size
        self._connect(module)

    def _split_swiglu(self, name: str, module: SwiGLU) -> None:
        hidden = module.output.in_features
        if hidden % self.size:
            raise ValueError(f"parallel.tensor is {self.size}, which must divide hidden_dim {hidden}")
        self._split_linear(f"{name}.gate_up", module.gate_up, 0, [hidden, hidden])
        self._split_linear(f"{name}.output", module.output, 1, [hidden])
        self._connect(module)

    def _split_linear(self, name: str, linear: nn.Linear, dim: int, sizes: list[int]) -> None:
        key = f"{name}.weight"
        self._pieces[key] = (dim, sizes)
        with torch.no_grad():
            linear.weight = nn.Parameter(self.cut(key, linear.weight.detach()).clone())
        linear.out_features, linear.in_features = linear.weight.shape

    def _connect(self, module: nn.Module) -> None:
        """Copy the module's input to the group and sum its output over the group."""

        def copy(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            return (_Copy.apply(arguments[0], self.group), *arguments[1:])

        def add(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            return _Sum.apply(output, self.group)

        module.register_forward_pre_hook(copy)
        module.register_forward_hook(add)

"""One step's forward and backward pass, however many processes share it.

The trainer talks to an :class:`Engine` and never asks how the model is spread. This file holds the engine for a model
that every process runs whole (alone, DDP, FSDP2, tensor parallel); :mod:`mhc_layers.parallel.pipeline` holds the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from mhc_layers.models.transformer import Transformer
from mhc_layers.parallel.mesh import World
from mhc_layers.parallel.tensor_parallel import TensorParallel

__all__ = ["Engine", "Precision", "Watch", "WholeModelEngine", "micro_batches", "parameter_name"]

Watch = Callable[[], contextlib.AbstractContextManager[None]]
"""Returns the context of the forward pass that is measured."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Dtype of streams and sublayers; parameters stay fp32 and are cast where they are used."""

    device_type: str
    stream_dtype: torch.dtype = torch.float32

    def context(self) -> contextlib.AbstractContextManager[object]:
        """Return the context of a forward pass."""
        if self.stream_dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=self.stream_dtype)


class Engine(Protocol):
    """What the trainer needs of a model that may be spread over processes.

    Attributes
    ----------
    model : torch.nn.Module
        The part that this process owns, without wrappers: its parameters are the ones to optimise.
    world : World
        This process's place.
    data_rank, data_size : int
        Which share of the batch this process reads.
    """

    world: World
    data_rank: int
    data_size: int

    @property
    def model(self) -> nn.Module:
        """The part that this process owns."""
        ...

    def forward_backward(self, tokens: Tensor, *, micro_batch_size: int = 0, watch: Watch | None = None) -> Tensor:
        """Add the gradients of the mean loss over the whole batch; return this loss, the same on every process."""
        ...

    def evaluate(self, tokens: Tensor) -> Tensor:
        """Return the summed loss in nats of windows ``(rows, T + 1)``; every process of a replica gives the same."""
        ...

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients to a global norm of at most ``max_norm`` (0: only measure); return the norm before."""
        ...

    def gather(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn this process's tensors into those of the whole model; all processes must call it.

        Keys are parameter names of this process's part, or ``slot/name`` for optimizer state of a parameter's shape.
        """
        ...

    def scatter(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Undo :meth:`gather`: keep this process's part of the whole model's tensors, on its device."""
        ...


class WholeModelEngine:
    """An engine whose process runs the whole model: alone, with DDP, or with parameters sharded by FSDP2.

    Parameters
    ----------
    model : Transformer
        The model, already sharded if it is.
    precision : Precision
        Dtype of the streams.
    world : World
        This process's place.
    data_rank, data_size : int
        This process's share of the batch.
    loss : callable, optional
        ``(tokens, targets) -> (loss, cross_entropy)``; ``model.loss`` by default. A data-parallel wrapper that reduces
        gradients in the backward pass goes here.
    sync_context : callable, optional
        ``sync_context(last)`` returns the context of a micro-batch: gradients are reduced only for the last one.
    whole : sequence of torch.nn.Parameter
        Parameters of a sharded model that stayed whole: their gradients are averaged here, over all processes.
    tensor_parallel : TensorParallel, optional
        How the sublayers were shared out, if they were.
    """

    def __init__(
        self,
        model: Transformer,
        precision: Precision,
        *,
        world: World | None = None,
        data_rank: int = 0,
        data_size: int = 1,
        loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        sync_context: Callable[[bool], contextlib.AbstractContextManager[object]] | None = None,
        whole: Sequence[nn.Parameter] = (),
        tensor_parallel: TensorParallel | None = None,
    ) -> None:
        self.model = model
        self.world = world or World()
        self.data_rank = data_rank
        self.data_size = data_size
        self._precision = precision
        self._loss = loss or model.loss
        self._sync_context = sync_context or (lambda last: contextlib.nullcontext())
        self._whole = list(whole)
        self._tensor_parallel = tensor_parallel

    def forward_backward(self, tokens: Tensor, *, micro_batch_size: int = 0, watch: Watch | None = None) -> Tensor:
        total = torch.zeros((), device=tokens.device)
        pieces = list(micro_batches(tokens, micro_batch_size))
        for index, piece in enumerate(pieces):
            watched = watch() if watch is not None and index == 0 else contextlib.nullcontext()
            with self._sync_context(index + 1 == len(pieces)):
                with watched, self._precision.context():
                    loss, cross_entropy = self._loss(piece[:, :-1], piece[:, 1:])
                share = len(piece) / len(tokens)
                # a process has one device: autograd's thread for it would only cost two hand-overs a backward
                with torch.autograd.set_multithreading_enabled(False):
                    (loss * share).backward()
            total += cross_entropy.detach() * share
        self._average_whole()
        if self.data_size > 1:
            dist.all_reduce(total)
            total /= self.world.size
        return total

    @torch.no_grad()
    def evaluate(self, tokens: Tensor) -> Tensor:
        with self._precision.context():
            _, cross_entropy = self.model.loss(tokens[:, :-1], tokens[:, 1:])
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # the root stays gathered after a forward pass, waiting for a backward pass
        return cross_entropy * tokens[:, 1:].numel()

    def clip(self, max_norm: float) -> Tensor:
        if self._tensor_parallel is not None:
            return self._clip_shared(max_norm, self._tensor_parallel)
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
        local = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
        norms = [full_tensor(torch.nn.utils.get_total_norm(group)) for group in (sharded, local) if group]
        norm = torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]
        if max_norm > 0.0:
            scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
            for gradient in gradients:
                gradient.mul_(scale)
        return norm

    def gather(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        shares = self._tensor_parallel
        if shares is not None:
            return {key: shares.join(parameter_name(key), value.detach()) for key, value in tensors.items()}
        return {key: full_tensor(value.detach()) for key, value in tensors.items()}

    def scatter(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        shares, parameters = self._tensor_parallel, dict(self.model.named_parameters())
        if shares is not None:
            tensors = {key: shares.cut(parameter_name(key), value) for key, value in tensors.items()}
        return {key: like(value, parameters.get(parameter_name(key))) for key, value in tensors.items()}

    def _average_whole(self) -> None:
        """Average the gradients of parameters that a sharded model keeps whole."""
        pairs = [p.grad for p in self._whole if p.grad is not None]
        if pairs:
            flat = torch.stack(pairs)
            dist.all_reduce(flat)
            for gradient, value in zip(pairs, flat / self.data_size, strict=True):
                gradient.copy_(value)

    def _clip_shared(self, max_norm: float, shares: TensorParallel) -> Tensor:
        """Clip where some parameters are shared out in a group and others replicated."""
        pairs = [(name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None]
        device = next(self.model.parameters()).device
        squares = torch.zeros(2, device=device)
        for name, gradient in pairs:
            squares[int(shares.is_split(name))] += gradient.square().sum()
        split = squares[1].clone()
        dist.all_reduce(split, group=shares.group)
        norm = (squares[0] + split).sqrt()
        if max_norm > 0.0:
            torch._foreach_mul_([gradient for _, gradient in pairs], torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        return norm


def parameter_name(key: str) -> str:
    """Return the parameter that a key of :meth:`Engine.gather` is about."""
    return key.rpartition("/")[2]


def micro_batches(tokens: Tensor, size: int) -> Iterator[Tensor]:
    """Cut a batch into pieces of at most ``size`` rows (0: one piece)."""
    yield from tokens.split(size or len(tokens))


def full_tensor(value: Tensor) -> Tensor:
    """Return the whole tensor of a sharded one (a collective call); others as they are."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value: Tensor, target: Tensor | None) -> Tensor:
    """Return ``value`` as ``target`` is: on its device and, if it is sharded, with its placement (not for scalars)."""
    if target is None or value.ndim == 0:
        return value
    value = value.to(target.device)
    if isinstance(target, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value, target.device_mesh, target.placements)
    return value

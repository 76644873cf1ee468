"""One step's forward and backward pass, however many processes share it.

The trainer talks to an :class:`Engine` and never asks how the model is spread. This file holds the engine for a model
that every process runs whole (alone, DDP, FSDP2, tensor parallel); :mod:`mhc_layers.parallel.pipeline` holds the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mhc_layers.models.transformer import Transformer
from mhc_layers.parallel.mesh import World

__all__ = ["Engine", "Precision", "WholeModelEngine", "micro_batches"]

Watch = Callable[[], contextlib.AbstractContextManager[None]]


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

    model: nn.Module
    world: World
    data_rank: int
    data_size: int

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
    ) -> None:
        self.model = model
        self.world = world or World()
        self.data_rank = data_rank
        self.data_size = data_size
        self._precision = precision
        self._loss = loss or model.loss
        self._sync_context = sync_context or (lambda last: contextlib.nullcontext())

    def forward_backward(self, tokens: Tensor, *, micro_batch_size: int = 0, watch: Watch | None = None) -> Tensor:
        total = torch.zeros((), device=tokens.device)
        pieces = list(micro_batches(tokens, micro_batch_size))
        for index, piece in enumerate(pieces):
            watched = watch() if watch is not None and index == 0 else contextlib.nullcontext()
            with self._sync_context(index + 1 == len(pieces)):
                with watched, self._precision.context():
                    loss, cross_entropy = self._loss(piece[:, :-1], piece[:, 1:])
                share = len(piece) / len(tokens)
                (loss * share).backward()
            total += cross_entropy.detach() * share
        if self.data_size > 1:
            dist.all_reduce(total)
            total /= self.world.size
        return total

    @torch.no_grad()
    def evaluate(self, tokens: Tensor) -> Tensor:
        with self._precision.context():
            _, cross_entropy = self._loss(tokens[:, :-1], tokens[:, 1:])
        return cross_entropy * tokens[:, 1:].numel()

    def clip(self, max_norm: float) -> Tensor:
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0.0 else float("inf"))
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def gather(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: full_tensor(value.detach()) for key, value in tensors.items()}

    def scatter(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        parameters = dict(self.model.named_parameters())
        return {key: like(value, parameters.get(parameter_name(key))) for key, value in tensors.items()}


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

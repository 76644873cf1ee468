"""Pipeline parallelism: each process runs a stretch of sites; the n streams of every token cross the borders.

A border carries ``n C`` numbers per token (and n more where reads are delayed), n times what a residual stream needs.
Stages are cut between sites, as evenly as their number allows; recompute blocks do not straddle a border. The schedule
is one-forward-one-backward of :mod:`torch.distributed.pipelining`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from mhc_layers.conventions import get_convention
from mhc_layers.hyper_connection import HyperConnection
from mhc_layers.models.transformer import Transformer, WalkState
from mhc_layers.parallel.engine import Precision, Watch, parameter_name
from mhc_layers.parallel.mesh import World

__all__ = ["PipelineEngine", "Stage", "stage_sizes"]


def stage_sizes(num_sites: int, num_stages: int) -> list[int]:
    """Cut sites into stages as evenly as possible, the longer ones first.

    Examples
    --------
    >>> from mhc_layers.parallel.pipeline import stage_sizes
    >>> stage_sizes(10, 4)
    [3, 3, 2, 2]
    """
    if not 1 <= num_stages <= num_sites:
        raise ValueError(f"parallel.pipeline is {num_stages}; it must lie between 1 and the {num_sites} sites")
    base, extra = divmod(num_sites, num_stages)
    return [base + (stage < extra) for stage in range(num_stages)]


class Stage(nn.Module):
    """One stretch of a Transformer, with the parameters' names of the whole model.

    The first stage takes tokens, the others streams (and the last ``h_pre`` where reads are delayed); the last stage
    returns logits, the others streams.

    Parameters
    ----------
    model : Transformer
        The whole model, freshly built; it is taken apart.
    index, num_stages : int
        Which stretch.
    precision : Precision
        Dtype of the streams.
    """

    def __init__(self, model: Transformer, index: int, num_stages: int, precision: Precision) -> None:
        super().__init__()
        if model.config.num_experts:
            raise ValueError("parallel.pipeline does not carry the balance loss of experts; set num_experts to 0")
        sizes = stage_sizes(len(model.sites), num_stages)
        first = sum(sizes[:index])
        self.is_first, self.is_last = index == 0, index == num_stages - 1
        self.carries_pre = bool(get_convention(model.config.convention).read_delay)
        self.sites = nn.ModuleDict({str(i): model.sites[i] for i in range(first, first + sizes[index])})
        self.tied = model.config.tie_embeddings and num_stages > 1
        if self.is_first or (self.is_last and self.tied):
            self.embedding = model.embedding
        if self.is_last:
            self.readout_streams, self.norm, self.head = model.readout_streams, model.norm, model.head
        self._precision = precision
        mine = {id(parameter) for parameter in self.parameters()}
        self._groups = [
            {**group, "params": [p for p in group["params"] if id(p) in mine]} for group in model.param_groups(1.0)
        ]
        self._whole = (model,)  # in a tuple, so that its other parameters are not this module's
        model.sites = nn.ModuleList()

    @property
    def config(self) -> Any:
        """The whole model's configuration."""
        return self._whole[0].config

    def param_groups(self, weight_decay: float = 0.1) -> list[dict[str, Any]]:
        """Return the whole model's groups, restricted to this stage."""
        return [
            {**group, "weight_decay": weight_decay * group["weight_decay"]} for group in self._groups if group["params"]
        ]

    def forward(self, x: Tensor, h_pre: Tensor | None = None) -> Any:
        """Run the stretch: tokens ``(B, T)`` or streams ``(B, T, n, C)`` to streams or logits ``(B, T, V)``."""
        model = self._whole[0]
        with self._precision.context():
            context = model.context(x.shape[1])
            sites = cast("list[HyperConnection]", list(self.sites.values()))
            state = WalkState(model.first_streams(x, sites[0]) if self.is_first else x, h_pre)
            state = model.walk(state, context, sites)
            if self.is_last:
                return model.readout(state.x, state.h_pre)
            # h_pre may be a view of all coefficients; what is sent must fill its storage
            return (state.x, cast("Tensor", state.h_pre).contiguous()) if self.carries_pre else state.x


class PipelineEngine:
    """An engine whose processes each run one stage, with replicas beside them.

    Parameters
    ----------
    model : Transformer
        The whole model, freshly built with the same values on every process.
    mesh : torch.distributed.device_mesh.DeviceMesh
        With the axes ``pipeline`` and ``replicate``.
    precision : Precision
        Dtype of the streams.
    world : World
        This process's place.
    micro_batches : int
        Micro-batches of a step; 0 takes twice the number of stages.
    """

    def __init__(
        self, model: Transformer, mesh: DeviceMesh, precision: Precision, *, world: World, micro_batches: int = 0
    ) -> None:
        self.world = world
        self.group: ProcessGroup = mesh.get_group("pipeline")
        self.replicas: ProcessGroup = mesh.get_group("replicate")
        self.data_rank, self.data_size = dist.get_rank(self.replicas), dist.get_world_size(self.replicas)
        self.index, self.num_stages = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.ranks = dist.get_process_group_ranks(self.group)
        self.num_micro = micro_batches or 2 * self.num_stages
        self.device = next(model.parameters()).device
        self.model = Stage(model, self.index, self.num_stages, precision)
        self.ends = self._join_ends(mesh)
        self._stage = PipelineStage(self.model, self.index, self.num_stages, self.device, group=self.group)
        self._schedule = Schedule1F1B(self._stage, self.num_micro, loss_fn=_mean_cross_entropy)

    def forward_backward(self, tokens: Tensor, *, micro_batch_size: int = 0, watch: Watch | None = None) -> Tensor:
        if len(tokens) % self.num_micro:
            raise ValueError(
                f"a process's share of the batch is {len(tokens)} sequences; it must be a multiple of the "
                f"{self.num_micro} micro-batches (parallel.micro_batches)"
            )
        losses: list[Tensor] = []
        # PyTorch 2.11 compares the strides of what a stage is given with those of a contiguous example
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:]
        if self.model.is_first and self.model.is_last:
            self._schedule.step(inputs, target=targets, losses=losses)
        elif self.model.is_first:
            self._schedule.step(inputs)
        elif self.model.is_last:
            self._schedule.step(target=targets, losses=losses)
        else:
            self._schedule.step()
        self._reduce_gradients()
        total = torch.stack(losses).mean().detach() if losses else torch.zeros((), device=self.device)
        dist.broadcast(total, self.ranks[-1], group=self.group)
        dist.all_reduce(total, group=self.replicas)
        return total / self.data_size

    @torch.no_grad()
    def evaluate(self, tokens: Tensor) -> Tensor:
        """Pass one batch from stage to stage."""
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        result = self.model(*([inputs] if self.model.is_first else self._receive(inputs)))
        if not self.model.is_last:
            for piece in result if isinstance(result, tuple) else (result,):
                dist.send(piece.contiguous(), self.ranks[self.index + 1], group=self.group)
            total = torch.zeros((), device=self.device)
        else:
            total = _mean_cross_entropy(result, targets) * targets.numel()
        dist.broadcast(total, self.ranks[-1], group=self.group)
        return total

    def clip(self, max_norm: float) -> Tensor:
        shared = {id(self.model.embedding.weight)} if self.ends is not None and self.model.is_last else set()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        counted = [p.grad for p in self.model.parameters() if p.grad is not None and id(p) not in shared]
        square = torch.zeros((), device=self.device)
        if counted:
            square = torch.stack(torch._foreach_norm(counted)).square().sum()
        dist.all_reduce(square, group=self.group)
        norm = square.sqrt()
        if max_norm > 0.0:
            torch._foreach_mul_(gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        return norm

    def gather(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        parts: list[Any] = [None] * self.num_stages
        local = {key: value.detach().cpu() for key, value in tensors.items()}
        dist.all_gather_object(parts, local, group=self.group)
        return {key: value for part in parts for key, value in part.items()}

    def scatter(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        mine = dict(self.model.named_parameters())
        return {
            key: value if value.ndim == 0 else value.to(self.device)
            for key, value in tensors.items()
            if parameter_name(key) in mine
        }

    def _join_ends(self, mesh: DeviceMesh) -> ProcessGroup | None:
        """Make the group of first and last stage, which share a tied embedding; every process takes part."""
        found = None
        if not self.model.tied:
            return None
        columns = mesh.mesh.reshape(self.num_stages, -1).T.tolist()
        for column in columns:
            group = dist.new_group([column[0], column[-1]])
            if self.world.rank in (column[0], column[-1]):
                found = group
        return found

    def _reduce_gradients(self) -> None:
        """Sum the two gradients of a tied embedding, then average over the replicas."""
        if self.ends is not None:
            weight = self.model.embedding.weight
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            dist.all_reduce(weight.grad, group=self.ends)
        if self.data_size > 1:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad, group=self.replicas)
                    parameter.grad /= self.data_size

    def _receive(self, tokens: Tensor) -> list[Tensor]:
        """Receive the streams (and ``h_pre``) of the stage before."""
        config = self.model.config
        shape = (*tokens.shape, config.num_streams, config.dim)
        pieces = [torch.empty(shape, dtype=self.model._precision.stream_dtype, device=self.device)]
        if self.model.carries_pre:
            pieces.append(torch.empty(shape[:-1], device=self.device))
        for piece in pieces:
            dist.recv(piece, self.ranks[self.index - 1], group=self.group)
        return pieces


def _mean_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())

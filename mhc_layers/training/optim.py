"""Optimizers: AdamW, or Muon for the matrices with AdamW for the rest.

Which parameters are decayed is the model's knowledge (``Transformer.param_groups``): matrices and ``phi`` are, biases,
gates, norms and embeddings are not. Following DeepSeek-V4 (arXiv 2606.19348, 2.4), Muon takes the matrices of the
sublayers and ``phi``; embedding, head, norms, biases and gates stay with AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["OptimConfig", "build_optimizers", "load_optimizer_state", "optimizer_state", "set_learning_rate"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How parameters are updated.

    Parameters
    ----------
    kind : {"adamw", "muon"}
        ``muon`` orthogonalises the momentum of matrices (``torch.optim.Muon``) and leaves the rest to AdamW. It needs
        whole matrices: :class:`~mhc_layers.training.config.TrainConfig` refuses it with FSDP2 or tensor parallelism.
    learning_rate : float
        Base rate of AdamW, multiplied by the schedule.
    muon_learning_rate : float
        Base rate of Muon, scaled per matrix by ``sqrt(max(1, rows / columns))``.
    betas : tuple of float
        Decay rates of AdamW's moments.
    eps : float
        Term in AdamW's denominator.
    weight_decay : float
        Decoupled weight decay of the groups that the model marks as decayed.
    clip_norm : float
        Bound of the global gradient norm; 0 turns clipping off (the norm is still measured).

    Raises
    ------
    ValueError
        If a value is out of its range.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    muon_learning_rate: float = 2e-2
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-10
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("adamw", "muon"):
            raise ValueError(f"optimizer kind is {self.kind!r}; accepted are 'adamw' and 'muon'")
        for name in ("learning_rate", "muon_learning_rate", "eps"):
            value = getattr(self, name)
            if not (value > 0.0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}; it must be positive and finite")
        for name in ("weight_decay", "clip_norm"):
            if getattr(self, name) < 0.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}; each must be in [0, 1)")


def build_optimizers(model: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """Make the optimizers of a model.

    Parameters
    ----------
    model : torch.nn.Module
        A model with ``param_groups(weight_decay=...)``, such as :class:`mhc_layers.Transformer`.
    config : OptimConfig
        The kind and its numbers.

    Returns
    -------
    list of torch.optim.Optimizer
        One (AdamW) or two (Muon, AdamW) optimizers that together own every parameter once.
    """
    groups = model.param_groups(weight_decay=config.weight_decay)  # type: ignore[operator]
    optimizers: list[torch.optim.Optimizer] = []
    if config.kind == "muon":
        outside = {id(parameter) for parameter in _embedding_parameters(model)}
        muon_groups, rest = [], []
        for group in groups:
            matrices = [p for p in group["params"] if p.ndim == 2 and id(p) not in outside]
            others = [p for p in group["params"] if p.ndim != 2 or id(p) in outside]
            if matrices:
                muon_groups.append({**group, "params": matrices})
            if others:
                rest.append({**group, "params": others})
        if muon_groups:
            optimizers.append(torch.optim.Muon(muon_groups, lr=config.muon_learning_rate, momentum=config.betas[1]))
        groups = rest
    if groups:
        optimizers.append(
            torch.optim.AdamW(
                groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=_can_fuse(groups)
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def set_learning_rate(optimizers: Sequence[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's rate to its base rate times ``factor``."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor


def optimizer_state(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return the optimizers' state as flat named tensors, such as ``"exp_avg/blocks.0.attention.wq.weight"``."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state: dict[str, Tensor] = {}
    for optimizer in optimizers:
        for parameter, entries in optimizer.state.items():
            for key, value in entries.items():
                state[f"{key}/{names[id(parameter)]}"] = torch.as_tensor(value)
    return state


def load_optimizer_state(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], state: dict[str, Tensor]
) -> None:
    """Put the tensors of :func:`optimizer_state` back.

    Raises
    ------
    KeyError
        If the state names a parameter that no optimizer owns.
    """
    owners = {
        id(p): (optimizer, bool(group.get("fused") or group.get("capturable")))
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    }
    parameters = dict(model.named_parameters())
    for optimizer in optimizers:
        optimizer.state.clear()
    for full_name, value in state.items():
        key, _, name = full_name.partition("/")
        if name not in parameters:
            raise KeyError(f"the optimizer state names the parameter {name!r}, which this model does not have")
        parameter = parameters[name]
        optimizer, counts_on_device = owners[id(parameter)]
        device = parameter.device if value.ndim > 0 or counts_on_device else torch.device("cpu")
        optimizer.state[parameter][key] = value.to(device, copy=True)


def _embedding_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of embeddings and of the output head, which stay with AdamW."""
    found: list[nn.Parameter] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or name.rsplit(".", 1)[-1] in ("head", "lm_head", "output"):
            found.extend(module.parameters(recurse=False))
    return found


def _can_fuse(groups: list[dict[str, Any]]) -> bool:
    """Say whether the fused AdamW kernel serves all parameters."""
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for group in groups for p in group["params"])

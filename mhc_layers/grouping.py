"""Parameter groups for an optimizer: what decays, and what must not."""

from __future__ import annotations

from typing import Any

from torch import nn

from mhc_layers.hyper_connection import HyperConnection
from mhc_layers.precision import KeepsFloat32

__all__ = ["param_groups"]


def param_groups(model: nn.Module, weight_decay: float = 0.1) -> list[dict[str, Any]]:
    """Split the parameters of any model that has hyper-connections.

    Parameters
    ----------
    model : Module
        With or without :class:`~mhc_layers.HyperConnection` inside.
    weight_decay : float
        For the matrices and for ``phi``.

    Returns
    -------
    list of dict
        Groups with ``name``, ``params`` and ``weight_decay``; empty groups are left out. "matrices" (two or more axes)
        and "phi" are decayed. "embedding", "vectors" (fewer axes) and "connections" (biases and gates of the sites, and
        learned readouts) are not. A shared parameter is in the group of its first name.

    Notes
    -----
    Static logits must not decay: the pull toward 0 is a pull toward uniform mixing. DeepSeek-V4 gives biases and gates
    of the connections to AdamW and ``phi`` to the optimizer of its matrices.

    Examples
    --------
    >>> from torch import nn
    >>> from mhc_layers import HyperConnection, param_groups
    >>> site = HyperConnection(8, 4, nn.Linear(8, 8))
    >>> {group["name"]: len(group["params"]) for group in param_groups(site)}
    {'matrices': 1, 'phi': 1, 'vectors': 1, 'connections': 4}
    """
    groups: dict[str, list[nn.Parameter]] = {
        name: [] for name in ("matrices", "phi", "embedding", "vectors", "connections")
    }
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        if isinstance(owner, HyperConnection) and leaf == "phi":
            kind = "phi"
        elif isinstance(owner, KeepsFloat32):
            kind = "connections"
        elif isinstance(owner, nn.Embedding):
            kind = "embedding"
        else:
            kind = "matrices" if parameter.dim() >= 2 else "vectors"
        groups[kind].append(parameter)
    return [
        {"name": name, "params": params, "weight_decay": weight_decay if name in ("matrices", "phi") else 0.0}
        for name, params in groups.items()
        if params
    ]

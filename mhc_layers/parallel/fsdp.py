"""Sharded data parallelism (FSDP2): every process keeps a part of each parameter and gathers it where it is used.

Each sublayer's layers are a group of their own, so that only one sublayer's weights are whole at a time. The
connections' own parameters, the embedding, the head and the norms stay in the root group: the model calls a site's
steps, not the site, a site's read ends with its sublayer's norm, and these parameters are small. The root group is
gathered in fp32; sublayers are gathered in the dtype of the streams and their gradients are reduced in fp32.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from mhc_layers.models.transformer import Transformer

__all__ = ["shard_model"]


def shard_model(
    model: Transformer, mesh: DeviceMesh, *, stream_dtype: torch.dtype = torch.float32
) -> list[nn.Parameter]:
    """Shard a model's parameters over a mesh, in place.

    Parameters
    ----------
    model : Transformer
        Its parameters become ``DTensor``; ``model.loss`` and ``model.forward`` gather what they need.
    mesh : torch.distributed.device_mesh.DeviceMesh
        One axis to shard over, or two: replicas, then shards.
    stream_dtype : torch.dtype
        Dtype in which sublayers' weights are gathered and used.

    Returns
    -------
    list of torch.nn.Parameter
        The 0-d gates of the sites, which FSDP2 cannot shard: they stay whole, and their gradients have to be averaged
        over the mesh by the caller.
    """
    narrow = MixedPrecisionPolicy()
    if stream_dtype != torch.float32:
        # inputs have the dtype of the streams already, except rotary tables, which stay fp32
        narrow = MixedPrecisionPolicy(param_dtype=stream_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for site in model.sites:
        for layer in site.sublayer.children() if isinstance(site.sublayer, nn.Module) else ():
            if layer is not site.input_norm:
                fully_shard(layer, mesh=mesh, mp_policy=narrow)
    gates = [parameter for parameter in model.parameters() if parameter.ndim == 0]
    fully_shard(model, mesh=mesh, ignored_params=set(gates))
    register_fsdp_forward_method(model, "loss")
    return gates

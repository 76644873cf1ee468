"""Sites on distributed tensors: tokens sharded over two processes give the values and gradients of one process."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from mhc_layers import DEEPSEEK_V4, DEEPSEEK_V41, PAPER
from mhc_layers._fused_state import FusedState
from mhc_layers._sharding import _RULES, _placements
from mhc_layers._torch_ops import fused_site
from mhc_layers.parallel.mesh import join_processes
from tests.mhc_layers.processes import devices, spawn
from tests.mhc_layers.test_boundary_ops import make_sites


def make_model(convention, device="cpu"):
    """Three fused sites; the second is read with a norm."""
    sites = make_sites(4, 6, convention)
    for site in sites:
        site.requested_implementation = site._implementation = fused_site(convention)
    sites[1].norm = nn.RMSNorm(6, eps=1e-3)
    with torch.no_grad():
        sites[1].norm.weight.normal_(generator=torch.Generator().manual_seed(0))
    for site in sites:
        site.to(device)
    return sites


def walk(sites, x, boundary):
    u, state = sites[0].pre(x, broadcast=x.shape[-2] == 1)
    outputs = [u]
    for site, following in itertools.pairwise(sites):
        if boundary:
            x, u, state = site.boundary(x, torch.tanh(u), state, following)
        else:
            x = site.post(x, torch.tanh(u), state)
            u, state = following.pre(x, state.h_pre)
        outputs.append(u)
    return [*outputs, sites[-1].post(x, torch.tanh(u), state)]


def results(sites, x, boundary):
    outputs = walk(sites, x, boundary)
    loss = sum(output.square().sum() for output in outputs)
    parameters = [parameter for site in sites for parameter in site.parameters()]
    return outputs, torch.autograd.grad(loss, [x, *parameters], allow_unused=True)


def start(device):
    """Join the group; return its processes as a mesh of one axis."""
    from torch.distributed.device_mesh import init_device_mesh

    world = join_processes(device)
    return init_device_mesh(device, (world.size,))


def compare(rank, device):
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_module, distribute_tensor

    mesh = start(device)
    for convention in (PAPER, DEEPSEEK_V4, DEEPSEEK_V41):
        for streams, boundary, axis in ((4, True, 0), (4, False, 1), (1, False, 0)):
            case = (convention.name, streams, boundary, axis)
            x = torch.randn(4, 6, streams, 6, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
            values, gradients = results(make_model(convention, device), x, boundary)
            sites = make_model(convention, device)
            for site in sites:
                distribute_module(site, mesh)
            sharded = distribute_tensor(x.detach(), mesh, [Shard(axis)]).requires_grad_()
            assert isinstance(sites[0].pre(sharded, broadcast=streams == 1)[1], FusedState)  # not the plain steps
            ours, ours_gradients = results(sites, sharded, boundary)
            for got, expected in zip(ours, values, strict=True):
                assert got.placements == (Shard(axis),), case
                assert got.to_local().shape[axis] == expected.shape[axis] // mesh.size()
                torch.testing.assert_close(got.full_tensor(), expected, rtol=1e-5, atol=1e-5, msg=str(case))
            assert ours_gradients[0].placements == (Shard(axis),)
            for got, expected in zip(ours_gradients, gradients, strict=True):
                assert (got is None) == (expected is None)
                if got is not None:
                    assert got is ours_gradients[0] or isinstance(got.placements[0], (Partial, Replicate)), case
                    torch.testing.assert_close(got.full_tensor(), expected, rtol=1e-4, atol=1e-5, msg=str(case))
            assert isinstance(ours_gradients[1].placements[0], Partial), case  # of phi: one sum over all, at the end


def train(rank, device):
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    mesh = start(device)
    x = torch.randn(4, 6, 4, 6, generator=torch.Generator().manual_seed(1)).to(device)
    found = []
    for distributed in (False, True):
        sites, streams = make_model(PAPER, device), x
        if distributed:
            streams = distribute_tensor(x, mesh, [Shard(0)])
            for site in sites:
                distribute_module(site, mesh)
        parameters = [parameter for site in sites for parameter in site.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=0.1, eps=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            sum(output.square().mean() for output in walk(sites, streams, True)).backward()
            optimizer.step()
        found.append([parameter.full_tensor() if distributed else parameter for parameter in parameters])
    for got, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", devices())
def test_an_optimizer_adds_up_partial_gradients(device):
    spawn(train, device)


@pytest.mark.parametrize("device", devices())
def test_sharded_tokens_give_the_results_of_one_process(device):
    spawn(compare, device)


def test_rules_have_the_arguments_of_the_operators():
    for name, (outputs, inputs) in _RULES.items():
        schema = getattr(torch.ops.mhc_layers, name).default._schema
        assert len(outputs.split()) == len(schema.returns), name
        assert len(inputs.split()) == len(schema.arguments), name
        for kind, argument in zip(inputs.split(), schema.arguments, strict=True):
            is_tensor = "Tensor" in str(argument.type)
            optional = is_tensor and "Optional" in repr(argument.type)
            assert (kind == ".") != is_tensor, (name, argument.name)
            assert kind.isupper() == optional or kind == ".", (name, argument.name)


def test_a_rule_shards_tokens_and_sums_parameters():
    from torch.distributed.tensor import Partial, Replicate, Shard

    outputs, inputs = ("t", "s", "S2"), ("t", "p", "P", ".")
    x = torch.zeros(3, 5, 4, 8)
    whole, first, second = _placements(outputs, inputs, x, x, None, 1.0)
    assert whole == ([Replicate()] * 3, [Replicate(), Replicate(), None, None])
    assert first == ([Shard(0), Partial(), Replicate()], [Shard(0), Replicate(), None, None])
    assert second == ([Shard(1), Partial(), Replicate()], [Shard(1), Replicate(), None, None])

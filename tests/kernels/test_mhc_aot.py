"""The fused kernels compile for sm_80, sm_90 and sm_100, and the hot ones spill nothing."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")

from mhc_layers.conventions import PAPER
from mhc_layers.kernels.table import LEAVES
from mhc_layers.kernels.triton import configs
from tests.kernels.aot_compile import Launch, compile_launch, pretended, recorded_launches
from tests.kernels.mhc_cases import leaves_chain, make_problem

pytestmark = [pytest.mark.aot, pytest.mark.timeout(600)]

SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}

#: Kernels that stream the (M, n, C) tensors: a spill there costs bandwidth.
HOT = {
    "project_kernel",
    "read_forward_kernel",
    "write_forward_kernel",
    "write_backward_kernel",
    "read_backward_kernel",
    "streams_backward_kernel",
}


def launches(capability: int, n: int, c: int, dtype: torch.dtype) -> list[Launch]:
    """What a site of 8192 tokens would launch on an H100-sized device of this capability."""
    if configs.is_interpreting():
        pytest.skip("needs TRITON_INTERPRET unset")
    one = make_problem(1, n, c, dtype)
    many = {name: getattr(one, name).expand(8192, *getattr(one, name).shape[1:]) for name in ("x", "f", "g", "gu")}
    problem = type(one)(**many, phi=one.phi, bias=one.bias, alphas=one.alphas)

    def triton_leaf(name: str):
        return next(row for row in LEAVES[name].rows if row.name == "triton").load("run")

    with pretended(capability), recorded_launches() as recorded:
        leaves_chain(problem, PAPER, triton_leaf)
    return recorded


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("n", "c", "dtype"),
    [
        (4, 4096, torch.bfloat16),
        (4, 1000, torch.bfloat16),
        (2, 1024, torch.bfloat16),
        (3, 1024, torch.bfloat16),
        (6, 1024, torch.bfloat16),
        (8, 1024, torch.bfloat16),
        (4, 1024, torch.float32),
    ],
    ids=["n4", "n4-masked", "n2", "n3", "n6", "n8", "n4-float32"],
)
def test_hot_kernels_do_not_spill(capability: int, n: int, c: int, dtype: torch.dtype) -> None:
    found = {}
    for launch in launches(capability, n, c, dtype):
        if launch.name not in HOT:
            continue
        resources = compile_launch(launch, capability)
        assert resources.shared_bytes <= SHARED_BYTES[capability], launch.name
        found[launch.name] = resources.spill_bytes
    assert found.keys() >= HOT
    assert {name: spill for name, spill in found.items() if spill} == {}


@pytest.mark.parametrize("n", [4, 8])
def test_finish_kernels_do_not_spill(n: int) -> None:
    """They are latency, not bandwidth; a spill is still a sign that the adjoint has left the registers."""
    found = {
        launch.name: compile_launch(launch, 90).spill_bytes
        for launch in launches(90, n, 1024, torch.bfloat16)
        if launch.name not in HOT
    }
    assert found == dict.fromkeys(("finish_kernel", "finish_backward_kernel", "reduce_kernel"), 0)


def test_projection_and_last_backward_reach_the_wide_tensor_cores() -> None:
    assembly = {}
    for launch in launches(90, 4, 4096, torch.bfloat16):
        if launch.name in ("project_kernel", "streams_backward_kernel", "write_backward_kernel"):
            assembly[launch.name] = compile_launch(launch, 90).assembly
    assert "wgmma.mma_async" in assembly["project_kernel"]
    assert "wgmma.mma_async" in assembly["streams_backward_kernel"]
    # a step of the projection has a sum of its own: an operand of wgmma says whether it adds to what is there
    adds = re.findall(r"wgmma\.mma_async[^;]*?, ([^,]+), 1, 1, [01], [01];", assembly["project_kernel"])
    assert len(adds) == 16
    assert adds[0] == "0"
    # the dot products of phase A end in the lane: five shuffles a product at the end, none in the loop
    assert assembly["write_backward_kernel"].count("shfl.sync") == 5 * 20

"""The read with the sublayer's norm, forward and backward: interpreter, ahead of time, and on a GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mhc_layers.conventions import DEEPSEEK_V4, PAPER, Convention
from mhc_layers.kernels.options import options_key, site_options
from mhc_layers.kernels.table import LARGEST_ROW, LEAVES, LeafFacts
from tests.kernels.mhc_cases import relative_error

pytest.importorskip("triton")

EPS = 1e-6

#: Relative error of results in the streams' dtype, and of float32 results; the interpreter truncates to bf16.
TOLERANCE = {torch.float32: (1e-6, 3e-6), torch.float16: (1e-3, 1e-3), torch.bfloat16: (8e-3, 8e-3)}


def triton_leaf(name: str) -> Any:
    return next(row for row in LEAVES[name].rows if row.name == "triton").load("run")


class Case(NamedTuple):
    x: Tensor
    gv: Tensor
    weight: Tensor
    proj: Tensor
    bias: Tensor
    alpha: Tensor
    convention: Convention

    @property
    def h_pre(self) -> Tensor:
        n = self.x.shape[-2]
        return torch.sigmoid(self.alpha * self.proj[..., :n] + self.bias[:n]) + self.convention.eps_pre


def make_case(tokens: int, n: int, c: int, dtype: torch.dtype, convention: Convention, device: str = "cpu") -> Case:
    generator = torch.Generator(device=device).manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    rows, alpha = n * (n + 2), torch.tensor(0.7, device=device)
    x, gv = draw(tokens, n, c).to(dtype), draw(tokens, c).to(dtype)
    return Case(x, gv, 1 + 0.5 * draw(c), draw(tokens, rows), draw(rows), alpha, convention)


def oracle(case: Case, read: Tensor) -> list[Tensor]:
    """The normalised read and the gradients of u, of what it was read with, and of the gain, in float64."""
    x, h, weight = (tensor.double().requires_grad_() for tensor in (case.x, read, case.weight))
    u = (h.unsqueeze(-1) * x).sum(-2)
    out = u * torch.rsqrt(u.square().mean(-1, keepdim=True) + EPS) * weight
    return [out.detach(), *torch.autograd.grad(out, [u, h, weight], case.gv.double())]


def run(case: Case, read: Tensor | None = None) -> list[Tensor]:
    out, inverse = triton_leaf("read_norm_forward")(case.x, case.h_pre if read is None else read, case.weight, EPS)
    options = site_options(options_key(case.convention))
    arguments = (case.gv, case.x, case.weight, inverse, case.proj, case.alpha, case.bias, options, read)
    return [out, *triton_leaf("read_norm_backward")(*arguments)]


def check(case: Case, read: Tensor | None, rounded: float, summed: float) -> None:
    exact = oracle(case, case.h_pre if read is None else read)
    errors = [relative_error(got, wanted) for got, wanted in zip(run(case, read), exact, strict=True)]
    assert max(errors[:2]) < rounded and max(errors[2:]) < summed, errors


# -- in the interpreter -----------------------------------------------------------------------------------------------


@pytest.fixture
def interpreting() -> None:
    from mhc_layers.kernels.triton.configs import is_interpreting

    if not is_interpreting():
        pytest.skip("needs TRITON_INTERPRET=1 from the start of the process")


@pytest.mark.interpret
@pytest.mark.usefixtures("interpreting")
@pytest.mark.parametrize(
    ("n", "c", "tokens", "dtype", "convention"),
    [
        (4, 40, 7, torch.float32, PAPER),
        (4, 200, 33, torch.bfloat16, DEEPSEEK_V4),
        (3, 50, 9, torch.float32, DEEPSEEK_V4),
        (2, 33, 5, torch.float16, PAPER),
        (8, 24, 5, torch.bfloat16, PAPER),
        (6, 130, 3, torch.float32, PAPER),
        (4, 1000, 1, torch.float32, PAPER),
    ],
)
def test_equals_float64(n: int, c: int, tokens: int, dtype: torch.dtype, convention: Convention) -> None:
    check(make_case(tokens, n, c, dtype, convention), None, *TOLERANCE[dtype])


@pytest.mark.interpret
@pytest.mark.usefixtures("interpreting")
def test_a_delayed_read_and_one_shared_by_all_tokens() -> None:
    case = make_case(9, 4, 72, torch.float32, DEEPSEEK_V4)
    check(case, torch.rand(9, 24)[:, :4], *TOLERANCE[torch.float32])  # a slice: the rows are strided
    check(case, torch.tensor([0.4, 0.1, 0.3, 0.9]).expand(9, 4), *TOLERANCE[torch.float32])


@pytest.mark.interpret
@pytest.mark.usefixtures("interpreting")
def test_one_stream_leaves_nothing_for_its_weight() -> None:
    """A norm forgets the scale of its input: for n = 1 the gradient of h_pre is what epsilon leaves."""
    case = make_case(5, 1, 40, torch.float32, PAPER)
    _, du, dots, _ = run(case)
    assert (dots.abs() < 1e-5 * du.norm(dim=-1, keepdim=True) * case.x[:, 0].norm(dim=-1, keepdim=True)).all()


@pytest.mark.interpret
@pytest.mark.usefixtures("interpreting")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_of_the_two_steps(dtype: torch.dtype) -> None:
    case = make_case(11, 4, 88, dtype, PAPER)
    read = triton_leaf("read_forward")(case.x, case.h_pre)
    fused = triton_leaf("read_norm_forward")(case.x, case.h_pre, case.weight, EPS)
    for ours, theirs in zip(fused, triton_leaf("norm_rows")(read, case.weight, EPS), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.interpret
@pytest.mark.usefixtures("interpreting")
def test_runs_and_batches_agree_bit_for_bit() -> None:
    case = make_case(19, 4, 72, torch.bfloat16, PAPER)
    first, second = run(case), run(case)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    some = case._replace(x=case.x[5:8], gv=case.gv[5:8], proj=case.proj[5:8])
    for part, whole in zip(run(some)[:3], first[:3], strict=True):
        assert torch.equal(part, whole[5:8])


@pytest.mark.interpret
@pytest.mark.usefixtures("interpreting")
def test_no_tokens() -> None:
    out, du, dots, dweight = run(make_case(0, 4, 24, torch.float32, PAPER))
    assert (out.shape, du.shape, dots.shape) == ((0, 24), (0, 24), (0, 4))
    assert torch.equal(dweight, torch.zeros(24))


def test_rows_too_long_for_the_registers_are_refused() -> None:
    triton = next(row for row in LEAVES["read_norm_backward"].rows if row.name == "triton")
    facts = LeafFacts(device=torch.device("cuda"), dtype=torch.bfloat16, num_streams=4, dim=LARGEST_ROW[2])
    assert triton.refuse(facts) is None
    longer = LeafFacts(device=facts.device, dtype=facts.dtype, num_streams=4, dim=LARGEST_ROW[2] + 1)
    assert "at most 16384" in str(triton.refuse(longer))


# -- ahead of time ----------------------------------------------------------------------------------------------------


@pytest.mark.aot
@pytest.mark.timeout(600)
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("n", "c", "dtype"),
    [
        (4, 4096, torch.bfloat16),
        (4, 1000, torch.bfloat16),
        (4, 1280, torch.bfloat16),
        (3, 1280, torch.bfloat16),
        (8, 4096, torch.bfloat16),
        (4, 7168, torch.bfloat16),
        (4, 4096, torch.float32),
    ],
)
def test_compiles_without_spills(capability: int, n: int, c: int, dtype: torch.dtype) -> None:
    from mhc_layers.kernels.triton import configs
    from tests.kernels.aot_compile import compile_launch, pretended, recorded_launches

    if configs.is_interpreting():
        pytest.skip("needs TRITON_INTERPRET unset")
    one = make_case(1, n, c, dtype, PAPER)
    with pretended(capability), recorded_launches() as recorded:
        run(one._replace(x=one.x.expand(8192, n, c), gv=one.gv.expand(8192, c), proj=one.proj.expand(8192, -1)))
    names = {launch.name for launch in recorded}
    assert names == {"read_norm_forward_kernel", "read_norm_backward_kernel", "sum_rows_kernel"}
    found = {launch.name: compile_launch(launch, capability) for launch in recorded}
    assert not any(resources.spill_bytes for resources in found.values()), found
    assert all(resources.shared_bytes <= (166_912 if capability == 80 else 232_448) for resources in found.values())


def test_stages_fit_the_shared_memory() -> None:
    from mhc_layers.kernels.triton.read_norm import NormConfig
    from mhc_layers.kernels.triton.read_norm_backward import residency

    row = NormConfig(block_tokens=1, block_channels=1024, num_tiles=4, num_warps=4)
    assert residency(row, 4, 2, 90) == (1, 3)  # 2 x 72 KiB
    assert residency(row, 4, 2, 80) == (1, 3)
    assert residency(row, 4, 2, 86) == (1, 2)
    assert residency(row, 8, 4, 86) == (3, 1)
    assert residency(NormConfig(1, 2048, 4, 8), 4, 2, 90) == (1, 2)


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("n", "c", "tokens", "dtype"),
    [
        (4, 4096, 130, torch.bfloat16),
        (4, 1280, 700, torch.bfloat16),
        (3, 1000, 7, torch.bfloat16),
        (8, 2048, 1, torch.bfloat16),
        (6, 333, 65, torch.float16),
        (2, 16384, 20, torch.bfloat16),
        (4, 1024, 9, torch.float32),
    ],
)
def test_on_a_gpu_equals_float64(n: int, c: int, tokens: int, dtype: torch.dtype) -> None:
    rounded, summed = {torch.float32: (1e-6, 3e-6), torch.float16: (6e-4, 3e-4)}.get(dtype, (4e-3, 2e-3))
    case = make_case(tokens, n, c, dtype, PAPER, "cuda")
    check(case, None, rounded, summed)
    first, second = run(case), run(case)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    read = triton_leaf("read_forward")(case.x, case.h_pre)
    assert torch.equal(first[0], triton_leaf("norm_rows")(read, case.weight, EPS)[0])

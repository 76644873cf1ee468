"""The kernels of a first site of equal streams: against float64, and bit for bit against those of n streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mhc_layers.conventions import DEEPSEEK_V4, PAPER, Convention
from mhc_layers.kernels.options import options_key, padded_rows, site_options
from mhc_layers.kernels.table import LEAVES
from tests.kernels.mhc_cases import Problem, make_problem, oracle, relative_error

pytest.importorskip("triton")

CASES = [
    (4, 40, 7, torch.float32, PAPER),
    (4, 200, 33, torch.bfloat16, DEEPSEEK_V4),
    (3, 50, 9, torch.float32, DEEPSEEK_V4),
    (6, 70, 5, torch.float32, PAPER),
    (8, 24, 5, torch.bfloat16, PAPER),
    (2, 1000, 1, torch.float16, PAPER),
]

#: Relative error of results in the streams' dtype, and of float32 results.
TOLERANCE = {torch.float32: (1e-6, 3e-6), torch.float16: (1e-3, 2e-4), torch.bfloat16: (6e-3, 2e-4)}


def triton_leaf(name: str) -> Any:
    return next(row for row in LEAVES[name].rows if row.name == "triton").load("run")


def copies(problem: Problem) -> Problem:
    """The problem whose streams are all the first one."""
    x = problem.x[:, :1].expand_as(problem.x).contiguous()
    return Problem(x, problem.f, problem.g, problem.gu, problem.phi, problem.bias, problem.alphas)


def run(problem: Problem, convention: Convention, leaf: Any = triton_leaf) -> dict[str, Tensor]:
    """The site of equal streams through the leaves that read one of them."""
    p, options = problem, site_options(options_key(convention))
    n, c = p.x.shape[-2:]
    e, phi = p.x[:, :1].contiguous(), p.phi.unflatten(1, (n, c)).sum(1)
    slabs, squares = leaf("project")(e, phi)
    coef, proj, rstd = leaf("finish")(slabs, squares, p.alphas, p.bias, options, c, (len(e),))
    u = leaf("read_forward")(e, coef, copies=n)
    out = leaf("broadcast_write_forward")(e, p.f, coef)
    df, dcoef = leaf("broadcast_write_backward")(p.g, e, p.f, proj, p.alphas[1], p.bias, options)
    dots = leaf("read_backward")(p.gu, e).expand(-1, n).contiguous()
    mix, dz, partials = leaf("finish_backward")(proj, rstd, dcoef, dots, p.alphas, p.bias, options, c, e.dtype)
    de, dphi_slabs = leaf("broadcast_streams_backward")(e, p.g, p.gu, mix, dz, phi)
    dphi, dparams = leaf("reduce_slabs")(dphi_slabs, partials)
    rows = p.phi.shape[0]
    padded = padded_rows(rows)
    return {
        "coef": coef,
        "u": u,
        "out": out,
        "de": de,
        "df": df,
        "dphi": dphi,
        "dbias": dparams[:rows],
        "dalphas": dparams[padded : padded + 3],
    }


def check(problem: Problem, convention: Convention, rounded: float, summed: float) -> None:
    exact = oracle(problem, convention)
    exact["de"] = exact.pop("dx").sum(1, keepdim=True)
    exact["dphi"] = exact["dphi"].unflatten(1, problem.x.shape[-2:])[:, 0]
    ours = run(problem, convention)
    errors = {name: relative_error(ours[name], exact[name]) for name in exact}
    for name, error in errors.items():
        assert error < (rounded if name in ("u", "out", "de", "df") else summed), errors


# -- in the interpreter -----------------------------------------------------------------------------------------------


@pytest.fixture
def interpreting() -> None:
    from mhc_layers.kernels.triton.configs import is_interpreting

    if not is_interpreting():
        pytest.skip("needs TRITON_INTERPRET=1 from the start of the process")


@pytest.mark.interpret
@pytest.mark.usefixtures("interpreting")
@pytest.mark.parametrize(("n", "c", "tokens", "dtype", "convention"), CASES)
def test_equals_float64(n: int, c: int, tokens: int, dtype: torch.dtype, convention: Convention) -> None:
    check(copies(make_problem(tokens, n, c, dtype)), convention, *TOLERANCE[dtype])


def both(problem: Problem) -> list[tuple[Tensor, Tensor]]:
    """Reads and writes of one stream, which repeat every operation of those of n equal streams, and the latter."""
    n, c = problem.x.shape[-2:]
    e, coef = problem.x[:, :1].contiguous(), torch.rand(len(problem.x), n * (n + 2), device=problem.x.device)
    gain, options = torch.rand(c, device=e.device), site_options(options_key(PAPER))
    written = triton_leaf("broadcast_write_forward")(e, problem.f, coef)
    whole = triton_leaf("write_forward")(problem.x, problem.f, coef)
    found = []
    for x, number in ((e, n), (problem.x, 1)):
        read = triton_leaf("read_forward")(x, coef, copies=number)
        normed = triton_leaf("read_norm_forward")(x, coef, gain, 1e-6, copies=number)
        arguments = (problem.gu, x, gain, normed[1], coef, problem.alphas[0], problem.bias, options)
        found.append([read, *normed, *triton_leaf("read_norm_backward")(*arguments, copies=number)])
    return [(written, whole), *zip(*found, strict=True)]


@pytest.mark.interpret
@pytest.mark.usefixtures("interpreting")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [3, 4])
def test_the_bits_of_n_equal_streams(n: int, dtype: torch.dtype) -> None:
    assert all(torch.equal(ours, theirs) for ours, theirs in both(copies(make_problem(11, n, 88, dtype))))


@pytest.mark.interpret
@pytest.mark.usefixtures("interpreting")
def test_no_tokens() -> None:
    ours = run(make_problem(0, 4, 24, torch.float32), PAPER)
    assert (ours["de"].shape, ours["out"].shape) == ((0, 1, 24), (0, 4, 24))
    assert torch.equal(ours["dphi"], torch.zeros(24, 24))


# -- ahead of time ----------------------------------------------------------------------------------------------------


@pytest.mark.aot
@pytest.mark.timeout(600)
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("n", "c", "dtype"),
    [(4, 4096, torch.bfloat16), (3, 1000, torch.bfloat16), (8, 1024, torch.bfloat16), (4, 1024, torch.float32)],
)
def test_compiles_without_spills(capability: int, n: int, c: int, dtype: torch.dtype) -> None:
    from mhc_layers.kernels.triton import configs
    from tests.kernels.aot_compile import compile_launch, pretended, recorded_launches

    if configs.is_interpreting():
        pytest.skip("needs TRITON_INTERPRET unset")
    one = make_problem(1, n, c, dtype)
    many = {name: getattr(one, name).expand(8192, *getattr(one, name).shape[1:]) for name in ("x", "f", "g", "gu")}
    with pretended(capability), recorded_launches() as recorded:
        run(Problem(**many, phi=one.phi, bias=one.bias, alphas=one.alphas), PAPER)
    hot = {"project_kernel", "read_forward_kernel", "broadcast_write_kernel", "broadcast_write_backward_kernel"}
    hot.add("broadcast_streams_backward_kernel")
    found = {launch.name: compile_launch(launch, capability) for launch in recorded if launch.name in hot}
    assert found.keys() == hot
    assert not {name: resources for name, resources in found.items() if resources.spill_bytes}
    assert all(resources.shared_bytes <= (166_912 if capability == 80 else 232_448) for resources in found.values())


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("n", "c", "tokens", "dtype"),
    [
        (4, 4096, 130, torch.bfloat16),
        (4, 1280, 700, torch.bfloat16),
        (3, 1000, 7, torch.bfloat16),
        (8, 1024, 65, torch.bfloat16),
        (4, 333, 20, torch.float16),
        (4, 1024, 9, torch.float32),
    ],
)
def test_on_a_gpu_equals_float64(n: int, c: int, tokens: int, dtype: torch.dtype) -> None:
    problem = copies(make_problem(tokens, n, c, dtype, device="cuda"))
    rounded = {torch.float32: 1e-5, torch.float16: 6e-4}.get(dtype, 3e-3)
    check(problem, PAPER, rounded, 1e-5 if dtype == torch.float32 else 3e-4)
    write, read, *backward = both(problem)
    assert torch.equal(*write) and torch.equal(*read)
    for ours, theirs in backward:  # the compiler may contract another product of a sum
        assert relative_error(ours, theirs) < (1e-6 if ours.dtype == torch.float32 else 1e-4)
    first, second = run(problem, PAPER), run(problem, PAPER)
    assert all(torch.equal(first[name], second[name]) for name in first)

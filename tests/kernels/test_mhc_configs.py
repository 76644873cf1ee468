"""Launch shapes of the fused kernels, and that no tokens launch nothing; needs Triton, no GPU, no interpreter."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from mhc_layers.conventions import DEEPSEEK_V4, PAPER
from mhc_layers.kernels.table import LEAVES
from tests.kernels.mhc_cases import leaves_chain, make_problem

pytest.importorskip("triton")

from mhc_layers.kernels.triton import configs
from mhc_layers.kernels.triton.launch import Launch


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if configs.is_interpreting():
        pytest.skip("the interpreter has launch shapes of its own")


def triton_leaf(name: str) -> Any:
    return next(row for row in LEAVES[name].rows if row.name == "triton").load("run")


def test_any_number_of_tokens_has_a_launch_shape() -> None:
    for tokens, n, c, item, capability in itertools.product(
        (0, 1, 31, 33, 4096, 2**22), (1, 2, 3, 4, 6, 8), (1, 90, 1000, 7168), (2, 4), (80, 90, 100)
    ):
        project = configs.project_config(tokens, n, c, item, 132, capability)
        last = configs.streams_backward_config(tokens, n, c, item, 132, capability)
        assert 1 <= project.num_splits <= 32
        assert last.num_splits >= 1
        assert n % last.group == 0


@pytest.mark.parametrize(
    ("tokens", "c"),
    [(4096, 1280), (4096, 2048), (4096, 4096), (8192, 1280), (16384, 1280), (16384, 4096), (16384, 7168)],
)
def test_memory_beyond_the_results_is_under_half_a_stream(tokens: int, c: int) -> None:
    """What a backward allocates beside its results, as counted in ``measured/layer_kernels.md``."""
    splits = configs.streams_backward_config(tokens, 4, c, 2, 132, 90).num_splits
    slabs = splits * 24 * 4 * c * 4  # the first one is the gradient of phi
    partials = configs.cdiv(tokens, configs.finish_config(tokens, 4, 132).block_tokens) * 36 * 4
    assert (tokens * 468 + slabs + partials) / (2 * tokens * c) < 0.5


def test_finish_spreads_few_tokens_over_the_multiprocessors() -> None:
    """A token a lane; half of the lanes where there are no more than 32 tokens for each multiprocessor."""
    assert configs.finish_config(4096, 4, 132).block_tokens == 16
    assert configs.finish_config(132 * 32 + 1, 4, 132).block_tokens == 32


@pytest.mark.parametrize("convention", [PAPER, DEEPSEEK_V4], ids=["paper", "v4"])
@pytest.mark.parametrize(("n", "dtype"), [(4, torch.bfloat16), (3, torch.float32), (8, torch.float16)])
def test_no_tokens_launch_nothing(n: int, dtype: torch.dtype, convention: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Launch, *tensors: torch.Tensor) -> None:
        raise AssertionError("launched")

    monkeypatch.setattr(Launch, "__call__", refuse)
    problem = make_problem(0, n, 1000, dtype)
    ours = leaves_chain(problem, convention, triton_leaf)
    assert ours["out"].shape == ours["dx"].shape == (0, n, 1000)
    assert ours["u"].shape == ours["df"].shape == (0, 1000)
    assert ours["coef"].shape == (0, n * (n + 2))
    for name in ("dphi", "dbias", "dalphas"):
        assert ours[name].numel()
        assert not ours[name].any()
    xs, us = triton_leaf("recompute_block")(problem.x, [problem.f], [ours["coef"]], [ours["coef"]] * 2)
    assert [t.shape for t in (*xs, *us)] == [(0, n, 1000), (0, 1000), (0, 1000)]

"""What a fused kernel gets is in C order, whatever layout the caller had."""

from __future__ import annotations

import numpy as np
import pytest

import birkhoff
from birkhoff import _xp
from proofs import strategies


@pytest.mark.parametrize("name", strategies.LAYOUTS)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_numpy_layouts_become_contiguous(name: str, n: int) -> None:
    values = np.random.default_rng(0).standard_normal((3, n, n))
    stack = strategies.layout(values, name)
    result = _xp.contiguous(stack)
    assert result.flags.c_contiguous and np.array_equal(result, values)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_an_evenly_strided_torch_stack_is_copied(n: int) -> None:
    torch = pytest.importorskip("torch")
    wide = torch.randn(3, n, 2 * n, dtype=torch.float64)
    for stack in (wide[..., ::2], wide[..., :n].mT, torch.randn(n, n, 3).movedim(-1, 0), wide[..., :n][::2]):
        result = _xp.contiguous(stack)
        as_a_kernel_reads = torch.as_strided(result, (stack.numel(),), (1,))
        assert torch.equal(as_a_kernel_reads, torch.flatten(stack.clone(memory_format=torch.contiguous_format)))


@pytest.mark.parametrize("batch", [1, 40])
def test_a_subclass_of_ndarray_gives_a_plain_array(batch: int) -> None:
    class Labelled(np.ndarray):
        pass

    values = np.random.default_rng(0).standard_normal((batch, 3, 3))
    for solver in (birkhoff.solvers.SinkhornKnopp(), birkhoff.solvers.Newton()):
        result = birkhoff.project(values.view(Labelled), solver).matrix
        assert type(result) is np.ndarray and np.array_equal(result, birkhoff.project(values, solver).matrix)

"""Recompute blocks on a CUDA device: bytes as the allocator counts them, equal gradients, one compiled graph."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mhc_layers import Transformer, TransformerConfig
from mhc_layers._recompute import kept_bytes
from mhc_layers._torch_ops import FusedSite
from mhc_layers.models.transformer import WalkState
from mhc_layers.parallel.recompute import apply_recompute, block_boundaries, block_size

pytestmark = pytest.mark.gpu
N = 4


class Shift(torch.nn.Module):
    """A sublayer that keeps nothing for its backward."""

    def forward(self, u: Tensor, context: Any) -> Tensor:
        return u + 1.0


def bare_model(dim: int, sites: int) -> Transformer:
    """Fused sites around sublayers that keep nothing."""
    with torch.device("cuda"):
        model = Transformer(
            TransformerConfig(
                vocab_size=8, dim=dim, num_layers=sites // 2, num_heads=dim // 64, hidden_dim=32, max_seq_len=4096
            )
        )
    for site in model.sites:
        site.sublayer = Shift()
        assert isinstance(site.implementation, FusedSite)
    return model


def allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def kept_after_walk(model: Transformer, x: Tensor) -> int:
    """Bytes that a walk leaves allocated, without its result."""
    context = model.context(x.shape[1])
    before = allocated()
    state = model.walk(WalkState(x), context)
    kept = allocated() - before - state.x.untyped_storage().nbytes()
    state.x.backward(torch.ones_like(state.x))
    return kept


@pytest.mark.parametrize("dim", [2048, 4096])
def test_the_allocator_counts_what_the_formula_says(dim: int) -> None:
    tokens, sites = 2048, 8
    model = bare_model(dim, sites)
    x = torch.randn(1, tokens, N, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    kept_after_walk(model, x)  # compiles
    everything = kept_after_walk(model, x)
    block = block_size(sites, num_streams=N)
    apply_recompute(model)
    kept_after_walk(model, x)
    measured = kept_after_walk(model, x)
    blocks = block_boundaries([sites], num_streams=N, block=block)
    formula = sum(kept_bytes(tokens, last - first, N, dim) for first, last in blocks)
    formula -= x.untyped_storage().nbytes()  # the first block was entered with x, which is the caller's
    print(f"C={dim} tokens={tokens} sites={sites} block={block}: everything {everything}, kept {measured}, {formula=}")
    # exact, because the allocator hands out multiples of 512 bytes and every size here is one
    assert measured == formula
    streams, coefficients = 2 * tokens * N * dim, 4 * tokens * N * (N + 2)
    assert everything - measured == (sites - len(blocks)) * streams - (sites - 1) * coefficients


def small_model(**changes: Any) -> Transformer:
    torch.manual_seed(0)
    fields: dict[str, Any] = {"vocab_size": 256, "dim": 256, "num_layers": 3, "num_heads": 4, "max_seq_len": 256}
    model = Transformer(TransformerConfig(**(fields | changes))).cuda()
    with torch.no_grad():
        for site in model.sites:
            site.phi.normal_(std=0.02)
            for gate in (site.alpha_pre, site.alpha_post, site.alpha_res):
                gate.fill_(0.1)
    return model


def loss_and_gradients(model: Transformer, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, dict[str, Tensor]]:
    text = torch.randint(256, (4, 257), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    model.zero_grad()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        loss, _ = model.loss(text[:, :-1], text[:, 1:])
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def errors(truth: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, float]:
    """Relative distance of the gradients of all sites' phi, of their bias, of each gate, and of all other weights."""
    norms: dict[str, list[float]] = {}
    for name, value in truth.items():
        last = name.rpartition(".")[2]
        kind = last if last in ("phi", "bias") or last.startswith("alpha") else "weights"
        squares = norms.setdefault(kind, [0.0, 0.0])
        squares[0] += float((gradients[name] - value).square().sum())
        squares[1] += float(value.square().sum())
    return {kind: (distance / norm) ** 0.5 for kind, (distance, norm) in norms.items()}


def cut_in_blocks(model: Transformer) -> None:
    """Walk the blocks one by one and recompute nothing; a block ends with a write and begins with a read of its own."""
    walk, blocks = model.walk, block_boundaries([len(model.sites)], num_streams=N)

    def walk_blocks(state: WalkState, context: Any) -> WalkState:
        for first, last in blocks:
            state = walk(state, context, list(model.sites)[first:last])
        return state

    model.walk = walk_blocks  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("convention", ["paper", "deepseek_v4", "deepseek_v41"])
@pytest.mark.parametrize("compiled", [False, True])
def test_recomputing_changes_no_bit(convention: str, compiled: bool) -> None:
    model, same = small_model(convention=convention), small_model(convention=convention)
    cut_in_blocks(model)
    apply_recompute(same, compiled=compiled)
    with sdpa_kernel(SDPBackend.MATH):  # other attention kernels add their gradients in any order
        loss, expected = loss_and_gradients(model)
        again, actual = loss_and_gradients(same)
    assert torch.equal(again, loss)
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_compiled_model_recomputes_in_one_graph(dtype: torch.dtype) -> None:
    """The truth are the float32 gradients of the model as called.

    In float32 the compiled ones agree to rounding. In bfloat16 they are compared by their error, which must not be much
    larger than that of the model as called in bfloat16: the two round at different places. The three gates of a site
    are left out there, since what rounding leaves of their gradients has been seen 39 % off on a CPU.
    """
    torch._dynamo.reset()
    model = small_model(num_layers=2)
    loss, truth = loss_and_gradients(model, torch.float32)
    as_called = errors(truth, loss_and_gradients(model, dtype)[1])
    apply_recompute(model, compiled=True)
    model.loss = torch.compile(model.loss, fullgraph=True)  # type: ignore[method-assign]
    again, gradients = loss_and_gradients(model, dtype)
    compiled = errors(truth, gradients)
    print(f"{dtype}: loss {float(loss)}, {float(again)}; errors as called {as_called}, compiled {compiled}")
    torch.testing.assert_close(again, loss, rtol=1e-5 if dtype == torch.float32 else 1e-3, atol=0.0)
    if dtype == torch.float32:
        assert max(compiled.values()) <= 1e-3
    else:
        assert [kind for kind in ("phi", "bias", "weights") if compiled[kind] > 2 * as_called[kind]] == []

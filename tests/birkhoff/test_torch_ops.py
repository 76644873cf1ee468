"""Projections on torch under every transform: gradients to second order, forward mode, vmap, compilation, autocast."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.autograd import gradcheck, gradgradcheck  # noqa: E402
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap  # noqa: E402

import birkhoff  # noqa: E402
import birkhoff._torch_ops  # noqa: E402  registers the operators, which a first call would
import birkhoff.diagnostics  # noqa: E402
import birkhoff.support  # noqa: E402
from birkhoff import reference  # noqa: E402
from birkhoff.adjoints import Implicit, Unrolled  # noqa: E402
from birkhoff.errors import ArrayTypeError  # noqa: E402
from birkhoff.large import project_large  # noqa: E402
from birkhoff.solvers import Euclidean, Newton, SinkhornDamped, SinkhornKnopp, SinkhornLog  # noqa: E402
from birkhoff.solvers.protocol import to_text  # noqa: E402

SOLVERS = [
    SinkhornKnopp(num_iters=3),
    SinkhornKnopp(num_iters=2, first="rows", range_cap=1.0),
    SinkhornLog(num_iters=3),
    SinkhornLog(num_iters=3, relaxation=1.4),
    SinkhornDamped(num_iters=3, eps_start=0.02, eps_den=0.01),
    SinkhornDamped(num_iters=2, range_cap=1.5, first="columns"),
    Newton(tol=1e-13),
    Newton(tol=1e-13, first="rows"),
    Euclidean(),
]


def logits(*shape: int, seed: int = 0, scale: float = 1.0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def project(solver: Any, **options: Any) -> Any:
    return lambda x: birkhoff.project(x, solver, **options).matrix


@pytest.mark.parametrize("solver", SOLVERS, ids=to_text)
def test_gradients_to_second_order(solver: Any) -> None:
    x = logits(2, 3, 3).requires_grad_()
    assert gradcheck(
        project(solver), (x,), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert gradgradcheck(project(solver), (x,))


@pytest.mark.parametrize("solver", SOLVERS[:6:2], ids=to_text)
def test_forward_over_reverse(solver: Any) -> None:
    x = logits(1, 3, 3).requires_grad_()
    assert gradgradcheck(project(solver), (x,), check_fwd_over_rev=True)


@pytest.mark.parametrize("finish", ["nonexpansive", "exact"])
def test_gradients_pass_through_a_finish(finish: str) -> None:
    x = logits(2, 3, 3, scale=3.0).requires_grad_()
    assert gradcheck(project(SinkhornKnopp(num_iters=2), finish=finish), (x,))


def weighted(solver: Any) -> Any:
    weight = torch.arange(9.0, dtype=torch.float64).reshape(3, 3)
    return lambda x: (weight * project(solver)(x) ** 2).sum()


def test_functional_transforms_agree() -> None:
    function, x = weighted(SinkhornKnopp(num_iters=4)), logits(3, 3)
    expected = torch.autograd.functional.hessian(function, x)
    for second in (hessian, lambda f: jacrev(jacrev(f)), lambda f: jacrev(jacfwd(f)), lambda f: jacfwd(jacfwd(f))):
        torch.testing.assert_close(second(function)(x), expected)
    torch.testing.assert_close(jacfwd(hessian(function))(x), jacrev(hessian(function))(x))


@pytest.mark.parametrize("solver", [SinkhornKnopp(num_iters=4), Newton(tol=1e-13), Euclidean()], ids=to_text)
def test_vmap_grad_jvp_and_vjp(solver: Any) -> None:
    stack, function = logits(5, 3, 3), weighted(solver)
    torch.testing.assert_close(vmap(project(solver))(stack), project(solver)(stack))
    torch.testing.assert_close(vmap(project(solver), in_dims=1, out_dims=1)(stack.movedim(0, 1)).movedim(1, 0),
                               project(solver)(stack))  # fmt: skip
    torch.testing.assert_close(vmap(grad(function))(stack), torch.stack([grad(function)(one) for one in stack]))
    direction = logits(3, 3, seed=1)
    _, tangent = jvp(project(solver), (stack[0],), (direction,))
    _, pull = vjp(project(solver), stack[0])
    torch.testing.assert_close((tangent * direction).sum(), (pull(direction)[0] * direction).sum())


def test_nested_forward_mode_is_refused_where_it_would_be_silently_wrong() -> None:
    with pytest.raises(NotImplementedError, match="forward mode inside forward mode"):
        jacfwd(jacfwd(weighted(Newton())))(logits(3, 3))


@pytest.mark.parametrize("std", [0.5, 3.0, 30.0, 100.0])
def test_gradient_is_the_oracle_s(std: float, rng: Any) -> None:
    values, upstream = rng.normal(size=(50, 4, 4)) * std, rng.normal(size=(50, 4, 4))
    x = torch.tensor(values, requires_grad=True)
    birkhoff.sinkhorn(x).backward(torch.tensor(upstream))
    expected = reference.gradient(values, upstream)
    assert np.abs(x.grad.numpy() - expected).max() <= 1e-12 * max(1.0, np.abs(expected).max())
    single = torch.tensor(values, dtype=torch.float32, requires_grad=True)
    birkhoff.sinkhorn(single).backward(torch.tensor(upstream, dtype=torch.float32))
    assert np.abs(single.grad.numpy() - expected).max() <= 2e-5 * max(1.0, std / 3) * max(1.0, np.abs(expected).max())


def test_gradient_is_finite_and_zero_where_nothing_arrives() -> None:
    x = torch.tensor([[0.0, -torch.inf], [300.0, -300.0]], dtype=torch.float32).repeat(20, 1, 1).requires_grad_()
    (birkhoff.sinkhorn(x) ** 2).sum().backward()
    assert torch.isfinite(x.grad).all()
    y = logits(4, 3, 3).requires_grad_()
    (birkhoff.sinkhorn(y) * 0).sum().backward()
    assert (y.grad == 0).all()


def test_gradient_to_a_tolerance_counts_the_iterations_of_each_matrix() -> None:
    solver = SinkhornLog(num_iters=300, tol=1e-2)
    x = torch.cat([logits(3, 3, 3, scale=0.2), logits(3, 3, 3, scale=2.0)]).requires_grad_()
    assert birkhoff.project(x, solver).num_iters.unique().numel() > 1
    assert gradcheck(project(solver), (x,))


@pytest.mark.parametrize("adjoint", [None, Implicit(bound=1e-7)], ids=str)
def test_derivatives_to_a_tolerance_under_vmap(adjoint: Any) -> None:
    """Counts cannot be read there; the derivative must be the same, and not silently zero."""
    solver = SinkhornKnopp(num_iters=60, tol=1e-6)
    stack, direction = torch.cat([logits(3, 3, 3, scale=0.2), logits(3, 3, 3, scale=2.0)]), logits(6, 3, 3, seed=1)
    assert birkhoff.project(stack, solver).num_iters.unique().numel() > 1
    function, kept = project(solver, adjoint=adjoint), stack.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(kept), kept, direction)

    def inner(x: Any, y: Any) -> Any:
        return (function(x) * y).sum()

    torch.testing.assert_close(torch.autograd.grad(vmap(function)(kept), kept, direction)[0], expected)
    torch.testing.assert_close(vmap(grad(inner))(stack, direction), expected)
    torch.testing.assert_close(grad(lambda x: vmap(inner)(x, direction).sum())(stack), expected)
    moved = vmap(lambda x, y: jvp(function, (x,), (y,))[1])(stack, direction)
    torch.testing.assert_close((moved * direction).sum(), jvp(lambda x: inner(x, direction), (stack,), (direction,))[1])
    seconds = []
    for values in (inner(kept, direction), vmap(inner)(kept, direction).sum()):
        (first,) = torch.autograd.grad(values, kept, create_graph=True)
        seconds += torch.autograd.grad(first.square().sum(), kept)
    assert seconds[0].abs().max() > 0
    torch.testing.assert_close(*seconds)
    with pytest.raises(NotImplementedError, match="no second derivative inside vmap"):
        vmap(grad(lambda x, y: grad(inner)(x, y).square().sum()))(stack, direction)


def test_trace_observes_and_does_not_differentiate() -> None:
    seen: list[int] = []
    result = birkhoff.project(logits(2, 3, 3).requires_grad_(), trace=lambda k, errors: seen.append(k))
    assert seen == list(range(1, 21)) and not result.matrix.requires_grad


def test_implicit_falls_back_to_the_exact_gradient_and_says_so() -> None:
    x = torch.stack([torch.eye(3, dtype=torch.float64), logits(3, 3, scale=4.0)]).requires_grad_()
    solver, upstream = SinkhornKnopp(num_iters=8), logits(2, 3, 3, seed=2)
    guarded = birkhoff.project(x, solver, adjoint=Implicit(bound=1e-9))
    trusted = Implicit(bound=1e-9).trusts(guarded.matrix.detach())
    assert trusted.tolist() == [True, False]
    (implicit,) = torch.autograd.grad(guarded.matrix, x, upstream)
    (exact,) = torch.autograd.grad(birkhoff.project(x, solver).matrix, x, upstream)
    assert torch.equal(implicit[1], exact[1])
    torch.testing.assert_close(implicit[0], exact[0])
    assert guarded.status.tolist() == [birkhoff.Status.converged, birkhoff.Status.ill_conditioned_adjoint]


@pytest.mark.parametrize("op", ["project_forward", "project_vjp", "solve_forward", "solve_vjp"])
@pytest.mark.parametrize("watched", [False, True])
def test_opcheck(op: str, watched: bool) -> None:
    stack, plan = logits(5, 3, 3), (to_text(SinkhornKnopp(num_iters=4)), "float64", "float64", "float64")
    counts = torch.tensor([1, 2, 3, 2, 1], dtype=torch.int32)
    stacks = {"project_vjp": (stack, stack), "solve_vjp": (stack, counts, stack)}.get(op, (stack,))
    if watched and not op.endswith("vjp"):  # the others have a first gradient
        stacks = (stack.requires_grad_(),)
    torch.library.opcheck(getattr(torch.ops.birkhoff, op).default, (*stacks, *plan))


@pytest.mark.parametrize(
    ("solver", "mapped", "adjoint"),
    [
        (SinkhornKnopp(num_iters=9), True, None),
        (SinkhornKnopp(num_iters=60, tol=1e-6), False, None),
        (SinkhornKnopp(num_iters=60, tol=1e-6), False, Implicit(bound=1e-7)),
        (SinkhornKnopp(num_iters=60, tol=1e-6), True, None),
        (Newton(), True, None),
    ],
    ids=str,
)
def test_compiled_gradients_under_vmap_and_to_a_tolerance(solver: Any, mapped: bool, adjoint: Any) -> None:
    """The compiler takes a Function under ``vmap`` apart, and cannot read the counts that a tolerance gives."""
    torch._dynamo.reset()
    eager = project(solver, adjoint=adjoint)
    function = vmap(eager) if mapped else eager
    x, weight = torch.cat([logits(2, 3, 3, scale=0.2), logits(2, 3, 3)]).requires_grad_(), logits(4, 3, 3, seed=1)
    compiled = torch.compile(lambda x: function(x) * weight, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(x).sum(), x)
    torch.testing.assert_close(got, torch.autograd.grad(eager(x), x, weight)[0])
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "solver",
    [
        SinkhornKnopp(num_iters=4),
        pytest.param(Newton(), marks=pytest.mark.slow),
        pytest.param(Euclidean(num_iters=10), marks=pytest.mark.slow),
    ],
    ids=to_text,
)
def test_compiles_as_one_graph_with_its_gradient_and_any_batch(solver: Any) -> None:
    torch._dynamo.reset()
    graphs: list[int] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(1)
        return graph.forward

    function = project(solver)
    counted = torch.compile(function, fullgraph=True, backend=count, dynamic=True)
    for batch in (7, 9, 12):
        counted(logits(batch, 3, 3))
    assert len(graphs) == 1
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (7, 9):
        x, y = logits(batch, 3, 3).requires_grad_(), logits(batch, 3, 3).requires_grad_()
        compiled(x).square().sum().backward()
        function(y).square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
    torch._dynamo.reset()


def test_compiles_before_any_eager_call_and_with_a_report() -> None:
    torch._dynamo.reset()

    def whole(x: Any) -> tuple[Any, ...]:
        result = birkhoff.project(x * 2, SinkhornKnopp(num_iters=6), finish="exact")
        return birkhoff.sinkhorn(x, 3, first="rows"), result.matrix, result.status, result.row_error

    x = logits(4, 3, 3)
    for got, expected in zip(torch.compile(whole, fullgraph=True, backend="eager")(x), whole(x), strict=True):
        torch.testing.assert_close(got, expected)
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiles_with_inductor_inside_a_model() -> None:
    torch._dynamo.reset()
    layer = torch.nn.Linear(8, 16)

    def model(x: Any) -> Any:
        return (birkhoff.sinkhorn(layer(x).unflatten(-1, (4, 4))) @ x[:, :4, None]).square().sum()

    x = torch.randn(6, 8)
    expected = model(x)
    expected_grad = torch.autograd.grad(model(x), layer.weight)[0]
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(torch.autograd.grad(compiled(x), layer.weight)[0], expected_grad)


def test_autocast_changes_nothing() -> None:
    x = torch.randn(6, 4, 4, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = birkhoff.sinkhorn(x)
    outside = birkhoff.sinkhorn(y)
    assert torch.equal(inside, outside)
    inside.square().sum().backward()
    outside.square().sum().backward()
    assert torch.equal(x.grad, y.grad)


def test_autocast_changes_no_matrix_product() -> None:
    """Products of the Euclidean projection's derivative, of diagnostics and of large matrices stay in float32."""
    x, direction = torch.randn(5, 6, 6), torch.randn(5, 6, 6)
    big = torch.randn(40, 40)

    def numbers() -> list[Any]:
        mixing = birkhoff.diagnostics.diagnose(birkhoff.sinkhorn(x))
        return [
            jvp(project(Euclidean()), (x,), (direction,))[1],
            mixing.second_eigenvalue,
            mixing.second_singular_value,
            project_large(big).matrix,
        ]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = numbers()
    for got, expected in zip(inside, numbers(), strict=True):
        assert torch.equal(got, expected) and got.dtype == torch.float32


@pytest.mark.parametrize("solver", [SinkhornKnopp(tol=1e-9, num_iters=200), SinkhornDamped(tol=1e-2)], ids=to_text)
def test_forward_mode_to_a_tolerance(solver: Any) -> None:
    """Tangents are those of the iterations that ran, not silently zero."""
    x, direction = logits(3, 4, 4), logits(3, 4, 4, seed=1)
    moved = jvp(project(solver), (x,), (direction,))[1]
    by_reverse = torch.einsum("bijckl,ckl->bij", jacrev(project(solver))(x), direction)
    torch.testing.assert_close(moved, by_reverse)
    assert moved.abs().max() > 0.1


@pytest.mark.parametrize("solver", [SinkhornKnopp(), SinkhornKnopp(tol=1e-6), Newton(), Euclidean()], ids=to_text)
def test_tensors_without_values(solver: Any) -> None:
    """Shapes and dtypes of a report are known on the meta device and to the tracer's fake tensors."""
    result = birkhoff.project(torch.empty(3, 2, 4, 4, device="meta"), solver, finish="exact")
    assert result.matrix.shape == (3, 2, 4, 4) and result.matrix.is_meta and result.status.shape == (3, 2)
    with FakeTensorMode():
        assert birkhoff.project(torch.empty(3, 4, 4), solver).column_error.shape == (3,)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no process groups")
@pytest.mark.parametrize("solver", [SinkhornKnopp(), SinkhornKnopp(tol=1e-3), Newton()], ids=to_text)
def test_distributed_tensors_keep_their_shards(solver: Any) -> None:
    """A batch that is sharded stays so, with its gradient: matrices are independent."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    x = logits(4, 2, 3, 3).masked_fill(torch.eye(3) == 1, -torch.inf)
    expected = birkhoff.project(x, solver, finish="exact")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        sharded = distribute_tensor(x, init_device_mesh("cpu", (1,)), [Shard(0)])
        sharded.requires_grad_()
        result = birkhoff.project(sharded, solver, finish="exact")
        assert result.matrix.placements == result.status.placements == (Shard(0),)
        assert torch.equal(result.matrix.full_tensor(), expected.matrix)
        assert torch.equal(result.status.full_tensor(), expected.status)
        result.matrix.square().sum().backward()
        whole = x.requires_grad_()
        birkhoff.project(whole, solver, finish="exact").matrix.square().sum().backward()
        assert sharded.grad.placements == (Shard(0),)
        torch.testing.assert_close(sharded.grad.full_tensor(), whole.grad)
        matrix = result.matrix.detach()
        answers = (
            *(birkhoff.certify, birkhoff.certify_product, birkhoff.decompose),
            *(birkhoff.diagnostics.diagnose, birkhoff.support.diagnose_support, birkhoff.support.total_support_pattern),
        )
        for answer in answers:
            with pytest.raises(ArrayTypeError, match="full_tensor"):
                answer(matrix)
    finally:
        torch.distributed.destroy_process_group()


def test_operators_have_their_own_rule_for_vmap(capfd: pytest.CaptureFixture[str]) -> None:
    """Not torch's loop over the batch, which warns."""
    x, solver = logits(3, 5, 4, 4), SinkhornKnopp(tol=1e-6, num_iters=100)
    counts = vmap(lambda z: birkhoff.project(z, solver).num_iters, in_dims=1, out_dims=1)(x)
    assert torch.equal(counts, birkhoff.project(x, solver).num_iters)
    plan = (to_text(SinkhornKnopp()), "float64", "float64", "float64")
    direction = logits(3, 5, 4, 4, seed=1)
    for op, stacks in ((torch.ops.birkhoff.project_forward, (x,)), (torch.ops.birkhoff.project_vjp, (x, direction))):
        mapped = vmap(lambda *z, op=op: op(*z, *plan))(*stacks)
        assert torch.equal(mapped, torch.stack([op(*parts, *plan) for parts in zip(*stacks, strict=True)]))
    assert "batching rule" not in capfd.readouterr().err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients(dtype: Any) -> None:
    x = torch.randn(6, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    y = x.detach().float().requires_grad_()
    weight = torch.randn(4, 4).to(dtype)
    (birkhoff.sinkhorn(x) * weight).sum().backward()
    (birkhoff.sinkhorn(y) * weight.float()).sum().backward()
    assert x.grad.dtype == dtype
    torch.testing.assert_close(x.grad.float(), y.grad, rtol=2e-2, atol=2e-3)


def test_checkpointing_and_expanded_inputs() -> None:
    from torch.utils.checkpoint import checkpoint

    x = logits(3, 3).requires_grad_()
    once = birkhoff.sinkhorn(x.expand(5, 3, 3))
    (plain,) = torch.autograd.grad(once.square().sum(), x)
    again = checkpoint(lambda v: birkhoff.sinkhorn(v.expand(5, 3, 3)), x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.square().sum(), x)[0], plain)


def test_no_iterate_is_kept_for_backward() -> None:
    x = torch.randn(1000, 4, 4, requires_grad=True)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        birkhoff.sinkhorn(x, 20)
    assert sum(saved) <= x.numel()


def test_unrolled_as_a_function_equals_autograd() -> None:
    x, upstream = logits(6, 3, 3).requires_grad_(), logits(6, 3, 3, seed=1)
    for solver in SOLVERS[:6]:
        (expected,) = torch.autograd.grad(project(solver)(x), x, upstream)
        torch.testing.assert_close(Unrolled().vjp(x.detach(), upstream, solver), expected)


@pytest.mark.gpu
def test_cuda_graph_replays() -> None:
    x = torch.randn(100, 4, 4, device="cuda")
    birkhoff.sinkhorn(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = birkhoff.project(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(result.matrix, birkhoff.sinkhorn(x))


@pytest.mark.gpu
@pytest.mark.parametrize("std", [1.0, 30.0])
@pytest.mark.parametrize("solver", [SinkhornKnopp(), SinkhornLog(), SinkhornDamped(), Newton()], ids=to_text)
def test_cuda_equals_cpu(solver: Any, std: float) -> None:
    x = (torch.randn(200, 4, 4, generator=torch.Generator().manual_seed(1)) * std).requires_grad_()
    y = x.detach().cuda().requires_grad_()
    weight = torch.randn(200, 4, 4, generator=torch.Generator().manual_seed(2))
    on_cpu, on_cuda = project(solver)(x), project(solver)(y)
    bound = 3e-6 if solver.method == "newton" else 16 * 2.0**-24
    torch.testing.assert_close(on_cuda.cpu(), on_cpu, rtol=0, atol=bound * max(1.0, std))
    (on_cpu * weight).sum().backward()
    (on_cuda * weight.cuda()).sum().backward()
    closeness = (0.0, 1e-5) if solver.method == "newton" else (1e-3, 1e-4 * max(1.0, std / 3))
    torch.testing.assert_close(y.grad.cpu(), x.grad, rtol=closeness[0], atol=closeness[1])

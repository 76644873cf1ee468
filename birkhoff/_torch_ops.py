"""Torch: projections as registered operators with exact gradients, under every transform.

Custom operators (``birkhoff::project_forward``, ``project_vjp``, ``solve_forward``, ``solve_vjp``) run whatever row the
table chooses; they are opaque to the compiler, visible to checkpointing policies. Around them each
``autograd.Function`` carries the mathematics: the vector-Jacobian product, its own derivative (double backward),
forward mode, and ``vmap``. Second-order rules are plain differentiable array calls, so every higher order exists.

While compiling, forward mode is left out: the compiler refuses a Function that defines it. It also takes a Function
under ``vmap`` apart, so the operators that then stand bare have a first gradient of their own.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from birkhoff import _xp
from birkhoff._dispatch import stack_forward, stack_to_tolerance, stack_vjp, with_dtypes
from birkhoff._iterate import Trace
from birkhoff._layout import frame_for
from birkhoff.adjoints.implicit import Implicit, implicit_vjp
from birkhoff.adjoints.unrolled import by_iterations, unrolled_jvp, unrolled_matrix, unrolled_vjp_tangent
from birkhoff.precision import Precision
from birkhoff.solvers.protocol import from_text, to_text

__all__ = ["BINDING"]

Plan = tuple[Any, str, str, str]
"""The solver, and the names of the compute, accumulate and store dtypes."""


def _plan(tensor: Tensor, solver: Any, precision: Precision) -> Plan:
    if hasattr(tensor, "placements"):  # a DTensor
        _register_sharding()
    settled = precision.resolve(tensor.dtype)
    return solver, str(settled.compute), str(settled.accumulate), str(settled.store)


def _stored(tensor: Tensor, precision: Precision) -> torch.dtype:
    return getattr(torch, str(precision.resolve(tensor.dtype).store))


def _schema(plan: Plan) -> tuple[str, str, str, str]:
    """The plan as an operator's schema can hold it."""
    return to_text(plan[0]), plan[1], plan[2], plan[3]


def _precision(plan: Plan) -> Precision:
    return Precision(compute=plan[1], accumulate=plan[2], store=plan[3])


@torch.library.custom_op("birkhoff::project_forward", mutates_args=())
def project_forward(logits: Tensor, solver: str, compute: str, accumulate: str, store: str) -> Tensor:
    """Project a stack ``(B, n, n)``."""
    precision = Precision(compute=compute, accumulate=accumulate, store=store)
    return stack_forward(logits, from_text(solver), precision, branch=logits.device.type == "cpu")


@project_forward.register_fake
def _(logits: Tensor, solver: str, compute: str, accumulate: str, store: str) -> Tensor:
    return logits.new_empty(logits.shape, dtype=getattr(torch, store))


@torch.library.custom_op("birkhoff::project_vjp", mutates_args=())
def project_vjp(logits: Tensor, grad_matrix: Tensor, solver: str, compute: str, accumulate: str, store: str) -> Tensor:
    """Gradient with respect to the logits of :func:`project_forward`, iterates recomputed."""
    precision = Precision(compute=compute, accumulate=accumulate, store=store)
    branch = logits.device.type == "cpu"
    return stack_vjp(logits, grad_matrix, from_text(solver), precision, branch=branch)


@project_vjp.register_fake
def _(logits: Tensor, grad_matrix: Tensor, solver: str, compute: str, accumulate: str, store: str) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.custom_op("birkhoff::solve_forward", mutates_args=())
def solve_forward(logits: Tensor, solver: str, compute: str, accumulate: str, store: str) -> tuple[Tensor, Tensor]:
    """Project a stack ``(B, n, n)``, to the solver's tolerance if it has one; also the iterations of each matrix."""
    method = from_text(solver)
    precision = Precision(compute=compute, accumulate=accumulate, store=store)
    branch = logits.device.type == "cpu"
    if method.tol is None:
        counts = logits.new_full(logits.shape[:1], method.num_iters, dtype=torch.int32)
        return stack_forward(logits, method, precision, branch=branch), counts
    return stack_to_tolerance(logits, method, precision, branch=branch)


@solve_forward.register_fake
def _(logits: Tensor, solver: str, compute: str, accumulate: str, store: str) -> tuple[Tensor, Tensor]:
    matrix = logits.new_empty(logits.shape, dtype=getattr(torch, store))
    return matrix, logits.new_empty(logits.shape[:1], dtype=torch.int32)


@torch.library.custom_op("birkhoff::solve_vjp", mutates_args=())
def solve_vjp(
    logits: Tensor, counts: Tensor, grad_matrix: Tensor, solver: str, compute: str, accumulate: str, store: str
) -> Tensor:
    """Gradient with respect to the logits of as many iterations as each matrix took in :func:`solve_forward`."""
    precision = Precision(compute=compute, accumulate=accumulate, store=store)
    branch = logits.device.type == "cpu"

    def sweep(method: Any, part: Tensor, grad: Tensor) -> Tensor:
        return stack_vjp(part, grad, method, precision, branch=branch)

    return by_iterations(from_text(solver), counts, _xp.array_namespace(logits), sweep, logits, grad_matrix)


@solve_vjp.register_fake
def _(logits: Tensor, counts: Tensor, grad_matrix: Tensor, *plan: str) -> Tensor:
    return logits.new_empty(logits.shape)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the stacks, and the plan that follows them in an operator's arguments."""
    ctx.save_for_backward(*(stack for stack in inputs if isinstance(stack, Tensor)))
    ctx.plan = tuple(text for text in inputs if isinstance(text, str))


def _keep_solution(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[0], *output)
    ctx.plan = inputs[1:]


def _pull_projection(ctx: Any, grad_matrix: Tensor) -> tuple[Any, ...]:
    return torch.ops.birkhoff.project_vjp(*ctx.saved_tensors, grad_matrix, *ctx.plan), *(None,) * 4


def _pull_solution(ctx: Any, grad_matrix: Tensor, _: Any) -> tuple[Any, ...]:
    logits, matrix, counts = ctx.saved_tensors
    if _converges(from_text(ctx.plan[0])):
        grad = _derivative(matrix, grad_matrix, (from_text(ctx.plan[0]), *ctx.plan[1:]))
    else:
        grad = torch.ops.birkhoff.solve_vjp(logits, counts, grad_matrix, *ctx.plan)
    return grad, *(None,) * 4


project_forward.register_autograd(_pull_projection, setup_context=_keep_inputs)
solve_forward.register_autograd(_pull_solution, setup_context=_keep_solution)


def _fold(size: int, dims: tuple[int | None, ...], stacks: tuple[Tensor, ...]) -> tuple[list[Tensor], Any]:
    """Merge a mapped axis into the stack axis; ``join`` splits it off the result again."""
    moved = [
        stack.unsqueeze(0).expand(size, *stack.shape) if dim is None else stack.movedim(dim, 0)
        for dim, stack in zip(dims, stacks, strict=True)
    ]
    return [stack.flatten(0, 1) for stack in moved], lambda result: result.unflatten(0, (size, -1))


@project_forward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], logits: Tensor, *plan: str) -> tuple[Tensor, int]:
    (logits,), join = _fold(info.batch_size, in_dims[:1], (logits,))
    return join(project_forward(logits, *plan)), 0


@project_vjp.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], logits: Tensor, grad: Tensor, *plan: str) -> tuple[Tensor, int]:
    (logits, grad), join = _fold(info.batch_size, in_dims[:2], (logits, grad))
    return join(project_vjp(logits, grad, *plan)), 0


@solve_forward.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], logits: Tensor, *plan: str) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    (logits,), join = _fold(info.batch_size, in_dims[:1], (logits,))
    matrix, counts = solve_forward(logits, *plan)
    return (join(matrix), join(counts)), (0, 0)


@solve_vjp.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
    stacks, join = _fold(info.batch_size, in_dims[:3], arguments[:3])
    return join(solve_vjp(*stacks, *arguments[3:])), 0


@cache
def _register_sharding() -> None:
    """Tell ``torch.distributed.tensor``, which a distributed tensor has imported, that matrices are independent."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    for name, outputs, inputs in (
        ("project_forward", 1, 1),
        ("project_vjp", 1, 2),
        ("solve_forward", 2, 1),
        ("solve_vjp", 1, 3),
    ):
        ways = [([way] * outputs, [way] * inputs + [None] * 4) for way in (Replicate(), Shard(0))]
        register_sharding(getattr(torch.ops.birkhoff, name).default)(lambda *_, ways=ways: ways)


def _jvp(logits: Tensor, tangent: Tensor, plan: Plan) -> Tensor:
    moved = with_dtypes(unrolled_jvp, (logits, tangent), plan[0], _precision(plan))
    return moved.to(getattr(torch, plan[3]))


def _vjp_tangent(logits: Tensor, grad: Tensor, tangent: Tensor, grad_tangent: Tensor, plan: Plan) -> Tensor:
    stacks = (logits, grad, tangent, grad_tangent)
    return with_dtypes(unrolled_vjp_tangent, stacks, plan[0], _precision(plan)).to(logits.dtype)


class _Vjp(torch.autograd.Function):
    """``(logits, grad_matrix) -> grad_logits``, differentiable in both."""

    @staticmethod
    def forward(logits: Tensor, grad_matrix: Tensor, plan: Plan) -> Tensor:
        return torch.ops.birkhoff.project_vjp(logits, grad_matrix, *_schema(plan))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        logits, grad_matrix, ctx.plan = inputs
        ctx.save_for_backward(logits, grad_matrix)
        ctx.save_for_forward(logits, grad_matrix)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        logits, grad_matrix = ctx.saved_tensors
        grad_logits = grad_grad = None
        if ctx.needs_input_grad[0]:  # the gradient of <grad_matrix, J cotangent>
            zeros = torch.zeros_like(grad_matrix)
            grad_logits = _vjp_tangent(logits, grad_matrix, cotangent, zeros, ctx.plan)
        if ctx.needs_input_grad[1]:
            grad_grad = _jvp(logits, cotangent, ctx.plan).to(grad_matrix.dtype)
        return grad_logits, grad_grad, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], logits: Tensor, grad_matrix: Tensor, plan: Plan) -> tuple[Any, int]:
        (logits, grad_matrix), join = _fold(info.batch_size, in_dims[:2], (logits, grad_matrix))
        return join(_pick(_Vjp, _VjpForwardMode).apply(logits, grad_matrix, plan)), 0


class _VjpForwardMode(_Vjp):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, grad_tangent: Tensor | None, _: None) -> Tensor:
        logits, grad_matrix = ctx.saved_tensors
        tangent = torch.zeros_like(logits) if tangent is None else tangent
        grad_tangent = torch.zeros_like(grad_matrix) if grad_tangent is None else grad_tangent
        return _vjp_tangent(logits, grad_matrix, tangent, grad_tangent, ctx.plan)


class _Project(torch.autograd.Function):
    """``logits -> matrix``; only the logits are kept for the backward pass."""

    @staticmethod
    def forward(logits: Tensor, plan: Plan) -> Tensor:
        return torch.ops.birkhoff.project_forward(logits, *_schema(plan))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        logits, ctx.plan = inputs
        ctx.save_for_backward(logits)
        ctx.save_for_forward(logits)

    @staticmethod
    def backward(ctx: Any, grad_matrix: Tensor) -> tuple[Any, ...]:
        (logits,) = ctx.saved_tensors
        return _pick(_Vjp, _VjpForwardMode).apply(logits, grad_matrix, ctx.plan), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], logits: Tensor, plan: Plan) -> tuple[Any, int]:
        (logits,), join = _fold(info.batch_size, in_dims[:1], (logits,))
        return join(_pick(_Project, _ProjectForwardMode).apply(logits, plan)), 0


class _ProjectForwardMode(_Project):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        (logits,) = ctx.saved_tensors
        return _jvp(logits, tangent, ctx.plan)


class _Solved(torch.autograd.Function):
    """``logits -> (matrix, counts)`` of a converging solver; the derivative is evaluated at the matrix."""

    @staticmethod
    def forward(logits: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        return torch.ops.birkhoff.solve_forward(logits, *_schema(plan))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, ctx.plan = inputs
        matrix, counts = output
        ctx.mark_non_differentiable(counts)
        ctx.save_for_backward(matrix)
        ctx.save_for_forward(matrix)

    @staticmethod
    def backward(ctx: Any, grad_matrix: Tensor, _: Any) -> tuple[Any, ...]:
        (matrix,) = ctx.saved_tensors
        return _derivative(matrix, grad_matrix, ctx.plan), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], logits: Tensor, plan: Plan) -> tuple[Any, Any]:
        (logits,), join = _fold(info.batch_size, in_dims[:1], (logits,))
        matrix, counts = _pick(_Solved, _SolvedForwardMode).apply(logits, plan)
        return (join(matrix), join(counts)), (0, 0)


class _SolvedForwardMode(_Solved):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> tuple[Tensor, None]:
        (matrix,) = ctx.saved_tensors
        return _derivative(matrix, tangent, ctx.plan), None


class _Guarded(torch.autograd.Function):
    """A fixed iteration with the implicit gradient where it has converged to a bound, and its exact one elsewhere."""

    @staticmethod
    def forward(logits: Tensor, plan: Plan, adjoint: Implicit) -> Tensor:
        return torch.ops.birkhoff.project_forward(logits, *_schema(plan))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        logits, ctx.plan, ctx.adjoint = inputs
        ctx.save_for_backward(logits, output)
        ctx.save_for_forward(logits, output)

    @staticmethod
    def backward(ctx: Any, grad_matrix: Tensor) -> tuple[Any, ...]:
        logits, matrix = ctx.saved_tensors
        implicit = _derivative(matrix, grad_matrix, ctx.plan).to(logits.dtype)
        exact = _pick(_Vjp, _VjpForwardMode).apply(logits, grad_matrix, ctx.plan)
        return torch.where(ctx.adjoint.trusts(matrix)[:, None, None], implicit, exact), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], logits: Tensor, plan: Plan, adjoint: Implicit) -> tuple[Any, int]:
        (logits,), join = _fold(info.batch_size, in_dims[:1], (logits,))
        return join(_pick(_Guarded, _GuardedForwardMode).apply(logits, plan, adjoint)), 0


class _GuardedForwardMode(_Guarded):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        logits, matrix = ctx.saved_tensors
        implicit = _derivative(matrix, tangent, ctx.plan).to(matrix.dtype)
        return torch.where(ctx.adjoint.trusts(matrix)[:, None, None], implicit, _jvp(logits, tangent, ctx.plan))


class _Tolerance(torch.autograd.Function):
    """``logits -> (matrix, counts)`` where an iteration stops by itself and its counts can't be read; one derivative.

    Elsewhere, and so where ``vmap`` is left, the matrices of equal counts are projected once more, together, which has
    derivatives of every order.
    """

    @staticmethod
    def forward(logits: Tensor, plan: Plan, adjoint: Implicit | None) -> tuple[Tensor, Tensor]:
        return torch.ops.birkhoff.solve_forward(logits, *_schema(plan))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        logits, ctx.plan, ctx.adjoint = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(logits, *output)
        ctx.save_for_forward(logits, *output)

    @staticmethod
    def _moved(ctx: Any, direction: Tensor, forward_mode: bool) -> Tensor:
        logits, matrix, counts = ctx.saved_tensors
        exact = _ByCounts.apply(logits, counts, direction, ctx.plan, forward_mode)
        if ctx.adjoint is None:
            return exact
        implicit = _derivative(matrix, direction, ctx.plan).to(exact.dtype)
        return torch.where(ctx.adjoint.trusts(matrix)[:, None, None], implicit, exact)

    @staticmethod
    def backward(ctx: Any, grad_matrix: Tensor, _: Any) -> tuple[Any, ...]:
        return _Tolerance._moved(ctx, grad_matrix, False), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], logits: Tensor, plan: Plan, adjoint: Implicit | None) -> Any:
        (logits,), join = _fold(info.batch_size, in_dims[:1], (logits,))
        matrix, counts = to_tolerance(logits, plan[0], _precision(plan), adjoint)
        return (join(matrix), join(counts)), (0, 0)


class _ToleranceForwardMode(_Tolerance):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor, None]:
        return _Tolerance._moved(ctx, tangent, True), None


class _ByCounts(torch.autograd.Function):
    """The exact derivative of as many iterations as each matrix took, applied to a direction."""

    @staticmethod
    def forward(logits: Tensor, counts: Tensor, direction: Tensor, plan: Plan, forward_mode: bool) -> Tensor:
        if not forward_mode:
            return torch.ops.birkhoff.solve_vjp(logits, counts, direction, *_schema(plan))

        def push(method: Any, part: Tensor, tangent: Tensor) -> Tensor:
            return _jvp(part, tangent, (method, *plan[1:]))

        return by_iterations(plan[0], counts, _xp.array_namespace(logits), push, logits, direction)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is kept: there is no second derivative."""

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        raise NotImplementedError(
            "a projection to a tolerance has no second derivative inside vmap or compile, nor for a DTensor: how many "
            "iterations each matrix took can't be read there; differentiate outside, or fix their number (tol=None)"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
        stacks, join = _fold(info.batch_size, in_dims[:3], arguments[:3])
        return join(_ByCounts.apply(*stacks, *arguments[3:])), 0


def _derivative(matrix: Tensor, direction: Tensor, plan: Plan) -> Tensor:
    """The (symmetric) derivative at a solution, in differentiable array calls."""
    return with_dtypes(_at_solution, (matrix, direction), plan[0], _precision(plan)).to(direction.dtype)


def _at_solution(matrix: Tensor, direction: Tensor, solver: Any, *, xp: Any, accumulate: Any) -> Tensor:
    return implicit_vjp(matrix, direction, solver, frame_for(xp, accumulate))


def _pick(compiling: type, eager: type) -> Any:
    """The Function with forward mode, except while compiling."""
    return compiling if torch.compiler.is_compiling() else eager


def _nested_forward_mode() -> bool:
    """Whether two forward-mode transforms are active, where a Function's ``jvp`` has silently zero second tangents."""
    if torch.compiler.is_compiling():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or []
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack) > 1


def _counts_are_hidden(stack: Tensor) -> bool:
    """Whether a tracer, ``vmap`` or a mesh of devices holds the values, so that no count can be read from them."""
    if torch.compiler.is_compiling() or hasattr(stack, "placements"):  # a DTensor
        return True
    while torch._C._functorch.is_functorch_wrapped_tensor(stack):
        if torch._C._functorch.is_batchedtensor(stack):
            return True
        stack = torch._C._functorch.get_unwrapped(stack)
    return False


def _is_watched(stack: Tensor) -> bool:
    """Whether anything differentiates or transforms this call; if not, the operator alone saves a third of its cost."""
    return (
        torch.compiler.is_compiling()
        or (stack.requires_grad and torch.is_grad_enabled())
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def _converges(solver: Any) -> bool:
    """Whether the solver is differentiated at its solution, having no trajectory to run back."""
    return not hasattr(solver, "trajectory")


def _solve(stack: Tensor, solver: Any, precision: Precision) -> tuple[Tensor, Tensor]:
    if _nested_forward_mode():
        raise NotImplementedError(
            f"{type(solver).__name__}: forward mode inside forward mode is not supported; use reverse over forward"
        )
    # The derivative is evaluated at the matrix, so it is kept unrounded; torch differentiates the casts around it.
    settled = precision.resolve(stack.dtype)
    unrounded = stack.to(getattr(torch, str(settled.compute)))
    plan = _plan(unrounded, solver, replace(settled, store=settled.compute))
    matrix, counts = _pick(_Solved, _SolvedForwardMode).apply(unrounded, plan)
    return matrix.to(_stored(stack, precision)), counts


def forward(stack: Tensor, solver: Any, precision: Precision, adjoint: Any = None) -> Tensor:
    """Differentiable projection of a stack by a fixed number of iterations."""
    if _converges(solver):
        return _solve(stack, solver, precision)[0]
    if _nested_forward_mode():
        return with_dtypes(unrolled_matrix, (stack,), solver, precision).to(_stored(stack, precision))
    plan = _plan(stack, solver, precision)
    if not _is_watched(stack):
        return torch.ops.birkhoff.project_forward(stack, *_schema(plan))
    if isinstance(adjoint, Implicit):
        return _pick(_Guarded, _GuardedForwardMode).apply(stack, plan, adjoint)
    return _pick(_Project, _ProjectForwardMode).apply(stack, plan)


def vjp(stack: Tensor, grad_matrix: Tensor, solver: Any, precision: Precision) -> Tensor:
    """Exact gradient of a fixed number of iterations, itself differentiable."""
    return _pick(_Vjp, _VjpForwardMode).apply(stack, grad_matrix, _plan(stack, solver, precision))


def to_tolerance(
    stack: Tensor, solver: Any, precision: Precision, adjoint: Any = None, trace: Trace | None = None
) -> tuple[Tensor, Tensor]:
    """Projection to a tolerance. A Sinkhorn solver's gradient is the one of as many iterations as each matrix took."""
    if trace is not None:
        with torch.no_grad():
            return stack_to_tolerance(stack, solver, precision, trace, branch=stack.device.type == "cpu")
    if _converges(solver):
        return _solve(stack, solver, precision)
    plan = _plan(stack, solver, precision)
    if _counts_are_hidden(stack):
        return _pick(_Tolerance, _ToleranceForwardMode).apply(stack, plan, adjoint)
    with torch.no_grad():
        matrix, counts = torch.ops.birkhoff.solve_forward(stack.detach(), *_schema(plan))
    if (torch.is_grad_enabled() and stack.requires_grad) or torch.autograd.forward_ad._current_level >= 0:
        xp = _xp.array_namespace(stack)
        matrix = by_iterations(
            solver, counts, xp, lambda method, part: forward(part, method, precision, adjoint), stack
        )
    return matrix, counts


def may_read(tensor: Tensor) -> bool:
    """Whether the values can be looked at: not while tracing, capturing a graph, or under a functional transform."""
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    if tensor.is_meta or isinstance(tensor, FakeTensor) or hasattr(tensor, "placements"):  # none, or in many processes
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


BINDING = {"forward": forward, "to_tolerance": to_tolerance, "vjp": vjp, "may_read": may_read}

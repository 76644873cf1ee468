"""Torch: projections as registered operators with exact gradients, under every transform.

Two custom operators (``birkhoff::project_forward``, ``birkhoff::project_vjp``) run whatever row the table chooses; they
are opaque to the compiler, visible to checkpointing policies. Around them two ``autograd.Function`` carry the
mathematics: the vector-Jacobian product, its own derivative (double backward), forward mode, and ``vmap``. Second-order
rules are plain differentiable array calls, so every higher order exists.

Forward mode is left out while compiling: the compiler refuses a Function that defines it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from birkhoff import _xp
from birkhoff._dispatch import stack_forward, stack_to_tolerance, stack_vjp, with_dtypes
from birkhoff._iterate import Trace
from birkhoff.adjoints.unrolled import by_iterations, unrolled_jvp, unrolled_matrix, unrolled_vjp_tangent
from birkhoff.precision import Precision
from birkhoff.solvers.protocol import from_text, to_text

__all__ = ["BINDING"]

Plan = tuple[str, str, str, str]
"""Solver as text, and the compute, accumulate and store dtypes: what an operator's schema can hold."""


def _plan(tensor: Tensor, solver: Any, precision: Precision) -> Plan:
    settled = precision.resolve(tensor.dtype)
    return to_text(solver), str(settled.compute), str(settled.accumulate), str(settled.store)


def _stored(tensor: Tensor, precision: Precision) -> torch.dtype:
    return getattr(torch, str(precision.resolve(tensor.dtype).store))


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


def _jvp(logits: Tensor, tangent: Tensor, plan: Plan) -> Tensor:
    moved = with_dtypes(unrolled_jvp, (logits, tangent), from_text(plan[0]), _precision(plan))
    return moved.to(getattr(torch, plan[3]))


def _vjp_tangent(logits: Tensor, grad: Tensor, tangent: Tensor, grad_tangent: Tensor, plan: Plan) -> Tensor:
    stacks = (logits, grad, tangent, grad_tangent)
    return with_dtypes(unrolled_vjp_tangent, stacks, from_text(plan[0]), _precision(plan)).to(logits.dtype)


class _Vjp(torch.autograd.Function):
    """``(logits, grad_matrix) -> grad_logits``, differentiable in both."""

    @staticmethod
    def forward(logits: Tensor, grad_matrix: Tensor, plan: Plan) -> Tensor:
        return torch.ops.birkhoff.project_vjp(logits, grad_matrix, *plan)

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
        return join(_vjp_function().apply(logits, grad_matrix, plan)), 0


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
        return torch.ops.birkhoff.project_forward(logits, *plan)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        logits, ctx.plan = inputs
        ctx.save_for_backward(logits)
        ctx.save_for_forward(logits)

    @staticmethod
    def backward(ctx: Any, grad_matrix: Tensor) -> tuple[Any, ...]:
        (logits,) = ctx.saved_tensors
        return _vjp_function().apply(logits, grad_matrix, ctx.plan), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], logits: Tensor, plan: Plan) -> tuple[Any, int]:
        (logits,), join = _fold(info.batch_size, in_dims[:1], (logits,))
        return join(_project_function().apply(logits, plan)), 0


class _ProjectForwardMode(_Project):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        (logits,) = ctx.saved_tensors
        return _jvp(logits, tangent, ctx.plan)


def _project_function() -> Any:
    return _Project if torch.compiler.is_compiling() else _ProjectForwardMode


def _vjp_function() -> Any:
    return _Vjp if torch.compiler.is_compiling() else _VjpForwardMode


def _fold(size: int, dims: tuple[int | None, ...], stacks: tuple[Tensor, ...]) -> tuple[list[Tensor], Any]:
    """Merge a mapped axis into the stack axis; ``join`` splits it off the result again."""
    moved = [
        stack.unsqueeze(0).expand(size, *stack.shape) if dim is None else stack.movedim(dim, 0)
        for dim, stack in zip(dims, stacks, strict=True)
    ]
    return [stack.flatten(0, 1) for stack in moved], lambda result: result.unflatten(0, (size, -1))


def _nested_forward_mode() -> bool:
    """Whether two forward-mode transforms are active, where a Function's ``jvp`` has silently zero second tangents."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack) > 1


def forward(stack: Tensor, solver: Any, precision: Precision) -> Tensor:
    """Differentiable projection of a stack by a fixed number of iterations."""
    if not torch.compiler.is_compiling() and _nested_forward_mode():
        return with_dtypes(unrolled_matrix, (stack,), solver, precision).to(_stored(stack, precision))
    return _project_function().apply(stack, _plan(stack, solver, precision))


def to_tolerance(stack: Tensor, solver: Any, precision: Precision, trace: Trace | None = None) -> tuple[Tensor, Tensor]:
    """Projection to a tolerance. Its gradient is the one of as many iterations as each matrix took."""
    with torch.no_grad():
        matrix, counts = stack_to_tolerance(stack, solver, precision, trace, branch=stack.device.type == "cpu")
    if torch.is_grad_enabled() and stack.requires_grad:
        xp = _xp.array_namespace(stack)
        matrix = by_iterations(solver, counts, xp, lambda method, part: forward(part, method, precision), stack)
    return matrix, counts


def may_read(tensor: Tensor) -> bool:
    """Whether the values can be looked at: not while compiling, capturing a graph, or under a functional transform."""
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


BINDING = {"forward": forward, "to_tolerance": to_tolerance, "may_read": may_read}

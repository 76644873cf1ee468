"""Which implementation runs each leaf of the fused layer: one table a leaf, rows in order of preference.

A leaf takes tensors and returns tensors: no autograd, no policy. Rows are CUDA C++ compiled at run time where it pays,
Triton, and plain torch, which accepts everything. A choice depends on device, dtype, n and C, never on the number of
tokens, and is remembered.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from birkhoff._registry import Resolution, Row, Table, installed, load
from mhc_layers.kernels.options import LARGEST_STREAMS

__all__ = ["LEAVES", "LeafFacts", "explain", "leaf", "restricted_to", "restriction"]

#: Largest C of the rows that hold a token's whole row in the registers of a program, by bytes of a value.
LARGEST_ROW = {2: 16384, 4: 8192}

_ALLOWED: tuple[str, ...] | None = None
_CACHE: dict[tuple[Any, ...], Callable[..., Any] | None] = {}


@dataclass(frozen=True, kw_only=True)
class LeafFacts:
    """The static facts of a call that its implementation is chosen by."""

    device: torch.device
    dtype: torch.dtype
    num_streams: int
    dim: int


def _refuse_triton(facts: LeafFacts) -> str | None:
    if not installed("triton"):
        return "the package triton is not installed"
    if facts.device.type != "cuda":
        from mhc_layers.kernels.triton.configs import is_interpreting

        if facts.device.type != "cpu" or not is_interpreting():
            return f"needs a CUDA or ROCm device, got {facts.device.type}"
    if facts.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"takes streams of bfloat16, float16 or float32, got {facts.dtype}"
    if not 1 <= facts.num_streams <= LARGEST_STREAMS:
        return f"keeps 1 to {LARGEST_STREAMS} streams in registers, got n = {facts.num_streams}"
    return None


def _refuse_cuda(target: str, num_tensors: int) -> Callable[[LeafFacts], str | None]:
    """Ask the ``applies`` of a CUDA leaf about empty tensors with these facts."""

    def refuse(facts: LeafFacts) -> str | None:
        if facts.device.type != "cuda" or torch.version.hip is not None:
            return f"needs a CUDA device, got {facts.device.type}"
        x = torch.empty((0, facts.num_streams, facts.dim), dtype=facts.dtype, device=facts.device)
        return load(target)(*[x] * num_tensors)

    return refuse


def _cuda_row(name: str, module: str, applies: str, num_tensors: int) -> Row[LeafFacts]:
    return Row(
        name="cuda",
        targets={"run": f"mhc_layers.kernels.cuda.{module}:{name}"},
        refuse=_refuse_cuda(f"mhc_layers.kernels.cuda.{module}:{applies}", num_tensors),
        note="CUDA C++ compiled at run time",
    )


def _triton_is_faster(facts: LeafFacts) -> str | None:
    """Where both were measured at n = 4 (C = 1280: 199 against 212 us, C = 7168: 1063 against 1093), Triton led."""
    if facts.num_streams == 4 and _refuse_triton(facts) is None:
        return "Triton's kernel was the faster one at n = 4 on an H100"
    return None


def _streams_backward_table() -> Table[LeafFacts]:
    name = "streams_backward"
    table = _table(name, name, _cuda_row(name, name, "applies", 3))
    cuda, triton, plain = table.rows

    def refuse(facts: LeafFacts) -> str | None:
        reason = _triton_is_faster(facts)
        return cuda.refuse(facts) if reason is None else reason

    return Table(name, (dataclasses.replace(cuda, refuse=refuse), triton, cuda, plain))


def _table(name: str, module: str, *before: Row[LeafFacts]) -> Table[LeafFacts]:
    triton: Row[LeafFacts] = Row(
        name="triton",
        targets={"run": f"mhc_layers.kernels.triton.{module}:{name}"},
        refuse=_refuse_triton,
        note="Triton kernel",
    )
    plain: Row[LeafFacts] = Row(
        name="plain",
        targets={"run": f"mhc_layers.kernels.plain:{name}"},
        refuse=lambda facts: None,
        note="plain torch",
    )
    return Table(name, (*before, triton, plain))


def _row_table(name: str, module: str) -> Table[LeafFacts]:
    """A leaf whose Triton kernel holds whole rows."""
    table = _table(name, module)
    triton, plain = table.rows

    def refuse(facts: LeafFacts) -> str | None:
        reason, largest = triton.refuse(facts), LARGEST_ROW.get(facts.dtype.itemsize, 0)
        if reason is None and facts.dim > largest:
            return f"holds rows of at most {largest} values of {facts.dtype} in registers, got C = {facts.dim}"
        return reason

    return Table(name, (dataclasses.replace(triton, refuse=refuse), plain))


LEAVES: dict[str, Table[LeafFacts]] = {
    "project": _table("project", "coefficients"),
    "finish": _table("finish", "coefficients"),
    "read_forward": _table("read_forward", "read"),
    "read_norm_forward": _row_table("read_norm_forward", "read_norm"),
    "norm_rows": _row_table("norm_rows", "read_norm"),
    "write_forward": _table("write_forward", "write"),
    "boundary_forward": Table("boundary_forward", (_cuda_row("boundary_forward", "boundary", "applies", 1),)),
    "boundary_read_forward": Table(
        "boundary_read_forward", (_cuda_row("boundary_read_forward", "boundary", "applies", 1),)
    ),
    "write_backward": _table("write_backward", "write_backward"),
    "read_backward": _table("read_backward", "read_backward"),
    "read_norm_backward": _row_table("read_norm_backward", "read_norm_backward"),
    "broadcast_write_forward": _table("broadcast_write_forward", "broadcast"),
    "broadcast_write_backward": _table("broadcast_write_backward", "broadcast"),
    "broadcast_streams_backward": _table("broadcast_streams_backward", "broadcast"),
    "finish_backward": _table("finish_backward", "coefficients_backward"),
    "streams_backward": _streams_backward_table(),
    "streams_backward_chained": Table(
        "streams_backward_chained",
        (_cuda_row("streams_backward_chained", "streams_backward", "applies_chained", 3),),
    ),
    "streams_backward_partial": _table("streams_backward", "streams_backward"),
    "reduce_slabs": _table("reduce_slabs", "streams_backward"),
    "recompute_block": _table("recompute_block", "recompute"),
}
"""The leaves by name. ``streams_backward_partial`` is ``streams_backward`` with an absent gradient; ``boundary_*`` and
``streams_backward_chained`` do two leaves' work in one pass, no plain row."""


@overload
def leaf(
    name: str, x: Tensor, *, required: Literal[True] = True, optional: tuple[Tensor | None, ...] = ()
) -> Callable[..., Any]: ...
@overload
def leaf(
    name: str, x: Tensor, *, required: Literal[False], optional: tuple[Tensor | None, ...] = ()
) -> Callable[..., Any] | None: ...
def leaf(
    name: str, x: Tensor, *, required: bool = True, optional: tuple[Tensor | None, ...] = ()
) -> Callable[..., Any] | None:
    """Return the implementation of a leaf for streams like ``x (..., n, C)``.

    ``optional`` are arguments that may be None: then the rows that need them are passed over. A leaf that is only a
    faster form of others has no plain row; ``required=False`` returns None where no row serves it.
    """
    if optional and any(value is None for value in optional):
        name += "_partial"
    key = (name, x.device, x.dtype, x.shape[-2], x.shape[-1], _ALLOWED)
    if key not in _CACHE:
        _CACHE[key] = _load(name, x, required)
    return _CACHE[key]


def _load(name: str, x: Tensor, required: bool) -> Callable[..., Any] | None:
    try:
        return _rows(LEAVES[name]).resolve(_facts(x)).row.load("run")
    except LookupError:
        if required:
            raise
        return None


def _rows(table: Table[LeafFacts]) -> Table[LeafFacts]:
    if _ALLOWED is None:
        return table
    return Table(table.name, tuple(row for row in table.rows if row.name in _ALLOWED))


@contextlib.contextmanager
def restricted_to(*rows: str) -> Iterator[None]:
    """Use only the rows of these names, for comparisons: ``restricted_to("triton")``. Not for threads or compiled code.

    Examples
    --------
    >>> import torch
    >>> from mhc_layers.kernels.table import leaf, restricted_to
    >>> with restricted_to("plain"):
    ...     leaf("read_forward", torch.zeros(2, 4, 8)).__module__
    'mhc_layers.kernels.plain'
    """
    global _ALLOWED
    before, _ALLOWED = _ALLOWED, rows
    try:
        yield
    finally:
        _ALLOWED = before


def restriction() -> tuple[str, ...] | None:
    """Names of the rows that :func:`restricted_to` allows now, or None."""
    return _ALLOWED


def _facts(x: Tensor) -> LeafFacts:
    return LeafFacts(device=x.device, dtype=x.dtype, num_streams=x.shape[-2], dim=x.shape[-1])


def explain(x: Tensor) -> dict[str, Resolution[LeafFacts] | str]:
    """Say for every leaf which row serves streams like ``x``, and why the rows before it refused.

    A leaf without a row for these streams maps to the reasons as text.

    Examples
    --------
    >>> import torch
    >>> from mhc_layers.kernels.table import explain
    >>> print(explain(torch.zeros(2, 4, 8, dtype=torch.float64))["read_forward"].row.name)
    plain
    """
    found: dict[str, Resolution[LeafFacts] | str] = {}
    for name, table in LEAVES.items():
        try:
            found[name] = table.resolve(_facts(x))
        except LookupError as error:
            found[name] = str(error)
    return found

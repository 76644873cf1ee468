"""Forward and backward of a dense Transformer: what mHC costs over the plain residual, in time and in memory.

``python -m benchmarks training --dims 4096 2048`` builds the same body for every connection (same sublayers under
``torch.compile``; the residual's addition and norm too), checks that the implementations of mHC agree in the loss and
in the gradients, then times a step as called and in a CUDA graph, in turn with the residual's, so that both find the
card in the same state. The optimizer is left out: it costs the same for all, and would hide the difference.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.ahead import compile_ahead
from benchmarks.device import Times, copy_rate, free, machine, require_gpu, time_in_turn
from benchmarks.layer import PACKAGES
from benchmarks.layer_measure import floors
from benchmarks.report import (
    Deadline,
    add_compile_options,
    add_options,
    command,
    finish,
    positive,
    rendered,
    seconds_to_compile,
    survives,
    write,
)
from benchmarks.training_report import markdown, plot
from mhc_layers import Transformer, TransformerConfig
from mhc_layers._recompute import kept_bytes
from mhc_layers._sites import FUNCTIONAL, ResidualSite
from mhc_layers.parallel.recompute import apply_recompute, block_boundaries, block_size

__all__ = ["VARIANTS", "Variant", "build", "main", "step"]

DEVICE = "cuda"
BASELINE, REFERENCE, FUSED = "residual", "mHC, plain torch", "mHC, fused"


class CompiledSite:
    """A row of plain torch with each step under ``torch.compile``, the norm of what is read in it."""

    def __init__(self, row: Any) -> None:
        self.pre = torch.compile(row.pre, dynamic=False)
        self.post = torch.compile(row.post, dynamic=False)
        self.boundary = torch.compile(row.boundary, dynamic=False)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to connect the same body."""

    name: str
    connection: str
    implementation: Callable[[], Any]
    recompute: bool = False
    #: boundaries off: every site runs its read and its write as separate steps
    separate: bool = False


VARIANTS = (
    Variant(BASELINE, "residual", lambda: CompiledSite(ResidualSite())),
    Variant(REFERENCE, "mhc", lambda: "functional"),
    Variant(FUSED, "mhc", lambda: "fused"),
    Variant("mHC, fused, recompute", "mhc", lambda: "fused", recompute=True),
    Variant("mHC, fused, separate steps", "mhc", lambda: "fused", separate=True),
    Variant("mHC, plain torch, compiled", "mhc", lambda: CompiledSite(FUNCTIONAL)),
)


#: what compiles code that no other variant needs, or needs it first
COMPILE_FIRST = (BASELINE, FUSED, "mHC, plain torch, compiled")


class SeparateSteps:
    """A site implementation without its fused boundary."""

    def __init__(self, implementation: Any) -> None:
        self.pre, self.post = implementation.pre, implementation.post

    def boundary(self, x: Tensor, f: Tensor, state: Any, next_site: Any) -> tuple[Tensor, Tensor, Any]:
        x = self.post(x, f, state)
        return x, *self.pre(x, next_site, state.h_pre)


def build(variant: Variant, dim: int, num_layers: int, sequence: int) -> Transformer:
    """Make the model on the GPU: weights and streams bfloat16, parameters of the sites float32, sublayers compiled."""
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=256,
        dim=dim,
        num_layers=num_layers,
        num_heads=dim // 128,
        max_seq_len=sequence,
        connection=variant.connection,
    )
    with torch.device(DEVICE):
        model = Transformer(config).bfloat16()
    generator = torch.Generator(device=DEVICE).manual_seed(1)
    implementation = variant.implementation()
    for site in model.sites:
        site.requested_implementation = implementation
        site._apply(lambda tensor: tensor)  # resolves again
        if variant.separate:
            site.requested_implementation = site._implementation = _separate(site.implementation)
        if variant.connection == "mhc":
            with torch.no_grad():  # away from the initial values, so that every term counts
                site.phi.normal_(std=0.02, generator=generator)
                for gate in (site.alpha_pre, site.alpha_post, site.alpha_res):
                    gate.fill_(0.1)
        site.sublayer = torch.compile(site.sublayer, dynamic=False)
    if variant.recompute:
        apply_recompute(model)
    return model


_SEPARATE: dict[int, SeparateSteps] = {}


def _separate(implementation: Any) -> SeparateSteps:
    return _SEPARATE.setdefault(id(implementation), SeparateSteps(implementation))


def step(model: Transformer, tokens: Tensor, targets: Tensor) -> Tensor:
    """Forward and backward; gradients are overwritten."""
    for parameter in model.parameters():
        parameter.grad = None
    loss, _ = model.loss(tokens, targets)
    loss.backward()
    return loss.detach()


def _probe(model: Transformer, tokens: Tensor, targets: Tensor) -> dict[str, Any]:
    """Loss and gradients that the implementations must agree on."""
    loss = step(model, tokens, targets)
    phi = torch.cat([s.phi.grad.flatten() for s in model.sites if s.phi is not None] or [loss.new_zeros(1)])
    return {"loss": float(loss), "embedding": model.embedding.weight.grad.float(), "phi": phi.float()}


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def saved_by_recompute(num_tokens: int, num_sites: int, dim: int) -> int:
    """Bytes that recomputation in the best blocks keeps less than fused sites without it, n = 4, bfloat16 streams."""
    everything = num_sites * num_tokens * (6 * 2 * dim + 100)  # streams, f and u; normalised projections and 1/r
    blocks = block_boundaries([num_sites], num_streams=4)
    return everything - sum(kept_bytes(num_tokens, stop - start, 4, dim) for start, stop in blocks)


def _tokens(batch: int, sequence: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device=DEVICE).manual_seed(2)
    tokens, targets = (torch.randint(256, (batch, sequence), device=DEVICE, generator=generator) for _ in range(2))
    return tokens, targets


def _memory(model: Transformer, tokens: Tensor, targets: Tensor) -> dict[str, int]:
    """Peak of a step above the weights, and what lives between its forward and its backward."""
    for parameter in model.parameters():
        parameter.grad = None
    free()
    static = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(model, tokens, targets)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - static
    for parameter in model.parameters():
        parameter.grad = None
    free()
    loss, _ = model.loss(tokens, targets)
    kept = torch.cuda.memory_allocated() - static
    del loss
    free()
    return {"peak_bytes": peak, "kept_bytes": kept}


def measure(
    variant: Variant, dim: int, num_layers: int, batch: int, sequence: int, graph: bool, expected: Any
) -> dict[str, Any]:
    """Check one variant against the plain one, then time a step in turn with the baseline's, and read its memory.

    ``expected`` carries the plain variant's results and the baseline's step from row to row.
    """
    row: dict[str, Any] = {"name": variant.name}
    model = build(variant, dim, num_layers, sequence)
    row["implementation"] = type(model.sites[0].implementation).__name__
    tokens, targets = _tokens(batch, sequence)
    found = _probe(model, tokens, targets)
    row["loss"] = found["loss"]
    if variant.connection == "mhc":
        if variant.name == REFERENCE:
            expected["mhc"] = found
        if (want := expected.get("mhc")) is None:
            return row | {"skipped": f"{REFERENCE!r} did not run, so there is nothing to compare with"}
        row["agreement"] = {
            "loss": abs(found["loss"] / want["loss"] - 1),
            "embedding": _relative(found["embedding"], want["embedding"]),
            "phi": _relative(found["phi"], want["phi"]),
        }
        if not row["agreement"]["loss"] < 5e-3 or not row["agreement"]["embedding"] < 0.1:
            return row | {"skipped": f"disagrees with the plain implementation: {row['agreement']}"}
    del found
    row |= _memory(model, tokens, targets)
    if variant.recompute:
        row["recompute_block"] = block_size(len(model.sites), num_streams=4)
        row["formula_saves_bytes"] = saved_by_recompute(batch * sequence, len(model.sites), dim)
    groups = [[lambda: step(model, tokens, targets)]]
    if variant.name == BASELINE:
        expected["baseline"] = groups[0]
    elif "baseline" in expected:
        groups.append(expected["baseline"])
    budget = 3000.0 if variant.name == FUSED else 400.0
    times, *baseline = time_in_turn(groups, graph=graph, budget_ms=budget, one_thread=True)
    row |= _with_readings(times)
    return row | {"baseline": _with_readings(baseline[0])} if baseline else row


def _with_readings(times: Times) -> dict[str, Any]:
    rounded = {how: [round(us, 1) for us in readings] for how, readings in times.readings.items()}
    return times.row() | {"readings": rounded}


def compile_only(dim: int, num_layers: int, batch: int, sequence: int, names: list[str]) -> None:
    """Run one step of each variant, so that the compiled code lands in the caches on disk."""
    for variant in VARIANTS:
        if variant.name in names:
            step(build(variant, dim, num_layers, sequence), *_tokens(batch, sequence))
            torch.cuda.synchronize()


def run(
    dims: list[int],
    num_layers: int,
    batch: int,
    sequence: int,
    names: list[str],
    graph: bool,
    deadline: Deadline,
    report: dict[str, Any],
    save: Callable[[], None],
) -> None:
    """Measure every variant at every width into ``report``; ``save`` is called after each row.

    No row starts after the deadline; those that were not reached are named.
    """
    rate = report["copy_bytes_per_second"] = copy_rate()
    for dim in dims:
        floor = 2 * num_layers * floors(4)["both"] * 2 * batch * sequence * dim / rate * 1e6
        width: dict[str, Any] = {"dim": dim, "connections_floor_us": floor, "rows": []}
        report["widths"].append(width)
        expected: dict[str, Any] = {}
        for variant in (variant for variant in VARIANTS if variant.name in names):
            row: dict[str, Any] = {"name": variant.name}
            if deadline.passed:
                row["skipped"] = deadline.reason
            else:
                start = time.monotonic()
                with survives(row):
                    row = measure(variant, dim, num_layers, batch, sequence, graph, expected)
                row["seconds"] = round(time.monotonic() - start, 1)
            width["rows"].append(row)
            save()
            print(f"C={dim} {json.dumps(row)}", file=sys.stderr, flush=True)
            free()
        torch.compiler.reset()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks training", description=__doc__.splitlines()[0])
    names = [variant.name for variant in VARIANTS]
    parser.add_argument("--dims", type=positive, nargs="+", default=[4096, 2048])
    parser.add_argument("--layers", type=positive, default=4)
    parser.add_argument("--batch", type=positive, default=2)
    parser.add_argument("--sequence", type=positive, default=4096)
    parser.add_argument("--names", nargs="+", choices=names, default=names, help="only these connections")
    parser.add_argument("--no-graph", action="store_true", help="time steps as called only")
    add_compile_options(parser)
    add_options(parser)
    return parser


def main(argv: list[str]) -> int:
    """Run ``python -m benchmarks training``."""
    arguments = _parser().parse_args(argv)
    shape = (arguments.layers, arguments.batch, arguments.sequence)
    if rendered(arguments, markdown, plot):
        return 0
    require_gpu()
    if arguments.compile_only and not arguments.jobs:
        for dim in arguments.dims:
            compile_only(dim, *shape, arguments.names)
        return 0
    report = {"machine": machine(PACKAGES, arguments.commit), "widths": []}
    report |= {"layers": arguments.layers, "batch": arguments.batch, "sequence": arguments.sequence}
    report["command"] = command("training", argv)
    deadline = Deadline(arguments.seconds)
    if arguments.jobs:
        options = ["--layers", "--batch", "--sequence"]
        sizes = [text for pair in zip(options, map(str, shape), strict=True) for text in pair]
        commands = [
            ["training", "--compile-only", "--dims", str(dim), "--names", name, *sizes]
            for dim in arguments.dims
            for name in arguments.names
            if name in COMPILE_FIRST
        ]
        print(compile_ahead(commands, arguments.jobs, seconds_to_compile(arguments)), file=sys.stderr, flush=True)
        if arguments.compile_only:
            return 0

    torch._dynamo.config.fail_on_recompile_limit_hit = True  # a step that fell back to eager is no measurement
    gc.freeze()  # what is imported stays; looking through it again after every row takes seconds
    save = partial(write, arguments, report, markdown)
    run(arguments.dims, *shape, arguments.names, not arguments.no_graph, deadline, report, save)
    finish(arguments, report, markdown, plot)
    return 0

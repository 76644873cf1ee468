"""One mHC site, everything but its sublayer: ours and every peer in one run, correctness before any time.

``python -m benchmarks layer --shapes 16384x4096`` measures, per implementation, read, write and forward alone, one site
forward and backward (as called and in a CUDA graph), the same per site of a chain of sites, and memory. E = M C 2 bytes
is one bfloat16 stream; at n = 4 a site forward and backward must move 29 E if each tensor is touched once.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.ahead import compile_ahead
from benchmarks.device import copy_rate, free, launch_us, machine, require_gpu, settle
from benchmarks.layer_kernels import compile_kernels, measure_kernels
from benchmarks.layer_measure import OURS, Inputs, compile_only, floors, measure, measure_again, rows
from benchmarks.layer_peers import PEERS, Peer
from benchmarks.layer_report import markdown, plot
from benchmarks.report import (
    Deadline,
    add_compile_options,
    add_options,
    command,
    finish,
    rendered,
    seconds_to_compile,
    survives,
    write,
)

__all__ = ["PACKAGES", "main", "run"]

PACKAGES = (
    "torch",
    "triton",
    "cupy-cuda13x",
    "tile-kernels",
    "tilelang",
    "apache-tvm-ffi",
    "liger-kernel",
    "transformers",
)

#: measured at every shape before anything else, for most bars are about them; ours before a peer is imported
FIRST = ("ours, fused", "TileKernels")
#: the others in order of importance, but Liger last, which tunes itself for one to two minutes at a new shape: all of
#: them at the first shape, then, after the kernels alone, at the other shapes
THEN = (
    "ours, fused, all Triton",
    "transformers DeepSeek-V4",
    "eager, fp32",
    "torch.compile, bf16 GEMM",
    "ours, plain torch",
    "ours, plain torch, compiled",
    "Liger",
)

#: quick to make again: read as called a second time, later in the run, at the shapes where the host counts
AGAIN = (*FIRST, "ours, fused, all Triton", "transformers DeepSeek-V4", "eager, fp32")
#: tokens times channels up to which a GPU may wait for the host
_HOST_COUNTS = 3e7

SHAPES = ((16384, 4096), (16384, 1280), (16384, 7168), (4096, 1280), (4096, 4096))
_IMPLEMENTATIONS = {peer.name: peer for peer in (*OURS, *PEERS)}


def _jobs(shapes: list[tuple[int, int]], n: int, names: list[str], kernels: bool) -> list[list[str]]:
    """One command for each implementation that compiles and each shape, the slowest first."""
    work = [(name, shape) for name in names if _IMPLEMENTATIONS[name].builds for shape in shapes]
    work.sort(key=lambda item: (item[0] != "Liger", item[0] != "TileKernels", -item[1][1]))
    return [
        ["layer", "--compile-only", "--names", name, "--shapes", f"{m}x{c}", "--streams", str(n)]
        + ["--kernels"] * (kernels and name == FIRST[0])
        for name, (m, c) in work
    ]


def _order(shapes: list[tuple[int, int]], names: list[str]) -> list[tuple[tuple[int, int], str | None, bool]]:
    """Which implementation is measured when at which shape, and whether again; None stands for the kernels alone."""
    then = [name for name in THEN if name in names]
    quick = [name for name in then if name in AGAIN]
    first = [name for name in FIRST if name in names]
    small = [(m, c) for m, c in shapes if m * c <= _HOST_COUNTS]
    return [
        *((shape, name, False) for name in first for shape in shapes),
        *((shapes[0], name, False) for name in then),
        *((shape, None, False) for shape in shapes),
        *((shape, name, True) for name in first for shape in small),
        *((shape, name, False) for name in quick for shape in shapes[1:]),
        *((shape, name, True) for name in quick for shape in small),
        *((shape, name, False) for name in then if name not in quick for shape in shapes[1:]),
    ]


def _row(peer: Peer, n: int, c: int, inputs: list[Inputs], chain: int) -> dict[str, Any]:
    row: dict[str, Any] = {"name": peer.name, "note": peer.note}
    start, addition = time.monotonic(), launch_us()
    with survives(row), rows(peer):
        row = measure(peer, n, c, inputs, chain)
    return row | {"seconds": round(time.monotonic() - start, 1), "addition_us": [addition, launch_us()]}


def _again(row: dict[str, Any], peer: Peer, n: int, c: int, inputs: list[Inputs], chain: int) -> None:
    """Add a second reading as called to a row, and how the host was."""
    if "skipped" in row:
        return
    addition, failure = launch_us(), dict[str, Any]()
    with survives(failure), rows(peer):
        measure_again(row, peer, n, c, inputs, chain)
    row["addition_us"] += [addition, launch_us()]
    if failure:
        row["again"] = failure


def run(
    shapes: list[tuple[int, int]],
    n: int,
    names: list[str],
    chain: int,
    deadline: Deadline,
    report: dict[str, Any],
    save: Callable[[], None],
    *,
    kernels: bool = False,
) -> None:
    """Measure every implementation at every shape into ``report``; ``save`` is called after each row.

    No row starts after the deadline; what was not reached is named.
    """
    rate = report["copy_bytes_per_second"] = copy_rate()
    by_shape: dict[tuple[int, int], dict[str, Any]] = {}
    for m, c in shapes:
        floor_us = {step: count * 2 * m * c / rate * 1e6 for step, count in floors(n).items()}
        by_shape[m, c] = {"tokens": m, "dim": c, "floor_us": floor_us, "rows": []}
        report["shapes"].append(by_shape[m, c])
    inputs: dict[tuple[int, int], list[Inputs]] = {}
    for (m, c), name, again in _order(shapes, names):
        if name is not None and deadline.passed:
            if not again:
                by_shape[m, c]["rows"].append({"name": name, "skipped": deadline.reason})
            continue
        if name is not None:
            if (m, c) not in inputs:  # sets that together exceed the L2 cache
                inputs = {(m, c): [Inputs.random(m, n, c, seed) for seed in range(2 if m * c > 1e7 else 4)]}
            peer, found = _IMPLEMENTATIONS[name], by_shape[m, c]["rows"]
            if again:
                row = next(row for row in found if row["name"] == name)
                _again(row, peer, n, c, inputs[m, c], chain)
            else:
                row = _row(peer, n, c, inputs[m, c], chain)
                found.append(row)
            print(f"{m}x{c} {json.dumps(row)}", file=sys.stderr, flush=True)
            if peer.builds:
                torch.compiler.reset()
        elif kernels:
            by_shape[m, c]["kernels"] = _kernels(m, n, c, deadline)
        save()
        free()
    save()


def _kernels(m: int, n: int, c: int, deadline: Deadline) -> list[dict[str, Any]]:
    failure = {"skipped": deadline.reason}
    if not deadline.passed:
        with survives(failure):
            return measure_kernels(m, n, c)
    return [{"name": "all", "row": "-", "streams": None, **failure}]


def _shape(text: str) -> tuple[int, int]:
    tokens, _, dim = text.partition("x")
    if not (tokens.isdigit() and dim.isdigit()):
        raise argparse.ArgumentTypeError(f"a shape is TOKENSxDIM, for example 16384x4096; got {text!r}")
    return int(tokens), int(dim)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks layer", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=_shape, nargs="+", default=list(SHAPES), help="TOKENSxDIM ...")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--names", nargs="+", choices=list(_IMPLEMENTATIONS), help="only these implementations")
    parser.add_argument("--chain", type=int, default=12, help="sites of the longer chain; 0 leaves chains out")
    parser.add_argument("--kernels", action="store_true", help="also time each kernel alone against its own bytes")
    add_compile_options(parser)
    add_options(parser)
    return parser


def main(argv: list[str]) -> int:
    """Run ``python -m benchmarks layer``."""
    arguments = _parser().parse_args(argv)
    names = arguments.names or list(_IMPLEMENTATIONS)
    if rendered(arguments, markdown, plot):
        return 0
    require_gpu()
    if arguments.compile_only and not arguments.jobs:
        for name in names:
            with rows(_IMPLEMENTATIONS[name]):
                for m, c in arguments.shapes:
                    compile_only(_IMPLEMENTATIONS[name], arguments.streams, c, m)
        if arguments.kernels:
            for m, c in arguments.shapes:
                compile_kernels(m, arguments.streams, c)
        return 0
    report = {"machine": machine(PACKAGES, arguments.commit), "streams": arguments.streams, "shapes": []}
    report["command"] = command("layer", argv)
    deadline = Deadline(arguments.seconds)
    if arguments.jobs:
        commands = _jobs(arguments.shapes, arguments.streams, names, arguments.kernels)
        done = compile_ahead(commands, arguments.jobs, seconds_to_compile(arguments))
        print(done, file=sys.stderr, flush=True)
        if arguments.compile_only:
            return 0
    report["settling_us"] = settle()
    gc.freeze()  # what is imported stays; looking through it again after every row takes seconds
    save = partial(write, arguments, report, markdown)
    run(arguments.shapes, arguments.streams, names, arguments.chain, deadline, report, save, kernels=arguments.kernels)
    finish(arguments, report, markdown, plot)
    return 0

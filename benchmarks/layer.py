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
from benchmarks.device import copy_rate, free, machine
from benchmarks.layer_kernels import measure_kernels
from benchmarks.layer_measure import OURS, Inputs, compile_only, floors, measure, rows, survives
from benchmarks.layer_peers import PEERS, Peer
from benchmarks.layer_report import markdown, plot
from benchmarks.report import add_options, command, finish, write

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

#: in order of importance: every shape is measured for the names of one group before the next group starts
GROUPS: tuple[tuple[str, ...], ...] = (
    ("ours, fused", "TileKernels"),
    ("ours, fused, all Triton",),
    ("torch.compile, bf16 GEMM", "transformers DeepSeek-V4"),
    ("eager, fp32", "ours, plain torch", "ours, plain torch, compiled"),
    ("Liger",),  # tunes itself for a minute and a half at each new shape
)

SHAPES = ((16384, 4096), (16384, 1280), (16384, 7168), (4096, 1280), (4096, 4096))
_IMPLEMENTATIONS = {peer.name: peer for peer in (*OURS, *PEERS)}


def _jobs(shapes: list[tuple[int, int]], n: int, names: list[str]) -> list[list[str]]:
    """One command for each implementation that compiles and each shape, the slowest first."""
    work = [(name, shape) for name in names if _IMPLEMENTATIONS[name].builds for shape in shapes]
    work.sort(key=lambda item: item[0] != "TileKernels")
    return [
        ["layer", "--compile-only", "--names", name, "--shapes", f"{m}x{c}", "--streams", str(n)]
        for name, (m, c) in work
    ]


def _row(peer: Peer, n: int, c: int, inputs: list[Inputs], chain: int) -> dict[str, Any]:
    row: dict[str, Any] = {"name": peer.name, "note": peer.note}
    start = time.monotonic()
    with survives(row), rows(peer):
        row = measure(peer, n, c, inputs, chain)
    return row | {"seconds": round(time.monotonic() - start, 1)}


def run(
    shapes: list[tuple[int, int]],
    n: int,
    names: list[str],
    chain: int,
    seconds: float,
    report: dict[str, Any],
    save: Callable[[], None],
    *,
    kernels: bool = False,
) -> None:
    """Measure every implementation at every shape into ``report``; ``save`` is called after each row.

    The kernels alone come after the first two groups. No row starts after ``seconds``; what was not reached is named.
    """
    stop = time.monotonic() + seconds
    rate = report["copy_bytes_per_second"] = copy_rate()
    by_shape: dict[tuple[int, int], dict[str, Any]] = {}
    for m, c in shapes:
        floor_us = {step: count * 2 * m * c / rate * 1e6 for step, count in floors(n).items()}
        by_shape[m, c] = {"tokens": m, "dim": c, "floor_us": floor_us, "rows": []}
        report["shapes"].append(by_shape[m, c])
    for index, group in enumerate(GROUPS):
        for shape in report["shapes"] if kernels and index == 2 else []:
            if time.monotonic() < stop:
                failure: dict[str, Any] = {}
                with survives(failure):
                    shape["kernels"] = measure_kernels(shape["tokens"], n, shape["dim"])
                if failure:
                    shape["kernels"] = [{"name": "all", "row": "-", "streams": None, **failure}]
                save()
                free()
        for m, c in shapes:
            inputs: list[Inputs] = []
            for name in (name for name in group if name in names):
                if time.monotonic() > stop:
                    by_shape[m, c]["rows"].append({"name": name, "skipped": f"not reached in {seconds:.0f} s"})
                    continue
                # sets that together exceed the L2 cache
                inputs = inputs or [Inputs.random(m, n, c, seed) for seed in range(2 if m * c > 1e7 else 4)]
                row = _row(_IMPLEMENTATIONS[name], n, c, inputs, chain)
                by_shape[m, c]["rows"].append(row)
                save()
                print(f"{m}x{c} {json.dumps(row)}", file=sys.stderr, flush=True)
                free()
                if _IMPLEMENTATIONS[name].builds:
                    torch.compiler.reset()
            del inputs
            free()
    save()


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
    parser.add_argument("--seconds", type=float, default=600.0, help="start no row later than this")
    parser.add_argument("--jobs", type=int, default=0, help="processes that compile ahead; 0 compiles when met")
    parser.add_argument("--compile-only", action="store_true", help="fill the caches on disk, measure nothing")
    add_options(parser)
    return parser


def main(argv: list[str]) -> int:
    """Run ``python -m benchmarks layer``."""
    arguments = _parser().parse_args(argv)
    names = arguments.names or list(_IMPLEMENTATIONS)
    if arguments.from_json is not None:
        finish(arguments, json.loads(arguments.from_json.read_text()), markdown, plot)
        return 0
    if not torch.cuda.is_available():
        print("benchmarks layer needs a CUDA device; --from-json renders a report without one.", file=sys.stderr)
        return 2
    if arguments.compile_only and not arguments.jobs:
        for name in names:
            with rows(_IMPLEMENTATIONS[name]):
                for m, c in arguments.shapes:
                    compile_only(_IMPLEMENTATIONS[name], arguments.streams, c, m)
        return 0
    report = {"machine": machine(PACKAGES, arguments.commit), "streams": arguments.streams, "shapes": []}
    report["command"] = command("layer", argv)
    start = time.monotonic()
    if arguments.jobs:
        commands = _jobs(arguments.shapes, arguments.streams, names)
        done = compile_ahead(commands, arguments.jobs, arguments.seconds / 2)
        print(done, file=sys.stderr, flush=True)
        if arguments.compile_only:
            return 0

    gc.freeze()  # what is imported stays; looking through it again after every row takes seconds
    left = arguments.seconds - (time.monotonic() - start)
    save = partial(write, arguments, report, markdown)
    run(arguments.shapes, arguments.streams, names, arguments.chain, left, report, save, kernels=arguments.kernels)
    finish(arguments, report, markdown, plot)
    return 0

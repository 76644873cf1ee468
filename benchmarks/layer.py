"""One mHC site, everything but its sublayer: ours and every peer in one run, correctness before any time.

``python -m benchmarks layer --shapes 16384x4096`` measures, per implementation, read and write alone, one site forward
and backward (as called and in a CUDA graph), the same per site of a chain of sites, and memory. E = M C 2 bytes is one
bfloat16 stream; at n = 4 a site forward and backward must move 29 E if each tensor is touched once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.device import Times, copy_rate, free, machine, measure_memory, time_calls
from benchmarks.layer_peers import PEERS, Parameters, Peer
from benchmarks.layer_report import markdown, plot
from mhc_layers import PAPER, HyperConnection
from mhc_layers import reference as oracle
from mhc_layers.kernels.table import explain, restricted_to

__all__ = ["floors", "main"]

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
_STRICT = (1.8e-3, 1.8e-3, 1e-4)


def floors(n: int) -> dict[str, int]:
    """How many streams E each step must move, each tensor once: read, write, forward, and forward with backward."""
    return {"pre": n + 1, "post": 2 * n + 1, "forward": 3 * n + 2, "both": 6 * n + 5}


class OurSite:
    """A :class:`mhc_layers.HyperConnection` behind the peers' interface."""

    def __init__(self, parameters: Parameters, num_streams: int, implementation: str, compiled: bool) -> None:
        dim = parameters.phi.shape[1] // num_streams
        self.site = HyperConnection(
            dim, num_streams, convention=PAPER, implementation=implementation, device=parameters.phi.device
        )
        site = self.site
        with torch.no_grad():
            site.phi.copy_(parameters.phi)
            site.bias.copy_(parameters.bias)
            for gate, value in zip((site.alpha_pre, site.alpha_post, site.alpha_res), parameters.alpha, strict=True):
                gate.copy_(value)
        self.leaves = [site.phi, site.alpha_pre, site.alpha_post, site.alpha_res, site.bias]
        self.pre = torch.compile(site.pre, dynamic=False) if compiled else site.pre
        self.post = torch.compile(site.post, dynamic=False) if compiled else site.post

    def library_gradients(self, gradients: list[Tensor]) -> Parameters:
        phi, pre, post, res, bias = gradients
        return Parameters(phi, torch.stack([pre, post, res]), bias)


def _ours(
    name: str,
    implementation: str,
    note: str,
    *,
    compiled: bool = False,
    strict: bool = True,
    rows: tuple[str, ...] = (),
) -> Peer:
    def make(parameters: Parameters, num_streams: int) -> OurSite:
        return OurSite(parameters, num_streams, implementation, compiled)

    return Peer(name, make, PAPER, note, (), _STRICT if strict else Peer.gate, rows)


OURS: tuple[Peer, ...] = (
    _ours("ours, fused", "fused", "CUDA C++ where it applies, Triton elsewhere; boundaries fused in a chain"),
    _ours("ours, fused, all Triton", "fused", "no CUDA C++", rows=("triton", "plain")),
    _ours("ours, plain torch", "functional", "mhc_layers.functional", strict=False),
    _ours("ours, plain torch, compiled", "functional", "the same under torch.compile", compiled=True, strict=False),
)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """One set of tensors: streams, sublayer output, and the gradients of u and of the next streams."""

    x: Tensor
    f: Tensor
    gu: Tensor
    gx: Tensor

    @classmethod
    def random(cls, m: int, n: int, c: int, seed: int) -> Inputs:
        generator = torch.Generator(device="cuda").manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=generator)

        return cls(normal(m, n, c).requires_grad_(), normal(m, c).requires_grad_(), normal(m, c), normal(m, n, c))


def random_parameters(n: int, c: int) -> Parameters:
    """Parameters that make every term of the gradients count; phi is not representable in bfloat16."""
    generator = torch.Generator(device="cuda").manual_seed(1000)
    phi = torch.randn(n * (n + 2), n * c, device="cuda", generator=generator) / (n * c) ** 0.5
    bias = 0.5 * torch.randn(n * (n + 2), device="cuda", generator=generator)
    return Parameters(phi, torch.tensor([0.8, 1.1, 0.9], device="cuda"), bias)


def _site_gradients(runner: Any, inputs: Inputs) -> tuple[Tensor, Tensor, list[Tensor]]:
    u, state = runner.pre(inputs.x)
    x_next = runner.post(inputs.x, inputs.f, state)
    gradients = torch.autograd.grad([u, x_next], [inputs.x, inputs.f, *runner.leaves], [inputs.gu, inputs.gx])
    return u, x_next, list(gradients)


def errors(runner: Any, peer: Peer, parameters: Parameters, inputs: Inputs) -> dict[str, float]:
    """Relative Frobenius errors against float64 autograd of the same convention."""
    u, x_next, gradients = _site_gradients(runner, inputs)
    exact = parameters.double()
    x, f = inputs.x.detach().double().requires_grad_(), inputs.f.detach().double().requires_grad_()
    h_pre, h_post, h_res = oracle.coefficients(x, exact.phi, exact.bias, tuple(exact.alpha), peer.convention)
    exact_u, exact_next = oracle.read(x, h_pre), oracle.eq3_next_streams(x, f, h_res, h_post)
    expected = torch.autograd.grad(
        [exact_u, exact_next], [x, f, exact.phi, exact.alpha, exact.bias], [inputs.gu.double(), inputs.gx.double()]
    )
    ours = runner.library_gradients(gradients[2:])
    pairs = {
        "u": (u, exact_u),
        "x_next": (x_next, exact_next),
        "gx": (gradients[0], expected[0]),
        "gf": (gradients[1], expected[1]),
        "gphi": (ours.phi, expected[2]),
        "galpha": (ours.alpha, expected[3]),
        "gbias": (ours.bias, expected[4]),
    }
    return {
        name: float((got.detach().double() - want.detach()).norm() / want.detach().norm())
        for name, (got, want) in pairs.items()
    }


def gate(peer: Peer, found: dict[str, float]) -> str | None:
    """Return what is too inaccurate to be timed, or None."""
    outputs, streams, phi = peer.gate
    limits = {"u": outputs, "x_next": outputs, "gx": streams, "gf": streams, "gphi": phi}
    failed = [f"{name} {found[name]:.1e} > {limit:.1e}" for name, limit in limits.items() if not found[name] <= limit]
    return "; ".join(failed) or None


class Chain:
    """Sites in depth order with fixed sublayer outputs, so that only the connections run."""

    def __init__(self, make: Callable[[], Any], length: int, inputs: Inputs, fused: bool) -> None:
        self._runners, self._fused = [make() for _ in range(length)], fused
        self._x, self._gx = inputs.x, inputs.gx
        self._f = [torch.randn_like(inputs.f).requires_grad_() for _ in range(length)]
        self._gu = [torch.randn_like(inputs.gu) for _ in range(length)]
        self._leaves = [self._x, *self._f, *(leaf for runner in self._runners for leaf in runner.leaves)]

    def forward(self) -> list[Tensor]:
        """Run the chain; returns what each site read, then the last streams."""
        runners, x = self._runners, self._x
        u, state = runners[0].pre(x)
        reads = [u]
        for runner, following, f in zip(runners, runners[1:], self._f, strict=False):
            if self._fused:
                x, u, state = runner.site.boundary(x, f, state, following.site)
            else:
                x = runner.post(x, f, state)
                u, state = following.pre(x)
            reads.append(u)
        return [*reads, runners[-1].post(x, self._f[-1], state)]

    def backward(self, outputs: list[Tensor]) -> tuple[Tensor, ...]:
        """Gradients of every leaf, from fixed gradients of the outputs."""
        return torch.autograd.grad(outputs, self._leaves, [*self._gu, self._gx])

    def both(self) -> None:
        """Forward, then backward."""
        self.backward(self.forward())


def _times_row(times: Times) -> dict[str, Any]:
    return {"called_us": times.called, "graph_us": times.graph, "graph_refused": times.refused}


def measure(peer: Peer, n: int, c: int, inputs: list[Inputs], chain: int) -> dict[str, Any]:
    """Check one implementation, then time it; a failed check leaves the times out."""
    m = inputs[0].x.shape[0]
    row: dict[str, Any] = {"name": peer.name, "note": peer.note, "convention": peer.convention.name}
    if (reason := peer.refuse()) is not None:
        return row | {"skipped": reason}
    parameters = random_parameters(n, c)
    runner = peer.make(parameters, n)
    small = Inputs.random(min(m, 1024), n, c, seed=77)
    if hasattr(runner, "site") and peer.gate == _STRICT:
        row["leaves"] = {
            name: getattr(getattr(found, "row", None), "name", None) for name, found in explain(inputs[0].x).items()
        }
    row["errors"] = errors(runner, peer, parameters, small)
    del small
    free()
    if (failed := gate(peer, row["errors"])) is not None:
        return row | {"skipped": f"failed the gate: {failed}"}

    with torch.no_grad():
        states = [runner.pre(each.x)[1] for each in inputs]
        row["pre"] = _times_row(time_calls([lambda each=each: runner.pre(each.x) for each in inputs]))
        row["post"] = _times_row(
            time_calls(
                [lambda each=each, s=s: runner.post(each.x, each.f, s) for each, s in zip(inputs, states, strict=True)]
            )
        )
        del states
    row["both"] = _times_row(time_calls([lambda each=each: _site_gradients(runner, each) for each in inputs]))
    first = inputs[0]

    def forward() -> tuple[Tensor, Tensor]:
        u, state = runner.pre(first.x)
        return u, runner.post(first.x, first.f, state)

    def backward(outputs: tuple[Tensor, Tensor]) -> Any:
        return torch.autograd.grad(outputs, [first.x, first.f, *runner.leaves], [first.gu, first.gx])

    stream = m * c * 2
    row["memory"] = dataclasses.asdict(measure_memory(forward, backward, (n + 1) * stream))
    if chain and hasattr(runner, "site") and peer.gate == _STRICT:
        row["chain"] = _measure_chain(peer, parameters, n, inputs, chain)
    return row


def _measure_chain(peer: Peer, parameters: Parameters, n: int, inputs: list[Inputs], length: int) -> dict[str, Any]:
    """Per site of a chain: fused boundaries and separate steps."""
    m, _, c = inputs[0].x.shape
    result: dict[str, Any] = {"length": length}
    for name, fused in (("fused", True), ("separate", False)):
        sites = Chain(lambda: peer.make(parameters, n), length, inputs[0], fused)

        def forward_only(sites: Chain = sites) -> None:
            with torch.no_grad():
                sites.forward()

        forward, both = time_calls([forward_only]), time_calls([sites.both])
        memory = measure_memory(sites.forward, sites.backward, length * (n + 1) * m * c * 2)
        result[name] = {
            "forward": _per_site(forward, length),
            "both": _per_site(both, length),
            "kept_per_site": memory.kept / length,
            "peak": memory.peak,
        }
        del sites
        free()
    return result


def _per_site(times: Times, length: int) -> dict[str, Any]:
    graph = None if times.graph is None else times.graph / length
    return {"called_us": times.called / length, "graph_us": graph, "graph_refused": times.refused}


@contextlib.contextmanager
def _survives(row: dict[str, Any]) -> Iterator[None]:
    """Turn an implementation's failure into its row, so that the run goes on."""
    try:
        yield
    except Exception as error:
        row["skipped"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"


def run(
    shapes: list[tuple[int, int]],
    n: int,
    names: list[str] | None,
    chain: int,
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Measure every implementation at every shape; ``save`` gets the report after each, so that a stop loses one."""
    rate = copy_rate()
    report: dict[str, Any] = {"machine": machine(PACKAGES), "copy_bytes_per_second": rate, "streams": n, "shapes": []}
    for m, c in shapes:
        stream = 2 * m * c
        floor_us = {step: count * stream / rate * 1e6 for step, count in floors(n).items()}
        inputs = [Inputs.random(m, n, c, seed) for seed in range(2 if stream * (n + 1) > 3e7 else 6)]
        shape: dict[str, Any] = {"tokens": m, "dim": c, "floor_us": floor_us, "rows": []}
        report["shapes"].append(shape)
        for peer in (*OURS[:2], *PEERS, *OURS[2:]):
            if names and peer.name not in names:
                continue
            row: dict[str, Any] = {"name": peer.name, "note": peer.note}
            with _survives(row), restricted_to(*peer.rows) if peer.rows else contextlib.nullcontext():
                row = measure(peer, n, c, inputs, chain)
            shape["rows"].append(row)
            save(report)
            print(f"{m}x{c} {json.dumps(row)}", file=sys.stderr, flush=True)
            free()
            torch.compiler.reset()
        del inputs
        free()
    return report


def _shape(text: str) -> tuple[int, int]:
    tokens, _, dim = text.partition("x")
    if not (tokens.isdigit() and dim.isdigit()):
        raise argparse.ArgumentTypeError(f"a shape is TOKENSxDIM, for example 16384x4096; got {text!r}")
    return int(tokens), int(dim)


def main(argv: list[str] | None = None) -> int:
    """Run ``python -m benchmarks layer``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks layer", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=_shape, nargs="+", default=[(16384, 4096)], help="TOKENSxDIM ...")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--names", nargs="+", help="only these implementations")
    parser.add_argument("--chain", type=int, default=6, help="sites of the chain; 0 leaves it out")
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--plot", type=Path, help="write a figure here (needs matplotlib)")
    parser.add_argument("--from-json", type=Path, help="render an earlier report instead of measuring")
    arguments = parser.parse_args(argv)
    if arguments.from_json is not None:
        report = json.loads(arguments.from_json.read_text())
    elif not torch.cuda.is_available():
        print("benchmarks layer needs a CUDA device; --from-json renders a report without one.", file=sys.stderr)
        return 2
    else:
        command = shlex.join(["python", "-m", "benchmarks", "layer", *(sys.argv[1:] if argv is None else argv)])

        def save(report: dict[str, Any]) -> None:
            report["command"] = command
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(report, indent=1) + "\n")

        report = run(arguments.shapes, arguments.streams, arguments.names, arguments.chain, save)
    text = markdown(report)
    print(text)
    if arguments.markdown is not None:
        arguments.markdown.write_text(text)
    if arguments.plot is not None:
        plot(report, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())

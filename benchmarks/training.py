"""Forward and backward of a dense Transformer: what mHC costs over the plain residual, in time and in memory.

``python -m benchmarks training --dims 2048 4096`` builds the same body for every connection (same sublayers under
``torch.compile``), checks that the implementations of mHC agree in the loss and in the gradients, then times a step.
The optimizer is left out: it costs the same for all, and would hide the difference.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.device import copy_rate, free, machine, time_calls
from benchmarks.layer import PACKAGES, floors
from mhc_layers import Transformer, TransformerConfig
from mhc_layers._sites import FUNCTIONAL
from mhc_layers.parallel.recompute import apply_recompute, block_size

__all__ = ["main", "markdown"]


class CompiledSite:
    """The plain row with each step under ``torch.compile``."""

    def __init__(self) -> None:
        self.pre = torch.compile(FUNCTIONAL.pre, dynamic=False)
        self.post = torch.compile(FUNCTIONAL.post, dynamic=False)
        self.boundary = torch.compile(FUNCTIONAL.boundary, dynamic=False)


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
    Variant("residual", "residual", lambda: "auto"),
    Variant("mHC, plain torch", "mhc", lambda: "functional"),
    Variant("mHC, plain torch, compiled", "mhc", CompiledSite),
    Variant("mHC, fused, separate steps", "mhc", lambda: "fused", separate=True),
    Variant("mHC, fused", "mhc", lambda: "fused"),
    Variant("mHC, fused, recompute", "mhc", lambda: "fused", recompute=True),
)


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
    with torch.device("cuda"):
        model = Transformer(config).bfloat16()
    generator = torch.Generator(device="cuda").manual_seed(1)
    implementation = variant.implementation()
    for site in model.sites:
        if variant.connection == "mhc":
            site.requested_implementation = implementation
            site._apply(lambda tensor: tensor)  # resolves again
            if variant.separate:
                site.requested_implementation = site._implementation = _separate(site.implementation)
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


def measure(variant: Variant, dim: int, num_layers: int, batch: int, sequence: int, expected: Any) -> dict[str, Any]:
    """Check one variant against the plain one, then time a step and read its memory."""
    row: dict[str, Any] = {"name": variant.name}
    model = build(variant, dim, num_layers, sequence)
    row["implementation"] = type(model.sites[0].implementation).__name__
    row["recompute_block"] = block_size(len(model.sites), num_streams=4) if variant.recompute else None
    generator = torch.Generator(device="cuda").manual_seed(2)
    tokens, targets = (torch.randint(256, (batch, sequence), device="cuda", generator=generator) for _ in range(2))
    found = _probe(model, tokens, targets)
    row["loss"] = found["loss"]
    if variant.connection == "mhc":
        if expected.get("mhc") is None:
            expected["mhc"] = found
        want = expected["mhc"]
        row["agreement"] = {
            "loss": abs(found["loss"] / want["loss"] - 1),
            "embedding": _relative(found["embedding"], want["embedding"]),
            "phi": _relative(found["phi"], want["phi"]),
        }
        if not row["agreement"]["loss"] < 5e-3 or not row["agreement"]["embedding"] < 0.1:
            return row | {"skipped": f"disagrees with the plain implementation: {row['agreement']}"}
    del found
    for parameter in model.parameters():
        parameter.grad = None
    free()
    static = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(model, tokens, targets)
    torch.cuda.synchronize()
    row["peak_bytes"] = torch.cuda.max_memory_allocated() - static
    loss, _ = model.loss(tokens, targets)
    row["kept_bytes"] = (
        torch.cuda.memory_allocated()
        - static
        - sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)
    )
    del loss
    free()
    times = time_calls([lambda: step(model, tokens, targets)], graph=False, budget_ms=1000.0)
    row["called_us"] = times.called
    row["tokens_per_second"] = batch * sequence / times.called * 1e6
    return row


def run(
    dims: list[int],
    num_layers: int,
    batch: int,
    sequence: int,
    names: list[str] | None,
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Measure every variant at every width; ``save`` gets the report after each, so that a stop loses one."""
    rate = copy_rate()
    report: dict[str, Any] = {"machine": machine(PACKAGES), "copy_bytes_per_second": rate, "widths": []}
    report |= {"layers": num_layers, "batch": batch, "sequence": sequence}
    for dim in dims:
        stream = 2 * batch * sequence * dim
        floor = 2 * num_layers * floors(4)["both"] * stream / rate * 1e6
        width: dict[str, Any] = {"dim": dim, "connections_floor_us": floor, "rows": []}
        report["widths"].append(width)
        expected: dict[str, Any] = {}
        for variant in VARIANTS:
            if names and variant.name not in names:
                continue
            row: dict[str, Any] = {"name": variant.name}
            try:
                row = measure(variant, dim, num_layers, batch, sequence, expected)
            except Exception as error:
                row["skipped"] = (
                    f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"
                )
            width["rows"].append(row)
            save(report)
            print(f"C={dim} {json.dumps(row)}", file=sys.stderr, flush=True)
            free()
            with contextlib.suppress(Exception):
                torch.compiler.reset()
    return report


def markdown(report: dict[str, Any]) -> str:
    """Render a report; overhead is over the residual baseline of the same run."""
    about = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    tokens = report["batch"] * report["sequence"]
    lines = [
        "# Forward and backward of a dense Transformer, n = 4, bfloat16",
        "",
        f"{about['date']}, {about['device']}, CUDA {about['cuda']}, Python {about['python']}, {versions}; commit "
        f"{about['commit']}. Copy rate of this run: {report['copy_bytes_per_second'] / 1e9:.0f} GB/s.",
        f"Command: `{report.get('command', '')}`",
        *(["", report["note"]] if "note" in report else []),
        "",
        f"{report['layers']} layers, {report['batch']} x {report['sequence']} = {tokens} tokens, SwiGLU of 8/3 C, "
        "heads of 128, sublayers under torch.compile in every row, no optimizer step, as called. Kept is alive between "
        "forward and backward; peak is the highest above weights, gradients included.",
    ]
    for width in report["widths"]:
        timed = {row["name"]: row for row in width["rows"] if "called_us" in row}
        base = timed.get("residual")
        header = ["connection", "overhead", "step, ms", "tokens/s", "kept, GB", "peak, GB"]
        lines += ["", f"## C = {width['dim']}", "", "| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
        for row in timed.values():
            overhead = "-"
            if base is not None:
                overhead = f"{100 * (base['tokens_per_second'] / row['tokens_per_second'] - 1):.1f} %"
            cells = [row["name"], overhead, f"{row['called_us'] / 1e3:.2f}"]
            cells += [
                f"{row['tokens_per_second']:.0f}",
                f"{row['kept_bytes'] / 1e9:.2f}",
                f"{row['peak_bytes'] / 1e9:.2f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
        if base is not None:
            floor = width["connections_floor_us"] * base["tokens_per_second"] / tokens / 1e4
            lines += ["", f"Byte floor of the connections (29 streams a site): {floor:.1f} % of the residual's step."]
        for row in width["rows"]:
            if "agreement" in row:
                numbers = ", ".join(f"{name} {value:.1e}" for name, value in row["agreement"].items())
                lines += ["", f"{row['name']}, relative difference from the plain implementation: {numbers}."]
        skipped = [f"- {row['name']}: {row['skipped']}" for row in width["rows"] if "skipped" in row]
        if skipped:
            lines += ["", "Not timed:", "", *skipped]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run ``python -m benchmarks training``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks training", description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--names", nargs="+", help="only these connections")
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--from-json", type=Path, help="render an earlier report instead of measuring")
    arguments = parser.parse_args(argv)
    if arguments.from_json is not None:
        report = json.loads(arguments.from_json.read_text())
    elif not torch.cuda.is_available():
        print("benchmarks training needs a CUDA device; --from-json renders a report without one.", file=sys.stderr)
        return 2
    else:
        command = shlex.join(["python", "-m", "benchmarks", "training", *(sys.argv[1:] if argv is None else argv)])

        def save(report: dict[str, Any]) -> None:
            report["command"] = command
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(report, indent=1) + "\n")

        shape = (arguments.layers, arguments.batch, arguments.sequence)
        report = run(arguments.dims, *shape, arguments.names, save)
    text = markdown(report)
    print(text)
    if arguments.markdown is not None:
        arguments.markdown.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Batched projection: ours and every peer that is installed, on the same inputs; correctness before any time.

``python -m benchmarks projection`` runs the cases of the machine's device. Each contestant's result is first compared
with the float64 oracle of the iteration that it computes; one that fails is reported and not timed. Times are medians
with the fastest beside them; ratios are to the fastest of ours. On a GPU the byte floor is printed as well.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import birkhoff
from benchmarks.timing import host_machine, time_host
from birkhoff import reference
from birkhoff.solvers import Newton, SinkhornKnopp, SinkhornLog

__all__ = ["CASES", "CONTESTANTS", "Case", "Contestant", "main", "run"]

PACKAGES = ("birkhoff-mhc", "numpy", "array-api-compat", "torch", "triton", "cupy-cuda13x", "POT", "hyper-connections")


@dataclass(frozen=True)
class Case:
    """One measurement: a stack of float32 matrices, 20 iterations, forward alone or with the exact gradient."""

    n: int
    batch: int
    device: str = "cpu"
    gradient: bool = False
    std: float = 1.0
    num_iters: int = 20

    @property
    def title(self) -> str:
        what = "forward + gradient" if self.gradient else "forward"
        return f"{self.batch} x {self.n} x {self.n}, {what}, logit std {self.std:g}"

    @property
    def floor_bytes(self) -> int:
        """Bytes that must move if each array is touched once: in, out; for the gradient in, in, out once more."""
        return (5 if self.gradient else 2) * 4 * self.batch * self.n**2

    def inputs(self, share: float) -> Iterator[tuple[Any, Any]]:
        """Two sets of logits and upstream gradients, so that no call finds its own data in a small cache."""
        shape = (max(1, int(self.batch * share)), self.n, self.n)
        for seed in (0, 1):
            rng = np.random.default_rng(seed)
            yield (rng.normal(size=shape) * self.std).astype(np.float32), rng.normal(size=shape).astype(np.float32)


@dataclass(frozen=True)
class Contestant:
    """An implementation: ``prepare(case, logits, upstream)`` returns a call giving a matrix, or (matrix, gradient).

    ``computes`` names what the oracle compares with: "columns" or "rows" (the side normalised first), or "limit".
    ``serves`` returns a reason not to run a case. ``share`` is the part of the batch that is run; the time is scaled
    up.
    """

    name: str
    package: str
    computes: str
    prepare: Callable[[Case, Any, Any], Callable[[], Any]]
    serves: Callable[[Case], str | None] = lambda case: None
    share: float = 1.0
    ours: bool = False
    devices: tuple[str, ...] = ("cpu",)


CASES = (
    Case(4, 2**16),
    Case(4, 2**20),
    Case(4, 2**16, std=10.0),
    Case(2, 2**16),
    Case(8, 2**14),
    Case(16, 2**12),
    Case(32, 2**10),
    Case(4, 2**16, gradient=True),
    Case(16, 2**12, gradient=True),
)
"""CPU cases. Cases of other devices are added by the modules named in ``EXTENSIONS``."""

EXTENSIONS = ("benchmarks.projection_gpu",)
"""Modules with further ``CASES`` and ``CONTESTANTS``, and ``time_device(calls) -> (median, fastest)`` for theirs."""


def _numpy_ours(solver: Any) -> Callable[..., Callable[[], Any]]:
    def prepare(case: Case, logits: np.ndarray, upstream: np.ndarray) -> Callable[[], Any]:
        method = solver(case)
        if case.gradient:
            adjoint = birkhoff.adjoints.Unrolled()
            return lambda: (birkhoff._project.matrix(logits, method), adjoint.vjp(logits, upstream, method))
        return lambda: birkhoff._project.matrix(logits, method)

    return prepare


def torch_call(function: Callable[[Any, Case], Any]) -> Callable[..., Callable[[], Any]]:
    """A contestant on torch: a differentiable function of the logits; the gradient by ``torch.autograd.grad``."""

    def prepare(case: Case, logits: np.ndarray, upstream: np.ndarray) -> Callable[[], Any]:
        import torch

        x = torch.as_tensor(logits, device=case.device).detach().requires_grad_(case.gradient)
        if not case.gradient:
            return lambda: function(x, case)
        g = torch.as_tensor(upstream, device=case.device)

        def both() -> Any:
            matrix = function(x, case)
            return matrix, torch.autograd.grad(matrix, x, g)[0]

        return both

    return prepare


def _per_matrix_loop(case: Case, logits: np.ndarray, upstream: np.ndarray) -> Callable[[], Any]:
    def one(x: np.ndarray) -> np.ndarray:
        matrix = np.exp(x - x.max(axis=0))
        for _ in range(case.num_iters):
            matrix = matrix / matrix.sum(axis=0)
            matrix = matrix / matrix.sum(axis=1, keepdims=True)
        return matrix

    return lambda: np.stack([one(x) for x in logits])


def plain_torch(x: Any, case: Case) -> Any:
    """The loop that anyone would write."""
    matrix = (x - x.amax(-2, keepdim=True)).exp()
    for _ in range(case.num_iters):
        matrix = matrix / matrix.sum(-2, keepdim=True)
        matrix = matrix / matrix.sum(-1, keepdim=True)
    return matrix


def _compiled(case: Case, logits: np.ndarray, upstream: np.ndarray) -> Callable[[], Any]:
    import torch

    compiled = torch.compile(plain_torch, fullgraph=True)
    return torch_call(compiled)(case, logits, upstream)


def _pot_torch(x: Any, case: Case) -> Any:
    from ot.batch import bregman_projection_batch

    return case.n * bregman_projection_batch(x.exp(), max_iter=case.num_iters, tol=0.0, grad="autodiff")["T"]


def _pot_numpy(case: Case, logits: np.ndarray, upstream: np.ndarray) -> Callable[[], Any]:
    from ot.batch import bregman_projection_batch

    return lambda: case.n * bregman_projection_batch(np.exp(logits), max_iter=case.num_iters, tol=0.0)["T"]


def _lucidrains(x: Any, case: Case) -> Any:
    from hyper_connections.mHCv2 import sinkhorn_knopps

    return sinkhorn_knopps(x, iters=case.num_iters)


def _forward_only(case: Case) -> str | None:
    return "forward only" if case.gradient else None


def _torch_ours(x: Any, case: Case) -> Any:
    return birkhoff.sinkhorn(x, case.num_iters)


EVERYWHERE = ("cpu", "cuda")

CONTESTANTS = (
    Contestant(
        "birkhoff, NumPy", "numpy", "columns", _numpy_ours(lambda c: SinkhornKnopp(num_iters=c.num_iters)), ours=True
    ),
    Contestant("birkhoff, torch", "torch", "columns", torch_call(_torch_ours), ours=True, devices=EVERYWHERE),
    Contestant(
        "birkhoff, NumPy, SinkhornLog", "numpy", "columns",
        _numpy_ours(lambda c: SinkhornLog(num_iters=c.num_iters)), ours=True,
    ),
    Contestant(
        "birkhoff, NumPy, Newton to 1e-6", "numpy", "limit", _numpy_ours(lambda c: Newton()), _forward_only, ours=True
    ),
    Contestant("a loop over matrices, NumPy", "numpy", "columns", _per_matrix_loop, _forward_only, share=2**-6),
    Contestant("POT batched, NumPy", "ot", "rows", _pot_numpy, _forward_only),
    Contestant("POT batched, torch", "ot", "rows", torch_call(_pot_torch), devices=EVERYWHERE),
    Contestant(
        "hyper-connections (lucidrains)", "hyper_connections", "columns", torch_call(_lucidrains), devices=EVERYWHERE
    ),
    Contestant("plain torch", "torch", "columns", torch_call(plain_torch), devices=EVERYWHERE),
    Contestant("torch.compile of the plain loop", "torch", "columns", _compiled, devices=EVERYWHERE),
)  # fmt: skip


def _wrong(contestant: Contestant, case: Case, answer: Any, logits: np.ndarray, upstream: np.ndarray) -> str | None:
    """The reason why an answer is not the one the contestant says it computes; None if it is."""
    matrix, gradient = answer if case.gradient else (answer, None)
    sample = slice(0, 2000)
    got = birkhoff._xp.to_numpy(matrix)[sample].astype(np.float64)
    if contestant.computes == "limit":
        error = np.abs(got.sum(axis=-1) - 1).max() + np.abs(got.sum(axis=-2) - 1).max()
        return None if error <= 2e-6 else f"marginals off by {error:.1e}"
    x = birkhoff._xp.to_numpy(logits[sample]).astype(np.float64)
    first: Any = contestant.computes
    spread = x.max(axis=(-2, -1)) - x.min(axis=(-2, -1))
    bound = 16 * case.n * 2.0**-24 * np.maximum(1, spread / 16)  # four times our own contract
    error = (np.abs(got - reference.sinkhorn(x, case.num_iters, first=first)).max(axis=(-2, -1)) / bound).max()
    if not error <= 1:
        return f"entries off by {error:.1e} times 16 n u max(1, range / 16)"
    if gradient is not None:
        expected = reference.gradient(x, birkhoff._xp.to_numpy(upstream[sample]), case.num_iters, first=first)
        error = np.abs(birkhoff._xp.to_numpy(gradient)[sample] - expected).max()
        if not error <= 1e-4 * max(1.0, np.abs(expected).max()):
            return f"gradient off by {error:.1e}"
    return None


def measure(contestant: Contestant, case: Case, timer: Callable[..., tuple[float, float]]) -> dict[str, Any]:
    """One row of the report: refused, wrong, failed, or timed."""
    row: dict[str, Any] = {"name": contestant.name, "ours": contestant.ours, "computes": contestant.computes}
    if importlib.util.find_spec(contestant.package) is None:
        return row | {"skipped": f"{contestant.package} is not installed"}
    if case.device not in contestant.devices:
        return row | {"skipped": f"runs on {', '.join(contestant.devices)}"}
    reason = contestant.serves(case)
    if reason is not None:
        return row | {"skipped": reason}
    sets = list(case.inputs(contestant.share))
    try:
        calls = [contestant.prepare(case, *arrays) for arrays in sets]
        wrong = _wrong(contestant, case, calls[0](), *sets[0])
        if wrong is not None:
            return row | {"wrong": wrong}
        median, fastest = timer(calls)
    except Exception as error:  # a peer that fails is a line of the report, not the end of it
        return row | {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"}
    return row | {"median": median / contestant.share, "fastest": fastest / contestant.share}


def run(cases: tuple[Case, ...], contestants: tuple[Contestant, ...], timers: dict[str, Any]) -> dict[str, Any]:
    """Measure every contestant on every case; print as it goes."""
    results = []
    for case in cases:
        print(f"\n{case.title}", flush=True)
        rows = [measure(contestant, case, timers[case.device]) for contestant in contestants]
        results.append({"case": asdict(case) | {"title": case.title, "floor_bytes": case.floor_bytes}, "rows": rows})
        print(_table(results[-1]), flush=True)
    return {"machine": host_machine(PACKAGES), "results": results}


def _table(result: dict[str, Any]) -> str:
    rows = result["rows"]
    ours = [row["fastest"] for row in rows if row["ours"] and row["computes"] != "limit" and "fastest" in row]
    best = min(ours, default=None)
    rate = result["case"].get("copy_rate")
    floor = result["case"]["floor_bytes"] / rate if rate else None
    head = "| implementation | x our fastest | median ms | fastest ms |" + (" x floor |" if floor else "")
    lines = [head, "|---" * (5 if floor else 4) + "|"]
    for row in rows:
        if "fastest" not in row:
            kind = next(key for key in ("skipped", "wrong", "failed") if key in row)
            if kind != "skipped":
                lines.append(f"| {row['name']} | {kind}: {row[kind]} |  |  |" + ("  |" if floor else ""))
            continue
        ratio = f"{row['fastest'] / best:.2f}" if best else ""
        line = f"| {row['name']} | {ratio} | {row['median'] * 1e3:.3g} | {row['fastest'] * 1e3:.3g} |"
        lines.append(line + (f" {row['fastest'] / floor:.2f} |" if floor else ""))
    return "\n".join(lines)


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        "# Projection",
        "",
        f"{machine['date']}, {machine['device']}, {machine['cores']} cores (load {machine['load']}), threads "
        f"{report['threads']}, Python {machine['python']}, {versions}. Commit {machine['commit']}.",
        f"Command: `{report['command']}`.",
        "",
        "float32, 20 iterations; every line passed its comparison with the float64 oracle before it was timed. The "
        "ratio is of the fastest call to the fastest of ours that runs the iteration. The loop over matrices is timed "
        "on 1/64 of the batch.",
    ]
    for result in report["results"]:
        lines += ["", f"## {result['case']['title']}", "", _table(result)]
    return "\n".join(lines) + "\n"


def _extensions() -> tuple[tuple[Case, ...], tuple[Contestant, ...], dict[str, Any]]:
    """Cases and contestants of other devices, from the modules that exist."""
    cases, contestants, timers = list(CASES), list(CONTESTANTS), {"cpu": time_host}
    for name in EXTENSIONS:
        if importlib.util.find_spec(name) is not None:
            module = importlib.import_module(name)
            cases += module.CASES
            contestants += module.CONTESTANTS
            timers |= module.TIMERS
    return tuple(cases), tuple(contestants), timers


def main(argv: list[str] | None = None) -> int:
    """Run ``python -m benchmarks projection``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks projection", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="run the cases of this device")
    parser.add_argument("--cases", nargs="+", help="only titles that contain one of these")
    parser.add_argument("--names", nargs="+", help="only contestants whose name contains one of these")
    parser.add_argument("--threads", type=int, help="threads of torch (NumPy reads OMP_NUM_THREADS)")
    parser.add_argument("--json", type=Path, help="write the report here")
    parser.add_argument("--markdown", type=Path, help="write the page here")
    arguments = parser.parse_args(argv)
    cases, contestants, timers = _extensions()
    cases = tuple(c for c in cases if c.device == arguments.device and _named(c.title, arguments.cases))
    contestants = tuple(c for c in contestants if _named(c.name, arguments.names))
    threads: Any = "default"
    if importlib.util.find_spec("torch") is not None:
        import torch

        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = run(cases, contestants, timers)
    report |= {
        "threads": threads,
        "command": shlex.join(["python", "-m", "benchmarks", "projection", *(argv or sys.argv[2:])]),
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.markdown is not None:
        arguments.markdown.write_text(markdown(report))
    wrong = [row for result in report["results"] for row in result["rows"] if row["ours"] and "wrong" in row]
    return 1 if wrong else 0


def _named(text: str, wanted: list[str] | None) -> bool:
    return wanted is None or any(part in text for part in wanted)

"""Batched projection: ours and every peer that is installed, on the same inputs; correctness before any time.

``python -m benchmarks projection`` runs the cases of the machine's device. Each contestant's result is first compared
with the float64 oracle of the iteration that it computes; one that fails is reported and not timed. Times are medians
with the fastest beside them; ratios are to the fastest of ours. On a GPU the byte floor is printed as well.

The report is written after every row, ours first, so that a run that is cut short keeps what it measured.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import birkhoff
from benchmarks.report import (
    Deadline,
    UsageError,
    add_compile_options,
    add_options,
    command,
    finish,
    positive,
    rendered,
    seconds_to_compile,
    write,
)
from benchmarks.timing import host_machine, time_host
from birkhoff import reference
from birkhoff.solvers import Newton, SinkhornKnopp, SinkhornLog

__all__ = [
    "CASES",
    "CONTESTANTS",
    "Case",
    "Contestant",
    "Device",
    "everything",
    "main",
    "measure",
    "refusal",
    "run",
    "time_limit",
    "torch_call",
]

PACKAGES: tuple[str, ...] = (
    "birkhoff-mhc",
    "numpy",
    "array-api-compat",
    "torch",
    "triton",
    "cupy-cuda13x",
    "POT",
    "hyper-connections",
)
PACKAGES += ("liger-kernel", "tile-kernels", "tilelang")

ROW_LIMIT = 25.0
"""Seconds after which a row is given up; a compiler can take minutes."""


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

    def refuse(self, contestant: Contestant) -> str | None:
        """Why this case is not for a contestant, or None."""
        return None

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
    up. Rows of ``turn`` 0 are measured first, on every case. ``compiles`` says for which shapes something is compiled
    beforehand: "any" batch, the "exact" one, or None. ``check`` replaces the module's.
    """

    name: str
    package: str
    computes: str
    prepare: Callable[[Case, Any, Any], Callable[[], Any]]
    serves: Callable[[Case], str | None] = lambda case: None
    share: float = 1.0
    ours: bool = False
    devices: tuple[str, ...] = ("cpu",)
    turn: int = 0
    compiles: str | None = None
    check: Callable[..., tuple[str | None, dict[str, float]]] | None = None


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
"""CPU cases; those of a GPU are in :mod:`benchmarks.projection_gpu`."""


@dataclass(frozen=True)
class Device:
    """What differs between devices: timer, description, page, compilation before any row, and the floor's rate."""

    time: Callable[[list[Callable[[], Any]]], dict[str, Any]]
    describe: Callable[[str | None], dict[str, Any]]
    markdown: Callable[[dict[str, Any]], str]
    prepare: Callable[[Any, int, float], dict[str, Any]] = lambda rows, jobs, seconds: {}
    floor: Callable[[], dict[str, Any]] = lambda: {}
    after: Callable[[Contestant], None] = lambda contestant: None
    plot: Callable[[dict[str, Any], Path], None] | None = None


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

    compiled = torch.compile(plain_torch, fullgraph=True, dynamic=False)
    return torch_call(compiled)(case, logits, upstream)


def _pot_torch(x: Any, case: Case) -> Any:
    from ot.batch import bregman_projection_batch

    with x.device:  # it makes its vectors on the default device
        found = bregman_projection_batch(x.exp(), max_iter=case.num_iters, tol=0.0, grad="autodiff")
    return case.n * found["T"]


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
    Contestant(
        "a loop over matrices, NumPy", "numpy", "columns", _per_matrix_loop, _forward_only, share=2**-6, turn=2
    ),
    Contestant("POT batched, NumPy", "ot", "rows", _pot_numpy, _forward_only, turn=2),
    Contestant("POT batched, torch", "ot", "rows", torch_call(_pot_torch), devices=EVERYWHERE, turn=2),
    Contestant(
        "hyper-connections (lucidrains)", "hyper_connections", "columns", torch_call(_lucidrains), devices=EVERYWHERE,
        turn=3,
    ),
    Contestant("plain torch", "torch", "columns", torch_call(plain_torch), devices=EVERYWHERE, turn=3),
    Contestant(
        "torch.compile of the plain loop", "torch", "columns", _compiled, devices=EVERYWHERE, turn=2, compiles="exact"
    ),
)  # fmt: skip


def _sample(array: Any) -> np.ndarray:
    """Some matrices of both ends of the batch, in float64."""
    each = min(1000, (1 << 17) // array.shape[-1] ** 2)
    if len(array) > 2 * each:
        xp = birkhoff._xp.array_namespace(array)
        array = xp.concat((array[:each], array[-each:]))
    return np.asarray(birkhoff._xp.to_numpy(array), dtype=np.float64)


_ORACLE: dict[tuple[Any, ...], tuple[np.ndarray, np.ndarray | None]] = {}
"""Matrix and gradient by case and order; the inputs of a case are always the same."""


def _oracle(case: Case, first: Any, logits: Any, upstream: Any) -> tuple[np.ndarray, np.ndarray | None]:
    key = (case, first, len(logits))
    if key not in _ORACLE:
        x = _sample(logits)
        gradient = reference.gradient(x, _sample(upstream), case.num_iters, first=first) if case.gradient else None
        _ORACLE[key] = reference.sinkhorn(x, case.num_iters, first=first), gradient
    return _ORACLE[key]


def check(
    contestant: Contestant, case: Case, answer: Any, logits: Any, upstream: Any
) -> tuple[str | None, dict[str, float]]:
    """The reason why an answer is not the one the contestant says it computes, None if it is; and the errors found.

    Entries are held to the library's contract 4 n u max(1, range / 16), others' to four times that; gradients to 1e-4
    of the largest.
    """
    if contestant.check is not None:
        return contestant.check(case, answer, logits, upstream)
    matrix, gradient = answer if case.gradient else (answer, None)
    x, got = _sample(logits), _sample(matrix)
    if contestant.computes == "limit":
        return _check_limit(matrix, x, got)
    expected, slope = _oracle(case, contestant.computes, logits, upstream)
    spread = x.max(axis=(-2, -1)) - x.min(axis=(-2, -1))
    contract = 4 * case.n * 2.0**-24 * np.maximum(1, spread / 16)
    entries = (np.abs(got - expected).max(axis=(-2, -1)) / contract).max()
    errors = {"entries": float(entries)}
    if not entries <= (1 if contestant.ours else 4):
        return f"entries off by {entries:.1e} times 4 n u max(1, range / 16)", errors
    if slope is not None:
        errors["gradient"] = float(np.abs(_sample(gradient) - slope).max() / max(1.0, np.abs(slope).max()))
        if not errors["gradient"] <= 1e-4:
            return f"gradient off by {errors['gradient']:.1e}", errors
    return None, errors


def _check_limit(matrix: Any, x: np.ndarray, got: np.ndarray) -> tuple[str | None, dict[str, float]]:
    """Marginals of every matrix of the batch within 1e-6; a sample within 1e-5 of the limit in float64."""
    xp = birkhoff._xp.array_namespace(matrix)
    worst = 0.0
    for begin in range(0, matrix.shape[0], 1 << 20):
        part = birkhoff._xp.astype(xp, matrix[begin : begin + (1 << 20)], xp.float64)
        worst = max(worst, *(float(xp.max(xp.abs(xp.sum(part, axis=axis) - 1.0))) for axis in (-1, -2)))
    errors = {"marginals": worst}
    if not worst <= 1e-6:
        return f"marginals off by {worst:.1e}", errors
    exact = birkhoff.project(x[:500], Newton(tol=1e-12)).matrix
    errors["entries"] = float(np.abs(got[:500] - exact).max())
    return (None if errors["entries"] <= 1e-5 else f"entries off by {errors['entries']:.1e}"), errors


def refusal(contestant: Contestant, case: Case) -> str | None:
    """Why a contestant does not run a case at all, or None."""
    if case.device not in contestant.devices:
        return f"runs on {', '.join(contestant.devices)}"
    if importlib.util.find_spec(contestant.package) is None:
        return f"{contestant.package} is not installed"
    return case.refuse(contestant) or contestant.serves(case)


def measure(contestant: Contestant, case: Case, timer: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """One row of the report: refused, wrong, failed, or timed."""
    row: dict[str, Any] = {"name": contestant.name, "ours": contestant.ours, "computes": contestant.computes}
    reason = refusal(contestant, case)
    if reason is not None:
        return row | {"skipped": reason}
    try:
        with time_limit(ROW_LIMIT):
            sets = list(case.inputs(contestant.share))
            calls = [contestant.prepare(case, *arrays) for arrays in sets]
            wrong, errors = check(contestant, case, calls[0](), *sets[0])
            row["errors"] = errors
            if wrong is not None:
                return row | {"wrong": wrong}
            times = timer(calls)
    except Exception as error:  # a peer that fails is a line of the report, not the end of it
        return row | {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"}
    return row | {
        name: value / contestant.share if isinstance(value, float) else value for name, value in times.items()
    }


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds, where the system has alarms (in the main thread)."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"given up after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(
    cases: tuple[Case, ...],
    contestants: tuple[Contestant, ...],
    device: Device,
    save: Callable[[dict[str, Any]], None] = lambda report: None,
    deadline: Deadline | None = None,
    jobs: int = 0,
    compile_seconds: float = 300.0,
    commit: str | None = None,
) -> dict[str, Any]:
    """Measure every contestant on every case, in turns; ``save`` gets the report after each row.

    Ours come first; then every peer on the first two cases, which bars are set for; then the peers on the others. No
    row starts after the deadline; those that were not reached say so. ``jobs`` processes compile before the first row,
    for ``compile_seconds`` at most. ``commit`` is for a tree without its git folder.
    """
    started = time.monotonic()
    entries = [{"case": asdict(case) | {"title": case.title, "floor_bytes": case.floor_bytes}} for case in cases]
    report: dict[str, Any] = {
        "machine": device.describe(commit),
        "results": [entry | {"rows": []} for entry in entries],
    }
    pairs = [(index, contestant) for index in range(len(cases)) for contestant in contestants]
    pairs.sort(key=lambda pair: (pair[1].turn > 0, pair[1].turn > 0 and pair[0] > 1, pair[1].turn))
    report |= device.prepare([(cases[index], contestant) for index, contestant in pairs], jobs, compile_seconds)
    report |= device.floor()
    for index, contestant in pairs:
        if deadline is not None and deadline.passed and refusal(contestant, cases[index]) is None:
            row = {"name": contestant.name, "ours": contestant.ours, "computes": contestant.computes}
            row["skipped"] = deadline.reason
        else:
            row = measure(contestant, cases[index], device.time)
            device.after(contestant)
        report["results"][index]["rows"].append(row)
        if "skipped" not in row:
            print(f"{time.monotonic() - started:5.0f} s  {cases[index].title}: {json.dumps(row)}", flush=True)
        save(report)
    return report


def _table(result: dict[str, Any]) -> str:
    rows = result["rows"]
    ours = [row["fastest"] for row in rows if row["ours"] and row["computes"] != "limit" and "fastest" in row]
    best = min(ours, default=None)
    lines = ["| implementation | x our fastest | median ms | fastest ms |", "|---" * 4 + "|"]
    for row in rows:
        if "fastest" not in row:
            kind = next(key for key in ("skipped", "wrong", "failed") if key in row)
            if kind != "skipped" or row[kind].startswith("not reached"):
                lines.append(f"| {row['name']} | {kind}: {row[kind]} |  |  |")
            continue
        ratio = f"{row['fastest'] / best:.2f}" if best else ""
        lines.append(f"| {row['name']} | {ratio} | {row['median'] * 1e3:.3g} | {row['fastest'] * 1e3:.3g} |")
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


def _time_host(calls: list[Callable[[], Any]]) -> dict[str, Any]:
    median, fastest = time_host(calls)
    return {"median": median, "fastest": fastest}


HOST = Device(_time_host, partial(host_machine, PACKAGES), markdown)


def everything() -> tuple[tuple[Case, ...], tuple[Contestant, ...], dict[str, Device]]:
    """Cases, contestants and devices: those of a GPU too where torch is installed."""
    if importlib.util.find_spec("torch") is None:
        return CASES, CONTESTANTS, {"cpu": HOST}
    from benchmarks import projection_gpu  # needs torch

    return (
        CASES + projection_gpu.CASES,
        CONTESTANTS + projection_gpu.CONTESTANTS,
        {"cpu": HOST} | projection_gpu.DEVICES,
    )


def main(argv: list[str]) -> int:
    """Run ``python -m benchmarks projection``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks projection", description=__doc__.splitlines()[0])
    cases, contestants, devices = everything()
    parser.add_argument("--device", choices=list(devices), default="cpu", help="run the cases of this device")
    parser.add_argument("--cases", nargs="+", help="only titles that contain one of these")
    parser.add_argument("--names", nargs="+", help="only contestants whose name contains one of these")
    parser.add_argument("--threads", type=positive, help="threads of torch (NumPy reads OMP_NUM_THREADS)")
    add_compile_options(parser)
    add_options(parser)
    arguments = parser.parse_args(argv)
    device = devices[arguments.device]
    if rendered(arguments, device.markdown, device.plot):
        return 0
    cases = tuple(c for c in cases if c.device == arguments.device and _named(c.title, arguments.cases))
    contestants = tuple(c for c in contestants if _named(c.name, arguments.names))
    if not cases or not contestants:
        raise UsageError(
            "--cases and --names leave nothing to measure; titles and names are those of a report's tables"
        )
    about = {"threads": _threads(arguments.threads), "command": command("projection", argv)}
    deadline, seconds = Deadline(arguments.seconds), seconds_to_compile(arguments)
    if arguments.compile_only:
        print(device.prepare([(case, peer) for case in cases for peer in contestants], max(1, arguments.jobs), seconds))
        return 0

    def save(report: dict[str, Any]) -> None:
        write(arguments, report | about, device.markdown)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = run(cases, contestants, device, save, deadline, arguments.jobs, seconds, arguments.commit)
    finish(arguments, report | about, device.markdown, device.plot)
    wrong = [row for result in report["results"] for row in result["rows"] if row["ours"] and "wrong" in row]
    return 1 if wrong else 0


def _threads(wanted: int | None) -> Any:
    if importlib.util.find_spec("torch") is None:
        return "default"
    import torch

    if wanted:
        torch.set_num_threads(wanted)
    return torch.get_num_threads()


def _named(text: str, wanted: list[str] | None) -> bool:
    return wanted is None or any(part in text for part in wanted)

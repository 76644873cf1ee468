"""``python -m tests.mutation.kernels``: textual mutants of the Triton kernels, each rejected by interpreter tests.

A kernel is compiled from its text, so a mutant is a copy of the sources with one text replaced; the named tests run
there with ``TRITON_INTERPRET=1``. The list is our own: wrong indices, signs and orders, dropped terms, thresholds, and
padding, one or more for every part of every kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.mutation.targets import ROOT

__all__ = ["KERNEL_MUTANTS", "KernelMutant", "known_kernels", "main"]

_COPIED = ("birkhoff", "mhc_layers", "proofs", "tests", "pyproject.toml")


@dataclass(frozen=True)
class KernelMutant:
    """``before`` becomes ``after``, at its first place in the file; ``tests`` (a ``-k`` expression) must notice."""

    path: str
    before: str
    after: str
    tests: str

    @property
    def test_file(self) -> str:
        """Where the interpreter tests of this file are."""
        if self.path.startswith("birkhoff"):
            return "tests/kernels/test_sinkhorn_interpret.py"
        own = next((name for name in ("read_norm", "broadcast") if name in self.path), "mhc_interpret")
        return f"tests/kernels/test_{own}.py"

    def source(self) -> str:
        """The changed text of the file."""
        text = (ROOT / self.path).read_text(encoding="utf-8")
        if self.before not in text or self.before == self.after:
            raise ValueError(f"{self.path} does not hold {self.before!r} (any more)")
        return text.replace(self.before, self.after, 1)


_LINES, _TILE, _NEWTON = (f"birkhoff/kernels/triton/{name}.py" for name in ("lines", "tile", "newton"))
_LAYER = "mhc_layers/kernels/triton"
_COEFFICIENTS, _ADJOINT = f"{_LAYER}/coefficients.py", f"{_LAYER}/coefficients_backward.py"
_STREAMS, _WRITE_BACKWARD, _BROADCAST, _NORM, _NORM_BACKWARD = (
    f"{_LAYER}/{name}.py"
    for name in ("streams_backward", "write_backward", "broadcast", "read_norm", "read_norm_backward")
)
_SITE = "test_site_equals_float64"
_BOTH = "test_forward_and_backward"

KERNEL_MUTANTS: tuple[KernelMutant, ...] = (
    # Lines: sums, shifts, reciprocals
    KernelMutant(_LINES, "m[k * n + i], v[k], total", "m[i * n + k], v[k], total", _BOTH),
    KernelMutant(_LINES, "m[i * n + k], v[k], total", "m[k * n + i], v[k], total", _BOTH),
    KernelMutant(_LINES, "(both * s[2 * i + 1], both * s[2 * i])", "(both * s[2 * i], both * s[2 * i + 1])", _BOTH),
    KernelMutant(_LINES, "total = before[i] * s[i] + eps\n", "total = before[i] * s[i]\n", "test_damped"),
    KernelMutant(_LINES, "total = before[i] * s[i] + eps\n", "total = s[i] + eps\n", "test_damped"),
    KernelMutant(_LINES, "_valid(before * s + eps, n)", "before * s + eps", "test_damped"),
    KernelMutant(_LINES, "(-a[i] * (a[i] * da[i]),)", "(a[i] * (a[i] * da[i]),)", _BOTH),
    KernelMutant(_LINES, "-a * (a * da)", "-a * da", "test_larger_matrices"),
    KernelMutant(_LINES, "eps * ratio * ratio * d[i]", "eps * ratio * d[i]", "test_damped"),
    KernelMutant(_LINES, "eps * ratio * ratio * d\n", "eps * ratio * d\n", "test_damped"),
    KernelMutant(_LINES, "m[i * n + j] + v[j]", "m[i * n + j] + v[i]", "test_wide_logits"),
    KernelMutant(_LINES, "-top[i] - tl.log2(total[i])", "-top[i] + tl.log2(total[i])", "test_wide_logits"),
    KernelMutant(_LINES, "-top - tl.log2(", "top - tl.log2(", "test_wide_logits"),
    KernelMutant(_LINES, "reciprocal(tl.where(total == 0.0, 1.0, total))", "reciprocal(total)", "test_bad_neighbours"),
    KernelMutant(_LINES, "tl.where(total[i] == 0.0, 1.0, total[i])", "total[i]", "test_bad_neighbours"),
    KernelMutant(_LINES, "fused(v[i], q[j], dm[i * n + j])", "fused(v[j], q[i], dm[i * n + j])", _BOTH),
    KernelMutant(_LINES, "fused(q[i], v[j], dm[i * n + j])", "fused(q[j], v[i], dm[i * n + j])", _BOTH),
    # Tile: the iteration, its arithmetic for each range, and the backward by segments
    KernelMutant(_TILE, "-900.0 if low.dtype == tl.float64 else -100.0", "-9e9", "test_wide_logits or test_vertices"),
    KernelMutant(_TILE, "for _ in range(num_iters - 1):\n        a = _half(m, b, a, n, FIRST, KNOPP",
                 "for _ in range(num_iters):\n        a = _half(m, b, a, n, FIRST, KNOPP", "test_segments"),
    KernelMutant(_TILE, "== DAMPED:\n        b = _half(m, a, b", "== _LOG:\n        b = _half(m, a, b", "test_damped"),
    KernelMutant(_TILE, "out = out + (soft[k] + eps_start,)", "out = out + (soft[k],)", "test_damped"),
    KernelMutant(_TILE, "tl.where(inside, soft + eps_start, 0.0)", "soft + eps_start", "test_damped"),
    KernelMutant(_TILE, "full - (k + 1) * LENGTH", "full - k * LENGTH", "test_segments"),
    KernelMutant(_TILE, "rest - 1 - k, is_last", "rest - k, is_last", "test_segments"),
    KernelMutant(_TILE, "(k == 0) & (segments == 0)", "k == 0", "test_segments"),
    KernelMutant(_TILE, "full = num_iters - 1", "full = num_iters", "test_segments"),
    KernelMutant(_TILE, "lines.negative(d_out, n, LANE), n, AXIS", "d_out, n, AXIS", "test_wide_logits"),
    KernelMutant(_TILE, "damping_adjoint(eps, kept_b", "damping_adjoint(0.0, kept_b", "test_damped"),
    KernelMutant(_TILE, "damping_adjoint(eps, kept_a", "damping_adjoint(0.0, kept_a", "test_damped"),
    KernelMutant(_TILE, "lines.negative(total, n, LANE), n, FIRST", "total, n, FIRST", "test_damped"),
    KernelMutant(_TILE, "(tl.where(raised, d[i * n + j], 0.0),)", "(d[i * n + j] * 0.0,)", "test_range_cap"),
    KernelMutant(_TILE, "taken[k] / tl.maximum(ties[k], 1.0)", "taken[k]", "test_equal_largest"),
    # A grid of lanes: sums over it, and the identity beyond the matrix
    KernelMutant(_LINES, "tl.sum(x, AXIS + 1, keep_dims=True)", "tl.max(x, AXIS + 1, keep_dims=True)", _BOTH),
    KernelMutant(_LINES, "tl.max(x, AXIS + 1, keep_dims=True)", "tl.min(x, AXIS + 1, keep_dims=True)", "test_wide"),
    KernelMutant(_TILE, "_pad(e, n, GRID, float(\"-inf\"), 0.0), low", "e, low", _BOTH),
    KernelMutant(_TILE, "_pad(out, n, GRID, 0.0, 1.0)", "out", "test_damped"),
    KernelMutant(_TILE, "(begin + j < n)[None, :]", "(begin + i < n)[None, :]", _BOTH),
    KernelMutant(_TILE, "share * taken", "at_peak * taken", "test_equal_largest"),
    # Newton
    KernelMutant(_NEWTON, "tl.fma(share[k], b[0], b[k + 1])", "b[k + 1]", "newton"),
    KernelMutant(_NEWTON, "tl.fma(share[j], w[k], old)", "old", "newton"),
    KernelMutant(_NEWTON, "mine = tl.fma(share[k], others[k], mine)", "mine = mine", "newton"),
    KernelMutant(_NEWTON, "total = tl.fma(p[i * n + j], p[i * n + k], total)", "total = total", "newton"),
    KernelMutant(_NEWTON, "gap = gap + (1.0 - sums[k],)", "gap = gap + (sums[k] - 1.0,)", "newton"),
    KernelMutant(_NEWTON, "chosen = tl.maximum(pending, wide.to(tl.int32))", "chosen = pending", "newton"),
    KernelMutant(_NEWTON, "_ROUNDING = tl.constexpr(1.2e-7)", "_ROUNDING = tl.constexpr(1e-38)", "blocks_come_apart"),
    KernelMutant(_NEWTON, "0.5 * lines.LOG2E)\n    same", "lines.LOG2E)\n    same", "newton"),
    KernelMutant(_NEWTON, "0.5 * tol, n=n", "500.0 * tol, n=n", "newton"),
    # The layer: coefficients and their adjoint
    KernelMutant(_COEFFICIENTS, "lo = (w - hi.to(tl.float32))", "lo = (w - w)", _SITE),
    KernelMutant(_COEFFICIENTS, "x32 * x32, (BM", "x32, (BM", _SITE),
    KernelMutant(_COEFFICIENTS, "res += parts[d][3]", "res += parts[0][3]", _SITE),
    KernelMutant(_COEFFICIENTS, "square * inv_k + norm_eps", "square + norm_eps", _SITE),
    KernelMutant(_COEFFICIENTS, "tl.sigmoid(logits) + eps_pre", "tl.sigmoid(logits)", _SITE),
    KernelMutant(_COEFFICIENTS, "post_scale * tl.sigmoid(logits)", "tl.sigmoid(logits)", _SITE),
    KernelMutant(_COEFFICIENTS, "(k % n) * n + k // n", "k", _SITE),
    KernelMutant(_COEFFICIENTS, "N + (2 * n + b * n + a)", "N + (2 * n + a * n + b)", _SITE),
    KernelMutant(_ADJOINT, "h_pre = s + eps_pre", "h_pre = s", _SITE),
    KernelMutant(_ADJOINT, "dl = d * s * (1.0 - s)", "dl = d * s", _SITE),
    KernelMutant(_ADJOINT, "* post_scale * s * (1.0 - s)", "* s * (1.0 - s)", _SITE),
    KernelMutant(_ADJOINT, "inner = alpha * tl.sum(dlp, axis=1)", "inner = tl.sum(dlp, axis=1)", _SITE),
    KernelMutant(_ADJOINT, "inner += alpha * dot", "inner += dot", _SITE),
    KernelMutant(_ADJOINT, "rc = -inner * rstd * rstd * inv_k", "rc = -inner * rstd * inv_k", _SITE),
    KernelMutant(_ADJOINT, "place = (k % n) * P + k // n", "place = (k // n) * P + k % n", _SITE),
    KernelMutant(_ADJOINT, "acting = 2 * n + b * n + a", "acting = stored", _SITE),
    # Read, write and their adjoints
    KernelMutant(f"{_LAYER}/read.py", "COEF_STRIDE + i,", "COEF_STRIDE,", _SITE),
    KernelMutant(f"{_LAYER}/write.py", "2 * n + o * n + i", "2 * n + i * n + o", _SITE),
    KernelMutant(f"{_LAYER}/write.py", "coef + n + o", "coef + n", _SITE),
    KernelMutant(_WRITE_BACKWARD, "post_scale * tl.sigmoid(logit)", "tl.sigmoid(logit)", _SITE),
    KernelMutant(_WRITE_BACKWARD, "2 * n + o * n + i, dot", "2 * n + i * n + o, dot", _SITE),
    KernelMutant(f"{_LAYER}/read_backward.py", "tl.sum(acc[i], axis=1)", "tl.sum(acc[0], axis=1)", _SITE),
    KernelMutant(_STREAMS, "dx += rc[:, None] * x32", "dx += x32 * 0.0", _SITE),
    KernelMutant(_STREAMS, "tl.dot(z_lo, phi_hi[q], dx", "tl.dot(z_hi * 0.0, phi_hi[q], dx", _SITE),
    KernelMutant(_STREAMS, "mix + q * P + o, mask", "mix + o * P + q, mask", _SITE),
    KernelMutant(_STREAMS, "tl.sum(rows, axis=0), mask=j", "tl.sum(rows, axis=0) * 0.5, mask=j", _SITE),
    # The first site, and a block of sites
    KernelMutant(_BROADCAST, "2 * n + o * n + i, mask", "2 * n + i * n + o, mask", "broadcast"),
    KernelMutant(_BROADCAST, "post_scale * tl.sigmoid", "tl.sigmoid", "broadcast"),
    KernelMutant(f"{_LAYER}/recompute.py", "new = new + (stored.to(tl.float32),)", "new = new + (y,)", "rebuilt"),
    KernelMutant(f"{_LAYER}/recompute.py", "2 * n + o * n + i", "2 * n + i * n + o", "rebuilt"),
    # The read with the sublayer's norm
    KernelMutant(_NORM, "tl.sum(squares, axis=1) * inv_c + eps", "tl.sum(squares, axis=1) * inv_c", "equals"),
    KernelMutant(_NORM, "* inverse[:, None] * weight[None, :]", "* inverse[:, None]", "equals"),
    KernelMutant(_NORM_BACKWARD, "a = gv * tl.load(WEIGHT + c, mask=c < C, other=0.0)[None, :]", "a = gv", "equals"),
    KernelMutant(_NORM_BACKWARD, "along * inverse * inverse * inv_c", "along * inverse * inv_c", "equals"),
    KernelMutant(_NORM_BACKWARD, "inverse * (dot_a[i] - along", "inverse * (dot_a[i] + along", "equals"),
)  # fmt: skip


def _copy(mutant: KernelMutant, folder: Path) -> None:
    for name in _COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    (folder / mutant.path).write_text(mutant.source(), encoding="utf-8")


def is_rejected(mutant: KernelMutant) -> bool:
    """Whether the tests of a mutant notice it. Tests that do not run are an error."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _copy(mutant, folder)
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(folder)}
        call = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "interpret", "-p", "no:cacheprovider"]
        call += [mutant.test_file, "-k", mutant.tests]
        done = subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{mutant}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}")
    return done.returncode == 1


def known_kernels(path: Path) -> dict[tuple[str, str, str], bool]:
    """Whether each mutant was rejected when it was last tried, by path, before and after."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(r["path"], r["before"], r["after"]): r["rejected"] for r in records}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 if every mutant was rejected."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation.kernels")
    parser.add_argument("--records", type=Path, default=Path("mutation_kernels.jsonl"), help="verdicts are added to it")
    parser.add_argument("--only", default="", help="mutants whose path or text holds this")
    options = parser.parse_args(arguments)
    chosen = [mutant for mutant in KERNEL_MUTANTS if options.only in f"{mutant.path}: {mutant.before}"]
    left = []
    for mutant in chosen:
        rejected = is_rejected(mutant)
        left += [] if rejected else [mutant]
        verdict = "rejected" if rejected else "SURVIVED"
        with options.records.open("a", encoding="utf-8") as stream:
            record = {"path": mutant.path, "before": mutant.before, "after": mutant.after, "rejected": rejected}
            print(json.dumps(record), file=stream)
        print(f"{verdict} {mutant.path}: {mutant.before!r} -> {mutant.after!r}", flush=True)
    print(f"{len(chosen) - len(left)} of {len(chosen)} rejected")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())

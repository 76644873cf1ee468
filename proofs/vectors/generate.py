"""Write the conformance vectors: ``python -m proofs.vectors.generate``.

Every number comes from exact fractions or from balls; nothing of `birkhoff` is used.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from proofs import enclosure, rational, strategies

__all__ = ["cases", "main"]

_COUNTS = (1, 2, 5, 20)
_PATTERNS: dict[str, list[list[int]]] = {
    "triangular n=2": [[1, 1], [0, 1]],
    "triangular n=3": [[1, 1, 1], [0, 1, 1], [0, 0, 1]],
    "triangular n=4": [[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]],
    "cycle n=3": [[1, 1, 0], [0, 1, 1], [1, 0, 1]],
    "full but one n=3": [[0, 1, 1], [1, 1, 1], [1, 1, 1]],
    "two permutations n=4": [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]],
    "unbalanced n=4": [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]],
    "permutation n=4": [[0, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 1, 0]],
    "chain n=5": [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]],
}


def _text(matrix: rational.Matrix) -> list[list[str]]:
    return [[str(value) for value in row] for row in matrix]


def _exact_iterates() -> Iterator[dict[str, Any]]:
    for n in (1, 2, 3, 4, 8):
        logits = [[(0.0).hex()] * n for _ in range(n)]
        matrix = [[str(Fraction(1, n))] * n for _ in range(n)]
        yield {"name": f"uniform n={n}", "logits": logits, "first": "columns", "num_iters": 20, "matrix": matrix}
    for name, pattern in _PATTERNS.items():
        logits = [[(0.0 if value else float("-inf")).hex() for value in row] for row in pattern]
        kernel = [[Fraction(value) for value in row] for row in pattern]
        for first in ("columns", "rows"):
            result = kernel
            for count in range(1, max(_COUNTS) + 1):
                result = rational.iterate(result, 1, first)
                if max(value.denominator for row in result for value in row) > 10**300:
                    break  # the digits of a fraction multiply with each step: the other file has the long runs
                if count in _COUNTS:
                    yield {
                        "name": f"{name} {first} first k={count}",
                        "logits": logits,
                        "first": first,
                        "num_iters": count,
                        "matrix": _text(result),
                    }


def _decimal(ball: Any, digits: int) -> str:
    """Return `digits` decimals of a ball that is narrower than the last one."""
    flint = importlib.import_module("flint")
    saved = flint.ctx.prec
    flint.ctx.prec = 4 * digits + 64
    try:
        scaled = (ball * flint.arb(10) ** digits).mid()
        if not ball.rad() * flint.arb(10) ** (digits + 2) < 1:  # as balls: floats end at 1e-308
            raise ArithmeticError("the enclosure is wider than the digits asked for")
        whole = int((scaled + flint.arb(0.5)).floor().unique_fmpz())
    finally:
        flint.ctx.prec = saved
    text = str(whole).rjust(digits + 1, "0")
    return f"{text[:-digits]}.{text[-digits:]}".rstrip("0").rstrip(".") if whole else "0"


def _decimal_case(name: str, logits: np.ndarray, first: str, count: int, eps: Any, digits: int) -> dict[str, Any]:
    balls = enclosure.iterate(logits, count, first=first, eps=eps, extra_bits=4 * digits)
    case: dict[str, Any] = {
        "name": f"{name} {first} first k={count}{'' if eps is None else ' damped'}",
        "logits": [[float(value).hex() for value in row] for row in logits],
        "first": first,
        "num_iters": count,
        "digits": digits,
        "matrix": [[_decimal(ball, digits) for ball in row] for row in balls],
    }
    if eps is not None:
        case["eps"] = [float(value).hex() for value in eps]
    return case


def _decimal_iterates() -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(20261124)
    for generator in ("gaussian", "vertex", "triangular", "concentrated", "near_permutation", "unbalanced"):
        for n, scale in ((2, 3.0), (3, 10.0), (4, 1.0), (4, 30.0), (5, 8.0)):
            logits = strategies.round_to(strategies.GENERATORS[generator](rng, (), n, scale), "bfloat16")
            logits = strategies.round_to(logits, "float16").astype(np.float64)
            first = "columns" if (n + int(scale)) % 2 else "rows"
            yield _decimal_case(f"{generator} n={n} scale={scale:g}", logits, first, 20, None, 60)
            if scale <= 10:
                yield _decimal_case(f"{generator} n={n} scale={scale:g}", logits, first, 3, None, 60)
                yield _decimal_case(f"{generator} n={n} scale={scale:g}", logits, "rows", 20, (1e-6, 1e-6), 60)
    hard = np.array([[100.0, 0.0, 0.0], [100.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    yield _decimal_case("mass over a gap of 100, n=3", hard, "columns", 20, None, 1000)
    yield _decimal_case("two by two, theta=3", np.array([[1.5, 0.0], [0.0, 1.5]]), "columns", 20, None, 1000)


def _norm_digits(entries: rational.Matrix) -> tuple[str, str]:
    """Two decimals, 30 digits, that the spectral norm lies between: decided over the fractions."""
    guess = Fraction(float(np.linalg.norm(rational.as_floats(entries), 2)))
    low, high = guess * Fraction(999_999, 10**6), guess * Fraction(1_000_001, 10**6)
    if not guess:
        return "0", "0"
    step = Fraction(1, 10**30)
    while high - low > step:
        middle = (low + high) / 2
        middle = Fraction(int(middle * 10**32), 10**32)
        if rational.is_positive_semidefinite(rational.gram_below(entries, middle**2)):
            high = middle
        else:
            low = middle
    floor = int(low / step)
    ceiling = -int(-high // step) if high % step else int(high / step)
    return _shifted(floor), _shifted(ceiling)


def _shifted(value: int, digits: int = 30) -> str:
    text = str(value).rjust(digits + 1, "0")
    return f"{text[:-digits]}.{text[-digits:]}"


def _matrices() -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(20261125)
    for n in (1, 2, 3, 4, 5):
        for kind in ("dense", "sparse", "large", "doubly stochastic"):
            values = rng.integers(0, 17, (n, n)).astype(np.float64) / 16
            if kind == "sparse":
                values *= rng.random((n, n)) < 0.6
            elif kind == "large":
                values *= 16
            elif kind == "doubly stochastic":
                values = np.sum([np.eye(n)[rng.permutation(n)] for _ in range(16)], axis=0) / 16
            entries = rational.exact(values)
            low, high = _norm_digits(entries)
            yield {
                "name": f"{kind} n={n}",
                "logits": [[float(value).hex() for value in row] for row in values],
                "row_sums": [str(value) for value in rational.exact_sums(entries, "rows")],
                "column_sums": [str(value) for value in rational.exact_sums(entries, "columns")],
                "nonexpansive": _text(rational.round_to_polytope(entries, complete=False)),
                "exact": _text(rational.round_to_polytope(entries)),
                "norm2_lower": low,
                "norm2_upper": high,
            }


def cases(name: str) -> list[dict[str, Any]]:
    """Compute the cases of one file."""
    makers = {"iterates_exact": _exact_iterates, "iterates_decimal": _decimal_iterates, "matrices": _matrices}
    return list(makers[name]())


_ABOUT = {
    "iterates_exact": "logits as hexadecimal floats; matrix after num_iters pairs of normalisations, as fractions",
    "iterates_decimal": "logits as hexadecimal floats; matrix rounded to that many decimals; eps = start, divisor",
    "matrices": "logits holds the matrix itself; sums and roundings as fractions; norm2 between two decimals",
}


def main() -> None:
    """Write all files beside this one."""
    for name, about in _ABOUT.items():
        path = Path(__file__).with_name(f"{name}.json")
        lines = ",\n".join(json.dumps(case) for case in cases(name))
        path.write_text(f'{{"about": {json.dumps(about)},\n"cases": [\n{lines}\n]}}\n', encoding="utf-8")
        print(f"{path.name}: {len(cases(name))} cases")


if __name__ == "__main__":
    main()

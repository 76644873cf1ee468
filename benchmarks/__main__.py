"""``python -m benchmarks SUBJECT``: correctness first, then times, as ratios to floors and peers."""

from __future__ import annotations

import importlib
import sys

from benchmarks.report import UsageError

SUBJECTS = {
    "projection": "a stack of matrices, projected: NumPy, torch, CuPy, and every peer that is installed (CPU or GPU)",
    "layer": "one mHC site, everything but its sublayer (GPU)",
    "training": "forward and backward of a whole model (GPU)",
    "which_solver": "what each solver leaves of the marginals, and what it costs (CPU or GPU)",
    "summary": "no measurement: what the committed GPU reports say, written into README and the pages that quote them",
}


def main(argv: list[str] | None = None) -> int:
    """Hand the arguments to the subject's own command line."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] not in SUBJECTS:
        print(f"usage: python -m benchmarks {{{','.join(SUBJECTS)}}} [--help]\n", file=sys.stderr)
        for name, what in SUBJECTS.items():
            print(f"  {name:<12} {what}", file=sys.stderr)
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    try:
        return int(importlib.import_module(f"benchmarks.{arguments[0]}").main(arguments[1:]))
    except UsageError as error:
        problem = str(error)
    except OSError as error:
        if error.filename is None:
            raise
        problem = f"{error.filename} can't be read or written ({error.strerror})"
    print(f"python -m benchmarks {arguments[0]}: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

"""``python -m proofs``: :mod:`proofs.command`, once what it needs is installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    missing = [name for name in ("numpy", "hypothesis", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"error: {', '.join(missing)} not installed; pip install 'birkhoff-mhc[proofs]'", file=sys.stderr)
        return 2
    status: int = importlib.import_module("proofs.command").main(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())

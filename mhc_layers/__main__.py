"""``python -m mhc_layers``; see :mod:`mhc_layers.cli`."""

from __future__ import annotations

import sys

from mhc_layers.cli import main

if __name__ == "__main__":
    sys.exit(main())

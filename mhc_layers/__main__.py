"""``python -m mhc_layers``; see :mod:`mhc_layers.cli`."""

from __future__ import annotations

from mhc_layers.cli import main
from mhc_layers.parallel.mesh import end_process

if __name__ == "__main__":
    end_process(main())

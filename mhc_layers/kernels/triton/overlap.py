"""Programmatic dependent launch: a kernel is set up while the one before it on the stream still runs."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["start_after_previous"]


@triton.jit
def start_after_previous(OVERLAP: tl.constexpr):
    """Wait for all of the kernel before: the first statement of every kernel.

    Nothing is read or written before, and every kernel waits, so what ran before the kernel before has ended, too.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()

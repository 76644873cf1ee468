"""Where the operators ``torch.ops.mhc_layers.*`` are registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["register"]

_LIBRARY = torch.library.Library("mhc_layers", "FRAGMENT")


def register(function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register an operator of this package from its Python implementation and its fake.

    No autograd kernel: the callers are Functions. One implementation serves every device, because the leaves choose.
    """
    name = function.__name__
    schema = torch.library.infer_schema(function, mutates_args=())
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mhc_layers::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.mhc_layers, name).default

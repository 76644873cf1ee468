"""Recipes: functions that return a full training configuration. The command line picks one and may change it."""

from __future__ import annotations

from collections.abc import Callable

from mhc_layers.recipes.gpu import medium_ddp, medium_fsdp, medium_pipeline, small_gpu
from mhc_layers.recipes.tiny import tiny_cpu
from mhc_layers.training.config import TrainConfig

__all__ = ["RECIPES", "get_recipe", "medium_ddp", "medium_fsdp", "medium_pipeline", "small_gpu", "tiny_cpu"]

RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__: recipe for recipe in (tiny_cpu, small_gpu, medium_ddp, medium_fsdp, medium_pipeline)
}
"""Every recipe by its name."""


def get_recipe(name: str) -> TrainConfig:
    """Return the configuration of a recipe.

    Parameters
    ----------
    name : str
        A key of :data:`RECIPES`.

    Returns
    -------
    TrainConfig
        Its full configuration.

    Raises
    ------
    ValueError
        If there is no such recipe; the message lists all.

    Examples
    --------
    >>> from mhc_layers.recipes import get_recipe
    >>> get_recipe("tiny_cpu").model.connection
    'mhc'
    """
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}; choose one of {', '.join(sorted(RECIPES))}")
    return RECIPES[name]()

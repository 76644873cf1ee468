"""The names that the specification fixes are there, exported, and documented."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest

BIRKHOFF = [
    "sinkhorn", "project", "certify", "certify_product", "decompose", "recompose", "round_to_polytope", "explain",
    "solvers", "parametrizations", "Projection", "Status", "Precision",
]  # fmt: skip
MHC_LAYERS = [
    "HyperConnection", "Transformer", "expand_streams", "collapse_streams", "PAPER", "DEEPSEEK_V4", "DEEPSEEK_V41",
]  # fmt: skip
SOLVERS = ["SinkhornKnopp", "SinkhornLog", "SinkhornDamped", "Newton", "Euclidean"]
PARAMETRIZATIONS = [
    "Identity", "Permutations", "Kronecker", "Orthostochastic", "Circulant", "RowStochastic", "ColumnStochastic",
    "Cayley",
]  # fmt: skip


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("birkhoff", BIRKHOFF),
        ("birkhoff.solvers", SOLVERS),
        ("birkhoff.parametrizations", PARAMETRIZATIONS),
        ("mhc_layers", MHC_LAYERS),
        ("proofs", ["claims", "strategies"]),
    ],
)
def test_names_are_exported(module: str, names: list[str]) -> None:
    loaded = importlib.import_module(module)
    scope: dict[str, object] = {}
    exec(f"from {module} import {', '.join(names)}", scope)  # as a user writes it: finds submodules too
    assert set(names) <= set(scope)
    assert set(names) <= set(loaded.__all__)


@pytest.mark.parametrize(
    ("package", "rooms"),
    [
        ("birkhoff", ["diagnostics", "large", "sparse", "support", "rounding", "reference"]),
        ("mhc_layers", ["functional", "hub", "plots", "recipes", "reference", "training", "parallel", "residual_maps"]),
    ],
)
def test_rooms_are_attributes_of_their_package(package: str, rooms: list[str]) -> None:
    """In a fresh process: elsewhere somebody may have imported them."""
    lines = [f"import {package}", *(f"{package}.{room}.__name__" for room in rooms)]
    lines += [f"assert not hasattr({package}, 'no_such_room')"]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, timeout=120)


@pytest.mark.parametrize("module", ["birkhoff", "birkhoff.solvers", "birkhoff.parametrizations", "mhc_layers"])
def test_public_objects_have_docstrings(module: str) -> None:
    loaded = importlib.import_module(module)
    bare = []
    for name in loaded.__all__:
        value = getattr(loaded, name)
        documented = inspect.ismodule(value) or inspect.isclass(value) or inspect.isfunction(value)
        if documented and len((inspect.getdoc(value) or "").split()) < 5:
            bare.append(name)
    assert bare == []

"""What the other claims are made of: certificates, roundings, decompositions, parametrizations, layers.

Each is a small record of functions on NumPy arrays, so that a test can replace one function by a broken one.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from proofs._claim import Kind
from proofs.subjects import Backend, backend

__all__ = [
    "Certifier",
    "Decomposer",
    "Layer",
    "Parametrized",
    "Rounder",
    "builtin_systems",
    "certifier",
    "layer",
    "rounder",
]

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class System:
    """A name, a backend, and the kind that claims select by."""

    name: str
    backend: Backend
    kind: Kind = "certificate"

    @property
    def title(self) -> str:
        """Name and backend, for reports."""
        return f"{self.name} on {self.backend.name}"


@dataclass(frozen=True, kw_only=True)
class Certifier(System):
    """`certify` of a stack (B, n, n) and `certify_product` of a stack (L, n, n), values in float64 storage.

    Both take ``(matrices, dtype)`` and return ``norm2_lower``, ``norm2_upper``, ``row_sums``, ``column_sums``,
    ``sums_radius`` as NumPy arrays and ``provenance`` as text.
    """

    certify: Callable[[np.ndarray, str], dict[str, Any]] = field(repr=False)
    certify_product: Callable[[np.ndarray, str], dict[str, Any]] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Rounder(System):
    """The two finishes; each takes ``(matrices, dtype)`` and returns float64 values of the stored result."""

    kind: Kind = "rounding"
    nonexpansive: Callable[[np.ndarray, str], np.ndarray] = field(repr=False)
    exact: Callable[[np.ndarray, str], np.ndarray] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Decomposer(System):
    """Birkhoff-von Neumann: a stack (B, n, n) to weights (B, k) and permutations (B, k, n)."""

    kind: Kind = "decomposition"
    decompose: Callable[[np.ndarray, str], tuple[np.ndarray, np.ndarray]] = field(repr=False)
    recompose: Callable[[np.ndarray, np.ndarray, str], np.ndarray] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Parametrized(System):
    """A map of parameters (B, p) to matrices (B, n, n) with stated sums."""

    kind: Kind = "parametrization"
    sums: str
    num_parameters: Callable[[int], int | None] = field(repr=False)
    matrix: Callable[[np.ndarray, int, str], np.ndarray] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Layer(System):
    """One site in float64: its three maps, its whole step, and the gradient of the step.

    `maps(x, parameters)` returns pre (B, n), post (B, n), res (B, n, n); `step(x, parameters, weight)` returns the next
    streams with the sublayer u -> tanh(u) W; `vjp(x, parameters, weight, grad)` returns the gradient of x and of each
    parameter. `convention` is a mapping of the fields of a Convention.
    """

    kind: Kind = "layer"
    convention: dict[str, Any]
    maps: Callable[[np.ndarray, Arrays], tuple[np.ndarray, np.ndarray, np.ndarray]] = field(repr=False)
    step: Callable[[np.ndarray, Arrays, np.ndarray], np.ndarray] = field(repr=False)
    vjp: Callable[[np.ndarray, Arrays, np.ndarray, np.ndarray], Arrays] = field(repr=False)
    decode_gap: Callable[[int], float] | None = field(default=None, repr=False)


def certifier(chosen: Backend) -> Certifier:
    """Wrap `birkhoff.certify` and `birkhoff.certify_product` on one backend."""
    certificates = importlib.import_module("birkhoff.certificates")

    def plain(certificate: Any) -> dict[str, Any]:
        names = ("norm2_lower", "norm2_upper", "row_sums", "column_sums", "sums_radius")
        values = {name: _to_numpy(chosen, getattr(certificate, name)) for name in names}
        return {**values, "provenance": str(certificate.provenance)}

    return Certifier(
        name="certify",
        backend=chosen,
        certify=lambda matrices, dtype: plain(certificates.certify(chosen.asarray(matrices, dtype))),
        certify_product=lambda stack, dtype: plain(certificates.certify_product(chosen.asarray(stack, dtype))),
    )


def _to_numpy(chosen: Backend, values: Any) -> np.ndarray:
    return values if isinstance(values, np.ndarray) else chosen.asnumpy(values)


def rounder(chosen: Backend) -> Rounder:
    """Wrap the two finishes on one backend."""
    rounding = importlib.import_module("birkhoff.rounding")
    return Rounder(
        name="rounding",
        backend=chosen,
        nonexpansive=lambda m, dtype: chosen.asnumpy(rounding.round_to_nonexpansive(chosen.asarray(m, dtype))),
        exact=lambda m, dtype: chosen.asnumpy(rounding.round_to_polytope(chosen.asarray(m, dtype))),
    )


def decomposer(chosen: Backend) -> Decomposer:
    """Wrap `birkhoff.decompose` and `birkhoff.recompose` on one backend."""
    module = importlib.import_module("birkhoff.decomposition")

    def decompose(matrices: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        weights, permutations = module.decompose(chosen.asarray(matrices, dtype))
        return chosen.asnumpy(weights), chosen.asnumpy(permutations).astype(np.int64)

    def recompose(weights: np.ndarray, permutations: np.ndarray, dtype: str) -> np.ndarray:
        indices = chosen.asarray(permutations, "int64")
        return chosen.asnumpy(module.recompose(chosen.asarray(weights, dtype), indices))

    return Decomposer(name="decompose", backend=chosen, decompose=decompose, recompose=recompose)


def parametrized(name: str, chosen: Backend) -> Parametrized:
    """Wrap one parametrization on one backend."""
    module = importlib.import_module("birkhoff.parametrizations")
    value = getattr(module, name)()

    def count(n: int) -> int | None:
        try:
            return int(value.num_parameters(n))
        except ValueError:
            return None

    return Parametrized(
        name=name,
        backend=chosen,
        sums=value.sums,
        num_parameters=count,
        matrix=lambda parameters, n, dtype: chosen.asnumpy(value.matrix(chosen.asarray(parameters, dtype), n)),
    )


def layer(convention: Any, chosen: Backend) -> Layer:
    """Wrap the steps of `mhc_layers` for one convention, on torch in float64."""
    torch = importlib.import_module("torch")
    functional = importlib.import_module("mhc_layers.functional")

    def tensors(parameters: Arrays, grad: bool) -> dict[str, Any]:
        return {key: torch.from_numpy(np.array(v)).requires_grad_(grad) for key, v in parameters.items()}

    def apply(x: Any, values: dict[str, Any], weight: np.ndarray) -> Any:
        pre, post, res = functional.coefficients(x, functional.Parameters(**values), convention)
        update = torch.tanh(functional.read(x, pre)) @ torch.from_numpy(np.array(weight))
        return functional.write(x, update, res, post)

    def maps(x: np.ndarray, parameters: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        values = functional.Parameters(**tensors(parameters, False))
        pre, post, res = functional.coefficients(torch.from_numpy(np.array(x)), values, convention)
        return pre.numpy(), post.numpy(), res.numpy()

    def step(x: np.ndarray, parameters: Arrays, weight: np.ndarray) -> np.ndarray:
        return apply(torch.from_numpy(np.array(x)), tensors(parameters, False), weight).numpy()

    def vjp(x: np.ndarray, parameters: Arrays, weight: np.ndarray, grad: np.ndarray) -> Arrays:
        leaf, values = torch.from_numpy(np.array(x)).requires_grad_(True), tensors(parameters, True)
        output = apply(leaf, values, weight)
        gradients = torch.autograd.grad(output, (leaf, *values.values()), torch.from_numpy(np.array(grad)))
        return {key: g.numpy() for key, g in zip(("x", *values), gradients, strict=True)}

    return Layer(
        name=f"site {convention.name}",
        backend=chosen,
        convention=convention.to_dict(),
        maps=maps,
        step=step,
        vjp=vjp,
        decode_gap=lambda seed: _decode_gap(convention, seed),
    )


def _decode_gap(convention: Any, seed: int) -> float:
    """Largest difference between decoding token by token with caches and one full forward, in float64."""
    torch = importlib.import_module("torch")
    mhc_layers = importlib.import_module("mhc_layers")
    generator_state = torch.get_rng_state()
    try:
        torch.manual_seed(seed)
        config = mhc_layers.TransformerConfig(
            vocab_size=17,
            dim=16,
            num_layers=2,
            num_heads=2,
            max_seq_len=16,
            num_streams=1 + seed % 4,
            convention=convention,
        )
        model = mhc_layers.Transformer(config).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
            tokens = torch.randint(17, (2, 7))
            full = model(tokens)
            caches = model.make_caches(2)
            steps = [model(tokens[:, :3], caches), *(model(tokens[:, t : t + 1], caches) for t in range(3, 7))]
        return float((torch.cat(steps, dim=1) - full).abs().max())
    finally:
        torch.set_rng_state(generator_state)


def builtin_systems(backend_names: Sequence[str]) -> list[System]:
    """Return every certificate, rounding, decomposition, parametrization and layer for the named backends."""
    parametrizations = importlib.import_module("birkhoff.parametrizations")
    found: list[System] = []
    for name in backend_names:
        chosen = backend(name)
        found.extend((certifier(chosen), rounder(chosen)))
        if importlib.util.find_spec("scipy") is not None:
            found.append(decomposer(chosen))
        found.extend(parametrized(one, chosen) for one in parametrizations.__all__)
        if name == "torch":
            conventions = importlib.import_module("mhc_layers.conventions").CONVENTIONS
            found.extend(layer(convention, chosen) for convention in conventions.values())
    return found

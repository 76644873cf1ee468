"""What the other claims are made of: certificates, roundings, decompositions, parametrizations, layers, models.

Each is a small record of functions on NumPy arrays, so that a test can replace one function by a broken one.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from proofs._claim import Kind
from proofs.backends import Backend, backend

__all__ = [
    "Certifier",
    "Decomposer",
    "Layer",
    "Parametrized",
    "Rounder",
    "Trace",
    "Trained",
    "builtin_systems",
    "certifier",
    "layer",
    "rounder",
    "trained",
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
    parameter. `convention` is a mapping of the fields of a Convention. `decode(seed)` builds a Transformer of random
    weights on it and returns the logits (B, T, V) of one full forward and of decoding with caches. `variant(**fields)`
    returns the layer of a convention with other fields.
    """

    kind: Kind = "layer"
    convention: dict[str, Any]
    maps: Callable[[np.ndarray, Arrays], tuple[np.ndarray, np.ndarray, np.ndarray]] = field(repr=False)
    step: Callable[[np.ndarray, Arrays, np.ndarray], np.ndarray] = field(repr=False)
    vjp: Callable[[np.ndarray, Arrays, np.ndarray, np.ndarray], Arrays] = field(repr=False)
    decode: Callable[[int], tuple[np.ndarray, np.ndarray]] | None = field(default=None, repr=False)
    variant: Callable[..., Layer] | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What one forward pass of a trained model computed in float32, held in float64; S sites, N tokens.

    `h_res` (S, N, n, n), `h_post` (S, N, n), `updates` (S, N, C) what each sublayer returned, `streams`
    (S + 1, N, n, C) what entered each site and what left the last one.
    """

    h_res: np.ndarray
    h_post: np.ndarray
    updates: np.ndarray
    streams: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Trained(System):
    """A Transformer after a few steps of training.

    `trace(seed)` runs it on tokens drawn from the seed; `decode(seed)` returns the logits (B, T, V) of one full forward
    and of decoding token by token with caches, both with the trained weights in float64. `eps` is the largest eps of
    the convention's projection, 0 where the rows are exact; `losses` those of the training steps.
    """

    kind: Kind = "trained"
    eps: float
    certifier: Certifier = field(repr=False)
    trace: Callable[[int], Trace] = field(repr=False)
    decode: Callable[[int], tuple[np.ndarray, np.ndarray]] = field(repr=False)
    losses: Callable[[], list[float]] = field(repr=False)


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
        decode=lambda seed: _random_decode(convention, seed),
        variant=lambda **fields: layer(convention.replace(**fields), chosen),
    )


def _random_decode(convention: Any, seed: int) -> tuple[np.ndarray, np.ndarray]:
    torch = importlib.import_module("torch")
    mhc_layers = importlib.import_module("mhc_layers")
    config = mhc_layers.TransformerConfig(
        vocab_size=_VOCABULARY,
        dim=16,
        num_layers=2,
        num_heads=2,
        max_seq_len=16,
        num_streams=1 + seed % 4,
        convention=convention,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = mhc_layers.Transformer(config).eval()
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        return _decoded(model.double(), torch.randint(_VOCABULARY, (2, 7)), 3)


def _decoded(model: Any, tokens: Any, prompt: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits of one full forward, and of the prompt at once and then token by token with caches."""
    torch = importlib.import_module("torch")
    with torch.no_grad():
        caches = model.make_caches(len(tokens))
        full = model(tokens)
        steps = [model(tokens[:, :prompt], caches)]
        steps += [model(tokens[:, t : t + 1], caches) for t in range(prompt, tokens.shape[1])]
        return full.numpy(), torch.cat(steps, dim=1).numpy()


_VOCABULARY, _TRAIN_STEPS, _TRAIN_TOKENS = 17, 50, 12


@functools.cache
def _train(convention: Any, connection: str) -> tuple[Any, list[float]]:
    """Train on arithmetic progressions modulo the vocabulary; the same on every call, the global RNG untouched."""
    torch = importlib.import_module("torch")
    mhc_layers = importlib.import_module("mhc_layers")
    config = mhc_layers.TransformerConfig(
        vocab_size=_VOCABULARY,
        dim=16,
        num_layers=3,
        num_heads=2,
        max_seq_len=_TRAIN_TOKENS,
        connection=connection,
        convention=convention,
        init="transformers",
        init_std=0.2,
        implementation="functional",
    )
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        model = mhc_layers.Transformer(config)
        optimizer = torch.optim.AdamW(model.param_groups(weight_decay=0.1), lr=1e-2)
        losses = []
        for step in range(_TRAIN_STEPS):
            tokens = _progressions(1000 + step, 8, _TRAIN_TOKENS + 1)
            loss, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return model.eval(), losses


def _progressions(seed: int, rows: int, tokens: int) -> Any:
    rng = np.random.default_rng(seed)
    start, step = rng.integers(_VOCABULARY, size=(rows, 1)), rng.integers(1, 4, size=(rows, 1))
    return importlib.import_module("torch").from_numpy((start + step * np.arange(tokens)) % _VOCABULARY)


def _trace(model: Any, seed: int) -> Trace:
    torch = importlib.import_module("torch")
    capture = importlib.import_module("mhc_layers").capture_coefficients
    updates: list[Any] = []
    hooks = [site.sublayer.register_forward_hook(lambda m, i, output: updates.append(output)) for site in model.sites]
    try:
        with torch.no_grad(), capture(model) as captured:
            model(_progressions(seed, 2, _TRAIN_TOKENS))
    finally:
        for hook in hooks:
            hook.remove()

    def plain(tensors: Any) -> np.ndarray:
        stack = torch.stack([t.detach().flatten(0, 1) for t in tensors])
        return np.asarray(stack.to(torch.float64).numpy())

    return Trace(
        h_res=plain(record[2] for record in captured),
        h_post=plain(record[1] for record in captured),
        updates=plain(updates),
        streams=plain([*captured.streams, captured.final_streams]),
    )


def _trained_decode(model: Any, seed: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = _progressions(seed, 2, _TRAIN_TOKENS)
    return _decoded(copy.deepcopy(model).double(), tokens, 1 + seed % (_TRAIN_TOKENS - 1))


def trained(convention: Any, chosen: Backend, *, connection: str = "mhc") -> Trained:
    """Wrap a small Transformer that is trained when it is first asked for, on torch in float32 on the CPU."""
    damped = convention.start != "exp"
    return Trained(
        name=f"trained {connection} {convention.name}",
        backend=chosen,
        eps=max(convention.eps_start, convention.eps_den) if damped else 0.0,
        certifier=certifier(chosen),
        trace=lambda seed: _trace(_train(convention, connection)[0], seed),
        decode=lambda seed: _trained_decode(_train(convention, connection)[0], seed),
        losses=lambda: _train(convention, connection)[1],
    )


def builtin_systems(backend_names: Sequence[str]) -> list[System]:
    """Return all certificates, roundings, decompositions, parametrizations, layers and models for these backends."""
    parametrizations = importlib.import_module("birkhoff.parametrizations")
    found: list[System] = []
    for name in backend_names:
        chosen = backend(name)
        found.extend((certifier(chosen), rounder(chosen), decomposer(chosen)))
        found.extend(parametrized(one, chosen) for one in parametrizations.__all__)
        if name == "torch":
            conventions = importlib.import_module("mhc_layers.conventions").CONVENTIONS
            found.extend(layer(convention, chosen) for convention in conventions.values())
            found.extend(trained(conventions[preset], chosen) for preset in ("paper", "deepseek_v4"))
    return found

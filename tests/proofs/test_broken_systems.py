"""Each claim about certificates, roundings, decompositions, parametrizations and layers rejects what is broken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from birkhoff import certificates
from proofs import claims, runner, systems
from proofs.backends import BACKENDS
from proofs.runner import Profile
from proofs.subjects import solver_subject
from proofs.systems import Certifier, Decomposer, Layer, Parametrized, Rounder

EFFORT = Profile("test", 20, shrink_budget=0)
NUMPY = BACKENDS["numpy"]


def _verdict(name: str, subject: Any) -> str:
    return runner.run_claim(claims.by_name(name), subject, EFFORT).verdict


def _certifier(change: Callable[[dict[str, Any], np.ndarray], dict[str, Any]]) -> Certifier:
    honest = systems.certifier(NUMPY)
    return replace(
        honest,
        certify=lambda m, dtype: {**(c := honest.certify(m, dtype)), **change(c, m)},
        certify_product=lambda m, dtype: {**(c := honest.certify_product(m, dtype)), **change(c, m)},
    )


def _per_layer_product(stack: np.ndarray, dtype: str) -> dict[str, Any]:
    """Multiplies the norms of the layers: sound and useless."""
    honest = systems.certifier(NUMPY)
    norms = honest.certify(stack, dtype)["norm2_upper"]
    return {**honest.certify_product(stack, dtype), "norm2_upper": np.prod(norms) * 1.001}


def _wrong_order(stack: np.ndarray, dtype: str) -> dict[str, Any]:
    return systems.certifier(NUMPY).certify_product(stack[::-1], dtype)


def _schur_only(matrices: np.ndarray, dtype: str) -> dict[str, Any]:
    bound = np.sqrt(matrices.sum(-1).max(-1) * matrices.sum(-2).max(-1)) * (1 + 1e-12)
    return {**systems.certifier(NUMPY).certify(matrices, dtype), "norm2_upper": bound}


def _lapack(matrices: np.ndarray, dtype: str) -> dict[str, Any]:
    """The float64 singular value itself, not rounded outward."""
    norm = np.linalg.norm(matrices, 2, axis=(-2, -1))
    return {**systems.certifier(NUMPY).certify(matrices, dtype), "norm2_upper": norm, "norm2_lower": norm}


CERTIFIERS: dict[str, tuple[Callable[[], Certifier], ...]] = {
    "certificate_holds": (
        lambda: _certifier(lambda c, m: {"norm2_upper": c["norm2_upper"] * (1 - 1e-13)}),
        lambda: _certifier(lambda c, m: {"norm2_lower": c["norm2_upper"] * (1 + 1e-13)}),
        lambda: replace(systems.certifier(NUMPY), certify=_lapack),
        lambda: _certifier(lambda c, m: {"norm2_upper": np.ones_like(c["norm2_upper"])}),
    ),
    "certificate_holds_on_every_vertex": (
        lambda: _certifier(lambda c, m: {"norm2_upper": c["norm2_upper"] * (1 - 1e-13)}),
        lambda: _certifier(lambda c, m: {"norm2_upper": np.ones_like(c["norm2_upper"])}),
    ),
    "certificate_holds_in_bulk": (
        lambda: replace(systems.certifier(NUMPY), certify=_lapack),
        lambda: _certifier(lambda c, m: {"norm2_lower": c["norm2_upper"] * (1 + 1e-13)}),
    ),
    "certificate_is_tight": (
        lambda: replace(systems.certifier(NUMPY), certify=_schur_only),
        lambda: _certifier(lambda c, m: {"norm2_upper": c["norm2_upper"] * 1.001}),
        lambda: _certifier(lambda c, m: {"norm2_lower": 0 * c["norm2_lower"]}),
    ),
    "certificate_is_close_on_hard_matrices": (
        lambda: replace(systems.certifier(NUMPY), certify=_schur_only),
        lambda: _certifier(lambda c, m: {"norm2_upper": c["norm2_upper"] * 1.011}),
        lambda: _certifier(lambda c, m: {"norm2_upper": np.full_like(c["norm2_upper"], np.inf)}),
        lambda: _certifier(lambda c, m: {"norm2_lower": c["norm2_lower"] * (1 - 2e-3)}),
    ),
    "certified_sums_hold": (
        lambda: _certifier(lambda c, m: {"sums_radius": np.full_like(c["sums_radius"], np.inf)}),
        lambda: _certifier(lambda c, m: {"sums_radius": c["sums_radius"] * 4}),
        lambda: _certifier(lambda c, m: {"row_sums": c["column_sums"], "column_sums": c["row_sums"]}),
        lambda: _certifier(lambda c, m: {"row_sums": c["row_sums"] * (1 + 1e-14), "sums_radius": 0 * c["sums_radius"]}),
    ),
    "certificate_refuses_what_it_cannot_bound": (
        lambda: _certifier(lambda c, m: {"norm2_upper": np.nan_to_num(c["norm2_upper"], posinf=1e3)}),
        lambda: _certifier(lambda c, m: {"norm2_upper": np.full_like(c["norm2_upper"], c["norm2_upper"].max())}),
    ),
    "provenance_is_never_upgraded": (
        lambda: _certifier(lambda c, m: {"provenance": "exact"}),
        lambda: _certifier(lambda c, m: {"provenance": "sampled"}),
    ),
    "product_certificate_holds": (
        lambda: _certifier(lambda c, m: {"norm2_upper": c["norm2_upper"] * (1 - 1e-12)}),
        lambda: replace(systems.certifier(NUMPY), certify_product=_wrong_order),
        lambda: _certifier(lambda c, m: {"sums_radius": c["sums_radius"] * 4}),
    ),
    "product_certificate_is_tight": (lambda: replace(systems.certifier(NUMPY), certify_product=_per_layer_product),),
}


@pytest.mark.parametrize("name", sorted(CERTIFIERS))
def test_certificate_claims_reject_wrong_certificates(name: str) -> None:
    assert _verdict(name, systems.certifier(NUMPY)) == "holds"
    for number, make in enumerate(CERTIFIERS[name]):
        assert _verdict(name, make()) == "broken", number


def test_bounds_are_close_where_a_device_flushes_subnormals(monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy reads float32 so: with a line of zeros the upper bound fell back on the Schur test, 7 % above the norm."""
    monkeypatch.setattr(certificates._Product, "_flushes_subnormals", lambda self, single: True)
    more = Profile("test", 50, shrink_budget=0)
    for name in ("certificate_holds", "certificate_is_close_on_hard_matrices", "certified_sums_hold"):
        assert runner.run_claim(claims.by_name(name), systems.certifier(NUMPY), more).verdict == "holds", name


def _rounder(**changes: Callable[[np.ndarray, str], np.ndarray]) -> Rounder:
    return replace(systems.rounder(NUMPY), **changes)


def _unrounded(matrices: np.ndarray, dtype: str) -> np.ndarray:
    return matrices


def _constant(matrices: np.ndarray, dtype: str) -> np.ndarray:
    return np.full_like(matrices, 1 / matrices.shape[-1])


def _row_division_only(matrices: np.ndarray, dtype: str) -> np.ndarray:
    total = matrices.sum(-1, keepdims=True)
    return matrices / np.where(total > 0, total, 1)


def _transposed_fill(matrices: np.ndarray, dtype: str) -> np.ndarray:
    """The rank-one fill with its two factors exchanged."""
    shrunk = systems.rounder(NUMPY).nonexpansive(matrices, "float64")
    rows, columns = 1 - shrunk.sum(-1), 1 - shrunk.sum(-2)
    mass = np.maximum(rows.sum(-1), 1e-300)[:, None, None]
    return shrunk + columns[:, :, None] * rows[:, None, :] / mass


ROUNDERS: dict[str, tuple[Callable[[], Rounder], ...]] = {
    "rounding_makes_both_sides_exact": (
        lambda: _rounder(exact=_unrounded),
        lambda: _rounder(exact=_row_division_only),
        lambda: _rounder(exact=_transposed_fill),
        lambda: _rounder(exact=systems.rounder(NUMPY).nonexpansive),
    ),
    "shrinking_gives_norm_at_most_one": (
        lambda: _rounder(nonexpansive=_unrounded),
        lambda: _rounder(nonexpansive=_row_division_only),
        lambda: _rounder(nonexpansive=_constant),
    ),
    "rounding_moves_little": (lambda: _rounder(exact=_constant),),
    "rounding_is_the_algorithm": (
        lambda: _rounder(exact=_constant),
        lambda: _rounder(exact=_transposed_fill),
        lambda: _rounder(nonexpansive=_row_division_only),
    ),
}


@pytest.mark.parametrize("name", sorted(ROUNDERS))
def test_rounding_claims_reject_wrong_roundings(name: str) -> None:
    assert _verdict(name, systems.rounder(NUMPY)) == "holds"
    for number, make in enumerate(ROUNDERS[name]):
        assert _verdict(name, make()) == "broken", number


def _decomposer(change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> Decomposer:
    honest = systems.decomposer(NUMPY)
    return replace(honest, decompose=lambda m, dtype: change(*honest.decompose(m, dtype)))


def _repeat(weights: np.ndarray, permutations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Many small copies of each term: right, but too many."""
    copies = 20
    return np.repeat(weights / copies, copies, axis=1), np.repeat(permutations, copies, axis=1)


def test_decomposition_claim_rejects_wrong_decompositions() -> None:
    name = "decomposition_rebuilds"
    assert _verdict(name, systems.decomposer(NUMPY)) == "holds"
    for change in (
        lambda w, p: (w * 1.001, p),
        lambda w, p: (w, np.zeros_like(p)),
        lambda w, p: (w, np.argsort(p, axis=-1)[..., ::-1]),
        lambda w, p: (w - 1e-3, p),
        _repeat,
    ):
        assert _verdict(name, _decomposer(change)) == "broken"


def _parametrized(change: Callable[[np.ndarray], np.ndarray], name: str = "Permutations") -> Parametrized:
    honest = systems.parametrized(name, NUMPY)
    return replace(honest, matrix=lambda parameters, n, dtype: change(honest.matrix(parameters, n, dtype)))


def test_parametrization_claim_rejects_wrong_maps() -> None:
    name = "sums_by_construction"
    for right in ("Permutations", "RowStochastic", "Cayley"):
        assert _verdict(name, systems.parametrized(right, NUMPY)) == "holds"
    assert _verdict(name, _parametrized(lambda m: m * 1.001)) == "broken"
    assert _verdict(name, _parametrized(np.sqrt)) == "broken"
    assert _verdict(name, _parametrized(lambda m: m * 1.001, "Cayley")) == "broken"
    assert _verdict(name, _parametrized(lambda m: np.swapaxes(m, -1, -2), "RowStochastic")) == "broken"


def _euclidean(change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Any:
    solvers = pytest.importorskip("birkhoff.solvers")
    honest = solver_subject(solvers.Euclidean(), NUMPY)
    return replace(honest, function=lambda logits: change(honest.function(logits), logits).astype(logits.dtype))


def _kl(matrix: np.ndarray, logits: np.ndarray) -> np.ndarray:
    from birkhoff import reference

    return reference.sinkhorn(logits, 60)


EUCLIDEAN: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "euclidean_is_doubly_stochastic": lambda matrix, logits: matrix * 1.001,
    "euclidean_is_nearest": lambda matrix, logits: 0 * matrix + 1 / matrix.shape[-1],
    "euclidean_is_nonexpansive": lambda matrix, logits: matrix + 2 * logits,
    "euclidean_is_idempotent": _kl,
}


@pytest.mark.parametrize("name", sorted(EUCLIDEAN))
def test_euclidean_claims_reject_other_maps(name: str) -> None:
    assert _verdict(name, _euclidean(lambda matrix, logits: matrix)) == "holds"
    assert _verdict(name, _euclidean(EUCLIDEAN[name])) == "broken"


def _layer(preset: str, **changes: Any) -> Layer:
    pytest.importorskip("torch")
    from mhc_layers.conventions import CONVENTIONS

    return replace(systems.layer(CONVENTIONS[preset], BACKENDS["torch"]), **changes)


def _changed_maps(preset: str, change: Callable[..., Any]) -> Layer:
    honest = _layer(preset)
    return replace(honest, maps=lambda x, parameters: change(*honest.maps(x, parameters)))


def _changed_step(preset: str, change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Layer:
    honest = _layer(preset)
    return replace(honest, step=lambda x, p, weight: change(honest.step(x, p, weight), x))


def _changed_gradient(preset: str, key: str, factor: float) -> Layer:
    honest = _layer(preset)

    def vjp(x: np.ndarray, p: dict[str, np.ndarray], weight: np.ndarray, grad: np.ndarray) -> dict[str, np.ndarray]:
        gradient = honest.vjp(x, p, weight, grad)
        return {**gradient, key: factor * gradient[key]}

    return replace(honest, vjp=vjp)


def _relabelled(preset: str, **fields: Any) -> Layer:
    """Says another convention than it computes."""
    honest = _layer(preset)
    return replace(honest, convention={**honest.convention, **fields})


def _keeps_its_eps(**fields: Any) -> Layer:
    variant = _layer("deepseek_v4").variant
    assert variant is not None
    return variant(**fields) if "start" in fields else _layer("deepseek_v4")


def _forgets_the_transpose(**fields: Any) -> Layer:
    variant = _layer("deepseek_v4").variant
    assert variant is not None
    honest = variant(**fields)

    def maps(x: np.ndarray, parameters: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        pre, post, res = honest.maps(x, parameters)
        return pre, post, np.swapaxes(res, -1, -2)

    return replace(honest, maps=maps) if honest.convention["transposed"] else honest


def _ends_on_the_columns(**fields: Any) -> Layer:
    variant = _layer("deepseek_v4").variant
    assert variant is not None
    return variant(**fields, first="rows") if "start" in fields else variant(**fields)


LAYERS: dict[str, tuple[Callable[[], Layer], ...]] = {
    "maps_follow_the_equations": (
        lambda: _changed_maps("paper", lambda pre, post, res: (pre, post, np.swapaxes(res, -1, -2))),
        lambda: _changed_maps("paper", lambda pre, post, res: (pre, post / 2, res)),
        lambda: _changed_maps("paper", lambda pre, post, res: (post, pre, res)),
        lambda: _relabelled("paper", first="rows"),
        lambda: _relabelled("deepseek_v4", eps_den=0.0),
        lambda: _relabelled("deepseek_v4", transposed=False, first="rows"),
        lambda: _relabelled("paper", norm_eps=1e-3),
    ),
    "step_follows_the_equation": (
        lambda: _changed_step("paper", lambda y, x: y[:, ::-1, :]),
        lambda: _changed_step("paper", lambda y, x: y - x * 1e-9),
        lambda: _relabelled("paper", transposed=True),
    ),
    "one_stream_is_a_gated_residual": (
        lambda: _changed_maps("paper", lambda pre, post, res: (pre, post, res - 1e-9)),
        lambda: _relabelled("deepseek_v4", eps_start=0.0, eps_den=0.0),
    ),
    "exact_side_of_the_operator": (
        lambda: _changed_maps("paper", lambda pre, post, res: (pre, post, np.swapaxes(res, -1, -2))),
        lambda: _changed_maps("paper", lambda pre, post, res: (pre, post, res * (1 - 1e-12))),
    ),
    "layer_gradient": (
        lambda: _changed_gradient("paper", "x", 1.01),
        lambda: _changed_gradient("paper", "phi", 0.0),
        lambda: _changed_gradient("deepseek_v4", "bias", -1.0),
        lambda: _changed_gradient("paper", "alpha_res", 2.0),
    ),
    "v4_without_eps_is_the_paper_transposed": tuple(
        lambda change=change: _layer("deepseek_v4", variant=change)
        for change in (_keeps_its_eps, _forgets_the_transpose, _ends_on_the_columns)
    ),
    "decoding_equals_the_full_forward": (lambda: _layer("paper", decode=lambda seed: (np.zeros(3), np.full(3, 1e-3))),),
}


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_layer_claims_reject_wrong_layers(name: str) -> None:
    found = [_verdict(name, _layer(preset)) for preset in ("deepseek_v4", "paper")]
    assert found in (["holds", "holds"], ["holds", "not claimed"])
    for number, make in enumerate(LAYERS[name]):
        assert _verdict(name, make()) == "broken", number


def test_every_other_claim_is_tested() -> None:
    covered = {
        *CERTIFIERS, *ROUNDERS, *EUCLIDEAN, *LAYERS, "decomposition_rebuilds", "sums_by_construction",
    }  # fmt: skip
    others = {c.name for c in claims.CLAIMS if c.kind not in ("projection", "trained") or c.family == "euclidean"}
    assert others == covered

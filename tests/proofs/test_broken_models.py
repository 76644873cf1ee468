"""Each claim about trained models rejects a model, a certificate or a cache that is wrong in its way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from proofs import claims, runner, systems
from proofs.backends import BACKENDS
from proofs.runner import Profile
from proofs.systems import Trace, Trained

EFFORT = Profile("test", 20, shrink_budget=0)


def _model(preset: str = "paper", connection: str = "mhc") -> Trained:
    pytest.importorskip("torch")
    from mhc_layers.conventions import CONVENTIONS

    return systems.trained(CONVENTIONS[preset], BACKENDS["torch"], connection=connection)


def _verdict(name: str, subject: Trained) -> str:
    return runner.run_claim(claims.by_name(name), subject, EFFORT).verdict


def _free() -> Trained:
    """Hyper-connections without the constraint, trained the same way."""
    return _model(connection="hc")


def _one_stream() -> Trained:
    """The plain residual Transformer."""
    return _model(connection="residual")


def _traced(change: Callable[[Trace], Trace], preset: str = "paper") -> Trained:
    honest = _model(preset)
    return replace(honest, trace=lambda seed: change(honest.trace(seed)))


def _unnormalised(factor: float) -> Callable[[], Trained]:
    return lambda: _traced(lambda t: replace(t, h_res=(t.h_res * factor).astype(np.float32).astype(np.float64)))


def _transposed() -> Trained:
    return _traced(lambda t: replace(t, h_res=np.swapaxes(t.h_res, -1, -2)))


def _certified(key: str, factor: float, preset: str = "paper") -> Callable[[], Trained]:
    def make() -> Trained:
        honest = _model(preset)
        plain = honest.certifier

        def certify(matrices: np.ndarray, dtype: str) -> dict[str, Any]:
            return {**(c := plain.certify(matrices, dtype)), key: c[key] * factor}

        def certify_product(stack: np.ndarray, dtype: str) -> dict[str, Any]:
            return {**(c := plain.certify_product(stack, dtype)), key: c[key] * factor}

        return replace(honest, certifier=replace(plain, certify=certify, certify_product=certify_product))

    return make


def _shallow_first() -> Trained:
    """Certifies the product in the wrong order."""
    honest = _model()
    plain = honest.certifier
    wrong = replace(plain, certify_product=lambda s, dtype: plain.certify_product(s[:, ::-1].copy(), dtype))
    return replace(honest, certifier=wrong)


def _copies(trace: Trace) -> Trace:
    return replace(trace, streams=np.broadcast_to(trace.streams[:, :, :1], trace.streams.shape))


def _late_by_one() -> Trained:
    honest = _model()

    def decode(seed: int) -> tuple[np.ndarray, np.ndarray]:
        full, decoded = honest.decode(seed)
        return full, np.roll(decoded, 1, axis=1)

    return replace(honest, decode=decode)


MODELS: dict[str, tuple[Callable[[], Trained], ...]] = {
    "trained_site_certificate_holds": (
        _free,
        _certified("norm2_upper", 1 - 1e-12),
        _certified("norm2_lower", 1 + 1e-3),
        _certified("norm2_upper", 1.01, "deepseek_v4"),
    ),
    "trained_depth_certificate_holds": (
        _free,
        _certified("norm2_upper", 1 - 1e-12),
        _certified("norm2_upper", 1.01, "deepseek_v4"),
        _certified("norm2_lower", 1 + 1e-5),
        _shallow_first,
    ),
    "trained_row_sums_exact": (_free, _transposed, _unnormalised(1 + 1e-5)),
    "trained_depth_gain_is_one": (_free, _transposed, _unnormalised(1 + 1e-5)),
    "trained_depth_norm_at_most_sqrt_n": (_unnormalised(1.3),),
    "trained_streams_differ": (_one_stream, lambda: _traced(_copies), lambda: _traced(_copies, "deepseek_v4")),
    "trained_mean_is_conserved": (
        lambda: _traced(lambda t: replace(t, h_post=t.h_post * 1.01)),
        lambda: _traced(lambda t: replace(t, updates=t.updates[::-1])),
        lambda: _traced(lambda t: replace(t, streams=t.streams * np.linspace(1, 1.1, 7)[:, None, None, None])),
    ),
    "trained_decoding_equals_the_full_forward": (_late_by_one,),
}


@pytest.mark.parametrize("preset", ["paper", "deepseek_v4"])
def test_the_models_have_learnt_something(preset: str) -> None:
    losses = _model(preset).losses()
    assert np.isfinite(losses).all() and losses[-1] < losses[0] / 3


def test_training_is_the_same_every_time() -> None:
    first = _model().losses()
    import torch

    from mhc_layers.conventions import CONVENTIONS

    before = torch.get_rng_state()
    again = systems._train.__wrapped__(CONVENTIONS["paper"], "mhc")[1]
    assert again is not first and again == first
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_claims_reject_wrong_models(name: str) -> None:
    assert [_verdict(name, _model(preset)) for preset in ("paper", "deepseek_v4")] in (
        ["holds", "holds"],
        ["holds", "not claimed"],
    )
    for number, make in enumerate(MODELS[name]):
        assert _verdict(name, make()) == "broken", number


def test_a_cache_that_is_off_by_one_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = _model()
    from mhc_layers.models.attention import LayerCache

    honest = LayerCache.extend

    def overwrites_the_last(self: Any, keys: Any, values: Any) -> Any:
        start = self.length
        found = honest(self, keys, values)
        if start:
            end = start + keys.shape[2]
            self.keys[:, :, start - 1 : end - 1] = keys
            self.values[:, :, start - 1 : end - 1] = values
        return found

    monkeypatch.setattr(LayerCache, "extend", overwrites_the_last)
    assert _verdict("trained_decoding_equals_the_full_forward", subject) == "broken"


def test_every_claim_about_models_is_tested() -> None:
    assert {claim.name for claim in claims.CLAIMS if claim.kind == "trained"} == set(MODELS)

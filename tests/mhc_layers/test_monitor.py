"""The monitor: its numbers against plain definitions, its certificates against singular values, its cost."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import birkhoff
from mhc_layers import Transformer, capture_coefficients
from mhc_layers.training.config import MonitorConfig
from mhc_layers.training.inspection import inspect_model
from mhc_layers.training.monitor import (
    Coefficients,
    Monitor,
    certify_composite,
    composites,
    fetch,
    measure,
    stream_statistics,
)
from tests.mhc_layers.training_cases import tiny_model


def stack(std=2.0, sites=5, tokens=6, n=4, seed=0):
    logits = np.random.default_rng(seed).normal(0, std, (sites, tokens, n, n))
    return np.asarray(birkhoff.sinkhorn(logits))


def coefficients(h_res, seed=1):
    sites, tokens, n = h_res.shape[:3]
    generator = np.random.default_rng(seed)
    h_pre, h_post = generator.uniform(size=(2, sites, tokens, n))
    return Coefficients(h_pre=h_pre, h_post=2 * h_post, h_res=h_res)


def test_composites_are_products_over_depth():
    h_res = stack()
    prefix, suffix = composites(h_res)
    for site in range(5):
        expected = np.eye(4)
        for matrix in h_res[: site + 1, 2]:
            expected = matrix @ expected
        np.testing.assert_allclose(prefix[site, 2], expected, atol=1e-14)
        expected = np.eye(4)
        for matrix in h_res[site:, 2]:
            expected = matrix @ expected
        np.testing.assert_allclose(suffix[site, 2], expected, atol=1e-14)


@pytest.mark.parametrize("std", [0.3, 2.0, 8.0])
def test_certificate_encloses_the_true_norm_and_is_tight(std):
    h_res = stack(std)
    certificate = certify_composite(h_res)
    true = np.linalg.norm(composites(h_res)[0][-1], 2, axis=(-2, -1)).max()
    assert certificate.norm2_lower <= true * (1 + 1e-12)
    assert true <= certificate.norm2_upper * (1 + 1e-12)
    assert certificate.norm2_upper / true < 1.02
    assert (certificate.tokens, certificate.sites, certificate.absolute) == (6, 5, False)
    assert certificate.provenance == "sampled"


def test_certificate_sees_the_order_of_the_sites():
    h_res = np.stack([np.array([[[0.0, 0.0], [1.0, 1.0]]]), np.array([[[1.0, 0.0], [0.0, 0.0]]])])
    assert certify_composite(h_res).norm2_upper < 1e-6  # the second site drops what the first one wrote
    assert certify_composite(h_res[::-1]).norm2_lower > 0.9


def test_free_operators_get_a_bound_of_absolute_values():
    h_res = stack() * np.where(np.random.default_rng(3).uniform(size=(5, 6, 4, 4)) < 0.3, -1.0, 1.0)
    certificate = certify_composite(h_res)
    true = np.linalg.norm(composites(h_res)[0][-1], 2, axis=(-2, -1)).max()
    assert certificate.absolute and certificate.norm2_lower == 0.0 and true <= certificate.norm2_upper


def test_site_values_follow_their_definitions():
    h_res = stack(3.0)
    values = measure(coefficients(h_res)).sites
    np.testing.assert_allclose(values["row_error"], np.abs(h_res.sum(-1) - 1).max((1, 2)))
    np.testing.assert_allclose(values["column_error"], np.abs(h_res.sum(-2) - 1).max((1, 2)))
    np.testing.assert_allclose(values["backward_gain_max"], h_res.sum(-2).max((1, 2)))
    np.testing.assert_allclose(values["backward_gain_min"], h_res.sum(-2).min((1, 2)))
    np.testing.assert_allclose(values["distance_identity"], np.linalg.norm(h_res - np.eye(4), axis=(-2, -1)).mean(1))
    eigenvalues = np.sort(np.abs(np.linalg.eigvals(h_res[1, 2])))
    only = measure(coefficients(h_res[1:2, 2:3])).sites
    assert only["lambda2"][0] == pytest.approx(eigenvalues[-2])


def test_identity_and_uniform_mixing_are_recognised():
    identity = measure(coefficients(np.broadcast_to(np.eye(4), (2, 3, 4, 4)).copy())).sites
    uniform = measure(coefficients(np.full((2, 3, 4, 4), 0.25))).sites
    np.testing.assert_allclose(identity["distance_identity"], 0)
    np.testing.assert_allclose(identity["lambda2"], 1)
    np.testing.assert_allclose(uniform["distance_uniform"], 0, atol=1e-15)
    np.testing.assert_allclose(uniform["lambda2"], 0, atol=1e-7)


def test_one_stream_is_measured_too():
    result = measure(coefficients(np.ones((2, 3, 1, 1))))
    assert result.sites["lambda2"].tolist() == [0.0, 0.0]
    assert result.certificate.norm2_upper == pytest.approx(1.0)


def test_stream_statistics_of_equal_and_orthogonal_streams():
    def statistics(streams):
        return stream_statistics(streams @ streams.swapaxes(-1, -2))

    equal = np.broadcast_to(np.arange(1.0, 9.0), (1, 2, 4, 8))
    values = statistics(equal)
    assert values["cosine_mean"][0] == pytest.approx(1) and values["difference"][0] == pytest.approx(0)
    assert values["effective_streams"][0] == pytest.approx(1, abs=1e-6)
    orthogonal = np.eye(4, 8)[None, None]
    values = statistics(orthogonal)
    assert values["cosine_mean"][0] == pytest.approx(0) and values["effective_streams"][0] == pytest.approx(4)
    assert statistics(np.zeros((1, 1, 4, 8)))["difference"][0] == 0.0
    streams = np.random.default_rng(0).normal(size=(3, 5, 4, 8))
    centred = streams - streams.mean(-2, keepdims=True)
    expected = np.linalg.norm(centred, axis=(-2, -1)) / np.linalg.norm(streams, axis=(-2, -1))
    np.testing.assert_allclose(statistics(streams)["difference"], expected.mean(1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Transformer(tiny_model())


def forward(model, rows=3, length=11):
    tokens = torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(1))
    return model(tokens)


def test_fetched_coefficients_are_those_of_the_forward_pass(model):
    with capture_coefficients(model) as captured:
        forward(model)
    result = fetch(captured, tokens=1000)
    assert result.h_res.shape == (4, 33, 4, 4) and result.gram.shape == (5, 33, 4, 4)
    for site, record in enumerate(captured):
        np.testing.assert_array_equal(result.h_res[site], record.h_res.reshape(33, 4, 4).double().numpy())
        np.testing.assert_array_equal(result.h_pre[site], record.h_pre.reshape(33, 4).double().numpy())
    for site, x, logits in zip(captured.sites, captured.streams, result.logits, strict=True):
        expected = site.logits(x)[1].detach().reshape(33, 16).numpy()
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
    fewer = fetch(captured, tokens=5)
    assert fewer.h_res.shape[1] == 5
    np.testing.assert_array_equal(fewer.h_res[:, -1], result.h_res[:, -1])


def test_monitor_measures_due_steps_only(model):
    monitor = Monitor(model, MonitorConfig(every=3, certify_every=6, tokens=4))
    seen = {}
    for step in range(1, 8):
        with monitor.watch(step):
            forward(model)
        measurement = monitor.flush()
        if step == 2:  # the first measurement is the set-up
            assert monitor.setup_seconds > 0 and monitor.seconds == 0
            setup = monitor.setup_seconds
        if measurement is not None:
            seen[step] = measurement
    assert list(seen) == [1, 3, 6] and [seen[s].step for s in seen] == [1, 3, 6]
    assert [seen[step].certificate is not None for step in seen] == [False, False, True]
    assert monitor.seconds > 0 and monitor.setup_seconds == setup and monitor.flush() is None
    log = seen[6].to_log()
    assert len(log["site/row_error"]) == 4 and log["mean_composite"].shape == (4, 4)


def test_monitor_changes_no_bit_of_training(model):
    expected = forward(model)
    monitor = Monitor(model, MonitorConfig(every=1, certify_every=1, tokens=4))
    state = torch.get_rng_state()
    with monitor.watch(1):
        actual = forward(model)
    monitor.flush()
    assert torch.equal(expected, actual) and torch.equal(state, torch.get_rng_state())


def test_switched_off_monitor_keeps_nothing(model):
    monitor = Monitor(model, MonitorConfig(every=0, certify_every=0))
    with monitor.watch(1):
        forward(model)
    assert monitor.flush() is None


@pytest.mark.parametrize(
    "fields", [{"every": -1}, {"tokens": 0}, {"every": 4, "certify_every": 6}, {"every": 0, "certify_every": 5}]
)
def test_wrong_intervals_are_refused(fields):
    with pytest.raises(ValueError):
        MonitorConfig(**fields)


def test_inspection_certifies_every_site_and_the_depth(model):
    data = np.random.default_rng(0).integers(32, 127, 400, dtype=np.uint8)
    inspection = inspect_model(model, data, seq_len=16, tokens=20)
    assert [site.name for site in inspection.sites] == [
        "0.attention", "0.feed-forward", "1.attention", "1.feed-forward"
    ]  # fmt: skip
    for site in inspection.sites:
        assert 0.999 < site.norm2_lower <= site.norm2_upper < 1.01 and site.provenance in ("enclosure", "exact")
    assert inspection.measurement.certificate.tokens == inspection.tokens == 20


def test_measurement_is_plain_data(model):
    with capture_coefficients(model) as captured:
        forward(model)
    result = measure(fetch(captured, tokens=4), step=9)
    assert dataclasses.asdict(result)["step"] == 9

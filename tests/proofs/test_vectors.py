"""The conformance vectors: they are what the generator writes, and every backend reproduces them."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from proofs import claims, measure, model, rational, strategies, subjects, systems, vectors
from proofs.backends import BACKENDS
from proofs.vectors import generate

BACKEND_NAMES = ["numpy", "array_api_strict", "torch", "cupy", "cuda", "triton"]


@pytest.mark.parametrize("name", vectors.NAMES)
def test_the_generator_writes_the_committed_files(name: str) -> None:
    pytest.importorskip("flint")
    path = Path(vectors.__file__).with_name(f"{name}.json")
    assert json.loads(path.read_text())["cases"] == generate.cases(name)


def test_digits_that_are_not_proven_are_not_written() -> None:
    flint = pytest.importorskip("flint")
    saved = flint.ctx.prec
    try:
        flint.ctx.prec = 2000  # about 600 digits
        third = flint.arb(1) / 3
    finally:
        flint.ctx.prec = saved
    assert generate._decimal(third, 500) == "0." + "3" * 500
    with pytest.raises(ArithmeticError, match="wider"):
        generate._decimal(third, 1000)


def test_the_model_reproduces_the_iterates() -> None:
    for name in ("iterates_exact", "iterates_decimal"):
        for case in vectors.load(name):
            logits = vectors.logits_of(case)
            if "eps" in case:
                eps = [float.fromhex(value) for value in case["eps"]]
                result = model.damped_iterate(logits, case["num_iters"], *eps, first=case["first"])
            else:
                result = model.iterate(logits, case["num_iters"], case["first"])
            assert np.abs(result - vectors.matrix_of(case)).max() < 4e-15, case["name"]


def test_stored_norms_enclose() -> None:
    for case in vectors.load("matrices"):
        entries = rational.exact(vectors.logits_of(case))
        lower, upper = Fraction(case["norm2_lower"]), Fraction(case["norm2_upper"])
        assert upper - lower <= Fraction(2, 10**30)
        assert rational.is_positive_semidefinite(rational.gram_below(entries, upper**2)), case["name"]
        if lower:
            assert not rational.is_positive_definite(rational.gram_below(entries, lower**2)), case["name"]


def _runnable(name: str) -> None:
    reason = BACKENDS[name].missing()
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("name", BACKEND_NAMES)
def test_roundings_reproduce_the_fractions(name: str) -> None:
    _runnable(name)
    rounder = systems.rounder(BACKENDS[name])
    for case in vectors.load("matrices"):
        matrix = vectors.logits_of(case)[None]
        for dtype in BACKENDS[name].dtypes:
            allowed = (4 * matrix.shape[-1] + 16) * measure.compute_roundoff(dtype)
            for key, run in (("exact", rounder.exact), ("nonexpansive", rounder.nonexpansive)):
                assert np.abs(run(matrix, dtype)[0] - vectors.matrix_of(case, key)).max() <= allowed, case["name"]


@pytest.mark.parametrize("name", BACKEND_NAMES)
def test_certificates_enclose_the_stored_norms(name: str) -> None:
    _runnable(name)
    certifier = systems.certifier(BACKENDS[name])
    for case in vectors.load("matrices"):
        matrix = strategies.round_to(vectors.logits_of(case)[None], "float32").astype(np.float64)
        certificate = certifier.certify(matrix, "float32")
        lower, upper = (Fraction(float(certificate[key][0])) for key in ("norm2_lower", "norm2_upper"))
        assert lower <= Fraction(case["norm2_upper"]) and upper >= Fraction(case["norm2_lower"]), case["name"]
        for key in ("row_sums", "column_sums"):
            assert [Fraction(float(value)) for value in certificate[key][0]] == [Fraction(text) for text in case[key]]


def test_unknown_vectors_are_named() -> None:
    with pytest.raises(ValueError, match="iterates_exact"):
        vectors.load("nonsense")


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_every_stored_iterate_is_replayed(name: str) -> None:
    replayed = set()
    for subject in subjects.builtin_subjects([name], ["SinkhornLog", "SinkhornDamped"]):
        replayed |= {(sample.note, sample.dtype) for sample in claims.by_name("conformance_vectors").samples(subject)}
    stored = {case["name"] for file in ("iterates_exact", "iterates_decimal") for case in vectors.load(file)}
    assert {note for note, _ in replayed} == stored
    assert {(note, "float64") for note in stored} <= replayed
    assert {dtype for _, dtype in replayed} == {*BACKENDS[name].dtypes, *BACKENDS[name].halves}

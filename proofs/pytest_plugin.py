"""pytest plugin of the verification suite, registered as ``birkhoff_proofs``.

It adds the fixture ``verify_projection`` and two options. A test of a projection of yours is one line::

    def test_my_sinkhorn(verify_projection):
        verify_projection(my_sinkhorn, last="rows", backend="torch")

and fails with every broken claim and its smallest failing example. For one test item a claim, take the fixture
``birkhoff_claim``, which is parametrised over all of them::

    def test_my_sinkhorn(birkhoff_claim):
        birkhoff_claim.check(my_sinkhorn, last="rows")

Nothing but pytest is imported until a test uses a fixture.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest

__all__ = ["ClaimUnderTest", "birkhoff_claim", "verify_projection"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--birkhoff-profile`` and ``--birkhoff-seed``."""
    group = parser.getgroup("birkhoff", "verification of doubly stochastic projections")
    group.addoption(
        "--birkhoff-profile",
        default="quick",
        choices=("quick", "ci", "nightly"),
        help="how many examples verify_projection and birkhoff_claim try (default: quick)",
    )
    group.addoption("--birkhoff-seed", type=int, default=None, help="other examples than the fixed ones")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One item for every claim about projections, for tests that take ``birkhoff_claim``."""
    if "birkhoff_claim" in metafunc.fixturenames:
        claims = _load("proofs.claims")
        names = [claim.name for claim in claims.PROJECTION_CLAIMS]
        metafunc.parametrize("birkhoff_claim", names, indirect=True)


def _load(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        pytest.fail(f"{error.name} is not installed; pip install 'birkhoff-mhc[proofs]'", pytrace=False)


class ClaimUnderTest:
    """One claim, ready to be tried on a function."""

    def __init__(self, name: str, profile: str, seed: int | None) -> None:
        self.name = name
        self._profile = profile
        self._seed = seed

    def check(
        self,
        projection: Callable[[Any], Any],
        *,
        last: str = "rows",
        backend: str = "numpy",
        num_iters: int | None = None,
        dtypes: Sequence[str] | None = None,
        sizes: Sequence[int] | None = None,
    ) -> None:
        """Fail with the smallest failing example if the claim is broken; skip if it isn't claimed of this function."""
        facts = {"last": last, "backend_name": backend, "num_iters": num_iters, "dtypes": dtypes, "sizes": sizes}
        outcomes = _run([self.name], projection, facts, self._profile, self._seed)
        if outcomes[0].verdict == "not claimed":
            pytest.skip(outcomes[0].reason)
        _fail_if_broken(outcomes)


def _run(
    names: Sequence[str] | None,
    projection: Callable[[Any], Any],
    facts: dict[str, Any],
    profile: str,
    seed: int | None,
) -> list[Any]:
    claims, runner = _load("proofs.claims"), _load("proofs.runner")
    name = getattr(projection, "__name__", type(projection).__name__)
    subject = _load("proofs.subjects").user_subject(projection, name=name, **facts)
    chosen = claims.PROJECTION_CLAIMS if names is None else claims.select(names)
    others = [claim.name for claim in chosen if claim.kind != "projection"]
    if others:
        raise ValueError(f"{', '.join(others)}: not about projections, so nothing of {name} would be tried")
    return list(runner.run(chosen, [subject], runner.PROFILES[profile], seed_value=seed))


def _fail_if_broken(outcomes: Sequence[Any]) -> None:
    report = _load("proofs.report")
    broken = [outcome for outcome in outcomes if outcome.verdict == "broken"]
    if broken:
        pytest.fail("\n\n".join(report.explain(outcome) for outcome in broken), pytrace=False)


@pytest.fixture
def birkhoff_claim(request: pytest.FixtureRequest) -> ClaimUnderTest:
    """One claim about projections; a test that takes it runs once for each."""
    return ClaimUnderTest(
        request.param, request.config.getoption("--birkhoff-profile"), request.config.getoption("--birkhoff-seed")
    )


@pytest.fixture
def verify_projection(request: pytest.FixtureRequest) -> Callable[..., None]:
    """A function ``verify(projection, *, last, backend, num_iters, dtypes, sizes, claims)``.

    It fails if a claim is broken, and if none of the chosen ones can be made of the projection.
    """
    profile = request.config.getoption("--birkhoff-profile")
    seed = request.config.getoption("--birkhoff-seed")

    def verify(
        projection: Callable[[Any], Any],
        *,
        last: str = "rows",
        backend: str = "numpy",
        num_iters: int | None = None,
        dtypes: Sequence[str] | None = None,
        sizes: Sequence[int] | None = None,
        claims: Sequence[str] | None = None,
    ) -> None:
        facts = {"last": last, "backend_name": backend, "num_iters": num_iters, "dtypes": dtypes, "sizes": sizes}
        outcomes = _run(claims, projection, facts, profile, seed)
        _fail_if_broken(outcomes)
        if all(outcome.verdict == "not claimed" for outcome in outcomes):
            reasons = "\n".join(f"{outcome.claim.name}: {outcome.reason}" for outcome in outcomes)
            pytest.fail(f"nothing to verify, no claim applies\n{reasons}", pytrace=False)

    return verify

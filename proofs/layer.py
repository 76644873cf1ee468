"""Claims about the layer: its maps follow the equations, and the special cases come out as they must.

The equations are written once more here, in extended precision NumPy, from the paper and from the conventions' table.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from proofs import model, strategies
from proofs._claim import Claim, Observation, Sample, worst, worst_of
from proofs.measure import accuracy_allowance, logit_range, sums
from proofs.systems import Arrays, Layer, Trained

__all__ = ["CLAIMS", "decoding_gap", "equations"]

DIM = 5
_U = 2.0**-53

Maps = tuple[np.ndarray, np.ndarray, np.ndarray]


def equations(x: np.ndarray, parameters: Arrays, convention: dict[str, Any]) -> Maps:
    """Equations 14 to 19 and their variants: streams (B, n, C) to pre (B, n), post (B, n), res (B, n, n)."""
    n = x.shape[-2]
    vec = x.reshape(len(x), -1).astype(np.longdouble)
    if convention["norm_eps_place"] == "inside":
        root = np.sqrt(np.mean(vec**2, axis=-1, keepdims=True) + np.longdouble(convention["norm_eps"]))
    else:
        root = np.sqrt(np.mean(vec**2, axis=-1, keepdims=True)) + np.longdouble(convention["norm_eps"])
    alphas = [parameters[f"alpha_{name}"] for name in ("pre", "post", "res")]
    gates = np.concatenate([np.full(n, alphas[0]), np.full(n, alphas[1]), np.full(n * n, alphas[2])])
    logits = gates * (vec @ parameters["phi"].T.astype(np.longdouble)) / root + parameters["bias"]
    pre, post, rest = logits[:, :n], logits[:, n : 2 * n], logits[:, 2 * n :].reshape(-1, n, n)
    # the acting operator is normalised first on `first`; what is stored transposed has the sides exchanged
    first = convention["first"]
    if convention["transposed"]:
        first = "rows" if first == "columns" else "columns"
    if convention["start"] == "exp":
        stored = model.iterate(rest, convention["num_iters"], first)
    else:
        eps = convention["eps_start"], convention["eps_den"]
        stored = model.damped_iterate(rest, convention["num_iters"], *eps, first=first)
    res = np.swapaxes(stored, -1, -2) if convention["transposed"] else stored
    return _sigmoid(pre) + convention["eps_pre"], convention["post_multiplier"] * _sigmoid(post), res


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


def _inputs(sample: Sample, n: int | None = None, *, spread: float = 1.0) -> tuple[np.ndarray, Arrays]:
    """Streams and parameters; the residual logits of the sample enter through the bias."""
    rng = sample.rng()
    logits = np.asarray(sample.logits[0], dtype=np.float64) if n is None else np.zeros((n, n))
    n = logits.shape[-1]
    x = rng.standard_normal((3, n, DIM)) * 10.0 ** rng.uniform(-2, 2)
    parameters = {
        "phi": spread * rng.standard_normal((n * (n + 2), n * DIM)),
        "bias": np.concatenate([rng.standard_normal(2 * n), logits.ravel()]),
        "alpha_pre": np.array(rng.uniform(0.01, 1)),
        "alpha_post": np.array(rng.uniform(0.01, 1)),
        "alpha_res": np.array(rng.uniform(0.01, 1)),
    }
    return x, parameters


def _residual_logits(x: np.ndarray, parameters: Arrays, convention: dict[str, Any]) -> np.ndarray:
    n = x.shape[-2]
    vec = x.reshape(len(x), -1)
    root = np.sqrt(np.mean(vec**2, axis=-1, keepdims=True) + convention["norm_eps"])
    logits = parameters["alpha_res"] * (vec @ parameters["phi"][2 * n :].T) / root + parameters["bias"][2 * n :]
    return logits.reshape(-1, n, n)


def _allowance(x: np.ndarray, parameters: Arrays, convention: dict[str, Any]) -> np.ndarray:
    """The accuracy contract of the projection, and (nC + 8) u for each unit of the logits: a sum of nC products."""
    logits = _residual_logits(x, parameters, convention)
    terms = x.shape[-2] * x.shape[-1] + 8
    size = np.max(np.abs(parameters["phi"])) * np.sqrt(terms) + np.max(np.abs(parameters["bias"])) + logit_range(logits)
    return accuracy_allowance(logits, "float64") + terms * _U * (1 + size)


def _maps_agree(given: Maps, known: Maps, allowed: np.ndarray, detail: str) -> Observation:
    """The three maps of a site against those that are known; `allowed` has one value a token."""
    return worst_of(
        worst(np.abs(a - b).astype(np.float64).reshape(len(a), -1), allowed[:, None], f"{name} {detail}")
        for name, a, b in zip(("h_pre", "h_post", "h_res"), given, known, strict=True)
    )


def _follows(subject: Layer, sample: Sample) -> Observation:
    x, parameters = _inputs(sample)
    known = equations(x, parameters, subject.convention)
    return _maps_agree(
        subject.maps(x, parameters), known, _allowance(x, parameters, subject.convention), "from the equations"
    )


def _step_follows(subject: Layer, sample: Sample) -> Observation:
    x, parameters = _inputs(sample)
    weight = sample.rng().standard_normal((DIM, DIM))
    pre, post, res = (part.astype(np.float64) for part in equations(x, parameters, subject.convention))
    update = np.tanh(np.einsum("bi,bic->bc", pre, x)) @ weight
    known = np.einsum("boi,bic->boc", res, x) + post[:, :, None] * update[:, None, :]
    # maps that miss a: H_res X and u miss n a |x|; tanh has slope 1, so F(u) misses w n a |x|, times post, at most 2;
    # post misses a of |F| <= w; and the sums of n and of C products round as much again
    total, w = x.shape[-2] * np.max(np.abs(x)), np.max(np.sum(np.abs(weight), axis=0))
    allowed = 2 * (total + w + 2 * w * total) * _allowance(x, parameters, subject.convention)
    gap = np.abs(subject.step(x, parameters, weight) - known)
    return worst(gap, allowed[:, None, None], "next streams from X' = H_res X + H_post F(u)")


def _single_stream(subject: Layer, sample: Sample) -> Observation:
    x, parameters = _inputs(sample, 1)
    _, _, res = subject.maps(x, parameters)
    allowed = 4 * max(subject.convention["eps_start"], subject.convention["eps_den"])
    return worst(np.abs(res - 1), allowed, "|h_res - 1| at n = 1")


def _equal_streams(subject: Layer, sample: Sample) -> Observation:
    x, parameters = _inputs(sample)
    equal = np.broadcast_to(x[:, :1, :], x.shape).copy()
    _, _, res = subject.maps(x, parameters)
    n = x.shape[-2]
    last = "rows" if subject.convention["first"] == "columns" else "columns"
    known, slack = np.ones(x.shape[:2]), np.full(len(x), (n + 1) * _U)
    if max(subject.convention["eps_start"], subject.convention["eps_den"]) > 0:
        # eps in the divisors leaves a deficit that depends on the sums before the last division
        exact = equations(x, parameters, subject.convention)[2]
        known = sums(exact.astype(np.float64), last)
        slack = slack + n * _allowance(x, parameters, subject.convention)
    if last == "rows":
        moved = np.abs(res @ equal - known[:, :, None] * equal)
    else:
        moved = np.abs(np.mean(res @ x, axis=-2) - np.mean(known[:, :, None] * x, axis=-2))[:, None, :]
    size = np.max(np.abs(x), axis=(-2, -1))[:, None, None]
    side = "equal streams stay equal" if last == "rows" else "the mean over streams is kept"
    return worst_of(
        (
            worst(np.abs(sums(res, last) - known), slack[:, None], f"{last} sum"),
            worst(moved, (slack[:, None, None] + 2 * n * _U) * size, f"{side}, distance"),
        )
    )


def _gradient(subject: Layer, sample: Sample) -> Observation:
    x, parameters = _inputs(sample, spread=0.3)
    rng = np.random.default_rng(sample.seed + 1)
    weight = rng.standard_normal((DIM, DIM)) / DIM
    grad = rng.standard_normal(x.shape)
    pulled = subject.vjp(x, parameters, weight, grad)
    values = {"x": x, **parameters}
    direction = {key: rng.standard_normal(value.shape) * (1e-3 + np.abs(value)) for key, value in values.items()}
    step = 2.0**-15

    def moved(sign: float) -> float:
        shifted = {key: value + sign * step * direction[key] for key, value in values.items()}
        return float(np.sum(grad * subject.step(shifted.pop("x"), shifted, weight)))

    numeric = (moved(1) - moved(-1)) / (2 * step)
    analytic = sum(float(np.sum(pulled[key] * direction[key])) for key in values)
    size = sum(float(np.sum(np.abs(pulled[key] * direction[key]))) for key in values)
    output = float(np.sum(np.abs(grad * subject.step(x, parameters, weight))))
    # truncation of the difference is of order step^2, rounding of order u / step
    return Observation(
        abs(numeric - analytic), 1e-6 * (size + 1) + 64 * _U * output / step, 0, "gradient against a difference"
    )


def _damped(subject: Layer) -> str | None:
    return None if subject.convention["start"] == "softmax" and subject.variant else "has no eps to take away"


def _is_paper_transposed(subject: Layer, sample: Sample) -> Observation:
    assert subject.variant is not None
    x, parameters = _inputs(sample)
    n = x.shape[-2]
    without_eps = {"eps_start": 0.0, "eps_den": 0.0, "eps_pre": 0.0}
    clean = subject.variant(**without_eps)
    paper = subject.variant(**without_eps, transposed=False, start="exp")
    order = np.arange(n * n).reshape(n, n).T.ravel()
    turned = dict(parameters)
    turned["phi"] = np.concatenate([parameters["phi"][: 2 * n], parameters["phi"][2 * n :][order]])
    turned["bias"] = np.concatenate([parameters["bias"][: 2 * n], parameters["bias"][2 * n :][order]])
    allowed = 2 * _allowance(x, parameters, clean.convention)
    return _maps_agree(
        clean.maps(x, parameters), paper.maps(x, turned), allowed, "from the paper's on transposed logits"
    )


def _decodes(subject: Layer) -> str | None:
    return None if subject.decode is not None else "no model is built on it"


def decoding_gap(subject: Layer | Trained, sample: Sample) -> Observation:
    """Decoding token by token with caches against one full forward."""
    assert subject.decode is not None
    full, decoded = subject.decode(sample.seed)
    return worst(np.abs(decoded - full), 1e-10, "cached decoding against the full forward")


def _samples(scales: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)):
    return lambda subject: strategies.samples(batch=1, sizes=(1, 2, 3, 4), scales=scales, dtypes=("float64",))


_claim = functools.partial(Claim, family="layer", kind="layer", provenance="sampled", samples=_samples())

CLAIMS: tuple[Claim, ...] = (
    _claim(
        name="maps_follow_the_equations",
        statement="h_pre, h_post and h_res are those of equations 14 to 19 with the convention's order, start and eps, "
        "within the accuracy contract of float64 and the rounding of the logits.",
        reference="arXiv 2512.24880, equations 14 to 19",
        domain="n <= 4, C = 5, residual logits up to std 30, streams of size 1e-2 to 1e2",
        method="against the equations in 80-bit floats",
        check=_follows,
    ),
    _claim(
        name="step_follows_the_equation",
        statement="X' = H_res X + H_post F(H_pre X), the operator acting from the left, output stream first, within "
        "what the maps may miss.",
        reference="arXiv 2512.24880, equation 3",
        domain="as for maps_follow_the_equations",
        method="against einsum over the equations' maps",
        check=_step_follows,
    ),
    _claim(
        name="one_stream_is_a_gated_residual",
        statement="n = 1 gives h_res = 1.0 exactly (with eps: within 4 eps).",
        reference="arXiv 2512.24880",
        domain="C = 5, any logits",
        method="compared bit for bit",
        lemma="rowst_n1",
        check=_single_stream,
    ),
    _claim(
        name="exact_side_of_the_operator",
        statement="The acting operator's last side sums to 1 within (n+1) u (with eps: to what the exact recurrence "
        "sums to, within n times what an entry may miss), so equal streams stay equal, or the mean over streams is "
        "conserved.",
        reference="arXiv 2512.24880; conventions: orientation",
        domain="as for maps_follow_the_equations",
        method="compensated sums; matrix products",
        lemma="rowst_const",
        lemmas=("colst_mean", "rowst_range"),
        check=_equal_streams,
    ),
    _claim(
        name="layer_gradient",
        statement="The gradient of a whole step, in the streams and in every parameter, matches a central difference.",
        reference="derivations: layer_backward",
        domain="n <= 4, C = 5, residual logits up to std 3",
        method="one random direction in all inputs at once, step 2^-15",
        lemma="normalised_adjoint",
        samples=_samples((0.1, 0.3, 1.0, 3.0)),
        check=_gradient,
    ),
    _claim(
        name="v4_without_eps_is_the_paper_transposed",
        statement="With eps = 0 the stored recurrence, applied transposed, equals the paper's on transposed logits "
        "within twice the accuracy contract of float64 and the rounding of the logits.",
        reference="conventions: presets",
        domain="as for maps_follow_the_equations",
        method="both layers run on the same streams",
        lemma="sk_transpose",
        check=_is_paper_transposed,
        applies=_damped,
    ),
    _claim(
        name="decoding_equals_the_full_forward",
        statement="Token-by-token decoding with caches gives the logits of one full forward within 1e-10 in float64.",
        reference="mhc_layers.generate",
        domain="random Transformers of two layers, 1 to 4 streams",
        method="largest difference of the logits",
        check=decoding_gap,
        applies=_decodes,
        effort=0.1,
    ),
)

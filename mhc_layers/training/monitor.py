"""Measures the connections of a live model: per site, over depth, and with a certificate.

During a measured forward pass every site keeps a reference to its coefficients. At its end a few tokens' coefficients
are sent to the host in one transfer that nothing waits for. :meth:`Monitor.flush`, after the step, does the arithmetic
in float64 on the CPU, while a GPU still works on the backward pass.

Definitions. The *gain* of an operator is the absolute value of its (signed) sums: forward over rows, backward over
columns, as in figure 8 of the mHC paper; a gain's least and largest value are both kept, because a small one hides in a
maximum. *Prefix* composites multiply the sites from the first to site l, *suffix* composites from site l to the last.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import birkhoff
from mhc_layers import functional
from mhc_layers.capture import CapturedCoefficients, capture_coefficients
from mhc_layers.models.transformer import Transformer
from mhc_layers.training.config import MonitorConfig

__all__ = [
    "Coefficients",
    "CompositeCertificate",
    "Measurement",
    "Monitor",
    "certify_composite",
    "composites",
    "fetch",
    "measure",
    "stream_statistics",
]

_EIGENVALUE_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """The maps of S sites for T tokens, float64 on the CPU, and how the streams around them relate.

    Attributes
    ----------
    h_pre, h_post : numpy.ndarray
        ``(S, T, n)``.
    h_res : numpy.ndarray
        ``(S, T, n, n)``, acting from the left.
    logits : list of numpy.ndarray or None
        Residual logits ``(T, k)`` of each site, None where a site has none.
    gram : numpy.ndarray or None
        Inner products ``(S + 1, T, n, n)`` of the streams that enter each site, and of those that leave the last one.
    """

    h_pre: np.ndarray
    h_post: np.ndarray
    h_res: np.ndarray
    logits: list[np.ndarray | None] = field(default_factory=list)
    gram: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class CompositeCertificate:
    """Rigorous bounds of the spectral norm of the whole depth's composite, the worst over the tokens looked at.

    Attributes
    ----------
    norm2_lower, norm2_upper : float
        Every token's composite has its norm below ``norm2_upper``; the largest of these norms is at least
        ``norm2_lower``.
    provenance : str
        ``sampled``, because only some tokens are looked at (``exact`` and ``enclosure`` are about one token).
    tokens, sites : int
        Number of composites and of their factors.
    absolute : bool
        True if operators have negative entries (free Hyper-Connections); then the bound is that of the product of
        absolute values, which is never smaller than the norm of the product.
    """

    norm2_lower: float
    norm2_upper: float
    provenance: str
    tokens: int
    sites: int
    absolute: bool


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one measured step said.

    Attributes
    ----------
    step : int
        Number of the measured step, from 1; its forward pass used the parameters from before its update.
    sites : dict of str to numpy.ndarray
        One value per site, see :func:`measure`.
    composite : dict of str to numpy.ndarray
        One value per site of the prefix and suffix composites.
    streams : dict of str to numpy.ndarray
        One value per site and one after the last: effective number of streams, pairwise cosine, relative difference.
    mean_h_res, mean_composite : numpy.ndarray
        ``(S, n, n)`` averages over the tokens, for the heat maps.
    certificate : CompositeCertificate or None
        On steps that certify.
    seconds : float
        Time that the measurement took on the host.
    """

    step: int
    sites: dict[str, np.ndarray]
    composite: dict[str, np.ndarray]
    streams: dict[str, np.ndarray]
    mean_h_res: np.ndarray
    mean_composite: np.ndarray
    certificate: CompositeCertificate | None = None
    seconds: float = 0.0

    def to_log(self) -> dict[str, Any]:
        """Return the values of a ``monitor`` line of the metrics file."""
        merged: dict[str, Any] = {}
        for group, values in (("site", self.sites), ("composite", self.composite), ("streams", self.streams)):
            merged.update({f"{group}/{name}": np.round(value, 9) for name, value in values.items()})
        merged["mean_h_res"] = np.round(self.mean_h_res, 6)
        merged["mean_composite"] = np.round(self.mean_composite, 6)
        return merged


class Monitor:
    """Measures a model every few steps.

    Parameters
    ----------
    model : torch.nn.Module
        The bare model (not its data-parallel wrapper). A pipeline stage is not measured: its process does not see
        the whole depth.
    config : MonitorConfig
        Intervals and number of tokens.

    Attributes
    ----------
    seconds : float
        Host time spent on measuring so far. A GPU works on meanwhile, so a run is not longer by all of it.
    setup_seconds : float
        The same of the first measurement of this process, which loads kernels and asks for memory; not in ``seconds``.
    """

    def __init__(self, model: nn.Module, config: MonitorConfig) -> None:
        self.model = model
        self.config = config
        self.seconds = self.setup_seconds = 0.0
        self._first: int | None = None
        self._pending: tuple[int, _Picked] | None = None
        self._buffer: Tensor | None = None  # pinned memory on a GPU: asking for it anew waits for the device
        self._has_sites = isinstance(model, Transformer) and len(model.sites) > 0
        if self._has_sites and config.certify_every:
            certify_composite(np.eye(2)[None, None])  # what is imported for the first certificate is not a step's time

    def due(self, step: int) -> bool:
        """Say whether this step's forward pass is measured; steps count from 1, and the first one always is."""
        return self._has_sites and self.config.every > 0 and (step == 1 or step % self.config.every == 0)

    @contextmanager
    def watch(self, step: int) -> Iterator[None]:
        """Pick coefficients of the forward pass inside, if this step is due; never waits for the device."""
        if not self.due(step):
            yield
            return
        with capture_coefficients(self.model) as captured:
            yield
        started = time.perf_counter()
        buffer = None if self._pending is not None else self._buffer
        picked = _collect(captured, self.config.tokens, buffer)
        self._pending, self._buffer = (step, picked), picked.values
        self._spend(step, time.perf_counter() - started)

    def flush(self) -> Measurement | None:
        """Measure what :meth:`watch` kept; None if nothing is waiting."""
        if self._pending is None:
            return None
        (step, picked), self._pending = self._pending, None
        if picked.arrived is not None:
            picked.arrived.synchronize()  # the forward pass is not the monitor's time
        started = time.perf_counter()
        coefficients = _to_host(picked)
        certify = self.config.certify_every > 0 and step % self.config.certify_every == 0
        result = measure(coefficients, step=step, certify=certify)
        elapsed = time.perf_counter() - started
        self._spend(step, elapsed)
        return Measurement(**{**result.__dict__, "seconds": elapsed})

    def _spend(self, step: int, seconds: float) -> None:
        if self._first is None:
            self._first = step
        if step == self._first:
            self.setup_seconds += seconds
        else:
            self.seconds += seconds


def fetch(captured: CapturedCoefficients, *, tokens: int) -> Coefficients:
    """Copy some tokens' coefficients of a captured forward pass to the CPU.

    Parameters
    ----------
    captured : CapturedCoefficients
        What :func:`mhc_layers.capture_coefficients` gave, after a forward pass.
    tokens : int
        Tokens to keep, spread evenly over the batch; all of them if there are fewer.

    Returns
    -------
    Coefficients
        In float64, for :func:`measure`.

    Examples
    --------
    >>> import torch
    >>> from mhc_layers import HyperConnection, capture_coefficients
    >>> from mhc_layers.training.monitor import fetch, measure
    >>> site = HyperConnection(dim=8, num_streams=4, sublayer=torch.nn.Identity())
    >>> with capture_coefficients(site) as captured:
    ...     _ = site(torch.randn(5, 4, 8))
    >>> measurement = measure(fetch(captured, tokens=3))
    >>> bool(measurement.sites["row_error"][0] < 1e-6), measurement.certificate.tokens
    (True, 3)
    """
    return _to_host(_collect(captured, tokens))


@dataclass(frozen=True, kw_only=True)
class _Picked:
    """Numbers of some tokens on their way to the host, one tensor after the other."""

    values: Tensor
    shapes: list[torch.Size]
    arrived: torch.cuda.Event | None = None


def _collect(captured: CapturedCoefficients, tokens: int, buffer: Tensor | None = None) -> _Picked:
    """Pick some tokens' maps, streams' inner products and residual logits, and send them off without waiting.

    On a GPU this costs what its launches cost, so tokens are picked as slices and all sites are handled together.
    """
    records, streams = list(captured), captured.streams
    if captured.final_streams is not None:
        streams = [*streams, captured.final_streams]
    num_tokens = records[0].h_pre.shape[:-1].numel()
    count = min(tokens, num_tokens)
    stride = num_tokens // count
    rows = slice(num_tokens - 1 - (count - 1) * stride, None, stride)
    with torch.no_grad(), torch.autocast(records[0].h_pre.device.type, enabled=False):
        picked = [x.flatten(0, -3)[rows] for x in streams]
        parts = [
            torch.stack([record.h_pre.flatten(0, -2)[rows] for record in records]),
            torch.stack([record.h_post.flatten(0, -2)[rows] for record in records]),
            torch.stack([record.h_res.flatten(0, -3)[rows] for record in records]),
            torch.cat([_grams(xs) for xs in _chunks(picked, 8 * picked[0].numel())]),
            *_all_residual_logits(captured.sites, picked),
        ]
        flat = torch.cat([part.flatten().to(torch.float64) for part in parts])
    shapes = [part.shape for part in parts]
    if not flat.is_cuda:
        return _Picked(values=flat, shapes=shapes)
    if buffer is None or buffer.shape != flat.shape:
        buffer = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
    buffer.copy_(flat, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return _Picked(values=buffer, shapes=shapes, arrived=arrived)


def _to_host(picked: _Picked) -> Coefficients:
    """Wait for what :func:`_collect` sent, and for nothing that the device does after it."""
    if picked.arrived is not None:
        picked.arrived.synchronize()
    pieces = picked.values.split([shape.numel() for shape in picked.shapes])
    arrays = [piece.view(shape).numpy() for piece, shape in zip(pieces, picked.shapes, strict=True)]
    h_pre, h_post, h_res, gram, *sites = arrays
    logits = [one if one.size else None for value in sites for one in value]
    return Coefficients(h_pre=h_pre, h_post=h_post, h_res=h_res, gram=gram, logits=logits)


def measure(coefficients: Coefficients, *, step: int = 0, certify: bool = True) -> Measurement:
    """Compute every number of a measurement.

    Parameters
    ----------
    coefficients : Coefficients
        Maps of S sites for T tokens.
    step : int
        Kept in the result.
    certify : bool
        Also certify the composite of all sites.

    Returns
    -------
    Measurement
        Per site: ``pre_min``, ``pre_mean``, ``pre_max``, the same of ``post``; ``row_error``, ``column_error`` (largest
        distance of a sum from 1); ``forward_gain_min``, ``forward_gain_max``, ``backward_gain_min``,
        ``backward_gain_max``; ``lambda2`` (second largest modulus of an eigenvalue, mean over up to 31 tokens);
        ``logit_range`` (largest minus smallest residual logit of a token, the largest over tokens); ``saturation``
        (share of pre and post within 1 % of an end of their range); ``distance_identity``, ``distance_uniform``
        (Frobenius distance to I and to J, mean over tokens). Over depth: ``prefix_*`` and ``suffix_*`` gains.
    """
    h_pre, h_post, h_res = coefficients.h_pre, coefficients.h_post, coefficients.h_res
    n = h_res.shape[-1]
    rows, columns = h_res.sum(-1), h_res.sum(-2)
    some = h_res[:, :: max(1, h_res.shape[1] // _EIGENVALUE_TOKENS)]  # a loop over small matrices, by far the slowest
    eigenvalues = np.sort(np.abs(np.linalg.eigvals(some)), axis=-1)
    gates = np.concatenate([h_pre, h_post / 2.0], axis=-1)
    sites = {
        **_extremes("pre", h_pre),
        **_extremes("post", h_post),
        "row_error": np.abs(rows - 1.0).max((1, 2)),
        "column_error": np.abs(columns - 1.0).max((1, 2)),
        **_gains("", h_res),
        "lambda2": (eigenvalues[..., -2] if n > 1 else np.zeros(some.shape[:2])).mean(1),
        "saturation": ((gates < 0.01) | (gates > 0.99)).mean((1, 2)),
        "distance_identity": np.linalg.norm(h_res - np.eye(n), axis=(-2, -1)).mean(1),
        "distance_uniform": np.linalg.norm(h_res - 1.0 / n, axis=(-2, -1)).mean(1),
    }
    logits = [value for value in coefficients.logits if value is not None]
    if len(logits) == len(h_res):
        sites["logit_range"] = np.array([np.ptp(value, axis=-1).max() for value in logits])
    prefix, suffix = composites(h_res)
    return Measurement(
        step=step,
        sites=sites,
        composite={**_gains("prefix_", prefix), **_gains("suffix_", suffix)},
        streams={} if coefficients.gram is None else stream_statistics(coefficients.gram),
        mean_h_res=h_res.mean(1),
        mean_composite=prefix[-1].mean(0),
        certificate=certify_composite(h_res) if certify else None,
    )


def composites(h_res: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Multiply the operators of S sites ``(S, T, n, n)`` over depth.

    Returns
    -------
    prefix, suffix : numpy.ndarray
        ``prefix[l] = h_res[l] ... h_res[0]`` and ``suffix[l] = h_res[S-1] ... h_res[l]``, both ``(S, T, n, n)``.

    Examples
    --------
    >>> import numpy as np
    >>> from mhc_layers.training.monitor import composites
    >>> h_res = np.stack([np.full((1, 2, 2), 0.5), np.eye(2)[None]])
    >>> prefix, suffix = composites(h_res)
    >>> prefix[1, 0].tolist(), suffix[1, 0].tolist()
    ([[0.5, 0.5], [0.5, 0.5]], [[1.0, 0.0], [0.0, 1.0]])
    """
    prefix, suffix = np.empty_like(h_res), np.empty_like(h_res)
    prefix[0], suffix[-1] = h_res[0], h_res[-1]
    for site in range(1, len(h_res)):
        prefix[site] = h_res[site] @ prefix[site - 1]
        suffix[-1 - site] = suffix[-site] @ h_res[-1 - site]
    return prefix, suffix


def certify_composite(h_res: np.ndarray) -> CompositeCertificate:
    """Bound the spectral norm of the product of all sites' operators, for the worst of the given tokens.

    Parameters
    ----------
    h_res : numpy.ndarray
        ``(S, T, n, n)``, site 0 acting first.

    Returns
    -------
    CompositeCertificate
        From :func:`birkhoff.certify_product`; negative entries are replaced by their absolute values first, which can
        only raise the upper bound (the lower bound is then 0).
    """
    absolute = bool((h_res < 0.0).any())
    stack = np.ascontiguousarray(np.moveaxis(np.abs(h_res), 0, 1))  # (T, S, n, n), the first site acts first
    certificate = birkhoff.certify_product(stack)
    return CompositeCertificate(
        norm2_lower=0.0 if absolute else float(np.max(certificate.norm2_lower)),
        norm2_upper=float(np.max(certificate.norm2_upper)),
        provenance="sampled",
        tokens=h_res.shape[1],
        sites=h_res.shape[0],
        absolute=absolute,
    )


def stream_statistics(gram: np.ndarray) -> dict[str, np.ndarray]:
    """Say how different the streams are.

    Parameters
    ----------
    gram : numpy.ndarray
        Inner products ``(L, T, n, n)`` of n streams at L depths.

    Returns
    -------
    dict
        One value per depth, means over tokens: ``effective_streams`` (exponential of the entropy of the normalised
        squared singular values of the n x C matrix; 1 if all streams are parallel), ``cosine_mean`` and
        ``cosine_min`` (over pairs of streams), ``difference`` (norm of the streams minus their mean, relative to the
        norm of the streams; 0 if all streams are equal).
    """
    n = gram.shape[-1]
    energy = np.clip(np.linalg.eigvalsh(gram), 0.0, None)
    share = energy / np.maximum(energy.sum(-1, keepdims=True), np.finfo(np.float64).tiny)
    entropy = -(share * np.log(np.maximum(share, np.finfo(np.float64).tiny))).sum(-1)
    norms = np.sqrt(np.maximum(np.diagonal(gram, axis1=-2, axis2=-1), np.finfo(np.float64).tiny))
    cosine = gram / (norms[..., :, None] * norms[..., None, :])
    pairs = cosine[..., *np.triu_indices(n, 1)] if n > 1 else np.ones((*cosine.shape[:-2], 1))
    total = np.trace(gram, axis1=-2, axis2=-1)
    common = gram.sum((-2, -1)) / n
    apart = np.sqrt(np.clip(total - common, 0.0, None) / np.maximum(total, np.finfo(np.float64).tiny))
    return {
        "effective_streams": np.exp(entropy).mean(1),
        "cosine_mean": pairs.mean((-1, 1)),
        "cosine_min": pairs.min(-1).mean(1),
        "difference": apart.mean(1),
    }


def _chunks(items: list[Any], size: int, limit: int = 2**26) -> Iterator[list[Any]]:
    """Cut a list into pieces of items whose ``size`` bytes stay within ``limit`` together; at least one a piece."""
    step = max(1, limit // max(size, 1))
    return (items[start : start + step] for start in range(0, len(items), step))


def _grams(xs: list[Tensor]) -> Tensor:
    """Inner products ``(S, T, n, n)`` of streams ``(T, n, C)``: their differences are small, so in float64."""
    wide = torch.stack(xs).to(torch.float64)
    return wide @ wide.mT


def _all_residual_logits(sites: list[Any], xs: list[Tensor]) -> list[Tensor]:
    """Residual logits ``(S, T, k)`` of groups of sites, in depth order, k = 0 where maps are free."""
    pairs = list(zip(sites, xs, strict=False))
    kinds = {(site.connection, site.convention, None if site.phi is None else site.phi.shape) for site in sites}
    if len(kinds) > 1:
        return [_residual_logits([pair]) for pair in pairs]
    return [_residual_logits(group) for group in _chunks(pairs, 4 * xs[0].numel())]


def _residual_logits(pairs: list[tuple[Any, Tensor]]) -> Tensor:
    """Residual logits ``(S, T, k)`` of sites of one kind for their streams ``(T, n, C)``.

    They are the second part of ``HyperConnection.logits``, for all sites in one product.
    """
    site, x = pairs[0]
    first = 2 * site.num_streams
    if site.connection not in ("mhc", "mhc_static"):
        return x.new_empty(len(pairs), len(x), 0)
    bias = torch.stack([one.bias[first:] for one, _ in pairs]).unsqueeze(1)
    if site.phi is None:
        return bias.expand(-1, len(x), -1)
    phi = torch.stack([one.phi[first:] for one, _ in pairs])
    flat = torch.stack([streams for _, streams in pairs]).flatten(-2).to(phi.dtype)
    gates = torch.stack([one.alpha_res for one, _ in pairs])[:, None, None]
    return torch.addcmul(bias, flat @ phi.mT, gates * functional.inverse_rms(flat, site.convention))


def _extremes(name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    """Least, mean and largest value of ``(S, T, n)`` per site."""
    return {
        f"{name}_min": values.min((1, 2)),
        f"{name}_mean": values.mean((1, 2)),
        f"{name}_max": values.max((1, 2)),
    }


def _gains(prefix: str, matrices: np.ndarray) -> dict[str, np.ndarray]:
    """Least and largest absolute row sum (forward) and column sum (backward) per site."""
    forward, backward = np.abs(matrices.sum(-1)), np.abs(matrices.sum(-2))
    return {
        f"{prefix}forward_gain_min": forward.min((1, 2)),
        f"{prefix}forward_gain_max": forward.max((1, 2)),
        f"{prefix}backward_gain_min": backward.min((1, 2)),
        f"{prefix}backward_gain_max": backward.max((1, 2)),
    }

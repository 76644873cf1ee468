"""What the layer benchmark does with one implementation: gates on errors and bits, then times, chains and memory."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.device import Times, free, measure_memory, time_calls
from benchmarks.layer_peers import Parameters, Peer
from mhc_layers import PAPER, HyperConnection
from mhc_layers import reference as oracle
from mhc_layers.kernels.table import explain, restricted_to

__all__ = [
    "CHECKED_TOKENS",
    "OURS",
    "Chain",
    "Inputs",
    "compile_only",
    "errors",
    "floors",
    "gate",
    "measure",
    "measure_again",
    "random_parameters",
    "rows",
]

#: of forward and backward, as called and in a graph
_BUDGET_MS = 250.0
_STRICT = (1.8e-3, 1.8e-3, 1e-4)
#: tokens that are compared with float64
CHECKED_TOKENS = 1024


def floors(n: int) -> dict[str, int]:
    """How many streams E each step must move, each tensor once.

    ``both`` is forward and backward with nothing moved twice; ``backward`` alone has two phases with the sublayer's
    backward between them, and reads the gradient of the next streams in each.
    """
    return {"pre": n + 1, "post": 2 * n + 1, "forward": 3 * n + 2, "backward": 6 * n + 4, "both": 6 * n + 5}


class OurSite:
    """A :class:`mhc_layers.HyperConnection` behind the peers' interface."""

    def __init__(self, parameters: Parameters, num_streams: int, implementation: Any, compiled: bool) -> None:
        dim = parameters.phi.shape[1] // num_streams
        self.site = HyperConnection(
            dim, num_streams, convention=PAPER, implementation=implementation, device=parameters.phi.device
        )
        site = self.site
        with torch.no_grad():
            site.phi.copy_(parameters.phi)
            site.bias.copy_(parameters.bias)
            for alpha, value in zip((site.alpha_pre, site.alpha_post, site.alpha_res), parameters.alpha, strict=True):
                alpha.copy_(value)
        self.leaves = [site.phi, site.alpha_pre, site.alpha_post, site.alpha_res, site.bias]
        self.pre = torch.compile(site.pre, dynamic=False) if compiled else site.pre
        self.post = torch.compile(site.post, dynamic=False) if compiled else site.post

    def library_gradients(self, gradients: list[Tensor]) -> Parameters:
        phi, pre, post, res, bias = gradients
        return Parameters(phi, torch.stack([pre, post, res]), bias)


def _ours(
    name: str,
    implementation: Any,
    note: str,
    *,
    compiled: bool = False,
    strict: bool = True,
    rows: tuple[str, ...] = (),
) -> Peer:
    def make(parameters: Parameters, num_streams: int) -> OurSite:
        return OurSite(parameters, num_streams, implementation, compiled)

    return Peer(name, make, PAPER, note, gate=_STRICT if strict else Peer.gate, rows=rows, builds=strict or compiled)


OURS: tuple[Peer, ...] = (
    _ours("ours, fused", "fused", "CUDA C++ where it applies, Triton elsewhere; boundaries fused in a chain"),
    _ours("ours, fused, all Triton", "fused", "no CUDA C++", rows=("triton", "plain")),
    _ours("ours, plain torch", "functional", "mhc_layers.functional", strict=False),
    _ours("ours, plain torch, compiled", "functional", "the same under torch.compile", compiled=True, strict=False),
)


def rows(peer: Peer) -> contextlib.AbstractContextManager[None]:
    """Restrict the table of leaves to what an implementation may use."""
    return restricted_to(*peer.rows) if peer.rows else contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class Inputs:
    """One set of tensors: streams, sublayer output, and the gradients of u and of the next streams."""

    x: Tensor
    f: Tensor
    gu: Tensor
    gx: Tensor

    @classmethod
    def random(cls, m: int, n: int, c: int, seed: int) -> Inputs:
        generator = torch.Generator(device="cuda").manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=generator)

        return cls(normal(m, n, c).requires_grad_(), normal(m, c).requires_grad_(), normal(m, c), normal(m, n, c))


def random_parameters(n: int, c: int) -> Parameters:
    """Parameters that make every term of the gradients count; phi is not representable in bfloat16."""
    generator = torch.Generator(device="cuda").manual_seed(1000)
    phi = torch.randn(n * (n + 2), n * c, device="cuda", generator=generator) / (n * c) ** 0.5
    bias = 0.5 * torch.randn(n * (n + 2), device="cuda", generator=generator)
    return Parameters(phi, torch.tensor([0.8, 1.1, 0.9], device="cuda"), bias)


def _forward(runner: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
    u, state = runner.pre(inputs.x)
    return u, runner.post(inputs.x, inputs.f, state)


def _gradients(runner: Any, inputs: Inputs, outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, [inputs.x, inputs.f, *runner.leaves], [inputs.gu, inputs.gx])


def _both(runner: Any, inputs: Inputs) -> list[Tensor]:
    outputs = _forward(runner, inputs)
    return [*outputs, *_gradients(runner, inputs, outputs)]


def errors(runner: Any, peer: Peer, parameters: Parameters, inputs: Inputs) -> dict[str, float]:
    """Relative Frobenius errors against float64 autograd of the same convention.

    The implementation runs on all tokens, as it will be timed; those after the first :data:`CHECKED_TOKENS` get zero
    gradients, so that the parameters' gradients are those of the tokens that are compared.
    """
    m = inputs.x.shape[0]
    checked = min(m, CHECKED_TOKENS)
    kept = (torch.arange(m, device=inputs.x.device) < checked).to(inputs.gu.dtype).unsqueeze(-1)
    masked = dataclasses.replace(inputs, gu=inputs.gu * kept, gx=inputs.gx * kept.unsqueeze(-1))
    u, x_next, gx, gf, *rest = _both(runner, masked)
    ours = runner.library_gradients(rest)
    exact = parameters.double()
    x, f = (tensor.detach()[:checked].double().requires_grad_() for tensor in (inputs.x, inputs.f))
    h_pre, h_post, h_res = oracle.coefficients(x, exact.phi, exact.bias, tuple(exact.alpha), peer.convention)
    exact_u, exact_next = oracle.read(x, h_pre), oracle.eq3_next_streams(x, f, h_res, h_post)
    expected = torch.autograd.grad(
        [exact_u, exact_next],
        [x, f, exact.phi, exact.alpha, exact.bias],
        [inputs.gu[:checked].double(), inputs.gx[:checked].double()],
    )
    pairs = {
        "u": (u[:checked], exact_u),
        "x_next": (x_next[:checked], exact_next),
        "gx": (gx[:checked], expected[0]),
        "gf": (gf[:checked], expected[1]),
        "gphi": (ours.phi, expected[2]),
        "galpha": (ours.alpha, expected[3]),
        "gbias": (ours.bias, expected[4]),
    }
    return {
        name: float((got.detach().double() - want.detach()).norm() / want.detach().norm())
        for name, (got, want) in pairs.items()
    }


def repeats_its_bits(runner: Any, inputs: Inputs) -> bool:
    """Whether two runs on the same inputs give the same bits in every output and gradient."""
    return all(torch.equal(one, two) for one, two in zip(_both(runner, inputs), _both(runner, inputs), strict=True))


def gate(peer: Peer, found: dict[str, float]) -> str | None:
    """Return what is too inaccurate to be timed, or None."""
    outputs, streams, phi = peer.gate
    limits = {"u": outputs, "x_next": outputs, "gx": streams, "gf": streams, "gphi": phi}
    failed = [f"{name} {found[name]:.1e} > {limit:.1e}" for name, limit in limits.items() if not found[name] <= limit]
    return "; ".join(failed) or None


class Chain:
    """Sites in depth order with fixed sublayer outputs, so that only the connections run."""

    def __init__(self, make: Callable[[], Any], length: int, inputs: Inputs, fused: bool) -> None:
        self._runners, self._fused = [make() for _ in range(length)], fused
        self._x, self._gx = inputs.x, inputs.gx
        self._f = [torch.randn_like(inputs.f).requires_grad_() for _ in range(length)]
        self._gu = [torch.randn_like(inputs.gu) for _ in range(length)]
        self._leaves = [self._x, *self._f, *(leaf for runner in self._runners for leaf in runner.leaves)]

    def forward(self) -> list[Tensor]:
        """Run the chain; returns what each site read, then the last streams."""
        runners, x = self._runners, self._x
        u, state = runners[0].pre(x)
        reads = [u]
        for runner, following, f in zip(runners, runners[1:], self._f, strict=False):
            if self._fused:
                x, u, state = runner.site.boundary(x, f, state, following.site)
            else:
                x = runner.post(x, f, state)
                u, state = following.pre(x)
            reads.append(u)
        return [*reads, runners[-1].post(x, self._f[-1], state)]

    def backward(self, outputs: list[Tensor]) -> tuple[Tensor, ...]:
        """Gradients of every leaf, from fixed gradients of the outputs."""
        return torch.autograd.grad(outputs, self._leaves, [*self._gu, self._gx])

    def both(self) -> None:
        """Forward, then backward."""
        self.backward(self.forward())


def _has_site(peer: Peer, runner: Any) -> bool:
    return hasattr(runner, "site") and peer.gate == _STRICT


def compile_only(peer: Peer, n: int, c: int, m: int) -> None:
    """Run everything that compiles once, so that the compiled code lands in the caches on disk."""
    if peer.refuse() is not None:
        return
    parameters, inputs = random_parameters(n, c), Inputs.random(m, n, c, seed=0)
    runner = peer.make(parameters, n)
    with torch.no_grad():
        _forward(runner, inputs)
    _both(runner, inputs)
    if _has_site(peer, runner) and not peer.rows:
        Chain(lambda: peer.make(parameters, n), 2, inputs, True).both()
    torch.cuda.synchronize()


def measure(peer: Peer, n: int, c: int, inputs: list[Inputs], chain: int) -> dict[str, Any]:
    """Check one implementation, then time it; a failed check leaves the times out."""
    m = inputs[0].x.shape[0]
    row: dict[str, Any] = {"name": peer.name, "note": peer.note, "convention": peer.convention.name}
    if (reason := peer.refuse()) is not None:
        return row | {"skipped": reason}
    parameters = random_parameters(n, c)
    runner = peer.make(parameters, n)
    if _has_site(peer, runner):
        row["leaves"] = {
            name: getattr(getattr(found, "row", None), "name", None) for name, found in explain(inputs[0].x).items()
        }
    row["errors"] = errors(runner, peer, parameters, inputs[0])
    row["same_bits"] = repeats_its_bits(runner, inputs[0])
    free()
    if (failed := gate(peer, row["errors"])) is not None:
        return row | {"skipped": f"failed the gate: {failed}"}
    row |= _times_of_the_steps(runner, inputs)
    first, stream = inputs[0], m * c * 2
    memory = measure_memory(
        lambda: _forward(runner, first), lambda outputs: _gradients(runner, first, outputs), (n + 1) * stream
    )
    row["memory"] = dataclasses.asdict(memory)
    if chain and _has_site(peer, runner) and not peer.rows:
        row["chain"] = _measure_chains(peer, parameters, n, inputs, chain)
    return row


def _time_both(runner: Any, inputs: list[Inputs], **options: Any) -> Times:
    calls = [lambda each=each: _both(runner, each) for each in inputs]
    return time_calls(calls, budget_ms=_BUDGET_MS, one_thread=True, **options)


def measure_again(row: dict[str, Any], peer: Peer, n: int, c: int, inputs: list[Inputs], length: int) -> None:
    """Read the times as called of a row a second time, later: the smaller counts, both are kept.

    The host of a shared machine has slow moments that last longer than a row.
    """
    parameters = random_parameters(n, c)
    _keep_smaller(row["both"], _time_both(peer.make(parameters, n), inputs, graph=False))
    if "chain" in row:
        for name, fused in (("fused", True), ("separate", False)):
            chain = Chain(lambda: peer.make(parameters, n), length, inputs[0], fused)
            times = time_calls([chain.both], budget_ms=_BUDGET_MS, one_thread=True, graph=False)
            _keep_smaller(row["chain"][name]["both"], times, length)


def _keep_smaller(times: dict[str, Any], later: Times, sites: int = 1) -> None:
    for key, us in (("called_us", later.called), ("one_thread_us", later.one_thread)):
        if us is not None and key in times:
            both = times.setdefault("read", {})[key] = [times[key], us / sites]
            times[key] = min(both)


def _times_of_the_steps(runner: Any, inputs: list[Inputs]) -> dict[str, Any]:
    both = _time_both(runner, inputs)
    with torch.no_grad():
        states = [runner.pre(each.x)[1] for each in inputs]
        pairs = list(zip(inputs, states, strict=True))
        pre = time_calls([lambda each=each: runner.pre(each.x) for each in inputs])
        post = time_calls([lambda each=each, s=s: runner.post(each.x, each.f, s) for each, s in pairs])
        forward = time_calls([lambda each=each: _forward(runner, each) for each in inputs])
    return {"both": both.row(), "pre": pre.row(), "post": post.row(), "forward": forward.row()}


def _measure_chains(peer: Peer, parameters: Parameters, n: int, inputs: list[Inputs], length: int) -> dict[str, Any]:
    """Time chains of half the length and of the length, with fused boundaries and with separate steps.

    Each is given per site of both chains, their two ends included, and per site that the longer one has more than the
    shorter, which leaves the ends out.
    """
    m, _, c = inputs[0].x.shape
    result: dict[str, Any] = {"length": length}
    for name, fused in (("fused", True), ("separate", False)):
        times: dict[str, dict[int, Times]] = {"forward": {}, "both": {}}
        for sites in (length // 2, length):
            chain = Chain(lambda: peer.make(parameters, n), sites, inputs[0], fused)

            def forward_only(chain: Chain = chain) -> None:
                with torch.no_grad():
                    chain.forward()

            times["forward"][sites] = time_calls([forward_only])
            times["both"][sites] = time_calls([chain.both], budget_ms=_BUDGET_MS, one_thread=sites == length)
            if sites == length:
                memory = measure_memory(chain.forward, chain.backward, length * (n + 1) * m * c * 2)
            del chain, forward_only
            free()
        result[name] = {step: _per_site(found, length) for step, found in times.items()}
        result[name] |= {"kept_per_site": memory.kept / length, "peak": memory.peak}
    return result


def _per_site(times: dict[int, Times], length: int) -> dict[str, Any]:
    short, long = times[length // 2], times[length]
    row = {name: us / length if isinstance(us, float) else us for name, us in long.row().items()}
    row["half_us"] = short.best / (length // 2)
    row["site_us"] = (long.best - short.best) / (length - length // 2)
    return row

"""DeepSeek-V4 and V4.1 against the released code's step table, written out as float64 loops that share nothing with us.

The inputs are closed formulas, so that the pinned numbers below depend on no random generator.
"""

import math

import numpy as np
import pytest
import torch

from mhc_layers import DEEPSEEK_V4, DEEPSEEK_V41, PAPER, HyperConnection, expand_streams
from mhc_layers.models.readout import HyperHead

N, D, TOKENS = 4, 6, 2
EPS = 1e-6


def golden_inputs(spread=1.0):
    """Streams, fn, base and scale of one site; ``spread`` scales the residual logits."""
    x = np.array(
        [[[math.sin(1.0 + 3 * t + 1.7 * i + 0.9 * d) for d in range(D)] for i in range(N)] for t in range(TOKENS)]
    )
    rows = (2 + N) * N
    fn = np.array([[0.3 * math.cos(0.7 * m + 0.31 * k * (1 + m % 5)) for k in range(N * D)] for m in range(rows)])
    base = np.array([0.4 * math.sin(2.1 * m + 0.3) for m in range(rows)])
    return x, fn, base, np.array([0.9, 1.1, spread])


def steps_1_to_8(streams, fn, base, scale):
    """pre, post and comb of one token: steps 1 to 8 of the table, entry by entry."""
    flat = [streams[i][d] for i in range(N) for d in range(D)]
    r = 1.0 / math.sqrt(sum(v * v for v in flat) / len(flat) + EPS)
    m = [sum(w * v for w, v in zip(row, flat, strict=True)) * r for row in fn]
    pre = [1 / (1 + math.exp(-(m[i] * scale[0] + base[i]))) + EPS for i in range(N)]
    post = [2 / (1 + math.exp(-(m[N + i] * scale[1] + base[N + i]))) for i in range(N)]
    comb = []
    for j in range(N):
        logits = [m[2 * N + j * N + k] * scale[2] + base[2 * N + j * N + k] for k in range(N)]
        powers = [math.exp(v - max(logits)) for v in logits]
        comb.append([p / sum(powers) + EPS for p in powers])

    def divide_columns():
        for k in range(N):
            total = sum(comb[j][k] for j in range(N)) + EPS
            for j in range(N):
                comb[j][k] /= total

    divide_columns()
    for _ in range(19):
        for j in range(N):
            total = sum(comb[j]) + EPS
            comb[j] = [v / total for v in comb[j]]
        divide_columns()
    return pre, post, comb


def collapse(streams, weights):
    return [sum(weights[i] * streams[i][d] for i in range(N)) for d in range(D)]


def write(streams, y, post, comb):
    """Step 11: k is the destination stream, j the source."""
    return [[post[k] * y[d] + sum(comb[j][k] * streams[j][d] for j in range(N)) for d in range(D)] for k in range(N)]


def sublayer(u):
    return [math.tanh(v) + 0.1 * u[0] for v in u]


def torch_sublayer(u):
    return torch.tanh(u) + 0.1 * u[..., :1]


def make_site(convention, spread=1.0, dtype=torch.float64):
    _, fn, base, scale = golden_inputs(spread)
    site = HyperConnection(D, N, torch_sublayer, convention=convention, dtype=torch.float64)
    with torch.no_grad():
        site.phi.copy_(torch.from_numpy(fn))
        site.bias.copy_(torch.from_numpy(base))
        for gate, value in zip((site.alpha_pre, site.alpha_post, site.alpha_res), scale, strict=True):
            gate.fill_(float(value))
    return site.to(dtype)


@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 3e-6)])
def test_site_follows_the_step_table(spread, dtype, tolerance):
    x, fn, base, scale = golden_inputs(spread)
    site = make_site(DEEPSEEK_V4, spread, dtype)
    streams = torch.from_numpy(x).to(dtype)
    h_pre, h_post, h_res = site.coefficients(streams)
    y = site(streams)
    for t in range(TOKENS):
        pre, post, comb = steps_1_to_8(x[t], fn, base, scale)
        expected = write(x[t], sublayer(collapse(x[t], pre)), post, comb)
        np.testing.assert_allclose(h_pre[t].detach().numpy(), pre, rtol=tolerance)
        np.testing.assert_allclose(h_post[t].detach().numpy(), post, rtol=tolerance)
        np.testing.assert_allclose(h_res[t].detach().numpy(), np.array(comb).T, rtol=0, atol=tolerance)
        np.testing.assert_allclose(y[t].detach().numpy(), expected, rtol=0, atol=4 * tolerance)


def test_pinned_numbers():
    """The same at spread 5, frozen: a change of both the loops and the layer would show here."""
    x, *_ = golden_inputs(5.0)
    site = make_site(DEEPSEEK_V4, 5.0)
    h_pre, h_post, h_res = (h.detach().numpy() for h in site.coefficients(torch.from_numpy(x)))
    np.testing.assert_allclose(h_pre[0], PINNED_PRE, rtol=0, atol=1e-12)
    np.testing.assert_allclose(h_post[0], PINNED_POST, rtol=0, atol=1e-12)
    np.testing.assert_allclose(h_res[0], PINNED_RES, rtol=0, atol=1e-12)
    y = site(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(y[1, :, 0], PINNED_NEXT, rtol=0, atol=1e-12)


PINNED_PRE = [0.890383318258324, 0.841739680523953, 0.338263814355520, 0.060806371248867]
PINNED_POST = [1.328524476994955, 0.066418115631688, 0.386607822053160, 1.470136316098471]
PINNED_RES = [
    [0.474791396770347, 0.006675209890132, 0.000000380517697, 0.518532012821686],
    [0.006170138560731, 0.010178567643372, 0.577091892196887, 0.406558401598982],
    [0.032576061665108, 0.663568258064108, 0.303854201143551, 0.000000479127390],
    [0.486461459535628, 0.319576858259855, 0.119052493362116, 0.074908188842409],
]
PINNED_NEXT = [1.417611195338606, 0.315868207027128, 1.214639158915805, -0.163130962387539]


def test_wrong_conventions_are_told_apart():
    """Each known slip changes the result by far more than the tolerance of the tests above."""
    x, *_ = golden_inputs(5.0)
    streams = torch.from_numpy(x)
    right = make_site(DEEPSEEK_V4, 5.0)(streams)
    slips = {
        "not transposed": DEEPSEEK_V4.replace(transposed=False, first="rows"),
        "no epsilons": DEEPSEEK_V4.replace(eps_start=0.0, eps_den=0.0),
        "ten iterations": DEEPSEEK_V4.replace(num_iters=10),
        "post multiplier 1": DEEPSEEK_V4.replace(post_multiplier=1.0),
        "paper": PAPER,
    }
    for name, convention in slips.items():
        assert float((make_site(convention, 5.0)(streams) - right).abs().max().detach()) > 1e-4, name


def test_without_epsilons_it_is_the_paper_on_transposed_logits():
    clean = DEEPSEEK_V4.replace(eps_pre=0.0, eps_start=0.0, eps_den=0.0, norm_eps=1e-20)
    v4, paper = make_site(clean, 3.0), make_site(PAPER, 3.0)
    with torch.no_grad():
        order = torch.arange((2 + N) * N)
        order[2 * N :] = order[2 * N :].view(N, N).t().flatten()
        paper.phi.copy_(v4.phi[order])
        paper.bias.copy_(v4.bias[order])
    streams = torch.from_numpy(golden_inputs()[0])
    torch.testing.assert_close(paper(streams), v4(streams), rtol=1e-12, atol=1e-13)


def test_bfloat16_write_rounds_once():
    """Steps 9 and 11 with bf16 streams: float32 arithmetic on the stored values, one cast."""
    x, fn, base, scale = golden_inputs()
    site = make_site(DEEPSEEK_V4, dtype=torch.float32)
    streams = torch.from_numpy(x).bfloat16()
    stored = streams.double().numpy()
    u, state = site.pre(streams)
    y = torch.from_numpy(np.linspace(-1, 1, TOKENS * D).reshape(TOKENS, D)).bfloat16()
    out = site.post(streams, y, state)
    assert u.dtype == out.dtype == torch.bfloat16
    for t in range(TOKENS):
        pre, post, comb = steps_1_to_8(stored[t], fn, base, scale)
        exact = write(stored[t], y[t].double().tolist(), post, comb)
        for ours, wanted in ((u[t], collapse(stored[t], pre)), (out[t], exact)):
            wanted = torch.tensor(wanted, dtype=torch.float64)
            assert torch.equal(ours, wanted.bfloat16())


def test_head():
    x, _, _, _ = golden_inputs()
    fn = np.array([[0.2 * math.sin(0.5 * m * k + m) for k in range(N * D)] for m in range(N)])
    base, scale = np.array([0.1, -0.2, 0.3, 0.0]), 1.3
    head = HyperHead(D, N, DEEPSEEK_V4).double()
    with torch.no_grad():
        head.fn.copy_(torch.from_numpy(fn))
        head.base.copy_(torch.from_numpy(base))
        head.scale.fill_(scale)
    out = head(torch.from_numpy(x)).detach().numpy()
    for t in range(TOKENS):
        flat = x[t].ravel()
        r = 1.0 / math.sqrt(float(flat @ flat) / flat.size + EPS)
        weights = [1 / (1 + math.exp(-(float(fn[i] @ flat) * r * scale + base[i]))) + EPS for i in range(N)]
        np.testing.assert_allclose(out[t], collapse(x[t], weights), rtol=1e-13)


def test_single_pass_over_two_sites():
    """V4.1: the first sublayer sees stream 0, the second reads with the first site's pre, the end with the second's."""
    e = np.array([[math.sin(0.4 + t + 0.8 * d) for d in range(D)] for t in range(TOKENS)])
    _, fn, base, scale = golden_inputs(2.0)
    sites = [make_site(DEEPSEEK_V41, 2.0) for _ in range(2)]
    with torch.no_grad():
        sites[1].bias.mul_(-1.0)
    x = expand_streams(torch.from_numpy(e), N)
    u, state = sites[0].pre(x)
    x, u, state = sites[0].boundary(x, torch_sublayer(u), state, sites[1])
    x = sites[1].post(x, torch_sublayer(u), state)
    ours = (state.h_pre[..., None] * x).sum(-2).detach().numpy()
    for t in range(TOKENS):
        streams = [list(e[t]) for _ in range(N)]
        previous = [1.0, 0.0, 0.0, 0.0]
        for sign in (1.0, -1.0):
            pre, post, comb = steps_1_to_8(streams, fn, sign * base, scale)
            streams = write(streams, sublayer(collapse(streams, previous)), post, comb)
            previous = pre
        np.testing.assert_allclose(ours[t], collapse(streams, previous), rtol=1e-12)

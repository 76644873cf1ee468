"""reference.py against the equations written out in NumPy loops, and against the algebra they must satisfy."""

import numpy as np
import pytest
import torch

from mhc_layers import CONVENTIONS, DEEPSEEK_V4, PAPER, reference


def random_site(n=4, channels=8, tokens=3, seed=0, std=1.0):
    generator = torch.Generator().manual_seed(seed)
    rows = (n + 2) * n

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = normal(tokens, n, channels)
    phi = std * normal(rows, n * channels) / (n * channels) ** 0.5
    alphas = tuple(torch.tensor(a, dtype=torch.float64) for a in (0.7, 1.3, 1.0))
    return x, phi, 0.5 * normal(rows), alphas


def paper_by_loops(x, phi, bias, alphas):
    """Equations 14 to 19 for one token, entry by entry."""
    n, channels = x.shape
    flat = [x[i, c] for i in range(n) for c in range(channels)]
    r = np.sqrt(sum(v * v for v in flat)) / np.sqrt(n * channels)
    raw = [sum(phi[m, k] * flat[k] for k in range(n * channels)) for m in range((n + 2) * n)]
    gate = [alphas[0]] * n + [alphas[1]] * n + [alphas[2]] * n * n
    logits = [g * value / r + b for g, value, b in zip(gate, raw, bias, strict=True)]
    pre = [1 / (1 + np.exp(-v)) for v in logits[:n]]
    post = [2 / (1 + np.exp(-v)) for v in logits[n : 2 * n]]
    matrix = [[np.exp(logits[2 * n + o * n + i]) for i in range(n)] for o in range(n)]
    for _ in range(20):
        for i in range(n):
            total = sum(matrix[o][i] for o in range(n))
            for o in range(n):
                matrix[o][i] /= total
        for o in range(n):
            total = sum(matrix[o])
            matrix[o] = [v / total for v in matrix[o]]
    return np.array(pre), np.array(post), np.array(matrix)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_paper_equations_by_loops(n):
    x, phi, bias, alphas = random_site(n=n, channels=5)
    h_pre, h_post, h_res = reference.coefficients(x, phi, bias, alphas)
    for token in range(x.shape[0]):
        pre, post, res = paper_by_loops(x[token].numpy(), phi.numpy(), bias.numpy(), [float(a) for a in alphas])
        np.testing.assert_allclose(h_pre[token], pre, rtol=1e-13)
        np.testing.assert_allclose(h_post[token], post, rtol=1e-13)
        np.testing.assert_allclose(h_res[token], res, rtol=1e-12)


def test_apply_site_by_loops():
    x, phi, bias, alphas = random_site()
    y = reference.apply_site(x, torch.tanh, phi, bias, alphas)
    for token in range(x.shape[0]):
        streams = x[token].numpy()
        pre, post, res = paper_by_loops(streams, phi.numpy(), bias.numpy(), [float(a) for a in alphas])
        f = np.tanh(sum(pre[i] * streams[i] for i in range(4)))
        for o in range(4):
            expected = sum(res[o, i] * streams[i] for i in range(4)) + post[o] * f
            np.testing.assert_allclose(y[token, o], expected, rtol=1e-12)


@pytest.mark.parametrize("std", [0.5, 3.0, 10.0])
def test_deepseek_without_epsilons_is_the_paper_on_transposed_logits(std):
    logits = std * torch.randn(500, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    comb = reference.sinkhorn_damped(logits, 20, "rows", eps_start=0.0, eps_den=0.0)
    paper = reference.eq9_sinkhorn_knopp(logits.mT, 20, "columns")
    torch.testing.assert_close(comb.mT, paper, rtol=0, atol=1e-13)


def test_epsilons_are_not_cosmetic():
    """At logit std 5 the two conventions are different functions; at std 0.5 they nearly agree."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2000, 4, 4, dtype=torch.float64, generator=generator)

    def gap(std):
        stored = std * logits
        v4 = reference.residual_map(stored, DEEPSEEK_V4)
        return float((v4 - reference.residual_map(stored.mT, PAPER)).abs().max())

    assert gap(0.5) < 1e-5
    assert gap(5.0) > 0.1


def test_orientation_with_an_asymmetric_matrix():
    """A logit that favours source 0 and destination 2 must move stream 0 into stream 2, in both storages."""
    logits = torch.full((3, 3), -20.0, dtype=torch.float64)
    for source, destination in ((0, 2), (2, 1), (1, 0)):
        logits[destination, source] = 20.0
    x = torch.eye(3, dtype=torch.float64)
    for stored, convention in ((logits, PAPER), (logits.mT, DEEPSEEK_V4)):
        moved = reference.residual_map(stored, convention) @ x
        torch.testing.assert_close(moved[2], x[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(moved[1], x[2], atol=1e-4, rtol=0)


@pytest.mark.parametrize("convention", CONVENTIONS.values(), ids=CONVENTIONS)
@pytest.mark.parametrize("std", [1.0, 5.0])
def test_rows_of_the_operator_are_exact(convention, std):
    logits = std * torch.randn(300, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    operator = reference.residual_map(logits, convention)
    exact = 1e-14 if convention is PAPER else 3e-6
    assert float((operator.sum(-1) - 1).abs().max()) < exact
    assert float((operator.sum(-2) - 1).abs().max()) < 0.2
    assert float(operator.min()) >= 0.0


def test_maximum_that_is_subtracted_cancels():
    """Subtracting the column maximum is exact; the row maximum is not (SPEC section 3)."""
    logits = 3.0 * torch.randn(500, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def plain(matrix):
        for _ in range(20):
            matrix = matrix / matrix.sum(-2, keepdim=True)
            matrix = matrix / matrix.sum(-1, keepdim=True)
        return matrix

    expected = plain(logits.exp())
    ours = reference.eq9_sinkhorn_knopp(logits)
    by_rows = plain((logits - logits.amax(-1, keepdim=True)).exp())
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-13)
    assert float((by_rows - expected).abs().max()) > 1e-3
    assert torch.isfinite(reference.eq9_sinkhorn_knopp(1e4 * logits.float())).all()


def test_one_stream_is_one():
    logits = torch.tensor([[[3.7]], [[-80.0]]], dtype=torch.float64)
    assert bool((reference.eq9_sinkhorn_knopp(logits) == 1.0).all())


def test_norm_epsilon_places():
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    inside = reference.root_mean_square(x, PAPER.replace(norm_eps=0.5))
    outside = reference.root_mean_square(x, PAPER.replace(norm_eps=0.5, norm_eps_place="outside"))
    torch.testing.assert_close(inside, torch.tensor([[13.0**0.5]], dtype=torch.float64))
    torch.testing.assert_close(outside, torch.tensor([[12.5**0.5 + 0.5]], dtype=torch.float64))


def test_dynamic_hc_by_loops():
    generator = torch.Generator().manual_seed(5)
    n, channels = 3, 6
    x = torch.randn(n, channels, dtype=torch.float64, generator=generator)
    theta = torch.randn(n + 2, channels, dtype=torch.float64, generator=generator)
    bias = torch.randn((n + 2) * n, dtype=torch.float64, generator=generator)
    alphas = tuple(torch.tensor(a, dtype=torch.float64) for a in (0.1, 0.2, 0.3))
    h_pre, h_post, h_res = reference.dynamic_hc_coefficients(x, theta, bias, alphas, norm_eps=1e-6)
    for i in range(n):
        normed = x[i] / (x[i].square().mean() + 1e-6).sqrt()
        torch.testing.assert_close(h_pre[i], 0.1 * torch.tanh(theta[0] @ normed) + bias[i])
        torch.testing.assert_close(h_post[i], 0.2 * torch.tanh(theta[1] @ normed) + bias[n + i])
        for o in range(n):
            expected = 0.3 * torch.tanh(theta[2 + o] @ normed) + bias[2 * n + o * n + i]
            torch.testing.assert_close(h_res[o, i], expected)


def test_compose_acts_in_depth_order():
    first, second = torch.randn(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(reference.compose(torch.stack([first, second])), second @ first)

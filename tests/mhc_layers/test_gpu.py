"""The plain path on a CUDA device: the same numbers as on the CPU, bfloat16 streams, CUDA graphs, generation."""

import pytest
import torch

from mhc_layers import capture_coefficients, generate
from mhc_layers.config import CONNECTION_KINDS
from tests.mhc_layers.test_transformer import CASES, build, randomised, tokens

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("connection", "convention"), [*CASES, ("residual", "paper")])
def test_same_loss_and_gradients_as_on_the_cpu(connection, convention):
    changes = {"connection": connection, "convention": convention, "implementation": "auto"}
    if connection == "mhc":
        changes["implementation"] = "functional"
    host = randomised(build(**changes)).double()
    device = randomised(build(**changes)).cuda()
    text = tokens(4, 24)
    expected, ours = host.loss(text, text)[0], device.loss(text.cuda(), text.cuda())[0]
    torch.testing.assert_close(ours.cpu(), expected, rtol=1e-4, atol=1e-5, check_dtype=False)
    expected.backward()
    ours.backward()
    for (name, one), other in zip(host.named_parameters(), device.parameters(), strict=True):
        if one.grad is not None:
            scale = float(one.grad.abs().max())
            torch.testing.assert_close(
                other.grad.cpu(), one.grad, rtol=1e-2, atol=2e-3 * scale + 1e-7, check_dtype=False, msg=name
            )


@pytest.mark.parametrize("connection", CONNECTION_KINDS)
def test_bfloat16_streams(connection):
    model = build(connection=connection, implementation="functional" if connection == "mhc" else "auto").cuda()
    text = tokens(4, 24).cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16), capture_coefficients(model) as captured:
        loss = model.loss(text, text)[0]
    loss.backward()
    assert captured.final_streams.dtype == torch.bfloat16
    assert {h.dtype for h in captured[0]} == {torch.float32}
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_forward_and_backward_in_a_cuda_graph():
    """No step waits for the device or allocates by data, so a whole training step can be captured and replayed."""
    model = randomised(build(implementation="functional")).cuda()
    text = tokens(4, 24).cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            model.loss(text, text)[0].backward()
    torch.cuda.current_stream().wait_stream(side)
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model.loss(text, text)[0].backward()
    for p in model.parameters():
        p.grad.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("convention", ["paper", "deepseek_v41"])
def test_generation(convention):
    model = randomised(build(convention=convention, implementation="functional")).cuda()
    prompt = tokens(2, 4).cuda()
    text = generate(model, prompt, 8, temperature=0.0)
    with torch.no_grad():
        full = model(text)
        caches = model.make_caches(2)
        steps = torch.cat([model(piece, caches) for piece in text.split(1, dim=1)], dim=1)
    torch.testing.assert_close(steps, full, rtol=1e-3, atol=1e-3)
    assert torch.equal(full[:, 3:-1].argmax(-1), text[:, 4:])

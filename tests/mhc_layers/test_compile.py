"""torch.compile(fullgraph=True) of whole blocks: the same loss and gradients, no graph break. Slow."""

import pytest
import torch

from tests.mhc_layers.test_transformer import build, randomised, tokens

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "changes",
    [{}, {"convention": "deepseek_v41"}, {"connection": "hc"}, {"connection": "identity"}, {"res_map": "Permutations"}],
    ids=lambda c: "-".join(c.values()) or "mhc",
)
def test_compiled_model_equals_eager(changes):
    torch._dynamo.reset()
    model = randomised(build(num_layers=1, **changes))
    text = tokens()
    loss = model.loss(text, text)[0]
    loss.backward()
    expected = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    compiled = torch.compile(lambda text: model.loss(text, text)[0], fullgraph=True)
    again = compiled(text)
    again.backward()
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        if name in expected:
            scale = float(expected[name].abs().max())
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)


def test_one_graph_serves_every_batch_size():
    torch._dynamo.reset()
    model = randomised(build(num_layers=1))
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    for batch in (2, 3, 5):
        expected = model(tokens(batch))
        torch.testing.assert_close(compiled(tokens(batch)), expected, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1

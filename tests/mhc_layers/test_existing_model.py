"""The how-to page on existing models: its code for transformers, as printed; slow, skipped where that is missing."""

import re
from pathlib import Path

import pytest
import torch

from mhc_layers import HyperConnection

pytestmark = pytest.mark.slow
transformers = pytest.importorskip("transformers", reason="it is not among the test requirements")
PAGE = Path(__file__).parents[2] / "docs" / "how_to" / "existing_model.md"


def test_a_wrapped_llama_is_the_llama_it_was():
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    build, wrap = code.split("layers = model.model.layers")
    names: dict = {}
    exec(build, names)
    model, tokens = names["model"].eval(), torch.randint(128, (2, 10))
    with torch.no_grad():
        expected = model(tokens).logits
    text = model.generate(tokens, max_new_tokens=6, do_sample=False)
    exec("layers = model.model.layers" + wrap, names)
    assert sum(isinstance(module, HyperConnection) for module in model.modules()) == 6
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-5)
    assert torch.equal(model.generate(tokens, max_new_tokens=6, do_sample=False), text)
    model(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())

"""Generation: decoding step by step is the full forward pass, for every variant; and sampling does what it says."""

import math

import pytest
import torch

from mhc_layers import Transformer, TransformerConfig, generate
from mhc_layers.config import CONNECTION_KINDS
from mhc_layers.models.generation import sample, stream_tokens
from tests.mhc_layers.test_transformer import CONVENTIONS, build, randomised, tokens

VARIANTS = [
    *({"connection": kind} for kind in CONNECTION_KINDS),
    {"convention": "deepseek_v4"},
    {"convention": "deepseek_v41"},
    {"connection": "hc", "convention": "deepseek_v41"},
    {"connection": "identity", "convention": "deepseek_v4"},
    {"res_map": "Permutations"},
    {"res_map": "Cayley"},
    {"num_streams": 1},
    {"num_streams": 3},
    {"num_experts": 4},
    {"num_kv_heads": 1},
    {"tie_embeddings": False},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda c: "-".join(f"{v}" for v in c.values()))
def test_decoding_equals_the_full_forward(changes):
    """One token at a time, in chunks, and at once: the same logits, in float64 to its rounding."""
    model = randomised(build(**changes)).double()
    text = tokens(2, 12)
    with torch.no_grad():
        full = model(text)
        for cuts in ([1] * 12, [5, 1, 4, 2]):
            caches = model.make_caches(2)
            pieces = torch.cat([model(piece, caches) for piece in text.split(cuts, dim=1)], dim=1)
            torch.testing.assert_close(pieces, full, rtol=1e-11, atol=1e-11)


def test_greedy_generation_is_the_argmax_of_the_full_forward():
    model = randomised(build())
    prompt = tokens(2, 4)
    text = generate(model, prompt, 8, temperature=0.0)
    assert text.shape == (2, 12) and torch.equal(text[:, :4], prompt)
    with torch.no_grad():
        for length in range(4, 12):
            assert torch.equal(model(text[:, :length])[:, -1].argmax(-1), text[:, length])


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_generators_make_it_repeatable(convention):
    model = build(convention=convention)
    runs = [generate(model, tokens(2, 3), 6, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_bfloat16_generation():
    assert generate(build().bfloat16(), tokens(1, 3), 4).shape == (1, 7)


def test_stop_token():
    model = build()
    text = generate(model, tokens(2, 3), 12, generator=torch.Generator().manual_seed(0), stop_token=5)
    for row in text[:, 3:].tolist():
        if 5 in row:
            assert set(row[row.index(5) :]) == {5}
    stopped = generate(model, tokens(1, 3), 20, temperature=0.0, stop_token=int(model(tokens(1, 3))[0, -1].argmax()))
    assert stopped.shape == (1, 4)


def test_streaming_gives_the_same_tokens():
    model = build()
    new = torch.stack(list(stream_tokens(model, tokens(2, 3), 5, temperature=0.0)), dim=1)
    assert torch.equal(new, generate(model, tokens(2, 3), 5, temperature=0.0)[:, 3:])


def test_prompts_that_do_not_fit():
    model = Transformer(TransformerConfig(vocab_size=8, dim=8, num_layers=1, num_heads=2, max_seq_len=8))
    with pytest.raises(ValueError, match="max_seq_len is 8"):
        generate(model, torch.zeros(1, 5, dtype=torch.long), 4)
    for prompt in (torch.zeros(1, 0, dtype=torch.long), torch.zeros(3, dtype=torch.long)):
        with pytest.raises(ValueError, match="at least one token"):
            generate(model, prompt, 2)
    for prompt, got in (([1, 2], "list"), (torch.zeros(1, 2), "float32")):
        with pytest.raises(TypeError, match=f"tensor of integers .* got .*{got}"):
            generate(model, prompt, 2)
    for count in (-1, 2.5):
        with pytest.raises(ValueError, match="max_new_tokens must be an integer >= 0"):
            stream_tokens(model, torch.zeros(1, 2, dtype=torch.long), count)  # before the first token is asked for
    for stop in (-1, 8):
        with pytest.raises(ValueError, match=f"stop_token is {stop}, which no row can produce"):
            generate(model, torch.zeros(1, 2, dtype=torch.long), 2, stop_token=stop)
    with pytest.raises(ValueError, match=r"shape \(B, T\), got \(3,\)"):
        model(torch.zeros(3, dtype=torch.long))
    caches = model.make_caches(1, 3)
    with pytest.raises(ValueError, match="holds 3 tokens"):
        model(torch.zeros(1, 4, dtype=torch.long), caches)


# -- sampling ---------------------------------------------------------------------------------------------------------


def frequencies(logits, draws=4000, **options):
    generator = torch.Generator().manual_seed(0)
    drawn = sample(logits.expand(draws, -1), generator=generator, **options)
    return torch.bincount(drawn, minlength=logits.numel()) / draws


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    for temperature in (0.5, 1.0, 2.0):
        expected = torch.softmax(logits / temperature, 0)
        torch.testing.assert_close(frequencies(logits, temperature=temperature), expected, rtol=0, atol=0.03)


def test_top_k_and_top_p():
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    torch.testing.assert_close(frequencies(logits, top_k=2), torch.tensor([4 / 7, 3 / 7, 0.0, 0.0]), rtol=0, atol=0.03)
    torch.testing.assert_close(frequencies(logits, top_p=0.65), torch.tensor([4 / 7, 3 / 7, 0, 0]), rtol=0, atol=0.03)
    assert frequencies(logits, top_p=1e-6)[0] == 1.0  # never empty
    torch.testing.assert_close(frequencies(logits, top_k=9, top_p=1.0), logits.exp(), rtol=0, atol=0.03)
    assert int(sample(logits[None], temperature=0.0)) == 0


def test_a_temperature_near_zero_is_greedy():
    logits = 50 * torch.randn(64, 61, generator=torch.Generator().manual_seed(0))
    for temperature in (1e-3, 1e-30, 1e-45, 1e-300):
        assert torch.equal(sample(logits, temperature=temperature), logits.argmax(-1))


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1.0}, {"temperature": math.nan}, {"top_k": 0}, {"top_k": 2.5}, {"top_p": 0.0}, {"top_p": 1.1}],
)
def test_wrong_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        sample(torch.zeros(1, 4), **options)

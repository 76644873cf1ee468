"""Text generation with a key-value cache.

The streams need no cache of their own: a token's streams depend on other tokens only through attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from birkhoff._checks import as_count
from mhc_layers.models.transformer import Transformer

__all__ = ["generate", "sample", "stream_tokens"]


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token from each row of logits.

    Parameters
    ----------
    logits : Tensor
        ``(B, V)``.
    temperature : float
        0 takes the most likely token.
    top_k : int, optional
        Keep the k most likely tokens.
    top_p : float, optional
        Keep the smallest set of most likely tokens whose probability reaches ``top_p``; always at least one.
    generator : torch.Generator, optional
        Source of randomness, on the device of the logits.

    Returns
    -------
    Tensor
        ``(B,)`` integers.

    Raises
    ------
    ValueError
        If an option is out of range.

    Examples
    --------
    >>> import torch
    >>> from mhc_layers.models.generation import sample
    >>> sample(torch.tensor([[0.0, 3.0, 1.0]]), temperature=0.0)
    tensor([1])
    """
    if not temperature >= 0.0:
        raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or positive.")
    top_k = None if top_k is None else as_count(top_k, "top_k", least=1)
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p is {top_p}; accepted: 0 < top_p <= 1, or None to keep every token.")
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    logits = logits.float()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, 1e-30)  # nothing overflows
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    probabilities = torch.softmax(logits, dim=-1)
    if top_p is not None:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # probability of the more likely tokens
        ordered = ordered.masked_fill(before >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def stream_tokens(
    model: Transformer,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yield the new tokens ``(B,)`` one by one; see :func:`generate` for the arguments and errors."""
    if not isinstance(prompt, Tensor) or prompt.is_floating_point():
        got = prompt.dtype if isinstance(prompt, Tensor) else type(prompt).__name__
        raise TypeError(
            f"The prompt must be a tensor of integers (B, T), got {got}; prompts of different lengths are continued "
            "one by one."
        )
    if prompt.dim() != 2 or prompt.shape[1] == 0:
        raise ValueError(f"The prompt must be (B, T) with at least one token, got shape {tuple(prompt.shape)}.")
    total = prompt.shape[1] + as_count(max_new_tokens, "max_new_tokens", least=0)
    if total > model.config.max_seq_len:
        raise ValueError(
            f"Prompt and new tokens are {total} and max_seq_len is {model.config.max_seq_len}; "
            "ask for fewer tokens or shorten the prompt."
        )
    draw = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    return _steps(model, prompt, max_new_tokens, draw)


@torch.no_grad()
def _steps(model: Transformer, tokens: Tensor, count: int, draw: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    caches = model.make_caches(tokens.shape[0], tokens.shape[1] + count)
    for _ in range(count):
        new = draw(model(tokens, caches)[:, -1])
        yield new
        tokens = new[:, None]


def generate(
    model: Transformer,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue prompts.

    Parameters
    ----------
    model : Transformer
        The model; it is run as it is (call ``model.eval()`` where that matters).
    prompt : Tensor
        ``(B, T)`` integers with T >= 1.
    max_new_tokens : int
        Tokens to add.
    temperature, top_k, top_p, generator
        See :func:`sample`.
    stop_token : int, optional
        Stop when every row has produced it; rows that have stopped repeat it.

    Returns
    -------
    Tensor
        ``(B, T + new)``, the prompt included.

    Raises
    ------
    ValueError
        For an empty prompt, a sequence longer than ``max_seq_len``, or an option out of range.
    TypeError
        If the prompt is not a tensor of integers.

    Examples
    --------
    >>> import torch
    >>> from mhc_layers import Transformer, TransformerConfig, generate
    >>> model = Transformer(TransformerConfig(vocab_size=256, dim=32, num_layers=1, num_heads=4))
    >>> generate(model, torch.tensor([[72, 105]]), 5, temperature=0.0).shape
    torch.Size([1, 7])
    """
    if stop_token is not None and not 0 <= stop_token < model.config.vocab_size:
        raise ValueError(
            f"stop_token is {stop_token}, which no row can produce; accepted: 0 <= stop_token < vocab_size = "
            f"{model.config.vocab_size}, or None."
        )
    steps = stream_tokens(
        model, prompt, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
    )
    pieces = [prompt]
    stopped = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)
    for new in steps:
        if stop_token is not None:
            new = torch.where(stopped, torch.full_like(new, stop_token), new)
            stopped |= new == stop_token
        pieces.append(new[:, None])
        if stop_token is not None and bool(stopped.all()):
            break
    return torch.cat(pieces, dim=1)

"""Drawing text from a model, one token at a time."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mlp_fast.model.rng import RNG

SAMPLE_SEED = 42
SAMPLE_LENGTH = 200


def draw(logits: Tensor, uniform: float) -> int:
    """The token at which the cumulative softmax of logits (V,) first exceeds a uniform in [0, 1).

    The last token stands in where rounding leaves the sum below the uniform.
    """
    cumulative = 0.0
    probabilities = torch.softmax(logits, dim=-1).tolist()
    for token, probability in enumerate(probabilities):
        cumulative += probability
        if uniform < cumulative:
            return token
    return len(probabilities) - 1


def shaped(logits: Tensor, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
    """Logits (V,) of the distribution to draw from.

    Args:
        temperature: divides them; 0 leaves the likeliest token alone.
        top_k: how many of the likeliest tokens remain, all for None; of equals, those that come first.
    """
    if temperature == 0:
        temperature, top_k = 1.0, 1
    if temperature != 1:
        logits = logits / temperature
    if top_k is not None:
        unlikely = logits.sort(descending=True, stable=True).indices[top_k:]
        logits = logits.index_fill(0, unlikely, -torch.inf)
    return logits


def last_context(prompt: Sequence[int], context_length: int) -> Sequence[int]:
    """The last T tokens of a prompt; ValueError where it has fewer."""
    if len(prompt) < context_length:
        raise ValueError(f"the prompt has {len(prompt)} tokens, the context {context_length}")
    return prompt[-context_length:]


def sample(
    logits_of: Callable[[Sequence[int]], Tensor],
    prompt: Sequence[int],
    count: int,
    rng: RNG,
    context_length: int,
    stop: int | None = None,
) -> list[int]:
    """Continues a prompt.

    Args:
        logits_of: maps a context of T tokens to logits (V,).
        prompt: at least T tokens; the last T are the first context.
        count: how many tokens to draw, one uniform of `rng` each.
        stop: a token that ends the text before that.

    Returns:
        The drawn tokens, without the prompt and without `stop`.
    """
    tokens = list(last_context(prompt, context_length))
    for _ in range(count):
        token = draw(logits_of(tokens[-context_length:]), rng.random())
        if token == stop:
            break
        tokens.append(token)
    return tokens[context_length:]

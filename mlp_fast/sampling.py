"""Drawing text from a model, one token at a time."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mlp_fast.rng import RNG
from mlp_fast.tokens import Vocabulary

PROMPT = "\nrichard"
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


def sample(
    logits_of: Callable[[Sequence[int]], Tensor], prompt: Sequence[int], count: int, rng: RNG, context_length: int
) -> list[int]:
    """Continues a prompt.

    Args:
        logits_of: maps a context of T tokens to logits (V,).
        prompt: at least T tokens; the last T are the first context.
        count: how many tokens to draw, one uniform of `rng` each.

    Returns:
        The drawn tokens, without the prompt.
    """
    if len(prompt) < context_length:
        raise ValueError(f"the prompt has {len(prompt)} tokens, the context {context_length}")
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(draw(logits_of(tokens[-context_length:]), rng.random()))
    return tokens[len(prompt) :]


def default_prompt(vocabulary: Vocabulary, context_length: int, train: Tensor) -> list[int]:
    """What a training run's sample begins with: PROMPT, with more newlines before it where the context is longer.

    A corpus whose vocabulary lacks one of its tokens is continued from its own beginning.
    """
    if not vocabulary.knows(PROMPT):
        return train[:context_length].tolist()
    prompt = vocabulary.encode(PROMPT)
    return vocabulary.encode("\n") * (context_length - len(prompt)) + prompt


def continuation(vocabulary: Vocabulary, prompt: Sequence[int], drawn: Sequence[int]) -> str:
    """The text of drawn tokens as it goes on from the prompt's: words may need a space between the two."""
    return vocabulary.decode([*prompt, *drawn])[len(vocabulary.decode(prompt)) :]

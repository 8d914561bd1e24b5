"""Texts that a saved model draws."""

from collections.abc import Iterator, Sequence

import torch

from mlp_fast.corpus.prompt import continuation, default_prompt, padded
from mlp_fast.errors import UserError
from mlp_fast.model.rng import RNG
from mlp_fast.model.sampling import SAMPLE_LENGTH, SAMPLE_SEED, sample, shaped
from mlp_fast.run.checkpoint import Checkpoint


def texts(
    saved: Checkpoint,
    prompt: str | None = None,
    length: int = SAMPLE_LENGTH,
    seed: int = SAMPLE_SEED,
    samples: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    stop: str | None = None,
) -> Iterator[str]:
    """Texts that a model draws, each with its prompt, one after another from one stream of random numbers.

    Args:
        saved: the model.
        prompt: what they begin with; None for that of a training run's sample. A prompt shorter than the context is
            padded, unseen, as prompt.padded says.
        length: tokens to draw for each.
        seed: of the draws.
        samples: how many texts.
        temperature, top_k: see sampling.shaped.
        stop: a token that ends a text, and is left out of it.

    Raises:
        UserError: the prompt or `stop` is not of the model's vocabulary.
    """
    vocabulary, T = saved.vocabulary, saved.config.context_length
    if prompt is None:
        tokens = default_prompt(vocabulary, T, saved.beginning)
        shown = vocabulary.decode(tokens)
    else:
        tokens = padded(vocabulary.encode(prompt), vocabulary, T, saved.beginning)
        shown = prompt
    end = None if stop is None else _one_token(saved, stop)
    model, rng = saved.model(), RNG(seed)

    def logits_of(context: Sequence[int]) -> torch.Tensor:
        with torch.no_grad():
            return shaped(model(torch.tensor([context]))[0][0], temperature, top_k)

    for _ in range(samples):
        yield shown + continuation(vocabulary, tokens, sample(logits_of, tokens, length, rng, T, end))


def _one_token(saved: Checkpoint, text: str) -> int:
    tokens = saved.vocabulary.encode(text) if saved.vocabulary.knows(text) else []
    if len(tokens) != 1:
        raise UserError(f"--stop {text!r} is not one token of the model's {len(saved.vocabulary)}; give one")
    return tokens[0]

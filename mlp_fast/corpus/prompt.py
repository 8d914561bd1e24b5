"""What a sample goes on from, and the text of what was drawn."""

from collections.abc import Sequence

from mlp_fast.corpus.tokenizer import Vocabulary
from mlp_fast.errors import UserError

PROMPT = "\nrichard"


def default_prompt(vocabulary: Vocabulary, context_length: int, beginning: Sequence[int]) -> list[int]:
    """What a sample begins with without --prompt: PROMPT, padded to T tokens.

    Where the vocabulary lacks one of its tokens, it is the beginning of the corpus.

    Args:
        beginning: the first T tokens of train.
    """
    prompt = vocabulary.encode(PROMPT) if vocabulary.knows(PROMPT) else list(beginning)
    return padded(prompt, vocabulary, context_length, beginning)


def padded(prompt: Sequence[int], vocabulary: Vocabulary, context_length: int, beginning: Sequence[int]) -> list[int]:
    """A prompt of at least T tokens: before a shorter one come newlines, the ends of texts.

    Where the vocabulary has no newline, the corpus' beginning comes before it. UserError where that is not known.
    """
    missing = max(0, context_length - len(prompt))
    before = vocabulary.encode("\n") * missing if vocabulary.knows("\n") else list(beginning[:missing])
    if len(before) < missing:
        raise UserError(
            f"the prompt has {len(prompt)} tokens, the model's context {context_length}, and this older checkpoint "
            f"does not tell how its corpus begins; give at least {context_length}"
        )
    return [*before, *prompt]


def continuation(vocabulary: Vocabulary, prompt: Sequence[int], drawn: Sequence[int]) -> str:
    """The text of drawn tokens as it goes on from the prompt's: words may need a space between the two."""
    return vocabulary.decode([*prompt, *drawn])[len(vocabulary.decode(prompt)) :]

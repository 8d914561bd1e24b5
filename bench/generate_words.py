"""A made-up corpus of words, as large as wanted, to measure word models on.

    python -m bench.generate_words DIR [--tokens 10000000]

Words belong to classes, and the class of a word is drawn given that of the word before, so that there is something to
learn; within a class the words follow Zipf's law. In ten million tokens each of the 17,000 words is frequent enough for
`--min-count 4`, and with the full stop, the newline and <unk> they make a vocabulary of 17,003. Two words in a hundred
are invented on the spot, hardly ever twice: they become <unk>, as the rare words of real text do. Equal arguments give
equal bytes.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlp_fast.cli import run_main
from mlp_fast.model.rng import RNG

VOCABULARY = 17_000
CLASSES = 40
LIKELY = 4  # classes that follow a class nine times in ten
RARE = 0.02
END = 0.08  # the chance that a sentence ends behind a word
HELD_OUT = 4_000  # tokens in val, and in test
STREAMS = 1024  # sentences written side by side, one behind the other in the file
STEPS = 512  # words of a stream before its block is written

_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


def spelled(number: int) -> str:
    """A word for a number: its digits in base 70, the last one first, as syllables."""
    number, digit = divmod(number, len(_SYLLABLES))
    return _SYLLABLES[digit] + (spelled(number) if number else "")


def blocks(seed: int) -> Iterator[str]:
    """STREAMS * STEPS words at a time, in sentences, each sentence a line, without end."""
    rng = RNG(seed)

    def uniform(*shape: int) -> npt.NDArray[np.float64]:
        return (rng.fill_u32(math.prod(shape)) / 2**32).reshape(shape)

    vocabulary = np.array([spelled(rank) for rank in range(VOCABULARY)], dtype=object)
    # Zipf's law within a class; class c fills c .. c + 1, so that one search finds a word of any class.
    cumulative = np.cumsum(1 / (np.arange(VOCABULARY // CLASSES) + 2.7))
    bounds = (np.arange(CLASSES)[:, None] + cumulative / cumulative[-1]).ravel()
    successors = (uniform(CLASSES, LIKELY) * CLASSES).astype(np.int64)
    current: npt.NDArray[np.int64] = np.zeros(STREAMS, np.int64)
    # Invented words have five syllables. No other word is so long, and there are 1.7 billion of them.
    least, most = len(_SYLLABLES) ** 4, len(_SYLLABLES) ** 5
    while True:
        ranks = np.empty((STEPS, STREAMS), np.int64)
        for step, (likely, which, other, word) in enumerate(uniform(STEPS, 4, STREAMS)):
            follows = successors[current, (which * LIKELY).astype(np.int64)]
            current = np.where(likely < 0.9, follows, (other * CLASSES).astype(np.int64))
            ranks[step] = np.searchsorted(bounds, current + word, side="right")
        words = vocabulary[ranks.T.ravel()]
        rare, ends, invented = uniform(3, words.size)
        for i in np.flatnonzero(rare < RARE):
            words[i] = spelled(least + int(invented[i] * (most - least)))
        ends[-1] = 0.0  # a block ends with a sentence
        yield "".join((words + np.where(ends < END, ".\n", " ").astype(object)).tolist())


def texts(tokens: int, seed: int) -> Iterator[str]:
    """Text of at least so many tokens, punctuation and newlines included, in pieces of whole sentences."""
    source = blocks(seed)
    while tokens > 0:
        lines = next(source).splitlines(keepends=True)
        count = np.cumsum([line.count(" ") + 3 for line in lines])  # a line's words, its full stop and its newline
        kept = lines[: int(np.searchsorted(count, tokens)) + 1]
        tokens -= int(count[len(kept) - 1])
        yield "".join(kept)


def generate(folder: Path, tokens: int, seed: int = 1) -> None:
    """Writes train.txt of at least `tokens` tokens, and val.txt and test.txt of HELD_OUT each, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"train": tokens, "val": min(HELD_OUT, tokens), "test": min(HELD_OUT, tokens)}
    for number, (split, size) in enumerate(sizes.items()):
        with (folder / f"{split}.txt").open("w", encoding="ascii") as file:
            file.writelines(texts(size, 3 * seed + number))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.generate_words", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write train.txt, val.txt and test.txt")
    parser.add_argument("--tokens", type=int, default=10_000_000, help="tokens of train (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the random numbers (%(default)s)")
    options = parser.parse_args(argv)
    generate(options.folder, options.tokens, options.seed)
    return 0


if __name__ == "__main__":
    run_main(main)

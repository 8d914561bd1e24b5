"""What a token is: a character, a byte or a word; a vocabulary turns text into tokens and back.

`char`  The distinct characters of train, sorted. A character that train lacks is an error.
`byte`  The 256 bytes. Any file at all is read as it is: no encoding, no line ends, nothing unknown.
`word`  As in Bengio et al. 2003: a word is a run of letters, digits and underscores, with single apostrophes or hyphens
        inside it; every other visible character is a word of its own, and so is the newline, the end of a text. Case
        is kept. Words that occur in train fewer than `min_count` times, and words that train lacks, are <unk>; so is
        "<unk>" where the text has it. Of a script that puts no spaces between words, as Chinese, a whole run of
        characters is one word: `char` suits it better.
"""

import itertools
import re
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mlp_fast.errors import UserError

CHUNK = 1 << 18  # bytes decoded at a time
UNKNOWN = "<unk>"
_CODE_POINTS = sys.maxunicode + 1
_WORD = re.compile(r"\n|<unk>|\w+(?:['’-]\w+)*|[^\w\s]")
# Scripts written without spaces between words: Thai to Khmer, Japanese, Chinese.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_SPACES = b" \n\t\r\v\f"  # as bytes: no character of several bytes holds any of them, and no word does
# Between two words stands a space, but not before these or after those; nor beside a newline.
_CLOSING, _OPENING = frozenset(".,;:!?%)]}…"), frozenset("([{")

Tokens = npt.NDArray[Any]


class Vocabulary(ABC):
    """The tokens a model knows, numbered from 0."""

    @abstractmethod
    def __len__(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """The tokens of a text; UserError where it has some that the vocabulary lacks."""
        return self.encoded(text.encode(errors="surrogateescape")).tolist()

    @abstractmethod
    def encoded(self, piece: bytes) -> Tokens:
        """The tokens of a piece of text, cut between tokens; of dtype `self.dtype`."""

    @abstractmethod
    def knows(self, text: str) -> bool:
        """Whether every token of a text is in the vocabulary."""

    @abstractmethod
    def as_json(self) -> str | list[str] | None:
        """What `from_json` makes the vocabulary of: the characters, the words, or None for bytes."""

    @abstractmethod
    def _joined(self, places: npt.NDArray[np.int64]) -> str: ...

    def decode(self, tokens: Sequence[int] | Tokens | torch.Tensor) -> str:
        """The text of 1-D tokens; ValueError for a token outside 0..V-1."""
        places = np.asarray(tokens, np.int64)
        if places.size and not 0 <= places.min() <= places.max() < len(self):
            raise ValueError(f"tokens must lie in 0..{len(self) - 1}")
        return self._joined(places)

    @property
    def dtype(self) -> npt.DTypeLike:
        """Of a tape: the smallest of uint8, int16 and int32 that holds V - 1."""
        return next(t for t in (np.uint8, np.int16, np.int32) if len(self) - 1 <= np.iinfo(t).max)


def from_json(value: Any) -> Vocabulary:
    """The vocabulary that as_json() has written; ValueError for anything else."""
    if value is None:
        return Bytes()
    if isinstance(value, str):
        if not value or list(value) != sorted(set(value)):
            raise ValueError("the vocabulary is not a string of sorted, distinct characters")
        return Characters(value)
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise ValueError("the vocabulary is neither a string, nor a list of words, nor null")
    if value[:2] != [UNKNOWN, "\n"] or len(set(value)) < len(value):
        raise ValueError(f"the vocabulary's words are not distinct, with {UNKNOWN} and the newline first")
    return Words(tuple(value))


@dataclass(frozen=True)
class Characters(Vocabulary):
    """Characters; a character's token is its place among them.

    Args:
        characters: distinct, sorted by code point.
    """

    characters: str

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text; UserError names the first character the vocabulary lacks."""
        for character in text:
            if character not in self.characters:
                raise UserError(f"the character {named(character)} is not in the vocabulary of {len(self)} characters")
        return super().encode(text)

    def encoded(self, piece: bytes) -> Tokens:
        """The tokens of a piece whose characters are all known."""
        if piece.isascii() and self.dtype == np.uint8:
            return np.frombuffer(piece.translate(self._table[:256].tobytes()), np.uint8)
        return self._table[code_points(piece.decode())]

    def knows(self, text: str) -> bool:
        return set(text) <= set(self.characters)

    def as_json(self) -> str:
        return self.characters

    def _joined(self, places: npt.NDArray[np.int64]) -> str:
        return code_points(self.characters)[places].tobytes().decode("utf-32-le")

    @cached_property
    def _table(self) -> Tokens:
        table = np.zeros(_CODE_POINTS, self.dtype)
        table[code_points(self.characters)] = np.arange(len(self))
        return table


@dataclass(frozen=True)
class Bytes(Vocabulary):
    """The 256 bytes; a byte's token is its value."""

    def __len__(self) -> int:
        return 256

    def encoded(self, piece: bytes) -> Tokens:
        """The bytes themselves."""
        return np.frombuffer(piece, np.uint8)

    def knows(self, text: str) -> bool:
        return True

    def as_json(self) -> None:
        """Nothing: all byte vocabularies are one."""

    def _joined(self, places: npt.NDArray[np.int64]) -> str:
        return places.astype(np.uint8).tobytes().decode(errors="replace")


@dataclass(frozen=True)
class Words(Vocabulary):
    """Words; see the module for what a word is.

    Decoding joins them by spaces, but for a newline, and for punctuation that closes or opens: encoding the result
    gives the same tokens.

    Args:
        words: distinct: <unk>, the newline, then the words of train by falling count (ties by code point).
    """

    words: tuple[str, ...]

    @classmethod
    def of(cls, pieces: Iterable[bytes], min_count: int) -> "Words":
        """The words of a text in UTF-8 pieces. Memory: a dictionary of its distinct words."""
        counts: Counter[str] = Counter()
        for piece in cut_at_spaces(pieces):
            counts.update(_WORD.findall(piece.decode()))
        for special in (UNKNOWN, "\n"):
            counts.pop(special, None)
        kept = sorted((-count, word) for word, count in counts.items() if count >= min_count)
        return cls((UNKNOWN, "\n", *(word for _, word in kept)))

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text; unknown words are <unk>."""
        return [self._tokens.get(word, 0) for word in _WORD.findall(text)]

    def encoded(self, piece: bytes) -> Tokens:
        """The tokens of a piece cut at spaces."""
        return np.array(self.encode(piece.decode()), self.dtype)

    def knows(self, text: str) -> bool:
        return all(word in self._tokens for word in _WORD.findall(text))

    @property
    def unspaced(self) -> bool:
        """Whether most words are of scripts without spaces: then they are no words, but runs of characters."""
        words = [word for word in self.words if word[0].isalnum()]
        return 2 * sum(_UNSPACED.search(word) is not None for word in words) > len(words)

    def as_json(self) -> list[str]:
        return list(self.words)

    def _joined(self, places: npt.NDArray[np.int64]) -> str:
        words = [self.words[place] for place in places]
        spaced = (
            word if before == "\n" or word == "\n" or word in _CLOSING or before in _OPENING else " " + word
            for before, word in itertools.pairwise(["\n", *words])
        )
        return "".join(spaced)

    @cached_property
    def _tokens(self) -> dict[str, int]:
        return {word: token for token, word in enumerate(self.words)}


def code_points(text: str) -> npt.NDArray[np.uint32]:
    """The code points of a text without surrogates."""
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def distinct(pieces: Iterable[bytes]) -> str:
    """The distinct characters of a text in pieces, cut between them; sorted."""
    seen, seen_ascii = np.zeros(_CODE_POINTS, bool), b""
    for piece in pieces:
        if piece.isascii():
            seen_ascii += bytes(set(piece.translate(None, seen_ascii)))  # quick: mostly nothing new is left
        else:
            seen[code_points(piece.decode())] = True
    seen[list(seen_ascii)] = True
    return np.flatnonzero(seen).astype(np.uint32).tobytes().decode("utf-32-le")


def cut_at_spaces(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same UTF-8 text in pieces that each end behind an ASCII space, tab or line end, where there is one.

    The time is linear in the text. Memory: the longest stretch without any of these.
    """
    kept: list[bytes] = []  # joined once, at the next space: each byte is looked at and copied a few times at most
    for piece in pieces:
        end = max(map(piece.rfind, _SPACES)) + 1
        if end:
            yield b"".join([*kept, piece[:end]])
            kept.clear()
        kept.append(piece[end:])
    if rest := b"".join(kept):
        yield rest


def named(character: str) -> str:
    """A character and its code point, for a message."""
    return f"{character!r} (U+{ord(character):04X})"

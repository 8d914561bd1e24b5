"""One text into train, val and test: its lines shuffled, or cut in its order; the text itself is not copied.

Shuffled, as the names corpus is, since a file of items is often sorted; text whose order matters is cut.
"""

import itertools
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlp_fast.corpus import tokenizer
from mlp_fast.corpus.text import Reading, Text, pieces
from mlp_fast.errors import UserError
from mlp_fast.files import shown
from mlp_fast.model.rng import RNG

SPLITS = ("train", "val", "test")
SPLIT_SEED = 42
HELD_OUT_PERCENT = 3  # of the lines or bytes of a one-file corpus, for val and for test each

Content = npt.NDArray[np.uint8]  # the bytes of a text, in memory or mapped from a file

_LINES = 1 << 10  # lines gathered at a time: they and their indices stay in the cache


def lines_ended(path: Path, how: Reading) -> Iterator[bytes]:
    """The pieces of a file to be split; where lines are shuffled, the last, which may land before another, is ended."""
    last: bytes = b""
    for last in pieces(path, how.codec):
        yield last
    if how.split == "shuffled" and not last.endswith(b"\n"):
        yield b"\n"


def split(content: Content, path: Path, how: Reading) -> dict[str, Text]:
    """The splits of the text of one file.

    Lines are shuffled by one xorshift64* draw each, ties by place, and dealt out: 3% to test, 3% to val, at least one
    each, the rest to train. A text cut in its order gives its first 94% of the bytes to train, the last 3% to test. It
    is cut between tokens: a place that falls inside of a character moves to its end, and one inside of a word, for
    words, to the end of the next space, where one follows.

    Memory: where lines are shuffled, 12 bytes a line.

    Args:
        content: where lines are shuffled, each is ended by a newline.
        path: of the file, for messages.

    Raises:
        UserError: a split would be empty.
    """
    if how.split == "contiguous":
        n = len(content)
        ends = [0, *(_between_tokens(content, max(0, n - k * _held_out(n)), how.kind) for k in (2, 1)), n]
        if any(start >= end for start, end in itertools.pairwise(ends)):
            raise UserError(f"{shown(path)} is too short for train, val and test; give a longer text")
        parts = zip(SPLITS, itertools.pairwise(ends), strict=True)
        return {split: Text(path, partial(stretch, content, start, end)) for split, (start, end) in parts}
    lines = sum(int(np.count_nonzero(newlines)) for _, newlines in _newlines(content))
    if lines < len(SPLITS):
        raise UserError(
            f"{shown(path)} has fewer than {len(SPLITS)} lines: too few for train, val and test; "
            "--split contiguous cuts a text that is not a list of lines"
        )
    order = _shuffled(lines, RNG(SPLIT_SEED))  # before the bounds: it takes more memory for a while
    bounds = _line_bounds(content, lines)
    k = _held_out(lines)
    dealt = {"train": order[2 * k :], "val": order[k : 2 * k], "test": order[:k]}
    return {split: Text(path, partial(_gathered, content, bounds, order)) for split, order in dealt.items()}


def stretch(content: Content, start: int, end: int) -> Iterator[bytes]:
    """The bytes start .. end-1 of a text, in pieces that are cut between characters."""
    while start < end:
        stop = min(end, _between_characters(content, start + tokenizer.CHUNK))
        yield content[start:stop].tobytes()
        start = stop


def _held_out(n: int) -> int:
    """How many of n lines or bytes go to val, and to test."""
    return max(1, (n * HELD_OUT_PERCENT + 50) // 100)


def _between_characters(content: Content, place: int) -> int:
    """The first place from this one on that is between two characters of UTF-8; in other bytes any place will do."""
    for _ in range(3):  # a character has at most three bytes after its first
        if place < len(content) and content[place] & 0xC0 == 0x80:
            place += 1
    return place


def _between_tokens(content: Content, place: int, kind: str) -> int:
    """The first place from this one on that is between two tokens of a text, or its end."""
    if kind == "byte":
        return place
    place = _between_characters(content, place)
    if kind == "word" and (space := re.compile(rb"\s").search(content.data, place)):
        return space.end()
    return place


def _shuffled(n: int, rng: RNG) -> npt.NDArray[np.uint32]:
    """A permutation of 0..n-1: the places, sorted by a draw each."""
    draws = rng.fill_u32(n)
    keyed = np.arange(n, dtype="<u8")  # draw in the upper half, place in the lower: sorted in place, without ties
    keyed.view("<u4")[1::2] = draws
    del draws
    keyed.sort()
    return keyed.astype(np.uint32)


def _newlines(content: Content) -> Iterator[tuple[int, npt.NDArray[np.bool_]]]:
    """Which bytes are newlines, in chunks: the place of each, and a mask."""
    for start in range(0, len(content), tokenizer.CHUNK):
        yield start, content[start : start + tokenizer.CHUNK] == ord("\n")


def _line_bounds(content: Content, lines: int) -> npt.NDArray[Any]:
    """bounds[i] : bounds[i + 1] is line i with its newline; shape (lines + 1,), as narrow as the text allows."""
    bounds = np.zeros(lines + 1, np.uint32 if len(content) < 1 << 32 else np.int64)
    line = 1
    for start, newlines in _newlines(content):
        places = np.flatnonzero(newlines)
        bounds[line : line + len(places)] = places + (start + 1)
        line += len(places)
    return bounds


def _gathered(content: Content, bounds: npt.NDArray[Any], order: npt.NDArray[np.uint32]) -> Iterator[bytes]:
    """The lines of a text in the given order, in pieces that are cut between characters."""
    for first in range(0, len(order), _LINES):
        lines = order[first : first + _LINES].astype(np.int64)
        starts, ends = bounds.take(lines).astype(np.int64), bounds.take(lines + 1).astype(np.int64)
        lengths = ends - starts
        stops = np.cumsum(lengths)
        size = int(stops[-1])
        if size > tokenizer.CHUNK:  # long lines: copying each is quicker than an index a byte, and smaller
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
                yield from stretch(content, start, end)
            continue
        # The source of a byte is one after that of the byte before, but for a jump at each line's first byte.
        index = np.repeat(starts - stops + lengths, lengths)
        index += np.arange(size)
        content[starts]  # brings the lines into the cache, many at a time; byte by byte each would be waited for
        yield content.take(index, mode="clip").tobytes()

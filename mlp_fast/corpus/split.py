"""One text into train, val and test: its lines shuffled, or cut in its order; nothing of the text is copied.

Shuffled, as the names corpus is, since a file of items is often sorted; text whose order matters is cut.
"""

import contextlib
import mmap
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlp_fast.corpus import tokenizer
from mlp_fast.corpus.text import Reading, pieces
from mlp_fast.corpus.tokenizer import Utf8
from mlp_fast.errors import UserError
from mlp_fast.files import shown
from mlp_fast.model.rng import RNG

SPLITS = ("train", "val", "test")
SPLIT_SEED = 42
HELD_OUT_PERCENT = 3  # of the lines or bytes of a one-file corpus, for val and for test each

Source = Callable[[], Iterator[Utf8]]  # the pieces of a split's text, cut between tokens, as often as asked for
Text = bytes | bytearray | mmap.mmap

_LINES = 1 << 10  # lines gathered at a time: they and their indices stay in the cache


def whole(text: Text, kind: str) -> Source:
    """A text as the source of a split."""
    return partial(_stretch, text, slice(0, len(text)), kind)


def read_again(path: Path, how: Reading) -> Source:
    """A file as the source of a split: read whenever it is asked for, and never all of it in memory."""
    return lambda: _cut_between_tokens(pieces(path, how.codec), how.kind)


def lines_ended(path: Path, how: Reading) -> Iterator[Utf8]:
    """The pieces of a file to be split; where lines are shuffled, the last, which may land before another, is ended."""
    last: Utf8 = b""
    for last in pieces(path, how.codec):
        yield last
    if how.split == "shuffled" and not last.endswith(b"\n"):
        yield b"\n"


@contextlib.contextmanager
def mapped(pieces: Iterable[Utf8], file: Path) -> Iterator[mmap.mmap]:
    """A text as a file that is mapped into memory; deleted afterwards."""
    with file.open("x+b") as copy:
        copy.writelines(pieces)
        copy.flush()
        text = mmap.mmap(copy.fileno(), 0, access=mmap.ACCESS_READ)
    yield text
    text.close()
    file.unlink()


def split(text: Text, path: Path, how: Reading) -> dict[str, Source]:
    """The splits of the text of one file.

    Lines are shuffled by one xorshift64* draw each, ties by place, and dealt out: 3% to test, 3% to val, at least one
    each, the rest to train. A text cut in its order gives its first 94% of the bytes to train, the last 3% to test. It
    is cut between tokens: a place that falls inside of a character moves to its end, and one inside of a word, for
    words, to the end of the next space, where one follows.

    Memory: where lines are shuffled, 12 bytes a line.

    Args:
        text: where lines are shuffled, each is ended by a newline.
        path: of the file, for messages.

    Raises:
        UserError: a split would be empty.
    """
    if how.split == "contiguous":
        n = len(text)
        held_out = max(1, (n * HELD_OUT_PERCENT + 50) // 100)
        first, second = (_between_tokens(text, max(0, n - k * held_out), how.kind) for k in (2, 1))
        if not 0 < first < second < n:
            raise UserError(f"{shown(path)} is too short for train, val and test; give a longer text")
        parts = (slice(0, first), slice(first, second), slice(second, n))
        return {split: partial(_stretch, text, part, how.kind) for split, part in zip(SPLITS, parts, strict=True)}
    lines = sum(int(np.count_nonzero(newlines)) for _, newlines in _newlines(text))
    if lines < len(SPLITS):
        raise UserError(
            f"{shown(path)} has fewer than {len(SPLITS)} lines: too few for train, val and test; "
            "--split contiguous cuts a text that is not a list of lines"
        )
    order = _shuffled(lines, RNG(SPLIT_SEED))  # before the bounds: it takes more memory for a while
    bounds = _line_bounds(text, lines)
    k = max(1, (lines * HELD_OUT_PERCENT + 50) // 100)
    dealt = {"train": order[2 * k :], "val": order[k : 2 * k], "test": order[:k]}
    return {split: partial(_gathered, text, bounds, dealt[split], how.kind) for split in SPLITS}


def _between_tokens(text: Text, place: int, kind: str) -> int:
    """The first place from this one on that is between two tokens of a text, or its end."""
    if kind == "byte":
        return place
    while place < len(text) and text[place] & 0xC0 == 0x80:  # not the first byte of a character
        place += 1
    if kind == "word" and (space := re.compile(rb"\s").search(text, place)):
        return space.end()
    return place


def _stretch(text: Text, part: slice, kind: str) -> Iterator[Utf8]:
    """A part of a text in pieces cut between tokens."""

    def pieces() -> Iterator[Utf8]:
        start = part.start
        while start < part.stop:
            end = min(part.stop, start + tokenizer.CHUNK)
            end = min(part.stop, _between_tokens(text, end, "byte" if kind == "byte" else "char"))
            yield text[start:end]
            start = end

    return _cut_between_tokens(pieces(), kind)


def _cut_between_tokens(pieces: Iterator[Utf8], kind: str) -> Iterator[Utf8]:
    """Pieces cut between characters, or between bytes for these, as pieces cut between tokens."""
    return tokenizer.cut_at_spaces(pieces) if kind == "word" else pieces


def _shuffled(n: int, rng: RNG) -> npt.NDArray[np.uint32]:
    """A permutation of 0..n-1: the places, sorted by a draw each."""
    draws = rng.fill_u32(n)
    keyed = np.arange(n, dtype="<u8")  # draw in the upper half, place in the lower: sorted in place, without ties
    keyed.view("<u4")[1::2] = draws
    del draws
    keyed.sort()
    return keyed.astype(np.uint32)


def _newlines(text: Text) -> Iterator[tuple[int, npt.NDArray[np.bool_]]]:
    """Which bytes are newlines, in chunks: the place of each, and a mask."""
    for start in range(0, len(text), tokenizer.CHUNK):
        yield start, np.frombuffer(text[start : start + tokenizer.CHUNK], np.uint8) == ord("\n")


def _line_bounds(text: Text, lines: int) -> npt.NDArray[Any]:
    """bounds[i] : bounds[i + 1] is line i with its newline; shape (lines + 1,), as narrow as the text allows."""
    bounds = np.zeros(lines + 1, np.uint32 if len(text) < 1 << 32 else np.int64)
    line = 1
    for start, chunk in _newlines(text):
        places = np.flatnonzero(chunk)
        bounds[line : line + len(places)] = places + (start + 1)
        line += len(places)
    return bounds


def _gathered(text: Text, bounds: npt.NDArray[Any], order: npt.NDArray[np.uint32], kind: str) -> Iterator[Utf8]:
    """The lines of a text in the given order, in pieces cut between tokens."""
    source = np.frombuffer(text, np.uint8)
    for first in range(0, len(order), _LINES):
        lines = order[first : first + _LINES].astype(np.int64)
        starts, ends = bounds.take(lines).astype(np.int64), bounds.take(lines + 1).astype(np.int64)
        lengths = ends - starts
        stops = np.cumsum(lengths)
        size = int(stops[-1])
        if size > tokenizer.CHUNK:  # long lines: copying each is quicker than an index a byte, and smaller
            for i, j in zip(starts.tolist(), ends.tolist(), strict=True):
                yield from _stretch(text, slice(i, j), kind)
            continue
        # The source of a byte is one after that of the byte before, but for a jump at each line's first byte.
        index = np.repeat(starts - stops + lengths, lengths)
        index += np.arange(size)
        source[starts]  # brings the lines into the cache, many at a time; byte by byte they would be waited for in turn
        yield source.take(index, mode="clip").tobytes()

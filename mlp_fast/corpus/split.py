"""One text into train, val and test: its lines shuffled, or cut in its order.

Shuffled, as the names corpus is, since a file of items is often sorted; text whose order matters is cut.
"""

import contextlib
import mmap
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlp_fast.corpus import tokenizer
from mlp_fast.corpus.text import Reading, joined, pieces, read
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


def split_file(path: Path, how: Reading) -> dict[str, Utf8]:
    text = read(path, how.codec)
    try:
        if how.split == "contiguous":
            return split_contiguous(text, how.kind)
        if not text.endswith(b"\n"):
            text += b"\n"  # the last line may land before another
        return split_lines(text)
    except ValueError:
        raise _too_short(path, how) from None


@contextlib.contextmanager
def split_mapped(path: Path, how: Reading, copy: Path) -> Iterator[dict[str, Source]]:
    """The splits of a one-file corpus, out of a copy of its text that is mapped into memory; deleted afterwards.

    Memory: 12 bytes a line where lines are shuffled.
    """
    with copy.open("x+b") as file:
        last: Utf8 = b""
        for last in pieces(path, how.codec):
            file.write(last)
        if how.split == "shuffled" and not last.endswith(b"\n"):
            file.write(b"\n")  # the last line may land before another
        file.flush()
        text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        sources = _mapped_splits(text, how)
    except ValueError:
        raise _too_short(path, how) from None
    yield sources
    text.close()
    copy.unlink()


def _mapped_splits(text: mmap.mmap, how: Reading) -> dict[str, Source]:
    if how.split == "contiguous":
        parts = _stretches(text, how.kind)
        return {split: partial(cut_between_tokens, partial(_stretch, text, parts[split]), how) for split in SPLITS}
    lines = _count_lines(text)
    dealt = _dealt(lines)
    bounds = _line_bounds(text, lines)
    return {split: partial(_gathered, text, bounds, dealt[split]) for split in SPLITS}


def cut_between_tokens(pieces: Source, how: Reading) -> Iterator[Utf8]:
    """Pieces cut between characters, cut between tokens."""
    return tokenizer.cut_at_spaces(pieces()) if how.kind == "word" else pieces()


def split_lines(text: Utf8, seed: int = SPLIT_SEED) -> dict[str, Utf8]:
    """Shuffles the lines of a text and deals them out: 3% to test, 3% to val, at least one each, the rest to train.

    The order is that of one xorshift64* draw a line, ties by place. Shuffled, as the names corpus is, since a file of
    items is often sorted; text whose order matters is for split_contiguous.

    Memory: the text, its splits, and 12 bytes a line.

    Args:
        text: UTF-8, of at least three lines, each ended by a newline (else ValueError).

    Returns:
        split -> its lines, with their newlines.
    """
    if not text.endswith(b"\n"):
        raise ValueError("a text to split must end in a newline")
    lines = _count_lines(text)
    parts = _dealt(lines, seed)  # before the bounds: dealing takes more memory for a while
    bounds = _line_bounds(text, lines)
    return {split: joined(_gathered(text, bounds, parts[split])) for split in SPLITS}


def split_contiguous(text: Utf8, kind: str = "char") -> dict[str, Utf8]:
    """Cuts a text in its order: the first 94% of the bytes to train, 3% to val, the last 3% to test.

    Cut between tokens: a place that falls inside of a character moves to its end, and one inside of a word, for words,
    to the end of the next space, where one follows.

    Memory: the text and its splits.

    Returns:
        split -> its text; ValueError where one would be empty.
    """
    return {split: text[part] for split, part in _stretches(text, kind).items()}


def _dealt(n: int, seed: int = SPLIT_SEED) -> dict[str, npt.NDArray[np.uint32]]:
    """split -> which of n lines it gets, in order; ValueError for too few lines."""
    if n < len(SPLITS):
        raise ValueError(f"a text to split must have {len(SPLITS)} lines or more")
    order = _shuffled(n, RNG(seed))
    held_out = max(1, (n * HELD_OUT_PERCENT + 50) // 100)
    return {"train": order[2 * held_out :], "val": order[held_out : 2 * held_out], "test": order[:held_out]}


def _shuffled(n: int, rng: RNG) -> npt.NDArray[np.uint32]:
    """A permutation of 0..n-1: the places, sorted by a draw each."""
    draws = rng.fill_u32(n)
    keyed = np.arange(n, dtype="<u8")  # draw in the upper half, place in the lower: sorted in place, without ties
    keyed.view("<u4")[1::2] = draws
    del draws
    keyed.sort()
    return keyed.astype(np.uint32)


def _count_lines(text: Text) -> int:
    return sum(int(np.count_nonzero(chunk)) for _, chunk in _newlines(text))


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


def _gathered(text: Text, bounds: npt.NDArray[Any], order: npt.NDArray[np.uint32]) -> Iterator[Utf8]:
    """The lines of a text in the given order, in pieces of whole lines."""
    source = np.frombuffer(text, np.uint8)
    for first in range(0, len(order), _LINES):
        lines = order[first : first + _LINES].astype(np.int64)
        starts, ends = bounds.take(lines).astype(np.int64), bounds.take(lines + 1).astype(np.int64)
        lengths = ends - starts
        stops = np.cumsum(lengths)
        size = int(stops[-1])
        if size > tokenizer.CHUNK:  # long lines: copying each is quicker than an index a byte, and smaller
            yield from (text[i:j] for i, j in zip(starts.tolist(), ends.tolist(), strict=True))
            continue
        # The source of a byte is one after that of the byte before, but for a jump at each line's first byte.
        index = np.repeat(starts - stops + lengths, lengths)
        index += np.arange(size)
        source[starts]  # brings the lines into the cache, many at a time; byte by byte they would be waited for in turn
        yield source.take(index, mode="clip").tobytes()


def _stretches(text: Text, kind: str) -> dict[str, slice]:
    n = len(text)
    held_out = max(1, (n * HELD_OUT_PERCENT + 50) // 100)
    first, second = (_between_tokens(text, max(0, n - k * held_out), kind) for k in (2, 1))
    if not 0 < first < second < n:
        raise ValueError("the text is too short to be split")
    return {"train": slice(0, first), "val": slice(first, second), "test": slice(second, n)}


def _between_tokens(text: Text, place: int, kind: str) -> int:
    """The first place from this one on that is between two tokens of a text, or its end."""
    if kind == "byte":
        return place
    while place < len(text) and text[place] & 0xC0 == 0x80:  # not the first byte of a character
        place += 1
    if kind == "word" and (space := re.compile(rb"\s").search(text, place)):
        return space.end()
    return place


def _stretch(text: mmap.mmap, part: slice) -> Iterator[Utf8]:
    """A part of a text in pieces cut between characters."""
    start = part.start
    while start < part.stop:
        end = min(part.stop, _between_tokens(text, min(part.stop, start + tokenizer.CHUNK), "char"))
        yield text[start:end]
        start = end


def _too_short(path: Path, how: Reading) -> UserError:
    if how.split == "contiguous":
        return UserError(f"{shown(path)} is too short for train, val and test; give a longer text")
    return UserError(
        f"{shown(path)} has fewer than {len(SPLITS)} lines: too few for train, val and test; "
        "--split contiguous cuts a text that is not a list of lines"
    )

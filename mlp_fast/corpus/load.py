"""Corpora: text -> vocabulary -> one tape of tokens a split.

The steps are apart: reading (`read_text`, UTF-8 bytes with every line end a newline), splitting (`split_lines`,
`split_contiguous`), and tokens (tokens.py). Text stays UTF-8 bytes throughout and is decoded a chunk at a time, through
numpy lookup tables: loading needs the file and its tape in memory, and never a Python object a line or a character. Of
more text than STREAMED_ABOVE, the tapes are files that are mapped into memory (token_cache.py).
"""

import codecs
import contextlib
import hashlib
import http.client
import itertools
import json
import mmap
import os
import random
import re
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mlp_fast.config import Config
from mlp_fast.corpus import cache as token_cache
from mlp_fast.corpus import tokenizer as tokens
from mlp_fast.corpus.tokenizer import Bytes, Characters, Utf8, Vocabulary, Words
from mlp_fast.data import synthesize
from mlp_fast.errors import UserError
from mlp_fast.files import file_mode, shown, write_atomically
from mlp_fast.model.rng import RNG

SPLITS = ("train", "val", "test")

NAMES_URL = "https://raw.githubusercontent.com/karpathy/makemore/master/names.txt"
NAMES_BYTES = 228_145
NAMES_SHA256 = "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d"
NAMES_SPLIT_SHA256 = {
    "train": "814eca7d20168ba3a41ff1a6e41bedbfa8e72de37c974a3411f047f0b73b2f74",
    "val": "23195f8c2b2b69343f1e486a595b5e0e9977d373289fe306bb3adc9c171e9efc",
    "test": "5951a7a2df9d9cc5fc9409e814a645eadba5e33e104a9e6e47f3cfe065a0d9d6",
}
NAMES_VARIABLE = "MLP_FAST_NAMES"
FETCH = "python -m mlp_fast.corpus fetch"

SPLIT_SEED = 42
HELD_OUT_PERCENT = 3  # of the lines or bytes of a one-file corpus, for val and for test each

# Bytes of text above which a corpus goes through the cache: more than memory should hold, or, for words, than takes a
# second or two to tokenise.
STREAMED_ABOVE = {"char": 2**28, "byte": 2**28, "word": 2**24}
CACHE_VERSION = 1  # of what token_cache keeps of a text

Source = Callable[[], Iterator[Utf8]]  # the pieces of a split's text, cut between tokens, as often as asked for

_LINES = 1 << 10  # lines gathered at a time: they and their indices stay in the cache


@dataclass(frozen=True)
class Reading:
    """How a text becomes tokens.

    Attributes:
        kind: `char`, `byte` or `word`; see tokens.py.
        min_count: words that train has fewer times become <unk>.
        split: how one file is split: `shuffled`, by split_lines, or `contiguous`, by split_contiguous.
        encoding: of text files, as Python's codecs name it; bytes are read as they are.
        vocabulary: of the model that is to read the text; None makes one of the text.
    """

    kind: str = "char"
    min_count: int = 1
    split: str = "shuffled"
    encoding: str = "utf-8"
    vocabulary: Vocabulary | None = None


@dataclass(frozen=True, eq=False)
class Corpus:
    """Three token tapes over one vocabulary.

    Attributes:
        name: what was loaded, as the user named it.
        vocabulary: the tokens of train; of a single file's characters, those of all of it.
        train, val, test: token tapes; 1-D, uint8, int16 or int32 by the vocabulary's size. Of a text of more than
            STREAMED_ABOVE they are files of the cache, mapped and only to be read: writing to one ends the process.
        fingerprint: SHA-256 of vocabulary and tapes, in hexadecimal: equal for equal corpora, wherever they lie.
        cost: where the process that made the corpus is known (embedded, but for words): split -> -ln P of each token
            given those before it, float64, nats, of the tape's length. None elsewhere.
    """

    name: str
    vocabulary: Vocabulary
    train: torch.Tensor
    val: torch.Tensor
    test: torch.Tensor
    fingerprint: str
    cost: dict[str, npt.NDArray[np.float64]] | None = None

    @property
    def tapes(self) -> dict[str, torch.Tensor]:
        """split -> tape, in the order train, val, test."""
        return {"train": self.train, "val": self.val, "test": self.test}


def load_for(config: Config, vocabulary: Vocabulary | None = None) -> Corpus:
    """The corpus of a run, in the tokens of `vocabulary` where one is given; see load()."""
    return load(config.data, config.tokens, config.min_count, config.split, config.encoding, vocabulary)


def load(
    data: str,
    kind: str = "char",
    min_count: int = 1,
    split: str = "shuffled",
    encoding: str = "utf-8",
    vocabulary: Vocabulary | None = None,
) -> Corpus:
    """Loads a corpus.

    Args:
        data: `embedded`, the synthetic names that come with the package; `names`, the names corpus (the file
            MLP_FAST_NAMES names, or what `python -m mlp_fast.corpus fetch` put into the cache); a folder with
            train.txt, val.txt and test.txt; or one text file, which is split. A file or folder called `embedded` or
            `names` is reached as ./embedded or ./names.
        kind, min_count, split, encoding, vocabulary: how a text becomes tokens; see Reading.

    Raises:
        UserError: where the corpus cannot be had as asked; one line that names the file.
    """
    how = Reading(kind, min_count, split, encoding, vocabulary)
    if data == "embedded":
        return _load_embedded(how)
    if data == "names":
        return _load_names(how)
    if not data:
        raise UserError("the name of the corpus is empty; give embedded, names, a folder or a text file")
    path = Path(data)
    if stat.S_ISDIR(file_mode(path)):
        paths = {split: path / f"{split}.txt" for split in SPLITS}
    else:
        paths = dict.fromkeys(SPLITS, path)
    if sum(map(_size, dict.fromkeys(paths.values()))) > STREAMED_ABOVE[how.kind]:
        return _streamed(data, paths, how)
    if _is_one(paths):
        # No name is bound to the file's whole text, so that it is freed once its splits are made.
        return _assemble(data, _split_file(path, how), paths, how)
    return _assemble(data, {split: _read(paths[split], how) for split in SPLITS}, paths, how)


def _is_one(paths: dict[str, Path]) -> bool:
    """Whether the splits come out of one file."""
    return len(set(paths.values())) == 1


def check_sizes(corpus: Corpus, context_length: int, batch_size: int) -> None:
    """UserError unless every split has a window (T + 1 tokens) and an evaluation batch (B tokens)."""
    for split, tape in corpus.tapes.items():
        n = len(tape)
        if n < context_length + 1:
            raise UserError(
                f"the {split} split of {corpus.name} has {n:,} tokens; "
                f"a context length of {context_length:,} needs at least {context_length + 1:,}"
            )
        if n < batch_size:
            raise UserError(
                f"the {split} split of {corpus.name} has {n:,} tokens, fewer than one batch of {batch_size:,}; "
                f"use --batch-size {n} or less"
            )


# --- reading ----------------------------------------------------------------------------------------------------------


def read_text(path: Path, encoding: str = "utf-8") -> bytes:
    """A text file as valid UTF-8 bytes: a leading byte-order mark dropped, CRLF and lone CR made newlines.

    Raises:
        UserError: missing, unreadable, empty, not a regular file (looked at before it is opened: opening a FIFO would
            wait for a writer), or not of that encoding (with the offset of the first wrong byte in the file).
    """
    content = _read_bytes(path)
    if not _is_utf8(encoding):
        content = b"".join(_converted(path, tokens.slices(content), encoding))
    mark = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
    if mark:
        content = content[mark:]
    if not content:
        raise UserError(f"{shown(path)} is empty")
    try:
        for _ in tokens.decoded(content):
            pass
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error, mark) from None
    if b"\r" in content:
        content = content.replace(b"\r\n", b"\n")  # two statements: the copies in between are freed
        content = content.replace(b"\r", b"\n")
    return content


def _read(path: Path, how: Reading) -> bytes:
    """A file's text; at byte level, its bytes as they are."""
    if how.kind != "byte":
        return read_text(path, how.encoding)
    content = _read_bytes(path)
    if not content:
        raise UserError(f"{shown(path)} is empty")
    return content


def _pieces(path: Path, how: Reading) -> Iterator[Utf8]:
    """What `_read` gives, in pieces cut between tokens: never the whole file in memory."""
    _size(path)
    raw = how.kind == "byte"
    rest, offset, empty = b"", 0, True
    try:
        with path.open("rb") as file:
            blocks: Iterator[Utf8] = iter(partial(file.read, tokens.CHUNK), b"")
            if not raw and not _is_utf8(how.encoding):
                blocks = _converted(path, blocks, how.encoding)
            for block in itertools.chain(blocks, [b""]):
                if not raw and offset == 0 and not rest and block.startswith(codecs.BOM_UTF8):
                    block, offset = block[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
                chunk = rest + block
                end = len(chunk) if raw else _whole(path, chunk, offset, final=len(block) == 0)
                piece, rest = chunk[:end], chunk[end:]
                offset += end
                if piece:
                    empty = False
                    yield piece if raw or b"\r" not in piece else piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    except OSError as error:
        raise UserError(f"cannot read {shown(path)}: {error.strerror}") from None
    if empty:
        raise UserError(f"{shown(path)} is empty")


def _whole(path: Path, chunk: bytes, offset: int, *, final: bool) -> int:
    """How many bytes of a chunk are whole characters and line ends; all of them where it is the last."""
    try:
        end = len(chunk) if chunk.isascii() else codecs.utf_8_decode(chunk, "strict", final)[1]
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error, offset) from None
    return end - 1 if not final and chunk[:end].endswith(b"\r") else end  # its newline may follow


def _is_utf8(encoding: str) -> bool:
    """Whether the name is one of UTF-8's, with or without a byte-order mark."""
    return codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")


def _converted(path: Path, blocks: Iterator[Utf8], encoding: str) -> Iterator[bytes]:
    """The bytes of a file in another encoding, in blocks, made UTF-8; no block is empty."""
    decoder = codecs.getincrementaldecoder(encoding)()
    offset = 0
    for block in itertools.chain(blocks, [b""]):
        try:
            converted = decoder.decode(bytes(block), final=not block).encode()
        except UnicodeDecodeError as error:  # its object: what was left of the block before, and this one
            raise _wrong_byte(path, encoding, error, offset + len(block) - len(error.object)) from None
        except UnicodeError as error:  # a lone surrogate, or no byte-order mark where the encoding wants one
            reason = getattr(error, "reason", error)
            raise UserError(f"{shown(path)} cannot be read by --encoding {encoding}: {reason}") from None
        offset += len(block)
        if converted:
            yield converted


def _not_utf8(path: Path, error: UnicodeDecodeError, offset: int) -> UserError:
    return _wrong_byte(path, "UTF-8", error, offset)


def _wrong_byte(path: Path, encoding: str, error: UnicodeDecodeError, offset: int) -> UserError:
    return UserError(
        f"{shown(path)} is not {encoding}: byte 0x{error.object[error.start]:02x} at offset {offset + error.start}"
        f" ({error.reason}); name its encoding by --encoding"
    )


def _size(path: Path) -> int:
    """The size of a regular file, which `path` must be."""
    mode = file_mode(path)
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a FIFO, socket or device"
        raise UserError(f"{shown(path)} is {kind}, not a text file")
    return path.stat().st_size


def _read_bytes(path: Path) -> bytes:
    _size(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {shown(path)}: {error.strerror}") from None


# --- splitting --------------------------------------------------------------------------------------------------------


def split_lines(text: bytes, seed: int = SPLIT_SEED) -> dict[str, Utf8]:
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
    return {split: _joined(_gathered(text, bounds, parts[split])) for split in SPLITS}


def _dealt(n: int, seed: int = SPLIT_SEED) -> dict[str, npt.NDArray[np.uint32]]:
    """split -> which of n lines it gets, in order; ValueError for too few lines."""
    if n < len(SPLITS):
        raise ValueError(f"a text to split must have {len(SPLITS)} lines or more")
    order = _shuffled(n, RNG(seed))
    held_out = max(1, (n * HELD_OUT_PERCENT + 50) // 100)
    return {"train": order[2 * held_out :], "val": order[held_out : 2 * held_out], "test": order[:held_out]}


def split_contiguous(text: bytes, kind: str = "char") -> dict[str, Utf8]:
    """Cuts a text in its order: the first 94% of the bytes to train, 3% to val, the last 3% to test.

    Cut between tokens: a place that falls inside of a character moves to its end, and one inside of a word, for words,
    to the end of the next space, where one follows.

    Memory: the text and its splits.

    Returns:
        split -> its text; ValueError where one would be empty.
    """
    return {split: text[part] for split, part in _stretches(text, kind).items()}


def _stretches(text: bytes | mmap.mmap, kind: str) -> dict[str, slice]:
    n = len(text)
    held_out = max(1, (n * HELD_OUT_PERCENT + 50) // 100)
    first, second = (_between_tokens(text, max(0, n - k * held_out), kind) for k in (2, 1))
    if not 0 < first < second < n:
        raise ValueError("the text is too short to be split")
    return {"train": slice(0, first), "val": slice(first, second), "test": slice(second, n)}


def _between_tokens(text: bytes | mmap.mmap, place: int, kind: str) -> int:
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
        end = min(part.stop, _between_tokens(text, min(part.stop, start + tokens.CHUNK), "char"))
        yield text[start:end]
        start = end


def _split_file(path: Path, how: Reading) -> dict[str, Utf8]:
    text = _read(path, how)
    try:
        if how.split == "contiguous":
            return split_contiguous(text, how.kind)
        if not text.endswith(b"\n"):
            text += b"\n"  # the last line may land before another
        return split_lines(text)
    except ValueError:
        raise _too_short(path, how) from None


def _too_short(path: Path, how: Reading) -> UserError:
    if how.split == "contiguous":
        return UserError(f"{shown(path)} is too short for train, val and test; give a longer text")
    return UserError(
        f"{shown(path)} has fewer than {len(SPLITS)} lines: too few for train, val and test; "
        "--split contiguous cuts a text that is not a list of lines"
    )


def _count_lines(text: bytes | mmap.mmap) -> int:
    return sum(int(np.count_nonzero(chunk)) for _, chunk in _newlines(text))


def _newlines(text: bytes | mmap.mmap) -> Iterator[tuple[int, npt.NDArray[np.bool_]]]:
    """Which bytes are newlines, in chunks: the place of each, and a mask."""
    for start in range(0, len(text), tokens.CHUNK):
        yield start, np.frombuffer(text[start : start + tokens.CHUNK], np.uint8) == ord("\n")


def _line_bounds(text: bytes | mmap.mmap, lines: int) -> npt.NDArray[Any]:
    """bounds[i] : bounds[i + 1] is line i with its newline; shape (lines + 1,), as narrow as the text allows."""
    bounds = np.zeros(lines + 1, np.uint32 if len(text) < 1 << 32 else np.int64)
    line = 1
    for start, chunk in _newlines(text):
        places = np.flatnonzero(chunk)
        bounds[line : line + len(places)] = places + (start + 1)
        line += len(places)
    return bounds


def _shuffled(n: int, rng: RNG) -> npt.NDArray[np.uint32]:
    """A permutation of 0..n-1: the places, sorted by a draw each."""
    draws = rng.fill_u32(n)
    keyed = np.arange(n, dtype="<u8")  # draw in the upper half, place in the lower: sorted in place, without ties
    keyed.view("<u4")[1::2] = draws
    del draws
    keyed.sort()
    return keyed.astype(np.uint32)


def _joined(pieces: Iterator[Utf8]) -> bytearray:
    result = bytearray()
    for piece in pieces:
        result += piece
    return result


def _gathered(text: bytes | mmap.mmap, bounds: npt.NDArray[Any], order: npt.NDArray[np.uint32]) -> Iterator[Utf8]:
    """The lines of a text in the given order, in pieces of whole lines."""
    source = np.frombuffer(text, np.uint8)
    for first in range(0, len(order), _LINES):
        lines = order[first : first + _LINES].astype(np.int64)
        starts, ends = bounds.take(lines).astype(np.int64), bounds.take(lines + 1).astype(np.int64)
        lengths = ends - starts
        stops = np.cumsum(lengths)
        size = int(stops[-1])
        if size > tokens.CHUNK:  # long lines: copying each is quicker than an index a byte, and smaller
            yield from (text[i:j] for i, j in zip(starts.tolist(), ends.tolist(), strict=True))
            continue
        # The source of a byte is one after that of the byte before, but for a jump at each line's first byte.
        index = np.repeat(starts - stops + lengths, lengths)
        index += np.arange(size)
        source[starts]  # brings the lines into the cache, many at a time; byte by byte they would be waited for in turn
        yield source.take(index, mode="clip").tobytes()


# --- assembling -------------------------------------------------------------------------------------------------------


def _assemble(
    name: str,
    texts: dict[str, Utf8] | dict[str, bytes],
    paths: dict[str, Path],
    how: Reading,
    process: synthesize.CharacterProcess | None = None,
) -> Corpus:
    """Makes the vocabulary and the tapes in memory, emptying `texts` as it goes."""
    # Of text that is ASCII, as the process' is, a byte is a character.
    has_cost = process is not None and how.kind != "word"
    cost = {split: process.cost(texts[split].decode()) for split in SPLITS} if process and has_cost else None
    vocabulary: Vocabulary
    tapes: dict[str, torch.Tensor]
    if how.kind == "char":
        scanned = {split: tokens.distinct(tokens.decoded(texts[split])) for split in SPLITS}
        vocabulary = characters = _characters({split: scanned[split][0] for split in SPLITS}, paths, how)
        tapes = {split: characters.tape(texts.pop(split), scanned[split][1]) for split in SPLITS}
    else:
        vocabulary = _other_vocabulary(lambda: _words(texts["train"]), how)
        tapes = {split: _tape(vocabulary, texts.pop(split)) for split in SPLITS}
    fingerprint = _fingerprint(vocabulary, tapes)
    return Corpus(name, vocabulary, tapes["train"], tapes["val"], tapes["test"], fingerprint, cost)


def _characters(found: dict[str, str], paths: dict[str, Path], how: Reading) -> Characters:
    """The vocabulary of a corpus by characters, of those of each split.

    It is that of train, so that what a model could not have learned is not asked of it. Which of one file's lines go to
    train is the program's own doing: there it is that of the whole file.

    Raises:
        UserError: a split has a character that the vocabulary lacks.
    """
    if _is_one(paths):
        found = {"": "".join(sorted(set().union(*found.values())))}
    known = next(iter(found.values()))
    if how.vocabulary is not None:
        assert isinstance(how.vocabulary, Characters), "the model's tokens are of another kind"
        known = how.vocabulary.characters
    for split, characters in found.items():
        lacking = set(characters) - set(known)
        if lacking:
            raise UserError(_first_place(paths[split or "train"], split, lacking, how))
    return Characters(known)


def _other_vocabulary(train: Source, how: Reading) -> Vocabulary:
    """The vocabulary of a corpus by bytes or words."""
    if how.vocabulary is not None:
        return how.vocabulary
    return Bytes() if how.kind == "byte" else Words.of(train(), how.min_count)


def _words(text: Utf8) -> Iterator[Utf8]:
    return tokens.cut_at_spaces(tokens.slices(text))


def _tape(vocabulary: Vocabulary, text: Utf8) -> torch.Tensor:
    pieces = [np.empty(0, vocabulary.dtype), *map(vocabulary.encoded, _words(text))]
    return torch.from_numpy(np.concatenate(pieces))


def _fingerprint(vocabulary: Vocabulary, tapes: dict[str, torch.Tensor]) -> str:
    value = vocabulary.as_json()
    digest = hashlib.sha256(f"{len(vocabulary)} {value if isinstance(value, str) else json.dumps(value)}".encode())
    for tape in tapes.values():
        digest.update(f" {len(tape)} ".encode())
        digest.update(tape.numpy().data)
    return digest.hexdigest()


def _first_place(path: Path, split: str, lacking: set[str], how: Reading) -> str:
    """The complaint about the first of the characters that the vocabulary lacks, with its line; the file is read again.

    Args:
        split: that the file is, or "" where it is the whole corpus.
    """
    of = f" of the {split} split" if split else ""
    known = "the train split" if how.vocabulary is None else "the vocabulary of the model"
    line = 1
    for piece in _pieces(path, how):
        text = piece.decode()
        place = next((i for i, character in enumerate(text) if character in lacking), None)
        if place is not None:
            line += text.count("\n", 0, place)
            return f"{shown(path)}, line {line}: the character {tokens.named(text[place])}{of} is not in {known}"
        line += text.count("\n")
    raise AssertionError(f"{shown(path)} has changed while it was read")


def _load_embedded(how: Reading) -> Corpus:
    paths = {split: synthesize.EMBEDDED / f"{split}.txt" for split in SPLITS}
    texts = {split: read_text(paths[split]) for split in SPLITS}
    return _assemble("embedded", texts, paths, how, synthesize.embedded_process())


# --- streaming --------------------------------------------------------------------------------------------------------


def _streamed(name: str, paths: dict[str, Path], how: Reading) -> Corpus:
    """The corpus of `_assemble`, its tapes made a piece of text at a time and mapped from the cache."""
    facts = [(str(path.resolve()), (status := path.stat()).st_size, status.st_mtime_ns) for path in paths.values()]
    settings: list[Any] = [CACHE_VERSION, how.kind, how.min_count, how.split, how.encoding]
    if how.vocabulary is not None:
        settings.append(how.vocabulary.as_json())
    key = hashlib.sha256(json.dumps([*settings, facts]).encode()).hexdigest()[:32]

    def build(folder: Path) -> dict[str, Any]:
        if not _is_one(paths):
            sources: dict[str, Source] = {
                split: partial(_cut, partial(_pieces, paths[split], how), how) for split in SPLITS
            }
            return _write(folder, sources, paths, how)
        with _split_mapped(paths["train"], how, folder / "text") as sources:
            return _write(folder, sources, paths, how)

    folder, description = token_cache.entry(key, build)
    vocabulary = tokens.from_json(description["vocabulary"])
    tapes = {split: token_cache.map_tape(folder / split, vocabulary.dtype) for split in SPLITS}
    return Corpus(name, vocabulary, tapes["train"], tapes["val"], tapes["test"], description["fingerprint"])


def _write(folder: Path, sources: dict[str, Source], paths: dict[str, Path], how: Reading) -> dict[str, Any]:
    """Writes the tapes of a corpus into a folder; returns the description of a cache entry."""
    vocabulary: Vocabulary
    if how.kind == "char":
        vocabulary = _characters({split: tokens.distinct(sources[split]())[0] for split in SPLITS}, paths, how)
    else:
        vocabulary = _other_vocabulary(sources["train"], how)
    sizes = {
        split: token_cache.write_tape(folder / split, map(vocabulary.encoded, sources[split]())) for split in SPLITS
    }
    tapes = {split: token_cache.map_tape(folder / split, vocabulary.dtype) for split in SPLITS}
    return {"vocabulary": vocabulary.as_json(), "fingerprint": _fingerprint(vocabulary, tapes), "bytes": sizes}


def _cut(pieces: Source, how: Reading) -> Iterator[Utf8]:
    """Pieces cut between characters, cut between tokens."""
    return tokens.cut_at_spaces(pieces()) if how.kind == "word" else pieces()


@contextlib.contextmanager
def _split_mapped(path: Path, how: Reading, copy: Path) -> Iterator[dict[str, Source]]:
    """The splits of a one-file corpus, out of a copy of its text that is mapped into memory; deleted afterwards.

    Memory: 12 bytes a line where lines are shuffled.
    """
    with copy.open("x+b") as file:
        last: Utf8 = b""
        for last in _pieces(path, how):
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
        return {split: partial(_cut, partial(_stretch, text, parts[split]), how) for split in SPLITS}
    lines = _count_lines(text)
    dealt = _dealt(lines)
    bounds = _line_bounds(text, lines)
    return {split: partial(_gathered, text, bounds, dealt[split]) for split in SPLITS}


# --- the names corpus -------------------------------------------------------------------------------------------------


def _load_names(how: Reading) -> Corpus:
    given = os.environ.get(NAMES_VARIABLE)
    path = Path(given) if given else names_cache()
    if not given and not os.path.exists(path):  # Path.exists() raises where a folder on the way is closed
        raise UserError(f"the names corpus is not here yet; run `{FETCH}`, or set {NAMES_VARIABLE} to a copy of it")
    content = _read_bytes(path)
    try:
        splits = split_names(content)
    except ValueError as error:
        remedy = f"{NAMES_VARIABLE} must name an unchanged copy" if given else f"run `{FETCH}` again"
        raise UserError(f"{shown(path)} is not the names corpus: {error}; {remedy}") from None
    return _assemble("names", splits, dict.fromkeys(SPLITS, path), how)


def names_cache() -> Path:
    """Where `fetch` puts names.txt: in the user's cache, see token_cache.cache_folder."""
    return token_cache.cache_folder() / "names.txt"


def split_names(content: bytes) -> dict[str, bytes]:
    """The reference's splits of names.txt; ValueError where the content or a split is not the known one, by SHA-256."""
    digest = hashlib.sha256(content).hexdigest()
    if digest != NAMES_SHA256:
        size = "" if len(content) == NAMES_BYTES else f"{len(content):,} bytes in place of {NAMES_BYTES:,}, "
        raise ValueError(f"{size}sha256 {digest[:12]}... in place of {NAMES_SHA256[:12]}...")
    lines = content.splitlines(keepends=True)
    order = list(range(len(lines)))
    random.Random(42).shuffle(order)
    parts = {"train": order[2000:], "val": order[1000:2000], "test": order[:1000]}
    splits = {split: b"".join(lines[i] for i in places) for split, places in parts.items()}
    for split, text in splits.items():
        if hashlib.sha256(text).hexdigest() != NAMES_SPLIT_SHA256[split]:
            raise ValueError(f"its {split} split came out wrong")
    return splits


def fetch_names(url: str, timeout: float, path: Path) -> None:
    """Downloads names.txt and writes it to `path` whole or not at all: checked, then written aside and renamed.

    Args:
        url: http or https.
        timeout: seconds, for each wait and for the whole.

    Raises:
        UserError: the download or the file failed; what stood at `path` before stands there still.
    """
    content = _download(url, timeout)
    if len(content) < NAMES_BYTES:
        raise UserError(f"{shown(url)}: cut short after {len(content):,} of {NAMES_BYTES:,} bytes; try again")
    try:
        split_names(content)
    except ValueError as error:
        raise UserError(f"{shown(url)}: not the names corpus: {error}") from None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f"cannot write {shown(path)}: {error.strerror}") from None


def _download(url: str, timeout: float) -> bytes:
    """At most one byte more than names.txt has."""
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{shown(url)}: not an http or https address")
    deadline = time.monotonic() + timeout
    content = b""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            while len(content) <= NAMES_BYTES and (piece := response.read1(NAMES_BYTES + 1 - len(content))):
                content += piece
                if time.monotonic() > deadline:
                    raise TimeoutError
    except urllib.error.HTTPError as error:
        with error:
            raise UserError(f"{shown(url)}: the server answered {error.code} {_one_line(error.reason)}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, TimeoutError):
            raise UserError(f"{shown(url)}: no complete answer within {timeout:g} s") from None
        reason = getattr(cause, "strerror", None) or _one_line(cause) or type(cause).__name__
        raise UserError(f"{shown(url)}: {reason}") from None
    return content


# --- messages --------------------------------------------------------------------------------------------------------


def _one_line(message: object) -> str:
    return " ".join(str(message).split())

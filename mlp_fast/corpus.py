"""Corpora: text -> vocabulary -> one tape of tokens a split.

    python -m mlp_fast.corpus fetch     downloads the names corpus, checked, into the user's cache

The steps are apart: reading (`read_text`, UTF-8 bytes with every line end a newline), splitting (`split_lines`), and
tokens (tokens.py). Text stays UTF-8 bytes throughout and is decoded a chunk at a time, through numpy lookup tables:
loading needs the file and its tape in memory, and never a Python object a line or a character. Of more text than
STREAMED_ABOVE, the tapes are files that are mapped into memory (token_cache.py).
"""

import codecs
import contextlib
import hashlib
import http.client
import json
import mmap
import os
import random
import stat
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mlp_fast import token_cache, tokens
from mlp_fast.command import run_main
from mlp_fast.config import Parser
from mlp_fast.data import synthesize
from mlp_fast.errors import UserError
from mlp_fast.files import file_mode, shown, write_atomically
from mlp_fast.rng import RNG
from mlp_fast.tokens import Bytes, Characters, Utf8, Vocabulary, Words

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
HELD_OUT_PERCENT = 3  # of the lines of a one-file corpus, for val and for test each

# Bytes of text above which a corpus goes through the cache: more than memory should hold, or, for words, than takes a
# second or two to tokenise.
STREAMED_ABOVE = {"char": 2**28, "byte": 2**28, "word": 2**24}
CACHE_VERSION = 1  # of what token_cache keeps of a text

_LINES = 1 << 10  # lines gathered at a time: they and their indices stay in the cache


@dataclass(frozen=True, eq=False)
class Corpus:
    """Three token tapes over one vocabulary.

    Attributes:
        name: what was loaded, as the user named it.
        vocabulary: the tokens of train.
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


def load(data: str, kind: str = "char", min_count: int = 1) -> Corpus:
    """Loads a corpus.

    Args:
        data: `embedded`, the synthetic names that come with the package; `names`, the names corpus (the file
            MLP_FAST_NAMES names, or what `python -m mlp_fast.corpus fetch` put into the cache); a folder with
            train.txt, val.txt and test.txt; or one text file, split by `split_lines`. A file or folder called
            `embedded` or `names` is reached as ./embedded or ./names.
        kind: `char`, `byte` or `word`; see tokens.py.
        min_count: words that train has fewer times become <unk>.

    Raises:
        UserError: where the corpus cannot be had as asked; one line that names the file.
    """
    if data == "embedded":
        return _load_embedded(kind, min_count)
    if data == "names":
        return _load_names(kind, min_count)
    if not data:
        raise UserError("the name of the corpus is empty; give embedded, names, a folder or a text file")
    path = Path(data)
    if stat.S_ISDIR(file_mode(path)):
        paths = {split: path / f"{split}.txt" for split in SPLITS}
    else:
        paths = dict.fromkeys(SPLITS, path)
    if sum(map(_size, dict.fromkeys(paths.values()))) > STREAMED_ABOVE[kind]:
        return _streamed(data, paths, kind, min_count)
    if len(set(paths.values())) == 1:
        # No name is bound to the file's whole text, so that it is freed once its splits are made.
        return _assemble(data, _split_file(path, kind), paths, kind, min_count)
    return _assemble(data, {split: _read(paths[split], kind) for split in SPLITS}, paths, kind, min_count)


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


def read_text(path: Path) -> bytes:
    """A text file as valid UTF-8 bytes: a leading byte-order mark dropped, CRLF and lone CR made newlines.

    Raises:
        UserError: missing, unreadable, empty, not a regular file (looked at before it is opened: opening a FIFO would
            wait for a writer), or not UTF-8 (with the offset of the first wrong byte in the file).
    """
    content = _read_bytes(path)
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


def _read(path: Path, kind: str) -> bytes:
    """A file's text; at byte level, its bytes as they are."""
    if kind != "byte":
        return read_text(path)
    content = _read_bytes(path)
    if not content:
        raise UserError(f"{shown(path)} is empty")
    return content


def _pieces(path: Path, kind: str) -> Iterator[Utf8]:
    """What `_read` gives, in pieces cut between tokens: never the whole file in memory."""
    _size(path)
    raw = kind == "byte"
    rest, offset, empty = b"", 0, True
    try:
        with path.open("rb") as file:
            while True:
                block = file.read(tokens.CHUNK)
                if not raw and offset == 0 and not rest and block.startswith(codecs.BOM_UTF8):
                    block, offset = block[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
                chunk = rest + block
                end = len(chunk) if raw else _whole(path, chunk, offset, final=len(block) == 0)
                piece, rest = chunk[:end], chunk[end:]
                offset += end
                if piece:
                    empty = False
                    yield piece if raw or b"\r" not in piece else piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
                if not block:
                    break
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


def _not_utf8(path: Path, error: UnicodeDecodeError, offset: int) -> UserError:
    return UserError(
        f"{shown(path)} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset + error.start}"
        f" ({error.reason}); convert it to UTF-8"
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
    items is often sorted; text whose order matters is better given as a folder.

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


def _split_file(path: Path, kind: str) -> dict[str, Utf8]:
    text = _read(path, kind)
    if not text.endswith(b"\n"):
        text += b"\n"  # the last line may land before another
    try:
        return split_lines(text)
    except ValueError:
        raise _too_few_lines(path) from None


def _too_few_lines(path: Path) -> UserError:
    return UserError(f"{shown(path)} has fewer than {len(SPLITS)} lines: too few for train, val and test")


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
    kind: str = "char",
    min_count: int = 1,
    process: synthesize.CharacterProcess | None = None,
) -> Corpus:
    """Makes the vocabulary and the tapes in memory, emptying `texts` as it goes."""
    # Of text that is ASCII, as the process' is, a byte is a character.
    cost = {split: process.cost(texts[split].decode()) for split in SPLITS} if process and kind != "word" else None
    vocabulary: Vocabulary
    tapes: dict[str, torch.Tensor]
    if kind == "char":
        scanned = {split: tokens.distinct(tokens.decoded(texts[split])) for split in SPLITS}
        vocabulary = characters = Characters(scanned["train"][0])
        _check_known({split: scanned[split][0] for split in SPLITS}, paths)
        tapes = {split: characters.tape(texts.pop(split), scanned[split][1]) for split in SPLITS}
    else:
        vocabulary = Bytes() if kind == "byte" else Words.of(_words(texts["train"]), min_count)
        tapes = {split: _tape(vocabulary, texts.pop(split)) for split in SPLITS}
    fingerprint = _fingerprint(vocabulary, tapes)
    return Corpus(name, vocabulary, tapes["train"], tapes["val"], tapes["test"], fingerprint, cost)


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


def _check_known(characters: dict[str, str], paths: dict[str, Path]) -> None:
    """UserError where val or test has characters that train lacks."""
    for split in ("val", "test"):
        lacking = set(characters[split]) - set(characters["train"])
        if lacking:
            raise UserError(_first_place(paths[split], split, lacking))


def _first_place(path: Path, split: str, lacking: set[str]) -> str:
    """The complaint about the first of the characters that train lacks, with its line.

    The file is read again: in the one-file form a split's lines are shuffled, but a character that train lacks can
    only stand in the file on lines of other splits, so its first place in the file is the one to name.
    """
    line = 1
    for piece in _pieces(path, "char"):
        text = piece.decode()
        place = next((i for i, character in enumerate(text) if character in lacking), None)
        if place is not None:
            line += text.count("\n", 0, place)
            return (
                f"{shown(path)}, line {line}: the character {tokens.named(text[place])} of the {split} split"
                " is not in the train split"
            )
        line += text.count("\n")
    raise AssertionError(f"{shown(path)} has changed while it was read")


def _load_embedded(kind: str, min_count: int) -> Corpus:
    paths = {split: synthesize.EMBEDDED / f"{split}.txt" for split in SPLITS}
    texts = {split: read_text(paths[split]) for split in SPLITS}
    return _assemble("embedded", texts, paths, kind, min_count, synthesize.embedded_process())


# --- streaming --------------------------------------------------------------------------------------------------------

Source = Callable[[], Iterator[Utf8]]  # the pieces of a split's text, cut between tokens, as often as asked for


def _streamed(name: str, paths: dict[str, Path], kind: str, min_count: int) -> Corpus:
    """The corpus of `_assemble`, its tapes made a piece of text at a time and mapped from the cache."""
    facts = [(str(path.resolve()), (status := path.stat()).st_size, status.st_mtime_ns) for path in paths.values()]
    key = hashlib.sha256(json.dumps([CACHE_VERSION, kind, min_count, facts]).encode()).hexdigest()[:32]

    def build(folder: Path) -> dict[str, Any]:
        if len(set(paths.values())) > 1:
            return _write(
                folder, {split: partial(_cut, paths[split], kind) for split in SPLITS}, paths, kind, min_count
            )
        with _split_mapped(paths["train"], kind, folder / "text") as sources:
            return _write(folder, sources, paths, kind, min_count)

    folder, description = token_cache.entry(key, build)
    vocabulary = tokens.from_json(description["vocabulary"])
    tapes = {split: token_cache.map_tape(folder / split, vocabulary.dtype) for split in SPLITS}
    return Corpus(name, vocabulary, tapes["train"], tapes["val"], tapes["test"], description["fingerprint"])


def _write(
    folder: Path, sources: dict[str, Source], paths: dict[str, Path], kind: str, min_count: int
) -> dict[str, Any]:
    """Writes the tapes of a corpus into a folder; returns the description of a cache entry."""
    vocabulary: Vocabulary
    if kind == "char":
        characters = {split: tokens.distinct(sources[split]())[0] for split in SPLITS}
        _check_known(characters, paths)
        vocabulary = Characters(characters["train"])
    else:
        vocabulary = Bytes() if kind == "byte" else Words.of(sources["train"](), min_count)
    sizes = {
        split: token_cache.write_tape(folder / split, map(vocabulary.encoded, sources[split]())) for split in SPLITS
    }
    tapes = {split: token_cache.map_tape(folder / split, vocabulary.dtype) for split in SPLITS}
    return {"vocabulary": vocabulary.as_json(), "fingerprint": _fingerprint(vocabulary, tapes), "bytes": sizes}


def _cut(path: Path, kind: str) -> Iterator[Utf8]:
    pieces = _pieces(path, kind)
    return tokens.cut_at_spaces(pieces) if kind == "word" else pieces


@contextlib.contextmanager
def _split_mapped(path: Path, kind: str, copy: Path) -> Iterator[dict[str, Source]]:
    """The splits of a one-file corpus, out of a copy of its text that is mapped into memory; deleted afterwards.

    Memory: 12 bytes a line.
    """
    with copy.open("x+b") as file:
        last: Utf8 = b""
        for last in _pieces(path, kind):
            file.write(last)
        if not last.endswith(b"\n"):
            file.write(b"\n")  # the last line may land before another
        file.flush()
        text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    lines = _count_lines(text)
    try:
        parts = _dealt(lines)
    except ValueError:
        raise _too_few_lines(path) from None
    bounds = _line_bounds(text, lines)
    yield {split: partial(_gathered, text, bounds, parts[split]) for split in SPLITS}
    copy.unlink()


# --- the names corpus -------------------------------------------------------------------------------------------------


def _load_names(kind: str, min_count: int) -> Corpus:
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
    return _assemble("names", splits, dict.fromkeys(SPLITS, path), kind, min_count)


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


# --- messages and the command line ------------------------------------------------------------------------------------


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    parser = Parser(prog="python -m mlp_fast.corpus", description="The names corpus.")
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("fetch", help="download names.txt, check it, keep it in the cache")
    fetch.add_argument("--url", default=NAMES_URL, help="where from")
    fetch.add_argument("--timeout", type=float, default=30.0, metavar="S", help="seconds to wait")
    fetch.add_argument("--to", type=Path, metavar="FILE", help="where to (names.txt in the user's cache)")
    options = parser.parse_args(arguments)
    if not 0 < options.timeout <= 3600:
        raise UserError(f"--timeout must be more than 0 and at most 3600 seconds (got {options.timeout:g})")
    path = options.to or names_cache()
    fetch_names(options.url, options.timeout, path)
    use = "--data names" if options.to is None else f"{NAMES_VARIABLE}={shown(path)} and --data names"
    print(f"{shown(path)}: {NAMES_BYTES:,} bytes, checked; use it by {use}")
    return 0


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))

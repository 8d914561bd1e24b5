"""Corpora: text -> vocabulary -> one tape of tokens a split.

Reading is text.py's, splitting split.py's, tokens are tokenizer.py's; here they are put together. Text is decoded a
piece at a time, through numpy lookup tables: loading needs the file and its tape in memory, and never a Python object a
line or a character. Of more text than STREAMED_ABOVE, the tapes are files that are mapped into memory (cache.py).
"""

import dataclasses
import hashlib
import json
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mlp_fast.config import Config
from mlp_fast.corpus import cache, names, tokenizer
from mlp_fast.corpus.split import SPLITS, lines_ended, stretch
from mlp_fast.corpus.split import split as split_text
from mlp_fast.corpus.text import Reading, Text, pieces, size
from mlp_fast.corpus.tokenizer import Bytes, Characters, Vocabulary, Words
from mlp_fast.data import synthesize
from mlp_fast.errors import UserError
from mlp_fast.files import file_mode, shown

# Bytes of text above which a corpus goes through the cache: more than memory should hold, or, for words, than takes a
# second or two to tokenise.
STREAMED_ABOVE = {"char": 2**28, "byte": 2**28, "word": 2**24}
CACHE_VERSION = 1  # of what the cache keeps of a text

# Makes one tensor of a dtype of the pieces of its memory: name of the tensor, pieces, dtype.
Keep = Callable[[str, Iterable[bytes | memoryview], npt.DTypeLike], torch.Tensor]


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
    if data == "names":
        path, splits = names.read()
        texts = {split: Text(path, partial(iter, [text])) for split, text in splits.items()}
        return _tokenised(data, texts, how, _in_memory, whole=Text(path, partial(pieces, path, None)))
    if not data:
        raise UserError("the name of the corpus is empty; give embedded, names, a folder or a text file")
    path = Path(data)
    if data == "embedded":
        path, how = synthesize.EMBEDDED, dataclasses.replace(how, encoding="utf-8")
    files = {split: path / f"{split}.txt" for split in SPLITS} if stat.S_ISDIR(file_mode(path)) else {"": path}
    streamed = sum(map(size, files.values())) > STREAMED_ABOVE[kind]
    corpus = _streamed(data, files, how) if streamed else _from_files(data, files, how, _in_memory)
    if data != "embedded" or kind == "word":
        return corpus
    process = synthesize.embedded_process()  # its text is ASCII, so a byte is a character
    return dataclasses.replace(corpus, cost={split: process.cost(file.read_text()) for split, file in files.items()})


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


def _from_files(name: str, files: dict[str, Path], how: Reading, keep: Keep) -> Corpus:
    """The corpus of three files, or of one under the name "", of which the text is kept like a tape."""
    if "" not in files:
        texts = {split: Text(path, partial(pieces, path, how.codec)) for split, path in files.items()}
        return _tokenised(name, texts, how, keep)
    path = files[""]
    content = keep("text", lines_ended(path, how), np.uint8).numpy()
    whole = Text(path, partial(stretch, content, 0, len(content)))
    return _tokenised(name, split_text(content, path, how), how, keep, whole)


def _in_memory(name: str, pieces: Iterable[bytes | memoryview], dtype: npt.DTypeLike) -> torch.Tensor:
    """A tensor in memory."""
    whole = bytearray()  # grows by an eighth at a time; a list of the pieces would be all of them once more
    for piece in pieces:
        whole += piece
    return torch.from_numpy(np.frombuffer(whole, dtype))


def _tokenised(name: str, splits: dict[str, Text], how: Reading, keep: Keep, whole: Text | None = None) -> Corpus:
    """The corpus of three texts; where they are parts of one, `whole`, its characters are the vocabulary."""
    if how.kind == "char":
        vocabulary: Vocabulary = _characters({"": whole} if whole else splits, how.vocabulary)
    elif how.vocabulary is not None:
        vocabulary = how.vocabulary
    else:
        vocabulary = Bytes() if how.kind == "byte" else Words.of(splits["train"].pieces(), how.min_count)

    def tape(split: str) -> torch.Tensor:
        pieces = splits[split].pieces()
        cut = tokenizer.cut_at_spaces(pieces) if how.kind == "word" else pieces
        return keep(split, (vocabulary.encoded(piece).data for piece in cut), vocabulary.dtype)

    train, val, test = map(tape, SPLITS)
    return Corpus(name, vocabulary, train, val, test, _fingerprint(vocabulary, train, val, test))


def _characters(texts: dict[str, Text], given: Vocabulary | None) -> Characters:
    """The vocabulary of a corpus by characters: the given one, or the characters of the first text.

    That is train, so that a model is asked nothing that it could not have learned; or the whole of one file, whose user
    did not choose the lines that go to train.

    Args:
        texts: split -> its text, train first; or "" -> the whole of one file.

    Raises:
        UserError: a text has a character that the vocabulary lacks.
    """
    found = {split: tokenizer.distinct(text.pieces()) for split, text in texts.items()}
    known = next(iter(found.values()))
    if given is not None:
        assert isinstance(given, Characters), "the model's tokens are of another kind"
        known = given.characters
    for split, characters in found.items():
        if lacking := set(characters) - set(known):
            of = f" of the {split} split" if split else ""
            where = "the train split" if given is None else "the vocabulary of the model"
            raise UserError(f"{_first_place(texts[split], lacking)}{of} is not in {where}")
    return Characters(known)


def _first_place(text: Text, characters: set[str]) -> str:
    """The first of some characters in a text, with its line, for a message."""
    line = 1
    for piece in text.pieces():
        for character in piece.decode():
            if character in characters:
                return f"{shown(text.path)}, line {line}: the character {tokenizer.named(character)}"
            line += character == "\n"
    raise AssertionError(f"{shown(text.path)} has changed while it was read")


def _fingerprint(vocabulary: Vocabulary, *tapes: torch.Tensor) -> str:
    value = vocabulary.as_json()
    digest = hashlib.sha256(f"{len(vocabulary)} {value if isinstance(value, str) else json.dumps(value)}".encode())
    for tape in tapes:
        digest.update(f" {len(tape)} ".encode())
        digest.update(tape.numpy().data)
    return digest.hexdigest()


def _streamed(name: str, files: dict[str, Path], how: Reading) -> Corpus:
    """The corpus of `_from_files`, its tapes mapped from the cache."""
    facts = [(str(path.resolve()), (status := path.stat()).st_size, status.st_mtime_ns) for path in files.values()]
    settings: list[Any] = [CACHE_VERSION, how.kind, how.min_count, how.split, how.encoding]
    if how.vocabulary is not None:
        settings.append(how.vocabulary.as_json())
    key = hashlib.sha256(json.dumps([*settings, facts]).encode()).hexdigest()[:32]
    folder, description = cache.entry(key, lambda folder: _write(folder, files, how))
    vocabulary = tokenizer.from_json(description["vocabulary"])
    train, val, test = (cache.map_tape(folder / split, vocabulary.dtype) for split in SPLITS)
    return Corpus(name, vocabulary, train, val, test, description["fingerprint"])


def _write(folder: Path, files: dict[str, Path], how: Reading) -> dict[str, Any]:
    """Writes the tapes of a corpus into a folder; returns the description of a cache entry."""
    made = _from_files("", files, how, lambda name, *tensor: cache.write_tape(folder / name, *tensor))
    (folder / "text").unlink(missing_ok=True)
    return {"vocabulary": made.vocabulary.as_json(), "fingerprint": made.fingerprint}

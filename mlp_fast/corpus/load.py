"""Corpora: text -> vocabulary -> one tape of tokens a split.

Reading is text.py's, splitting split.py's, tokens are tokenizer.py's; here they are put together. Text is decoded a
piece at a time, through numpy lookup tables: loading needs the file and its tape in memory, and never a Python object a
line or a character. Of more text than STREAMED_ABOVE, the tapes are files that are mapped into memory (cache.py).
"""

import contextlib
import dataclasses
import hashlib
import json
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mlp_fast.config import Config
from mlp_fast.corpus import cache, names, tokenizer
from mlp_fast.corpus.split import SPLITS, Source, lines_ended, mapped, read_again, whole
from mlp_fast.corpus.split import split as split_text
from mlp_fast.corpus.text import Reading, gathered, pieces, size
from mlp_fast.corpus.tokenizer import Bytes, Characters, Vocabulary, Words
from mlp_fast.data import synthesize
from mlp_fast.errors import UserError
from mlp_fast.files import file_mode, shown

# Bytes of text above which a corpus goes through the cache: more than memory should hold, or, for words, than takes a
# second or two to tokenise.
STREAMED_ABOVE = {"char": 2**28, "byte": 2**28, "word": 2**24}
CACHE_VERSION = 1  # of what the cache keeps of a text


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
        sources = {split: whole(text, kind) for split, text in splits.items()}
        return _tokenised(data, Texts(how, sources, {"": (path, whole(b"".join(splits.values()), kind))}))
    if not data:
        raise UserError("the name of the corpus is empty; give embedded, names, a folder or a text file")
    path = Path(data)
    if data == "embedded":
        path, how = synthesize.EMBEDDED, dataclasses.replace(how, encoding="utf-8")
    files = {split: path / f"{split}.txt" for split in SPLITS} if stat.S_ISDIR(file_mode(path)) else {"": path}
    streamed = sum(map(size, files.values())) > STREAMED_ABOVE[kind]
    corpus = _streamed(data, files, how) if streamed else _from_files(data, files, how)
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


@dataclass(frozen=True)
class Texts:
    """The texts that a corpus is made of, and how they become tokens.

    Attributes:
        splits: split -> its text.
        files: what the characters come from: split -> its file and text, train first; or, where one file is split,
            "" -> that file and all of its text, in its order: quicker to scan than line by line.
    """

    how: Reading
    splits: dict[str, Source]
    files: dict[str, tuple[Path, Source]]


def _from_files(name: str, files: dict[str, Path], how: Reading, folder: Path | None = None) -> Corpus:
    """The corpus of three files, or of one under the name ""; in memory, or in a folder: then no text ever is."""
    if "" not in files:
        sources = {split: read_again(file, how) for split, file in files.items()}
        return _tokenised(name, Texts(how, sources, {s: (file, sources[s]) for s, file in files.items()}), folder)
    path = files[""]
    lines = lines_ended(path, how)
    with contextlib.nullcontext(gathered(lines)) if folder is None else mapped(lines, folder / "text") as text:
        texts = Texts(how, split_text(text, path, how), {"": (path, whole(text, how.kind))})
        return _tokenised(name, texts, folder)


def _tokenised(name: str, texts: Texts, folder: Path | None = None) -> Corpus:
    """The corpus of some texts, its tapes in memory, or in new files of a folder, mapped."""
    how = texts.how
    if how.kind == "char":
        vocabulary: Vocabulary = _characters(texts)
    elif how.vocabulary is not None:
        vocabulary = how.vocabulary
    else:
        vocabulary = Bytes() if how.kind == "byte" else Words.of(texts.splits["train"](), how.min_count)

    def tape(split: str) -> torch.Tensor:
        tokens = (vocabulary.encoded(piece).data for piece in texts.splits[split]())
        if folder is not None:
            return cache.write_tape(folder / split, tokens, vocabulary.dtype)
        return torch.from_numpy(np.frombuffer(gathered(tokens), vocabulary.dtype))

    train, val, test = map(tape, SPLITS)
    return Corpus(name, vocabulary, train, val, test, _fingerprint(vocabulary, train, val, test))


def _characters(texts: Texts) -> Characters:
    """The vocabulary of a corpus by characters, of those of each file.

    It is that of train, so that what a model could not have learned is not asked of it. Which of one file's lines go to
    train is the program's own doing: there it is that of the whole file.

    Raises:
        UserError: a file has a character that the vocabulary lacks.
    """
    found = {split: tokenizer.distinct(text()) for split, (_, text) in texts.files.items()}
    known, given = next(iter(found.values())), texts.how.vocabulary
    if given is not None:
        assert isinstance(given, Characters), "the model's tokens are of another kind"
        known = given.characters
    for split, characters in found.items():
        if lacking := set(characters) - set(known):
            raise UserError(_first_place(texts, split, lacking))
    return Characters(known)


def _first_place(texts: Texts, split: str, lacking: set[str]) -> str:
    """The complaint about the first of the characters that the vocabulary lacks, with its line; the file is read again.

    Args:
        split: that the file is, or "" where it is the whole corpus.
    """
    path, how = texts.files[split][0], texts.how
    of = f" of the {split} split" if split else ""
    known = "the train split" if how.vocabulary is None else "the vocabulary of the model"
    line = 1
    for piece in pieces(path, how.codec):
        text = piece.decode()
        place = next((i for i, character in enumerate(text) if character in lacking), None)
        if place is not None:
            line += text.count("\n", 0, place)
            return f"{shown(path)}, line {line}: the character {tokenizer.named(text[place])}{of} is not in {known}"
        line += text.count("\n")
    raise AssertionError(f"{shown(path)} has changed while it was read")


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
    made = _from_files("", files, how, folder)
    return {"vocabulary": made.vocabulary.as_json(), "fingerprint": made.fingerprint}

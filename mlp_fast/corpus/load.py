"""Corpora: text -> vocabulary -> one tape of tokens a split.

Reading is text.py's, splitting split.py's, tokens are tokenizer.py's; here they are put together. Text is decoded a
piece at a time, through numpy lookup tables: loading needs the file and its tape in memory, and never a Python object a
line or a character. Of more text than STREAMED_ABOVE, the tapes are files that are mapped into memory (cache.py).
"""

import dataclasses
import hashlib
import json
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mlp_fast.config import Config
from mlp_fast.corpus import cache, names, tokenizer
from mlp_fast.corpus.split import SPLITS, Source, mapped, whole
from mlp_fast.corpus.split import split as split_text
from mlp_fast.corpus.text import Reading, pieces, read, size
from mlp_fast.corpus.tokenizer import Bytes, Characters, Utf8, Vocabulary, Words
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
    if data == "embedded":
        return _load_embedded(how)
    if data == "names":
        path, splits = names.read()
        sources = {split: whole(text, how.kind) for split, text in splits.items()}
        return _assemble(data, sources, dict.fromkeys(SPLITS, path), how)
    if not data:
        raise UserError("the name of the corpus is empty; give embedded, names, a folder or a text file")
    path = Path(data)
    if stat.S_ISDIR(file_mode(path)):
        paths = {split: path / f"{split}.txt" for split in SPLITS}
    else:
        paths = dict.fromkeys(SPLITS, path)
    if sum(map(size, dict.fromkeys(paths.values()))) > STREAMED_ABOVE[how.kind]:
        return _streamed(data, paths, how)
    if not _is_one(paths):
        texts = {split: read(path, how.codec) for split, path in paths.items()}
        return _assemble(data, {split: whole(text, how.kind) for split, text in texts.items()}, paths, how)
    text = read(path, how.codec)
    if how.split == "shuffled" and not text.endswith(b"\n"):
        text += b"\n"  # the last line may land before another
    return _assemble(data, split_text(text, path, how), paths, how, whole(text, how.kind))


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


def _load_embedded(how: Reading) -> Corpus:
    paths = {split: synthesize.EMBEDDED / f"{split}.txt" for split in SPLITS}
    texts = {split: read(path) for split, path in paths.items()}
    cost = None
    if how.kind != "word":  # of text that is ASCII, a byte is a character
        process = synthesize.embedded_process()
        cost = {split: process.cost(text.decode()) for split, text in texts.items()}
    sources = {split: whole(text, how.kind) for split, text in texts.items()}
    return dataclasses.replace(_assemble("embedded", sources, paths, how), cost=cost)


def _is_one(paths: dict[str, Path]) -> bool:
    """Whether the splits come out of one file."""
    return len(set(paths.values())) == 1


def _assemble(
    name: str, sources: dict[str, Source], paths: dict[str, Path], how: Reading, text: Source | None = None
) -> Corpus:
    """The corpus of some splits, of `text` where they are of one, its tapes in memory."""
    vocabulary = _vocabulary(sources, paths, how, text)

    def tape(source: Source) -> torch.Tensor:
        content = bytearray()  # grows by an eighth at a time; a list of pieces would be all of the tape once more
        for piece in source():
            content += vocabulary.encoded(piece).data
        return torch.from_numpy(np.frombuffer(content, vocabulary.dtype))

    tapes = {split: tape(sources[split]) for split in SPLITS}
    return Corpus(name, vocabulary, tapes["train"], tapes["val"], tapes["test"], _fingerprint(vocabulary, tapes))


def _vocabulary(sources: dict[str, Source], paths: dict[str, Path], how: Reading, text: Source | None) -> Vocabulary:
    if how.kind == "char":
        scanned = sources if text is None else {"": text}  # in its order: quicker than line by line
        return _characters({split: tokenizer.distinct(source()) for split, source in scanned.items()}, paths, how)
    if how.vocabulary is not None:
        return how.vocabulary
    return Bytes() if how.kind == "byte" else Words.of(sources["train"](), how.min_count)


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
    for piece in pieces(path, how.codec):
        text = piece.decode()
        place = next((i for i, character in enumerate(text) if character in lacking), None)
        if place is not None:
            line += text.count("\n", 0, place)
            return f"{shown(path)}, line {line}: the character {tokenizer.named(text[place])}{of} is not in {known}"
        line += text.count("\n")
    raise AssertionError(f"{shown(path)} has changed while it was read")


def _streamed(name: str, paths: dict[str, Path], how: Reading) -> Corpus:
    """The corpus of `_assemble`, its tapes made a piece of text at a time and mapped from the cache."""
    facts = [(str(path.resolve()), (status := path.stat()).st_size, status.st_mtime_ns) for path in paths.values()]
    settings: list[Any] = [CACHE_VERSION, how.kind, how.min_count, how.split, how.encoding]
    if how.vocabulary is not None:
        settings.append(how.vocabulary.as_json())
    key = hashlib.sha256(json.dumps([*settings, facts]).encode()).hexdigest()[:32]

    def build(folder: Path) -> dict[str, Any]:
        if not _is_one(paths):
            read_again: dict[str, Source] = {split: partial(_cut_file, path, how) for split, path in paths.items()}
            return _write(folder, read_again, paths, how)
        path = paths["train"]
        with mapped(path, how, folder / "text") as text:
            return _write(folder, split_text(text, path, how), paths, how, whole(text, how.kind))

    folder, description = cache.entry(key, build)
    vocabulary = tokenizer.from_json(description["vocabulary"])
    tapes = {split: cache.map_tape(folder / split, vocabulary.dtype) for split in SPLITS}
    return Corpus(name, vocabulary, tapes["train"], tapes["val"], tapes["test"], description["fingerprint"])


def _cut_file(path: Path, how: Reading) -> Iterator[Utf8]:
    """The text of a file in pieces cut between tokens, never all of it in memory."""
    return tokenizer.cut_at_spaces(pieces(path, how.codec)) if how.kind == "word" else pieces(path, how.codec)


def _write(
    folder: Path, sources: dict[str, Source], paths: dict[str, Path], how: Reading, text: Source | None = None
) -> dict[str, Any]:
    """Writes the tapes of a corpus into a folder; returns the description of a cache entry."""
    vocabulary = _vocabulary(sources, paths, how, text)
    sizes = {split: cache.write_tape(folder / split, map(vocabulary.encoded, sources[split]())) for split in SPLITS}
    tapes = {split: cache.map_tape(folder / split, vocabulary.dtype) for split in SPLITS}
    return {"vocabulary": vocabulary.as_json(), "fingerprint": _fingerprint(vocabulary, tapes), "bytes": sizes}

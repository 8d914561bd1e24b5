"""Text files as UTF-8 bytes: one byte-order mark dropped, every line end a newline, checked as they are read.

Text stays bytes throughout, and is decoded a piece at a time: reading never makes a Python object a line.
"""

import codecs
import io
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mlp_fast.corpus import tokenizer
from mlp_fast.corpus.tokenizer import Vocabulary
from mlp_fast.errors import UserError, one_line
from mlp_fast.files import file_mode, shown


@dataclass(frozen=True)
class Reading:
    """How a text becomes tokens.

    Attributes:
        kind: `char`, `byte` or `word`; see tokenizer.py.
        min_count: words that train has fewer times become <unk>.
        split: how one file is split: `shuffled`, by its lines, or `contiguous`, in its order; see split.split.
        encoding: of text files, as Python's codecs name it; bytes are read as they are.
        vocabulary: of the model that is to read the text; None makes one of the text.
    """

    kind: str = "char"
    min_count: int = 1
    split: str = "shuffled"
    encoding: str = "utf-8"
    vocabulary: Vocabulary | None = None

    @property
    def codec(self) -> str | None:
        """The encoding of the file; None where its bytes are taken as they are."""
        return None if self.kind == "byte" else self.encoding


@dataclass(frozen=True)
class Text:
    """A text, read a piece at a time.

    Attributes:
        path: its file, for messages.
        pieces: makes the pieces, cut between characters, anew whenever it is called.
    """

    path: Path
    pieces: Callable[[], Iterator[bytes]]


def pieces(path: Path, codec: str | None = "utf-8") -> Iterator[bytes]:
    """A file in pieces that are cut between characters, every line end a newline; never all of it in memory.

    Args:
        path: a regular file. It is looked at before it is opened: opening a FIFO would wait for a writer.
        codec: its encoding, by a name that Python knows; None gives its bytes as they are.

    Raises:
        UserError: missing, unreadable, empty, not a regular file, or not of that encoding (with the offset of the first
            wrong byte in the file).
    """
    size(path)
    empty = True
    try:
        for piece in _bytes(path) if codec is None else _decoded(path, codec):
            empty = False
            yield piece
    except OSError as error:
        raise UserError(f"cannot read {shown(path)}: {one_line(error)}") from None
    if empty:
        raise UserError(f"{shown(path)} is empty")


def _bytes(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from iter(partial(file.read, tokenizer.CHUNK), b"")


def _decoded(path: Path, codec: str) -> Iterator[bytes]:
    """A file of text as UTF-8."""
    with path.open("rb") as raw, io.TextIOWrapper(raw, codec) as file:
        try:
            text = file.read(tokenizer.CHUNK)
            if codecs.lookup(codec).name != "utf-8-sig":  # others leave the byte-order mark
                text = text.removeprefix("\ufeff")
            while text:
                yield text.encode()
                text = file.read(tokenizer.CHUNK)
        except UnicodeDecodeError as error:
            place = raw.tell() - len(error.object) + error.start  # it has been read to the end of the object
            name = "UTF-8" if codecs.lookup(codec).name in ("utf-8", "utf-8-sig") else codec
            raise UserError(
                f"{shown(path)} is not {name}: byte 0x{error.object[error.start]:02x} at offset {place}"
                f" ({error.reason}); name its encoding by --encoding"
            ) from None
        except UnicodeError as error:  # a lone surrogate, or no byte-order mark where the encoding wants one
            reason = getattr(error, "reason", error)
            raise UserError(f"{shown(path)} cannot be read by --encoding {codec}: {reason}") from None


def size(path: Path) -> int:
    """The size of a regular file, which `path` must be."""
    mode = file_mode(path)
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a FIFO, socket or device"
        raise UserError(f"{shown(path)} is {kind}, not a text file")
    return path.stat().st_size

"""Text files as UTF-8 bytes: one byte-order mark dropped, every line end a newline, checked as they are read.

Text stays bytes throughout, and is decoded a piece at a time: reading never makes a Python object a line.
"""

import codecs
import itertools
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mlp_fast.corpus import tokenizer
from mlp_fast.corpus.tokenizer import Utf8, Vocabulary
from mlp_fast.errors import UserError
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


def gathered(pieces: Iterable[bytes | bytearray | memoryview]) -> bytearray:
    """Pieces as one. It grows by an eighth at a time; a list of the pieces would be all of them once more."""
    whole = bytearray()
    for piece in pieces:
        whole += piece
    return whole


def pieces(path: Path, codec: str | None = "utf-8") -> Iterator[Utf8]:
    """A file in pieces that are cut between characters, and not inside of a line end; never all of it in memory.

    Args:
        path: a regular file. It is looked at before it is opened: opening a FIFO would wait for a writer.
        codec: its encoding, by a name that Python knows; None gives its bytes as they are.

    Raises:
        UserError: missing, unreadable, empty, not a regular file, or not of that encoding (with the offset of the first
            wrong byte in the file).
    """
    size(path)
    rest, offset, empty = b"", 0, True
    try:
        with path.open("rb") as file:
            blocks: Iterator[Utf8] = iter(partial(file.read, tokenizer.CHUNK), b"")
            if codec is not None and codecs.lookup(codec).name not in ("utf-8", "utf-8-sig"):
                blocks = _converted(path, blocks, codec)
            for block in itertools.chain(blocks, [b""]):
                if codec is not None and offset == 0 and not rest and block.startswith(codecs.BOM_UTF8):
                    block, offset = block[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
                chunk = rest + block
                end = len(chunk) if codec is None else _whole(path, chunk, offset, final=len(block) == 0)
                piece, rest = chunk[:end], chunk[end:]
                offset += end
                if piece:
                    empty = False
                    plain = codec is None or b"\r" not in piece
                    yield piece if plain else piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    except OSError as error:
        raise UserError(f"cannot read {shown(path)}: {error.strerror}") from None
    if empty:
        raise UserError(f"{shown(path)} is empty")


def size(path: Path) -> int:
    """The size of a regular file, which `path` must be."""
    mode = file_mode(path)
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a FIFO, socket or device"
        raise UserError(f"{shown(path)} is {kind}, not a text file")
    return path.stat().st_size


def _whole(path: Path, chunk: bytes, offset: int, *, final: bool) -> int:
    """How many bytes of a chunk are whole characters and line ends; all of them where it is the last."""
    try:
        end = len(chunk) if chunk.isascii() else codecs.utf_8_decode(chunk, "strict", final)[1]
    except UnicodeDecodeError as error:
        raise _wrong_byte(path, "UTF-8", error, offset) from None
    return end - 1 if not final and chunk[:end].endswith(b"\r") else end  # its newline may follow


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


def _wrong_byte(path: Path, encoding: str, error: UnicodeDecodeError, offset: int) -> UserError:
    return UserError(
        f"{shown(path)} is not {encoding}: byte 0x{error.object[error.start]:02x} at offset {offset + error.start}"
        f" ({error.reason}); name its encoding by --encoding"
    )

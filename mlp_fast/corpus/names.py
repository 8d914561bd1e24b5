"""The names corpus: its splits, and its download into the user's cache."""

import hashlib
import http.client
import os
import random
import time
import urllib.error
import urllib.request
from pathlib import Path

from mlp_fast.corpus.cache import cache_folder
from mlp_fast.corpus.text import pieces
from mlp_fast.errors import UserError, one_line
from mlp_fast.files import shown, write_atomically

URL = "https://raw.githubusercontent.com/karpathy/makemore/master/names.txt"
BYTES = 228_145
SHA256 = "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d"
SPLIT_SHA256 = {
    "train": "814eca7d20168ba3a41ff1a6e41bedbfa8e72de37c974a3411f047f0b73b2f74",
    "val": "23195f8c2b2b69343f1e486a595b5e0e9977d373289fe306bb3adc9c171e9efc",
    "test": "5951a7a2df9d9cc5fc9409e814a645eadba5e33e104a9e6e47f3cfe065a0d9d6",
}
VARIABLE = "MLP_FAST_NAMES"
FETCH = "python -m mlp_fast.corpus fetch"


def read() -> tuple[Path, dict[str, bytes]]:
    """The file that VARIABLE names, or the downloaded one, and its splits.

    Raises:
        UserError: it is missing, or not the names corpus.
    """
    given = os.environ.get(VARIABLE)
    path = Path(given) if given else cached()
    if not given and not os.path.exists(path):  # Path.exists() raises where a folder on the way is closed
        raise UserError(f"the names corpus is not here yet; run `{FETCH}`, or set {VARIABLE} to a copy of it")
    content = b"".join(pieces(path, codec=None))
    try:
        return path, split(content)
    except ValueError as error:
        remedy = f"{VARIABLE} must name an unchanged copy" if given else f"run `{FETCH}` again"
        raise UserError(f"{shown(path)} is not the names corpus: {error}; {remedy}") from None


def cached() -> Path:
    """Where `fetch` puts names.txt: in the user's cache, see cache.cache_folder."""
    return cache_folder() / "names.txt"


def split(content: bytes) -> dict[str, bytes]:
    """The reference's splits of names.txt; ValueError where the content or a split is not the known one, by SHA-256."""
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        size = "" if len(content) == BYTES else f"{len(content):,} bytes in place of {BYTES:,}, "
        raise ValueError(f"{size}sha256 {digest[:12]}... in place of {SHA256[:12]}...")
    lines = content.splitlines(keepends=True)
    order = list(range(len(lines)))
    random.Random(42).shuffle(order)
    parts = {"train": order[2000:], "val": order[1000:2000], "test": order[:1000]}
    splits: dict[str, bytes] = {name: b"".join(lines[i] for i in places) for name, places in parts.items()}
    for name, part in splits.items():
        if hashlib.sha256(part).hexdigest() != SPLIT_SHA256[name]:
            raise ValueError(f"its {name} split came out wrong")
    return splits


def fetch(url: str, timeout: float, path: Path) -> None:
    """Downloads names.txt and writes it to `path` whole or not at all: checked, then written aside and renamed.

    Args:
        url: http or https.
        timeout: seconds, for each wait and for the whole.

    Raises:
        UserError: the download or the file failed; what stood at `path` before stands there still.
    """
    content = _download(url, timeout)
    if len(content) < BYTES:
        raise UserError(f"{shown(url)}: cut short after {len(content):,} of {BYTES:,} bytes; try again")
    try:
        split(content)
    except ValueError as error:
        raise UserError(f"{shown(url)}: not the names corpus: {error}") from None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f"cannot write {shown(path)}: {one_line(error)}") from None


def _download(url: str, timeout: float) -> bytes:
    """The answer of an address, up to one byte beyond the size of names.txt.

    Written here since urlopen's timeout is for each wait, and torch.hub.download_url_to_file has none; neither limits
    the whole time or the size.
    """
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{shown(url)}: not an http or https address")
    deadline = time.monotonic() + timeout
    content = b""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            while len(content) <= BYTES and (piece := response.read1(BYTES + 1 - len(content))):
                content += piece
                if time.monotonic() > deadline:
                    raise TimeoutError
    except urllib.error.HTTPError as error:
        with error:
            raise UserError(
                f"{shown(url)}: the server answered {error.code} {' '.join(str(error.reason).split())}"
            ) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, TimeoutError):
            raise UserError(f"{shown(url)}: no complete answer within {timeout:g} s") from None
        raise UserError(f"{shown(url)}: {one_line(cause)}") from None
    return content

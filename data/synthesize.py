"""The embedded corpus: names drawn from a known order-two character process.

    python -m mlp_fast.data.synthesize            writes embedded/{train,val,test}.txt beside this file
    python -m mlp_fast.data.synthesize --check    says whether those files are what it would write

The process is fitted on `seed_names.txt` and every probability in it is known, so the exact cross-entropy of the corpus
under its own source is known too: the floor below which no model's expected loss can go. A name's first characters
depend on nothing before its newline and every later one on the two characters before it, so a model of context length
2 or more can represent the process exactly.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlp_fast.cli import Parser, run_main
from mlp_fast.errors import UserError
from mlp_fast.model.rng import RNG

FOLDER = Path(__file__).resolve().parent
SEED_NAMES = FOLDER / "seed_names.txt"
EMBEDDED = FOLDER / "embedded"
SPLIT_LINES = {"train": 30_032, "val": 1_000, "test": 1_000}  # as many as the names corpus has
SEED = 1337

ALPHABET = "\nabcdefghijklmnopqrstuvwxyz"  # a newline ends a name; as context it stands for "before the name"
SMOOTHING = 0.1  # pseudo-count of every character in the order-zero estimate

F64 = npt.NDArray[np.float64]


class CharacterProcess:
    """A stationary source of names: each character depends on the two before it, restarted at each newline.

    Args:
        probabilities: (27, 27, 27) float64; [a, b, c] is P(c | a then b) over ALPHABET. A context [a, newline] with any
            a but the newline never occurs, since the newline restarts the process at [newline, newline].
    """

    def __init__(self, probabilities: F64) -> None:
        self.probabilities = probabilities
        with np.errstate(divide="ignore"):
            self._cost = -np.log(probabilities)  # nats
        # cumsum adds from left to right on every machine, so that the draws are the same everywhere.
        self._cumulative = np.cumsum(probabilities, axis=2)

    @classmethod
    def fit(cls, names: Iterable[str]) -> "CharacterProcess":
        """Fits the process on names by interpolated Witten-Bell smoothing of orders 2, 1 and 0.

        With n(.) the counts over the names, each preceded by two newlines and followed by one, and w(.) the number of
        distinct characters seen after a context (Witten and Bell 1991, method C, interpolated):

            P0(c)    = (n(c) + SMOOTHING) / (N + 27 SMOOTHING)
            P1(c|b)  = (n(bc) + w(b) P0(c)) / (n(b) + w(b))
            P2(c|ab) = (n(abc) + w(ab) P1(c|b)) / (n(ab) + w(ab)),   P1(c|b) where ab was never seen

        The empty name is then given probability zero and the start context is normalised again.

        Args:
            names: non-empty, of the characters a to z.
        """
        size, names = len(ALPHABET), list(names)
        for name in names:
            if not name or "\n" in name:
                raise ValueError(f"a name to fit on must be one non-empty line (got {name!r})")
        counts = np.zeros((size, size, size))
        np.add.at(counts, _trigrams("".join(f"{name}\n" for name in names)), 1)
        order_two, order_one, order_zero = counts, counts.sum(axis=0), counts.sum(axis=(0, 1))
        p0 = (order_zero + SMOOTHING) / (order_zero.sum() + size * SMOOTHING)
        p1 = _witten_bell(order_one, np.broadcast_to(p0, order_one.shape))
        p2 = _witten_bell(order_two, np.broadcast_to(p1, order_two.shape))
        p2[0, 0, 0] = 0.0
        p2[0, 0] /= np.cumsum(p2[0, 0])[-1]
        return cls(p2)

    def sample(self, rng: RNG, n: int) -> list[str]:
        """Draws n names, one uniform a character (the newline included)."""
        cumulative = self._cumulative.tolist()
        names = []
        for _ in range(n):
            name: list[str] = []
            a = b = 0
            while (c := _pick(cumulative[a][b], rng.random())) != 0:
                name.append(ALPHABET[c])
                a, b = b, c
            names.append("".join(name))
        return names

    def cost(self, text: str) -> F64:
        """-ln P of each character of a tape of names, given all characters before it.

        Args:
            text: names, each followed by a newline; a last newline may be missing. The tape begins at a name's start,
                so its first two characters have contexts like any other name's. (A training window needs T characters
                before its target: the first T places of a tape are never targets, and a floor leaves them out.)

        Returns:
            (len(text),) float64, in nats; infinite where the process cannot produce the character (an empty line).
        """
        return self._cost[_trigrams(text)]


def seed_names() -> list[str]:
    """The given names the process is fitted on, sorted."""
    return SEED_NAMES.read_text(encoding="ascii").split()


def embedded_process() -> CharacterProcess:
    """The process the embedded corpus was drawn from."""
    return CharacterProcess.fit(seed_names())


def embedded_texts() -> dict[str, str]:
    """Draws the embedded corpus: split -> its names, each followed by a newline (the last too)."""
    process, rng = embedded_process(), RNG(SEED)
    return {split: "".join(f"{name}\n" for name in process.sample(rng, n)) for split, n in SPLIT_LINES.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes or checks the embedded corpus; the exit code."""
    parser = Parser(prog="python -m mlp_fast.data.synthesize", description="Makes the embedded corpus.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing: compare the files with what would be written"
    )
    parser.add_argument("--to", type=Path, default=EMBEDDED, metavar="DIR", help="folder of the files")
    options = parser.parse_args(arguments)
    process = embedded_process()
    for split, text in embedded_texts().items():
        path, content = options.to / f"{split}.txt", text.encode("ascii")
        try:
            if not options.check:
                options.to.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            elif path.read_bytes() != content:
                raise UserError(f"{path} is not what synthesize makes; run `python -m mlp_fast.data.synthesize`")
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from error
        lines, floor = SPLIT_LINES[split], process.cost(text).mean()
        print(f"{path}: {lines:,} names, {len(text) / lines - 1:.2f} letters each, {floor:.6f} nats a character")
    return 0


def _tokens(text: str) -> npt.NDArray[np.int64]:
    """Places in ALPHABET; shape (len(text),)."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.int64)
    tokens = np.where(codes == ord("\n"), 0, codes - ord("a") + 1)
    if np.any((tokens < 0) | (tokens >= len(ALPHABET)) | ((tokens == 0) & (codes != ord("\n")))):
        raise ValueError("the process knows the characters a to z and the newline only")
    return tokens


def _trigrams(text: str) -> tuple[npt.NDArray[np.int64], ...]:
    """Of each character of a tape of names: the two before it in its name, and itself; three arrays (len(text),)."""
    c = _tokens(text)
    b = np.concatenate([[0], c[:-1]])[: len(c)]
    a = np.concatenate([[0], b[:-1]])[: len(c)]
    a[b == 0] = 0  # restarted at a newline
    return a, b, c


def _witten_bell(counts: F64, lower: F64) -> F64:
    """(n(.c) + w(.) lower(c)) / (n(.) + w(.)) along the last axis; `lower` where the context was never seen."""
    seen = counts.sum(axis=-1, keepdims=True)
    distinct = (counts > 0).sum(axis=-1, keepdims=True)
    return np.where(seen > 0, (counts + distinct * lower) / np.maximum(seen + distinct, 1), lower)


def _pick(cumulative: list[float], uniform: float) -> int:
    """The first place whose cumulative probability exceeds the uniform, scaled by the rounded total."""
    threshold = uniform * cumulative[-1]
    return next(place for place, value in enumerate(cumulative) if value > threshold)


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))

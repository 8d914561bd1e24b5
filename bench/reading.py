"""Reading a corpus, beside the plain way of Python: a list of a dictionary's answers, character by character."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from bench.case import Case, Entry, Plan, Timer, timed_beside
from bench.floor import Probes
from mlp_fast.corpus import load as corpus
from mlp_fast.data import synthesize
from mlp_fast.measure.equivalence import NotEquivalent

ENGLISH, CHINESE = synthesize.EMBEDDED / "train.txt", "天地玄黄宇宙洪荒日月盈昃辰宿列张\n"


def plain(folder: Path) -> dict[str, np.ndarray]:
    """split -> tokens, as Python reads text and looks characters up."""
    texts = {split: (folder / f"{split}.txt").read_text(encoding="utf-8") for split in corpus.SPLITS}
    tokens = {character: token for token, character in enumerate(sorted(set(texts["train"])))}
    return {split: np.array([tokens[c] for c in text], np.uint8) for split, text in texts.items()}


def reading_cases(plan: Plan) -> Iterator[Case]:
    """A folder of megabytes of text, in an alphabet of one byte a character and in one of three."""
    size = 20_000 if plan.dry else 5_000_000

    def case(name: str, line: str) -> Case:
        def run(timer: Timer, probes: Probes) -> Entry:
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place)
                content = line * (size // len(line.encode()) + 1)
                for split in corpus.SPLITS:
                    (folder / f"{split}.txt").write_text(content if split == "train" else line, encoding="utf-8")
                work: Callable[[], corpus.Corpus] = lambda: corpus.load(place)  # noqa: E731
                expected, loaded = plain(folder), work()
                if any((loaded.tapes[split].numpy() != expected[split]).any() for split in corpus.SPLITS):
                    raise NotEquivalent("the tokens are not those of plain Python")
                times = timed_beside(timer, work, {"python": lambda: plain(folder)}, min(plan.rounds, 5))
            return {"per": f"{size:,} bytes", "bytes_per_second": 1e3 * size / times["ms"]["min"], **times}

        return Case("reading", name, run)

    yield case("names", ENGLISH.read_text()[:4096])
    yield case("Chinese", CHINESE)

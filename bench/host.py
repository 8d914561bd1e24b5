"""Cases of the host's work before training: random numbers, and a corpus read into tokens."""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from bench.case import Case, Entry, Plan, Timer, Work, timed_beside
from bench.lower_bound import Probes
from mlp_fast.corpus import load as corpus
from mlp_fast.data import synthesize
from mlp_fast.measure.equivalence import NotEquivalent
from mlp_fast.model.rng import RNG

ENGLISH, CHINESE = synthesize.EMBEDDED / "train.txt", "天地玄黄宇宙洪荒日月盈昃辰宿列张\n"


def rng_cases(plan: Plan) -> Iterator[Case]:
    """Filling an array with random numbers, beside drawing them one by one."""
    many, few = (10_000, 100) if plan.dry else (10_000_000, 100_000)

    def drawn(count: int) -> list[float]:
        rng = RNG(1337)
        return [rng.random() for _ in range(count)]

    def case(id: str, work: Work, count: int) -> Case:
        def run(timer: Timer, probes: Probes) -> Entry:
            if not (RNG(1337).fill_uniform(1000) == drawn(1000)).all():
                raise NotEquivalent("the fill's numbers are not those of the scalar generator")
            entry = timed_beside(timer, work, {}, min(plan.rounds, 5))
            return {"per": f"{count:,} uniforms", **entry, "uniforms_per_second": 1e3 * count / entry["ms"]["min"]}

        return Case("rng", f"{id} {count:,}", run)

    yield case("fill", lambda: RNG(1337).fill_uniform(many), many)
    yield case("scalar", lambda: drawn(few), few)


def plain(folder: Path) -> dict[str, np.ndarray]:
    """split -> tokens, as Python reads text and looks characters up."""
    texts = {split: (folder / f"{split}.txt").read_text(encoding="utf-8") for split in corpus.SPLITS}
    tokens = {character: token for token, character in enumerate(sorted(set(texts["train"])))}
    return {split: np.array([tokens[c] for c in text], np.uint8) for split, text in texts.items()}


def reading_cases(plan: Plan) -> Iterator[Case]:
    """A folder of megabytes of text, one byte a character and three, beside plain Python and its dictionary."""
    size = 20_000 if plan.dry else 5_000_000

    def run(timer: Timer, probes: Probes, line: str) -> Entry:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            content = line * (size // len(line.encode()) + 1)
            for split in corpus.SPLITS:
                (folder / f"{split}.txt").write_text(content if split == "train" else line, encoding="utf-8")
            expected, loaded = plain(folder), corpus.load(place)
            if any((loaded.tapes[split].numpy() != expected[split]).any() for split in corpus.SPLITS):
                raise NotEquivalent("the tokens are not those of plain Python")
            others = {"python": partial(plain, folder)}
            entry = timed_beside(timer, partial(corpus.load, place), others, min(plan.rounds, 5))
        return {"per": f"{size:,} bytes", **entry, "bytes_per_second": 1e3 * size / entry["ms"]["min"]}

    yield Case("reading", "names", partial(run, line=ENGLISH.read_text()[:4096]))
    yield Case("reading", "Chinese", partial(run, line=CHINESE))

"""Cases of other work than steps: evaluation and sampling of every backend, random numbers, reading a corpus."""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bench.case import TOLERANCE, Case, Entry, Plan, Timer, Work, timed_beside, waited
from bench.lower_bound import Probes
from bench.steps import Setting, candidates
from mlp_fast import backends
from mlp_fast.backends.base import Backend
from mlp_fast.corpus.load import SPLITS, Corpus, load
from mlp_fast.corpus.prompt import default_prompt
from mlp_fast.data import synthesize
from mlp_fast.measure.equivalence import BASELINE, NotEquivalent, require
from mlp_fast.model.mlp import MLP
from mlp_fast.model.rng import RNG
from mlp_fast.model.sampling import SAMPLE_LENGTH, SAMPLE_SEED
from mlp_fast.model.windows import Tape, evaluated_windows

# Some work, and the error of its result, by the model in float64.
Task = tuple[Work, Callable[[Any], float]]


def _backend_cases(
    group: str, method: str, per: str, plan: Plan, task_of: Callable[[Backend, Corpus, MLP], Task]
) -> Iterator[Case]:
    """A method of eager, and of each backend that overrides it, beside eager's."""

    def made(name: str) -> Work:
        found = candidates(Setting(plan.config()))
        backend, _ = found.backend(name)
        model = MLP(found.shape, found.verifier.initial.parameters).double()
        work, error = task_of(backend, found.corpus, model)
        require(name, f"its {group}", error(work()), TOLERANCE)
        return waited(work, backend.device)

    def run(name: str, timer: Timer, probes: Probes) -> Entry:
        others = {} if name == BASELINE else {BASELINE: made(BASELINE)}
        return {"backend": name, "per": per, **timed_beside(timer, made(name), others, plan.rounds)}

    common = getattr(Backend, method)
    own = [name for name in backends.REGISTRY if getattr(backends.backend_class(name), method) is not common]
    yield from (Case(group, name, partial(run, name)) for name in (BASELINE, *own))


def evaluation_cases(plan: Plan) -> Iterator[Case]:
    """The mean loss over the validation split, by backend."""

    def task_of(backend: Backend, corpus: Corpus, model: MLP) -> Task:
        windows = evaluated_windows(Tape(corpus.val, backend.shape.T), backend.config.batch_size)
        mine = windows.to(backend.device)

        def error(loss: float) -> float:
            with torch.no_grad():
                losses = F.cross_entropy(model(windows.contexts)[0], windows.targets, reduction="none")
            return abs(loss - windows.mean(losses))

        return lambda: backend.mean_loss(mine), error

    yield from _backend_cases("evaluation", "mean_loss", "val split", plan, task_of)


def sampling_cases(plan: Plan) -> Iterator[Case]:
    """Drawing the sample of a run, by backend."""
    length = 3 if plan.dry else SAMPLE_LENGTH

    def task_of(backend: Backend, corpus: Corpus, model: MLP) -> Task:
        prompt = default_prompt(corpus.vocabulary, backend.shape.T, corpus.train[: backend.shape.T].tolist())

        def error(drawn: list[int]) -> float:
            return sample_error(drawn, prompt, length, model, backend.shape.T)

        return lambda: backend.sample(prompt, length, SAMPLE_SEED), error

    yield from _backend_cases("sampling", "sample", f"{length} characters", plan, task_of)


def sample_error(drawn: Sequence[int], prompt: Sequence[int], length: int, model: MLP, context_length: int) -> float:
    """The largest distance of a uniform from the interval of the token drawn with it; infinite if tokens are missing.

    A token's interval is where the cumulative probability, by the model in float64, passes over it. Every token is
    checked in the context that was drawn before it: where rounding takes a uniform across a border, all tokens after it
    differ from another sample, and none of them is wrong.
    """
    if len(drawn) != length:
        return math.inf
    contexts = torch.tensor([*prompt[-context_length:], *drawn[:-1]]).unfold(0, context_length, 1)
    tokens = torch.tensor(drawn)[:, None]
    with torch.no_grad():
        probabilities = model(contexts)[0].softmax(-1)
    above = probabilities.cumsum(-1).gather(1, tokens)[:, 0]
    below = above - probabilities.gather(1, tokens)[:, 0]
    uniforms = torch.from_numpy(RNG(SAMPLE_SEED).fill_uniform(length))
    return torch.maximum(below - uniforms, uniforms - above).max().item()


ENGLISH, CHINESE = synthesize.EMBEDDED / "train.txt", "天地玄黄宇宙洪荒日月盈昃辰宿列张\n"


def rng_cases(plan: Plan) -> Iterator[Case]:
    """Filling an array with random numbers, beside drawing them one by one."""
    many, few = (10_000, 100) if plan.dry else (10_000_000, 100_000)

    def drawn(count: int) -> list[float]:
        rng = RNG(1337)
        return [rng.random() for _ in range(count)]

    def run(work: Work, count: int, timer: Timer, probes: Probes) -> Entry:
        if not (RNG(1337).fill_uniform(1000) == drawn(1000)).all():
            raise NotEquivalent("the fill's numbers are not those of the scalar generator")
        entry = timed_beside(timer, work, {}, min(plan.rounds, 5))
        return {"per": f"{count:,} uniforms", **entry, "uniforms_per_second": 1e3 * count / entry["ms"]["min"]}

    yield Case("rng", f"fill {many:,}", partial(run, lambda: RNG(1337).fill_uniform(many), many))
    yield Case("rng", f"scalar {few:,}", partial(run, lambda: drawn(few), few))


def plain(folder: Path) -> dict[str, np.ndarray]:
    """split -> tokens, by plain Python: files read as text, characters looked up in a dictionary."""
    texts = {split: (folder / f"{split}.txt").read_text(encoding="utf-8") for split in SPLITS}
    tokens = {character: token for token, character in enumerate(sorted(set(texts["train"])))}
    return {split: np.array([tokens[c] for c in text], np.uint8) for split, text in texts.items()}


def reading_cases(plan: Plan) -> Iterator[Case]:
    """A folder of megabytes of text, of one byte a character and of three, beside plain Python."""
    size = 20_000 if plan.dry else 5_000_000

    def run(line: str, timer: Timer, probes: Probes) -> Entry:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            content = line * (size // len(line.encode()) + 1)
            for split in SPLITS:
                (folder / f"{split}.txt").write_text(content if split == "train" else line, encoding="utf-8")
            expected, loaded = plain(folder), load(place)
            if any((loaded.tapes[split].numpy() != expected[split]).any() for split in SPLITS):
                raise NotEquivalent("the tokens are not those of plain Python")
            others = {"python": partial(plain, folder)}
            entry = timed_beside(timer, partial(load, place), others, min(plan.rounds, 5))
        return {"per": f"{size:,} bytes", **entry, "bytes_per_second": 1e3 * size / entry["ms"]["min"]}

    yield Case("reading", "names", partial(run, ENGLISH.read_text()[:4096]))
    yield Case("reading", "Chinese", partial(run, CHINESE))

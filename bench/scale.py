"""Larger models and corpora, and several processes, as cases: tokens a second, and memory at its highest.

The corpus of words is made by generate_words.py and kept in the user's cache: 10 million tokens, of which the count
that the preset asks for makes a vocabulary of 17,003. Whole training processes are measured, as their memory is theirs
alone; the time of a step is what training itself reports.
"""

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bench import generate_words
from bench.case import TOLERANCE, Case, Entry, Plan, Timer, compared, require_supported
from bench.lower_bound import Probes
from bench.processes import python
from bench.steps import Setting, step_case
from mlp_fast import backends, distributed, train
from mlp_fast.cli import Parser, add_config_arguments, config_from, run_main
from mlp_fast.corpus import cache as token_cache
from mlp_fast.measure import machine
from mlp_fast.measure.equivalence import BASELINE, NotEquivalent, require
from mlp_fast.model.mlp import Shape

TOKENS = 10_000_000
MEMORY_LIMIT = 4 * 2**30  # of a CPU process that trains on them
VOCABULARIES = (256, 1024, 4096, 16384, 65536)
PROCESSES = (1, 2, 4)


def word_corpus(tokens: int) -> Path:
    """The generated corpus of so many tokens, made once."""
    folder = token_cache.cache_folder() / f"generated-words-{tokens}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            generate_words.generate(Path(temporary) / "words", tokens)
            (Path(temporary) / "words").rename(folder)
    return folder


class Trained(NamedTuple):
    """What a training run tells: milliseconds a step, the bytes of its largest process at their most, its test loss."""

    milliseconds: float
    peak: int
    test_loss: float


def trained(options: Sequence[str], processes: int = 1) -> Trained:
    """Trains in processes of their own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = ["-m", "bench.scale", folder, "--quiet", "--log-json", str(log), *options]
        python([*(launcher if processes > 1 else []), *command])
        events = [json.loads(line) for line in log.read_text().splitlines()]
        peaks = [int(file.read_text()) for file in Path(folder).glob("peak-*")]
    times = [event["ms_per_step"] for event in events if event["event"] == "eval"]
    return Trained(times[-1], max(peaks), next(event["loss"] for event in events if event["event"] == "test"))


def main(argv: Sequence[str]) -> int:
    """A process of a measured run: mlp_fast.train with the options after the first, a folder that its peak goes to.

    The process writes it down itself: what the system tells of a process that has ended counts the one that started it.
    """
    folder, *options = argv
    code = train.main(options)
    (Path(folder) / f"peak-{distributed.launched_rank()}").write_text(str(machine.resident_peak()))
    return code


def training_case(
    id: str, backend: str, plan: Plan, options: Sequence[str], vocab_size: int, *, words: int = 0, processes: int = 1
) -> Case:
    """Training processes of one backend, with those of eager in between; on so many generated words, if given.

    Both must end with the same test loss.
    """

    def run(timer: Timer, probes: Probes) -> Entry:
        parser = Parser()
        add_config_arguments(parser)
        config = config_from(parser.parse_args([*options, "--backend", backend]))
        shape = Shape.of(config, vocab_size)
        require_supported(backend, config, shape)
        command = [*options, "--data", str(word_corpus(words)) if words else "embedded", "--backend"]
        runs: list[Trained] = []
        eager: list[Trained] = []

        def before() -> None:
            if backend != BASELINE or processes > 1:
                eager.append(trained([*command, BASELINE]))

        timer(lambda: runs.append(trained([*command, backend], processes)), before, 1 if plan.dry else 3)
        for mine, theirs in zip(runs, eager, strict=False):
            require(backend, "the test loss", abs(mine.test_loss - theirs.test_loss), TOLERANCE)
        peak = max(one.peak for one in runs)
        if plan.device == "cpu" and peak > MEMORY_LIMIT:
            raise NotEquivalent(f"it took {peak / 2**30:.1f} GiB, more than {MEMORY_LIMIT / 2**30:g}")
        entry = compared([one.milliseconds for one in runs], {BASELINE: [one.milliseconds for one in eager]})
        return {
            "backend": backend,
            "processes": processes,
            **{"B": config.batch_size, "T": shape.T, "E": shape.E, "H": shape.H, "V": shape.V},
            "threads": max(1, torch.get_num_threads() // processes),
            "per": "step",
            "samples_per_second": 1e3 * config.batch_size / entry["ms"]["median"],
            "peak_bytes": peak,
            **entry,
        }

    return Case("scale", id, run)


def scale_cases(plan: Plan) -> Iterator[Case]:
    """Models and corpora past the toy, and several processes."""
    run = ["--device", plan.device, "--num-steps", "4" if plan.dry else "30", "--eval-every", "1000000"]
    tiny = ["--hidden-size", "8", "--embedding-size", "4"] if plan.dry else []
    paper, large = ([*run, "--preset", preset, *tiny] for preset in ("bengio2003", "large"))
    names = ["native", "eager"] if plan.dry else list(backends.REGISTRY)
    words = 20_000 if plan.dry else TOKENS
    for name in names:
        yield training_case(f"bengio2003 {name}", name, plan, paper, generate_words.VOCABULARY + 3, words=words)
    for name in names:
        yield training_case(f"large {name}", name, plan, large, 256)
    sizes = {} if plan.dry else {"context_length": 5, "embedding_size": 60, "hidden_size": 100}
    for vocab_size in (16, 256) if plan.dry else VOCABULARIES:
        name = "native" if plan.device == "cpu" else "triton-op"
        setting = Setting(plan.config(**sizes), vocab_size=vocab_size)
        yield step_case("scale", f"V={vocab_size} {name}", name, setting, (BASELINE,), plan)
    for label, options, vocab_size in (("default", run, 27), ("large", large, 256)) if plan.device == "cpu" else ():
        for processes in (2,) if plan.dry else PROCESSES:
            id = f"{label} eager, {processes} {'process' if processes == 1 else 'processes'}"
            yield training_case(id, BASELINE, plan, options, vocab_size, processes=processes)


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))

"""Larger models and corpora, and several processes, as cases: tokens a second, and memory at its highest.

The corpus of words is made by generate_words.py and kept in the user's cache: 10 million tokens, of which the count
that the preset asks for makes a vocabulary of 17,003. Whole training processes are measured, as their memory is theirs
alone; the time of a step is what training itself reports.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import generate_words, lower_bound
from bench.case import TOLERANCE, Case, Entry, Plan, Skipped, Timer, compared
from bench.steps import Setting, step_case
from mlp_fast import backends, distributed, train
from mlp_fast.cli import Parser, add_config_arguments, config_from, run_main
from mlp_fast.config import Config
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


@dataclass(frozen=True)
class Trained:
    """What a training run tells.

    Attributes:
        milliseconds: a step.
        peak: the memory of its largest process at its highest, in bytes.
        test_loss: at the end.
    """

    milliseconds: float
    peak: int
    test_loss: float


def trained(options: Sequence[str], processes: int = 1) -> Trained:
    """Trains in processes of their own."""
    launcher = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, *launcher, "-m", "bench.scale", folder, "--quiet", "--log-json", str(log), *options]
        process = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if process.returncode:
            told = [line for line in process.stderr.splitlines() if line.startswith("mlp_fast: ")]
            raise Skipped(told[0] if told else f"training ended with exit code {process.returncode}")
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
    id: str,
    plan: Plan,
    settings: Sequence[str],
    config: Config,
    vocab_size: int,
    *,
    words: int | None = None,
    processes: int = 1,
) -> Case:
    """Training processes of one backend, with those of eager in between; on so many generated words, if given.

    Both must end with the same test loss.
    """

    def run(timer: Timer, probes: lower_bound.Probes) -> Entry:
        shape = Shape.of(config, vocab_size)
        reason = backends.unsupported(config.backend, config, shape)
        if reason is not None:
            raise Skipped(reason)
        options = [*settings, "--data", "embedded" if words is None else str(word_corpus(words))]
        runs: list[Trained] = []
        eager: list[Trained] = []

        def work() -> None:
            runs.append(trained([*options, "--backend", config.backend], processes))

        def before() -> None:
            if config.backend != BASELINE or processes > 1:
                eager.append(trained([*options, "--backend", BASELINE]))

        timer(work, before, 1 if plan.dry else 3)
        for mine, theirs in zip(runs, eager, strict=False):
            require(config.backend, "the test loss", abs(mine.test_loss - theirs.test_loss), TOLERANCE)
        peak = max(one.peak for one in runs)
        if plan.device == "cpu" and peak > MEMORY_LIMIT:
            raise NotEquivalent(f"it took {peak / 2**30:.1f} GiB, more than {MEMORY_LIMIT / 2**30:g}")
        entry = compared([one.milliseconds for one in runs], {BASELINE: [one.milliseconds for one in eager]})
        return {
            "backend": config.backend,
            "processes": processes,
            **{"B": config.batch_size, "T": shape.T, "E": shape.E, "H": shape.H, "V": shape.V},
            "threads": max(1, torch.get_num_threads() // processes),
            "per": "step",
            "samples_per_second": 1e3 * config.batch_size / entry["ms"]["median"],
            "peak_bytes": peak,
            **entry,
        }

    return Case("scale", id, run)


def configured(options: Sequence[str]) -> Config:
    """The settings that a training command has by these options."""
    parser = Parser()
    add_config_arguments(parser)
    return config_from(parser.parse_args(options))


def scale_cases(plan: Plan) -> Iterator[Case]:
    """Models and corpora past the toy, and several processes."""
    steps = "4" if plan.dry else "30"
    run = ["--device", plan.device, "--num-steps", steps, "--eval-every", "1000000"]
    tiny = ["--hidden-size", "8", "--embedding-size", "4"] if plan.dry else []
    tokens = 20_000 if plan.dry else TOKENS
    names = ["native", "eager"] if plan.dry else list(backends.REGISTRY)
    paper = [*run, "--preset", "bengio2003", *tiny]
    large = [*run, "--preset", "large", *tiny]
    for name in names:
        config = configured([*paper, "--backend", name])
        yield training_case(f"bengio2003 {name}", plan, paper, config, generate_words.VOCABULARY + 3, words=tokens)
    for name in names:
        yield training_case(f"large {name}", plan, large, configured([*large, "--backend", name]), 256)
    sizes = {} if plan.dry else {"context_length": 5, "embedding_size": 60, "hidden_size": 100}
    for vocab_size in (16, 256) if plan.dry else VOCABULARIES:
        name = "native" if plan.device == "cpu" else "triton-op"
        setting = Setting(plan.config(**sizes), vocab_size=vocab_size)
        yield step_case("scale", f"V={vocab_size} {name}", name, setting, (BASELINE,), plan)
    if plan.device == "cpu":
        for label, options in (("default", run), ("large", large)):
            for processes in (2,) if plan.dry else PROCESSES:
                config = configured([*options, "--backend", BASELINE])
                vocab_size = 256 if label == "large" else 27
                id = f"{label} eager, {processes} {'process' if processes == 1 else 'processes'}"
                yield training_case(id, plan, options, config, vocab_size, processes=processes)


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))

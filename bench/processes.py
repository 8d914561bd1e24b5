"""Cases of whole processes: start-up, training runs, `native` on a busy machine, large models and several processes.

The corpus of words is made by generate_words.py and kept in the user's cache: 10 million tokens, from which the
preset's --min-count makes a vocabulary of 17,003. The time of a step is the one that training reports.
"""

import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import generate_words
from bench.case import TOLERANCE, Case, Entry, Plan, Skipped, Timer, compared, require_supported, timed_beside
from bench.lower_bound import Probes
from bench.steps import REFERENCE, Setting, step_case, step_entry
from mlp_fast import backends, train
from mlp_fast.cli import Parser, add_config_arguments, config_from, run_main
from mlp_fast.corpus import cache as token_cache
from mlp_fast.measure import machine
from mlp_fast.measure.equivalence import BASELINE, NotEquivalent, require
from mlp_fast.model.mlp import Shape

# The test loss after so many steps at the default settings on the embedded corpus, as bench.reference_loop prints it.
TEST_LOSS = {20: 2.921876, 40: 2.766121, 5000: 2.425677, 50000: 2.388702}
RUN_TOLERANCE = 2e-6  # two units of the last printed digit


def require_loss(name: str, steps: int, loss: float) -> None:
    """NotEquivalent where a run at the default settings on the embedded corpus ends with another test loss."""
    require(name, f"the test loss after {steps:,} steps", abs(loss - TEST_LOSS[steps]), RUN_TOLERANCE)


def python(command: Sequence[str], prefix: Sequence[str] = ()) -> str:
    """What a Python process prints; Skipped where it fails, with the line that says why.

    Args:
        prefix: a command that starts it.
    """
    result = subprocess.run([*prefix, sys.executable, *command], capture_output=True, text=True)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"it ended with code {result.returncode}"]
        raise Skipped(next((line for line in lines if line.startswith("mlp_fast: ")), lines[-1]))
    return result.stdout


def process_case(
    group: str, id: str, per: str, commands: Mapping[str, Sequence[str]], rounds: int, steps: int | None = None
) -> Case:
    """A Python process from start to end; the first of `commands` is the case, the others are timed beside it.

    With `steps` every process trains so many, and must end with their test loss.
    """

    def process(name: str) -> None:
        printed = python(commands[name])
        if steps is not None:
            losses = re.findall(r"^test_loss (\S+)", printed, re.MULTILINE)
            require_loss(name, steps, float(losses[-1]) if losses else math.nan)

    def run(timer: Timer, probes: Probes) -> Entry:
        work, *others = commands
        facts = {"command": f"python {' '.join(commands[work])}", "threads": torch.get_num_threads(), "per": per}
        facts |= {} if steps is None else {"steps": steps}
        beside = {other: partial(process, other) for other in others}
        return {**facts, **timed_beside(timer, partial(process, work), beside, rounds)}

    return Case(group, id, run)


def start_up_cases(plan: Plan) -> Iterator[Case]:
    """Processes that end before or after their first step."""
    torch_alone = {"import torch": ("-c", "import torch")}
    train = ("-m", "mlp_fast.train", "--device", plan.device)
    commands: dict[str, Sequence[str]] = {
        **torch_alone,
        "import mlp_fast.train": ("-c", "import mlp_fast.train"),
        "mlp_fast.train --help": (*train, "--help"),
        "mlp_fast.train, one step": (*train, "--num-steps", "1", "--quiet"),
    }
    for id, command in commands.items():
        yield process_case("start-up", id, "process", {id: command, **torch_alone}, 1 if plan.dry else 3)


def run_cases(plan: Plan) -> Iterator[Case]:
    """Training runs as processes from start to end, on the CPU beside the reference loop."""
    short, long = (20, 40) if plan.dry else (5000, 50000)
    for steps in (short, long):
        train = ("-m", "mlp_fast.train", "--device", plan.device, "--num-steps", str(steps))
        commands: dict[str, Sequence[str]] = {"mlp_fast.train": train}
        # Its long run takes more than a minute: without --full tables.py scales the short one and says so.
        if plan.device == "cpu" and (steps == short or plan.full):
            commands[REFERENCE] = ("-m", "bench.reference_loop", "--quiet", "--num-steps", str(steps))
        rounds = 3 if len(commands) > 1 and not plan.dry else 1
        yield process_case("run", f"{steps} steps", "run", commands, rounds, steps=steps)


# --- training processes -----------------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """A training run: milliseconds a step, the largest memory of one of its processes in bytes, its test loss."""

    milliseconds: float
    peak: int
    test_loss: float


def trained(options: Sequence[str], processes: int = 1, prefix: Sequence[str] = ()) -> Trained:
    """Trains in processes of their own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = ["-m", "bench.processes", "--quiet", "--log-json", str(log), *options]
        printed = python([*(launcher if processes > 1 else []), *command], prefix)
        events = logged(log)
    peaks = [int(size) for size in re.findall(r"^peak (\d+)$", printed, re.MULTILINE)]
    return Trained(events["eval"][-1]["ms_per_step"], max(peaks), events["test"][0]["loss"])


def logged(log: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of a run's --log-json by their event."""
    events: dict[str, list[dict[str, Any]]] = {}
    for event in map(json.loads, log.read_text().splitlines()):
        events.setdefault(event["event"], []).append(event)
    return events


def main(argv: Sequence[str]) -> int:
    """A process of a measured run: mlp_fast.train, then a line with its own peak of memory.

    What the system reports of a child that has ended includes the memory of the process that started it.
    """
    code = train.main(argv)
    print(f"peak {machine.resident_peak()}")
    return code


# --- on a busy machine ------------------------------------------------------------------------------------------------

THREADS = 2
Prefix = AbstractContextManager[Sequence[str]]  # a command that starts a process, while something lasts


@contextlib.contextmanager
def one_processor() -> Iterator[Sequence[str]]:
    """Makes a control group with the time of one processor for a block; yields the prefix of a command in it."""
    root, limits = Path("/sys/fs/cgroup"), {"cpu.max": "100000 100000"}
    if not (root / "cgroup.controllers").exists():  # version 1 of control groups
        root, limits = root / "cpu", dict.fromkeys(("cpu.cfs_period_us", "cpu.cfs_quota_us"), "100000")
    folder = root / f"mlp_fast-{os.getpid()}"
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir()
            stack.callback(folder.rmdir)
            for name, limit in limits.items():
                with open(folder / name, "r+") as file:  # does not make it
                    file.write(limit)
        except OSError:
            raise Skipped("no control group can be made here; that takes root, and groups of processors") from None
        yield "sh", "-c", f'echo $$ > {folder}/cgroup.procs && exec "$@"', "sh"


def busy_cases(plan: Plan) -> Iterator[Case]:
    """A step on two threads: alone, two runs at once, two threads on one core, two with the time of one processor."""
    steps = "20" if plan.dry else "10000"
    options = ("--backend", "native", "--threads", str(THREADS), "--num-steps", steps, "--eval-every", steps)

    def run(processes: int, prefixed: Callable[[], Prefix], timer: Timer, probes: Probes) -> Entry:
        samples: list[float] = []

        def at_once() -> None:
            runs = pool.map(lambda _: trained(options, prefix=prefix), range(processes))
            samples.extend(one.milliseconds for one in runs)

        with ThreadPoolExecutor(processes) as pool, prefixed() as prefix:
            timer(at_once, lambda: None, 1 if plan.dry else 3)
        facts = {"backend": "native", "threads": THREADS, "processes": processes, "per": "step"}
        return facts | compared(samples, {})

    def no_prefix() -> Prefix:
        return nullcontext(())

    def one_core() -> Prefix:
        if shutil.which("taskset") is None:
            raise Skipped("the program taskset was not found; it is part of util-linux")
        return nullcontext(("taskset", "--cpu-list", str(min(os.sched_getaffinity(0)))))

    if plan.device == "cpu":
        yield Case("busy", "alone", partial(run, 1, no_prefix))
        yield Case("busy", "two at once", partial(run, 2, no_prefix))
        yield Case("busy", "one core", partial(run, 1, one_core))
        yield Case("busy", "the time of one processor", partial(run, 1, one_processor))


# --- larger models and corpora, several processes ---------------------------------------------------------------------

TOKENS = 10_000_000
MEMORY_LIMIT = 4 * 2**30  # of a CPU process that trains on them
VOCABULARIES = (256, 1024, 4096, 16384, 65536)
PROCESSES = (1, 2, 4)


def word_corpus(tokens: int) -> Path:
    """The folder of the generated corpus of so many tokens, which is made once."""
    folder = token_cache.cache_folder() / f"generated-words-{tokens}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            generate_words.generate(Path(temporary) / "words", tokens)
            (Path(temporary) / "words").rename(folder)
    return folder


def training_case(
    id: str, backend: str, plan: Plan, options: Sequence[str], vocab_size: int, *, words: int = 0, processes: int = 1
) -> Case:
    """Training processes of one backend beside one process of eager, which must end with the same test loss.

    Args:
        words: tokens of the generated corpus; 0 for the embedded one.
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
        times = compared([one.milliseconds for one in runs], {BASELINE: [one.milliseconds for one in eager]})
        threads = max(1, torch.get_num_threads() // processes)
        return step_entry(backend, config, shape, times, processes=processes, threads=threads, peak_bytes=peak)

    return Case("scale", id, run)


def scale_cases(plan: Plan) -> Iterator[Case]:
    """Large models and corpora, and several processes."""
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

"""`python -m mlp_fast.compare`: backends side by side: same seed, same batches, their rounds interleaved.

Every backend trains the same N steps twice. Each pass is cut into rounds, and the rounds of all backends are taken in
turns; eager is always among them, as the baseline. A backend that does not compute the model gets no number; timing.py
says how that is decided.
"""

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mlp_fast import backends
from mlp_fast.backends.base import Backend
from mlp_fast.cli import Parser, add_config_arguments, config_from, run_main
from mlp_fast.config import RUN_ONLY, Config
from mlp_fast.errors import UserError
from mlp_fast.files import check_writable
from mlp_fast.measure import machine
from mlp_fast.measure.timing import BASELINE, Contender, Judge, NotEquivalent, Spread, measure, subject
from mlp_fast.model.mlp import Shape
from mlp_fast.model.state import TrainState
from mlp_fast.model.windows import Tape
from mlp_fast.run.plot import check_plot, drawable

PASSES = 2  # the second tells whether the first is repeatable
ROUNDS = 10  # per pass
LEFT_OUT = ("backend", *RUN_ONLY)


@dataclass(frozen=True)
class Result:
    """One line of the comparison.

    Attributes:
        backend: its name.
        ms_per_step: over all rounds; None where the backend was refused.
        x_eager: eager's median over this one's.
        compile_seconds: building the backend and its first step, compilation included.
        peak_bytes: the rise of memory from before the backend was built until after its first steps, compiler
            included (machine.PeakMemory says what is counted).
        loss_difference: the largest difference of a batch loss from eager's over the N steps, in nats.
        repeatable: whether both passes gave the same bits in every loss and in the state at the end.
        refused: why there are no numbers.
    """

    backend: str
    compile_seconds: float
    peak_bytes: int
    ms_per_step: Spread | None = None
    x_eager: float | None = None
    loss_difference: float | None = None
    repeatable: bool | None = None
    refused: str | None = None


class _Rival:
    """A backend in the comparison: its losses by pass, and its state at the end of each."""

    def __init__(self, name: str, config: Config, shape: Shape, tape: Tape, initial: TrainState) -> None:
        config = dataclasses.replace(config, backend=name)
        start = time.perf_counter()
        with machine.PeakMemory(backends.device_of(backends.backend_class(name), config.device)) as memory:
            self.backend: Backend = backends.create(config, shape, tape, initial)
            self.backend.prepare()
        self.name = name
        self.compile_seconds = time.perf_counter() - start
        self.peak_bytes = memory.bytes
        self.initial = initial
        self.losses: list[list[Tensor]] = []
        self.states: list[TrainState] = []
        self.refused: str | None = None

    def begin_pass(self) -> None:
        self.backend.load(self.initial)
        self.losses.append([])

    def end_pass(self) -> None:
        self.states.append(self.backend.state())

    def settle(self, losses: Tensor) -> None:
        self.losses[-1].append(losses.cpu().clone())

    def pass_losses(self, index: int) -> Tensor:
        return torch.cat(self.losses[index])

    @property
    def repeatable(self) -> bool:
        first, second = self.states
        return torch.equal(self.pass_losses(0), self.pass_losses(1)) and all(
            torch.equal(tensor, getattr(second, part)[name])
            for part in ("parameters", "exp_avg", "exp_avg_sq")
            for name, tensor in getattr(first, part).items()
        )


def compare(names: Sequence[str], config: Config, shape: Shape, tape: Tape) -> list[Result]:
    """Compares backends over config.num_steps steps.

    Args:
        names: backends, not aliases; eager is added in front where it is missing.
        config: the settings all of them share; its `backend` is not looked at.
        shape: the model's sizes.
        tape: the training split, on the CPU.
    """
    names = list(names) if BASELINE in names else [BASELINE, *names]
    judge = Judge(config, shape, tape)
    rivals = [_Rival(name, config, shape, tape, judge.initial) for name in names]
    for rival in rivals:
        try:
            judge.check(rival.backend)
        except NotEquivalent as refusal:
            rival.refused = str(refusal)
    timed = [rival for rival in rivals if rival.refused is None]
    contenders = [Contender.of(rival.backend, rival.settle) for rival in timed]
    samples: dict[str, list[float]] = {rival.name: [] for rival in timed}
    for _ in range(PASSES):
        for rival in timed:
            rival.begin_pass()
        if contenders:
            for name, times in measure(contenders, cut(config.num_steps, ROUNDS)).items():
                samples[name] += times
        for rival in timed:
            rival.end_pass()
    return [_result(rival, rivals[names.index(BASELINE)], samples) for rival in rivals]


def cut(steps: int, rounds: int) -> list[int]:
    """Steps cut into at most so many rounds, as equal as can be."""
    rounds = min(rounds, steps)
    return [steps // rounds + (i < steps % rounds) for i in range(rounds)]


def _result(rival: _Rival, baseline: _Rival, samples: dict[str, list[float]]) -> Result:
    result = Result(rival.name, rival.compile_seconds, rival.peak_bytes, refused=rival.refused)
    if rival.refused is not None:
        return result
    spread = Spread.of(samples[rival.name])
    result = dataclasses.replace(result, ms_per_step=spread, repeatable=rival.repeatable)
    if baseline.refused is not None:
        return result
    difference = (rival.pass_losses(0).double() - baseline.pass_losses(0).double()).abs().max().item()
    ratio = Spread.of(samples[baseline.name]).median / spread.median
    return dataclasses.replace(result, x_eager=ratio, loss_difference=difference)


def table(results: Sequence[Result]) -> str:
    """The comparison as a Markdown table, and under it why a backend has no number."""
    lines = [
        "| backend | ms/step, median | fastest..slowest round | x eager | first step, s | peak memory, MB "
        "| largest loss difference | repeatable |",
        "| --- | --: | --: | --: | --: | --: | --: | --- |",
    ]
    for result in results:
        cells = ["not equivalent", "-", "-"]
        if result.ms_per_step is not None:
            spread = result.ms_per_step
            cells = [
                f"{spread.median:.4f}",
                f"{spread.min:.4f}..{spread.max:.4f}",
                "-" if result.x_eager is None else f"{result.x_eager:.2f}",
            ]
        difference = "-" if result.loss_difference is None else f"{result.loss_difference:.1e}"
        repeatable = {None: "-", True: "bit for bit", False: "no"}[result.repeatable]
        row = [
            result.backend,
            *cells,
            f"{result.compile_seconds:.2f}",
            f"{result.peak_bytes / 1e6:.1f}",
            difference,
            repeatable,
        ]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join([*lines, *(f"no number: {result.refused}" for result in results if result.refused)])


def draw(path: str, results: Sequence[Result], title: str) -> None:
    """Draws ms/step as bars, with the fastest and the slowest round."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    shown = [(result.backend, result.ms_per_step) for result in reversed(results) if result.ms_per_step is not None]
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.5 * len(shown)), layout="constrained")
    spreads = [spread for _, spread in shown]
    bars = axes.barh(
        [name for name, _ in shown],
        [spread.median for spread in spreads],
        xerr=[[s.median - s.min for s in spreads], [s.max - s.median for s in spreads]],
        capsize=3,
    )
    axes.bar_label(bars, [f" {spread.median:.3g}" for spread in spreads])
    axes.set_title(drawable(title), parse_math=False)
    axes.set(xlabel="ms per step (median; whiskers: fastest and slowest round)")
    try:
        figure.savefig(path)
    except OSError as error:
        raise UserError(f"--plot {path}: cannot write it ({error.strerror})") from None
    finally:
        plt.close(figure)


def chosen(text: str | None, config: Config, shape: Shape) -> list[str]:
    """--backends as names: aliases resolved, none twice; without a text all that this machine has.

    Raises:
        UserError: a name is unknown, or a backend that was asked for is unavailable.
    """
    if text is None:
        return [name for name in backends.REGISTRY if backends.obstacle(name, config, shape) is None]
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise UserError("--backends names none; give some of " + ", ".join(backends.names()))
    resolved = [backends.resolve(dataclasses.replace(config, backend=name), shape) for name in names]
    return list(dict.fromkeys(resolved))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 1 where a backend was refused."""
    parser = Parser(prog="python -m mlp_fast.compare", description=__doc__)
    parser.add_argument("--backends", metavar="A,B,C", help="whom to compare (default: all that this machine has)")
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw the times (PNG, SVG or PDF)")
    add_config_arguments(parser, leave_out=LEFT_OUT)
    parser.set_defaults(num_steps=500)
    arguments = parser.parse_args(argv)
    asked, json_file, plot_file = arguments.backends, arguments.json, arguments.plot
    arguments.plot = None  # the file of this command, not of a training run
    config = config_from(arguments)
    for name in (asked or "").split(","):
        if name.strip():
            backends.check(dataclasses.replace(config, backend=name.strip()))
    if plot_file is not None:
        check_plot(plot_file)
    if json_file is not None:
        check_writable(Path(json_file), "--json")
    shape, tape = subject(config)
    names = chosen(asked, config, shape)
    results = compare(names, config, shape, tape)
    where = machine.facts(backends.device_of(backends.backend_class(names[0]), config.device))
    title = (
        f"{where['device']} | torch {where['versions']['torch']} | B={config.batch_size} T={shape.T} E={shape.E} "
        f"H={shape.H} V={shape.V} {config.precision} | {config.num_steps} steps, twice"
    )
    print(f"{title}\n\n{table(results)}")
    if json_file is not None:
        record = {**where, "config": dataclasses.asdict(config), "results": [dataclasses.asdict(r) for r in results]}
        _write(json_file, json.dumps(record, indent=1) + "\n")
    if plot_file is not None:
        draw(plot_file, results, title)
    return 1 if any(result.refused for result in results) else 0


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {path}: cannot write it ({error.strerror})") from None


if __name__ == "__main__":
    run_main(main)

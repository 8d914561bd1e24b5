"""`python -m mlp_fast.train`: trains the model and prints what the reference prints."""

import argparse
import contextlib
import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mlp_fast import backends, distributed
from mlp_fast.backends.base import Backend
from mlp_fast.cli import Parser, add_config_arguments, config_from, run_main
from mlp_fast.config import Config
from mlp_fast.corpus.load import Corpus, check_sizes, load_for
from mlp_fast.corpus.tokenizer import Words
from mlp_fast.errors import EXIT_NON_FINITE, EXIT_NOT_SAVED, UserError, report
from mlp_fast.measure import machine
from mlp_fast.model.mlp import Shape
from mlp_fast.model.sampling import SAMPLE_LENGTH, SAMPLE_SEED, continuation, default_prompt
from mlp_fast.model.schedule import learning_rate
from mlp_fast.model.state import TrainState
from mlp_fast.model.windows import TRAIN_EVAL_BATCHES, Tape, evaluated_positions, evaluated_windows
from mlp_fast.run import checkpoint
from mlp_fast.run.checkpoint import Checkpoint
from mlp_fast.run.folder import RunFolder, same_folder
from mlp_fast.run.interrupt import Interrupt, Interrupted
from mlp_fast.run.log import Evaluation, RunLog
from mlp_fast.run.plot import check_plot, draw_losses
from mlp_fast.run.resume import check_same_model, check_same_run, initialised_config, resume_command, resumed_config

# Work asked of a backend at a time, so that signals are answered: seconds, and the steps to begin with.
RESPONSE_TIME = {"cpu": 0.05, "cuda": 0.5}
FIRST_PIECE = {"cpu": 1, "cuda": 1000}


@dataclass(frozen=True)
class Result:
    """What a run ended with; losses in nats, times in seconds.

    `evaluations` are those since the start or resumption, `unsaved` what could not be written, in words.
    """

    state: TrainState
    evaluations: list[Evaluation]
    test_loss: float
    sample: str
    training_seconds: float
    evaluation_seconds: float
    prepare_seconds: float
    unsaved: list[str]


class NonFiniteLoss(UserError):
    """Training went wrong: a loss, or the state, is not finite."""

    exit_code = EXIT_NON_FINITE


class Stopwatch:
    """Sums the seconds spent inside its `with` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.seconds += time.perf_counter() - self._start


class Trainer:
    """One run: text -> tape -> backend -> state -> log and checkpoints.

    Args:
        config: the settings.
        corpus: the three splits.
        log: where to report.
        folder: where to save; None saves nothing.
        start: the checkpoint to go on from; at step 0, with another run's parameters, for --init-from.
        interrupt: what may ask the run to end early.
    """

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        log: RunLog,
        folder: RunFolder | None = None,
        start: Checkpoint | None = None,
        interrupt: Interrupt | None = None,
    ) -> None:
        self.shape = checked_shape(config, corpus)
        self.world = distributed.world()
        self.config, self.corpus, self.log, self.folder = config, corpus, log, folder
        self.interrupt = interrupt or Interrupt()
        T, B = config.context_length, config.batch_size
        self.tapes = {"train": Tape(corpus.train, T), "val": Tape(corpus.val, T), "test": Tape(corpus.test, T)}
        self.beginning = tuple(corpus.train[:T].tolist())
        state = start.state if start else TrainState.initial(self.shape, config.seed)
        self.first_step = self.step = state.step
        self.losses = start.losses if start else {}  # of the latest evaluation, as a checkpoint keeps them
        self.backend = backends.create(config, self.shape, self.tapes["train"], state)
        if config.interpret:
            products = "" if config.precision == "fp32" else f"; its products are fp32, not {config.precision}"
            log.warning(
                f"--interpret: Triton's interpreter runs the kernels on the CPU, to check them, not for speed{products}"
            )
        limits = {"train": TRAIN_EVAL_BATCHES, "val": None, "test": None}
        self.windows = {
            split: evaluated_windows(tape, B, limits[split]).to(self.backend.device)
            for split, tape in self.tapes.items()
        }
        self.preparing, self.training, self.evaluating = Stopwatch(), Stopwatch(), Stopwatch()
        self.piece = FIRST_PIECE[self.backend.device.type]
        self.timed_from = (self.step, 0.0)  # step and training seconds at the last evaluation
        self.signum = 0  # of the signal that ends the run
        self.non_finite: int | None = None  # the first step known to have gone wrong
        self.warned = False

    def run(self) -> Result:
        """Trains to the end; then samples and measures the test loss."""
        config, log = self.config, self.log
        log.config(
            config,
            chosen_backend=self.backend.name,
            chosen_device=self.backend.device.type,
            parameters=self.shape.num_parameters,
            floor=self.floor("val"),
        )
        log.message(self._title(backends.passed_over(config, self.shape, self.tapes["train"], type(self.backend))))
        vocabulary = self.corpus.vocabulary
        if isinstance(vocabulary, Words) and vocabulary.unspaced:
            log.warning(
                "--tokens word takes a run of letters as one word, and most of this text has no spaces between words; "
                "--tokens char suits it better"
            )
        if config.resume is None and config.init_from is not None:
            log.message(f"starting from the model in {config.init_from}")
        if config.resume is not None:
            log.message(f"going on after {self.first_step} of {config.last_step} steps, from {config.resume}")
            log.event("resume", step=self.first_step)
        if self.step < config.last_step:
            with self.preparing:
                self.backend.prepare()
        with self.interrupt.deferred():
            self._train()
        with self.evaluating:
            prompt = default_prompt(self.corpus.vocabulary, self.shape.T, self.beginning)
            drawn = self.backend.sample(prompt, SAMPLE_LENGTH, SAMPLE_SEED)
            text = continuation(self.corpus.vocabulary, prompt, drawn)
            test_loss = self.backend.shared_mean_loss(self.windows["test"])
        log.sample(self.corpus.vocabulary.decode(prompt), text)
        log.test(test_loss)
        if self.folder is not None:
            with self.log.noting_failure("the test loss"):
                self.folder.note(self.step, test_loss=test_loss)
        return Result(
            self.backend.state(),
            log.evaluations,
            test_loss,
            text,
            self.training.seconds,
            self.evaluating.seconds,
            self.preparing.seconds,
            log.unsaved,
        )

    def stopped(self) -> str:
        """What became of a run that was asked to end, in words."""
        done = f"after {self.step} of {self.config.last_step} steps"
        if self.folder is None:
            return f"{done}; nothing is saved, for want of --out"
        newest = self.folder.newest
        if newest is None:
            return f"{done}; " + ("what was saved is gone" if self.folder.entries else "nothing is saved yet")
        return f"{done}; saved: {newest}; go on with: {resume_command(self.config, str(self.folder.path))}"

    def floor(self, split: str) -> float | None:
        """The mean -ln P of the split's evaluated targets under the process that made the corpus, where it is known."""
        if self.corpus.cost is None:
            return None
        targets = evaluated_positions(self.tapes[split], self.config.batch_size) + self.shape.T
        return float(self.corpus.cost[split][targets.numpy()].mean())

    def summary(self, result: Result) -> str:
        """The run in two lines: time, then losses."""
        steps = self.step - self.first_step
        wall = result.training_seconds + result.evaluation_seconds + result.prepare_seconds
        time_line = (
            f"{steps} steps in {wall:.2f} s: training {result.training_seconds:.2f} s "
            f"({1e3 * result.training_seconds / max(steps, 1):.4f} ms/step), "
            f"evaluation {result.evaluation_seconds:.2f} s, set-up and compilation {result.prepare_seconds:.2f} s"
        )
        losses = f"test_loss {result.test_loss:.6f}"
        if "val_loss" in self.losses:
            losses = f"val_loss {self.losses['val_loss']:.6f} | {losses}"
        val_floor, test_floor = self.floor("val"), self.floor("test")
        if val_floor is not None and test_floor is not None:
            losses += f" | floor val {val_floor:.6f}, test {test_floor:.6f}"
        return f"{time_line}\n{losses}"

    def _title(self, note: str = "") -> str:
        processes = f", in {self.world.size} processes" if self.world.size > 1 else ""
        title = (
            f"backend {self.backend.name}{note} on {describe_device(self.backend)}{processes} | "
            f"{self.corpus.name} corpus, {len(self.corpus.train)} training tokens | "
            f"{self.shape.num_parameters} parameters"
        )
        floor = self.floor("val")
        return title if floor is None else f"{title} | floor of val_loss {floor:.6f}"

    def _train(self) -> None:
        """Steps, evaluations and checkpoints until the last step, or until a signal comes."""
        while True:
            if not self.signum and self._evaluates_at(self.step):
                self._evaluate()
            if self.signum:
                self._save()
                self.world.meet()  # torchrun ends all processes once one has ended: not before rank 0 has saved
                raise Interrupted(self.signum)
            if self._saves_at(self.step):
                self._save()
            self.world.meet()  # rank 0 may take longer to write than a step may wait
            if self.step == self.config.last_step:
                with self.world.agreed():  # rank 0 alone has looked at the whole state, to save it
                    self._require_finite()
                return
            self._advance(self._next_stop())

    def _evaluates_at(self, step: int) -> bool:
        if step == self.config.last_step or self.losses.get("evaluated_at") == step:
            return False
        return step % self.config.eval_every == 0 or step == self.config.num_steps - 1

    def _saves_at(self, step: int) -> bool:
        if step == self.config.last_step:
            return True
        every = self.config.checkpoint_every
        if every is None or step % every != 0:
            return False
        # A run that stopped before the evaluation of this step left a checkpoint without its losses.
        return step > self.first_step or self._saved() is not None

    def _saved(self) -> dict[str, Any] | None:
        """What the folder knows of this step's checkpoint, where that is its newest."""
        newest = self.folder.newest if self.folder is not None else None
        if self.folder is None or newest is None or newest.name != checkpoint.file_name(self.step):
            return None
        return self.folder.entries[newest.name]

    def _next_stop(self) -> int:
        """The first step after this one at which something happens: an evaluation, a checkpoint, or the end."""
        periods = [self.config.eval_every, self.config.checkpoint_every or self.config.eval_every]
        regular = [(self.step // period + 1) * period for period in periods]
        single = [self.config.num_steps - 1, self.config.last_step]
        return min(stop for stop in [*regular, *single] if stop > self.step)

    def _evaluate(self) -> None:
        """Evaluates and logs; a signal ends it without a result, so that a run that goes on does it again."""
        steps, seconds = self.step - self.timed_from[0], self.training.seconds - self.timed_from[1]
        self.timed_from = self.step, self.training.seconds
        ms_per_step = 1e3 * seconds / steps if steps else None
        # Several processes must all go by the same answer, and a GPU, best left alone, has done soon.
        alone_on_cpu = self.world.size == 1 and self.backend.device.type == "cpu"
        try:
            with self.evaluating, self.interrupt.at_once() if alone_on_cpu else contextlib.nullcontext():
                train_loss = self.backend.shared_mean_loss(self.windows["train"])
                val_loss = self.backend.shared_mean_loss(self.windows["val"])
        except Interrupted:
            self.signum = self.interrupt.signum
            return
        lr = learning_rate(self.step, self.config)
        self.log.evaluation(Evaluation(self.step, train_loss, val_loss, lr, ms_per_step))
        self.losses = {"evaluated_at": self.step, "train_loss": train_loss, "val_loss": val_loss}
        if self.non_finite is None and not (math.isfinite(train_loss) and math.isfinite(val_loss)):
            self.non_finite = self.step
        self._require_finite()

    def _advance(self, end: int) -> None:
        """Trains up to step `end`, or less far if a signal comes."""
        while self.step < end and not self.signum:
            count = min(self.piece, end - self.step)
            start = time.perf_counter()
            with self.training:
                losses = self.backend.advance(count)
                self.backend.synchronize()
            per_step = self.world.max((time.perf_counter() - start) / count)
            self.piece = max(1, min(2 * self.piece, int(RESPONSE_TIME[self.backend.device.type] / per_step)))
            if self.non_finite is None and not math.isfinite(losses.sum().item()):
                wrong = torch.isfinite(losses).logical_not_().nonzero()
                self.non_finite = self.step + int(wrong[0]) if len(wrong) else None
            self.step += count
            if self.log.shows_progress:
                self.log.progress(self.step, float(losses[-1]), 1e3 * per_step)
            self.signum = int(self.world.max(self.interrupt.signum))  # all ranks go by the same answer

    def _require_finite(self) -> None:
        """Raises NonFiniteLoss once something is known to have gone wrong, unless --on-nan continue."""
        if self.non_finite is None or self.warned:
            return
        self.log.event("non_finite", step=self.non_finite)
        if self.config.on_nan == "continue":
            self.log.warning(f"the loss is not finite from step {self.non_finite} on")
            self.warned = True
            return
        newest = self.folder.newest if self.folder else None
        saved = f"the last good checkpoint is {newest}" if newest else "there is no checkpoint"
        raise NonFiniteLoss(
            f"the loss is not finite from step {self.non_finite} on, seen at step {self.step}; {saved}; "
            f"try a smaller --learning-rate than {self.config.learning_rate:g}, or --on-nan continue"
        )

    def _save(self) -> None:
        """Saves a checkpoint if there is a folder, it does not hold the same already, and the state is finite."""
        saved = self._saved()
        if self.folder is None or (saved and saved.get("evaluated_at") == self.losses.get("evaluated_at")):
            return
        state = self.backend.state()
        kinds = (state.parameters, state.exp_avg, state.exp_avg_sq)
        if not all(bool(torch.isfinite(tensor).all()) for tensors in kinds for tensor in tensors.values()):
            self.non_finite = self.step if self.non_finite is None else self.non_finite
            self.log.unsaved_because(f"the checkpoint of step {self.step} (it is not finite; the last good one stays)")
            return
        losses = self.losses if all(math.isfinite(value) for value in self.losses.values()) else {}
        vocabulary, fingerprint = self.corpus.vocabulary, self.corpus.fingerprint
        new = Checkpoint(state, self.config, vocabulary, fingerprint, losses, self.beginning)
        with self.log.noting_failure(f"the checkpoint of step {self.step}"):
            path = self.folder.save(new)
            self.log.event("checkpoint", step=self.step, file=str(path), best=self.folder.best)


def checked_shape(config: Config, corpus: Corpus) -> Shape:
    """The sizes of a run's model; UserError where the corpus, this machine or the backend forbids the run."""
    T, B, ranks = config.context_length, config.batch_size, distributed.world().size
    check_sizes(corpus, T, B)
    if ranks > B:
        raise UserError(f"--batch-size {B} is less than the {ranks} processes share")
    shape = Shape(len(corpus.vocabulary), T, config.embedding_size, config.hidden_size, config.direct)
    check_memory(shape, B)
    backends.resolve(config, shape, Tape(corpus.train, T))
    return shape


def check_memory(shape: Shape, batch_size: int) -> None:
    """UserError where a model of these sizes is larger than this process's memory, before any of it is taken.

    What is counted is the least that any backend needs: parameters, two moments, gradients, the initial values, and one
    batch's embeddings, hidden units and their gradients, in float32.
    """
    numbers = 5 * shape.num_parameters + 2 * batch_size * (shape.T * shape.E + shape.H)
    memory = machine.memory()
    if memory is not None and 4 * numbers > memory:
        raise UserError(
            f"a model of {shape.num_parameters:,} parameters in batches of {batch_size:,} needs at least "
            f"{4 * numbers / 2**30:,.1f} GiB of memory, of which this process may have {memory / 2**30:,.1f}; "
            "choose smaller sizes"
        )


def describe_device(backend: Backend) -> str:
    """The device in words: the GPU's name, or the CPU with the number of threads."""
    if backend.device.type == "cuda":
        return torch.cuda.get_device_name(backend.device)
    return f"cpu, {torch.get_num_threads()} threads"


def train(config: Config, interrupt: Interrupt | None = None) -> Result:
    """Runs a training run as the command does, files and output included; within distributed.joined(), rank 0's.

    Args:
        config: the settings; with `resume` they must fit the checkpoint (see resume.resumed_config).
        interrupt: what may end the run early, by Interrupted.

    Raises:
        UserError: what is asked for cannot be done. NonFiniteLoss: see --on-nan.
    """
    world = distributed.world()
    if world.rank:
        config = dataclasses.replace(config, out=None, plot=None, log_json=None, quiet=True)
    # Whatever the caller is in: training needs gradients.
    with contextlib.ExitStack() as stack, torch.inference_mode(False), torch.enable_grad():
        with world.agreed():
            backends.check(config)
            if config.checkpoint_every is not None and config.out is None and not world.rank:
                raise UserError("--checkpoint-every needs a folder to save into; add --out DIR")
            if config.plot is not None:
                check_plot(config.plot)
            corpus = _corpus(config)
            checked_shape(config, corpus)  # before a folder is made or a file is opened
            folder = stack.enter_context(RunFolder(Path(config.out), config.keep)) if config.out is not None else None
            start = _start(config, corpus, folder)
            log = stack.enter_context(contextlib.closing(RunLog(config, start.state.step if start else 0)))
            trainer = Trainer(config, corpus, log, folder, start, interrupt)
        try:
            result = trainer.run()
            log.message(trainer.summary(result))
            if config.plot is not None:
                with log.noting_failure(f"--plot {config.plot}"):
                    draw_losses(config.plot, result.evaluations, trainer._title(), trainer.floor("val"))
        except Interrupted as stop:
            stop.report += f" {trainer.stopped()}"
            raise
    return result


def _corpus(config: Config) -> Corpus:
    """The run's corpus; where a resumed run's cannot be had, the error says what else may be done."""
    vocabulary = None
    if config.init_from is not None:
        vocabulary = checkpoint.load(Path(config.resume or config.init_from)).vocabulary
    try:
        return load_for(config, vocabulary)
    except UserError as error:
        if config.resume is None:
            raise
        raise UserError(f"{error}; if the corpus of {config.resume} lies elsewhere, say where by --data") from None


def _start(config: Config, corpus: Corpus, folder: RunFolder | None) -> Checkpoint | None:
    """The checkpoint that the run starts from, if any; and the folder made ready for what follows."""
    path = start = None
    if config.resume is None and config.init_from is not None:
        model = checkpoint.load(Path(config.init_from))
        check_same_model(config, model.config)
        state = TrainState.of(model.state.parameters)
        start = Checkpoint(state, config, corpus.vocabulary, corpus.fingerprint)
    if config.resume is not None:
        path = checkpoint.locate(Path(config.resume))
        start = checkpoint.load(path)
        check_same_run(dataclasses.asdict(config), start.config, config.resume)
        if config.last_step < start.state.step:
            raise UserError(
                f"--stop-after {config.last_step}: {config.resume} has done {start.state.step} steps already"
            )
        if corpus.fingerprint != start.fingerprint:
            raise UserError(
                f"--data {config.data} is not the corpus that the run in {config.resume} was trained on; "
                "give --data the name or place of that one"
            )
    if folder is not None:
        in_place = path is not None and same_folder(folder.path, path.parent)
        for damaged in folder.begin(path if in_place else None):
            report(f"a damaged checkpoint was set aside: {damaged}")
    return start


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(prog="python -m mlp_fast.train", description=__doc__)
    parser.add_argument("--list-backends", action="store_true", help="show every backend, available or why not")
    add_config_arguments(parser)
    try:
        with Interrupt() as interrupt, distributed.joined() as world:
            with world.agreed():
                arguments: argparse.Namespace = parser.parse_args(argv)
                if arguments.resume is not None:
                    config = resumed_config(parser.given(argv))
                elif arguments.init_from is not None:
                    config = initialised_config(parser.given(argv))
                else:
                    config = config_from(arguments)
            if arguments.list_backends:
                if world.rank == 0:
                    print(backends.listing(config))
                return 0
            unsaved = train(config, interrupt).unsaved
    except Interrupted as stop:
        if distributed.launched_rank() == 0:
            report(stop.report)
        return stop.exit_code
    if unsaved:
        report(
            f"finished, but could not save {unsaved[-1]}" + (f", nor {len(unsaved) - 1} more" if unsaved[1:] else "")
        )
        return EXIT_NOT_SAVED
    return 0


if __name__ == "__main__":
    run_main(main)

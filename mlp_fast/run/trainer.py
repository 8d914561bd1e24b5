"""A training run: evaluate, save, advance, until the last step; then a sample and the test loss."""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from mlp_fast import backends, distributed
from mlp_fast.backends import Choice
from mlp_fast.config import Config
from mlp_fast.corpus.load import Corpus, check_sizes
from mlp_fast.corpus.prompt import continuation, default_prompt
from mlp_fast.errors import EXIT_NON_FINITE, Interrupted, UserError
from mlp_fast.measure import machine
from mlp_fast.model.mlp import Shape
from mlp_fast.model.sampling import SAMPLE_LENGTH, SAMPLE_SEED
from mlp_fast.model.schedule import learning_rate
from mlp_fast.model.state import TrainState
from mlp_fast.model.windows import Tape, evaluated_positions, windows_of_splits
from mlp_fast.run.checkpoint import Checkpoint
from mlp_fast.run.folder import RunFolder
from mlp_fast.run.interrupt import Interrupt
from mlp_fast.run.log import Evaluation, RunLog

# How long a backend computes between two looks at the signals: seconds, and the steps to begin with.
RESPONSE_TIME = {"cpu": 0.05, "cuda": 0.5}
FIRST_PIECE = {"cpu": 1, "cuda": 1000}


@dataclass(frozen=True)
class Result:
    """The result of a run; losses in nats, times in seconds.

    `evaluations` are those since the start or resumption, `unsaved` what could not be written, in words.
    """

    state: TrainState
    evaluations: list[Evaluation]
    test_loss: float
    sample: str
    unsaved: list[str]
    training_seconds: float
    evaluation_seconds: float
    prepare_seconds: float


class NonFiniteLoss(UserError):
    """A loss, or the state, is not finite."""

    exit_code = EXIT_NON_FINITE


class Plan(NamedTuple):
    """What a run computes: its settings and corpus, and, as they demand, the model's sizes and the backend."""

    config: Config
    corpus: Corpus
    shape: Shape
    choice: Choice

    @classmethod
    def of(cls, config: Config, corpus: Corpus) -> "Plan":
        """The plan of a run; UserError where the corpus, this machine or the backend forbids it."""
        T, B, ranks = config.context_length, config.batch_size, distributed.world().size
        check_sizes(corpus, T, B)
        if ranks > B:
            raise UserError(f"--batch-size {B} is less than the {ranks} processes share")
        shape = Shape.of(config, len(corpus.vocabulary))
        check_memory(shape, B)
        return cls(config, corpus, shape, backends.resolve(config, shape, Tape(corpus.train, T)))


class Trainer:
    """One run: a backend trained on a corpus, with its log and its checkpoints.

    Args:
        folder: where to save; None saves nothing.
        start: the checkpoint to go on from; at step 0, with another run's parameters, for --init-from.
        interrupt: what may ask the run to end early.
    """

    def __init__(
        self,
        plan: Plan,
        log: RunLog,
        folder: RunFolder | None = None,
        start: Checkpoint | None = None,
        interrupt: Interrupt | None = None,
    ) -> None:
        config, corpus, shape, choice = plan
        self.config, self.corpus, self.shape, self.choice = config, corpus, shape, choice
        self.log, self.folder, self.interrupt = log, folder, interrupt or Interrupt()
        self.world = distributed.world()
        self.tapes = {split: Tape(tokens, config.context_length) for split, tokens in corpus.tapes.items()}
        self.beginning = tuple(corpus.train[: config.context_length].tolist())
        self.entropy = {split: self._entropy(corpus.cost, split) for split in ("val", "test")} if corpus.cost else {}
        state = start.state if start else TrainState.initial(shape, config.seed)
        self.first_step = self.step = state.step
        self.losses = start.losses if start else {}  # of the latest evaluation, as a checkpoint keeps them
        self.backend = choice.create(config, shape, self.tapes["train"], state)
        self.windows = windows_of_splits(self.tapes, config.batch_size, self.backend.device)
        self.seconds = {"prepare_seconds": 0.0, "training_seconds": 0.0, "evaluation_seconds": 0.0}
        self.piece = FIRST_PIECE[self.backend.device.type]
        self.timed_from = (self.step, 0.0)  # step and training seconds at the last evaluation
        self.non_finite = math.inf  # the first step with a loss or state that is not finite
        self.warned = False

    def run(self) -> Result:
        """Trains to the end; then samples and measures the test loss."""
        if self.step < self.config.last_step:
            with self._timed("prepare_seconds"):
                self.backend.prepare()
        with self.interrupt.deferred():
            self._train()
        vocabulary = self.corpus.vocabulary
        with self._timed("evaluation_seconds"):
            prompt = default_prompt(vocabulary, self.shape.T, self.beginning)
            text = continuation(vocabulary, prompt, self.backend.sample(prompt, SAMPLE_LENGTH, SAMPLE_SEED))
            test_loss = self.backend.shared_mean_loss(self.windows["test"])
        self.log.message(vocabulary.decode(prompt) + text)
        self.log.event("sample", text=text)
        self.log.message(f"test_loss {test_loss:.6f}")
        self.log.event("test", loss=test_loss)
        if self.folder is not None:
            with self.log.noting_failure("the test loss"):
                self.folder.note(self.step, test_loss=test_loss)
        log = self.log
        return Result(self.backend.state(), log.evaluations, test_loss, text, log.unsaved, **self.seconds)

    def _train(self) -> None:
        """Evaluate, save, advance, until the last step; on a signal, saves and raises Interrupted."""
        try:
            while self.step < self.config.last_step:
                if self._evaluates_at(self.step):
                    self._evaluate()
                if self._saves_at(self.step):
                    self._save()
                self._advance(self._next_stop())
            self._save()
        except Interrupted:
            self._save()
            self.world.barrier()  # torchrun ends all processes once one has ended: not before rank 0 has saved
            raise
        with self.world.agreed():  # rank 0 alone has looked at the whole state, to save it
            self._require_finite()

    def _evaluate(self) -> None:
        """Evaluates and logs. An interrupted evaluation leaves no result: the run that goes on evaluates again."""
        steps, seconds = self.step - self.timed_from[0], self.seconds["training_seconds"] - self.timed_from[1]
        self.timed_from = self.step, self.seconds["training_seconds"]
        ms_per_step = 1e3 * seconds / steps if steps else None
        # Several processes must all end at the same place, and a GPU is done soon: there the evaluation is finished.
        alone_on_cpu = self.world.size == 1 and self.backend.device.type == "cpu"
        with self._timed("evaluation_seconds"), self.interrupt.at_once() if alone_on_cpu else contextlib.nullcontext():
            train_loss = self.backend.shared_mean_loss(self.windows["train"])
            val_loss = self.backend.shared_mean_loss(self.windows["val"])
        lr = learning_rate(self.step, self.config)
        self.log.evaluation(Evaluation(self.step, train_loss, val_loss, lr, ms_per_step))
        self.losses = {"evaluated_at": self.step, "train_loss": train_loss, "val_loss": val_loss}
        if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
            self.non_finite = min(self.non_finite, self.step)
        self._require_finite()

    def _advance(self, end: int) -> None:
        """Trains up to step `end`, a piece at a time: between two pieces a signal raises Interrupted."""
        self.world.barrier()  # rank 0 may take longer to write than a step may wait
        while self.step < end:
            count = min(self.piece, end - self.step)
            start = time.perf_counter()
            with self._timed("training_seconds"):
                losses = self.backend.advance(count)
                self.backend.synchronize()
            per_step = self.world.max((time.perf_counter() - start) / count)
            self.piece = max(1, min(2 * self.piece, int(RESPONSE_TIME[self.backend.device.type] / per_step)))
            if not math.isfinite(losses.sum().item()) and len(wrong := losses.isfinite().logical_not_().nonzero()):
                self.non_finite = min(self.non_finite, self.step + int(wrong[0]))
            self.step += count
            self.log.progress(self.step, losses[-1], 1e3 * per_step)
            if signum := int(self.world.max(self.interrupt.signum)):  # of any rank: all end at the same step
                raise Interrupted(signum)

    def _save(self) -> None:
        """Saves a checkpoint, where there is a folder without the same checkpoint, and where the state is finite."""
        if self.folder is None:
            return
        saved = self.folder.known(self.step)
        if saved is not None and saved.get("evaluated_at") == self.losses.get("evaluated_at"):
            return
        state = self.backend.state()
        if not all(bool(torch.isfinite(t).all()) for part in state.parts.values() for t in part.values()):
            self.non_finite = min(self.non_finite, self.step)
            self.log.unsaved_because(f"the checkpoint of step {self.step} (it is not finite; the last good one stays)")
            return
        losses = self.losses if all(math.isfinite(value) for value in self.losses.values()) else {}
        vocabulary, fingerprint = self.corpus.vocabulary, self.corpus.fingerprint
        new = Checkpoint(state, self.config, vocabulary, fingerprint, losses, self.beginning)
        with self.log.noting_failure(f"the checkpoint of step {self.step}"):
            path = self.folder.save(new)
            self.log.event("checkpoint", step=self.step, file=str(path), best=self.folder.best)

    def _evaluates_at(self, step: int) -> bool:
        new = self.losses.get("evaluated_at") != step
        return new and (step % self.config.eval_every == 0 or step == self.config.num_steps - 1)

    def _saves_at(self, step: int) -> bool:
        every = self.config.checkpoint_every
        if self.folder is None or every is None or step % every != 0:
            return False
        # A run that stopped before the evaluation of this step left a checkpoint without its losses.
        return step > self.first_step or self.folder.known(step) is not None

    def _next_stop(self) -> int:
        """The first step after this one at which something happens: an evaluation, a checkpoint, or the end."""
        periods = [self.config.eval_every, self.config.checkpoint_every or self.config.eval_every]
        regular = [(self.step // period + 1) * period for period in periods]
        single = [self.config.num_steps - 1, self.config.last_step]
        return min(stop for stop in [*regular, *single] if stop > self.step)

    def _require_finite(self) -> None:
        """Raises NonFiniteLoss where a loss or the state was not finite; with --on-nan continue, warns once."""
        if self.non_finite == math.inf or self.warned:
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

    def _entropy(self, cost: dict[str, Any], split: str) -> float:
        """The mean -ln P, in nats, of a split's evaluated targets under the corpus' source; cost as Corpus has it."""
        targets = evaluated_positions(self.tapes[split], self.config.batch_size) + self.shape.T
        return float(cost[split][targets.numpy()].mean())

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        """Adds the time of the block to `what` of the seconds."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - start


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

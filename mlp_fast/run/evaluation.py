"""The losses of a model on the three splits of a corpus, as training reports them."""

import torch

from mlp_fast import backends
from mlp_fast.corpus.load import Corpus, check_sizes
from mlp_fast.errors import UserError
from mlp_fast.model.windows import TRAIN_EVAL_BATCHES, Tape, WeightedWindows, evaluated_windows
from mlp_fast.run.checkpoint import Checkpoint


def tapes_of(corpus: Corpus, context_length: int) -> dict[str, Tape]:
    """split -> its tape."""
    return {split: Tape(tokens, context_length) for split, tokens in corpus.tapes.items()}


def windows_of(tapes: dict[str, Tape], batch_size: int, device: torch.device) -> dict[str, WeightedWindows]:
    """split -> the windows that its loss is the mean over: of train only the first batches, of the others all."""
    limits = {"train": TRAIN_EVAL_BATCHES, "val": None, "test": None}
    return {split: evaluated_windows(tape, batch_size, limits[split]).to(device) for split, tape in tapes.items()}


def losses_of(saved: Checkpoint, corpus: Corpus) -> dict[str, float]:
    """split -> mean cross-entropy in nats.

    Raises:
        UserError: the corpus does not fit the model.
    """
    if corpus.vocabulary != saved.vocabulary:
        raise UserError(f"the {corpus.name} corpus has another vocabulary than the model; give the model's own corpus")
    config = saved.config
    check_sizes(corpus, config.context_length, config.batch_size)
    tapes = tapes_of(corpus, config.context_length)
    backend = backends.create(config, saved.shape, tapes["train"], saved.state)
    windows = windows_of(tapes, config.batch_size, backend.device)
    return {split: backend.shared_mean_loss(windows[split]) for split in windows}

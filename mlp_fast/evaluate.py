"""`python -m mlp_fast.evaluate RUN`: the losses of a saved model on a corpus."""

import dataclasses
from collections.abc import Sequence

from mlp_fast import backends, distributed
from mlp_fast.cli import Parser, run_main
from mlp_fast.config import DEVICES, SPLITTING
from mlp_fast.corpus.load import Corpus, check_sizes, load_for
from mlp_fast.errors import UserError
from mlp_fast.model.windows import Tape, windows_of_splits
from mlp_fast.run import checkpoint
from mlp_fast.run.checkpoint import Checkpoint


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(prog="python -m mlp_fast.evaluate", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a folder that --out wrote, or one of its checkpoint files")
    parser.add_argument("--data", help="another corpus than the one of the run (default: the run's)")
    parser.add_argument("--split", choices=SPLITTING, help="how one text file is split (default: as the run's)")
    parser.add_argument("--encoding", metavar="NAME", help="of text files (default: the run's)")
    parser.add_argument("--backend", default="eager", help="the backend; see mlp_fast.train --list-backends")
    parser.add_argument("--device", default="auto", choices=DEVICES, help="where to compute")
    with distributed.joined() as world:
        with world.agreed():
            arguments = parser.parse_args(argv)
            saved = checkpoint.load(arguments.run)
            how = {"backend": arguments.backend, "device": arguments.device}
            config = dataclasses.replace(saved.config, **how | arguments.given)
            backends.check(config)
            corpus = load_for(config, saved.given_vocabulary)
        for split, loss in losses_of(dataclasses.replace(saved, config=config), corpus).items():
            if world.rank == 0:
                print(f"{split}_loss {loss:.6f}")
    return 0


def losses_of(saved: Checkpoint, corpus: Corpus) -> dict[str, float]:
    """split -> mean cross-entropy in nats, of the windows that training evaluates.

    Raises:
        UserError: the corpus does not fit the model.
    """
    if corpus.vocabulary != saved.vocabulary:
        raise UserError(f"the {corpus.name} corpus has another vocabulary than the model; give the model's own corpus")
    config = saved.config
    check_sizes(corpus, config.context_length, config.batch_size)
    tapes = {split: Tape(tokens, config.context_length) for split, tokens in corpus.tapes.items()}
    backend = backends.create(config, saved.shape, tapes["train"], saved.state)
    windows = windows_of_splits(tapes, config.batch_size, backend.device)
    return {split: backend.shared_mean_loss(windows[split]) for split in windows}


if __name__ == "__main__":
    run_main(main)

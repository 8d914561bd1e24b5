"""`python -m mlp_fast.sample RUN`: text from a saved model."""

if __name__ == "__main__":
    from mlp_fast.command import begin

    begin()

from collections.abc import Sequence
from pathlib import Path

import torch

from mlp_fast import checkpoint
from mlp_fast.command import run_main
from mlp_fast.config import MAX_SEED, Parser
from mlp_fast.errors import UserError
from mlp_fast.rng import RNG
from mlp_fast.sampling import PROMPT, SAMPLE_LENGTH, SAMPLE_SEED, continuation, sample


def continue_text(saved: checkpoint.Checkpoint, prompt: str, length: int, seed: int) -> str:
    """`length` tokens after the prompt, drawn with `seed`."""
    T = saved.config.context_length
    tokens = saved.vocabulary.encode(prompt)
    if len(tokens) < T:
        raise UserError(f"--prompt has {len(tokens)} tokens, the model's context {T}; give at least {T}")
    model = saved.model()

    def logits_of(context: Sequence[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([context]))[0][0]

    return continuation(saved.vocabulary, tokens, sample(logits_of, tokens, length, RNG(seed), T))


def unescape(text: str) -> str:
    r"""A prompt as typed in a shell: \n and \t stand for the characters, \\ for a backslash."""
    placeholder = "\0"
    return text.replace("\\\\", placeholder).replace("\\n", "\n").replace("\\t", "\t").replace(placeholder, "\\")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(prog="python -m mlp_fast.sample", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a folder that --out wrote, or one of its checkpoint files")
    parser.add_argument("--prompt", default=PROMPT.replace("\n", "\\n"), help="what to continue; \\n is a newline")
    parser.add_argument("--length", type=int, default=SAMPLE_LENGTH, help="tokens to draw")
    parser.add_argument("--seed", type=int, default=SAMPLE_SEED, help="seed of the draws")
    arguments = parser.parse_args(argv)
    if arguments.length < 0:
        raise UserError(f"--length must not be negative (got {arguments.length})")
    if not 0 < arguments.seed <= MAX_SEED:
        raise UserError(f"--seed must lie in 1..2^64-1 (got {arguments.seed})")
    saved = checkpoint.load(Path(arguments.run))
    prompt = unescape(arguments.prompt)
    print(prompt + continue_text(saved, prompt, arguments.length, arguments.seed))
    return 0


if __name__ == "__main__":
    run_main(main)

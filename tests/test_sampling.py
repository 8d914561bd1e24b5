"""Sampling: the walk along the cumulative softmax, prompts, and the command's escapes."""

import pytest
import torch

from mlp_fast.rng import RNG
from mlp_fast.sample import unescape
from mlp_fast.sampling import default_prompt, draw, sample
from mlp_fast.tokens import Characters


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 0), (0.1, 0), (0.26, 1), (0.74, 1), (0.76, 2), (0.999, 2)])
def test_draw_walks_the_cumulative_softmax(uniform: float, token: int) -> None:
    assert draw(torch.tensor([0.25, 0.5, 0.25]).log(), uniform) == token


def test_draw_takes_the_last_token_where_rounding_runs_out() -> None:
    assert draw(torch.tensor([float("nan")] * 3), 0.5) == 2


def test_draw_survives_large_logits() -> None:
    assert draw(torch.tensor([1e4, 0.0, -1e4]), 0.9) == 0


def test_sample_draws_one_uniform_per_token_from_the_last_context() -> None:
    seen = []

    def logits_of(context: list[int]) -> torch.Tensor:
        seen.append(list(context))
        return torch.zeros(4)

    drawn = sample(logits_of, [3, 2, 1], 5, RNG(42), 2)
    rng = RNG(42)
    assert drawn == [int(rng.random() * 4) for _ in range(5)]
    assert seen[0] == [2, 1]
    assert seen[2] == drawn[:2]


def test_a_prompt_shorter_than_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt"):
        sample(lambda context: torch.zeros(2), [0], 1, RNG(1), 2)


def test_default_prompt_grows_with_the_context_and_knows_other_alphabets() -> None:
    names = Characters("\nabcdefghijklmnopqrstuvwxyz")
    tape = torch.tensor([1, 2, 3])
    assert names.decode(default_prompt(names, 3, tape)) == "\nrichard"
    assert names.decode(default_prompt(names, 10, tape)) == "\n\n\nrichard"
    assert default_prompt(Characters("\nабв"), 2, tape) == [1, 2]


@pytest.mark.parametrize(("typed", "meant"), [(r"\nann", "\nann"), (r"a\\nb", r"a\nb"), ("\tx", "\tx"), (r"\t", "\t")])
def test_escapes_of_the_command_line(typed: str, meant: str) -> None:
    assert unescape(typed) == meant

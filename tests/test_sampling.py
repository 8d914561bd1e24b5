"""Sampling: the walk along the cumulative softmax, prompts, and the command's escapes."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch

from mlp_fast import sample as sample_command
from mlp_fast import train
from mlp_fast.cli import unescape
from mlp_fast.corpus.prompt import default_prompt, padded
from mlp_fast.corpus.tokenizer import Characters
from mlp_fast.errors import UserError
from mlp_fast.model.rng import RNG
from mlp_fast.model.sampling import draw, sample, shaped
from mlp_fast.run import checkpoint


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
    tape = [1, 2]
    assert names.decode(default_prompt(names, 3, tape)) == "\nrichard"
    assert names.decode(default_prompt(names, 10, tape)) == "\n\n\nrichard"
    assert default_prompt(Characters("\nабв"), 2, tape) == [1, 2]


@pytest.mark.parametrize(("typed", "meant"), [(r"\nann", "\nann"), (r"a\\nb", r"a\nb"), ("\tx", "\tx"), (r"\t", "\t")])
def test_escapes_of_the_command_line(typed: str, meant: str) -> None:
    assert unescape(typed) == meant


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    logits = torch.tensor([0.3, -1.2, 2.0])
    expected = (logits.double() / temperature).softmax(0)
    torch.testing.assert_close(shaped(logits, temperature).double().softmax(0), expected, rtol=1e-6, atol=1e-7)


def test_the_defaults_leave_the_logits_alone() -> None:
    logits = torch.tensor([0.3, -1.2, 2.0])
    assert shaped(logits) is logits


@pytest.mark.parametrize(
    ("temperature", "top_k", "kept"),
    [(1.0, 1, [2]), (1.0, 2, [0, 2]), (1.0, 4, [0, 1, 2, 3]), (1.0, 9, [0, 1, 2, 3]), (0.0, None, [2]), (0.0, 3, [2])],
)
def test_only_the_likeliest_tokens_remain(temperature: float, top_k: int | None, kept: list[int]) -> None:
    """Tokens 0 and 3 are equally likely: the first of them is taken."""
    logits = torch.tensor([0.3, -1.2, 2.0, 0.3])
    result = shaped(logits, temperature, top_k)
    assert result.isfinite().nonzero().flatten().tolist() == kept
    assert torch.equal(result[kept], logits[kept])


def test_a_stop_token_ends_a_sample_and_is_left_out() -> None:
    whole = sample(lambda context: torch.zeros(4), [0], 50, RNG(42), 1)
    stopped = sample(lambda context: torch.zeros(4), [0], 50, RNG(42), 1, stop=3)
    assert stopped == whole[: whole.index(3)]
    assert 0 < len(stopped) < 50


def test_a_short_prompt_is_padded_as_the_corpus_begins() -> None:
    names, numbers = Characters("\nab"), Characters("ab")
    assert padded([1], names, 3, [1, 2, 1]) == [0, 0, 1]
    assert padded([1], numbers, 3, [1, 0, 0]) == [1, 0, 1]
    assert padded([], numbers, 2, [1, 0]) == [1, 0]
    assert padded([1, 1, 0], numbers, 2, [1, 0]) == [1, 1, 0]
    with pytest.raises(UserError, match="older checkpoint"):
        padded([1], numbers, 3, [])


# --- the command ------------------------------------------------------------------------------------------------------

TINY = ("--backend=eager", "--embedding-size=4", "--hidden-size=8", "--batch-size=8", "--num-steps=3", "--quiet")
CORPORA = {"names": "anna\nbob\nnora\n", "lines without newline": "anna bob nora ", "Cyrillic": "анна\nборя\n"}


def one_file(folder: Path, text: str) -> Path:
    """The text, fifty times, in a file."""
    path = folder / "text.txt"
    path.write_text(text * 50, encoding="utf-8")
    return path


def trained(folder: Path, text: str, *more: str) -> tuple[Path, str]:
    """A run on a text, and the sample that it ended with, prompt included."""
    folder.mkdir(exist_ok=True)
    log, out = folder / "log.jsonl", folder / "run"
    train.main(
        [*TINY, f"--data={one_file(folder, text)}", "--split=contiguous", f"--out={out}", f"--log-json={log}", *more]
    )
    told = [json.loads(line) for line in log.read_text(encoding="utf-8").split("\n")[:-1]]
    return out, next(event["text"] for event in told if event["event"] == "sample")


@pytest.mark.parametrize("T", [2, 11])
@pytest.mark.parametrize("text", CORPORA.values(), ids=CORPORA)
def test_sample_without_options_begins_as_train_does(
    tmp_path: Path, text: str, T: int, capsys: pytest.CaptureFixture[str]
) -> None:
    out, told = trained(tmp_path, text, f"--context-length={T}")
    saved = checkpoint.load(out)
    capsys.readouterr()
    assert sample_command.main([str(out)]) == 0
    printed = capsys.readouterr().out
    prompt = (text * 50)[:T] if not saved.vocabulary.knows("\nrichard") else "\nrichard".rjust(T, "\n")
    assert printed == f"{prompt}{told}\n"


def test_a_byte_model_with_a_long_context_samples_like_train(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, told = trained(tmp_path, CORPORA["names"], "--tokens=byte", "--context-length=11")
    capsys.readouterr()
    sample_command.main([str(out)])
    assert capsys.readouterr().out == f"{chr(10) * 4}richard{told}\n"


def test_short_prompts_several_samples_and_a_stop_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = trained(tmp_path, CORPORA["names"], "--context-length=4")
    capsys.readouterr()

    def printed(*options: str) -> str:
        assert sample_command.main([str(out), *options]) == 0
        return capsys.readouterr().out

    one, two = (printed("--prompt=a", "--length=30", f"--samples={n}") for n in (1, 2))
    assert one[0] == "a"
    assert len(one) == 32
    assert two.startswith(one)
    assert two[len(one)] == "a"
    assert len(two) == 64
    assert two[len(one) :] != one
    names = printed("--prompt=", "--stop=\\n", "--samples=5", "--length=1000")
    assert names.count("\n") == 5
    greedy = {printed("--prompt=a", "--seed=7", *options) for options in (["--top-k=1"], ["--temperature=0"])}
    assert greedy == {printed("--prompt=a", "--top-k=1", "--temperature=3")}


@pytest.mark.parametrize(
    "option",
    [
        "--samples=0",
        "--top-k=0",
        "--temperature=-1",
        "--temperature=nan",
        "--length=-1",
        f"--length=1{'0' * 400}",
        "--stop=",
        "--stop=ab",
        "--stop=z",
    ],
)
def test_a_bad_option_is_named(tmp_path_factory: pytest.TempPathFactory, option: str) -> None:
    out = tmp_path_factory.getbasetemp() / "bad options"
    if not out.exists():
        trained(out, CORPORA["names"])
    with pytest.raises(UserError, match=option.partition("=")[0]) as error:
        sample_command.main([str(out / "run"), option])
    assert "\n" not in str(error.value)


class Terminal(io.StringIO):
    """A stdout that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_control_characters_are_escaped_on_a_terminal_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the sample of either command."""
    text, run = "\x1b[2J\x07\x9b1m\t中\n", tmp_path / "run"
    shown = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", shown)
        train.main([*TINY[:-1], f"--data={one_file(tmp_path, text)}", "--tokens=byte", f"--out={run}"])
        sample_command.main([str(run), "--length=300", "--prompt=\x1b[2J\x07\x7f\t中"])
    assert r"\x1b[2J\x07\x7f" + "\t中" in shown.getvalue()
    assert "test_loss" in shown.getvalue()
    assert not any(c.isascii() and not c.isprintable() for c in set(shown.getvalue()) - {"\t", "\n"})
    capsys.readouterr()
    sample_command.main([str(run), "--length=0", "--prompt=\x1b[2J\x07\x7f\t中"])
    assert capsys.readouterr().out == "\x1b[2J\x07\x7f\t中\n"

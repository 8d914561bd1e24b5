"""The embedded corpus: its process against a plain reference, and its files against the process."""

import collections
import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlp_fast.data import synthesize
from mlp_fast.data.synthesize import ALPHABET, SMOOTHING, CharacterProcess
from mlp_fast.errors import UserError
from mlp_fast.model.rng import RNG


@pytest.fixture(scope="module")
def process() -> CharacterProcess:
    return synthesize.embedded_process()


def committed(split: str) -> str:
    return (synthesize.EMBEDDED / f"{split}.txt").read_bytes().decode("ascii")


def test_the_seed_names_are_many_distinct_and_use_every_letter() -> None:
    names = synthesize.SEED_NAMES.read_bytes().decode("ascii").removesuffix("\n").split("\n")
    assert len(names) >= 600
    assert names == sorted(set(names)) == synthesize.seed_names()
    assert set("".join(names)) == set(ALPHABET) - {"\n"}
    assert all(2 <= len(name) <= 12 for name in names)


@pytest.mark.parametrize("split", synthesize.SPLIT_LINES)
def test_the_files_have_the_names_corpus_form(split: str) -> None:
    text = committed(split)
    names = text.removesuffix("\n").split("\n")
    assert text.endswith("\n")
    assert len(names) == text.count("\n") == {"train": 30_032, "val": 1_000, "test": 1_000}[split]
    assert all(names)
    assert "".join(sorted(set(text))) == ALPHABET
    assert 5.5 < np.mean([len(name) for name in names]) < 7.0


def test_running_it_again_gives_the_committed_bytes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mlp_fast.data.synthesize"]
    subprocess.run([*command, "--to", str(tmp_path / "new")], check=True, capture_output=True)
    for split in synthesize.SPLIT_LINES:
        assert (tmp_path / "new" / f"{split}.txt").read_bytes() == committed(split).encode()


def test_check_tells_a_changed_file_from_the_right_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {split: committed(split) for split in synthesize.SPLIT_LINES}
    monkeypatch.setattr(synthesize, "embedded_texts", lambda: texts)
    assert synthesize.main(["--check"]) == 0
    assert "30,032 names" in capsys.readouterr().out
    for split, text in texts.items():
        (tmp_path / f"{split}.txt").write_text(text)
    (tmp_path / "val.txt").write_text(texts["val"][:-1] + "a")
    before = (tmp_path / "val.txt").read_bytes()
    with pytest.raises(UserError, match=r"val\.txt is not what"):
        synthesize.main(["--check", "--to", str(tmp_path)])
    assert (tmp_path / "val.txt").read_bytes() == before
    with pytest.raises(UserError, match="No such file"):
        synthesize.main(["--check", "--to", str(tmp_path / "none")])


def test_the_probabilities_are_the_formula_of_the_docstring(process: CharacterProcess) -> None:
    """Witten-Bell written out with dictionaries, one context at a time."""
    orders: list[collections.Counter[str]] = [collections.Counter() for _ in range(3)]
    for name in synthesize.seed_names():
        padded = "\n\n" + name + "\n"
        for i, order in itertools.product(range(2, len(padded)), range(3)):
            orders[order][padded[i - order : i + 1]] += 1

    def probability(context: str, c: str) -> float:
        counts = {k[-1]: n for k, n in orders[len(context)].items() if k[:-1] == context}
        n, w = sum(counts.values()), len(counts)
        if not context:
            return (counts.get(c, 0) + SMOOTHING) / (n + len(ALPHABET) * SMOOTHING)
        lower = probability(context[1:], c)
        return (counts.get(c, 0) + w * lower) / (n + w) if n else lower

    for context in ("an", "\nq", "qx", "zz", "\nj", "ie"):
        a, b = (ALPHABET.index(c) for c in context)
        expected = [probability(context, c) for c in ALPHABET]
        np.testing.assert_allclose(process.probabilities[a, b], expected, rtol=1e-12)
    start = np.array([0.0, *(probability("\n\n", c) for c in ALPHABET[1:])])
    np.testing.assert_allclose(process.probabilities[0, 0], start / start.sum(), rtol=1e-12)


def test_every_context_is_a_distribution_and_no_name_is_empty(process: CharacterProcess) -> None:
    np.testing.assert_allclose(process.probabilities.sum(axis=2), 1.0, rtol=1e-12)
    assert process.probabilities[0, 0, 0] == 0.0
    assert np.count_nonzero(process.probabilities == 0.0) == 1


def test_the_cost_is_minus_ln_p_of_each_character_restarted_at_newlines(process: CharacterProcess) -> None:
    text = "anna\nbo\nzed"
    expected = []
    for name in text.split("\n"):
        a = b = 0
        for c in (ALPHABET.index(character) for character in name + "\n"):
            expected.append(-math.log(process.probabilities[a, b, c]))
            a, b = b, c
    np.testing.assert_allclose(process.cost(text), expected[: len(text)], rtol=1e-14)
    assert process.cost("").shape == (0,)
    assert process.cost("a\n\n")[-1] == math.inf
    for wrong in ("A", "é", "a b", "`", "{"):
        with pytest.raises(ValueError, match="a to z"):
            process.cost(wrong)


def test_the_probabilities_of_all_names_add_up_to_one() -> None:
    """The cost is a whole one: over all names of a process that ends soon, exp(-cost) adds up to (nearly) one."""
    process = CharacterProcess.fit(["ab", "b", "ba"])
    letters = "ab"
    p = np.zeros((27, 27, 27))
    p[:, :, :3] = process.probabilities[:, :, :3]
    p[:, :, 0] += 1 - p.sum(axis=2)  # the letters c to z become the name's end
    p[0, 0] = [0, 0.5, 0.5, *[0] * 24]
    small = CharacterProcess(p)
    total = sum(
        math.exp(-small.cost("".join(name) + "\n").sum())
        for length in range(1, 13)
        for name in itertools.product(letters, repeat=length)
    )
    assert total == pytest.approx(1.0, abs=5e-3)
    assert total < 1.0


def test_samples_cost_what_the_process_promises(process: CharacterProcess) -> None:
    """The mean cost of sampled characters against the exact entropy rate: the stationary mean over contexts."""
    p = process.probabilities
    visits = np.zeros((27, 27))  # expected visits of a context in one name
    visits[0, 0] = 1.0
    current = visits.copy()
    for _ in range(400):
        following = np.einsum("ab,abc->bc", current, p)
        following[:, 0] = 0.0  # the name has ended
        visits += following
        current = following
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = np.where(p > 0, -p * np.log(p), 0.0).sum(axis=2)
    rate = (visits * entropy).sum() / visits.sum()
    text = committed("train")
    cost = process.cost(text)
    assert abs(cost.mean() - rate) < 4 * cost.std() / math.sqrt(len(text))
    assert len(text) / 30_032 == pytest.approx(visits.sum(), rel=0.02)


def test_the_first_characters_come_as_often_as_they_should(process: CharacterProcess) -> None:
    names = process.sample(RNG(5), 4_000)
    first = np.bincount([ALPHABET.index(name[0]) for name in names], minlength=27)
    expected = process.probabilities[0, 0] * len(names)
    assert first[0] == 0
    chi_squared = ((first - expected)[1:] ** 2 / expected[1:]).sum()
    assert chi_squared < 25 + 5 * math.sqrt(2 * 25)
    assert process.sample(RNG(5), 10) == names[:10]


def test_fit_refuses_an_empty_name() -> None:
    for wrong in ("", "a\nb"):
        with pytest.raises(ValueError, match="non-empty line"):
            CharacterProcess.fit(["anna", wrong])

"""--init-from: a new run that starts from the model of another one."""

from pathlib import Path

import pytest
import torch

from mlp_fast import evaluate, train
from mlp_fast.config import Config
from mlp_fast.corpus import names
from mlp_fast.errors import UserError
from mlp_fast.model.mlp import MLP
from mlp_fast.run import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = ("--backend=eager", "--context-length=2", "--embedding-size=3", "--hidden-size=5", "--batch-size=8")


@pytest.fixture
def parent(tmp_path: Path, corpus_folder: str) -> Path:
    """A run of 20 steps."""
    out = tmp_path / "parent"
    assert train.main([*SIZES, f"--data={corpus_folder}", "--num-steps=20", "--quiet", f"--out={out}"]) == 0
    return out


def other_corpus(path: Path, train_text: str = "bob\nnan\n") -> str:
    """A corpus that lacks the r of the parent's."""
    path.mkdir()
    for split, text in (("train", train_text), ("val", "bob\n"), ("test", "nan\n")):
        (path / f"{split}.txt").write_text(text * 20)
    return str(path)


def test_its_first_steps_are_those_of_torchs_adamw(tmp_path: Path, parent: Path) -> None:
    """The schedule and the moments begin anew: against torch.optim.AdamW in float64."""
    out = tmp_path / "child"
    options = ["--backend=eager", "--batch-size=8", "--num-steps=5", "--learning-rate=0.01", "--quiet"]
    assert train.main([f"--init-from={parent}", *options, f"--out={out}"]) == 0
    before, after = checkpoint.load(parent), checkpoint.load(out)
    assert (after.state.step, after.config.num_steps, after.config.hidden_size) == (5, 5, 5)
    assert after.config.data == before.config.data
    from mlp_fast.corpus import load as corpus
    from mlp_fast.model.schedule import learning_rate
    from mlp_fast.model.windows import Tape

    tape = Tape(corpus.load(before.config.data).train, 2)
    model = MLP(before.shape, before.state.parameters).double()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=after.config.weight_decay)
    for step in range(5):
        optimizer.param_groups[0]["lr"] = learning_rate(step, after.config)
        optimizer.zero_grad()
        model(*tape.batch(step, 8))[1].backward()
        optimizer.step()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(after.state.parameters[name].double(), tensor, rtol=1e-5, atol=1e-6)


def test_the_first_evaluation_is_of_the_saved_model(
    tmp_path: Path, parent: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.main([str(parent)])
    expected = dict(line.split() for line in capsys.readouterr().out.splitlines())
    train.main([f"--init-from={parent}", "--backend=eager", "--batch-size=8", "--num-steps=2"])
    told = capsys.readouterr().out
    first = next(line for line in told.splitlines() if line.startswith("step "))
    assert f"val_loss {expected['val_loss']}" in first
    assert f"starting from the model in {parent}" in told


@pytest.mark.parametrize("tokens", ["char", "word"])
def test_another_corpus_is_read_in_the_models_tokens(
    tmp_path: Path, corpus_folder: str, tokens: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resumed and evaluated as well: the corpus by itself would have another vocabulary."""
    parent, out = tmp_path / "parent", tmp_path / "child"
    train.main([*SIZES, f"--data={corpus_folder}", f"--tokens={tokens}", "--num-steps=9", "--quiet", f"--out={parent}"])
    other = other_corpus(tmp_path / "other")
    settings = [f"--init-from={parent}", f"--data={other}", "--backend=eager", "--batch-size=8", "--num-steps=8"]
    assert train.main([*settings, "--quiet", f"--out={out}", "--stop-after=4"]) == 0
    before, after = checkpoint.load(parent), checkpoint.load(out)
    assert after.vocabulary == before.vocabulary
    first = after.vocabulary.encode("bob\n")[0]
    assert after.beginning[0] == first
    assert train.main([f"--resume={out}", "--quiet"]) == 0
    assert checkpoint.load(out).state.step == 8
    capsys.readouterr()
    evaluate.main([str(out)])
    assert "test_loss" in capsys.readouterr().out


def test_a_model_is_evaluated_on_a_text_in_another_form(
    tmp_path: Path, corpus_folder: str, parent: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In order, in another encoding: as train, val and test of the same characters."""
    text = (Path(corpus_folder) / "train.txt").read_text() * 4
    (tmp_path / "text.txt").write_bytes(text.encode("utf-16"))
    k = (3 * len(text) + 50) // 100
    parts = {"train": text[: -2 * k], "val": text[-2 * k : -k], "test": text[-k:]}
    (tmp_path / "parts").mkdir()
    for split, part in parts.items():
        (tmp_path / "parts" / f"{split}.txt").write_text(part)
    told = []
    for options in ([f"{tmp_path / 'text.txt'}", "--split=contiguous", "--encoding=utf-16"], [f"{tmp_path / 'parts'}"]):
        assert evaluate.main([str(parent), "--data", *options]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]
    assert told[0].count("_loss ") == 3


def test_a_character_that_the_model_does_not_know_is_named(tmp_path: Path, parent: Path) -> None:
    other = other_corpus(tmp_path / "other", "bob\nzoe\n")
    with pytest.raises(UserError, match=r"train\.txt, line 2: the character 'z' .* not in the vocabulary of the model"):
        train.main([f"--init-from={parent}", f"--data={other}", "--batch-size=8", "--quiet"])


def test_a_character_of_the_names_corpus_is_named_by_its_line_in_the_file(
    tmp_path: Path, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "names.txt"
    path.write_text("bob\nzoe\nada\n")
    splits = {"train": b"ada\nzoe\n", "val": b"bob\n", "test": b"bob\n"}  # shuffled, as names.split() does
    monkeypatch.setattr(names, "read", lambda: (path, splits))
    with pytest.raises(UserError, match=r"names\.txt, line 2: the character 'z' \(U\+007A\) is not in the vocabulary"):
        train.main([f"--init-from={parent}", "--data=names", "--batch-size=8", "--quiet"])


@pytest.mark.parametrize("option", ["--hidden-size=6", "--tokens=byte", "--direct", "--preset=tiny"])
def test_what_contradicts_the_model_is_refused(tmp_path: Path, parent: Path, option: str) -> None:
    name = "--embedding-size" if option.startswith("--preset") else option.partition("=")[0]
    with pytest.raises(UserError, match=f"{name} .*the model in .*parent"):
        train.main([f"--init-from={parent}", option, "--quiet", f"--out={tmp_path / 'child'}"])
    assert not (tmp_path / "child").exists()


def test_the_library_refuses_it_too(parent: Path, corpus_folder: str) -> None:
    with pytest.raises(UserError, match="--embedding-size 48: the model in"):
        train.train(Config(init_from=str(parent), data=corpus_folder, context_length=2, batch_size=8, quiet=True))


@pytest.mark.parametrize("run", ["", "nothing"])
def test_a_model_that_is_not_there_is_named(run: str) -> None:
    with pytest.raises(UserError, match=run or "--init-from is empty"):
        train.main([f"--init-from={run}"])


def test_nothing_is_written_over_the_model(parent: Path) -> None:
    before = {path.name: path.read_bytes() for path in parent.iterdir()}
    with pytest.raises(UserError, match="holds a run already"):
        train.main([f"--init-from={parent}", "--backend=eager", "--batch-size=8", f"--out={parent}", "--num-steps=2"])
    assert {path.name: path.read_bytes() for path in parent.iterdir()} == before

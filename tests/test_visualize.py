"""The pictures of a saved model: what they show is computed right, and bad input gets one clear line."""

import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from mlp_fast import train, visualize
from mlp_fast.corpus import prompt
from mlp_fast.corpus.tokenizer import Bytes, Characters
from mlp_fast.errors import EXIT_USER_ERROR, UserError
from mlp_fast.model.mlp import MLP, Shape
from mlp_fast.run import checkpoint, pictures
from mlp_fast.run.pictures import computation_graph, next_probabilities, principal_components, summary

SMALL = ["--backend", "eager", "--num-steps", "2", "--hidden-size", "8", "--embedding-size", "4", "--quiet"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run on the embedded corpus: T = 3, V = 27."""
    folder = tmp_path_factory.mktemp("visualize") / "run"
    assert train.main([*SMALL, "--out", str(folder)]) == 0
    return folder


def test_principal_components_are_those_of_the_covariance_matrix() -> None:
    embeddings = torch.randn(27, 6, generator=torch.Generator().manual_seed(1)) * torch.tensor([1, 5, 1, 3, 1, 1])
    coordinates, share = principal_components(embeddings)
    variances = torch.linalg.eigvalsh(torch.cov(embeddings.double().t())).flip(0)
    torch.testing.assert_close(torch.cov(coordinates.t()), torch.diag(variances[:2]), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(share, variances[:2] / variances.sum())
    assert (coordinates.gather(0, coordinates.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("size", [(1, 5), (2, 1), (4, 1)])
def test_components_that_do_not_exist_are_zero(size: tuple[int, int]) -> None:
    coordinates, share = principal_components(torch.arange(size[0] * size[1], dtype=torch.float32).view(size))
    assert coordinates.shape == (size[0], 2)
    assert coordinates[:, 1].abs().max() < 1e-6
    assert share.tolist() == pytest.approx([0.0 if size[0] == 1 else 1.0, 0.0])


def test_probabilities_are_the_softmax_of_the_models_logits() -> None:
    model = MLP(Shape(V=5, T=2, E=3, H=4))
    logits = model(torch.tensor([[3, 1]]))[0].detach()[0].double()
    probabilities = next_probabilities(model, [3, 1])
    torch.testing.assert_close(probabilities, logits.exp() / logits.exp().sum())
    assert not torch.equal(probabilities, next_probabilities(model, [1, 3]))


def test_the_graph_leads_from_the_tokens_to_the_loss() -> None:
    shape = Shape(V=27, T=3, E=48, H=512)
    operations = {operation.name: operation for operation in computation_graph(MLP(shape), 128, 3)}
    assert list(operations) == ["idx", "targets", "wte", "flatten", "mlp.0", "mlp.1", "mlp.2", "cross_entropy"]
    assert operations["wte"].shape == (128, 3, 48)
    assert operations["mlp.0"].kind == "Linear(144, 512)"
    assert operations["mlp.2"].shape == (128, 27)
    assert operations["cross_entropy"].inputs == ("mlp.2", "targets")
    assert operations["cross_entropy"].shape == ()
    assert sum(operation.parameters for operation in operations.values()) == shape.num_parameters


def test_direct_connections_are_a_second_way_to_the_logits() -> None:
    shape = Shape(V=7, T=2, E=3, H=4, direct=True)
    operations = {operation.name: operation for operation in computation_graph(MLP(shape), 5, 2)}
    assert operations["direct"].inputs == operations["mlp.0"].inputs == ("flatten",)
    assert operations["add"].inputs == ("mlp.2", "direct")
    assert sum(operation.parameters for operation in operations.values()) == shape.num_parameters


def test_the_summary_counts_parameters_and_bytes() -> None:
    text = summary(computation_graph(MLP(Shape(V=27, T=3, E=48, H=512)), 128, 3))
    line = next(line for line in text.splitlines() if line.startswith("mlp.0 "))
    assert line.split("  ")[-1].strip() == "74,240"
    assert text.endswith("parameters: 89,387, in float32 357,548 bytes; with AdamW's two moments 1,072,644 bytes")


@pytest.mark.parametrize("format", pictures.FORMATS)
def test_the_command_writes_pictures_and_prints_the_summary(
    run: Path, tmp_path: Path, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new" / "pictures"
    assert visualize.main([str(run), "--context", r"\nan", "--out", str(folder), "--format", format]) == 0
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["summary.txt", *(f"{name}.{format}" for name in pictures.PICTURES)]
    )
    for name in pictures.PICTURES:
        content = (folder / f"{name}.{format}").read_bytes()
        if format == "png":
            assert content.startswith(b"\x89PNG")
        else:
            assert ElementTree.fromstring(content).tag.endswith("svg")
    printed = capsys.readouterr().out
    assert printed.startswith((folder / "summary.txt").read_text())


def test_what_cannot_be_seen_or_drawn_gets_a_name() -> None:
    vocabulary = Characters("\n $字")
    assert [pictures._label(vocabulary, token) for token in range(4)] == [r"\n", "' '", "$", "U+5B57"]
    assert pictures._label(Bytes(), 0x41) == "A"
    assert pictures._label(Bytes(), 0).startswith("\\")


def test_a_large_vocabulary_and_formula_signs_are_drawn(tmp_path: Path) -> None:
    probabilities = torch.softmax(torch.randn(256, generator=torch.Generator().manual_seed(1)).double(), 0)
    pictures.draw_probabilities(tmp_path / "p.svg", probabilities, [36, 37, 36], Bytes())
    pictures.draw_embeddings(tmp_path / "e.svg", torch.randn(256, 4), Bytes())
    pictures.draw_embeddings(tmp_path / "few.svg", torch.randn(3, 4), Characters("$^字"))
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere"),
        (["RUN", "--context", "\N{SNOWMAN}an"], "not in the vocabulary"),
        (["RUN", "--format", "bmp"], "bmp"),
        (["RUN", "--out", "FILE"], "cannot make this folder"),
        (["RUN", "--out", "FILE/below"], "cannot make this folder"),
        ([], "RUN"),
    ],
)
def test_bad_input_gets_one_line(run: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "file").write_text("")
    replaced = [part.replace("RUN", str(run)).replace("FILE", str(tmp_path / "file")) for part in arguments]
    with pytest.raises(UserError, match=words) as caught:
        visualize.main(replaced)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == EXIT_USER_ERROR


def test_without_matplotlib_the_error_says_how_to_install_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"matplotlib.*pip install"):
        visualize.main([str(run)])


def test_the_default_context_is_the_end_of_text(run: Path) -> None:
    saved = checkpoint.load(run)
    assert visualize._context(None, saved) == [0, 0, 0]
    assert visualize._context(r"xx\nan", saved) == saved.vocabulary.encode("\nan")


def test_a_short_context_is_padded_as_a_prompt_is(run: Path, tmp_path: Path) -> None:
    saved = checkpoint.load(run)
    for text in ("an", "n", ""):
        expected = prompt.padded(saved.vocabulary.encode(text), saved.vocabulary, 3, saved.beginning)
        assert visualize._context(text, saved) == expected == saved.vocabulary.encode("\n" * (3 - len(text)) + text)
    assert visualize.main([str(run), "--context", "a", "--out", str(tmp_path)]) == 0
    # Without a newline in its vocabulary, as its corpus begins; a checkpoint that does not tell how is one clear line.
    config = replace(saved.config, context_length=3)
    bare = replace(saved, config=config, vocabulary=Characters("abc"), beginning=(2, 1, 2))
    assert visualize._context("a", bare) == [2, 1, 0]
    with pytest.raises(UserError, match="the prompt has 1 tokens, the model's context 3"):
        visualize._context("a", replace(bare, beginning=()))

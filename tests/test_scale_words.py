"""Tokens that are bytes or words, and corpora streamed through the cache into mapped tapes."""

import errno
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from bench import generate_words
from mlp_fast import evaluate, sample, train
from mlp_fast.corpus import cache as token_cache
from mlp_fast.corpus import load as corpus
from mlp_fast.corpus import tokenizer as tokens
from mlp_fast.corpus.load import SPLITS, Corpus
from mlp_fast.corpus.tokenizer import UNKNOWN, Bytes, Characters, Words, from_json
from mlp_fast.errors import UserError
from mlp_fast.model.windows import Tape, evaluated_windows


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mlp_fast" / "tapes"


def folder(path: Path, train: bytes, val: bytes, test: bytes) -> str:
    path.mkdir(exist_ok=True)
    for split, content in zip(SPLITS, (train, val, test), strict=True):
        (path / f"{split}.txt").write_bytes(content)
    return str(path)


# --- words and bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The cat, the hat.\n", ["The", "cat", ",", "the", "hat", ".", "\n"]),
        ("don't  re-use\tit's", ["don't", "re-use", "it's"]),
        ("'quoted' end-", ["'", "quoted", "'", "end", "-"]),
        ("3.14 = x_1", ["3", ".", "14", "=", "x_1"]),
        ("a <unk> b<unk>", ["a", UNKNOWN, "b", UNKNOWN]),
        ("naïve façade — 中文\n\n", ["naïve", "façade", "—", "中文", "\n", "\n"]),
    ],
)
def test_words_are_runs_of_letters_and_single_signs(text: str, words: list[str]) -> None:
    vocabulary = Words.of([text.encode()], 1)
    assert [vocabulary.words[token] for token in vocabulary.encode(text)] == words
    assert vocabulary.encoded(text.encode()).tolist() == vocabulary.encode(text)


def test_the_vocabulary_has_the_frequent_words_of_train_in_falling_order(tmp_path: Path) -> None:
    data = folder(tmp_path / "c", b"b a b\nc a b zz d d\n", b"a q\n", b"zz b\n")
    loaded = corpus.load(data, "word", 2)
    assert loaded.vocabulary.as_json() == [UNKNOWN, "\n", "b", "a", "d"]
    assert loaded.train.tolist() == [2, 3, 2, 1, 0, 3, 2, 0, 4, 4, 1]
    assert loaded.val.tolist() == [3, 0, 1]
    assert loaded.vocabulary.decode(loaded.test) == "<unk> b\n"
    assert corpus.load(data, "word", 1).fingerprint != loaded.fingerprint


@given(st.lists(st.text("a \n\t\f中", max_size=6).map(str.encode)))
def test_pieces_are_cut_behind_spaces_alone(pieces: list[bytes]) -> None:
    cut = list(tokens.cut_at_spaces(pieces))
    assert b"".join(cut) == b"".join(pieces)
    assert all(piece[-1:].isspace() for piece in cut[:-1])
    assert all(re.fullmatch(rb".*\s|\S+", piece, re.DOTALL) for piece in cut), "a rest has no space"


@pytest.mark.parametrize("byte", [b"a", b"\t", b" "])
def test_cutting_takes_time_in_proportion_to_the_text(byte: bytes) -> None:
    """Sixteen times the text takes some sixteen times as long, where looking at all of it anew took 256 times."""

    def seconds(pieces: int) -> float:
        start = time.process_time()
        assert sum(map(len, tokens.cut_at_spaces([byte * 4096] * pieces))) == 4096 * pieces
        return time.process_time() - start

    few = min(seconds(200) for _ in range(5))
    assert min(seconds(3200) for _ in range(3)) < 80 * few


SIGNS = [UNKNOWN, "\n", ".", ",", "(", ")", "'", "-", "’", '"', "%", "don't", "a", "b_1", "中", "re-use", "[", "…"]


@given(st.lists(st.integers(0, len(SIGNS) - 1)))
def test_decoded_words_encode_to_the_same_tokens(drawn: list[int]) -> None:
    vocabulary = Words(tuple(SIGNS))
    text = vocabulary.decode(drawn)
    assert vocabulary.encode(text) == drawn
    assert all(text.startswith(vocabulary.decode(drawn[:k])) for k in range(len(drawn)))


def test_decoded_words_read_like_text() -> None:
    text = "A cat, re-used (twice); 50% of it.\nThe end\n"
    assert Words.of([text.encode()], 1).decode(Words.of([text.encode()], 1).encode(text)) == text


@given(st.binary(min_size=1, max_size=50))
def test_any_bytes_are_tokens(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        loaded = corpus.load(folder(Path(name) / "c", content, b"\xff\r\n", b"\xef\xbb\xbf"), "byte")
    assert len(loaded.vocabulary) == 256
    assert loaded.train.dtype == torch.uint8
    assert bytes(loaded.train.tolist()) == content
    assert loaded.val.tolist() == [255, 13, 10]
    assert loaded.test.tolist() == [0xEF, 0xBB, 0xBF]


def test_bytes_decode_as_utf8_with_a_mark_for_what_is_none() -> None:
    assert Bytes().encode("zoé") == [0x7A, 0x6F, 0xC3, 0xA9]
    assert Bytes().decode([0x7A, 0x6F, 0xC3, 0xA9, 0xC3]) == "zoé\ufffd"
    with pytest.raises(ValueError, match=r"0\.\.255"):
        Bytes().decode([256])


@pytest.mark.parametrize("vocabulary", [Characters("\nab"), Bytes(), Words((UNKNOWN, "\n", "the"))])
def test_vocabularies_go_through_json(vocabulary: tokens.Vocabulary) -> None:
    assert from_json(json.loads(json.dumps(vocabulary.as_json()))) == vocabulary


@pytest.mark.parametrize("value", ["", "ba", "aa", 3, ["a"], [UNKNOWN, "\n", "a", "a"], [UNKNOWN, "\n", 3], {}])
def test_what_is_no_vocabulary_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="the vocabulary"):
        from_json(value)


def test_the_embedded_corpus_keeps_its_cost_at_byte_level(embedded_corpus: Corpus) -> None:
    loaded = corpus.load("embedded", "byte")
    assert loaded.cost is not None
    assert embedded_corpus.cost is not None
    assert np.array_equal(loaded.cost["val"], embedded_corpus.cost["val"])
    assert len(loaded.val) == len(loaded.cost["val"])
    assert corpus.load("embedded", "word").cost is None


# --- the cache --------------------------------------------------------------------------------------------------------


def assert_same(left: Corpus, right: Corpus) -> None:
    assert left.vocabulary == right.vocabulary
    assert left.fingerprint == right.fingerprint
    for split in SPLITS:
        assert left.tapes[split].dtype == right.tapes[split].dtype
        assert torch.equal(left.tapes[split], right.tapes[split])


def streamed(data: str, *how: Any) -> Corpus:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "STREAMED_ABOVE", dict.fromkeys(corpus.STREAMED_ABOVE, -1))
        return corpus.load(data, *how)


TEXTS = st.one_of(
    st.text("ab \n\ré中", min_size=1, max_size=60).map(lambda text: ("a b é中\n" + text).encode()),
    st.binary(min_size=1, max_size=40),
    st.just(b"\xef\xbb\xbfone two\r\nthree\rfour five"),
    st.just(b"long-word-without-any-space" * 9),
    st.just(b"a\ttab\x0band\x0cno space\t\t" * 3),
)


@settings(max_examples=120, deadline=None)
@given(TEXTS, st.sampled_from(["char", "byte", "word"]), st.sampled_from([3, 5, 1 << 18]), st.booleans())
def test_a_streamed_corpus_is_the_one_made_in_memory(content: bytes, kind: str, chunk: int, one_file: bool) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", name)
        patch.setattr(tokens, "CHUNK", max(chunk, 4))  # four bytes hold any character
        if one_file:
            data = str(Path(name) / "c.txt")
            Path(data).write_bytes(content * 5)
        else:
            data = folder(Path(name) / "c", content + b"\n", content, content[:20])
        try:
            expected = corpus.load(data, kind)
        except UserError as error:
            with pytest.raises(UserError, match=re.escape(str(error))):
                streamed(data, kind)
        else:
            assert_same(streamed(data, kind), expected)


def test_an_entry_of_the_cache_is_made_once_and_again_when_it_must_be(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = folder(tmp_path / "c", b"one two three\n" * 9, b"one\n", b"two\n")
    built = []
    write = corpus._write
    monkeypatch.setattr(corpus, "_write", lambda *args: built.append(1) or write(*args))
    first = streamed(data, "word")
    assert_same(streamed(data, "word"), first)
    assert len(built) == 1
    streamed(data, "word", 2)
    streamed(data, "byte")
    assert len(built) == 3, "other settings are other entries"
    for tape in cache.glob("*/train"):
        cut = tape.read_bytes()[:-1]
        tape.unlink()  # the loaded corpora keep the files that they have mapped
        tape.write_bytes(cut)
    assert_same(streamed(data, "word"), first)
    assert len(built) == 4, "a cut tape is made again"
    (tmp_path / "c" / "val.txt").write_bytes(b"three\n")
    assert streamed(data, "word").val.tolist() == [3, 1]
    assert not list(cache.glob(".*")), "something was left behind"


BUILDING = """
import sys, time
from pathlib import Path
from mlp_fast.corpus import load as corpus

data, together, number = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
corpus.STREAMED_ABOVE = dict.fromkeys(corpus.STREAMED_ABOVE, -1)
write = corpus._write

def slow_write(*arguments):
    (together / f"built by {number}").touch()
    time.sleep(1)  # the other comes meanwhile
    return write(*arguments)

corpus._write = slow_write
(together / f"ready {number}").touch()
while len(list(together.glob("ready *"))) < 2:
    time.sleep(0.01)
loaded = corpus.load(data, "word")
print(loaded.fingerprint, loaded.train.tolist())
"""


def test_two_processes_that_want_one_entry_make_it_once(tmp_path: Path, cache: Path) -> None:
    data = folder(tmp_path / "c", b"one two three\n" * 9, b"one\n", b"two\n")
    (tmp_path / "together").mkdir()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BUILDING, data, str(tmp_path / "together"), number],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in "12"
    ]
    told = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    expected = corpus.load(data, "word")
    assert told == [(f"{expected.fingerprint} {expected.train.tolist()}\n", "")] * 2
    assert len(list((tmp_path / "together").glob("built by *"))) == 1
    (entry,) = (path for path in cache.iterdir() if path.suffix != ".lock")
    assert sorted(path.name for path in entry.iterdir()) == sorted([token_cache.DESCRIPTION, *SPLITS])
    assert [path.name for path in cache.glob("*.lock")] == [f"{entry.name}.lock"]


def test_a_failed_build_leaves_nothing_and_an_unwritable_cache_is_named(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = folder(tmp_path / "c", b"ab\n", b"ab\nabz\n", b"a\n")
    with pytest.raises(UserError, match=r"val\.txt, line 2: the character 'z'"):
        streamed(data, "char")
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        streamed(data, "byte")


def test_a_corpus_larger_than_memory_is_mapped_and_read(tmp_path: Path) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    swap = re.search(r"SwapTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    size = memory + 1024 * int(swap[1] if swap else 0)  # tokens of two bytes: twice what the machine has
    path = tmp_path / "tape"
    with path.open("wb") as file:  # a hole: no block of the disk is taken but for the last
        file.truncate(2 * size)
        file.seek(-12, os.SEEK_END)
        file.write(np.arange(1, 7, dtype=np.int16).tobytes())
    mapped = Tape(token_cache.map_tape(path, np.int16), 3)
    assert len(mapped.tokens) == size
    assert mapped.tokens.dtype == torch.int16
    contexts, targets = mapped.batch(0, 5)
    assert contexts.sum() == targets.sum() == 0
    contexts, targets = mapped.batch(1, mapped.num_windows - 2, slice(0, 4))  # the last two, and from the start again
    assert contexts.tolist() == [[2, 3, 4], [3, 4, 5], [0, 0, 0], [0, 0, 0]]
    assert targets.tolist() == [5, 6, 0, 0]
    assert evaluated_windows(mapped, 50, 2).counts.tolist() == [100]


def test_a_mapped_tape_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    def anonymous() -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]

    size = 100_000_000
    with (tmp_path / "tape").open("wb") as file:
        file.truncate(size)
        file.seek(size - 1)
        file.write(b"\7")
    before = anonymous()
    tape = token_cache.map_tape(tmp_path / "tape", np.uint8)
    assert sum(int(part.max()) for part in tape.split(1 << 20)) == 7
    assert anonymous() - before < size / 5


def test_tokens_that_cannot_be_mapped_are_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tape"
    with pytest.raises(UserError, match=r"tape cannot be mapped into memory \(No such file.*delete that folder"):
        token_cache.map_tape(path, np.uint8)
    path.write_bytes(b"odd")
    with pytest.raises(UserError, match=r"tape cannot be mapped into memory \(.*XDG_CACHE_HOME"):
        token_cache.map_tape(path, np.int16)

    def refused(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(np, "memmap", refused)
    with pytest.raises(UserError, match=r"^[^\n]*tape cannot be mapped into memory \(Cannot allocate memory\)[^\n]*$"):
        token_cache.map_tape(path, np.uint8)
    path.write_bytes(b"")
    assert len(token_cache.map_tape(path, np.uint8)) == 0


# --- a word model -----------------------------------------------------------------------------------------------------


def test_generated_text_is_made_of_its_words_and_repeats_itself_exactly(tmp_path: Path) -> None:
    for name in ("a", "b"):
        generate_words.generate(tmp_path / name, 30_000)
    for split in SPLITS:
        assert (tmp_path / "a" / f"{split}.txt").read_bytes() == (tmp_path / "b" / f"{split}.txt").read_bytes()
    loaded = corpus.load(str(tmp_path / "a"), "word", 1)
    assert 30_000 <= len(loaded.train) < 30_100
    known = {generate_words.spelled(rank) for rank in range(generate_words.VOCABULARY)} | {".", "\n"}
    assert len(known) == generate_words.VOCABULARY + 2
    words = [loaded.vocabulary.decode([token]).strip(" ") for token in loaded.train.tolist()]
    assert np.mean([word not in known for word in words]) == pytest.approx(generate_words.RARE * 0.86, rel=0.25)


def test_what_the_page_says_of_the_generated_vocabulary_is_its_size() -> None:
    """That it is so in ten million tokens is seen by the long test below."""
    words = generate_words.VOCABULARY
    page = " ".join((Path(__file__).parent.parent / "docs" / "scale.md").read_text().split())
    assert f"Its vocabulary is of {words + 3:,}: the {words:,} words that are frequent enough" in page
    assert f'"bengio2003": Shape(V={words + 3},' in page


def test_the_papers_model_trains_on_words_and_is_saved_sampled_and_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate_words.generate(tmp_path / "c", 5_000)
    out, log = tmp_path / "run", tmp_path / "log"
    command = ["--preset", "bengio2003", "--data", str(tmp_path / "c"), "--out", str(out), "--log-json", str(log)]
    small = ["--hidden-size", "20", "--num-steps", "40", "--eval-every", "40", "--learning-rate", "0.01"]
    assert train.main([*command, *small, "--backend", "eager", "--quiet"]) == 0
    events = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [event["val_loss"] for event in events if event["event"] == "eval"]
    assert losses[-1] < losses[0] - 1
    assert evaluate.main([str(out)]) == 0
    test = next(event["loss"] for event in events if event["event"] == "test")
    assert f"test_loss {test:.6f}" in capsys.readouterr().out
    loaded = corpus.load(str(tmp_path / "c"), "word", 4)
    prompt = loaded.vocabulary.decode(loaded.train[:5])
    assert sample.main([str(out), "--prompt", prompt.replace("\n", "\\n"), "--length", "30"]) == 0
    text = capsys.readouterr().out.removesuffix("\n")
    assert text.startswith(prompt)
    assert len(loaded.vocabulary.encode(text)) == 35


@pytest.mark.long
def test_ten_million_words_train_within_4_gib(tmp_path: Path) -> None:
    """Tokenising included, in a process of its own."""
    generate_words.generate(tmp_path / "words", 10_000_000)
    options = ["--preset", "bengio2003", "--data", str(tmp_path / "words"), "--num-steps", "20", "--batch-size", "256"]
    log = tmp_path / "log"
    command = [
        sys.executable,
        "-m",
        "mlp_fast.train",
        *options,
        "--backend",
        "eager",
        "--quiet",
        "--log-json",
        str(log),
    ]
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert usage.ru_maxrss * 1024 < 4 * 2**30
    events = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [event["val_loss"] for event in events if event["event"] == "eval"]
    assert losses[-1] < losses[0] - 0.1
    loaded = corpus.load(str(tmp_path / "words"), "word", 4)
    assert len(loaded.train) >= 10_000_000
    known = {generate_words.spelled(rank) for rank in range(generate_words.VOCABULARY)}
    assert set(loaded.vocabulary.as_json()) == known | {".", "\n", UNKNOWN}


@pytest.mark.parametrize(("text", "told"), [("天地玄黄，宇宙洪荒。\n", True), ("the cat sat.\n", False)])
def test_words_where_there_are_no_spaces_are_warned_of(
    tmp_path: Path, text: str, told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.txt").write_text(text * 200, encoding="utf-8")
    sizes = ["--backend=eager", "--embedding-size=2", "--hidden-size=2", "--batch-size=4", "--num-steps=1", "--quiet"]
    assert train.main([*sizes, f"--data={tmp_path / 'c.txt'}", "--tokens=word"]) == 0
    assert ("--tokens char suits it better" in capsys.readouterr().err) is told

"""Reading, splitting and tokenising, against plain Python; what cannot be read is one clear line."""

import contextlib
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings

from mlp_fast.config import SPLITTING, Config
from mlp_fast.corpus import load as corpus
from mlp_fast.corpus import split as split_module
from mlp_fast.corpus import tokenizer as tokens
from mlp_fast.corpus.load import SPLITS, Corpus
from mlp_fast.corpus.tokenizer import Characters, Words
from mlp_fast.data import synthesize
from mlp_fast.errors import UserError
from mlp_fast.model.rng import RNG


def folder(path: Path, **splits: bytes) -> str:
    """A corpus folder; splits not given are small good ones."""
    path.mkdir(exist_ok=True)
    for split, content in {"train": b"anna\nbob\n", "val": b"anna\n", "test": b"bob\n", **splits}.items():
        (path / f"{split}.txt").write_bytes(content)
    return str(path)


def one_file(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def texts(loaded: Corpus) -> dict[str, str]:
    return {split: loaded.vocabulary.decode(tape) for split, tape in loaded.tapes.items()}


def plain_read(path: Path) -> str:
    """How Python itself reads a text file."""
    with path.open(encoding="utf-8-sig") as file:
        return file.read()


def plain_split(text: str) -> dict[str, str]:
    """The splits of a one-file corpus by lists, one draw at a time."""
    lines = [line + "\n" for line in text.removesuffix("\n").split("\n")]
    rng = RNG(split_module.SPLIT_SEED)
    draws = [rng.random_u32() for _ in lines]
    order = sorted(range(len(lines)), key=lambda i: (draws[i], i))
    k = max(1, (3 * len(lines) + 50) // 100)
    parts = {"test": order[:k], "val": order[k : 2 * k], "train": order[2 * k :]}
    return {split: "".join(lines[i] for i in parts[split]) for split in SPLITS}


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Ends a block that waits for ever, where a test would otherwise hang."""

    def expired(signum: int, frame: object) -> None:
        raise TimeoutError(f"still waiting after {seconds} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- vocabulary -------------------------------------------------------------------------------------------------------


def test_tokens_are_places_among_the_sorted_characters_of_train(tmp_path: Path) -> None:
    loaded = corpus.load(folder(tmp_path / "c", train="ñandú\nÄ\x00z\n".encode(), val="zñ".encode(), test=b"\n"))
    assert loaded.vocabulary.characters == "".join(sorted(set("ñandú\nÄ\x00z")))
    assert len(loaded.vocabulary) == 9
    assert loaded.vocabulary.encode("zñ\x00") == [*loaded.val.tolist(), 0]
    assert loaded.vocabulary.decode([0, 1, 8]) == "\x00\nú"
    assert loaded.vocabulary.decode([]) == ""
    assert loaded.vocabulary == Characters("\x00\nadnzÄñú")


@pytest.mark.parametrize(
    ("character", "named"), [("Z", r"'Z' \(U\+005A\)"), ("\t", r"'\\t' \(U\+0009\)"), ("\ud800", r"U\+D800")]
)
def test_encode_names_the_character_it_lacks(character: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        Characters("\nabc").encode("ab" + character)


@pytest.mark.parametrize("token", [-1, 4])
def test_decode_refuses_what_is_no_token(token: int) -> None:
    with pytest.raises(ValueError, match=r"0\.\.3"):
        Characters("\nabc").decode([0, token])


@pytest.mark.parametrize(
    ("V", "dtype"),
    [
        (255, torch.uint8),
        (256, torch.uint8),
        (257, torch.int16),
        (32_768, torch.int16),
        (32_769, torch.int32),
        (70_000, torch.int32),
    ],
)
def test_the_tape_is_as_wide_as_the_vocabulary_needs(tmp_path: Path, V: int, dtype: torch.dtype) -> None:
    characters = [chr(c) for c in range(14, 14 + V + 2048) if not 0xD800 <= c < 0xE000][:V]
    text = "".join(reversed(characters)) + "".join(characters)
    loaded = corpus.load(folder(tmp_path / "c", train=text.encode(), val=text[:9].encode(), test=text[-9:].encode()))
    assert len(loaded.vocabulary) == V
    assert {tape.dtype for tape in loaded.tapes.values()} == {dtype}
    assert loaded.train.tolist() == [*reversed(range(V)), *range(V)]
    assert texts(loaded) == {"train": text, "val": text[:9], "test": text[-9:]}


# --- reading ----------------------------------------------------------------------------------------------------------

READABLE = {
    "plain": b"anna\nbob\n",
    "CRLF": b"anna\r\nbob\r\n",
    "lone CR": b"anna\rbob\r",
    "mixed line ends": b"a\r\r\n\n\rb\r\n\r\nc\n\r",
    "byte-order mark": b"\xef\xbb\xbfanna\n",
    "a second byte-order mark is a character": b"\xef\xbb\xbf\xef\xbb\xbfanna\n",
    "empty lines": b"\n\n\nanna\n\n",
    "one giant line": b"anna" * 300_000,
    "no trailing newline": b"anna\nbob",
    "NUL": b"a\x00b\n\x00",
    "separators that are no line ends": "a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g\n".encode(),
    "wide": "añ中😀\n".encode() * 100_000,
}


@pytest.mark.parametrize("content", READABLE.values(), ids=READABLE)
@pytest.mark.parametrize("chunk", [None, 4, 5])
def test_text_reads_as_python_reads_it(
    tmp_path: Path, content: bytes, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunk:
        monkeypatch.setattr(tokens, "CHUNK", chunk)
        content = content[:4_000].decode(errors="ignore").encode()
    path = folder(tmp_path / "c", train=content, val=content, test=content)
    expected = plain_read(tmp_path / "c" / "val.txt")
    loaded = corpus.load(path)
    assert texts(loaded) == dict.fromkeys(SPLITS, expected)
    assert loaded.vocabulary.characters == "".join(sorted(set(expected)))


@pytest.mark.parametrize("content", READABLE.values(), ids=READABLE)
def test_one_file_is_split_as_the_plain_way_splits_it(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in chunks so small that every path is taken."""
    content = (content[:2_000].decode(errors="ignore") + "\n1\n2").encode()
    path = one_file(tmp_path / "c.txt", content + b"\nabn12\x00" + "".join(sorted(set(content.decode()))).encode() * 9)
    expected = plain_split(plain_read(Path(path)))
    for chunk, lines in ((1 << 18, 1 << 12), (4, 2), (1000, 3)):
        monkeypatch.setattr(tokens, "CHUNK", chunk)
        monkeypatch.setattr(split_module, "_LINES", lines)
        assert texts(corpus.load(path)) == expected


def test_one_file_gives_each_line_to_one_split(tmp_path: Path) -> None:
    lines = [f"{i:05d}" * (1 + i % 7) for i in range(10_000)]
    loaded = corpus.load(one_file(tmp_path / "c.txt", "\n".join(lines).encode()))
    split = {name: text.removesuffix("\n").split("\n") for name, text in texts(loaded).items()}
    assert {name: len(part) for name, part in split.items()} == {"train": 9_400, "val": 300, "test": 300}
    assert sorted(itertools.chain(*split.values())) == sorted(lines)
    for part in split.values():
        places = [int(line[:5]) for line in part]
        ascents = sum(a < b for a, b in itertools.pairwise(places))
        assert abs(ascents / len(part) - 0.5) < 0.1, "the lines of a split are not in random order"
        assert abs(np.mean(places) - 5_000) < 4 * 2_887 / np.sqrt(len(part)), "a split is not from all over the file"


@pytest.mark.parametrize("content", [b"a", b"a\n", b"a\nb", b"a\nb\n", b"a" * 1_000_000])
def test_one_file_of_too_few_lines_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UserError, match=r"c\.txt has fewer than 3 lines"):
        corpus.load(one_file(tmp_path / "c.txt", content))


@pytest.mark.parametrize("content", [b"a\na\na", b"\n\n\n", b"a\r\ra"])
def test_three_lines_are_enough(tmp_path: Path, content: bytes) -> None:
    loaded = corpus.load(one_file(tmp_path / "c.txt", content))
    assert [text.count("\n") for text in texts(loaded).values()] == [1, 1, 1]


# --- what cannot be read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "offset"),
    [
        (b"ab\xffcd", 2),
        (b"ab\xc3", 2),  # cut in the middle of a character
        (b"ab\xed\xa0\x80", 2),  # a lone surrogate
        (b"\xef\xbb\xbfab\xff", 5),
        (b"a\r\nb\r\n\xff", 6),  # in the file, not in the text made of it
        (b"\xf0\x9f\x98\x80\x80ab", 4),
        (b"a" * 1_000_000 + b"\xfe", 1_000_000),
        ("é".encode() * 600_001 + b"\x80", 1_200_002),
    ],
)
def test_bytes_that_are_not_utf8_are_named_with_their_offset(tmp_path: Path, content: bytes, offset: int) -> None:
    wrong = content[offset]
    for data in (folder(tmp_path / "c", val=content), one_file(tmp_path / "val.txt", content)):
        with pytest.raises(UserError, match=rf"val\.txt is not UTF-8: byte 0x{wrong:02x} at offset {offset} "):
            corpus.load(data)


@pytest.mark.parametrize(("split", "content"), [("train", b""), ("val", b""), ("test", b"\xef\xbb\xbf")])
def test_an_empty_split_is_named(tmp_path: Path, split: str, content: bytes) -> None:
    with pytest.raises(UserError, match=rf"{split}\.txt is empty"):
        corpus.load(folder(tmp_path / "c", **{split: content}))


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_character_train_lacks_is_named_with_file_and_line(tmp_path: Path, split: str) -> None:
    content = "anna\r\nbob\rbéb\nzoé\n".encode()
    with pytest.raises(UserError, match=rf"{split}\.txt, line 3: the character 'é' \(U\+00E9\) of the {split} split"):
        corpus.load(folder(tmp_path / "c", **{split: content}))


@pytest.mark.parametrize("split", SPLITTING)
def test_one_file_has_the_characters_of_all_of_it(tmp_path: Path, split: str) -> None:
    """Every line has a character of its own: which of them go to train is the program's doing, not the user's."""
    lines = [chr(0x4E00 + i) for i in range(50)]
    text = "\n".join(lines) + "\n"
    loaded = corpus.load(one_file(tmp_path / "c.txt", text.encode()), split=split)
    assert loaded.vocabulary.characters == "".join(sorted(set(text)))
    expected = plain_split(text) if split == "shuffled" else plain_cut(text.encode(), "char")
    assert texts(loaded) == expected
    assert not set(expected["val"]) <= set(expected["train"])


def test_a_character_that_a_given_vocabulary_lacks_is_named_with_file_and_line(tmp_path: Path) -> None:
    content = "anna\r\nbob\rbéb\nzoé\n".encode()
    known = Characters("\nabno")
    for data, of in (
        (one_file(tmp_path / "c.txt", content), ""),
        (folder(tmp_path / "t", train=content), " of the train split"),
    ):
        with pytest.raises(
            UserError, match=rf"line 3: the character 'é' \(U\+00E9\){of} is not in the vocabulary of the"
        ):
            corpus.load(data, vocabulary=known)
    loaded = corpus.load(folder(tmp_path / "c"), vocabulary=Characters("\nabnoxyz"))
    assert loaded.train.tolist() == [1, 3, 3, 1, 0, 2, 4, 2, 0]
    assert len(loaded.vocabulary) == 8
    words = corpus.load(folder(tmp_path / "c"), "word", vocabulary=Words(("<unk>", "\n", "bob")))
    assert words.train.tolist() == [0, 1, 2, 1]


# --- in order ---------------------------------------------------------------------------------------------------------


def plain_cut(text: bytes, kind: str) -> dict[str, str]:
    """The splits of a text in its order: 94% of the bytes, 3% and 3%, the places moved on to the next token's begin."""
    k = max(1, (3 * len(text) + 50) // 100)
    places = []
    for place in (len(text) - 2 * k, len(text) - k):
        while kind != "byte" and place < len(text) and text[place] in range(0x80, 0xC0):
            place += 1
        if kind == "word" and any(c in b" \t\n\r\v\f" for c in text[place:]):
            place = next(i for i in range(place, len(text)) if text[i] in b" \t\n\r\v\f") + 1
        places.append(place)
    a, b = places
    return {"train": text[:a].decode(), "val": text[a:b].decode(), "test": text[b:].decode()}


@pytest.mark.parametrize("kind", ["char", "word"])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        "It was the best of times, it was the worst of times, " * 40,  # prose in one line
        "天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。" * 40,
        "one\ntwo\n" * 50,
        "ab" * 20,  # two lines would be too few
    ],
)
def test_a_text_whose_order_matters_is_cut_in_its_order(
    tmp_path: Path, text: str, streamed: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = one_file(tmp_path / "c.txt", text.encode())
    expected = plain_cut(text.encode(), kind)
    assert "".join(expected.values()) == text
    if streamed:
        monkeypatch.setattr(corpus, "STREAMED_ABOVE", dict.fromkeys(corpus.STREAMED_ABOVE, -1))
        monkeypatch.setattr(tokens, "CHUNK", 7)
    loaded = corpus.load(data, kind, split="contiguous")
    if kind == "char":
        assert texts(loaded) == expected
    else:
        words = Words.of([expected["train"].encode()], 1)
        assert loaded.vocabulary == words
        assert {split: tape.tolist() for split, tape in loaded.tapes.items()} == {
            split: words.encode(part) for split, part in expected.items()
        }


@pytest.mark.parametrize("streamed", [False, True])
def test_bytes_in_order_are_cut_anywhere(tmp_path: Path, streamed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if streamed:
        monkeypatch.setattr(corpus, "STREAMED_ABOVE", dict.fromkeys(corpus.STREAMED_ABOVE, -1))
        monkeypatch.setattr(tokens, "CHUNK", 7)
    content = bytes(range(0x80, 0xC0)) * 16  # none of them begins a character
    loaded = corpus.load(one_file(tmp_path / "c.bin", content), "byte", split="contiguous")
    assert {split: len(tape) for split, tape in loaded.tapes.items()} == {"train": 962, "val": 31, "test": 31}
    assert b"".join(bytes(tape.tolist()) for tape in loaded.tapes.values()) == content


@pytest.mark.parametrize("content", ["a", "ab", "é", "中", "éa"])
def test_a_text_too_short_to_be_cut_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(UserError, match=r"c\.txt is too short for train, val and test"):
        corpus.load(one_file(tmp_path / "c.txt", content.encode()), split="contiguous")


def test_too_few_lines_name_the_other_way(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--split contiguous"):
        corpus.load(one_file(tmp_path / "c.txt", b"prose in one line"))


# --- other encodings --------------------------------------------------------------------------------------------------

ENCODED = {
    "gbk": "中文，名字\r\n天地\n",
    "big5": "中文名字\n",
    "shift_jis": "日本語\n",
    "iso2022_jp": "日本語 abc\n",  # keeps a state between characters
    "latin-1": "café\rnaïve\n",
    "utf-16": "añ中😀\n",
    "utf-16-le": "añ中😀\n",
    "utf-8-sig": "añ中\n",
    "UTF8": "añ中\n",
}


@pytest.mark.parametrize("encoding", ENCODED)
@pytest.mark.parametrize("streamed", [False, True])
def test_text_in_another_encoding_reads_as_python_reads_it(
    tmp_path: Path, encoding: str, streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    content = (ENCODED[encoding] * 50).encode(encoding)
    data = folder(tmp_path / "c", train=content, val=content, test=content)
    with (tmp_path / "c" / "val.txt").open(encoding=encoding) as file:
        expected = file.read()
    if streamed:
        monkeypatch.setattr(corpus, "STREAMED_ABOVE", dict.fromkeys(corpus.STREAMED_ABOVE, -1))
    monkeypatch.setattr(tokens, "CHUNK", 7)  # cuts through characters
    loaded = corpus.load(data, encoding=encoding)
    assert texts(loaded) == dict.fromkeys(SPLITS, expected)
    assert (
        loaded.fingerprint
        == corpus.load(folder(tmp_path / "u", **dict.fromkeys(SPLITS, expected.encode()))).fingerprint
    )


@pytest.mark.parametrize(
    ("encoding", "content", "told"),
    [
        ("gbk", b"ab\xff\xffcd", "c.txt is not gbk: byte 0xff at offset 2 "),
        ("gbk", b"a" * 20 + b"\xd6", "c.txt is not gbk: byte 0xd6 at offset 20 "),  # cut in the middle
        ("ascii", b"a" * 9 + b"\xe9", "c.txt is not ascii: byte 0xe9 at offset 9 "),
        ("utf-16-le", b"a\0b\0\x00\xd8c\0", "c.txt is not utf-16-le: byte 0x00 at offset 4 "),
        ("utf-7", b"a+2AA-\n", "c.txt "),  # a lone surrogate
        ("utf-8", b"\xd6\xd0", "c.txt is not UTF-8: byte 0xd6 at offset 0 "),
    ],
)
def test_bytes_that_are_not_of_the_encoding_are_named_with_their_offset(
    tmp_path: Path, encoding: str, content: bytes, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "CHUNK", 7)
    with pytest.raises(UserError, match=re.escape(told)) as error:
        corpus.load(one_file(tmp_path / "c.txt", content), encoding=encoding)
    assert "\n" not in str(error.value)
    assert "--encoding" in str(error.value)


def test_a_character_is_named_in_its_encoding(tmp_path: Path) -> None:
    data = folder(tmp_path / "c", train=b"ab\n", val="a\n俾\n".encode("gbk"), test=b"a\n")
    with pytest.raises(UserError, match=r"val\.txt, line 2: the character '俾'"):
        corpus.load(data, encoding="gbk")


@pytest.mark.parametrize("name", ["klingon", "hex", "rot13", "base64", "", "a\0b"])
def test_what_is_no_encoding_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="--encoding"):
        Config(encoding=name)


def test_bytes_have_no_encoding() -> None:
    with pytest.raises(UserError, match="--encoding gbk is for text"):
        Config(encoding="gbk", tokens="byte")


def test_words_of_a_script_without_spaces_are_told_from_others() -> None:
    chinese, english = ("天地玄黄，宇宙洪荒。日月盈昃。", "the cat sat on 中文 mats.\n")
    assert Words.of([chinese.encode()], 1).unspaced
    assert not Words.of([english.encode()], 1).unspaced


def test_missing_and_strange_names_are_one_line(tmp_path: Path) -> None:
    cases = {
        str(tmp_path / "none"): "no such file or folder",
        str(tmp_path / "new\nline"): "no such file or folder",
        str(tmp_path): r"train\.txt: no such file",
        "": "empty",
        "a\x00b": "not a possible file name",
        "\ud800": "not a possible file name",
        str(tmp_path / ("n" * 300)): "name too long",
        str(tmp_path / "file" / "below"): "Not a directory",
    }
    (tmp_path / "file").write_bytes(b"a")
    for data, message in cases.items():
        with pytest.raises(UserError, match=message) as error:
            corpus.load(data)
        assert "\n" not in str(error.value)


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    data = folder(tmp_path / "c")
    (tmp_path / "c" / "val.txt").unlink()
    (tmp_path / "c" / "val.txt").mkdir()
    with pytest.raises(UserError, match=r"val\.txt is a folder"):
        corpus.load(data)


def test_special_files_are_refused_without_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folder(tmp_path / "c")
    (tmp_path / "c" / "val.txt").unlink()
    os.mkfifo(tmp_path / "c" / "val.txt")
    monkeypatch.chdir(tmp_path)  # the address of a socket is at most 108 bytes
    with socket.socket(socket.AF_UNIX) as server, at_most(10):
        server.bind("socket")
        for path in (data, str(tmp_path / "c" / "val.txt"), str(tmp_path / "socket"), "/dev/zero"):
            with pytest.raises(UserError, match="is a FIFO, socket or device"):
                corpus.load(path)


def test_a_file_without_permission_is_named() -> None:
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        path = one_file(Path(name) / "c.txt", b"a\nb\nc\n")
        os.chmod(path, 0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root may read everything
        try:
            with pytest.raises(UserError, match=r"cannot read .*c\.txt: Permission denied"):
                corpus.load(path)
        finally:
            os.seteuid(user)


# --- the corpus -------------------------------------------------------------------------------------------------------


def test_the_embedded_corpus_has_its_cost(embedded_corpus: Corpus) -> None:
    assert embedded_corpus.name == "embedded"
    assert embedded_corpus.vocabulary.characters == "\nabcdefghijklmnopqrstuvwxyz"
    assert {split: text.count("\n") for split, text in texts(embedded_corpus).items()} == {
        "train": 30_032,
        "val": 1_000,
        "test": 1_000,
    }
    assert embedded_corpus.cost is not None
    for split, tape in embedded_corpus.tapes.items():
        cost = embedded_corpus.cost[split]
        assert (cost.shape, cost.dtype) == ((len(tape),), np.float64)
        assert np.all((cost > 0) & np.isfinite(cost))
        text = embedded_corpus.vocabulary.decode(tape)
        np.testing.assert_array_equal(cost, synthesize.embedded_process().cost(text))


def test_the_fingerprint_tells_corpora_apart(tmp_path: Path) -> None:
    base = corpus.load(folder(tmp_path / "a"))
    assert base.cost is None
    assert re.fullmatch("[0-9a-f]{64}", base.fingerprint)
    assert corpus.load(folder(tmp_path / "b")).fingerprint == base.fingerprint
    others = [
        {"train": b"anna\nbobb\n"},
        {"train": b"anna\nboa\n"},
        {"val": b"bnna\n"},
        {"val": b"anna\nb", "test": b"ob\n"},
        {"train": b"bnnb\ncoc\n", "val": b"bnnb\n", "test": b"coc\n"},  # the same tokens of another alphabet
        {"train": b"anna\nbob", "val": b"\nanna\n"},
    ]
    prints = [corpus.load(folder(tmp_path / str(i), **splits)).fingerprint for i, splits in enumerate(others)]
    assert len({base.fingerprint, *prints}) == 1 + len(others)


def test_sizes_are_checked_against_context_and_batch(tmp_path: Path) -> None:
    loaded = corpus.load(folder(tmp_path / "c", val=b"anna\n", test=b"bob\nbob\n"))
    corpus.check_sizes(loaded, context_length=4, batch_size=5)
    with pytest.raises(UserError, match=r"the val split .* has 5 tokens; a context length of 5 needs at least 6"):
        corpus.check_sizes(loaded, context_length=5, batch_size=5)
    with pytest.raises(UserError, match=r"the val split .* has 5 tokens, fewer than one batch of 6"):
        corpus.check_sizes(loaded, context_length=4, batch_size=6)


# --- any file at all --------------------------------------------------------------------------------------------------

ANY_BYTES = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=200).map(lambda text: text.encode(errors="surrogatepass")),
    st.text("ab\n\r\x00é\ufeff", max_size=200).map(str.encode),
    st.lists(st.binary(max_size=3), max_size=80).map(b"\n".join),
    st.lists(st.text("ab", max_size=4), min_size=3, max_size=80).map(lambda lines: "\r\n".join(lines).encode()),
)


def as_it_should_load(read: Callable[[], dict[str, str]], *, one_file: bool = False) -> dict[str, str] | None:
    """The splits as plain Python makes them; None where no corpus can be made."""
    try:
        splits = read()
    except UnicodeDecodeError:
        return None
    known = one_file or set(splits["val"] + splits["test"]) <= set(splits["train"])
    return splits if all(splits.values()) and known else None


def assert_loads(data: str, expected: dict[str, str] | None) -> None:
    if expected is not None:
        assert texts(corpus.load(data)) == expected
        return
    with pytest.raises(UserError) as error:
        corpus.load(data)
    assert "\n" not in str(error.value)


@settings(max_examples=300, deadline=None)
@given(ANY_BYTES)
@example(b"\r\n" * 3)
@example(b"\xef\xbb\xbf\n\n\n")
def test_any_file_loads_whole_or_is_refused_in_one_line(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        data = one_file(Path(name) / "c.txt", content)
        assert_loads(data, as_it_should_load(lambda: plain_split(plain_read(Path(data))), one_file=True))


@settings(max_examples=200, deadline=None)
@given(ANY_BYTES, ANY_BYTES)
def test_any_folder_loads_whole_or_is_refused_in_one_line(train: bytes, other: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        data = folder(path, train=train + other, val=other, test=other)
        assert_loads(data, as_it_should_load(lambda: {s: plain_read(path / f"{s}.txt") for s in SPLITS}))


# --- large files ------------------------------------------------------------------------------------------------------

MEASURE = """
import re, sys
from pathlib import Path
from mlp_fast.corpus import load as corpus

def resident(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

corpus.load("embedded")  # whatever is loaded once is loaded
Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
before = resident("VmRSS")
for _ in range(int(sys.argv[2])):
    loaded = corpus.load(sys.argv[1])
    tokens = sum(len(tape) for tape in loaded.tapes.values())
    del loaded
print(resident("VmHWM") - before, tokens)
"""

LINE = "the quick brown fox jumps over the lazy dog\n"


def large_corpus(kind: str, path: Path, size: int) -> str:
    """A corpus of about `size` bytes: text, names, lines of 5, wide characters, a folder, or one giant line."""
    if kind == "wide":
        block = ("".join(chr(0x4E00 + i) for i in range(500)) + "\n" + f"{LINE[:-1]} 中文é\n" * 2_000).encode()
        return one_file(path, block * (size // len(block)))
    draws = np.frombuffer(RNG(1).fill_u32(size // 4 + 1).tobytes(), np.uint8)[:size]
    content = ord("a") + draws % 26
    if kind == "giant line":
        content[[size // 4, size // 2, size // 2 + 2]] = ord("\n")
        content[size // 2 + 1] = content[-1] = ord("a")
    elif kind == "lines of 5":
        content[4::5] = ord("\n")
    else:
        content[draws < 256 // (8 if kind == "names" else 40)] = ord("\n")
    if kind != "folder":
        return one_file(path, content.tobytes())
    val, train = content[: size // 16].tobytes(), content[size // 16 :].tobytes()
    return folder(path, train=b"abcdefghijklmnopqrstuvwxyz\n" + train, val=val, test=val[:1000])


def assert_lean(data: str, repeats: int) -> None:
    path = Path(data)
    size = sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, data, str(repeats)]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    memory, tokens = output.split()
    assert size / 3 < int(tokens) <= size + 1  # a newline may be added
    assert int(memory) <= 4 * size, f"{int(memory) / size:.2f} times the file"


@pytest.mark.parametrize("kind", ["text", "folder", "giant line"])
def test_20_megabytes_load_lean(kind: str, tmp_path: Path) -> None:
    assert_lean(large_corpus(kind, tmp_path / "c", 20_000_000), repeats=2)


def test_lines_of_5_bytes_load_in_four_times_their_size(tmp_path: Path) -> None:
    assert_lean(large_corpus("lines of 5", tmp_path / "c", 20_000_000), repeats=1)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["text", "folder", "wide", "giant line", "names"])
def test_200_megabytes_load_lean(kind: str, tmp_path: Path) -> None:
    assert_lean(large_corpus(kind, tmp_path / "c", 200_000_000), repeats=3)

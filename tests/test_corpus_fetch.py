"""The names corpus: its splits, where it is looked for, and its download against a local server."""

import hashlib
import http.server
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlp_fast.corpus import __main__ as command
from mlp_fast.corpus import names as names_module
from mlp_fast.corpus.load import Corpus, load
from mlp_fast.errors import UserError


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> bytes:
    """A stand-in for names.txt, known to the module by its own sums; no environment reaches the test."""
    lines = [f"{a}{b}{c}\n" for a in "kmnrst" for b in "aeiouy" for c in "abcdefghijklmnopqrstuvwxyz" * 3]
    content = "".join(lines)[:-1].encode()
    order = list(range(len(lines)))
    random.seed(42)
    random.shuffle(order)
    kept = content.decode().splitlines(keepends=True)
    parts = {"test": order[:1000], "val": order[1000:2000], "train": order[2000:]}
    monkeypatch.setattr(names_module, "BYTES", len(content))
    monkeypatch.setattr(names_module, "SHA256", hashlib.sha256(content).hexdigest())
    sums = {
        split: hashlib.sha256("".join(kept[i] for i in places).encode()).hexdigest() for split, places in parts.items()
    }
    monkeypatch.setattr(names_module, "SPLIT_SHA256", sums)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(names_module.VARIABLE, raising=False)
    monkeypatch.setenv("no_proxy", "*")
    return content


Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], str]]:
    """Starts a server on this machine that answers as told; gives its address."""
    servers: list[http.server.ThreadingHTTPServer] = []

    def start(answer: Answer) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/names.txt"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def answering(body: bytes, length: int | None = None, code: int = 200) -> Answer:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        handler.send_header("Content-Length", str(len(body) if length is None else length))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir()]


def test_a_good_download_is_kept_whole_and_loads(
    names: bytes, serve: Callable[[Answer], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["fetch", "--url", serve(answering(names))]) == 0
    cached = tmp_path / "cache" / "mlp_fast" / "names.txt"
    assert files_below(tmp_path) == [cached]
    assert cached.read_bytes() == names
    assert capsys.readouterr().out.count("\n") == 1
    loaded = load("names")
    assert (loaded.name, len(loaded.vocabulary), loaded.cost) == ("names", 27, None)
    assert sum(len(tape) for tape in loaded.tapes.values()) == len(names)
    assert loaded.vocabulary.decode(loaded.val).count("\n") in (999, 1000)


def test_fetch_writes_where_it_is_told_and_replaces_what_was_there(
    names: bytes, serve: Callable[[Answer], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a" / "b.txt"
    target.parent.mkdir()
    target.write_bytes(b"old")
    assert command.main(["fetch", "--url", serve(answering(names)), "--to", str(target)]) == 0
    assert files_below(tmp_path) == [target]
    monkeypatch.setenv(names_module.VARIABLE, str(target))
    assert len(load("names").train) > 0


def silent(handler: http.server.BaseHTTPRequestHandler) -> None:
    time.sleep(1)


def dripping(handler: http.server.BaseHTTPRequestHandler) -> None:
    """Each byte comes within the time-out, the whole never does."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    try:
        for _ in range(100):
            handler.wfile.write(b"x")
            time.sleep(0.05)
    except OSError:
        pass


def not_http(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"no such protocol\r\n\r\n")


def hanging_up(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def bad_answers(names: bytes) -> dict[str, tuple[Answer, str]]:
    wrong = names.replace(b"k", b"m", 1)
    return {
        "wrong sum": (answering(wrong), "sha256"),
        "cut short": (answering(names[:-100], length=len(names)), "cut short after"),
        "short": (answering(names[:-100]), "cut short after"),
        "longer": (answering(names + b"\n" * 100), "in place of"),
        "empty": (answering(b""), "cut short after 0 of"),
        "404": (answering(b"nothing here", code=404), "404"),
        "500": (answering(b"", code=500), "500"),
        "no answer": (silent, "within 0.3 s"),
        "dripping": (dripping, "within 0.3 s"),
        "not http": (not_http, "no such protocol"),
        "hanging up": (hanging_up, "closed"),
    }


@pytest.mark.parametrize("stood_before", [False, True])
@pytest.mark.parametrize("case", bad_answers(b"kk"))
def test_a_bad_download_is_one_line_and_changes_nothing(
    case: str, stood_before: bool, names: bytes, serve: Callable[[Answer], str], tmp_path: Path
) -> None:
    answer, message = bad_answers(names)[case]
    timeout = "0.3" if "within" in message else "30"
    target = tmp_path / "names.txt"
    if stood_before:
        target.write_bytes(b"what stood there")
    with pytest.raises(UserError, match=message) as error:
        command.main(["fetch", "--url", serve(answer), "--timeout", timeout, "--to", str(target)])
    assert "\n" not in str(error.value)
    assert files_below(tmp_path) == ([target] if stood_before else [])
    assert not stood_before or target.read_bytes() == b"what stood there"


def test_no_server_is_one_line(names: bytes, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/"
    for url, message in (
        (address, "refused"),
        ("names.txt", "not an http"),
        ("http://[", "http"),
        ("http://a b/", "http"),
    ):
        with pytest.raises(UserError, match=message) as error:
            command.main(["fetch", "--url", url, "--timeout", "5"])
        assert "\n" not in str(error.value)
    assert files_below(tmp_path) == []


def test_a_failed_write_leaves_the_old_file_alone(
    names: bytes, serve: Callable[[Answer], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "names.txt"
    target.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    url = serve(answering(names))
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        command.main(["fetch", "--url", url, "--to", str(target)])
    assert files_below(tmp_path) == [target]
    assert target.read_bytes() == b"old"


def test_a_target_that_cannot_be_written_is_one_line(
    names: bytes, serve: Callable[[Answer], str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    url = serve(answering(names))
    for target in (tmp_path, tmp_path / "file" / "names.txt"):
        with pytest.raises(UserError, match="cannot write"):
            command.main(["fetch", "--url", url, "--to", str(target)])
    assert files_below(tmp_path) == [tmp_path / "file"]


@pytest.mark.parametrize("timeout", ["0", "-1", "nan", "inf", "soon"])
def test_a_timeout_that_is_none_is_refused(timeout: str) -> None:
    with pytest.raises(UserError, match="--timeout") as caught:
        command.main(["fetch", "--timeout", timeout])
    assert "\n" not in str(caught.value)


def test_without_a_copy_the_way_to_get_one_is_told(names: bytes) -> None:
    with pytest.raises(UserError, match=r"python -m mlp_fast\.corpus fetch"):
        load("names")


def test_a_copy_that_is_not_the_names_corpus_is_refused(
    names: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_bytes(names[:-1] + b"x")
    monkeypatch.setenv(names_module.VARIABLE, str(copy))
    with pytest.raises(UserError, match=r"copy\.txt is not the names corpus: sha256"):
        load("names")
    monkeypatch.setenv(names_module.VARIABLE, str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match=r"none\.txt: no such file"):
        load("names")
    monkeypatch.setitem(names_module.SPLIT_SHA256, "val", "0" * 64)
    with pytest.raises(ValueError, match="val split"):
        names_module.split(names)


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/reader")
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert names_module.cached() == Path("/home/reader/.cache/mlp_fast/names.txt")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert names_module.cached() == Path("/elsewhere/mlp_fast/names.txt")


def test_the_real_splits_are_the_references(names_corpus: Corpus) -> None:
    assert {split: len(tape) for split, tape in names_corpus.tapes.items()} == {
        "train": 213_796,
        "val": 7_179,
        "test": 7_170,
    }
    assert names_corpus.vocabulary.characters == "\nabcdefghijklmnopqrstuvwxyz"
    for split, tape in names_corpus.tapes.items():
        text = names_corpus.vocabulary.decode(tape).encode()
        assert hashlib.sha256(text).hexdigest() == names_module.SPLIT_SHA256[split]

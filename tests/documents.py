"""Documents as data, and how their code is run: what tests/test_docs.py asserts on.

The rule, as CONTRIBUTING.md states it. A fence names its language and, after a space, a condition:

    ```python        run, all blocks of a page in one namespace; a block that begins with `# some/file.py` is written
                     to that file of the page's folder instead, where `mlp_fast.backends` and `mlp_fast.kernels` find it
    ```python excerpt   of the file that its first line names, letter by letter but for indentation; a line `...` stands
    ```c excerpt        for lines left out
    ```sh            each command run, in the page's folder; a run of more than MOST_STEPS steps stops after FEW_STEPS
    ```sh slow       its options are parsed; run by ./run test --long, in processes of their own
    ```sh gpu        its options are parsed; run where there is a CUDA device, likewise
    ```sh parsed     its options are parsed, and no more: it needs what only the reader has
    ```text          right after a block: what it prints, `...` standing for anything
    ```              neither: a drawing, a listing

Commands of plain `sh` blocks run in the page's process, but for pytest; whose tests are only collected where a
command is only parsed.
"""

import argparse
import contextlib
import doctest
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from mlp_fast import backends
from mlp_fast.errors import EXIT_USER_ERROR, UserError

ROOT = Path(__file__).resolve().parent.parent
MOST_STEPS, FEW_STEPS = 1000, 20
CONDITIONS = ("slow", "gpu", "parsed")  # of sh
EXCERPT = "excerpt"  # of a language of sources
LANGUAGES = ("python", "sh", "text", "", "toml", "c", "json")
PLUGIN = "page_plugin.py"  # written for the tests that a page runs


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        line: of the opening fence, from 1.
        language: as the fence names it.
        condition: "", one of CONDITIONS, or EXCERPT.
        code: without the fences.
        output: of the `text` block right after it, or None.
    """

    line: int
    language: str
    condition: str
    code: str
    output: str | None = None


@dataclass(frozen=True)
class Page:
    """A Markdown file of the project."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def prose(self) -> str:
        """The text without its fenced blocks, line numbers kept."""
        return _FENCED.sub(lambda match: "\n" * match[0].count("\n"), self.text)

    @property
    def blocks(self) -> list[Block]:
        """The fenced blocks; a text block also stands as the output of the block that it follows."""
        text, found = self.text, list(_FENCED.finditer(self.text))
        blocks = []
        for match, following in zip(found, [*found, None][1:], strict=True):
            language, _, condition = match["info"].partition(" ")
            output = None
            if following and following["info"] == "text" and not text[match.end() : following.start()].strip():
                output = following["code"]
            blocks.append(Block(text[: match.start()].count("\n") + 1, language, condition, match["code"], output))
        return blocks


_FILE = re.compile(r"# ([\w/]+\.py)\n")  # how a block begins that is written to a file
_FENCED = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<code>.*?)^```$\n?", re.MULTILINE | re.DOTALL)


def pages() -> list[Page]:
    """Every page of the project."""
    return [Page(path) for path in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")))]


def chinese(page: Page) -> Page:
    """The Chinese page of an English one, whether it exists or not."""
    return Page(page.path.with_name(f"{page.path.stem}.zh-CN.md"))


# --- running ----------------------------------------------------------------------------------------------------------


class Wrong(AssertionError):
    """A block of a page does not do what the page says."""


class Parsed(Exception):
    """Raised in place of a command's work, once its options have been parsed."""


def run_page(page: Page, folder: Path, *, long: bool = False) -> None:
    """Runs all code of a page in a folder; Wrong names the line of the first block that fails."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with _at_home_in(folder):
        for block in page.blocks:
            if block.language not in ("python", "sh") or block.condition == EXCERPT:
                continue
            printed = io.StringIO()
            try:
                with contextlib.redirect_stdout(printed):
                    complete = _run(block, namespace, folder, long)
            except (Exception, SystemExit) as error:
                raise Wrong(f"{page.name}:{block.line}: {type(error).__name__}: {error}") from error
            if complete and block.output is not None and not _prints(block.output, printed.getvalue()):
                raise Wrong(
                    f"{page.name}:{block.line} prints\n{printed.getvalue()}\nand not, as the page says,\n{block.output}"
                )


def check_excerpt(page: Page, block: Block) -> None:
    """Wrong unless the lines of an excerpt stand in its file in this order, without others but where it has `...`."""
    match = re.match(r"(?:#|//) (\S+)\n", block.code)
    if match is None or not (ROOT / match[1]).is_file():
        raise Wrong(f"{page.name}:{block.line}: the first line of an excerpt names its file")
    rest = (ROOT / match[1]).read_text(encoding="utf-8")
    for part in re.split(r"^ *\.\.\.\n", block.code[match.end() :], flags=re.MULTILINE):
        found = next(
            (at for indent in range(0, 20, 2) if (at := _ending(rest, textwrap.indent(part, " " * indent)))), 0
        )
        if not found:
            raise Wrong(f"{page.name}:{block.line}: {match[1]} does not go on like this:\n{part}")
        rest = rest[found:]


def _ending(text: str, lines: str) -> int:
    """Where in the text these whole lines end; 0: they are not there."""
    at = f"\n{text}".find(f"\n{lines}")
    return 0 if at < 0 else at + len(lines)


def left_behind(page: Page, folder: Path) -> list[str]:
    """What the commands of a page that ran in a folder have left there and git would not ignore in a checkout."""
    own = {match[1] for block in page.blocks if (match := _FILE.match(block.code))}
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - own - {PLUGIN}
    command = ["git", "-C", str(ROOT), "check-ignore", "--no-index", "--stdin"]
    ignored = subprocess.run(command, input="\n".join(found), capture_output=True, text=True).stdout
    return sorted(found - set(ignored.splitlines()))


def _run(block: Block, namespace: dict[str, Any], folder: Path, long: bool) -> bool:
    """Runs a block; whether it was run in full, so that its output counts."""
    if block.language == "python":
        return _run_python(block.code, namespace, folder)
    run = {"": True, "slow": long, "gpu": torch.cuda.is_available(), "parsed": False}[block.condition]
    how = ("here" if not block.condition else "apart") if run else "parse"
    complete = [run_command(words, folder, how) for words in commands(block.code)]
    return all(complete)


def _run_python(code: str, namespace: dict[str, Any], folder: Path) -> bool:
    file = _FILE.match(code)
    if file is None:
        exec(compile(code, "<page>", "exec"), namespace)
        return True
    path = folder / file[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code, encoding="utf-8")
    importlib.invalidate_caches()
    return False


def _prints(expected: str, printed: str) -> bool:
    return doctest.OutputChecker().check_output(expected, printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)


@contextlib.contextmanager
def _at_home_in(folder: Path) -> Iterator[None]:
    """The page's folder as the working directory and as a further place of backends and kernels; undone at the end."""
    import mlp_fast.kernels

    packages = {folder / "mlp_fast/backends": backends, folder / "kernels": mlp_fast.kernels}
    modules, registry = set(sys.modules), dict(backends.REGISTRY)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(folder) if sys.version_info >= (3, 11) else _chdir(folder))
        for path, package in packages.items():
            stack.enter_context(mock.patch.object(package, "__path__", [*package.__path__, str(path)]))
        try:
            yield
        finally:
            backends.REGISTRY.clear()
            backends.REGISTRY.update(registry)
            for name in set(sys.modules) - modules:
                file = getattr(sys.modules[name], "__file__", None)
                if file and Path(file).is_relative_to(folder):
                    del sys.modules[name]


@contextlib.contextmanager
def _chdir(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def commands(code: str) -> list[list[str]]:
    """The commands of a sh block as words; comments and line ends in the middle of a command are gone."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_command(words: Sequence[str], folder: Path, how: str) -> bool:
    """Runs a command as the rule says; whether it was run in full. Any error where it is wrong.

    Args:
        words: the command.
        folder: the page's.
        how: of Python modules: run "here", in this process, or "apart", in one of their own; or only "parse".
    """
    settings = {}
    while (match := re.fullmatch(r"([A-Z_]+)=(.*)", words[0])) is not None:
        settings[match[1]] = match[2]
        words = words[1:]
    name, *arguments = words
    with mock.patch.dict(os.environ, settings):
        if name == "source":  # only prepares the reader's shell
            return True
        if words[:3] == ["python", "-m", "pytest"]:
            return _pytest(arguments[2:], folder, how)
        if words[:2] == ["python", "-m"]:
            return _module(arguments[1], arguments[2:], how)
        if words[:2] == ["./run", "train"]:
            return _module("mlp_fast.train", arguments[1:], how)
        if words[:2] == ["./run", "test"]:
            return _run_script(arguments[1:])
        if name == "torchrun":
            start = arguments.index("-m")
            return _module(arguments[start + 1], arguments[start + 2 :], "parse")
        if name in ("ncu", "nsys"):
            start = arguments.index("python")
            return run_command(arguments[start:], folder, "parse")
        if (ROOT / name).is_file() and os.access(ROOT / name, os.X_OK):
            return _script(name, arguments)
    raise Wrong(f"no rule runs {shlex.join(words)}")


def _module(module: str, arguments: list[str], how: str) -> bool:
    """`python -m module`."""
    found = importlib.import_module(module)
    main = (importlib.import_module(f"{module}.__main__") if hasattr(found, "__path__") else found).main
    shortened = False
    if module == "mlp_fast.train" and "--list-backends" not in arguments:
        steps = int(arguments[arguments.index("--num-steps") + 1]) if "--num-steps" in arguments else sys.maxsize
        if steps > MOST_STEPS:
            shortened, arguments = True, [*arguments, "--stop-after", str(FEW_STEPS)]
    options = parsing_only(main, arguments)._option_string_actions
    for argument in arguments:  # in full: argparse would take an abbreviation
        if argument.startswith("--") and argument.partition("=")[0] not in options:
            raise Wrong(f"python -m {module} has no option {argument}")
    if how == "parse":
        return False
    try:
        code = _apart(module, arguments) if how == "apart" else main(arguments) or 0
    except UserError as error:
        if "unavailable" not in str(error):  # else this machine lacks the backend
            raise
        return False
    if code != 0:
        raise Wrong(f"python -m {module} {shlex.join(arguments)} exits {code}")
    return not shortened


def _apart(module: str, arguments: list[str]) -> int:
    """Runs a module in a process of its own; prints what it prints, and returns its exit code."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", module, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode == EXIT_USER_ERROR:
        raise UserError(result.stderr.strip())
    print(result.stdout)
    return result.returncode


def parsing_only(main: Any, arguments: list[str]) -> argparse.ArgumentParser:
    """Runs a command's main until its options have been parsed; returns its parser, or raises the command's error."""
    parse_args = argparse.ArgumentParser.parse_args
    used: list[argparse.ArgumentParser] = []

    def parse(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        used.append(self)
        parse_args(self, *args, **kwargs)
        raise Parsed

    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse), contextlib.suppress(Parsed):
        main(arguments)
    return used[0]


def _pytest(arguments: list[str], folder: Path, how: str) -> bool:
    """Tests of the page or of the project, with the kernels and backends that the page has made; or only collects."""
    files = [argument.partition("::")[0] for argument in arguments if re.match(r"(tests|bench)\b", argument)]
    if not files:
        raise Wrong("name the tests to run")
    (folder / PLUGIN).write_text(_PLUGIN.format(folder=str(folder), registry=backends.REGISTRY))
    command = [sys.executable, "-m", "pytest", "-q", "-p", Path(PLUGIN).stem, "-p", "no:cacheprovider", *arguments]
    if how == "parse":
        command.append("--collect-only")
    at = folder if all((folder / file).exists() for file in files) else ROOT
    paths = [str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run(
        [*command, f"--rootdir={at}"], cwd=at, env=environment, capture_output=True, text=True, timeout=600
    )
    if result.returncode != 0:
        raise Wrong(f"pytest {shlex.join(arguments)} exits {result.returncode}:\n{result.stdout}{result.stderr}")
    return False


# Gives tests the kernels and backends that a page has made, as if they lay in the project.
_PLUGIN = """\
from mlp_fast import backends, kernels

backends.__path__.append({folder!r} + "/mlp_fast/backends")
kernels.__path__.append({folder!r} + "/kernels")
backends.REGISTRY.update({registry!r})
"""


def _run_script(options: list[str]) -> bool:
    text = (ROOT / "run").read_text()
    for option in options:
        if option.startswith("--") and option not in text:
            raise Wrong(f"./run test has no option {option}")
    return False


def _script(name: str, options: list[str]) -> bool:
    text = (ROOT / name).read_text()
    for option in options:
        if option.startswith("--") and option not in text:
            raise Wrong(f"{name} does not know {option}")
    return False

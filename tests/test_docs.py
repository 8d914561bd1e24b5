"""The documents say what is so: their code runs, their links lead somewhere, both languages show the same."""

import ast
import importlib
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from documents import (
    CONDITIONS,
    EXCERPT,
    LANGUAGES,
    ROOT,
    Block,
    Page,
    Wrong,
    check_excerpt,
    chinese,
    left_behind,
    pages,
    parsing_only,
    run_page,
)

from bench import recording, tables
from mlp_fast import backends, errors

TRANSLATED = ("README", "docs/model", "docs/ladder", "docs/numerics", "docs/add-a-backend", "docs/add-a-kernel")
ALL = pages()
ENGLISH = [page for page in ALL if not page.path.stem.endswith(".zh-CN")]
CHINESE = [page for page in ALL if page.path.stem.endswith(".zh-CN")]

# Commands whose options the documents may name.
COMMANDS = [
    *(
        f"mlp_fast.{name}"
        for name in ("train", "evaluate", "sample", "compare", "profile", "visualize", "corpus.__main__")
    ),
    *(f"bench.{name}" for name in ("probes", "record", "report", "resources", "numerics", "rungs", "counts")),
]

CODE_WIDTH = 80  # characters: what a phone shows in landscape at a readable size
TABLE_COLUMNS = 4  # of a table written by hand; the report's have up to tables.COLUMNS
WORD_WIDTH = 60  # characters that no browser can break


def each(found: list[Page]) -> pytest.MarkDecorator:
    """Parametrises a test by page."""
    return pytest.mark.parametrize("page", found, ids=lambda page: page.name)


@each([page for page in ENGLISH if any(block.language in ("python", "sh") for block in page.blocks)])
def test_the_code_of_a_page_runs(page: Page, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    run_page(page, tmp_path, long=request.config.getoption("--long"))
    if (ROOT / ".git").exists():
        assert left_behind(page, tmp_path) == [], "add it to .gitignore"


def test_pages_save_their_runs_in_different_folders() -> None:
    """Else who follows one page after the other is refused: a run is never saved over another."""
    saved = re.compile(r"(?:mlp_fast\.|\./run )train [^\n]*--out (\S+)")
    folders = [folder for page in ENGLISH for block in page.blocks for folder in saved.findall(block.code)]
    assert len(folders) > 2
    assert len(folders) == len(set(folders)), folders


@each(ALL)
def test_every_fence_names_a_language_and_a_known_condition(page: Page) -> None:
    for block in page.blocks:
        assert block.language in LANGUAGES, f"{page.name}:{block.line}"
        conditions = CONDITIONS if block.language == "sh" else (EXCERPT,) if block.language in ("python", "c") else ()
        assert block.condition in ("", *conditions), f"{page.name}:{block.line}"
    assert page.text.count("\n```") == 2 * len(page.blocks), f"{page.name}: a fence is not closed"


EXCERPTS = [(page, block) for page in ENGLISH for block in page.blocks if block.condition == EXCERPT]


@pytest.mark.parametrize(("page", "block"), EXCERPTS, ids=[f"{page.name}:{block.line}" for page, block in EXCERPTS])
def test_an_excerpt_is_what_its_file_says(page: Page, block: Block) -> None:
    check_excerpt(page, block)


@pytest.mark.parametrize(
    "code",
    [
        "def dot(a, b)\n",  # no file
        "# kernels/_math.py\ndef dot(a, b)\n",  # not a whole line
        "# kernels/_math.py\n    z = s * s\n    s = tl.minimum(ax, 1.0)\n",  # another order
        "# kernels/_math.py\n    z = s * s\n    p = p * z - 0.0079461056\n",  # lines are left out
        "# kernels/_math.py\n    z = s * s\n...\n    ax = tl.abs(x)\n",
    ],
)
def test_what_is_no_excerpt(code: str) -> None:
    with pytest.raises(Wrong):
        check_excerpt(ENGLISH[0], Block(1, "python", EXCERPT, code))


def test_an_excerpt_may_leave_lines_and_indentation_out() -> None:
    code = "# kernels/_math.py\nax = tl.abs(x)\n...\nz = s * s\n"
    check_excerpt(ENGLISH[0], Block(1, "python", EXCERPT, code))


# --- both languages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", TRANSLATED)
def test_the_chinese_page_has_the_same_code_figures_and_sections(stem: str) -> None:
    english = Page(ROOT / f"{stem}.md")
    translated = chinese(english)

    def content(page: Page) -> list[tuple[str, str, str]]:
        return [(block.language, block.condition, block.code) for block in page.blocks]

    def shape(page: Page) -> list[str]:
        return re.findall(r"^#+(?= )|^\|[ -:|]+\|$|<!-- /?bench:[\w-]+ -->", page.prose, re.MULTILINE)

    def targets(page: Page) -> list[str]:
        return [re.sub(r"\.zh-CN\.md|\.md", ".md", target.partition("#")[0]) for _, target in links(page)]

    assert content(translated) == content(english)
    assert shape(translated) == shape(english)
    assert sorted(targets(translated)) == sorted(targets(english))
    assert figures(translated) == figures(english)


def figures(page: Page) -> list[list[str]]:
    """The numbers between the marks of the report, sorted: a sentence in another language has another order."""
    found = re.findall(r"<!-- bench:[\w-]+ -->(.*?)<!-- /bench", page.text, re.DOTALL)
    return [sorted(re.findall(r"\d[\d.,e+-]*\b", text)) for text in found]


@each(CHINESE)
def test_a_chinese_page_is_in_chinese(page: Page) -> None:
    text = re.sub(r"`[^`\n]*`|\]\([^)]*\)", "", page.prose)
    paragraphs = [part for part in re.split(r"\n\s*\n", text) if len(re.sub(r"\W", "", part)) > 40]
    assert paragraphs
    for paragraph in paragraphs:
        assert any(unicodedata.category(character) == "Lo" for character in paragraph), paragraph
    for header in re.findall(r"^(\|.*\|)\n\| -", page.prose, re.MULTILINE):
        for cell in header.strip("| ").split(" | "):
            assert any(unicodedata.category(character) == "Lo" for character in cell), header
    for alternative in re.findall(r"!\[([^\]]*)\]\(", page.prose):
        assert any(unicodedata.category(character) == "Lo" for character in alternative), alternative
    assert re.search(r"\[English\]\(", page.prose), "no link to the English page"


# --- links and pictures -----------------------------------------------------------------------------------------------


def links(page: Page) -> list[tuple[str, str]]:
    """(text, target) of the links of a page, pictures included."""
    return re.findall(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)", page.prose)


def anchors(page: Page) -> set[str]:
    """The fragments that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", page.prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each(ALL)
def test_links_lead_somewhere(page: Page) -> None:
    for text, target in links(page):
        if re.match(r"[a-z]+:", target):
            assert re.fullmatch(r"https://[\w.-]+(/\S*)?", target), target
            continue
        path, _, fragment = target.partition("#")
        other = page.path if not path else (page.path.parent / path).resolve()
        assert other.exists(), f"{page.name}: [{text}]({target})"
        assert other.is_relative_to(ROOT)
        if fragment:
            assert fragment in anchors(Page(other)), f"{page.name}: [{text}]({target})"


@each(ALL)
def test_pictures_have_alternative_texts(page: Page) -> None:
    for alternative in re.findall(r"!\[([^\]]*)\]\(", page.prose):
        assert len(alternative) >= 15, f"{page.name}: the picture {alternative!r} needs words for who cannot see it"
    assert "<img" not in page.text


def test_every_page_is_reached_from_the_readme() -> None:
    for start in (Page(ROOT / "README.md"), Page(ROOT / "README.zh-CN.md")):
        reached, waiting = set(), [start.path]
        while waiting:
            path = waiting.pop()
            reached.add(path)
            targets = [(path.parent / target.partition("#")[0]).resolve() for _, target in links(Page(path))]
            waiting += [target for target in targets if target.suffix == ".md" and target not in reached]
        assert {page.path for page in ALL} <= reached


# --- a phone's screen -------------------------------------------------------------------------------------------------


@each(ALL)
def test_pages_fit_a_phone(page: Page) -> None:
    for block in page.blocks:
        for line in block.code.splitlines():
            assert len(line) <= CODE_WIDTH, f"{page.name}:{block.line}: {line}"
    for row in re.findall(r"^\|.*\|$", page.prose, re.MULTILINE):
        assert len(re.findall(r"(?<!\\)\|", row)) <= tables.COLUMNS + 1, f"{page.name}: {row}"
    by_hand = re.sub(r"<!-- bench:.*?<!-- /bench", "", page.prose, flags=re.DOTALL)
    for row in re.findall(r"^\|.*\|$", by_hand, re.MULTILINE):
        assert len(re.findall(r"(?<!\\)\|", row)) <= TABLE_COLUMNS + 1, f"{page.name}: {row}"
    for word in re.sub(r"\]\([^)]*\)|<!--.*?-->", "]", by_hand, flags=re.DOTALL).split():
        assert len(word) <= WORD_WIDTH or not word.isascii(), f"{page.name}: {word}"


# --- what the code knows better ---------------------------------------------------------------------------------------


def known_options() -> set[str]:
    """Every option of every command, and those of the tools that the documents name."""
    options = {"--long", "--help", "--list-backends"}
    for name in COMMANDS:
        parser = parsing_only(importlib.import_module(name).main, _least_arguments(name))
        options |= {option for action in parser._actions for option in action.option_strings}
    for file in ("run", "bench/gpu.sh", "bench/conftest.py"):
        if (ROOT / file).exists():
            options |= set(re.findall(r"--[a-z][\w-]+", (ROOT / file).read_text()))
    return options | {"--benchmark-only", "--benchmark-json", "--nproc-per-node", "--clock-control"}


def _least_arguments(name: str) -> list[str]:
    return {"mlp_fast.corpus.__main__": ["fetch"]}.get(
        name, ["RUN"] if name.rsplit(".")[-1] in ("evaluate", "sample", "visualize") else []
    )


def test_options_in_the_prose_exist() -> None:
    options = known_options()
    for page in ALL:
        shown = set(re.findall(r"--[a-z][\w-]+", "".join(block.code for block in page.blocks)))
        for code in re.findall(r"`([^`\n]*)`", page.prose):
            for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", code):
                assert option in options | shown, f"{page.name}: `{code}`"


def test_files_in_the_prose_exist() -> None:
    for page in ALL:
        for path in re.findall(r"`((?:mlp_fast|kernels|bench|tests|data|docs)/[\w./-]*)`", page.prose):
            made_by_a_recording = path.startswith("bench/results")
            assert made_by_a_recording or (ROOT / path).exists(), f"{page.name}: {path}"


def test_constants_in_the_prose_exist() -> None:
    sources = [
        ROOT / "run",
        *(path for folder in ("mlp_fast", "kernels", "bench") for path in ROOT.glob(f"{folder}/**/*.py")),
    ]
    code = "".join(path.read_text(encoding="utf-8") for path in sources)
    for page in ALL:
        for name in re.findall(r"`([A-Z][A-Z_]{3,})[`=]", page.prose):
            assert re.search(rf"\b{name}\b", code), f"{page.name}: {name}"


def test_tests_in_the_prose_exist() -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("**/test_*.py"))
    for page in ALL:
        for name in re.findall(r"`(test_\w+)`", page.prose):
            assert f"def {name}(" in code, f"{page.name}: {name}"


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_readme_lists_backends_exit_codes_and_dependencies(name: str) -> None:
    text = Page(ROOT / name).prose
    rows = re.findall(r"^\| `?([\w-]+)`? ", text, re.MULTILINE)
    assert set(backends.names()) <= {part for row in re.findall(r"^\| (.*?) \|", text, re.M) for part in _names(row)}
    codes = {str(value) for key, value in vars(errors).items() if key.startswith("EXIT_") and key != "EXIT_SIGNAL"}
    assert {"0", "130", "143"} | codes <= {
        code for row in re.findall(r"^\| (.*?) \|", text, re.M) for code in _names(row)
    }
    setup = (ROOT / "setup.py").read_text()
    required = set(re.findall(r'"([a-z][\w-]*)>=', setup)) - {"setuptools"}
    assert required <= {part for row in re.findall(r"^\| (.*?) \|", text, re.M) for part in _names(row)}, rows


def _names(cell: str) -> list[str]:
    return re.findall(r"[\w-]+", cell)


def test_the_readmes_say_whether_a_gpu_was_recorded() -> None:
    gpu = any(records[0].facts["device_type"] == "cuda" for records in recording.recorded())
    for name, words in (
        ("README.md", "No GPU has been recorded yet"),
        ("README.zh-CN.md", "目前还没有任何 GPU 的录制"),
    ):
        assert (words in Page(ROOT / name).text) is not gpu


# --- docstrings -------------------------------------------------------------------------------------------------------


def undocumented(path: Path) -> Iterator[str]:
    """Public names of a module without a docstring: the module, its classes and functions, methods of plain classes.

    A method of a class with bases may be described by what it overrides, a nested function by what it stands in.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not ast.get_docstring(tree) and tree.body:
        yield path.name
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith(("_", "pytest_")):
            continue
        if not ast.get_docstring(node):
            yield f"{path.name}: {node.name}"
        if isinstance(node, ast.ClassDef) and not node.bases:
            for method in node.body:
                public = isinstance(method, ast.FunctionDef) and not method.name.startswith("_")
                if public and not ast.get_docstring(method):
                    yield f"{path.name}: {node.name}.{method.name}"


@pytest.mark.parametrize("folder", ["mlp_fast", "kernels", "bench", "data"])
def test_public_names_have_docstrings(folder: str) -> None:
    files = [path for path in sorted((ROOT / folder).rglob("*.py")) if not path.name.startswith("test_")]
    assert files
    assert [name for path in files for name in undocumented(path)] == []

"""What every test may use: the long suites' switch, the real corpus where it is at hand, the golden figures."""

import json
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reliability
import torch
from processes import make_corpus

from mlp_fast.corpus import load as corpus
from mlp_fast.errors import UserError

GOLDEN = Path(__file__).parent / "golden" / "upstream_1000.json"
COUNTS = pytest.StashKey[Counter[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run the full form of the fault and fuzz suites")
    parser.addoption(
        "--record", action="store_true", help="with --long: write what they tried into docs/reliability.md"
    )


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts what runs in the background with SIGINT ignored, and so would be all that the tests interrupt.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[COUNTS] = Counter()
    part = config.getoption("keyword") or config.getoption("markexpr")
    if config.getoption("--record") and (part or not config.getoption("--long")):
        raise pytest.UsageError("--record is of the whole: it needs --long, and neither -k nor -m")


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    counts = config.stash[COUNTS]
    if counts:
        terminalreporter.section("fault and fuzz suites")
        terminalreporter.write_line(reliability.table(counts))
        if config.getoption("--record") and exitstatus == 0:
            reliability.record(counts)


@pytest.fixture(scope="session")
def counts(pytestconfig: pytest.Config) -> Counter[str]:
    """What the fault and fuzz suites try, to count up; printed at the end."""
    return pytestconfig.stash[COUNTS]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        for item in items:
            if "long" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="a long suite; run it by: ./run test --long"))


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    """Figures measured on the reference: 1,000 steps on the names corpus, torch 2.13.0, CPU, float32."""
    return json.loads(GOLDEN.read_text())


@pytest.fixture(scope="session")
def names_corpus() -> corpus.Corpus:
    """The real names corpus; tests that need it are skipped where it was neither fetched nor named."""
    try:
        return corpus.load("names")
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def embedded_corpus() -> corpus.Corpus:
    """The corpus that ships with the package."""
    return corpus.load("embedded")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One torch thread: models this small gain nothing from more, and those that wait slow down whatever else runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def corpus_folder(tmp_path: Path) -> str:
    """A small corpus, as --data takes it."""
    return make_corpus(tmp_path / "corpus")

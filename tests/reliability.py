"""What the fault and fuzz suites have tried, as the table in docs/reliability.md.

./run test --long --record     runs everything and writes the table anew; --record alone is refused
"""

from collections.abc import Mapping
from pathlib import Path

DOCUMENT = Path(__file__).parent.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- counts: written by ./run test --long --record -->", "<!-- end of counts -->"


def table(counts: Mapping[str, int]) -> str:
    """The counts as a Markdown table."""
    rows = [f"| {what} | {count:,} |" for what, count in sorted(counts.items())]
    return "\n".join(["| tried | times |", "| --- | ---: |", *rows])


def record(counts: Mapping[str, int], document: Path = DOCUMENT) -> None:
    """Puts the table between the marks of the document; ValueError where the marks are missing."""
    head, begin, rest = document.read_text().partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{document} lacks the marks of the table")
    document.write_text(f"{head}{BEGIN}\n{table(counts)}\n{END}{tail}")

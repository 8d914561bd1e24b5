"""`python -m bench.report`: the figures of the documents, made from the recordings in bench/results.

    python -m bench.report                      writes tables and plots into README.md and docs/*.md
    python -m bench.report --check              exits 1 where a document or plot does not show what is recorded
    python -m bench.report --against OLD [NEW]  compares two recordings; exits 1 where something got slower

A table stands between a pair of comments in a document, and is replaced there:

    <!-- bench:steps -->
    <!-- /bench:steps -->

The names are those of BLOCKS and OVERALL. A block of BLOCKS has a part for each recorded device, from the latest
recording that has figures for it. The first of a page begins with the machines, versions and dates of all of them.
OVERALL are about all recordings together, or show what was counted without a device (`python -m bench.counts --write`).
"""

import argparse
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench import counts, probes, recording, tables
from bench.case import Entry
from bench.recording import Recording
from mlp_fast.cli import run_main
from mlp_fast.errors import UserError
from mlp_fast.measure import machine
from mlp_fast.measure.equivalence import BASELINE
from mlp_fast.measure.timing import Spread
from mlp_fast.run import plot

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"(<!-- bench:(?P<name>[\w-]+) -->\n).*?(<!-- /bench:(?P=name) -->)", re.S)
TRAINED = (
    "{num_steps:,} steps by {backend} on the embedded corpus: validation loss {val_loss:.6f} (entropy of its source "
    "{floor:.6f}), test loss {test_loss:.6f} nats per character.",
    "{backend} 在 embedded 语料上训练 {num_steps:,} 步：验证损失 {val_loss:.6f}（其来源的熵 {floor:.6f}），"
    "测试损失 {test_loss:.6f}，单位是每字符奈特。",
)


def _trained(record: Recording, chinese: bool) -> str:
    """The losses at the end of the whole run, as a sentence."""
    run = record.extra.get("losses")
    return TRAINED[chinese].format_map({**run, **run["evaluations"][-1]}) if run else ""


def _printed(record: Recording, chinese: bool, name: str) -> str:
    """The output of a command, once or for each backend, without the commands for other profilers."""
    found = record.extra.get(name, {})
    results = [found] if "output" in found else found.values()
    return "\n\n".join(re.sub(r"\nChrome trace:.*", "", one["output"], flags=re.S).strip() for one in results)


# name -> (a recording, whether in Chinese) -> text, "" where it has no figures.
BLOCKS: dict[str, Callable[[Recording, bool], str]] = {
    "losses": _trained,
    **{name: lambda record, chinese, name=name: tables.shown(name, record) for name in tables.TABLES},  # type: ignore[misc]
    "probes": lambda record, chinese: probes.table(record.probes),
    **{name: partial(_printed, name=name) for name in ("compare", "profile", "numerics")},
}

# name -> (all recordings, whether in Chinese) -> text.
OVERALL: dict[str, Callable[[Sequence[Recording], bool], str]] = {
    "result": tables.result,
    "promises": lambda records, chinese: tables.claims(records),
    "counted-phases": lambda *_: counts.brief_phases("triton-persistent", "H100"),
    "counted-times": lambda records, chinese: counts.times_table(
        [c for c in counts.chosen() if c["name"] in counts.STEPS], records
    ),
    "counted-others": lambda records, chinese: counts.bounds_table(counts.chosen(gpu="H100"), records),
    "counted-history": lambda *_: counts.history_table(counts.kept()["history"]),
    "counted-work": lambda *_: counts.work_table(counts.chosen(gpu="H100")),
}


def filled(text: str, devices: Sequence[Sequence[Recording]], name: str = "a document") -> str:
    """A document's text with every block brought up to date, from the recordings of each device, the latest first."""
    chinese = name.endswith(".zh-CN.md")
    every = [record for recordings in devices for record in recordings]
    blocks = [match["name"] for match in MARKED.finditer(text)]
    for unknown in (block for block in blocks if block not in BLOCKS and block not in OVERALL):
        raise UserError(f"{name}: no block is called {unknown!r}; there are {', '.join([*BLOCKS, *OVERALL])}")
    # Of every device the latest recording that has figures for a block, and its text.
    shown: dict[str, list[tuple[Recording, str]]] = defaultdict(list)
    for block, recordings in product((block for block in blocks if block in BLOCKS), devices):
        texts = ((record, BLOCKS[block](record, chinese)) for record in recordings)
        shown[block] += islice((both for both in texts if both[1]), 1)
    used = [one for one in every if any(one is record for parts in shown.values() for record, _ in parts)]
    first = next((block for block, parts in shown.items() if parts), None)

    def body(match: re.Match[str]) -> str:
        begin, block, end = match.groups()
        parts = [OVERALL[block](every, chinese)] if block in OVERALL else []
        if block == first:
            parts.append(tables.measured_on(used, chinese))
        for record, said in shown.get(block, ()):
            device, day = record.facts["device"], record.facts["date"][:10]
            if len(used) > 1:
                parts.append(f"{device}，{day} 测得：" if chinese else f"On {device}, {day}:")
            parts.append(said)
            if block in PICTURES:
                link = f"bench/results/{machine.folder_name(device)}/{block}.png"
                parts.append(f"![{PICTURES[block][chinese]}]({'../' if name.startswith('docs/') else ''}{link})")
        cell = tables.in_chinese if chinese else str
        text = "\n\n".join(tables.narrow(part, cell).strip() for part in parts if part)
        return f"{begin}\n{text}\n\n{end}" if text else begin + end

    return MARKED.sub(body, text)


def update(root: Path, results: Path, *, check: bool) -> list[str]:
    """Writes the documents and plots that are out of date, unless `check`; returns their names."""
    devices = list(recording.recorded(results))
    stale: dict[str, Callable[[], object]] = {}  # name -> writes it anew
    for path in (path for folder in (root, root / "docs") for path in sorted(folder.glob("*.md"))):
        text, name = path.read_text(encoding="utf-8"), path.relative_to(root).as_posix()
        if (new := filled(text, devices, name)) != text:
            stale[name] = partial(path.write_text, new, encoding="utf-8")
    for recordings in devices:
        for block, picture in PICTURES.items():
            record = next((record for record in recordings if picture.data(record)), None)
            path = results / machine.folder_name(recordings[0].facts["device"]) / f"{block}.png"
            if record and not (path.is_file() and _digest(picture.data(record)).encode() in path.read_bytes()):
                stale[str(path)] = partial(draw, path, record, picture)
    for write in () if check else stale.values():
        write()
    return list(stale)


# --- plots ------------------------------------------------------------------------------------------------------------

WIDTH = 6.4  # inches: as narrow as its letters are readable on a phone
Figure = Callable[..., AbstractContextManager[Any]]  # plot.figure() of a file and width, with height, nrows and ncols


class Picture(NamedTuple):
    """A plot of a recording: its description in both languages, its data, and the function that draws it."""

    english: str
    chinese: str
    data: Callable[[Recording], list[Entry]]
    draw: Callable[[Figure, Recording, list[Entry]], None]


def draw(path: Path, record: Recording, picture: Picture) -> None:
    """Draws a picture into a file; a digest of its data stands in the file's metadata."""
    from matplotlib import rc_context

    data = picture.data(record)
    metadata = {"Description": f"drawn from recorded data {_digest(data)}", "Software": None}
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"font.size": 11}):
        picture.draw(partial(plot.figure, path, WIDTH, metadata=metadata), record, data)


def _digest(data: list[Entry]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def draw_losses(figure: Figure, record: Recording, evaluations: Sequence[Entry]) -> None:
    """Train and validation loss over the steps of the whole run."""
    run = record.extra["losses"]
    losses = {split: [evaluation[f"{split}_loss"] for evaluation in evaluations] for split in ("train", "val")}
    with figure(4.5) as axes:
        plot.draw_losses(axes, [evaluation["step"] for evaluation in evaluations], losses, run["floor"])
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_title(f"{run['num_steps']:,} steps by {run['backend']} on the embedded corpus")


def draw_steps(figure: Figure, record: Recording, entries: Sequence[Entry]) -> None:
    """Bars of ms/step, the lower bound as a tick in each."""
    bounds = {tables.label(entry): entry["floor_ms"] for entry in entries if "floor_ms" in entry}
    with figure(1.6 + 0.36 * len(entries)) as axes:
        plot.draw_times(axes, {tables.label(entry): Spread(**entry["ms"]) for entry in entries}, bounds)
        axes.figure.suptitle(f"Time of a training step by backend\n{record.facts['device']}")
        axes.figure.legend(loc="outside lower right")


def draw_sweep(figure: Figure, record: Recording, entries: Sequence[Entry]) -> None:
    """ms/step over each swept size, on logarithmic axes: a slope of one is linear growth."""
    swept = tables.swept(entries)
    rows = -(-len(swept) // 2)
    # The same in all panels, the baseline's first.
    colours = {name: f"C{i % 10}" for i, name in enumerate(dict.fromkeys([BASELINE, *(e["backend"] for e in entries)]))}
    shown: dict[str, Any] = {}
    with figure(1.4 + 3 * rows, nrows=rows, ncols=min(2, len(swept))) as grid:
        panels = list(np.ravel(grid))
        for axes in panels[len(swept) :]:
            axes.axis("off")
        for axes, (letter, of_size) in zip(panels, swept.items(), strict=False):
            lines: dict[str, dict[int, float]] = defaultdict(dict)
            for entry in of_size:
                lines[entry["backend"]][entry[letter]] = entry["ms"]["median"]
                if BASELINE in entry["rivals"]:
                    lines[BASELINE].setdefault(entry[letter], entry["rivals"][BASELINE]["ms"]["median"])
            for name, points in lines.items():
                (line,) = axes.plot(*zip(*sorted(points.items()), strict=True), marker=".", color=colours[name])
                shown.setdefault(name, line)
            sizes = sorted({size for points in lines.values() for size in points})
            least = min(points[sizes[0]] for points in lines.values() if sizes[0] in points)
            (shown["linear"],) = axes.plot(sizes, [least * size / sizes[0] for size in sizes], "k:")
            axes.set(xscale="log", yscale="log", xlabel=tables.SWEPT[letter], ylabel="ms per step")
            axes.set_xticks(sizes, [str(size) for size in sizes], rotation=45)
            axes.minorticks_off()
            axes.yaxis.set_major_formatter("{x:g}")
            axes.grid(alpha=0.3)
        panels[0].figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=3)
        panels[0].figure.suptitle(f"Time of a training step by size\n{record.facts['device']}")


# block -> the picture below it
PICTURES = {
    "losses": Picture(
        "Curves: train and validation loss over the steps of a run, and the entropy of the validation text's source",
        "折线图：一次运行中训练损失和验证损失随步数的变化，以及验证损失来源的熵",
        lambda record: record.extra.get("losses", {}).get("evaluations", []),
        draw_losses,
    ),
    "ladder": Picture(
        "Bars: milliseconds per step of every backend in float32, with the lower bound as a mark in each",
        "条形图：每个后端在 float32 下每步的毫秒数，下界标在各条之中",
        tables.TABLES["ladder"][1],
        draw_steps,
    ),
    "steps": Picture(
        "Bars: milliseconds per step of every backend, with the lower bound as a mark in each",
        "条形图：每个后端每步的毫秒数，下界标在各条之中",
        tables.TABLES["steps"][1],
        draw_steps,
    ),
    "sweep": Picture(
        "Lines: milliseconds per step over each swept size, on logarithmic axes",
        "折线图：每步的毫秒数随各个尺寸的变化，对数坐标",
        tables.TABLES["sweep"][1],
        draw_sweep,
    ),
}


# --- two recordings ---------------------------------------------------------------------------------------------------


def against(old: Recording, new: Recording) -> dict[str, list[str]]:
    """The cases that got slower, those that got faster, and those that are no longer measured, in lines.

    Slower and faster: the new median lies outside the old rounds, and the old median outside the new rounds. A case
    with a single round is left out.

    Raises:
        UserError: the recordings are of different devices, or one is of a dry run.
    """
    if old.dry or new.dry:
        raise UserError("a recording of a dry run has no times to compare")
    if old.facts["device"] != new.facts["device"]:
        raise UserError(
            f"the recordings are of different devices, {old.facts['device']} and {new.facts['device']}; "
            "times can be compared on one machine only"
        )
    found: dict[str, list[str]] = {"slower": [], "faster": [], "no longer measured": []}
    for before in old.entries:
        entry, line = new.entry(before["group"], before["id"]), f"{before['group']}: {before['id']}"
        if entry is None:
            found["no longer measured"].append(line)
            continue
        then, now = before["ms"], entry["ms"]
        comparable = before["per"] == entry["per"] and then["min"] < then["max"] and now["min"] < now["max"]
        slower = then["max"] < now["median"] and then["median"] < now["min"]
        faster = now["max"] < then["median"] and now["median"] < then["min"]
        if comparable and (slower or faster):
            change = f"{then['median']:.4g} -> {now['median']:.4g} ms per {entry['per']}"
            ratio = f"({now['median'] / then['median']:.2f}x)"
            found["slower" if slower else "faster"].append(f"{line}: {change} {ratio}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="The figures of the documents.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where something is out of date")
    parser.add_argument("--against", type=Path, metavar="OLD", help="compare a recording with this older one")
    parser.add_argument("new", type=Path, nargs="?", help="the newer one (default: the latest of the same device)")
    arguments = parser.parse_args(argv)
    if arguments.against is None:
        if arguments.new is not None:
            raise UserError("a recording is compared with another: --against OLD NEW")
        stale = update(ROOT, recording.RESULTS, check=arguments.check)
        for name in stale:
            print(f"{'out of date' if arguments.check else 'written'}: {name}")
        if stale and arguments.check:
            print("run: python -m bench.report")
        return 1 if stale and arguments.check else 0
    old = recording.load(arguments.against)
    if arguments.new is not None:
        new = recording.load(arguments.new)
    else:
        same = [records[0] for records in recording.recorded() if records[0].facts["device"] == old.facts["device"]]
        if not same:
            raise UserError(f"no recording of {old.facts['device']} is in {recording.RESULTS}; name the newer file")
        new = same[0]
    found = against(old, new)
    for title, lines in found.items():
        for line in lines:
            print(f"{title}: {line}")
    if not found["slower"]:
        print("nothing got slower beyond its spread")
    return 1 if found["slower"] else 0


if __name__ == "__main__":
    run_main(main)

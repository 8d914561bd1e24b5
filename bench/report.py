"""`python -m bench.report`: the figures of the documents, made from the recordings in bench/results.

    python -m bench.report                      writes tables and plots into README.md and docs/*.md
    python -m bench.report --check              exits 1 where a document or plot does not show what is recorded
    python -m bench.report --against OLD [NEW]  compares two recordings; exits 1 where something got slower

A document says where a table goes by a pair of comments; what stands between them is replaced:

    <!-- bench:steps -->
    <!-- /bench:steps -->

The names are those of BLOCKS. Every block has a part for each recorded device, from the latest recording that has
figures for it, and says what it was measured on; a device without a recording is not shown. Blocks of the name COUNTED
show what was counted without a device (`python -m bench.counts --write`).
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import chinese, counts, probes, recording, tables
from bench.case import Entry
from bench.recording import Recording
from mlp_fast.cli import run_main
from mlp_fast.errors import UserError
from mlp_fast.measure import machine
from mlp_fast.measure.equivalence import BASELINE

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(
    r"(?P<begin><!-- bench:(?P<name>[\w-]+) -->\n)(?P<body>.*?)(?P<end><!-- /bench:(?P=name) -->)", re.S
)
PLOTTED = {
    "losses": "Curves: train and validation loss over the steps of a run, and the floor of the validation loss",
    "ladder": "Bars: milliseconds per step of every backend in float32, with the floor as a mark in each",
    "steps": "Bars: milliseconds per step of every backend, with the floor as a mark in each",
    "sweep": "Lines: milliseconds per step over each swept size, on logarithmic axes",
}


def _compared(record: Recording) -> str:
    """What the command printed, as Markdown."""
    return record.extra["compare"]["output"].strip() if "compare" in record.extra else ""


def _profiled(record: Recording) -> str:
    """What the command printed for each backend, without the commands for other profilers."""
    parts = []
    for result in record.extra.get("profile", {}).values():
        parts.append(re.sub(r"\nChrome trace:.*", "", result["output"], flags=re.S).strip())
    return "\n\n".join(parts)


TRAINED = (
    "{num_steps:,} steps by {backend} on the embedded corpus: validation loss {val_loss:.6f} (floor {floor:.6f}), "
    "test loss {test_loss:.6f} nats per character."
)


def _trained(record: Recording, sentence: str = TRAINED) -> str:
    """The end of the whole run in words."""
    if "losses" not in record.extra:
        return ""
    run = record.extra["losses"]
    return sentence.format_map({**run, **run["evaluations"][-1]})


def _promised(record: Recording) -> str:
    """The table, of a recording that has what most promises are about."""
    return tables.claims(record) if record.group("step") and record.group("run") else ""


BLOCKS: dict[str, Callable[[Recording], str]] = {
    "losses": _trained,
    "steps": tables.steps,
    "ladder": tables.ladder,
    "ratios": tables.rivals,
    "others": tables.others,
    "sweep": tables.sweep,
    "scale": tables.scale,
    "promises": _promised,
    "probes": lambda record: probes.table(record.probes) if record.probes else "",
    "compare": _compared,
    "profile": _profiled,
    "numerics": lambda record: record.extra["numerics"]["output"] if "numerics" in record.extra else "",
}

COUNTED: dict[str, Callable[[], str]] = {
    "counted-phases": lambda: counts.brief_phases("triton-persistent", "H100"),
    "counted-times": lambda: counts.times_table([c for c in counts.chosen() if c["name"] in counts.STEPS]),
    "counted-others": lambda: counts.times_table([c for c in counts.chosen() if c["name"] not in counts.STEPS]),
    "counted-history": lambda: counts.history_table(counts.kept()["history"]),
    "counted-work": lambda: counts.work_table(counts.chosen(gpu="H100")),
}


def documents(root: Path) -> list[Path]:
    """The documents that may hold blocks."""
    return [path for folder in (root, root / "docs") for path in sorted(folder.glob("*.md"))]


def filled(text: str, devices: Sequence[Sequence[Recording]], name: str = "a document") -> str:
    """A document's text with every block brought up to date, from the recordings of each device, the latest first."""

    def body(match: re.Match[str]) -> str:
        block = match["name"]
        if block in COUNTED:
            return f"{match['begin']}\n{tables.narrow(COUNTED[block]()).strip()}\n\n{match['end']}"
        if block not in BLOCKS:
            raise UserError(f"{name}: no block is called {block!r}; there are {', '.join([*BLOCKS, *COUNTED])}")
        parts = []
        for recordings in devices:
            record = next((record for record in recordings if BLOCKS[block](record)), None)
            if record is None:
                continue
            part, where, words = BLOCKS[block](record), tables.machine_line(record), PLOTTED.get(block)
            if name.endswith(".zh-CN.md"):
                part = _trained(record, chinese.TRAINED) if block == "losses" else chinese.translated(part)
                where, words = chinese.machine_line(record), chinese.PICTURES.get(block)
            picture = f"\n\n![{words}]({_picture_link(record, block, name)})" if words else ""
            parts.append(f"{where}\n\n{tables.narrow(part).strip()}{picture}\n")
        body = "\n" + "\n".join(parts) + "\n" if parts else ""
        return match["begin"] + body + match["end"]

    return MARKED.sub(body, text)


def _picture_link(record: Recording, block: str, document: str) -> str:
    up = "../" if document.startswith("docs/") else ""
    return f"{up}bench/results/{machine.folder_name(record.facts['device'])}/{block}.png"


def update(root: Path, results: Path, *, check: bool) -> list[str]:
    """Writes documents and plots, or with `check` only looks; returns what was (is) out of date."""
    devices = list(recording.recorded(results))
    stale = []
    for path in documents(root):
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(root).as_posix()
        new = filled(text, devices, name)
        if new != text:
            stale.append(name)
            if not check:
                path.write_text(new, encoding="utf-8")
    for recordings in devices:
        folder = results / machine.folder_name(recordings[0].facts["device"])
        for block, draw in PLOTS.items():
            record = next((record for record in recordings if _plot_data(record, block)), None)
            if record is None:
                continue
            data = _plot_data(record, block)
            path = folder / f"{block}.png"
            if path.is_file() and _digest(data).encode() in path.read_bytes():
                continue
            stale.append(str(path))
            if not check:
                _draw(draw, path, record, _digest(data))
    return stale


# --- plots ------------------------------------------------------------------------------------------------------------

WIDTH = 6.4  # inches

Drawing = Callable[[Path, Recording, str], None]  # of a file, from a recording, with the digest of what is drawn


def _plot_data(record: Recording, block: str) -> list[Entry]:
    if block == "losses":
        return record.extra.get("losses", {}).get("evaluations", [])
    if block == "ladder":
        return [entry for entry in record.group("step") if entry["precision"] == "fp32"]
    groups = {"steps": ("step", "threads"), "sweep": ("sweep",)}[block]
    return [entry for group in groups for entry in record.group(group)]


def _digest(data: list[Entry]) -> str:
    """What a plot was drawn from; it stands in the picture's metadata."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def draw_losses(path: Path, record: Recording, digest: str) -> None:
    """Train and validation loss over the steps of the whole run."""
    run = record.extra["losses"]
    steps = [evaluation["step"] for evaluation in run["evaluations"]]
    figure, [[axes]] = _figure(4.5)
    for split in ("train", "val"):
        axes.plot(steps, [evaluation[f"{split}_loss"] for evaluation in run["evaluations"]], label=split)
    axes.axhline(run["floor"], color="grey", linestyle="--", label="floor of val: the entropy of its source")
    axes.set(xlabel="step", ylabel="mean cross-entropy (nats per character)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_title(f"{run['num_steps']:,} steps by {run['backend']} on the embedded corpus")
    axes.legend()
    axes.grid(alpha=0.3)
    _save(figure, path, digest)


def draw_ladder(path: Path, record: Recording, digest: str) -> None:
    """draw_steps, of the ladder's entries only."""
    draw_steps(path, record, digest, "ladder")


def draw_steps(path: Path, record: Recording, digest: str, block: str = "steps") -> None:
    """Bars of ms/step, the floor as a tick in each."""
    entries = list(reversed(_plot_data(record, block)))
    names = [tables.label(entry) for entry in entries]
    figure, [[axes]] = _figure(1.6 + 0.36 * len(entries))
    medians = [entry["ms"]["median"] for entry in entries]
    low = [entry["ms"]["median"] - entry["ms"]["min"] for entry in entries]
    high = [entry["ms"]["max"] - entry["ms"]["median"] for entry in entries]
    bars = axes.barh(names, medians, xerr=[low, high], capsize=2, color="lightsteelblue")
    axes.bar_label(bars, [f" {median:.3g}" for median in medians])
    floors = [(name, entry["floor_ms"]) for name, entry in zip(names, entries, strict=True) if "floor_ms" in entry]
    axes.plot([ms for _, ms in floors], [name for name, _ in floors], "k|", markersize=14, mew=2, label="floor")
    axes.set(xscale="log", xlabel="ms per step (median of rounds; whiskers: fastest, slowest)")
    axes.set_xlim(right=2 * max(entry["ms"]["max"] for entry in entries))  # room for the labels
    axes.xaxis.set_major_formatter("{x:g}")
    figure.suptitle(f"Time of a training step by backend\n{record.facts['device']}")
    figure.legend(loc="outside lower right")
    _save(figure, path, digest)


def draw_sweep(path: Path, record: Recording, digest: str) -> None:
    """ms/step over each swept size, on logarithmic axes: a slope of one is linear growth."""
    swept = tables.swept(record)
    columns = min(2, len(swept))
    rows = -(-len(swept) // columns)
    figure, grid = _figure(1.4 + 3 * rows, rows, columns)
    panels = [axes for row in grid for axes in row]
    for axes in panels[len(swept) :]:
        axes.axis("off")
    shown: dict[str, Any] = {}
    colours = _colours([entry["backend"] for entries in swept.values() for entry in entries])
    for axes, (letter, entries) in zip(panels, swept.items(), strict=False):
        lines: dict[str, dict[int, float]] = {}
        for entry in entries:
            lines.setdefault(entry["backend"], {})[entry[letter]] = entry["ms"]["median"]
            if BASELINE in entry["rivals"]:
                lines.setdefault(BASELINE, {}).setdefault(entry[letter], entry["rivals"][BASELINE]["ms"]["median"])
        for name, points in lines.items():
            sizes = sorted(points)
            (line,) = axes.plot(sizes, [points[size] for size in sizes], marker=".", color=colours[name])
            shown.setdefault(name, line)
        sizes = sorted({size for points in lines.values() for size in points})
        least = min(points[sizes[0]] for points in lines.values() if sizes[0] in points)
        (shown["linear"],) = axes.plot(sizes, [least * size / sizes[0] for size in sizes], "k:")
        axes.set(xscale="log", yscale="log", xlabel=tables.SWEPT[letter], ylabel="ms per step")
        axes.set_xticks(sizes, [str(size) for size in sizes], rotation=45)
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=3)
    figure.suptitle(f"Time of a training step by size\n{record.facts['device']}")
    _save(figure, path, digest)


def _colours(names: Sequence[str]) -> dict[str, str]:
    """A colour of matplotlib's cycle for every name, the baseline first: the same in all panels."""
    return {name: f"C{i % 10}" for i, name in enumerate(dict.fromkeys([BASELINE, *names]))}


def _draw(draw: Drawing, path: Path, record: Recording, digest: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    with matplotlib.rc_context({"font.size": 11}):
        draw(path, record, digest)


def _figure(height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure, and its axes in rows; as narrow as its letters are readable on a phone."""
    from matplotlib import pyplot as plt

    return plt.subplots(rows, columns, figsize=(WIDTH, height), layout="constrained", squeeze=False)


def _save(figure: Any, path: Path, digest: str) -> None:
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Description": f"drawn from recorded data {digest}", "Software": None})
    plt.close(figure)


PLOTS: dict[str, Drawing] = {
    "losses": draw_losses,
    "ladder": draw_ladder,
    "steps": draw_steps,
    "sweep": draw_sweep,
}


# --- two recordings ---------------------------------------------------------------------------------------------------


def against(old: Recording, new: Recording) -> tuple[list[str], list[str]]:
    """What got slower and what got faster, each beyond its spread: the new median lies outside the old rounds and the
    old median outside the new rounds. A single round has no spread, so nothing is said of it.

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
    slower, faster = [], []
    for entry in new.entries:
        before = old.entry(entry["group"], entry["id"])
        if before is None or before["per"] != entry["per"]:
            continue
        then, now = before["ms"], entry["ms"]
        if then["min"] == then["max"] or now["min"] == now["max"]:
            continue
        line = (
            f"{entry['group']}: {entry['id']}: {then['median']:.4g} -> {now['median']:.4g} ms per {entry['per']} "
            f"({now['median'] / then['median']:.2f}x)"
        )
        if now["median"] > then["max"] and then["median"] < now["min"]:
            slower.append(line)
        elif now["median"] < then["min"] and then["median"] > now["max"]:
            faster.append(line)
    return slower, faster


def _gone(old: Recording, new: Recording) -> Iterable[str]:
    for entry in old.entries:
        if new.entry(entry["group"], entry["id"]) is None:
            yield f"{entry['group']}: {entry['id']}"


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
    slower, faster = against(old, new)
    for title, lines in (("slower", slower), ("faster", faster), ("no longer measured", list(_gone(old, new)))):
        for line in lines:
            print(f"{title}: {line}")
    if not slower:
        print("nothing got slower beyond its spread")
    return 1 if slower else 0


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))

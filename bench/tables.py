"""A recording as Markdown tables: the same text on the terminal, in the README and in the docs."""

import re
from collections.abc import Callable
from typing import Any

from bench import probes
from bench.case import Entry, table
from bench.operators import COMPILE, COPY, EMPTY, TORCH
from bench.recording import Recording
from bench.steps import REFERENCE
from mlp_fast.measure.equivalence import BASELINE


def steps(recording: Recording) -> str:
    """The step and threads groups: ms/step beside eager, the floor and the device's own time."""
    entries = recording.group("step") + recording.group("threads")
    if not entries:
        return ""
    cuda = recording.facts["device_type"] == "cuda"
    header = ["backend", "ms/step", "fastest..slowest", "x eager", "samples/s"]
    header += ["device ms/step", "launches/step"] if cuda else []
    header += ["floor, ms", "x floor", "first step, s", "loss error"]
    rows = []
    for entry in entries:
        row = [
            label(entry),
            _number(entry["ms"]["median"]),
            f"{_number(entry['ms']['min'])}..{_number(entry['ms']['max'])}",
            "1" if entry["backend"] == BASELINE else _ratio(entry, BASELINE),
            f"{entry['samples_per_second']:,.0f}",
        ]
        if cuda:
            row += [_number(entry.get("device_ms")), _number(entry.get("launches"))]
        row += [
            _number(entry.get("floor_ms")),
            "-" if "x_floor" not in entry else f"{entry['x_floor']:.1f}",
            f"{entry['first_step_seconds']:.2f}",
            f"{entry['loss_error']:.1e}",
        ]
        rows.append(row)
    return f"{_sizes(entries[0])}\n\n{table(header, rows, text_columns=1)}"


def label(entry: Entry) -> str:
    """A case of the step and threads groups in a few words: "native", "native, 1 thread", "triton-op, tf32"."""
    parts = [entry["backend"]]
    if entry.get("compile_mode", "default") != "default":
        parts.append(entry["compile_mode"])
    if entry["precision"] != "fp32":
        parts.append(entry["precision"])
    if entry["group"] == "threads":
        parts.append(f"{entry['threads']} thread" + ("" if entry["threads"] == 1 else "s"))
    return ", ".join(parts)


def ladder(recording: Recording) -> str:
    """The backends in the order of the ladder: ms/step in float32 on all threads, and how far from the floor."""
    rows = [
        [
            label(entry),
            _number(entry["ms"]["median"]),
            "1" if entry["backend"] == BASELINE else _ratio(entry, BASELINE),
            _number(entry.get("floor_ms")),
            "-" if "x_floor" not in entry else f"{entry['x_floor']:.1f}",
        ]
        for entry in recording.group("step")
        if entry["precision"] == "fp32"
    ]
    return table(["backend", "ms/step", "x eager", "floor, ms", "x floor"], rows, text_columns=1) if rows else ""


def rivals(recording: Recording) -> str:
    """Every ratio that was measured in interleaved rounds."""
    rows = []
    for entry in recording.entries:
        if entry["group"] == "sweep":
            continue
        for rival, facts in entry["rivals"].items() if "rivals" in entry else ():
            rows.append(
                [
                    f"{entry['group']}: {entry['id']}",
                    rival,
                    _number(entry["ms"]["median"]),
                    _number(facts["ms"]["median"]),
                    f"{facts['ratio']:.2f}",
                ]
            )
    return table(["case", "beside", "ms", "ms of the other", "ratio"], rows, text_columns=2) if rows else ""


def others(recording: Recording) -> str:
    """Evaluation, sampling, random numbers, start-up and whole runs."""
    rows = []
    for entry in recording.entries:
        if entry["group"] in ("step", "threads", "sweep", "scale"):
            continue
        ratios = ", ".join(f"{facts['ratio']:.2f} x {rival}" for rival, facts in entry.get("rivals", {}).items())
        ms = entry["ms"]
        shown = f"{_number(ms['min'])}..{_number(ms['max'])}" if ms["min"] < ms["max"] else "one round"
        rows.append([entry["group"], entry["id"], entry["per"], _number(ms["median"]), shown, ratios or "-"])
    header = ["group", "case", "per", "ms, median", "fastest..slowest", "speed"]
    return table(header, rows, text_columns=3) if rows else ""


SWEPT = {"B": "B, windows a batch", "H": "H, hidden units", "T": "T, tokens a context", "V": "V, distinct tokens"}


def swept(recording: Recording) -> dict[str, list[Entry]]:
    """The cases of the sweep by the letter of the size that they are about: "native-B128" -> "B"."""
    found: dict[str, list[Entry]] = {letter: [] for letter in SWEPT}
    for entry in recording.group("sweep"):
        found[entry["id"].rsplit("-", 1)[1][0]].append(entry)
    return {letter: entries for letter, entries in found.items() if entries}


def sweep(recording: Recording) -> str:
    """The swept sizes, a table each: ms/step of each backend and of eager, and how far from the floor."""
    parts = []
    for letter, entries in swept(recording).items():
        rows = []
        for entry in entries:
            eager = entry["rivals"].get(BASELINE)
            rows.append(
                [
                    f"{entry[letter]:,}",
                    entry["backend"],
                    _number(entry["ms"]["median"]),
                    "-" if eager is None else _number(eager["ms"]["median"]),
                    _ratio(entry, BASELINE),
                    "-" if "x_floor" not in entry else f"{entry['x_floor']:.1f}",
                ]
            )
        header = [SWEPT[letter], "backend", "ms/step", "eager, ms/step", "x eager", "x floor"]
        parts.append(table(header, rows, text_columns=2))
    return "\n\n".join(parts)


def scale(recording: Recording) -> str:
    """Larger models: tokens a second, times eager in one process, times the floor of a step alone, and memory."""
    rows = []
    for entry in recording.group("scale"):
        eager = entry["rivals"].get(BASELINE)
        rows.append(
            [
                entry["id"],
                _number(entry["ms"]["median"]),
                f"{entry['samples_per_second']:,.0f}",
                "1" if eager is None else f"{eager['ratio']:.2f}",
                "-" if "x_floor" not in entry else f"{entry['x_floor']:.1f}",
                f"{entry['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in entry else "-",
            ]
        )
    header = ["case", "ms/step", "tokens/s", "x eager", "x floor", "peak GiB"]
    sizes = {entry["id"].split()[0]: _sizes(entry) for entry in recording.group("scale")}
    listed = "\n".join(f"- {model}: {text}" for model, text in sizes.items())
    return f"{table(header, rows, text_columns=1)}\n\n{listed}" if rows else ""


def claims(recording: Recording) -> str:
    """What the project promises, and whether this recording bears it out."""
    rows = []
    for claim in CLAIMS:
        if claim[0] != recording.facts["device_type"]:
            continue
        _, promise, measure, least = claim
        value = measure(recording)
        if value is None:
            rows.append([promise, f"{least:g}", "-", "not measured"])
        else:
            shown = f"{value:.2f}"
            if promise in SCALED and (run := run_ratio(recording, SCALED[promise])) and run[1]:
                shown += ", the loop's time scaled from 5,000 steps"
            rows.append([promise, f"{least:g}", shown, "yes" if value >= least else "**no**"])
    return table(["promise", "at least", "measured", "holds"], rows, text_columns=1) if rows else ""


def skipped(recording: Recording) -> str:
    """What was not measured and why, and what was refused."""
    lines = [f"- {group}: {id}: {reason}" for group, id, reason in recording.skipped]
    lines += [f"- {group}: {id}: no number: {reason}" for group, id, reason in recording.refused]
    return "\n".join(lines)


def machine_line(recording: Recording) -> str:
    """Where and when, in a line; with the statement that belongs to it."""
    facts = recording.facts
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    driver = f", driver {facts['driver']}, CUDA {facts['cuda']}" if facts["driver"] or facts["cuda"] else ""
    commit = facts["commit"] or "unknown"
    return (
        f"Measured on: {facts['device']}{driver}; {versions}; {facts['system']}; commit {commit}; "
        f"{facts['date'][:10]}. Absolute times are that machine's; the ratios come from interleaved rounds on it."
    )


def whole(recording: Recording) -> str:
    """All tables, with headings, as printed after a run."""
    parts = [
        ("", machine_line(recording)),
        ("Steps", steps(recording)),
        ("Other work", others(recording)),
        ("Ratios, from interleaved rounds", rivals(recording)),
        ("Sweep", sweep(recording)),
        ("Scale", scale(recording)),
        ("What the machine can do", probes.table(recording.probes) if recording.probes else ""),
        ("Promises", claims(recording)),
        ("Not measured", skipped(recording)),
    ]
    return "\n\n".join(f"{title}\n\n{text}".strip() for title, text in parts if text)


# --- the promises -----------------------------------------------------------------------------------------------------


def _rival_ratio(group: str, id: str, rival: str) -> Callable[[Recording], float | None]:
    def measure(recording: Recording) -> float | None:
        entry = recording.entry(group, id)
        facts = (entry or {}).get("rivals", {}).get(rival)
        return None if facts is None else facts["ratio"]

    return measure


def run_ratio(recording: Recording, steps: int) -> tuple[float, bool] | None:
    """How many times as long the reference's whole run takes, and whether that time was scaled from a shorter run.

    Both evaluate every 200 steps, so a run's time beyond its start grows with the number of steps; the start is left
    out of the scaling, which takes time from the reference.
    """
    entry = recording.entry("run", f"{steps} steps")
    if entry is None:
        return None
    if REFERENCE in entry["rivals"]:
        return entry["rivals"][REFERENCE]["ratio"], False
    short = next((e for e in recording.group("run") if REFERENCE in e["rivals"]), None)
    start = recording.entry("start-up", "import mlp_fast.train")
    if short is None or start is None:
        return None
    begin = start["ms"]["median"]
    long = begin + (short["rivals"][REFERENCE]["ms"]["median"] - begin) * steps / short["steps"]
    return long / entry["ms"]["median"], True


def _run(steps: int) -> Callable[[Recording], float | None]:
    def measure(recording: Recording) -> float | None:
        result = run_ratio(recording, steps)
        return None if result is None else result[0]

    return measure


def _under(group: str, id: str, milliseconds: float) -> Callable[[Recording], float | None]:
    def measure(recording: Recording) -> float | None:
        entry = recording.entry(group, id)
        return None if entry is None else milliseconds / entry["ms"]["median"]

    return measure


def _rival_memory(group: str, id: str, rival: str) -> Callable[[Recording], float | None]:
    """How many times as much memory the rival takes at its peak."""

    def measure(recording: Recording) -> float | None:
        entry = recording.entry(group, id)
        theirs = (entry or {}).get("rivals", {}).get(rival, {}).get("peak_bytes")
        return None if entry is None or theirs is None else theirs / entry["peak_bytes"]

    return measure


LARGE_FORWARD = "large-embed_linear_tanh-table-65536-fp32"
LARGE_BACKWARD = "large-embed_linear_tanh-table-and-backward-65536-fp32"
SMALL_FORWARD = "small-embed_linear_tanh-128-fp32"

# (device type, the promise, what is measured of it, the least that keeps it); all are "times as fast as".
CLAIMS: list[tuple[str, str, Callable[[Recording], float | None], float]] = [
    ("cpu", "eager over the loop on Python lists", _rival_ratio("step", "eager-128-fp32", REFERENCE), 1),
    ("cpu", "compile-step over eager", _rival_ratio("step", "compile-step-128-fp32", BASELINE), 1),
    ("cpu", "10,000,000 uniforms over one second", _under("rng", "fill 10,000,000", 1000), 1),
    ("cpu", "native over the loop on Python lists, all threads", _rival_ratio("step", "native-128-fp32", REFERENCE), 6),
    ("cpu", "native over compile-step, all threads", _rival_ratio("step", "native-128-fp32", "compile-step"), 2.5),
    (
        "cpu",
        "native over the loop on Python lists, one thread",
        _rival_ratio("threads", "native-128-fp32-1-thread", REFERENCE),
        5,
    ),
    (
        "cpu",
        "native over compile-step, one thread",
        _rival_ratio("threads", "native-128-fp32-1-thread", "compile-step"),
        2,
    ),
    ("cpu", "a run of 5,000 steps over the loop on Python lists", _run(5000), 4),
    ("cpu", "a run of 50,000 steps over the loop on Python lists", _run(50000), 10),
    ("cuda", "triton-persistent over 8 us a step", _under("step", "triton-persistent-128-fp32", 0.008), 1),
    ("cuda", "triton-persistent, tf32x3, over 8 us a step", _under("step", "triton-persistent-128-tf32x3", 0.008), 1),
    ("cuda", "triton-step over 15 us a step", _under("step", "triton-step-128-fp32", 0.015), 1),
    ("cuda", "table form, B=65,536, over a copy of as many bytes", _rival_ratio("kernels", LARGE_FORWARD, COPY), 0.8),
    ("cuda", "table form, B=65,536, over torch.compile", _rival_ratio("kernels", LARGE_FORWARD, COMPILE), 2),
    ("cuda", "table form, B=128, over an empty kernel", _rival_ratio("kernels", SMALL_FORWARD, EMPTY), 1 / 1.5),
    ("cuda", "memory of torch over the table form's, B=65,536", _rival_memory("kernels", LARGE_BACKWARD, TORCH), 2),
]

# Promises about whole runs whose other side may be scaled from a shorter run: name -> steps.
SCALED = {"a run of 50,000 steps over the loop on Python lists": 50_000}


# --- tables on a narrow screen ----------------------------------------------------------------------------------------

COLUMNS = 6  # of a table on a phone's screen


def narrow(text: str) -> str:
    """Markdown with wide tables cut into some of at most COLUMNS columns, each with the first column of the whole."""

    def cut(match: re.Match[str]) -> str:
        rows = [line[2:-2].split(" | ") for line in match[0].splitlines()]
        others = len(rows[0]) - 1
        parts = max(1, -(-others // (COLUMNS - 1)))
        size = max(1, -(-others // parts))
        tables = [[[row[0], *row[1 + i * size :][:size]] for row in rows] for i in range(parts)]
        return "\n".join("".join(f"| {' | '.join(row)} |\n" for row in table) for table in tables)

    return re.sub(r"(?:^\|.*\|(?:\n|\Z))+", cut, text, flags=re.MULTILINE)


# --- cells ------------------------------------------------------------------------------------------------------------


def _sizes(entry: Entry) -> str:
    return ", ".join(f"{letter}={entry[letter]:,}" for letter in "BTEHV")


def _ratio(entry: Entry, rival: str) -> str:
    facts = entry["rivals"].get(rival)
    return "-" if facts is None else f"{facts['ratio']:.2f}"


def _number(value: Any) -> str:
    """Three or four digits, without an exponent."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4f}" if value < 1 else f"{value:.4g}"

"""Recordings as Markdown tables: the same text on the terminal, in the README and in the docs, in either language."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from bench import probes
from bench.case import Entry
from bench.operators import COMPILE, COPY, EMPTY, TORCH
from bench.processes import TEST_LOSS
from bench.recording import Recording
from bench.steps import REFERENCE
from mlp_fast.measure.equivalence import BASELINE
from mlp_fast.measure.table import table


def label(entry: Entry) -> str:
    """A case of the step and threads groups in a few words: "native", "native, 1 thread", "triton-op, tf32"."""
    parts = [entry["backend"]]
    if entry.get("compile_mode", "default") != "default":
        parts.append(entry["compile_mode"])
    if entry.get("precision", "fp32") != "fp32":
        parts.append(entry["precision"])
    if entry["group"] == "threads":
        parts.append(f"{entry['threads']} thread" + ("" if entry["threads"] == 1 else "s"))
    return ", ".join(parts)


def _number(value: Any) -> str:
    """Three or four digits, without an exponent."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4f}" if value < 1 else f"{value:.4g}"


def _rounds(entry: Entry) -> str:
    ms = entry["ms"]
    return f"{_number(ms['min'])}..{_number(ms['max'])}" if ms["min"] < ms["max"] else "one round"


def _times_eager(entry: Entry) -> str:
    if BASELINE in entry["rivals"]:
        return f"{entry['rivals'][BASELINE]['ratio']:.2f}"
    return "1" if entry["backend"] == BASELINE else "-"


# Columns by their headings: an entry's cell.
CELLS: dict[str, Callable[[Entry], str]] = {
    "backend": label,
    "group": lambda entry: entry["group"],
    "case": lambda entry: entry["id"],
    "per": lambda entry: entry["per"],
    "ms/step": lambda entry: _number(entry["ms"]["median"]),
    "ms, median": lambda entry: _number(entry["ms"]["median"]),
    "fastest..slowest": _rounds,
    "eager, ms/step": lambda entry: _number(entry["rivals"].get(BASELINE, {}).get("ms", {}).get("median")),
    "x eager": _times_eager,
    "speed": lambda entry: ", ".join(f"{f['ratio']:.2f} x {n}" for n, f in entry.get("rivals", {}).items()) or "-",
    "samples/s": lambda entry: f"{entry['samples_per_second']:,.0f}",
    "tokens/s": lambda entry: f"{entry['samples_per_second']:,.0f}",
    "device ms/step": lambda entry: _number(entry.get("device_ms")),
    "launches/step": lambda entry: _number(entry.get("launches")),
    "lower bound, ms": lambda entry: _number(entry.get("floor_ms")),
    "x lower bound": lambda entry: f"{entry['x_floor']:.1f}" if "x_floor" in entry else "-",
    "first step, s": lambda entry: f"{entry['first_step_seconds']:.2f}",
    "loss error": lambda entry: f"{entry['loss_error']:.1e}",
    "peak GiB": lambda entry: f"{entry['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in entry else "-",
}


def columns(entries: Sequence[Entry], *headings: str, text_columns: int = 1) -> str:
    """A table of entries, a line each; "" where there are none."""
    rows = [[CELLS[heading](entry) for heading in headings] for entry in entries]
    return table(headings, rows, text_columns) if rows else ""


def _sizes(entry: Entry) -> str:
    return ", ".join(f"{letter}={entry[letter]:,}" for letter in "BTEHV")


def steps(recording: Recording) -> str:
    """The step and threads groups: ms/step beside eager, the lower bound and the device's own time."""
    entries = recording.group("step") + recording.group("threads")
    on_device = ("device ms/step", "launches/step") if recording.facts["device_type"] == "cuda" else ()
    shown = ("backend", "ms/step", "fastest..slowest", "x eager", "samples/s", *on_device)
    shown += ("lower bound, ms", "x lower bound", "first step, s", "loss error")
    return f"{_sizes(entries[0])}\n\n{columns(entries, *shown)}" if entries else ""


def ladder(recording: Recording) -> str:
    """The backends in the order of the ladder: ms/step in float32 on all threads, and how far from the lower bound."""
    entries = [entry for entry in recording.group("step") if entry["precision"] == "fp32"]
    return columns(entries, "backend", "ms/step", "x eager", "lower bound, ms", "x lower bound")


def ratios(recording: Recording) -> str:
    """Every ratio that was measured in interleaved rounds."""
    rows = []
    for entry in recording.entries:
        for other, facts in entry.get("rivals", {}).items() if entry["group"] != "sweep" else ():
            times = (_number(entry["ms"]["median"]), _number(facts["ms"]["median"]))
            rows.append((f"{entry['group']}: {entry['id']}", other, *times, f"{facts['ratio']:.2f}"))
    return table(["case", "beside", "ms", "ms of the other", "ratio"], rows, text_columns=2) if rows else ""


def others(recording: Recording) -> str:
    """Evaluation, sampling, random numbers, start-up and whole runs."""
    entries = [entry for entry in recording.entries if entry["group"] not in ("step", "threads", "sweep", "scale")]
    return columns(entries, "group", "case", "per", "ms, median", "fastest..slowest", "speed", text_columns=3)


SWEPT = {"B": "B, windows a batch", "H": "H, hidden units", "T": "T, tokens a context", "V": "V, distinct tokens"}
CELLS |= {heading: lambda entry, letter=letter: f"{entry[letter]:,}" for letter, heading in SWEPT.items()}  # type: ignore[misc]


def swept(recording: Recording) -> dict[str, list[Entry]]:
    """The cases of the sweep by the letter of the size that they are about: "native-B128" -> "B"."""
    found: dict[str, list[Entry]] = {letter: [] for letter in SWEPT}
    for entry in recording.group("sweep"):
        found[entry["id"].rsplit("-", 1)[1][0]].append(entry)
    return {letter: entries for letter, entries in found.items() if entries}


def sweep(recording: Recording) -> str:
    """The swept sizes, a table each: ms/step of each backend and of eager, and how far from the lower bound."""
    shown = ("backend", "ms/step", "eager, ms/step", "x eager", "x lower bound")
    tables = [columns(entries, SWEPT[letter], *shown, text_columns=2) for letter, entries in swept(recording).items()]
    return "\n\n".join(tables)


def scale(recording: Recording) -> str:
    """Larger models: tokens a second, times eager in one process, times the lower bound of a step, and memory."""
    entries = recording.group("scale")
    sizes = {entry["id"].split()[0]: _sizes(entry) for entry in entries}
    listed = "\n".join(f"- {model}: {text}" for model, text in sizes.items())
    shown = columns(entries, "case", "ms/step", "tokens/s", "x eager", "x lower bound", "peak GiB")
    return f"{shown}\n\n{listed}" if entries else ""


def skipped(recording: Recording) -> str:
    """What was not measured and why, and what was refused."""
    lines = [f"- {group}: {id}: {reason}" for group, id, reason in recording.skipped]
    lines += [f"- {group}: {id}: no number: {reason}" for group, id, reason in recording.refused]
    return "\n".join(lines)


def machine_line(recording: Recording, chinese: bool = False) -> str:
    """Where and when, in a line."""
    facts = recording.facts
    versions = [f"{name} {version}" for name, version in facts["versions"].items() if version]
    if chinese:
        driver = [f"驱动 {facts['driver']}，CUDA {facts['cuda']}"] if facts["driver"] or facts["cuda"] else []
        parts = [*driver, "，".join(versions), facts["system"], f"提交 {facts['commit'] or '未知'}", facts["date"][:10]]
        return "；".join([facts["device"], *parts])
    driver = [f"driver {facts['driver']}, CUDA {facts['cuda']}"] if facts["driver"] or facts["cuda"] else []
    parts = [", ".join([facts["device"], *driver]), ", ".join(versions), facts["system"]]
    return "; ".join([*parts, f"commit {facts['commit'] or 'unknown'}", facts["date"][:10]])


def measured_on(recordings: Sequence[Recording], chinese: bool = False) -> str:
    """Where and when figures were measured, with the statement that belongs to them."""
    lines = [machine_line(recording, chinese) for recording in recordings]
    begin = "测量环境：" if chinese else "Measured on:"
    end = "绝对时间属于这台机器；比值来自在它上面交替进行的各轮测量。"
    if not chinese:
        end = "Absolute times are that machine's; the ratios come from interleaved rounds on it."
    if len(lines) == 1:
        return f"{begin}{lines[0]}。{end}" if chinese else f"{begin} {lines[0]}. {end}"
    return "\n".join([begin, "", *(f"- {line}" for line in lines), "", end])


def whole(recording: Recording) -> str:
    """All tables, with headings, as printed after a run."""
    parts = [
        ("", measured_on([recording])),
        ("Steps", steps(recording)),
        ("Other work", others(recording)),
        ("Ratios, from interleaved rounds", ratios(recording)),
        ("Sweep", sweep(recording)),
        ("Scale", scale(recording)),
        ("What the machine can do", probes.table(recording.probes) if recording.probes else ""),
        ("Promises", claims([recording])),
        ("Not measured", skipped(recording)),
    ]
    return "\n\n".join(f"{title}\n\n{text}".strip() for title, text in parts if text)


# --- over all recordings ----------------------------------------------------------------------------------------------

Measure = Callable[[Recording], float | None]


def span(values: Sequence[float]) -> str:
    """The least and the most, as "2.38..2.90", or the one that there is."""
    least, most = f"{min(values):.2f}", f"{max(values):.2f}"
    return least if least == most else f"{least}..{most}"


def _over(group: str, id: str, other: str) -> Measure:
    """How many times as long the other takes."""
    return lambda recording: (recording.entry(group, id) or {}).get("rivals", {}).get(other, {}).get("ratio")


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


def _run(steps: int) -> Measure:
    return lambda recording: (run_ratio(recording, steps) or (None,))[0]


def _under(group: str, id: str, milliseconds: float) -> Measure:
    def measure(recording: Recording) -> float | None:
        entry = recording.entry(group, id)
        return None if entry is None else milliseconds / entry["ms"]["median"]

    return measure


def _memory(group: str, id: str, other: str) -> Measure:
    """How many times as much memory the other takes at its peak."""

    def measure(recording: Recording) -> float | None:
        entry = recording.entry(group, id) or {}
        theirs = entry.get("rivals", {}).get(other, {}).get("peak_bytes")
        return None if theirs is None else theirs / entry["peak_bytes"]

    return measure


LARGE_FORWARD = "large-embed_linear_tanh-table-65536-fp32"
LARGE_BACKWARD = "large-embed_linear_tanh-table-and-backward-65536-fp32"
SMALL_FORWARD = "small-embed_linear_tanh-128-fp32"
NATIVE, NATIVE_1 = ("step", "native-128-fp32"), ("threads", "native-128-fp32-1-thread")
PERSISTENT, PERSISTENT_3 = "triton-persistent-128-fp32", "triton-persistent-128-tf32x3"
LONG_RUN = "a run of 50,000 steps over the loop on Python lists"

# (device type, the promise, what is measured of it, the least that keeps it); all are "times as fast as".
CLAIMS: list[tuple[str, str, Measure, float]] = [
    ("cpu", "eager over the loop on Python lists", _over("step", "eager-128-fp32", REFERENCE), 1),
    ("cpu", "compile-step over eager", _over("step", "compile-step-128-fp32", BASELINE), 1),
    ("cpu", "10,000,000 uniforms over one second", _under("rng", "fill 10,000,000", 1000), 1),
    ("cpu", "native over the loop on Python lists, all threads", _over(*NATIVE, REFERENCE), 6),
    ("cpu", "native over compile-step, all threads", _over(*NATIVE, "compile-step"), 2.5),
    ("cpu", "native over the loop on Python lists, one thread", _over(*NATIVE_1, REFERENCE), 5),
    ("cpu", "native over compile-step, one thread", _over(*NATIVE_1, "compile-step"), 2),
    ("cpu", "a run of 5,000 steps over the loop on Python lists", _run(5000), 4),
    ("cpu", LONG_RUN, _run(50_000), 10),
    ("cuda", "triton-persistent over 8 us a step", _under("step", PERSISTENT, 0.008), 1),
    ("cuda", "triton-persistent, tf32x3, over 8 us a step", _under("step", PERSISTENT_3, 0.008), 1),
    ("cuda", "triton-step over 15 us a step", _under("step", "triton-step-128-fp32", 0.015), 1),
    ("cuda", "table form, B=65,536, over a copy of as many bytes", _over("kernels", LARGE_FORWARD, COPY), 0.8),
    ("cuda", "table form, B=65,536, over torch.compile", _over("kernels", LARGE_FORWARD, COMPILE), 2),
    ("cuda", "table form, B=128, over an empty kernel", _over("kernels", SMALL_FORWARD, EMPTY), 1 / 1.5),
    ("cuda", "memory of torch over the table form's, B=65,536", _memory("kernels", LARGE_BACKWARD, TORCH), 2),
]


def claims(recordings: Sequence[Recording]) -> str:
    """What the project promises, the least and the most over recordings, and whether they bear it out."""
    rows = []
    for device_type, promise, measure, least in CLAIMS:
        here = [recording for recording in recordings if recording.facts["device_type"] == device_type]
        values = [value for value in map(measure, here) if value is not None]
        if not here:
            continue
        kept = sum(value >= least for value in values)
        holds = {0: "**no**", len(values): "yes"}.get(kept, f"**in {kept} of {len(values)}**")
        shown = span(values) if values else "-"
        if promise == LONG_RUN and any((run_ratio(recording, 50_000) or (0, False))[1] for recording in here):
            shown += ", the loop's time scaled from 5,000 steps"
        rows.append([promise, f"{least:g}", shown, holds if values else "not measured"])
    return table(["promise", "at least", "measured", "holds"], rows) if rows else ""


def result(recordings: Sequence[Recording], chinese: bool = False) -> str:
    """The project's result in a paragraph: how many times faster on what, to which digits."""
    ratios = [(_over(*NATIVE, BASELINE)(one), _over(*NATIVE, REFERENCE)(one), one) for one in recordings]
    measured = [(eager, loop, one) for eager, loop, one in ratios if eager is not None and loop is not None]
    ends = [one.extra["losses"]["test_loss"] for one in recordings if "losses" in one.extra]
    if not measured or not ends:
        return ""
    same = (d for d in range(6, 0, -1) if {f"{end:.{d}f}" for end in ends} == {f"{TEST_LOSS[50_000]:.{d}f}"})
    text = RESULT[chinese].format(
        eager=span([eager for eager, _, _ in measured]),
        loop=span([loop for _, loop, _ in measured]),
        recordings=len(measured),
        machines=len({one.facts["device"] for _, _, one in measured}),
        test_loss=TEST_LOSS[50_000],
        decimals=next(same, 0),
    )
    return text + ("" if any(one.facts["device_type"] == "cuda" for one in recordings) else NO_GPU[chinese])


# --- in Chinese -------------------------------------------------------------------------------------------------------

RESULT = (
    "On a CPU a step of `native` trains the n-gram MLP of LLM101n {eager} times as fast as eager PyTorch and {loop} "
    "times as fast as the reference's loop on Python lists (least and most; recordings: {recordings}, machines: "
    "{machines}), to the reference's digits: 50,000 steps end at its test loss, {test_loss:.6f}, equal in {decimals} "
    "decimals.",
    "在 CPU 上，`native` 训练 LLM101n 的 n-gram MLP，一步的速度是 eager PyTorch 的 {eager} 倍，是参考程序用 Python "
    "列表的循环的 {loop} 倍（最小值和最大值；录制 {recordings} 次，机器 {machines} 台），数字与参考程序相同：50,000 "
    "步之后的测试损失是 {test_loss:.6f}，{decimals} 位小数全部相同。",
)
NO_GPU = (" No GPU has been recorded, so there is no figure for one.", "还没有录制任何 GPU，所以没有它的数字。")

# Cells of the tables that Chinese pages show.
WORDS = {
    "backend": "后端",
    "ms/step": "毫秒/步",
    "x eager": "相对 eager 的加速比",
    "lower bound, ms": "下界（毫秒）",
    "x lower bound": "与下界之比",
    "arithmetic": "算术",
    "val loss": "验证损失",
    "its difference": "验证损失之差",
    "largest of a batch loss": "批损失的最大差",
    "parameters": "参数之差",
    "one product": "一次乘积之差",
    "promise": "承诺",
    "at least": "至少",
    "measured": "测得",
    "holds": "成立",
    "yes": "是",
    "**no**": "**否**",
    "not measured": "未测量",
    "eager over the loop on Python lists": "eager 比用 Python 列表的循环",
    "compile-step over eager": "compile-step 比 eager",
    "10,000,000 uniforms over one second": "10,000,000 个均匀随机数比一秒",
    "native over the loop on Python lists, all threads": "native 比用 Python 列表的循环，全部线程",
    "native over compile-step, all threads": "native 比 compile-step，全部线程",
    "native over the loop on Python lists, one thread": "native 比用 Python 列表的循环，一个线程",
    "native over compile-step, one thread": "native 比 compile-step，一个线程",
    "a run of 5,000 steps over the loop on Python lists": "5,000 步的整次运行比用 Python 列表的循环",
    "a run of 50,000 steps over the loop on Python lists": "50,000 步的整次运行比用 Python 列表的循环",
    "triton-persistent over 8 us a step": "triton-persistent 比每步 8 微秒",
    "triton-persistent, tf32x3, over 8 us a step": "triton-persistent（tf32x3）比每步 8 微秒",
    "triton-step over 15 us a step": "triton-step 比每步 15 微秒",
    "table form, B=65,536, over a copy of as many bytes": "表形式，B=65,536，比复制同样多的字节",
    "table form, B=65,536, over torch.compile": "表形式，B=65,536，比 torch.compile",
    "table form, B=128, over an empty kernel": "表形式，B=128，比空内核",
    "memory of torch over the table form's, B=65,536": "torch 的内存比表形式的内存，B=65,536",
}


def translated(text: str) -> str:
    """A Markdown table, its header and the words in its cells in Chinese."""
    text = re.sub(r"(?<=\| )[^|\n]+(?= \|)", lambda cell: WORDS.get(cell[0], cell[0]), text)
    text = re.sub(r"\*\*in (\d+) of (\d+)\*\*", r"**\2 次中的 \1 次**", text)
    return text.replace(", the loop's time scaled from 5,000 steps", "（循环的时间由 5,000 步推算）")


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

"""Recordings as Markdown: the same tables on the terminal, in the README and in the docs, in either language."""

import re
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

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
    parts += [entry[key] for key in ("compile_mode", "precision") if entry.get(key) not in (None, "default", "fp32")]
    if entry["group"] == "threads":
        parts.append(f"{entry['threads']} thread" + ("" if entry["threads"] == 1 else "s"))
    return ", ".join(parts)


def _number(value: Any) -> str:
    """Three or four digits, without an exponent."""
    if not value:
        return "-" if value is None else "0"
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


# --- tables of entries ------------------------------------------------------------------------------------------------

SWEPT = {"B": "B, windows a batch", "H": "H, hidden units", "T": "T, tokens a context", "V": "V, distinct tokens"}
# heading of a column -> an entry's cell. Columns up to the last of TEXT are text, to the left.
CELLS: dict[str, Callable[[Entry], str]] = {
    "backend": label,
    "case": itemgetter("id"),
    **{heading: itemgetter(heading) for heading in ("group", "per", "beside")},
    **dict.fromkeys(("ms/step", "ms, median", "ms"), lambda entry: _number(entry["ms"]["median"])),
    "fastest..slowest": _rounds,
    "eager, ms/step": lambda entry: _number(entry["rivals"].get(BASELINE, {}).get("ms", {}).get("median")),
    "ms of the other": lambda entry: _number(entry["rivals"][entry["beside"]]["ms"]["median"]),
    "x eager": _times_eager,
    "ratio": lambda entry: f"{entry['rivals'][entry['beside']]['ratio']:.2f}",
    "speed": lambda entry: ", ".join(f"{f['ratio']:.2f} x {n}" for n, f in entry.get("rivals", {}).items()) or "-",
    **dict.fromkeys(("samples/s", "tokens/s"), lambda entry: f"{entry['samples_per_second']:,.0f}"),
    "device ms/step": lambda entry: _number(entry.get("device_ms")),
    "launches/step": lambda entry: _number(entry.get("launches")),
    "lower bound, ms": lambda entry: _number(entry.get("floor_ms")),
    "x lower bound": lambda entry: f"{entry['x_floor']:.1f}" if "x_floor" in entry else "-",
    "first step, s": lambda entry: f"{entry['first_step_seconds']:.2f}",
    "loss error": lambda entry: f"{entry['loss_error']:.1e}",
    "peak GiB": lambda entry: f"{entry['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in entry else "-",
    **{SWEPT[letter]: lambda entry, letter=letter: f"{entry[letter]:,}" for letter in SWEPT},  # type: ignore[misc]
}
TEXT = ("backend", "group", "case", "per", "beside")


def _pairs(recording: Recording) -> list[Entry]:
    """Every entry but the sweep's, once for each of its rivals, whose name is `beside`."""
    entries = [entry for entry in recording.entries if entry["group"] != "sweep"]
    return [{**e, "id": f"{e['group']}: {e['id']}", "beside": name} for e in entries for name in e.get("rivals", {})]


# name of a table -> its title in print, its entries, and the headings of its columns.
TABLES: dict[str, tuple[str, Callable[[Recording], list[Entry]], str]] = {
    "steps": (
        "Steps",
        lambda r: r.group("step") + r.group("threads"),
        "backend | ms/step | fastest..slowest | x eager | samples/s | device ms/step | launches/step | "
        "lower bound, ms | x lower bound | first step, s | loss error",
    ),
    "ladder": (
        "",
        lambda r: [entry for entry in r.group("step") if entry["precision"] == "fp32"],
        "backend | ms/step | x eager | lower bound, ms | x lower bound",
    ),
    "others": (
        "Other work",
        lambda r: [entry for entry in r.entries if entry["group"] not in ("step", "threads", "sweep", "scale")],
        "group | case | per | ms, median | fastest..slowest | speed",
    ),
    "ratios": ("Ratios, from interleaved rounds", _pairs, "case | beside | ms | ms of the other | ratio"),
    "sweep": ("Sweep", lambda r: r.group("sweep"), "backend | ms/step | eager, ms/step | x eager | x lower bound"),
    "scale": ("Scale", lambda r: r.group("scale"), "case | ms/step | tokens/s | x eager | x lower bound | peak GiB"),
}


def columns(entries: Sequence[Entry], headings: str) -> str:
    """A table of entries, a line each, without columns that are empty in all lines; "" without entries."""
    filled = [(heading, *map(CELLS[heading], entries)) for heading in headings.split(" | ")]
    header, *rows = zip(*(column for column in filled if set(column[1:]) != {"-"}), strict=True)
    return table(header, rows, 1 + max(i for i, heading in enumerate(header) if heading in TEXT)) if rows else ""


def shown(name: str, recording: Recording) -> str:
    """One of TABLES, with the sizes of its models; the sweep is a table for each size."""
    _, choose, headings = TABLES[name]
    entries = choose(recording)
    if name == "sweep":
        return "\n\n".join(columns(those, f"{SWEPT[size]} | {headings}") for size, those in swept(entries).items())
    text = columns(entries, headings)
    if name == "steps" and entries:
        return f"{_sizes(entries[0])}\n\n{text}"
    if name == "scale" and entries:
        sizes = {entry["id"].split()[0]: _sizes(entry) for entry in entries}
        return "\n".join([text, "", *(f"- {model}: {those}" for model, those in sizes.items())])
    return text


def _sizes(entry: Entry) -> str:
    return ", ".join(f"{letter}={entry[letter]:,}" for letter in "BTEHV")


def swept(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """The sweep's entries by the letter of the size that is swept: "native-B128" -> "B"."""
    found: dict[str, list[Entry]] = {letter: [] for letter in SWEPT}
    for entry in entries:
        found[entry["id"].rsplit("-", 1)[1][0]].append(entry)
    return {letter: those for letter, those in found.items() if those}


def skipped(recording: Recording) -> str:
    """The cases without a number, and why."""
    lines = [f"- {group}: {id}: {reason}" for group, id, reason in recording.skipped]
    return "\n".join(lines + [f"- {group}: {id}: no number: {reason}" for group, id, reason in recording.refused])


def measured_on(recordings: Sequence[Recording], chinese: bool = False) -> str:
    """Machine, versions, commit and date of the recordings, and how to read their times."""
    begin, driver, commit, unknown, comma, semicolon, stop = MEASURED_ON[chinese]
    statement, lines = STATEMENT[chinese], []
    for facts in (recording.facts for recording in recordings):
        parts = [facts["device"]]
        if facts["driver"] or facts["cuda"]:
            parts.append(f"{driver} {facts['driver']}{comma}CUDA {facts['cuda']}")
        parts.append(comma.join(f"{name} {version}" for name, version in facts["versions"].items() if version))
        parts += [facts["system"], f"{commit} {facts['commit'] or unknown}", facts["date"][:10]]
        lines.append(semicolon.join(parts))
    if len(lines) == 1:
        return begin + lines[0] + stop + statement
    return "\n".join([begin.strip(), "", *(f"- {line}" for line in lines), "", statement])


def whole(recording: Recording) -> str:
    """All tables with their titles, as printed after a run."""
    parts = [
        ("", measured_on([recording])),
        *((title, shown(name, recording)) for name, (title, _, _) in TABLES.items() if title),
        ("What the machine can do", probes.table(recording.probes)),
        ("Promises", claims([recording])),
        ("Not measured", skipped(recording)),
    ]
    return "\n\n".join(f"{title}\n\n{text}".strip() for title, text in parts if text)


# --- over all recordings ----------------------------------------------------------------------------------------------

NATIVE, NATIVE_1 = ("step", "native-128-fp32"), ("threads", "native-128-fp32-1-thread")
LARGE_FORWARD = ("kernels", "large-embed_linear_tanh-table-65536-fp32")
LARGE_BACKWARD = ("kernels", "large-embed_linear_tanh-table-and-backward-65536-fp32")
SMALL_FORWARD = ("kernels", "small-embed_linear_tanh-128-fp32")


class Claim(NamedTuple):
    """A promise of the project: a case is at least so many times as fast as something else, or as small in memory."""

    device_type: str  # of the recordings that it is about
    promise: str
    case: tuple[str, str]  # group and id
    over: str | float  # the name of what was timed beside it, or milliseconds
    least: float  # the least ratio that keeps the promise
    of: str = "ms"  # what is compared: "ms" or "peak_bytes"


CLAIMS = (
    Claim("cpu", "eager over the loop on Python lists", ("step", "eager-128-fp32"), REFERENCE, 1),
    Claim("cpu", "compile-step over eager", ("step", "compile-step-128-fp32"), BASELINE, 1),
    Claim("cpu", "10,000,000 uniforms over one second", ("rng", "fill 10,000,000"), 1000, 1),
    Claim("cpu", "native over the loop on Python lists, all threads", NATIVE, REFERENCE, 6),
    Claim("cpu", "native over compile-step, all threads", NATIVE, "compile-step", 2.5),
    Claim("cpu", "native over the loop on Python lists, one thread", NATIVE_1, REFERENCE, 5),
    Claim("cpu", "native over compile-step, one thread", NATIVE_1, "compile-step", 2),
    Claim("cpu", "a run of 5,000 steps over the loop on Python lists", ("run", "5000 steps"), REFERENCE, 4),
    Claim("cpu", "a run of 50,000 steps over the loop on Python lists", ("run", "50000 steps"), REFERENCE, 10),
    Claim("cuda", "triton-persistent over 8 us a step", ("step", "triton-persistent-128-fp32"), 0.008, 1),
    Claim("cuda", "triton-persistent, tf32x3, over 8 us a step", ("step", "triton-persistent-128-tf32x3"), 0.008, 1),
    Claim("cuda", "triton-step over 15 us a step", ("step", "triton-step-128-fp32"), 0.015, 1),
    Claim("cuda", "table form, B=65,536, over a copy of as many bytes", LARGE_FORWARD, COPY, 0.8),
    Claim("cuda", "table form, B=65,536, over torch.compile", LARGE_FORWARD, COMPILE, 2),
    Claim("cuda", "table form, B=128, over an empty kernel", SMALL_FORWARD, EMPTY, 1 / 1.5),
    Claim("cuda", "memory of torch over the table form's, B=65,536", LARGE_BACKWARD, TORCH, 2, "peak_bytes"),
)


def measured(
    recording: Recording, case: tuple[str, str], over: str | float, of: str = "ms"
) -> tuple[float, bool] | None:
    """The ratio of a Claim, and whether it rests on a time that was scaled from a shorter run.

    Both a run and the reference's evaluate every 200 steps, so the time after the start grows with the steps. The
    start is not scaled, which favours the reference.
    """
    entry = recording.entry(*case)
    if entry is None:
        return None
    if not isinstance(over, str):
        return over / entry["ms"]["median"], False
    if other := entry["rivals"].get(over):
        return (other["ratio"] if of == "ms" else other[of] / entry[of]), False
    short = next((e for e in recording.group("run") if over in e["rivals"]), None)
    start = recording.entry("start-up", "import mlp_fast.train")
    if case[0] != "run" or short is None or start is None:
        return None
    begin = start["ms"]["median"]
    long = begin + (short["rivals"][over]["ms"]["median"] - begin) * entry["steps"] / short["steps"]
    return long / entry["ms"]["median"], True


SCALED = ", the loop's time scaled from 5,000 steps"


def span(values: Sequence[float]) -> str:
    """The least and the most, as "2.38..2.90", or the one that there is."""
    least, most = f"{min(values):.2f}", f"{max(values):.2f}"
    return least if least == most else f"{least}..{most}"


def claims(recordings: Sequence[Recording]) -> str:
    """The promises, with the least and the greatest ratio over recordings, and whether they hold."""
    rows = []
    for device_type, promise, case, over, least, of in CLAIMS:
        here = [recording for recording in recordings if recording.facts["device_type"] == device_type]
        found = [one for recording in here if (one := measured(recording, case, over, of))]
        kept, text, holds = sum(ratio >= least for ratio, _ in found), "-", "not measured"
        if found:
            text = span([ratio for ratio, _ in found]) + (SCALED if any(scaled for _, scaled in found) else "")
            holds = {0: "**no**", len(found): "yes"}.get(kept, f"**in {kept} of {len(found)}**")
        if here:
            rows.append([promise, f"{least:g}", text, holds])
    return table(["promise", "at least", "measured", "holds"], rows) if rows else ""


def result(recordings: Sequence[Recording], chinese: bool = False) -> str:
    """The project's result in a paragraph: how many times faster on what, to which digits."""
    ratios = [(measured(one, NATIVE, BASELINE), measured(one, NATIVE, REFERENCE), one) for one in recordings]
    found = [(eager[0], loop[0], one) for eager, loop, one in ratios if eager and loop]
    ends = [one.extra["losses"]["test_loss"] for one in recordings if "losses" in one.extra]
    if not found or not ends:
        return ""
    same = (d for d in range(6, 0, -1) if {f"{end:.{d}f}" for end in ends} == {f"{TEST_LOSS[50_000]:.{d}f}"})
    text = RESULT[chinese].format(
        eager=span([eager for eager, _, _ in found]),
        loop=span([loop for _, loop, _ in found]),
        recordings=len(found),
        machines=len({one.facts["device"] for _, _, one in found}),
        test_loss=TEST_LOSS[50_000],
        decimals=next(same, 0),
    )
    return text + ("" if any(one.facts["device_type"] == "cuda" for one in recordings) else NO_GPU[chinese])


# --- in Chinese -------------------------------------------------------------------------------------------------------

MEASURED_ON = (
    ("Measured on: ", "driver", "commit", "unknown", ", ", "; ", ". "),
    ("测量环境：", "驱动", "提交", "未知", "，", "；", "。"),
)
STATEMENT = (
    "Absolute times are that machine's; the ratios come from interleaved rounds on it.",
    "绝对时间属于这台机器；比值来自在它上面交替进行的各轮测量。",
)
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

# Cells of the tables on Chinese pages.
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


def in_chinese(cell: str) -> str:
    """A table's cell in Chinese, or as it is where WORDS lacks it."""
    cell = re.sub(r"\*\*in (\d+) of (\d+)\*\*", r"**\2 次中的 \1 次**", WORDS.get(cell, cell))
    return cell.replace(SCALED, "（循环的时间由 5,000 步推算）")


# --- tables on a narrow screen ----------------------------------------------------------------------------------------

COLUMNS = 6  # of a table on a phone's screen


def narrow(text: str, cell: Callable[[str], str] = str) -> str:
    """Markdown with wide tables cut into some of at most COLUMNS columns, each with the first column of the whole.

    Args:
        cell: maps every cell to its text.
    """

    def cut(match: re.Match[str]) -> str:
        rows = [[cell(part) for part in line[2:-2].split(" | ")] for line in match[0].splitlines()]
        others = len(rows[0]) - 1
        parts = max(1, -(-others // (COLUMNS - 1)))
        size = max(1, -(-others // parts))
        tables = [[[row[0], *row[1 + i * size :][:size]] for row in rows] for i in range(parts)]
        return "\n".join("".join(f"| {' | '.join(row)} |\n" for row in table) for table in tables)

    return re.sub(r"(?:^\|.*\|(?:\n|\Z))+", cut, text, flags=re.MULTILINE)

"""What the report writes into Chinese pages; figures, names of backends and versions stay as they are."""

import re

from bench.recording import Recording

# Cells of the tables that Chinese pages show.
WORDS = {
    "backend": "后端",
    "ms/step": "毫秒/步",
    "x eager": "相对 eager 的加速比",
    "floor, ms": "下界（毫秒）",
    "x floor": "与下界之比",
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
# report.TRAINED.
TRAINED = (
    "{backend} 在 embedded 语料上训练 {num_steps:,} 步：验证损失 {val_loss:.6f}（下界 {floor:.6f}），"
    "测试损失 {test_loss:.6f}，单位是每字符奈特。"
)
PICTURES = {
    "losses": "折线图：一次运行中训练损失和验证损失随步数的变化，以及验证损失的下界",
    "ladder": "条形图：每个后端在 float32 下每步的毫秒数，下界标在各条之中",
    "steps": "条形图：每个后端每步的毫秒数，下界标在各条之中",
    "sweep": "折线图：每步的毫秒数随各个尺寸的变化，对数坐标",
}


def translated(table: str) -> str:
    """A Markdown table, its header and the words in its cells in Chinese."""
    table = re.sub(r"(?<=\| )[^|\n]+(?= \|)", lambda cell: WORDS.get(cell[0], cell[0]), table)
    return table.replace(", the loop's time scaled from 5,000 steps", "（循环的时间由 5,000 步推算）")


def machine_line(recording: Recording) -> str:
    """tables.machine_line in Chinese."""
    facts = recording.facts
    parts = [facts["device"]]
    if facts["driver"] or facts["cuda"]:
        parts.append(f"驱动 {facts['driver']}，CUDA {facts['cuda']}")
    parts.append("，".join(f"{name} {version}" for name, version in facts["versions"].items() if version))
    parts += [facts["system"], f"提交 {facts['commit'] or '未知'}", facts["date"][:10]]
    return f"测量环境：{'；'.join(parts)}。绝对时间属于这台机器；比值来自在它上面交替进行的各轮测量。"

"""PTX written by hand, run in the emulator."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from emulator import Finding, Schedule, decode, run

THREADS = 128
# Stores %r9 at the place of the thread's number in the first buffer.
STORE = "mad.wide.u32 %rd10, %r0, 4, %rd0; st.global.b32 [ %rd10 + 0 ], { %r9 };"


def kernel_of(body: str, buffers: int) -> str:
    """A kernel with the addresses of so many buffers in %rd0, %rd1, ... and the thread's number in %r0."""
    return f""".visible .entry kernel(
{",".join(f".param .u64 .ptr .global .align 1 kernel_param_{i}" for i in range(buffers))}
)
{{
.reg .pred %p<20>;
.reg .b16 %rs<40>;
.reg .b32 %r<80>;
.reg .b64 %rd<80>;
{"".join(f"ld.param.b64 %rd{i}, [kernel_param_{i}];" + chr(10) for i in range(buffers))}
mov.u32 %r0, %tid.x;
{body}
ret;
}}
"""


def launch(
    body: str, *buffers: Any, threads: int = THREADS, grid: Sequence[int] = (1,), shared: int = 0, **schedule: Any
) -> list[Finding]:
    """Runs PTX with the addresses of the buffers in %rd0, %rd1, ... and the thread's number in %r0; its findings."""
    names = [f"b{i}" for i in range(len(buffers))]
    text = kernel_of(body, len(buffers))
    memory = {name: np.frombuffer(data, np.uint8) for name, data in zip(names, buffers, strict=True)}
    assert all(data.flags.writeable for data in memory.values())
    result = run(decode(text), grid, threads, shared, memory, [(n, 0) for n in names], Schedule(**schedule))
    return result.findings

"""The operators on a StubGPU: `python operators.py JSON` prints, as JSON, what came of each of them in each arithmetic.

The argument is {"capability": 75, "processors": 40, "arithmetics": [[dtype, precision], ...]}. The answer has a list
for each arithmetic, of what embed_linear_tanh and linear_cross_entropy said: the error's kind and message, or the names
of the kernels that were launched.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from stub_gpu import StubGPU

from mlp_fast.ops import embed_linear_tanh, linear_cross_entropy


def said(gpu: StubGPU, work: Callable[[], Any]) -> str | list[str]:
    """What came of a piece of work."""
    before = len(gpu.launches)
    try:
        work()
    except Exception as error:  # each is an answer
        return f"{type(error).__name__}: {error}"
    return [launch.kernel for launch in gpu.launches[before:]]


def main() -> None:
    """Computes each once."""
    task = json.loads(sys.argv[1])
    gpu = StubGPU(task["capability"], task["processors"])
    answer = []
    with gpu.installed():
        for name, precision in task["arithmetics"]:
            dtype = getattr(torch, name)
            wte, weight, h, out = (torch.ones(n, m, dtype=dtype) for n, m in ((27, 16), (32, 48), (16, 32), (27, 32)))
            idx, target = torch.zeros(16, 3, dtype=torch.int64), torch.zeros(16, dtype=torch.int64)

            def embed(wte: Any = wte, weight: Any = weight, idx: Any = idx, precision: str = precision) -> Any:
                return embed_linear_tanh(idx, wte, weight, None, precision=precision)

            def loss(h: Any = h, out: Any = out, target: Any = target, precision: str = precision) -> Any:
                return linear_cross_entropy(h, out, None, target, precision=precision)

            answer.append([said(gpu, embed), said(gpu, loss)])
    print(json.dumps(answer))


main()

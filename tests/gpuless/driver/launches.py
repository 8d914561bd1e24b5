"""Training commands on a StubGPU: `python launches.py JSON` prints, as JSON, what each call of a backend launched.

The argument is {"capability": 90, "processors": 132, "commands": [[options of mlp_fast.train], ...], "shipped":
true}. The answer is {"runs": [...], "too_many": ...}: of each command its exit code, its calls of the backend in order
(see `watched`), and addresses and settings of its kernels; and what was said of a cooperative launch of more programs
than there are multiprocessors. With "shipped" also {"strangers": [...], "same_code": {...}}: the kernels that were
launched but are in no shipped() of kernels/, and whether bench.resources would have seen the code that was loaded.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from stub_gpu import StubGPU

from bench import resources
from bench.barrier_kernel import run_barriers
from mlp_fast import train
from mlp_fast.backends import Choice
from mlp_fast.backends.base import Backend
from mlp_fast.kernels import inference as evaluation

VERBS = ("prepare", "advance", "mean_loss", "logits", "sample", "state")


def watched(backend: Backend, gpu: StubGPU) -> list[dict[str, Any]]:
    """The calls of a backend from now on: each with the launches and loads that it made."""
    calls: list[dict[str, Any]] = []
    running: list[str] = []

    def watch(verb: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if running:  # by another call
                return method(*arguments, **options)
            launches, loads = len(gpu.launches), len(gpu.loads)
            running.append(verb)
            try:
                return method(*arguments, **options)
            finally:
                running.clear()
                made = [dataclasses.asdict(launch) for launch in gpu.launches[launches:]]
                steps = arguments[0] if verb == "advance" else None
                calls.append({"verb": verb, "steps": steps, "launches": made, "loads": gpu.loads[loads:]})

        return call

    for verb in VERBS:
        setattr(backend, verb, watch(verb, getattr(backend, verb)))
    return calls


def facts(backend: Backend) -> dict[str, Any]:
    """What the arguments of the step kernels ought to be, and the settings that they were compiled for."""
    kernels = getattr(backend, "kernels", None)
    if kernels is None:
        return {}
    words = [
        t.data_ptr() for t in (getattr(kernels, "counter", None), getattr(kernels, "error", None)) if t is not None
    ]
    return {
        "config": dataclasses.asdict(kernels.config),
        "tiles": kernels.config.TILES,
        "buffers": [tensor.data_ptr() for tensor in kernels.buffers],
        "words": words,
        "num_windows": kernels.num_windows,
    }


def run(command: list[str], gpu: StubGPU) -> dict[str, Any]:
    """One training command; then logits of many contexts, and of one whose address is no multiple of 16."""
    result: dict[str, Any] = {"calls": []}
    made: list[Backend] = []
    create = Choice.create

    def watching(*arguments: Any) -> Backend:
        backend = create(*arguments)
        made.append(backend)
        result.update(calls=watched(backend, gpu), device=str(backend.device), **facts(backend))
        return backend

    Choice.create = watching  # type: ignore[method-assign]
    try:
        result["code"] = train.main([*command, "--device", "cuda", "--quiet"])
        T = made[0].shape.T
        for contexts in (torch.zeros(40, T, dtype=torch.int64), torch.zeros(1, T + 1, dtype=torch.int64)[:, 1:]):
            made[0].logits(contexts)
    finally:
        Choice.create = create  # type: ignore[method-assign]
    return result


def strangers(gpu: StubGPU) -> list[str]:
    """What was compiled, but is no configuration of any shipped()."""
    known = resources.configurations([resources.module_of(name) for name in resources.KERNELS])
    return sorted(gpu.keys - {shipped.key_on(gpu.capability) for shipped in known})


def same_code(gpu: StubGPU) -> dict[str, bool]:
    """Kernel -> whether its shipped configuration for these runs compiles to the PTX that was loaded."""
    return {
        shipped.kernel.fn.__name__: shipped.compile(gpu.capability).asm["ptx"] in gpu.ptx
        for shipped in evaluation.shipped()
        if shipped.precision == "fp32" and shipped.arguments["C"].V == 27
    }


def too_many(gpu: StubGPU) -> str:
    """The error of a cooperative launch of more programs than there are multiprocessors."""
    try:
        run_barriers(gpu.processors + 1, 1, torch.device("cuda"))
    except RuntimeError as error:
        return str(error)
    return "none"


def main() -> None:
    """Runs the commands."""
    task = json.loads(sys.argv[1])
    gpu = StubGPU(task["capability"], task["processors"])
    with gpu.installed():
        answer = {"runs": [run(command, gpu) for command in task["commands"]]}
    if task["shipped"]:
        answer |= {"strangers": strangers(gpu), "same_code": same_code(gpu)}
    with gpu.installed():
        answer["too_many"] = too_many(gpu)
    print(json.dumps(answer))


main()

"""`python -m mlp_fast.profile --backend X`: where the time of warm steps goes.

The same steps in three ways, on any machine:

    as it stands     torch.profiler: a Chrome trace (open it in ui.perfetto.dev), the top kernels, launches and gaps
    --proton FILE    Triton's Proton in torch.profiler's place, on CUDA
    --no-profiler    nothing attached: for ncu and nsys, whose commands are printed; they see the warm steps only

docs/profiling.md explains the output.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from mlp_fast import backends
from mlp_fast.cli import Parser, add_config_arguments, config_from, number, run_main
from mlp_fast.config import RUN_ONLY
from mlp_fast.errors import UserError
from mlp_fast.files import check_writable, write_json
from mlp_fast.measure import machine, profiling
from mlp_fast.measure.timing import seconds, subject
from mlp_fast.model.state import TrainState


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(given)
    config, steps = config_from(arguments), arguments.steps
    if arguments.warmup + steps > config.num_steps:
        raise UserError(f"--warmup and --steps together exceed --num-steps, {config.num_steps}; ask for fewer")
    backends.check(config)
    shape, tape = subject(config)
    choice = backends.resolve(config, shape, tape)
    name, device = choice.cls.name, choice.device
    if arguments.proton is not None and (reason := profiling.proton_missing(device)):
        raise UserError(f"--proton: {reason}")
    trace = Path(arguments.trace or f"runs/trace-{name}.json")
    if arguments.trace is None:
        with contextlib.suppress(OSError):  # check_writable() reports it
            trace.parent.mkdir(parents=True, exist_ok=True)
    check_writable(trace, "--trace")
    if arguments.json is not None:
        check_writable(Path(arguments.json), "--json")

    backend = choice.create(config, shape, tape, TrainState.initial(shape, config.seed))
    profiling.warm_up(backend, arguments.warmup)
    if arguments.no_profiler:
        with torch.cuda.profiler.profile() if device.type == "cuda" else contextlib.nullcontext():
            profiling.run_steps(backend, steps)
        return 0
    where = machine.facts(device)
    print(f"{name} on {where['device']} | torch {where['versions']['torch']} | {steps} warm steps\n")
    if arguments.proton is not None:
        profiling.run_under_proton(backend, steps, arguments.proton)
        print(f"Proton: proton-viewer -m time/us,count {arguments.proton}.hatchet")
        return 0
    wall = 1e6 * seconds(lambda: profiling.run_steps(backend, steps)) / steps
    summary = profiling.profile_steps(backend, steps, trace)
    print(f"{summary.table(arguments.top)}\n{wall:.2f} us a step without it\n")
    print(f"Chrome trace: {trace} (open it in https://ui.perfetto.dev)")
    print(f"Proton: {profiling.proton_missing(device) or 'the same command with --proton STEM'}")
    print(profiling.external_commands(given, name, steps))
    if arguments.json is not None:
        write_json(arguments.json, {**where, "backend": name, "wall": wall, **dataclasses.asdict(summary)})
    return 0


def _parser() -> Parser:
    parser = Parser(prog="python -m mlp_fast.profile", description=__doc__)
    count = number(int, 1)
    parser.add_argument("--steps", type=count, default=50, metavar="N", help="warm steps to look at")
    parser.add_argument("--warmup", type=number(int, 0), default=50, metavar="M", help="steps before them")
    parser.add_argument("--top", type=count, default=15, metavar="K", help="rows of the table")
    parser.add_argument("--trace", metavar="FILE", help="the Chrome trace (default: runs/trace-BACKEND.json)")
    parser.add_argument("--json", metavar="FILE", help="write the table as JSON")
    parser.add_argument("--proton", metavar="STEM", help="profile by Triton's Proton into STEM.hatchet")
    parser.add_argument("--no-profiler", action="store_true", help="only do the steps, for ncu and nsys")
    add_config_arguments(parser, leave_out=RUN_ONLY)
    return parser


if __name__ == "__main__":
    run_main(main)

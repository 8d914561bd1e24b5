"""`python -m mlp_fast.compare`: backends side by side: same seed, same batches, their rounds interleaved.

Every backend trains the same N steps twice. Each pass is cut into rounds, and the rounds of all backends are taken in
turns; eager is always among them, as the baseline. A backend that does not compute the model gets no number.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mlp_fast import backends
from mlp_fast.cli import Parser, add_config_arguments, config_from, run_main
from mlp_fast.config import RUN_ONLY
from mlp_fast.files import check_writable, write_json, writing
from mlp_fast.measure import machine
from mlp_fast.measure.comparison import chosen, compare, named, table
from mlp_fast.measure.timing import subject
from mlp_fast.run.plot import check_plot, draw_times, drawable, figure


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 1 where a backend was refused."""
    parser = Parser(prog="python -m mlp_fast.compare", description=__doc__)
    parser.add_argument("--backends", type=named, metavar="A,B,C", help="to compare (default: all that can run here)")
    parser.add_argument("--json", dest="record", metavar="FILE", help="write the results as JSON")
    parser.add_argument("--plot", dest="picture", metavar="FILE", help="draw the times (PNG, SVG or PDF)")
    add_config_arguments(parser, leave_out=("backend", *RUN_ONLY))
    parser.set_defaults(num_steps=500)
    arguments = parser.parse_args(argv)
    config = config_from(arguments)
    for name in arguments.backends or ():
        backends.check(dataclasses.replace(config, backend=name))
    if arguments.picture is not None:
        check_plot(arguments.picture)
    if arguments.record is not None:
        check_writable(Path(arguments.record), "--json")
    shape, tape = subject(config)
    names = chosen(arguments.backends, config, shape)
    results = compare(names, config, shape, tape)
    where = machine.facts(backends.device_of(backends.backend_class(names[0]), config.device))
    title = (
        f"{where['device']} | torch {where['versions']['torch']} | B={config.batch_size} T={shape.T} E={shape.E} "
        f"H={shape.H} V={shape.V} {config.precision} | {config.num_steps} steps, twice"
    )
    print(f"{title}\n\n{table(results)}")
    if arguments.record is not None:
        record = {"config": dataclasses.asdict(config), "results": [dataclasses.asdict(r) for r in results]}
        write_json(arguments.record, where | record)
    if arguments.picture is not None:
        times = {result.backend: result.ms_per_step for result in results if result.ms_per_step is not None}
        with writing("--plot", arguments.picture), figure(Path(arguments.picture), 8, 1.2 + 0.5 * len(times)) as axes:
            draw_times(axes, times)
            axes.set_title(drawable(title), parse_math=False)
    return 1 if any(result.refused for result in results) else 0


if __name__ == "__main__":
    run_main(main)

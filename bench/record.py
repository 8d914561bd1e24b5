"""`python -m bench.record`: every case of the suite, timed without pytest-benchmark, into one recording.

It writes bench/results/<device>/<date>.json (or --out FILE), which `python -m bench.report` makes tables and plots of.
The machine should have nothing else to do meanwhile.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import numerics, tables
from bench.case import Plan, Skipped, failure, plain_timer
from bench.processes import require_loss
from bench.recording import Recording, default_path
from bench.suite import GROUPS, cases, usual
from mlp_fast import backends, compare, profile, train
from mlp_fast.cli import run_main
from mlp_fast.config import Config
from mlp_fast.corpus.load import load
from mlp_fast.errors import UserError
from mlp_fast.measure.equivalence import NotEquivalent

COMPARED_STEPS = 500
ARITHMETIC_STEPS = 1000


@dataclass(frozen=True)
class Budget:
    """Seconds that a recording may take; None: as long as it needs."""

    seconds: float | None = None
    start: float = field(default_factory=time.perf_counter)

    def spent(self, share: float = 1) -> str | None:
        """Why nothing more is begun, or None: a share of the seconds is over."""
        over = self.seconds is not None and time.perf_counter() - self.start >= share * self.seconds
        return f"the budget of {self.seconds:g} s was spent" if over else None


def record(
    plan: Plan, groups: Sequence[str], extras: Mapping[str, Callable[[], Any]], path: Path, budget: Budget
) -> Recording:
    """Measures cases and then further results, printing how it goes, and writes the recording after each.

    What breaks off, of a compiler or a device, is noted; the others have numbers all the same.

    Args:
        plan: how much, and where.
        groups: of cases, some of suite.GROUPS.
        extras: what makes each further result, by its name.
        path: of the recording.
        budget: of which cases may use four fifths: none is begun after that, no slow one after half, and what is left
            out is noted as skipped.
    """
    recording = Recording.begin(torch.device(plan.device), dry=plan.dry)
    planned = [case for group in groups for case in cases(group, plan)]
    for case in sorted(planned, key=lambda case: case.slow):
        if reason := budget.spent(0.5 if case.slow else 0.8):
            recording.skipped.append((case.group, case.id, reason))
            continue
        begun = time.perf_counter()
        try:
            entry = recording.add(case, plain_timer)
            outcome = f"{entry['ms']['median']:.4f} ms per {entry['per']}"
        except Exception as error:
            outcome = told(error)
        recording.save(path)
        print(f"{case.group:10} {case.id:36} {outcome}  [{time.perf_counter() - begun:.1f} s]", flush=True)
    for name, extra in extras.items():
        if reason := budget.spent():
            recording.skipped.append(("extra", name, reason))
        else:
            try:
                recording.extra[name] = extra()
            except Exception as error:
                recording.refused.append(("extra", name, failure(error)))
                told(error)
        recording.save(path)
    recording.save(path)
    return recording


def told(error: Exception) -> str:
    """Why a case has no number, in a line; where it broke off goes to stderr."""
    if isinstance(error, Skipped):
        return f"skipped: {error}"
    if isinstance(error, NotEquivalent):
        return f"no number: {error}"
    traceback.print_exception(error)
    return failure(error)


def comparison(plan: Plan) -> dict[str, Any]:
    """What `python -m mlp_fast.compare` finds, with the table that it prints."""
    config = plan.config(num_steps=20 if plan.dry else COMPARED_STEPS)
    # On CUDA Inductor takes minutes to compile all; one stands for the others.
    left_out = ("compile-raw", "compile") if plan.device == "cuda" or plan.dry else ()
    here = [n for n in backends.REGISTRY if n not in left_out and backends.unsupported(n, config) is None]
    options = ["--backends", ",".join(here), "--num-steps", str(config.num_steps)]
    return _command(compare.main, [*options, *_sizes(plan)])


def profiles(plan: Plan, trace: Path | None) -> dict[str, Any]:
    """What `python -m mlp_fast.profile` finds of eager and of the fastest backend here, by name."""
    config = plan.config()
    results = {}
    for name in ("eager", "auto"):
        alias = backends.ALIASES.get(name, (name,))
        chosen = next((b for b in alias if backends.unsupported(b, config) is None), None)
        if chosen is None or chosen in results:
            continue
        with tempfile.TemporaryDirectory() as folder:
            file = trace if trace is not None and name == "auto" else Path(folder) / "trace.json"
            options = ["--backend", chosen, "--trace", str(file), "--steps", "4" if plan.dry else "50"]
            results[chosen] = _command(profile.main, [*options, "--warmup", "2" if plan.dry else "50", *_sizes(plan)])
    return results


def losses(plan: Plan) -> dict[str, Any]:
    """A whole run of the fastest backend: the losses of every evaluation, the test loss, and the entropy of val."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "log.jsonl"
        steps = "20" if plan.dry else "50000"
        train.main(["--quiet", "--num-steps", steps, "--log-json", str(file), *_sizes(plan)])
        events = [json.loads(line) for line in file.read_text().splitlines()]
    config = next(event for event in events if event["event"] == "config")
    test_loss = next(event["loss"] for event in events if event["event"] == "test")
    if not plan.dry:
        require_loss(config["chosen_backend"], config["num_steps"], test_loss)
    return {
        "backend": config["chosen_backend"],
        "num_steps": config["num_steps"],
        "floor": config["floor"],
        "test_loss": test_loss,
        "evaluations": [
            {key: event[key] for key in ("step", "train_loss", "val_loss")}
            for event in events
            if event["event"] == "eval"
        ],
    }


def arithmetic(plan: Plan) -> dict[str, Any]:
    """What bench.numerics finds: differences of whole runs from float64. It has nothing to do with the device."""
    config = Config(num_steps=5 if plan.dry else ARITHMETIC_STEPS)
    return {"num_steps": config.num_steps, "output": numerics.table(numerics.measure(config, load("embedded")))}


def _sizes(plan: Plan) -> list[str]:
    """The options that make a command's sizes the plan's."""
    config = plan.config()
    names = ("embedding_size", "hidden_size", "batch_size", "device")
    return [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(config, name)))]


def _command(main: Any, arguments: list[str]) -> dict[str, Any]:
    """A command's JSON, with what it printed as "output"."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        printed = Path(folder) / "output.txt"
        with printed.open("w") as stream, contextlib.redirect_stdout(stream):
            main([*arguments, "--json", str(file)])
        # The run's own facts stand in the recording.
        kept = {k: v for k, v in json.loads(file.read_text()).items() if k in ("results", "backend", "rows", "wall")}
        return {**kept, "output": printed.read_text()}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 1 where something was refused or failed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.record", description="Measure everything into one recording."
    )
    parser.add_argument("--full", action="store_true", help="sweep B, H, T, V and precision over all backends")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes: only whether everything runs")
    parser.add_argument("--groups", metavar="A,B", help=f"only some of {', '.join(GROUPS)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where (default: cuda where there is one)")
    parser.add_argument("--budget", type=float, metavar="S", help="begin no further case after this many seconds")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="keep the Chrome trace of the fastest backend")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the recording")
    arguments = parser.parse_args(argv)
    plan = Plan.here(full=arguments.full, dry=arguments.dry_run, device=arguments.device)
    groups = arguments.groups.split(",") if arguments.groups else usual(plan)
    if unknown := [group for group in groups if group not in GROUPS]:
        raise UserError(f"--groups: {unknown[0]!r} is unknown; choose some of {', '.join(GROUPS)}")
    if plan.dry and arguments.out is None:
        raise UserError("--dry-run needs --out FILE: its times mean nothing and stay out of bench/results")
    path = arguments.out or default_path(torch.device(plan.device))
    extras: dict[str, Callable[[], Any]] = {
        "profile": lambda: profiles(plan, arguments.trace),
        "compare": lambda: comparison(plan),
        "losses": lambda: losses(plan),
    }
    if plan.device == "cpu":  # it has nothing to do with the device
        extras["numerics"] = lambda: arithmetic(plan)
    recording = record(plan, groups, {} if arguments.groups else extras, path, Budget(arguments.budget))
    print(f"\n{tables.whole(recording)}\n\nrecorded in {path}")
    return 1 if recording.refused else 0


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))

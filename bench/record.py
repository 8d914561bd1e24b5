"""`python -m bench.record`: every case of the suite and the output of some commands, in one recording.

It writes bench/results/<device>/<date>.json (or --out FILE), of which `python -m bench.report` makes tables and plots.
Nothing else should run on the machine meanwhile.
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import numerics, tables
from bench.case import Case, Entry, Plan, Skipped, plain_timer, reason
from bench.processes import logged, require_loss
from bench.recording import Recording, default_path
from bench.suite import OPTIONS, cases, chosen
from mlp_fast import backends, compare, profile, train
from mlp_fast.cli import run_main
from mlp_fast.config import Config, flag
from mlp_fast.corpus.load import load
from mlp_fast.errors import UserError
from mlp_fast.measure.equivalence import BASELINE, NotEquivalent

COMPARED_STEPS = 500
ARITHMETIC_STEPS = 1000


def record(
    plan: Plan, groups: Sequence[str], extras: Sequence[Case], path: Path, budget: float | None = None
) -> Recording:
    """Runs cases and then extras, printing a line for each, and writes the recording after each.

    A case that fails, of a compiler or a device, is noted, and the next one runs.

    Args:
        groups: of cases, some of suite.GROUPS.
        extras: further results, as cases of the group "extra".
        path: of the recording.
        budget: seconds. No case begins after four fifths of it, no slow one after half; what is left out is noted as
            skipped. None: no limit.
    """
    start = time.perf_counter()
    recording = Recording.begin(torch.device(plan.device), dry=plan.dry)
    for case in [*sorted((c for group in groups for c in cases(group, plan)), key=lambda c: c.slow), *extras]:
        begun = time.perf_counter()
        share = 1 if case.group == "extra" else 0.5 if case.slow else 0.8
        if budget is not None and begun - start >= share * budget:
            recording.skipped.append((case.group, case.id, f"the budget of {budget:g} s was spent"))
            continue
        try:
            found = recording.measure(case, plain_timer)
            outcome = "done" if case.group == "extra" else f"{found['ms']['median']:.4f} ms per {found['per']}"
        except Exception as error:
            outcome = f"{'skipped' if isinstance(error, Skipped) else 'no number'}: {reason(error)}"
            if not isinstance(error, Skipped | NotEquivalent):
                traceback.print_exception(error)
        recording.save(path)
        print(f"{case.group:10} {case.id:36} {outcome}  [{time.perf_counter() - begun:.1f} s]", flush=True)
    recording.save(path)
    return recording


def comparison(plan: Plan) -> dict[str, Any]:
    """The results of `python -m mlp_fast.compare`, with the table that it prints."""
    config = plan.config(num_steps=20 if plan.dry else COMPARED_STEPS)
    # On CUDA Inductor takes minutes for each; compile-step stands for the others.
    left_out = ("compile-raw", "compile") if plan.device == "cuda" or plan.dry else ()
    here = [name for name in backends.available(config) if name not in left_out]
    return _command(compare.main, plan, "--backends", ",".join(here), "--num-steps", str(config.num_steps))


def profiles(plan: Plan, trace: Path | None) -> dict[str, Any]:
    """The results of `python -m mlp_fast.profile` for eager and for the backend that auto means here, by name."""
    results = {}
    counts = ("--steps", "4", "--warmup", "2") if plan.dry else ("--steps", "50", "--warmup", "50")
    for name in (BASELINE, "auto"):
        with tempfile.TemporaryDirectory() as folder:
            file = trace if trace is not None and name == "auto" else Path(folder) / "trace.json"
            found = _command(profile.main, plan, "--backend", name, "--trace", str(file), *counts)
        results[found["backend"]] = found
    return results


def _sizes(plan: Plan) -> list[str]:
    """A command's options for the plan's sizes and device."""
    config = plan.config()
    names = ("embedding_size", "hidden_size", "batch_size", "device")
    return [part for name in names for part in (flag(name), str(getattr(config, name)))]


def _command(main: Callable[[list[str]], Any], plan: Plan, *arguments: str) -> dict[str, Any]:
    """A command's results from its JSON, and what it printed as "output"."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file, contextlib.redirect_stdout(io.StringIO()) as printed:
        main([*arguments, *_sizes(plan), "--json", file.name])
        found = json.loads(Path(file.name).read_text())
    kept = ("results", "backend", "rows", "wall")
    return {**{key: found[key] for key in kept if key in found}, "output": printed.getvalue()}


def losses(plan: Plan) -> dict[str, Any]:
    """A whole run of the fastest backend: the losses of every evaluation, the test loss, and the entropy of val."""
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        steps = "20" if plan.dry else "50000"
        train.main(["--quiet", "--num-steps", steps, "--log-json", file.name, *_sizes(plan)])
        events = logged(Path(file.name))
    (config,), (test,) = events["config"], events["test"]
    if not plan.dry:
        require_loss(config["chosen_backend"], config["num_steps"], test["loss"])
    evaluations = events.get("eval", [])
    return {
        "backend": config["chosen_backend"],
        "num_steps": config["num_steps"],
        "floor": config["floor"],
        "test_loss": test["loss"],
        "evaluations": [{key: one[key] for key in ("step", "train_loss", "val_loss")} for one in evaluations],
    }


def arithmetic(plan: Plan) -> dict[str, Any]:
    """The table of bench.numerics: differences of whole runs from float64."""
    config = Config(num_steps=5 if plan.dry else ARITHMETIC_STEPS)
    return {"num_steps": config.num_steps, "output": numerics.table(config, load("embedded"))}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 1 where something was refused or failed."""
    parser = argparse.ArgumentParser("python -m bench.record", description="Measure everything into one recording.")
    for name, attributes in OPTIONS.items():
        parser.add_argument(name, **attributes)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where (default: cuda where there is one)")
    parser.add_argument("--budget", type=float, metavar="S", help="begin no further case after this many seconds")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="keep the Chrome trace of the fastest backend")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the recording")
    arguments = parser.parse_args(argv)
    plan = Plan.here(full=arguments.full, dry=arguments.dry_run, device=arguments.device)
    groups = chosen(arguments.groups, plan)
    if plan.dry and arguments.out is None:
        raise UserError("--dry-run needs --out FILE: its times mean nothing and stay out of bench/results")
    path = arguments.out or default_path(torch.device(plan.device))
    extras: dict[str, Callable[..., Entry]] = {
        "profile": lambda *_: profiles(plan, arguments.trace),
        "compare": lambda *_: comparison(plan),
        "losses": lambda *_: losses(plan),
    }
    if plan.device == "cpu":  # the same on every device
        extras["numerics"] = lambda *_: arithmetic(plan)
    further = [] if arguments.groups else [Case("extra", name, run) for name, run in extras.items()]
    recording = record(plan, groups, further, path, arguments.budget)
    print(f"\n{tables.whole(recording)}\n\nrecorded in {path}")
    return 1 if recording.refused else 0


if __name__ == "__main__":
    run_main(main)

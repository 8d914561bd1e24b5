"""Recordings: what was measured on one machine at one time, as a JSON file under bench/results/<device>/."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench import probes
from bench.case import Case, Entry, Skipped, Timer, reason
from mlp_fast import backends
from mlp_fast.errors import UserError
from mlp_fast.files import write_atomically
from mlp_fast.measure import machine

RESULTS = Path(__file__).parent / "results"
SCHEMA = 1


@dataclass
class Recording:
    """The results of one run of the suite, and the machine that they are of.

    Files keep the keys of the first recordings: what tables call a lower bound is floor_ms and x_floor, and what a case
    is compared with its rivals.
    """

    facts: dict[str, Any]  # machine.facts() of the device
    dry: bool = False  # of a dry run, whose times mean nothing: the report leaves it out
    probes: dict[str, Any] = field(default_factory=dict)  # of probes.measure_all()
    entries: list[Entry] = field(default_factory=list)  # of Case.entry()
    skipped: list[tuple[str, str, str]] = field(default_factory=list)  # group, id and reason of what cannot run here
    refused: list[tuple[str, str, str]] = field(default_factory=list)  # of what failed, or computed something else
    extra: dict[str, Any] = field(default_factory=dict)  # further results by name, those of EXTRA

    @classmethod
    def begin(cls, device: torch.device, *, dry: bool = False) -> "Recording":
        """An empty recording of this machine, its probes measured."""
        return cls(machine.facts(device), dry, probes.measure_all(device, quick=dry))

    def measure(self, case: Case, timer: Timer) -> Any:
        """Runs a case and keeps its entry, or in `extra` its result; why there is none is noted, and raised."""
        extra = case.group == "extra"
        try:
            found = case.run(timer, self.probes) if extra else case.entry(timer, self.probes)
        except Exception as error:
            noted = self.skipped if isinstance(error, Skipped) else self.refused
            noted.append((case.group, case.id, reason(error)))
            raise
        if extra:
            self.extra[case.id] = found
        else:
            self.entries.append(found)
        return found

    def group(self, name: str) -> list[Entry]:
        """The entries of a group, in the order in which they were made."""
        return [entry for entry in self.entries if entry["group"] == name]

    def entry(self, group: str, id: str) -> Entry | None:
        """The entry of that name, or None."""
        return next((entry for entry in self.group(group) if entry["id"] == id), None)

    def fastest(self) -> str:
        """The backend with the fastest step in float32; "" where none was timed."""
        fp32 = [entry for entry in self.group("step") if entry["precision"] == "fp32"]
        own = [entry for entry in fp32 if entry["backend"] in backends.REGISTRY]
        return min(own, key=lambda entry: entry["ms"]["median"])["backend"] if own else ""

    def save(self, path: Path) -> None:
        """Writes the file, and makes its folder; a process that is killed meanwhile leaves the previous file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {name: getattr(self, name) for name in ("dry", "probes", "entries", "skipped", "refused")}
        content = {"schema": SCHEMA, **self.facts, **kept, **self.extra}
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def default_path(device: torch.device) -> Path:
    """bench/results/<device>/<date and time>.json, for a recording begun now."""
    folder = machine.folder_name(machine.device_name(device))
    return RESULTS / folder / f"{datetime.now(timezone.utc):%Y-%m-%d-%H%M}.json"


EXTRA = ("compare", "profile", "losses", "numerics")
FACTS = ("device", "device_type", "driver", "cuda", "threads", "versions", "system", "commit", "date")


def load(path: Path) -> Recording:
    """Reads a recording; UserError where the file is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise UserError(f"{path}: a recording of schema {content['schema']}; this program reads {SCHEMA}")
        skipped, refused = ([(group, id, why) for group, id, why in content[key]] for key in ("skipped", "refused"))
        facts, extra = {key: content[key] for key in FACTS}, {key: content[key] for key in EXTRA if key in content}
        return Recording(facts, content["dry"], content["probes"], content["entries"], skipped, refused, extra)
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a recording ({type(error).__name__}: {error})") from None


def recorded(folder: Path = RESULTS) -> Iterator[list[Recording]]:
    """For every device, in the order of their names, its recordings but those of dry runs, the latest first."""
    for device in sorted(path for path in folder.glob("*") if path.is_dir()):
        real = [recording for recording in map(load, device.glob("*.json")) if not recording.dry]
        if real:
            yield sorted(real, key=lambda recording: recording.facts["date"], reverse=True)

"""What ./run installs: one exact version of every package for each Python, and all that the library asks for."""

import ast
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
# The wings of the package, each of which imports from those before it, from itself, and nothing from those after it.
WINGS = ("kernels", "base", "model", "data", "corpus", "ops", "backends", "measure", "run", "commands")
COMMANDS = ("train", "evaluate", "sample", "compare", "profile", "visualize", "__main__")
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


def pins(python: str) -> dict[str, Version]:
    """name -> version that a Linux machine with this Python gets."""
    found: dict[str, Version] = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
        if requirement.marker and not requirement.marker.evaluate(environment):
            continue
        name = canonicalize_name(requirement.name)
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", line
        assert name not in found, f"{name} twice for Python {python}"
        found[name] = Version(specifier.version)
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_every_python_gets_one_version_of_all_that_is_needed(python: str) -> None:
    found = pins(python)
    for line in re.findall(r'"([a-z][\w-]*>=[^"]*)"', (ROOT / "setup.py").read_text()):
        requirement = Requirement(line)
        assert found[canonicalize_name(requirement.name)] in requirement.specifier, line
    for name in pins("3.11"):
        assert name in found


def test_versions_without_wheels_for_a_python_are_not_pinned_for_it() -> None:
    """numpy has wheels for Python 3.14 from 2.3.2 on, contourpy from 1.3.3 on; from there on neither serves 3.10."""
    new, old = pins("3.14"), pins("3.10")
    assert new["numpy"] >= Version("2.3.2")
    assert new["contourpy"] >= Version("1.3.3")
    assert old["numpy"] < Version("2.3")
    assert old["contourpy"] < Version("1.3.3")


def wing(module: str) -> str:
    """mlp_fast.run.log -> run; modules of the package itself are commands, or the base of all."""
    top = module.split(".")[1] if "." in module else ""
    return top if top in WINGS else "commands" if top in COMMANDS or module.endswith("__main__") else "base"


def test_imports_run_one_way() -> None:
    """Those of functions too; kernels import nothing but kernels."""
    for folder in ("mlp_fast", "kernels", "data"):
        for path in (ROOT / folder).rglob("*.py"):
            module = ".".join(
                [*(["mlp_fast"] if folder != "mlp_fast" else []), *path.relative_to(ROOT).with_suffix("").parts]
            )
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    names = [f"{node.module}.{alias.name}" for alias in node.names]
                for name in names:
                    if name.split(".")[0] == "mlp_fast":
                        allowed = ("kernels",) if wing(module) == "kernels" else WINGS[: WINGS.index(wing(module)) + 1]
                        assert wing(name) in allowed, f"{module} imports {name}"

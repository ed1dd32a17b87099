"""Imports run one way, the harness knows no plugin, and the help needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = (
    ["errors"],
    ["api", "config"],
    ["hookspecs"],
    ["registry", "store"],
    ["plan"],
    ["densities", "training", "networks", "report"],
    ["job"],
    ["testing"],
    ["runner", "tracking", "leaderboard", "describe"],
    ["progress"],
    ["cli"],
)
"""From the ground up: a module may import its own layer's and lower ones, under its package."""

HIDDEN = {name for names in LAYERS for name in names} - {"training", "networks", "densities"}
PUBLIC = {"imlbench", "imlbench.training", "imlbench.networks", "imlbench.densities"}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_imports_of_the_harness_run_one_way():
    level = {name: index for index, names in enumerate(LAYERS) for name in names}
    package = ROOT / "imlbench"
    for path in package.rglob("*.py"):
        name = path.relative_to(package).parts[0].removesuffix(".py")
        if name in ("__init__", "__main__"):
            continue
        used = {
            module.split(".")[1] for module in imports_of(path) if module.startswith("imlbench.")
        }
        upwards = {other for other in used & set(level) if level[other] > level[name]}
        assert not upwards, f"{path} imports {upwards} above it"


def test_the_harness_never_imports_a_plugin():
    plugins = {path.name for path in (ROOT / "plugins").iterdir()}
    for path in (ROOT / "imlbench").rglob("*.py"):
        assert not {module.split(".")[0] for module in imports_of(path)} & plugins, path


def test_plugins_use_only_the_public_interface():
    for path in (ROOT / "plugins").rglob("*.py"):
        used = {module for module in imports_of(path) if module.split(".")[0] == "imlbench"}
        private = {m for m in used if not any(m == p or m.startswith(f"{p}.") for p in PUBLIC)}
        private |= {m for m in used if m.split(".")[1:2] and m.split(".")[1] in HIDDEN}
        assert not private, f"{path} uses {private}"


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["leaderboard", "--help"]])
def test_help_imports_neither_torch_nor_mlflow(arguments):
    code = (
        "import sys; from imlbench.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit: print(sorted({'torch', 'mlflow', 'pandas'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout.splitlines()[-1] == "[]", answer


def test_help_is_quick():
    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "imlbench", "--help"], check=True, capture_output=True
        )
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 0.5

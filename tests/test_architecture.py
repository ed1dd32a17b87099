"""Imports run one way, the harness knows no plugin, and the help needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import imlbench

ROOT = Path(__file__).parent.parent
LAYERS = (
    ["errors", "files", "processes"],
    ["api"],
    ["densities", "training", "networks"],
    ["plan"],
    ["records"],
    ["runner"],
    ["reading", "testing"],
    ["session"],
    ["cli"],
)
"""From the ground up: a module may import its own layer's and lower ones, under its package."""

PUBLIC = (
    "imlbench.api",
    "imlbench.densities",
    "imlbench.files",
    "imlbench.networks",
    "imlbench.training",
)
"""What plugins may use beside the names that ``imlbench`` itself exports."""


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
        private = {
            module
            for module in used - {"imlbench"}
            if not module.startswith(PUBLIC) and module.split(".")[1] not in imlbench.__all__
        }
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

"""Fixtures: a folder to run in, the command line, and the real data where they are."""

from __future__ import annotations

import os
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner, Result

from imlbench.plan.registry import Registry


def pytest_configure() -> None:
    """Give each of the processes that share the tests a processor of its own.

    Jobs take as many threads as they may use processors, and threads that outnumber these wait for
    each other.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker and hasattr(os, "sched_setaffinity"):
        processors = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {processors[int(worker.removeprefix("gw")) % len(processors)]})


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep every test away from the user's cache, tracking server and results."""
    monkeypatch.setenv("IMLBENCH_CACHE", str(tmp_path / "cache"))
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(1)  # tiny networks: threads would only wait for each other


@pytest.fixture
def imlbench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The command line, run in an empty folder; returns click's result."""
    from imlbench.cli import main

    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(main, list(arguments), catch_exceptions=False)

    return invoke


@pytest.fixture
def registry() -> Registry:
    return Registry()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data that ``$IMLBENCH_DATA`` names."""
    folder = os.environ.get("IMLBENCH_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs real data: set IMLBENCH_DATA to a folder that has them")
    return Path(folder).resolve()


class _Loaded(EntryPoint):
    """An entry point whose module is at hand."""

    def load(self):
        loaded = _MODULES[self.value]
        if isinstance(loaded, Exception):
            raise loaded
        return loaded


_MODULES: dict[str, ModuleType | Exception] = {}


@pytest.fixture
def entry_point():
    """Make an entry point from a module, or from the exception that importing it raises."""

    def make(name: str, module: ModuleType | Exception) -> EntryPoint:
        _MODULES[f"test_{name}"] = module
        return _Loaded(name, f"test_{name}", "imlbench")

    return make

"""What is installed, as far as it can be told without importing anything."""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.metadata import entry_points, version
from pathlib import Path

from imlbench.plan.identity import digest

GROUP = "imlbench"


def stamp() -> str:
    """Return what changes when a plugin is installed, removed, or edited."""
    found = entry_points(group=GROUP)
    plugins = [
        (entry.name, entry.value, entry.dist.name if entry.dist else "", _version(entry.dist))
        for entry in found
    ]
    tops = {entry.value.partition(":")[0].partition(".")[0] for entry in found} | {GROUP}
    files = sorted(facts for top in tops for facts in _files(top))
    return digest(version("imlbench"), sys.version, sorted(plugins), files)


def _version(dist: object) -> str:
    return str(getattr(dist, "version", ""))


def _files(top: str) -> list[tuple[str, int, int]]:
    """Return the source files of a top-level module: name, time of modification, and size."""
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return []
    if spec is None or spec.origin is None:
        return []
    origin = Path(spec.origin)
    paths = origin.parent.rglob("*.py") if origin.name == "__init__.py" else [origin]
    stats = [(str(path), os.stat(path)) for path in paths]
    return [(name, found.st_mtime_ns, found.st_size) for name, found in stats]

"""What is installed, as far as it can be told without importing anything."""

from __future__ import annotations

import importlib.util
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
    if spec is None:
        return []
    if spec.submodule_search_locations is None:
        paths = [Path(spec.origin or "")]
    else:  # a package, with or without __init__.py
        paths = [p for place in spec.submodule_search_locations for p in Path(place).rglob("*.py")]
    stats = [(str(path), path.stat()) for path in paths if path.is_file()]  # no dangling links
    return [(name, found.st_mtime_ns, found.st_size) for name, found in stats]

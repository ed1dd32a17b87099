"""``python -m speed.gpu``: looks for packages that are lacking before anything imports them."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator

from speed.gpu import ROOT


def lacking() -> Iterator[str]:
    """Yield the packages that are needed and not installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for requirement in (project["name"], *project["dependencies"], "pytest"):
        name = re.split(r"[^\w.-]", requirement)[0]
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name


def main() -> None:
    """Run the command, if it can be run."""
    names = ", ".join(lacking())
    if names:
        print(f"error: {names} not installed: see docs/gpu.md", file=sys.stderr)
        sys.exit(2)
    from speed.gpu.command import main as command

    command()


if __name__ == "__main__":
    main()

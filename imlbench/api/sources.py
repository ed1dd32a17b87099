"""Where datasets look for their files. Loads no torch."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from imlbench.errors import DataError


@dataclass(frozen=True)
class Sources:
    """Where datasets look for their files.

    Arguments:
        data_dir: The folder named on the command line, if any; it comes first.
        offline: Never touch the network.
    """

    data_dir: Path | None = None
    offline: bool = False

    @property
    def cache_dir(self) -> Path:
        """The user's cache folder, where downloads and decoded data go."""
        return Path(os.environ.get("IMLBENCH_CACHE") or platformdirs.user_cache_dir("imlbench"))

    @property
    def directories(self) -> tuple[Path, ...]:
        """The folders to look in, in order: ``--data-dir``, ``$IMLBENCH_DATA``, the cache."""
        environment = os.environ.get("IMLBENCH_DATA")
        named = (self.data_dir, Path(environment) if environment else None, self.cache_dir)
        return tuple(folder for folder in named if folder is not None)

    def find(self, relative: str) -> Path | None:
        """Return the first existing ``folder / relative``, or ``None``."""
        for path in (folder / relative for folder in self.directories):
            with contextlib.suppress(OSError):  # a folder that may not be searched
                if path.exists():
                    return path
        return None

    def missing(self, dataset: str, relative: str, remedy: str) -> DataError:
        """Return the error that says where ``relative`` was looked for, and what to do."""
        looked = ", ".join(str(folder) for folder in self.directories)
        return DataError(f"dataset {dataset}: {relative} not found; looked in {looked}. {remedy}")

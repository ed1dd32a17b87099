"""What a run says of itself while it goes on, for ``imlbench status``.

``sessions/<name>.plan.json`` is written once, ``<name>.now.json`` every few seconds; the process
holds ``<name>.lock`` as long as it lives.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from imlbench.files import is_held, lock, write_text
from imlbench.records.folder import Store
from imlbench.records.record import Fact

KEPT = 5
"""How many past runs are remembered."""


class Begun(Fact):
    """A run: which jobs it is for, by id, and what they are called."""

    host: str
    pid: int
    started: float
    jobs: dict[str, str]


class Now(Fact):
    """What was going on when it was written.

    Arguments:
        written: When; in seconds since 1970.
        running: What each job was doing, by its id.
        seconds_left: How long the rest would take; ``None`` if it could not be said.
    """

    written: float
    running: dict[str, str]
    seconds_left: float | None


@dataclass(frozen=True)
class Session:
    """A run as its files tell of it.

    Arguments:
        begun: What it is for.
        now: What was going on; ``None`` if nothing was said.
        is_alive: Whether the run goes on.
    """

    begun: Begun
    now: Now | None
    is_alive: bool


class Journal:
    """Writes what a run is doing; a disk that is full is no reason to stop it.

    Arguments:
        store: The results folder.
        jobs: What the jobs are called, by id.
        started: When the run began; what ended before is not of this run.
        interval: Least seconds between two entries.
    """

    def __init__(
        self, store: Store, jobs: Mapping[str, str], started: float, interval: float = 2.0
    ) -> None:
        self._interval, self._last = interval, -interval
        self._base = _folder(store) / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        self._lock: FileLock | None = None
        host, pid = platform.node(), os.getpid()
        begun = Begun(host=host, pid=pid, started=started, jobs=dict(jobs))
        with contextlib.suppress(OSError):
            held = lock(_with(self._base, "lock"))
            held.acquire(timeout=0)
            self._lock = held
            write_text(_with(self._base, "plan.json"), begun.model_dump_json() + "\n")
            _forget_old(store)

    def write(self, running: Mapping[str, str], seconds_left: float | None) -> None:
        """Note what is going on, if the last note is old enough."""
        if time.monotonic() - self._last < self._interval:
            return
        self._last = time.monotonic()
        now = Now(written=time.time(), running=dict(running), seconds_left=seconds_left)
        with contextlib.suppress(OSError):
            write_text(_with(self._base, "now.json"), now.model_dump_json() + "\n")

    def close(self) -> None:
        """Say that the run has ended."""
        if self._lock is not None:
            self._lock.release()


def read_last(store: Store) -> Session | None:
    """Return the run that goes on, or the last one; ``None`` if there is none that can be read."""
    found = [_read(base) for base in _bases(store)]
    sessions = [session for session in found if session is not None]
    return max(sessions, key=lambda s: (s.is_alive, s.begun.started), default=None)


def _read(base: Path) -> Session | None:
    try:
        begun = Begun.model_validate_json(_with(base, "plan.json").read_bytes())
    except (OSError, ValueError):
        return None
    now = None
    with contextlib.suppress(OSError, ValueError):
        now = Now.model_validate_json(_with(base, "now.json").read_bytes())
    return Session(begun, now, is_held(_with(base, "lock")))


def _folder(store: Store) -> Path:
    return store.root / "sessions"


def _with(base: Path, ending: str) -> Path:
    return base.with_name(f"{base.name}.{ending}")


def _bases(store: Store) -> list[Path]:
    """Return the runs that are remembered, the oldest first."""
    paths = sorted(_folder(store).glob("*.plan.json"))
    return [path.with_name(path.name.removesuffix(".plan.json")) for path in paths]


def _forget_old(store: Store) -> None:
    for base in _bases(store)[:-KEPT]:
        if not is_held(_with(base, "lock")):
            for ending in ("plan.json", "now.json", "lock"):
                _with(base, ending).unlink(missing_ok=True)

"""Taking results away: jobs, with all that belongs to them, and what no job needs any more."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from imlbench.errors import UserError
from imlbench.files import is_held
from imlbench.records.folder import JobFolder, Store
from imlbench.records.tables import superseded
from imlbench.records.tracking import Tracker

_STAGE = re.compile(r"(.+-[0-9a-f]{16})\.(json|safetensors|lock|fit)(\.damaged-\d+)?")
"""The files of a stage, and the folder of the checkpoints within its fit."""


@dataclass(frozen=True)
class Removed:
    """What was taken away.

    Arguments:
        jobs: Names of job folders.
        stages: How many shared stages.
        runs: How many MLflow runs.
        n_bytes: What their files held.
    """

    jobs: tuple[str, ...] = ()
    stages: int = 0
    runs: int = 0
    n_bytes: int = 0


def remove_jobs(store: Store, jobs: Sequence[str], tracker: Tracker) -> Removed:
    """Remove jobs: their folders, and their MLflow runs.

    Raises:
        UserError: A job is running, or MLflow cannot be written to; then nothing is removed.
    """
    locks = [_hold(store.folder(job)) for job in jobs]
    try:
        runs = tracker.remove(
            jobs
        )  # first: a folder without a run is logged again, nothing is lost
        n_bytes = sum(_delete(store.folder(job).path) for job in jobs)
    finally:
        for lock in locks:
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()
    return Removed(tuple(jobs), runs=runs, n_bytes=n_bytes)


def collect_garbage(store: Store, tracker: Tracker) -> Removed:
    """Remove what no job needs: stages, older code's results, MLflow runs without a folder.

    Raises:
        UserError: A job is running, or MLflow cannot be written to.
    """
    removed = remove_jobs(store, superseded(store.records()), tracker)
    left = {folder.path.name: folder.read() for folder in store}
    for name, record in left.items():
        if record is None or record.status is None:
            _hold(store.folder(name)).release()  # refuses while the job is running
    fits = [record.fit for record in left.values() if record and record.fit]
    needed = {name for fit in fits for name in fit.stages}
    is_complete = all(record is not None and record.fit for record in left.values())
    unneeded = [
        path
        for path in sorted(store.stages.glob("*"))
        if (found := _STAGE.fullmatch(path.name))
        and (found[1] not in needed or found[3])
        and (found[2] != "fit" or is_complete)  # a job that was cut short goes on from there
        and not is_held(store.stages / f"{found[1]}.lock")
    ]
    stages = sum(path.suffix == ".json" for path in unneeded)
    n_bytes = sum(_delete(path) for path in unneeded)
    runs = tracker.remove_orphans(list(left))
    return Removed(removed.jobs, stages, removed.runs + runs, removed.n_bytes + n_bytes)


def _hold(folder: JobFolder) -> FileLock:
    lock = folder.lock
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"job {folder.path.name}: must not be running; another imlbench is at it. "
            "Wait until it has ended, or stop it."
        ) from error
    return lock


def _delete(path: Path) -> int:
    """Delete a file or a folder; return how many bytes its files had."""
    if path.is_file():
        n_bytes = path.stat().st_size
        path.unlink()
        return n_bytes
    n_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    shutil.rmtree(path, ignore_errors=True)
    return n_bytes

"""What is known to be in the results folder's own MLflow database, to ask it only if need be."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter, ValidationError

from imlbench.files import write_text
from imlbench.plan.identity import digest
from imlbench.records.folder import JobFolder, Store

EXPERIMENT = "imlbench"
_PASSING = ("confirmed", "sha256")
_COUNTER = slice(24, 28)  # of SQLite's header: what every transaction changes


def experiment_name() -> str:
    """Return the name of the experiment: ``$MLFLOW_EXPERIMENT_NAME``, or ``imlbench``."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT


def unreachable(uri: str, store: Store, reason: str) -> str:
    """Return what to tell the user if MLflow cannot be written to."""
    return (
        f"MLflow at {without_password(uri)} cannot be written to "
        f"({without_password(reason).rstrip('.')}); "
        f"the results are safe in {store.runs} and the next run logs them."
    )


def without_password(text: str) -> str:
    """Return a text, such as a URI, without passwords in URIs.

    Example:
        >>> without_password("postgresql://me:secret@host/db")
        'postgresql://me:***@host/db'
    """
    return re.sub(r"(://[^:/@\s]*):[^/@\s]*@", r"\1:***@", text)


class Entry(NamedTuple):
    """What a job's record was when it was last looked at.

    Arguments:
        inode: Of the file.
        size: Its bytes.
        mtime_ns: When it was last written or found to be up to date.
        file: Hash of the file.
        content: Hash of what it says, but for when it was found to be up to date.
        has_tensors: Checkpoint and samples are logged.
    """

    inode: int
    size: int
    mtime_ns: int
    file: str
    content: str
    has_tensors: bool = False


_Jobs = dict[str, Entry]
_FORM = TypeAdapter(tuple[list[str], list[str], _Jobs])


def look_at(folder: JobFolder, before: Entry | None = None) -> Entry | None:
    """Return what a job's record is now; ``None`` if there is none, or the job has not ended.

    Arguments:
        folder: The job's folder.
        before: What it was when it was last looked at; a file that is the same is not read.
    """
    try:
        with open(f"{folder.path}/record.json", "rb") as file:
            status = os.fstat(file.fileno())
            seen = (status.st_ino, status.st_size, status.st_mtime_ns)
            if before is not None and seen == before[:3]:
                return before
            text = file.read()
    except OSError:
        return None
    code = hashlib.blake2b(text, digest_size=16).hexdigest()
    if before is not None and code == before.file:
        return before._replace(inode=seen[0], size=seen[1], mtime_ns=seen[2])
    try:
        said = json.loads(text)
        if said["status"] is None:
            return None
    except (ValueError, TypeError, KeyError):
        return None
    lasting = {name: value for name, value in said.items() if name not in _PASSING}
    return Entry(*seen, code, digest(lasting))


def state_of(database: Path, artifacts: Path) -> list[str]:
    """Return what changes when anybody writes to a database, or takes logged files away."""
    state: list[str] = []
    for path in (database, Path(f"{database}-wal"), Path(f"{database}-journal"), artifacts):
        try:
            found = path.stat()
        except OSError:
            state.append("")
        else:
            state.append(f"{found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns}")
    with contextlib.suppress(OSError), database.open("rb") as file:
        state.append(file.read(100)[_COUNTER].hex())
    return state


@dataclass
class Exported:
    """What the database in the folder holds, as ``exported.json`` tells.

    It says nothing once anybody else has changed the database, or the folder has moved.

    Arguments:
        store: The results folder.
        jobs: What is logged, by name of the job.
    """

    store: Store
    jobs: _Jobs = field(default_factory=dict)

    @classmethod
    def read(cls, store: Store) -> Exported:
        """Return what is known; nothing if the file is absent, damaged or not of this database."""
        found = cls(store)
        try:
            where, state, jobs = _FORM.validate_json(found._path.read_bytes())
        except (OSError, ValidationError):
            return found
        if where == found._where and state == found.state():
            found.jobs = jobs
        return found

    def write(self, state: list[str]) -> None:
        """Note what the database in this state holds; what cannot be noted is asked again."""
        content = _FORM.dump_json((self._where, state, self.jobs)).decode()
        with contextlib.suppress(OSError):
            write_text(self._path, content)

    def state(self) -> list[str]:
        """Return the state of the database and of the logged files."""
        return state_of(self.store.root / "mlflow.db", self.store.root / "mlartifacts")

    def lacks(self, folder: JobFolder, *, with_tensors: bool) -> bool:
        """Whether a job has ended and is not known to be logged as it now is."""
        before = self.jobs.get(folder.path.name)
        now = look_at(folder, before)
        if now is None:
            return False
        if before is not None and now.inode == before.inode and now.file == before.file:
            return with_tensors and not before.has_tensors
        return folder.read() is not None

    @property
    def _path(self) -> Path:
        return self.store.root / "exported.json"

    @property
    def _where(self) -> list[str]:
        return [str(self.store.root.resolve()), self.store.name, experiment_name()]

"""The results folder: the durable record of every job, each file written atomically."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue, TypeAdapter, ValidationError

from imlbench.errors import UserError
from imlbench.plan.identity import digest
from imlbench.records.record import SCHEMA, Point, Record

if TYPE_CHECKING:
    from torch import Tensor

_CURVES = TypeAdapter(list[Point])


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary path beside ``path``, then rename: all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-", suffix=path.suffix)
    os.close(handle)
    try:
        write(Path(name))
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as safetensors, atomically."""
    from safetensors.torch import save_file

    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(content, temporary))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read what :func:`write_tensors` wrote."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = load_file(path)
    return tensors


class JobFolder:
    """One job's folder, ``results/runs/<id>/``.

    ====================================  ==================================================
    ``record.json``                       everything that is known of it; see :class:`Record`
    ``checkpoint.safetensors``            the model's state
    ``curves.json``                       learning curves
    ``samples/<draw>.safetensors``        ``samples`` of shape (n_draws, n_samples, ...)
    ``scores/<draw>/<label>.safetensors``  ``per_example`` and perhaps ``groups``, both (N,)
    ``artifacts/<draw>/<label>/``         figures, audio, tables
    ``log.txt``                           what the job printed, with the traceback of a failure
    ====================================  ==================================================
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def lock_path(self) -> Path:
        """The file that is locked while a process works on the job."""
        return self.path.parent.parent / "locks" / f"{self.path.name}.lock"

    @property
    def checkpoint(self) -> Path:
        """The file of the model's state."""
        return self.path / "checkpoint.safetensors"

    @property
    def log(self) -> Path:
        """The file of everything that the job printed."""
        return self.path / "log.txt"

    def samples(self, draw: str) -> Path:
        """Return the file of samples that were drawn in one way."""
        return self.path / "samples" / f"{draw}.safetensors"

    def per_example(self, label: str, draw: str) -> Path:
        """Return the file of a metric's per-example values."""
        return self.path / "scores" / (draw or "fit") / f"{slug(label)}.safetensors"

    def artifact(self, label: str, draw: str) -> Path:
        """Return the folder of an artifact."""
        return self.path / "artifacts" / draw / slug(label)

    def read(self) -> Record | None:
        """Return the job's record; ``None`` if there is none, or none that can be read."""
        try:
            with (self.path / "record.json").open("rb") as file:
                record = Record.model_validate_json(file.read())
                touched = os.fstat(file.fileno()).st_mtime
        except (OSError, ValidationError):
            return None
        return record if touched <= record.confirmed else record.confirmed_at(touched)

    def confirm(self) -> None:
        """Note that the job's results are what today's code would make: its record's time says so.

        Nothing is written, as another process may be at work on the job.
        """
        os.utime(self.path / "record.json")

    def write(self, record: Record) -> Record:
        """Write the job's record, and return it."""
        write_text(self.path / "record.json", record.model_dump_json(indent=1) + "\n")
        return record

    def read_curves(self) -> list[Point]:
        """Return the learning curves; empty if there are none that can be read."""
        try:
            return _CURVES.validate_json((self.path / "curves.json").read_bytes())
        except (OSError, ValidationError):
            return []

    def write_curves(self, curves: Sequence[Point]) -> None:
        """Write the learning curves."""
        content = _CURVES.dump_json(list(curves))
        write_atomically(self.path / "curves.json", lambda path: path.write_bytes(content))

    def remove_unfinished(self) -> None:
        """Remove what a process that was stopped had begun to write."""
        for path in self.path.rglob(".writing-*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def clear(self) -> None:
        """Remove everything that the job has written."""
        shutil.rmtree(self.path, ignore_errors=True)


def slug(label: str) -> str:
    """Return a label as a name of a file; what is not plain is told apart by a hash.

    Example:
        >>> slug("kde"), slug("kde[h=0.1]")
        ('kde', 'kde-h-0.1-f3c3b350')
    """
    plain = re.sub(r"[^A-Za-z0-9._]+", "-", label).strip("-.")[:60]
    return plain if plain == label else f"{plain}-{digest(label)[:8]}"


class Store:
    """The results folder.

    ==================  ======================================================================
    ``store.json``      the form of the folder, and a name of its own
    ``runs/``           a folder for each job
    ``stages/``         fitted stages that jobs share
    ``cache/``          what metrics computed from the data alone
    ``mlflow.db``       MLflow's database, unless a server is used; ``mlartifacts/`` beside it
    ==================  ======================================================================

    Arguments:
        root: Where it is.

    Raises:
        UserError: It holds results of another form.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._refuse_other_forms()

    def _refuse_other_forms(self) -> None:
        where = f"--results: {self.root}"
        remedy = "Choose another folder with --results, or move this one away."
        form = self._marker().get("schema_version")
        if form is None and next(self.runs.glob("*/config.json"), None) is not None:
            raise UserError(
                f"{where} must hold results of the form {SCHEMA}; got those of a version of "
                f"imlbench before records. {remedy}"
            )
        if form not in (None, SCHEMA):
            raise UserError(
                f"{where} must hold results of the form {SCHEMA}; got form {form}, of another "
                f"version of imlbench. {remedy}"
            )

    def prepare(self) -> None:
        """Make the folder, if need be.

        Raises:
            UserError: It cannot be written to.
        """
        try:
            self.runs.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.runs):
                pass
            self._mark()
        except OSError as error:
            raise UserError(
                f"--results: {self.root} must be a folder that can be written to; "
                f"got '{error.strerror}'. Choose another with --results."
            ) from error

    def _marker(self) -> dict[str, JsonValue]:
        try:
            marker: dict[str, JsonValue] = json.loads(
                (self.root / "store.json").read_text(encoding="utf-8")
            )
        except (OSError, ValueError):
            return {}
        return marker if isinstance(marker, dict) else {}

    def _mark(self) -> None:
        """Give the folder a name of its own; one that was moved keeps it, a copy gets another."""
        marker = self._marker()
        inode = self.root.stat().st_ino
        if marker.get("inode") != inode or not marker.get("name"):
            new = {"schema_version": SCHEMA, "name": uuid.uuid4().hex, "inode": inode}
            write_text(self.root / "store.json", json.dumps(new, indent=1) + "\n")

    def claim(self) -> None:
        """Make sure that this is a results folder, and that its name is its own.

        Raises:
            UserError: It is none.
        """
        if not self._marker():
            raise UserError(
                f"--results: {self.root} must be a results folder; it has no store.json. "
                "Name another with --results."
            )
        self._mark()

    @property
    def name(self) -> str:
        """What tells this folder from others that are logged to the same server."""
        return str(self._marker().get("name", ""))

    @property
    def runs(self) -> Path:
        """Where the job folders are."""
        return self.root / "runs"

    @property
    def stages(self) -> Path:
        """Where fitted stages are shared between jobs."""
        return self.root / "stages"

    @property
    def cache(self) -> Path:
        """Where metrics keep what they computed from the data alone."""
        return self.root / "cache"

    def folder(self, job_id: str) -> JobFolder:
        """Return a job's folder, whether it exists or not."""
        return JobFolder(self.runs / job_id)

    def __iter__(self) -> Iterator[JobFolder]:
        """Iterate over the folders of all jobs, by name."""
        try:
            names = sorted(entry.name for entry in os.scandir(self.runs) if entry.is_dir())
        except OSError:
            return
        yield from (JobFolder(self.runs / name) for name in names)

    def records(self) -> list[Record]:
        """Return the records of all jobs that ended, by name of their folders."""
        found = (folder.read() for folder in self)
        return [record for record in found if record is not None and record.status is not None]

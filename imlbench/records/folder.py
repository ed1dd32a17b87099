"""The results folder: the durable record of every job, each file written atomically."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from pydantic import JsonValue, TypeAdapter

from imlbench.errors import UserError
from imlbench.files import (
    File,
    describe,
    is_intact,
    lock,
    seal,
    set_aside,
    unseal,
    write_tensors,
    write_text,
)
from imlbench.plan.identity import digest
from imlbench.records.record import SCHEMA, Fit, Point, Record, Status

if TYPE_CHECKING:
    from torch import Tensor

_POINTS = TypeAdapter(list[Point])
_RECORD, _CHECKPOINT, _CURVES = "record.json", "checkpoint.safetensors", "curves.json"


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

    def _at(self, name: str) -> str:
        """Return where a file is, as a text: a rerun looks at tens of thousands."""
        return f"{self.path}/{name}"

    @property
    def lock(self) -> FileLock:
        """The lock that a process holds while it works on the job; a new object every time."""
        return lock(self.path.parent.parent / "locks" / f"{self.path.name}.lock")

    @property
    def checkpoint(self) -> Path:
        """The file of the model's state."""
        return self.path / _CHECKPOINT

    @property
    def log(self) -> Path:
        """The file of everything that the job printed."""
        return self.path / "log.txt"

    def samples(self, draw: str) -> Path:
        """Return the file of samples that were drawn in one way."""
        return self.path / _samples(draw)

    def per_example(self, label: str, draw: str) -> Path:
        """Return the file of a metric's per-example values."""
        return self.path / _per_example(label, draw)

    def artifact(self, label: str, draw: str) -> Path:
        """Return the folder of an artifact."""
        return self.path / _artifact(label, draw)

    def read(self) -> Record | None:
        """Return the job's record; ``None`` if there is none, or none that can be read."""
        try:
            with open(self._at(_RECORD), "rb") as file:
                record = parse_record(file.read())
                touched = os.fstat(file.fileno()).st_mtime
        except (OSError, ValueError):
            return None
        is_confirmed = touched.is_integer() and touched > record.confirmed
        return record.confirmed_at(touched) if is_confirmed else record

    @property
    def record_path(self) -> Path:
        """The file of the record."""
        return self.path / _RECORD

    @property
    def is_damaged(self) -> bool:
        """Whether there is, or was, a record that cannot be read."""
        if self.record_path.exists():
            return self.read() is None
        return self.checkpoint.exists()

    def confirm(self) -> None:
        """Note that the job's results are what today's code would make: its record's time says so.

        Nothing is written, as another process may be at work on the job. A whole second tells this
        time from that of a copy, which says nothing of the code.
        """
        with contextlib.suppress(OSError):  # of a folder that may not be written to
            os.utime(self._at(_RECORD), (math.ceil(time.time()),) * 2)

    def write(self, record: Record) -> Record:
        """Write the job's record, and return it."""
        write_text(self.record_path, seal(record.model_dump_json(indent=1)) + "\n")
        return record

    def write_fit(
        self, tensors: Mapping[str, Tensor], curves: Sequence[Point]
    ) -> tuple[File, File]:
        """Write the model's state, which holds a copy of the learning curves, and the curves."""
        text = _POINTS.dump_json(list(curves)).decode()
        write_tensors(self.checkpoint, tensors, {"curves": text})
        write_text(self._curves, text)
        return describe(self.checkpoint), describe(self._curves)

    @property
    def _curves(self) -> Path:
        return self.path / _CURVES

    def read_curves(self) -> list[Point]:
        """Return the learning curves; empty if there are none that can be read."""
        try:
            return _POINTS.validate_json(self._curves.read_bytes())
        except (OSError, ValueError):
            return []

    def files(self, record: Record) -> Iterator[tuple[Path, File]]:
        """Yield every file that a record speaks of."""
        return ((self.path / name, known) for name, known in _files(record))

    def damaged(self, record: Record, *, thoroughly: bool = False) -> list[Path]:
        """Return the files that are missing, or not as the record says; see :func:`is_intact`."""
        return [
            self.path / name
            for name, known in _files(record)
            if not is_intact(self._at(name), known, thoroughly=thoroughly)
        ]

    def mend(self, record: Record) -> Record:
        """Set aside what is damaged, and return the record without what it held, written."""
        damaged = set(self.damaged(record, thoroughly=True))
        if not damaged:
            return record
        for path in damaged:
            if path.exists():
                set_aside(path)
        if self.checkpoint in damaged:
            return self.write(record.without_fit())
        if record.fit is not None and self._curves in damaged:
            record = record.model_copy(update={"fit": self._with_curves(record.fit)})
        for draw in record.draws:
            if self.samples(draw) in damaged:
                record = record.without_draw(draw)
        scores = [
            score
            for score in record.scores
            if self.per_example(score.label, score.draw) not in damaged
        ]
        artifacts = [
            shown
            for shown in record.artifacts
            if damaged.isdisjoint(self.artifact(shown.label, shown.draw) / n for n in shown.files)
        ]
        kept = {"scores": tuple(scores), "artifacts": tuple(artifacts)}
        return self.write(record.model_copy(update=kept))

    def _with_curves(self, fit: Fit) -> Fit:
        """Write the learning curves again, from the copy beside the model's state."""
        from safetensors import safe_open

        with safe_open(self.checkpoint, "pt") as file:
            write_text(self._curves, file.metadata()["curves"])
        return fit.model_copy(update={"curves": describe(self._curves)})

    def load(self, path: Path, known: File) -> dict[str, Tensor]:
        """Return the tensors of a file of this folder.

        Raises:
            UserError: Its content is not what was written.
        """
        from safetensors.torch import load

        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read: {error.strerror}. Run the job again."
            ) from error
        if hashlib.sha256(content).hexdigest() != known.sha256:
            raise UserError(f"{path}: is damaged: its SHA-256 is another. Run it again.")
        tensors: dict[str, Tensor] = load(content)
        return tensors

    def end(self, status: Status, reason: str = "") -> Record | None:
        """Record how the job ended; ``None`` if there is no record."""
        record = self.read()
        if record is None:
            return None
        ended = {"status": status, "reason": reason, "ended": record.ended or time.time()}
        return self.write(record.model_copy(update=ended))

    def end_unless_held(self, status: Status, reason: str, held: FileLock | None = None) -> None:
        """Record how a job ended that could not say it, unless another process is at it by now.

        Arguments:
            status: How it ended.
            reason: Why.
            held: The job's lock, if the caller holds it.
        """
        with contextlib.suppress(Timeout, OSError), (held or self.lock).acquire(timeout=1):
            self.end(status, reason)

    def remove_unfinished(self) -> None:
        """Remove what a process that was stopped had begun to write."""
        for path in self.path.rglob(".writing-*"):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()

    def clear(self) -> None:
        """Remove everything that the job has written, but for its log."""
        for path in self.path.iterdir() if self.path.is_dir() else ():
            if path != self.log:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def _samples(draw: str) -> str:
    return f"samples/{draw}.safetensors"


def _per_example(label: str, draw: str) -> str:
    return f"scores/{draw or 'fit'}/{slug(label)}.safetensors"


def _artifact(label: str, draw: str) -> str:
    return f"artifacts/{draw}/{slug(label)}"


def _files(record: Record) -> Iterator[tuple[str, File]]:
    """Yield every file that a record speaks of, by its name in the job's folder."""
    if record.fit is not None:
        yield _CHECKPOINT, record.fit.checkpoint
        yield _CURVES, record.fit.curves
    for draw, drawn in record.draws.items():
        yield _samples(draw), drawn.file
    for score in record.scores:
        if score.file is not None:
            yield _per_example(score.label, score.draw), score.file
    for shown in record.artifacts:
        for name, file in shown.files.items():
            yield f"{_artifact(shown.label, shown.draw)}/{name}", file


def parse_record(content: bytes) -> Record:
    """Return the record that a file ``record.json`` holds.

    Raises:
        ValueError: It is damaged, or none.
    """
    return Record.model_validate_json(unseal(content.rstrip(b"\n")))


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
        if not self._marker() and (self.root / "store.json").exists():
            set_aside(self.root / "store.json")
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

    @cached_property
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

    def damaged(self) -> list[str]:
        """Return the names of job folders whose record cannot be read."""
        return [folder.path.name for folder in self if folder.is_damaged]

    def records(self) -> list[Record]:
        """Return the records of all jobs that ended, by name of their folders."""
        found = (folder.read() for folder in self)
        return [record for record in found if record is not None and record.status is not None]

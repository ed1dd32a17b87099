"""The results folder: the durable record of every job, each file written atomically."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imlbench.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class Status(StrEnum):
    """How a job ended. Only ``done`` is reused by the next run."""

    DONE = "done"
    FAILED = "failed"
    TIMEOUT = "timeout"
    OUT_OF_MEMORY = "out-of-memory"
    DIVERGED = "diverged"
    INTERRUPTED = "interrupted"


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


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    text = json.dumps(content, indent=2) + "\n"
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

    ============================  =========================================================
    ``config.json``               the job
    ``checkpoint.safetensors``    the model's state
    ``fit.json``                  seconds, memory, environment, learning curves; fit is complete
    ``samples.safetensors``       ``samples`` of shape (n_draws, n_samples, …)
    ``metrics.json``              scores; ``scores/<metric>.safetensors`` per example
    ``figures/``                  pictures
    ``log.txt``                   everything the job printed, with the traceback of a failure
    ``status.json``               how it ended
    ``tracking.json``             which MLflow run holds it
    ============================  =========================================================
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def lock_path(self) -> Path:
        """The file that is locked while a process works on the job."""
        return self.path.parent.parent / "locks" / f"{self.path.name}.lock"

    def read(self, name: str) -> dict[str, Any]:
        """Return the content of a JSON file; empty if there is none."""
        try:
            content: dict[str, Any] = json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return content

    def write(self, name: str, content: Any) -> None:
        """Write a JSON file."""
        write_json(self.path / name, content)

    @property
    def status(self) -> Status | None:
        """How the job ended; ``None`` if it has not."""
        status = self.read("status.json").get("status")
        return Status(status) if status else None

    def end(self, status: Status, reason: str = "") -> None:
        """Record how the job ended."""
        self.write("status.json", {"status": status, "reason": reason})

    def scores(self) -> dict[str, dict[str, Any]]:
        """Return the metrics that were computed, by name."""
        return dict(self.read("metrics.json").get("scores", {}))

    def remove_unfinished(self) -> None:
        """Remove what a process that was stopped had begun to write."""
        for path in self.path.rglob(".writing-*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def clear(self) -> None:
        """Remove everything that the job has written."""
        shutil.rmtree(self.path, ignore_errors=True)


class Store:
    """The results folder.

    Arguments:
        root: Where it is.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def prepare(self) -> None:
        """Make the folder, if need be.

        Raises:
            UserError: It cannot be written to.
        """
        try:
            self.runs.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.runs):
                pass
        except OSError as error:
            raise UserError(
                f"--results: {self.root} must be a folder that can be written to; "
                f"got '{error.strerror}'. Choose another with --results."
            ) from error

    @property
    def runs(self) -> Path:
        """Where the job folders are."""
        return self.root / "runs"

    @property
    def stages(self) -> Path:
        """Where fitted stages are shared between jobs."""
        return self.root / "stages"

    def folder(self, job_id: str) -> JobFolder:
        """Return a job's folder, whether it exists or not."""
        return JobFolder(self.runs / job_id)

    def __iter__(self) -> Iterator[JobFolder]:
        """Iterate over the folders of all jobs that ended, by name."""
        for path in sorted(self.runs.glob("*")):
            if (path / "status.json").is_file():
                yield JobFolder(path)

"""The Slurm runner: what is started together becomes one job array, a task for each job.

A task holds a local runner of one slot, so that a job is supervised there as it is here. All that
passes between it and this process are files in a folder that both see.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from imlbench.errors import UserError, last_line, unknown
from imlbench.processes import sharing_python_path
from imlbench.records.record import Status
from imlbench.runner.contract import ASSIGNMENT, EVENT, Assignment, End, Ended, Event, Lost, Runner
from imlbench.runner.local import LocalRunner

Make = Callable[[Sequence[str], int], Runner]
"""Makes a runner from its devices and its number of slots; importable where the jobs run."""

_TIME_IS_UP = "stopped by Slurm's time limit"
_UNLIMITED = 1_000_000
_ARRAY = 1000  # tasks, as Slurm allows 1001 by default
_ASKS = 30.0  # seconds between two questions to Slurm
_LAG = 15.0  # seconds until a file that a node has written is seen on another
_PATIENCE = 15.0  # seconds until a task that was asked to end is ended


class SlurmRunner:
    """Carries out jobs by Slurm.

    Arguments:
        folder: Where to exchange files with the tasks: on a file system that all nodes see, as the
            results folder has to be.
        parameters: What to ask Slurm for, by submitit's names: ``timeout_min`` (minutes),
            ``gpus_per_node``, ``cpus_per_task``, ``mem_gb`` (GiB), ``slurm_partition``, ...
        cluster: ``"slurm"``, or ``"local"`` for processes on this machine.
        make: Makes the runner within a task.

    Raises:
        UserError: submitit is not installed, there is no Slurm, or a parameter is none of its.
    """

    def __init__(
        self,
        folder: Path,
        parameters: Mapping[str, str],
        cluster: str = "slurm",
        *,
        make: Make = LocalRunner,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(dir=folder.resolve(), prefix="run-"))
        try:
            self._executor = _make_executor(self._folder / "submitit", parameters, cluster)
        except UserError:
            shutil.rmtree(self._folder)
            raise
        self._call = _Call(make)
        self._interval, self._lag = (0.2, 0.0) if cluster == "local" else (_ASKS, _LAG)
        self._asked = time.monotonic()
        self._waiting: list[Assignment] = []
        self._tasks: dict[str, _Task] = {}
        self._ended: list[_Task] = []
        self._news: list[tuple[str, Event]] = []

    def n_free(self) -> int:
        return _UNLIMITED

    def start(self, assignment: Assignment) -> None:
        self._waiting.append(assignment)

    def wait(self, seconds: float) -> Sequence[tuple[str, Event]]:
        while self._waiting:
            batch, self._waiting = self._waiting[:_ARRAY], self._waiting[_ARRAY:]
            self._submit(batch)
        end = time.monotonic() + seconds
        while True:
            self._look()
            patience = end - time.monotonic()
            if self._news or patience <= 0:
                news, self._news = self._news, []
                return news
            time.sleep(min(patience, 0.1 + len(self._tasks) / 1000))

    def stop(self, job: str) -> None:
        if job in self._tasks:
            self._tasks[job].stop()
        for assignment in [each for each in self._waiting if each.job.id == job]:
            self._waiting.remove(assignment)
            self._news.append((job, _end(assignment, Status.INTERRUPTED, "stopped by the user")))

    def close(self) -> None:
        self._waiting = []
        for task in self._tasks.values():
            task.stop()
        while self._tasks:
            self._look()
            time.sleep(0.1)
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end and not all(t.submitted.done() for t in self._ended):
            time.sleep(0.1)
        if not any(task.is_lost for task in self._ended):  # else their logs are wanted
            shutil.rmtree(self._folder, ignore_errors=True)

    def _submit(self, batch: Sequence[Assignment]) -> None:
        folders = [self._folder / f"{len(self._ended)}-{each.job.id}" for each in batch]
        for folder, assignment in zip(folders, batch, strict=True):
            folder.mkdir()
            (folder / "assignment.json").write_bytes(ASSIGNMENT.dump_json(assignment))
        try:
            with sharing_python_path():
                submitted = self._executor.map_array(self._call, folders)
        except Exception as error:  # of submitit, or of what it calls
            raise UserError(
                f"--executor slurm: the jobs must be accepted; got '{last_line(str(error))}'. "
                "Change what is asked for with --slurm."
            ) from error
        for assignment, folder, task in zip(batch, folders, submitted, strict=True):
            self._tasks[assignment.job.id] = _Task(assignment, folder, task, self._lag)

    def _look(self) -> None:
        """Take in what the tasks have written, and what Slurm says of those that are silent."""
        is_due = time.monotonic() - self._asked > self._interval
        for number, (job, task) in enumerate(list(self._tasks.items())):
            if is_due and task.submitted.done(force_check=number == 0):  # the answer is for all
                task.is_over()
            for event in task.look():
                self._news.append((job, event))
                if isinstance(event, End):
                    self._ended.append(self._tasks.pop(job))
        if is_due:
            self._asked = time.monotonic()


@dataclass
class _Task:
    """A task of Slurm's, as it is seen from here.

    Arguments:
        assignment: What it has to do.
        folder: Where files are exchanged with it.
        submitted: What submitit calls a job.
        lag: Seconds until what it has written is seen.
    """

    assignment: Assignment
    folder: Path
    submitted: Any
    lag: float
    n_read: int = 0
    has_begun: bool = False
    is_lost: bool = False
    over_since: float | None = None
    stopped_at: float | None = None

    def look(self) -> Iterator[Event]:
        """Yield what has happened; after an end, nothing."""
        for event in self._read():
            yield event
            if isinstance(event, End):
                return
        now = time.monotonic()
        if self.stopped_at is not None:
            if not self.has_begun or self.over_since or now - self.stopped_at > _PATIENCE:
                self.submitted.cancel(check=False)
                yield _end(self.assignment, Status.INTERRUPTED, "stopped by the user")
        elif self.over_since is not None and now - self.over_since >= self.lag:
            if self.submitted.done(force_check=True):
                yield self._verdict()
            self.over_since = None  # Slurm has started it again

    def is_over(self) -> None:
        """Note that Slurm says so."""
        self.over_since = self.over_since or time.monotonic()

    def stop(self) -> None:
        """Ask it to end."""
        if self.stopped_at is None:
            self.stopped_at = time.monotonic()
            (self.folder / "stop").touch()

    def _read(self) -> Iterator[Event]:
        """Yield the events of the lines that are complete; what is none is left out."""
        try:
            with (self.folder / "events.jsonl").open("rb") as file:
                file.seek(self.n_read)
                content = file.read()
        except FileNotFoundError:
            return
        self.has_begun = True
        complete = content[: content.rfind(b"\n") + 1]
        self.n_read += len(complete)
        for line in complete.splitlines():
            with contextlib.suppress(ValidationError):
                yield EVENT.validate_json(line)

    def _verdict(self) -> End:
        """Return the end of a task that has not said it itself."""
        state = str(self.submitted.state).upper()
        if state.startswith(("TIMEOUT", "DEADLINE")):
            return _end(self.assignment, Status.TIMEOUT, _TIME_IS_UP)
        if state.startswith("OUT_OF_ME"):
            return _end(self.assignment, Status.OUT_OF_MEMORY, "stopped by Slurm's memory limit")
        self.is_lost = True
        self.submitted.cancel(check=False)  # Slurm may want to start it again, too
        said = last_line(self.submitted.stderr() or "")
        name = f"Slurm's job {self.submitted.job_id}"
        return Lost(reason=f"{name} is gone ({state.lower()}){said and ': '}{said}")


class _Call:
    """What a task does: the assignment in a folder.

    Arguments:
        make: Makes the runner.
    """

    def __init__(self, make: Make) -> None:
        self._make = make

    def __call__(self, folder: Path) -> None:
        assignment = ASSIGNMENT.validate_json((folder / "assignment.json").read_bytes())
        _tell(folder, None)
        has_gpu = bool(os.environ.get("CUDA_VISIBLE_DEVICES"))
        runner = self._make(["cuda:0" if has_gpu else "cpu"], 1)
        try:
            self._carry_out(runner, folder, assignment)
        finally:
            runner.close()

    def checkpoint(self, folder: Path) -> Any:
        """Return what is to be submitted when Slurm takes the node away: fits go on."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, folder)

    def _carry_out(self, runner: Runner, folder: Path, assignment: Assignment) -> None:
        from submitit.core.utils import UncompletedJobError

        time_is_up = False
        runner.start(assignment)
        while True:
            try:
                if time_is_up or (folder / "stop").exists():
                    runner.stop(assignment.job.id)
                for _, event in runner.wait(1.0):
                    if isinstance(event, End) and time_is_up:
                        event = _end(assignment, Status.TIMEOUT, _TIME_IS_UP)
                    _tell(folder, event)
                    if isinstance(event, End):
                        return
            except UncompletedJobError:  # raised by the handler of the signal that says so
                time_is_up = True


def _tell(folder: Path, event: Event | None) -> None:
    """Write an event down, or begin a new line; closed each time, as then others see it."""
    with (folder / "events.jsonl").open("ab") as file:
        file.write((EVENT.dump_json(event) if event else b"") + b"\n")


def _end(assignment: Assignment, status: Status, reason: str) -> Ended:
    """Return how a job ended that could not say it, recorded."""
    assignment.folder.end_unless_held(status, reason)
    return Ended(status=status, reason=reason)


def import_submitit() -> Any:
    """Return the package submitit.

    Raises:
        UserError: It is not installed.
    """
    try:
        import submitit
    except ImportError as error:
        raise UserError(
            "--executor slurm: needs the package submitit; "
            "install it with: pip install 'imlbench[slurm]'"
        ) from error
    return submitit


def _make_executor(folder: Path, parameters: Mapping[str, str], cluster: str) -> Any:
    """Return submitit's executor.

    Raises:
        UserError: There is none, or it does not know a parameter.
    """
    submitit = import_submitit()
    from submitit.slurm.slurm import SlurmExecutor

    types = submitit.AutoExecutor._typed_parameters()
    own = {f"slurm_{name}" for name in SlurmExecutor._valid_parameters()}
    known = {*types, *own, "slurm_max_num_timeout"} - {"nodes", "tasks_per_node", "slurm_nodes"}
    for name in parameters:
        if name not in known:
            raise UserError(f"--slurm: {unknown('parameter', name, known)}")
    given = {name: _convert(name, text, types) for name, text in parameters.items()}
    # Time that is up is up, unless the user allows more: preemption is another matter.
    n_timeouts = given.pop("slurm_max_num_timeout", 0)
    limits = {f"{each}_max_num_timeout": n_timeouts for each in ("slurm", "local")}
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster, **limits)
        executor.update_parameters(**{"name": "imlbench", **given})
    except RuntimeError as error:
        raise UserError(
            f"--executor slurm: Slurm must be on this machine; got '{last_line(str(error))}'. "
            "Start from a node on which sbatch and srun are."
        ) from error
    return executor


def _convert(name: str, text: str, types: Mapping[str, type]) -> Any:
    """Return a parameter's value: a number, a truth value, a list where one is needed, or text."""
    if types.get(name) is str:
        return text
    if name in ("slurm_setup", "slurm_teardown"):
        return [text]
    if name == "slurm_srun_args":
        return shlex.split(text)
    try:
        value = json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except ValueError:
        value = text
    wanted = types.get(name)
    if wanted and not isinstance(value, (int, float) if wanted is float else wanted):
        raise UserError(f"--slurm: {name} must be of type {wanted.__name__}; got '{text}'.")
    return value

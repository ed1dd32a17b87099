"""The Ray runner: a warm worker per slot, on this machine or on a cluster.

A worker is an actor with a local runner of one slot in it, so that a job is supervised there as it
is here. It works in the results folder itself where it sees it, otherwise in a folder of its own,
from which a job is brought home when it ends.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from imlbench.errors import UserError, last_line
from imlbench.processes import python_path, sharing_python_path
from imlbench.records.folder import Store
from imlbench.records.record import Status
from imlbench.runner.contract import (
    ASSIGNMENT,
    EVENT,
    Assignment,
    End,
    Ended,
    Event,
    Lost,
    Runner,
    Waits,
)
from imlbench.runner.local import LocalRunner

Files = dict[str, tuple[bytes, int]]
"""Contents, and times of modification in ns, by path relative to a results folder."""

Make = Callable[[Sequence[str], int], Runner]
"""Makes a runner from its devices and its number of slots; importable where the jobs run."""

_SHARED = ("stages", "cache")  # folders of the results folder that are for all jobs
_LISTENS = 0.5  # seconds, after which a worker can be told something else
_PATIENCE = 30.0  # seconds for what takes a worker none, before it is given up
_ATTEMPTS = 3  # workers in a row that die before they have said a word


class RayRunner:
    """Carries out jobs by Ray.

    Arguments:
        address: Of a cluster: ``"auto"`` for the one that this machine belongs to,
            ``"ray://<host>:10001"`` for another; ``None`` for workers on this machine alone.
        n_workers: How many jobs run at a time.
        gpus_per_job: GPUs for each job, or the part of one; ``None`` shares all there are.
        is_shared: Whether workers see the results folder; ``None`` finds out.
        make: Makes the runner within a worker.

    Raises:
        UserError: Ray is not installed, or there is no cluster at the address.
    """

    def __init__(
        self,
        address: str | None,
        n_workers: int,
        gpus_per_job: float | None = None,
        *,
        is_shared: bool | None = None,
        make: Make = LocalRunner,
    ) -> None:
        self._ray = import_ray()
        self._is_shared, self._make = is_shared, make
        self._is_ours = not self._ray.is_initialized()
        self._temporary = _connect(self._ray, address, n_workers) if self._is_ours else None
        n_gpus = int(self._ray.cluster_resources().get("GPU", 0))
        self._gpus = _share(n_gpus, n_workers) if gpus_per_job is None else gpus_per_job
        n_nodes = sum(node["Alive"] for node in self._ray.nodes())
        self._n_expected = math.ceil(n_workers / n_nodes)  # on one node
        self._news: list[tuple[str, Event]] = []
        self._n_stillborn = 0
        self._slots = [self._hire() for _ in range(n_workers)]

    def n_free(self) -> int:
        self._listen(0.0)
        n_untold = sum(isinstance(event, End) for _, event in self._news)
        return max(0, sum(slot.is_free for slot in self._slots) - n_untold)

    def start(self, assignment: Assignment) -> None:
        slot = next(slot for slot in self._slots if slot.is_free)
        slot.assignment = assignment
        try:
            if slot.is_shared is None:
                slot.is_shared = self._sees(slot, assignment.results)
            if slot.is_shared or slot.lock_folder():
                self._send(slot)
            else:
                self._end(slot, Waits(lock=Path(assignment.folder.lock.lock_file)))
        except self._ray.exceptions.RayError as error:
            self._replace(slot, error)

    def wait(self, seconds: float) -> Sequence[tuple[str, Event]]:
        self._listen(0.0 if self._news else seconds)
        news, self._news = self._news, []
        return news

    def stop(self, job: str) -> None:
        for slot in self._slots:
            if slot.assignment and slot.assignment.job.id == job:
                slot.actor.stop.remote(job)

    def close(self) -> None:
        try:
            for slot in self._slots:
                if slot.assignment:
                    self.stop(slot.assignment.job.id)
            end = time.monotonic() + _PATIENCE
            while any(slot.assignment for slot in self._slots) and time.monotonic() < end:
                self._listen(_LISTENS)
            closing = [slot.actor.close.remote() for slot in self._slots if slot.is_free]
            if closing:
                self._ray.wait(closing, num_returns=len(closing), timeout=_PATIENCE)
        finally:
            for slot in self._slots:
                self._ray.kill(slot.actor)
                slot.release()
            if self._is_ours:
                self._ray.shutdown()
            if self._temporary:
                shutil.rmtree(self._temporary, ignore_errors=True)

    def _hire(self) -> _Slot:
        """Return a slot with a new worker: free as soon as it has said where it is."""
        # Workers of a cluster of ours have the path from the start: another takes them seconds.
        path = {} if self._temporary else {"env_vars": {"PYTHONPATH": python_path()}}
        worker = self._ray.remote(Worker).options(
            num_cpus=1, num_gpus=self._gpus, max_restarts=0, runtime_env=path
        )
        actor = worker.remote(self._make)
        return _Slot(actor, actor.introduce.remote(), is_shared=self._is_shared)

    def _replace(self, slot: _Slot, error: Exception) -> None:
        """Put a new worker in the place of one that failed."""
        reason = last_line(str(error))
        self._n_stillborn = 0 if slot.node else self._n_stillborn + 1
        if self._n_stillborn >= _ATTEMPTS:
            raise UserError(
                f"--executor ray: workers must be able to start; {_ATTEMPTS} in a row died: "
                f"{reason}. imlbench and its plugins have to be installed on every node."
            ) from error
        if slot.assignment and isinstance(error, self._ray.exceptions.RayTaskError):
            slot.assignment.folder.end_unless_held(Status.FAILED, reason, slot.lock)
            self._end(slot, Ended(status=Status.FAILED, reason=reason))
        elif slot.assignment:
            self._end(slot, Lost(reason=f"the worker is gone: {reason}"))
        self._ray.kill(slot.actor)
        self._slots[self._slots.index(slot)] = self._hire()

    def _sees(self, slot: _Slot, results: Path) -> bool:
        """Whether a worker reads what is written to the results folder here."""
        with tempfile.NamedTemporaryFile(dir=results, prefix=".writing-", suffix=".token") as file:
            token = os.urandom(16)
            file.write(token)
            file.flush()
            answer = slot.actor.reads.remote(file.name, token)
            return bool(self._ray.get(answer, timeout=_PATIENCE))

    def _send(self, slot: _Slot) -> None:
        """Hand a worker its job, with what there is of it if it cannot see that."""
        assert slot.assignment is not None
        files = None
        if not slot.is_shared:
            files = _read(slot.assignment, slot.has)
            slot.has |= _times(files)
        numbers = [other.number for other in self._slots if other.node == slot.node]
        share = slot.number, max([self._n_expected, *(number + 1 for number in numbers)])
        slot.answer = slot.actor.start.remote(ASSIGNMENT.dump_json(slot.assignment), share, files)

    def _listen(self, seconds: float) -> None:
        """Take in what workers say, as soon as one of them says something."""
        end = time.monotonic() + seconds
        while slots := {slot.answer: slot for slot in self._slots if slot.answer is not None}:
            patience = max(0.0, end - time.monotonic())
            answers, _ = self._ray.wait(list(slots), timeout=patience)
            if not answers:
                return
            heard = [self._hear(slots[answer]) for answer in answers]
            if any(heard):
                end = 0.0  # only what there is already
        time.sleep(max(0.0, end - time.monotonic()))

    def _hear(self, slot: _Slot) -> bool:
        """Take in what one worker says; False if it is nothing."""
        answer, slot.answer = slot.answer, None
        try:
            said = self._ray.get(answer)
        except self._ray.exceptions.RayError as error:
            self._replace(slot, error)
            return True
        if slot.assignment is None:
            slot.number = _first_free([s.number for s in self._slots if s.node == said])
            slot.node = said
            self._n_stillborn = 0
            return True
        texts, files = said
        if files is not None:
            _put(slot.assignment, files)
            slot.has |= _times(files)
        for event in map(EVENT.validate_json, texts):
            if isinstance(event, End):
                self._end(slot, event)
                return True
            self._news.append((slot.assignment.job.id, event))
        slot.answer = slot.actor.wait.remote(_LISTENS)
        return bool(texts)

    def _end(self, slot: _Slot, event: End) -> None:
        assert slot.assignment is not None
        self._news.append((slot.assignment.job.id, event))
        slot.release()


@dataclass(eq=False)
class _Slot:
    """A worker, and what it is at.

    Arguments:
        actor: The worker.
        answer: What it was asked, and has not answered.
        node: Where it is; empty until it has said so.
        number: Which of the workers there it is, as long as it lives: its jobs' processors follow
            from it, and those of its server are what they were at its first job.
        is_shared: Whether it sees the results folder.
        has: The files that it has been sent, or has sent, and from when they are.
        assignment: What it is at.
        lock: Of the job's folder, if it does not see that itself.
    """

    actor: Any
    answer: Any
    node: str = ""
    number: int = 0
    is_shared: bool | None = None
    has: dict[str, int] = field(default_factory=dict)
    assignment: Assignment | None = None
    lock: FileLock | None = None

    @property
    def is_free(self) -> bool:
        return bool(self.node) and self.assignment is None

    def lock_folder(self) -> bool:
        """Lock the job's folder here, as the worker cannot; False if another process holds it."""
        assert self.assignment is not None
        held = self.assignment.folder.lock
        try:
            held.acquire(timeout=0)
        except Timeout:
            return False
        self.lock = held
        return True

    def release(self) -> None:
        if self.lock:
            self.lock.release()
        self.assignment = self.lock = None


class Worker:
    """A local runner in a process of Ray's. Objects of ours come and go as JSON.

    Arguments:
        make: Makes the runner.
    """

    def __init__(self, make: Make) -> None:
        import ray

        gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU")
        self._runner = make(["cuda:0" if gpus else "cpu"], 1)
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._away: Assignment | None = None
        self._has: dict[str, int] = {}
        if hasattr(os, "sched_getaffinity"):
            self._processors = sorted(os.sched_getaffinity(0))

    def introduce(self) -> str:
        """Return the name of the node."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    @staticmethod
    def reads(path: str, token: bytes) -> bool:
        """Whether a file is here, with a content, in a folder that can be written to."""
        try:
            return Path(path).read_bytes() == token and os.access(Path(path).parent, os.W_OK)
        except OSError:
            return False

    def start(
        self, text: bytes, share: tuple[int, int], files: Files | None
    ) -> tuple[list[bytes], Files | None]:
        """Start a job; then as :meth:`wait`.

        Arguments:
            text: The assignment.
            share: Which part of the processors is this worker's, and of how many parts.
            files: What there is of the job; ``None`` if that is seen in the results folder.
        """
        assignment = ASSIGNMENT.validate_json(text)
        self._away = None
        if files is not None:
            self._scratch = self._scratch or tempfile.TemporaryDirectory(prefix="imlbench-")
            assignment = self._away = replace(assignment, results=Path(self._scratch.name))
            Store(assignment.results).prepare()
            _put(assignment, files)
            self._has = _list(assignment)
        if hasattr(os, "sched_setaffinity"):  # which is what the local runner goes by
            number, n_shares = share
            own = self._processors[number::n_shares] or self._processors[-1:]
            os.sched_setaffinity(0, own)
        self._runner.start(assignment)
        return self.wait(0.0)

    def wait(self, seconds: float) -> tuple[list[bytes], Files | None]:
        """Return what has happened, and with an end the files that are to be brought home."""
        events = [event for _, event in self._runner.wait(seconds)]
        has_ended = any(isinstance(event, End) for event in events)
        files = self._collect(self._away) if has_ended and self._away else None
        return [EVENT.dump_json(event) for event in events], files

    def stop(self, job: str) -> None:
        """Stop the job."""
        self._runner.stop(job)

    def close(self) -> None:
        """Give everything back."""
        self._runner.close()
        if self._scratch:
            self._scratch.cleanup()

    def _collect(self, assignment: Assignment) -> Files:
        """Return the files of a job and what is new for others; the job's leave here."""
        files = _read(assignment, self._has)
        shutil.rmtree(assignment.folder.path)
        return files


def _list(assignment: Assignment) -> dict[str, int]:
    """Return the files of a job and those for all jobs, and from when they are, in ns."""
    root, found = assignment.results, {}
    for folder in (assignment.folder.path, *(root / name for name in _SHARED)):
        for path in folder.rglob("*"):
            name = path.relative_to(root).as_posix()
            with contextlib.suppress(FileNotFoundError):  # others may be at work
                if path.is_file() and path.suffix != ".lock" and ".writing-" not in name:
                    found[name] = path.stat().st_mtime_ns
    return found


def _read(assignment: Assignment, known: Mapping[str, int]) -> Files:
    """Return a job's files, and those for all jobs that are not known, from when they are."""
    root, own = assignment.results, assignment.folder.path
    files = {}
    for name, time_ns in _list(assignment).items():
        if (root / name).is_relative_to(own) or known.get(name) != time_ns:
            with contextlib.suppress(FileNotFoundError):
                files[name] = (root / name).read_bytes(), time_ns
    return files


def _times(files: Files) -> dict[str, int]:
    return {name: time_ns for name, (_, time_ns) in files.items()}


def _put(assignment: Assignment, files: Files) -> None:
    """Put a job's folder in place, all of it or nothing, and what is for all jobs."""
    root, folder = assignment.results, assignment.folder.path
    with tempfile.TemporaryDirectory(dir=root, prefix=".writing-") as temporary:
        for name, (content, time_ns) in files.items():
            path = Path(temporary) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            os.utime(path, ns=(time_ns, time_ns))
        written = Path(temporary) / folder.relative_to(root)
        if written.exists():
            if folder.exists():
                folder.rename(Path(temporary) / "older")
            written.rename(folder)
        shared = [Path(name) for name in files if name.partition("/")[0] in _SHARED]
        for part in sorted(shared, key=lambda part: part.suffix == ".json"):  # sealed by these
            (root / part).parent.mkdir(parents=True, exist_ok=True)
            (Path(temporary) / part).replace(root / part)
            shutil.rmtree((root / part).with_suffix(".fit"), ignore_errors=True)


def _first_free(taken: Sequence[int]) -> int:
    """Return the smallest number that is not taken.

    Example:
        >>> _first_free([]), _first_free([0, 2])
        (0, 1)
    """
    return next(number for number in range(len(taken) + 1) if number not in taken)


def _share(n_gpus: int, n_workers: int) -> float:
    """Return the part of a GPU that each worker can have.

    Example:
        >>> _share(0, 4), _share(8, 4), _share(2, 5)
        (0.0, 1.0, 0.3333)
    """
    return math.floor(1e4 / max(1, math.ceil(n_workers / n_gpus))) / 1e4 if n_gpus else 0.0


def import_ray() -> Any:
    """Return the package ray, made quiet.

    Raises:
        UserError: It is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else a warning of change
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise UserError(
            "--executor ray: needs the package ray; install it with: pip install 'imlbench[ray]'"
        ) from error
    return ray


def _connect(ray: Any, address: str | None, n_workers: int) -> str | None:
    """Join a cluster, or start one on this machine; return its temporary folder in this case."""
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is not None:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError) as error:
            raise UserError(
                f"--ray-address: must be the address of a running cluster; got '{address}' "
                f"({last_line(str(error))}). Start one with ray start --head."
            ) from error
        return None
    # Names of sockets may not be long, as some temporary folders are.
    temporary = tempfile.mkdtemp(prefix="ray-", dir="/tmp" if Path("/tmp").is_dir() else None)
    with sharing_python_path():
        ray.init(
            address="local",
            num_cpus=n_workers,
            include_dashboard=False,
            object_store_memory=10**8,
            _temp_dir=temporary,
            **quiet,
        )
    return temporary

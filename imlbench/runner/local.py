"""The local runner: a process per job, one job per device at a time, hard time limits."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from filelock import FileLock, Timeout

from imlbench.api.sources import Sources
from imlbench.errors import UserError
from imlbench.plan.jobs import Job, Plan
from imlbench.records.folder import JobFolder, Store
from imlbench.records.record import Record, Status
from imlbench.runner.context import Event
from imlbench.runner.worker import ASSIGNMENT, EVENT, Assignment, end


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Arguments:
        job: The job.
        status: Its status.
        reason: Why, if it is not done.
        reused: Nothing had to be computed.
        seconds: Wall time of the job's process.
    """

    job: Job
    status: Status
    reason: str = ""
    reused: bool = False
    seconds: float = 0.0


class Display(Protocol):
    """What shows the run to the user."""

    def start(self, job: Job, device: str) -> None:
        """Show that a job has started."""

    def event(self, job: Job, event: Event) -> None:
        """Show an event of a running job."""

    def end(self, outcome: Outcome, folder: JobFolder) -> None:
        """Show how a job ended."""


def find_devices(requested: str) -> list[str]:
    """Return the devices to use, one job at a time on each.

    Arguments:
        requested: ``"auto"`` (every CUDA device, or the CPU), ``"cpu"``, ``"cuda"``, ``"cuda:1"``,
            or several separated by commas.

    Raises:
        UserError: A device does not exist.
    """
    import torch

    available = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if requested == "auto":
        return available or ["cpu"]
    chosen: list[str] = []
    for name in requested.split(","):
        devices = available if name == "cuda" else [name] if name in ["cpu", *available] else []
        if not devices:
            known = ", ".join(["auto", "cpu", *available])
            raise UserError(f"--device: must be one of {known}; got '{name}'. Use another.")
        chosen += devices
    return list(dict.fromkeys(chosen))


def run_jobs(
    plan: Plan,
    store: Store,
    *,
    sources: Sources,
    devices: Sequence[str],
    display: Display,
    time_limit: float | None = None,
    force: bool = False,
) -> Iterator[Outcome]:
    """Run a plan's jobs, yielding each outcome as soon as it is known; finished jobs are reused.

    Arguments:
        plan: What to run, in order, and what to compute for each job.
        store: The results folder.
        sources: Where the data are.
        devices: One job at a time on each.
        display: Shows progress.
        time_limit: Seconds after which a job is stopped with the status ``timeout``.
        force: Run finished jobs again, from the beginning, shared stages included.

    Raises:
        KeyboardInterrupt: After the running jobs were stopped and recorded as interrupted.
    """
    pending: list[Job] = []
    for job in plan.jobs:
        folder = store.folder(job.id)
        record = None if force or not folder.checkpoint.exists() else folder.read()
        if record is not None and record.is_complete(job, plan.metrics, plan.artifacts):
            folder.confirm()
            outcome = Outcome(job, Status.DONE, reused=True)
            display.end(outcome, folder)
            yield outcome
        else:
            pending.append(job)
    crew = _Crew(plan, store, sources, display, time_limit, force, len(pending), devices)
    try:
        while pending or crew.running:
            for device in crew.idle():
                if pending:
                    job = pending.pop(0)
                    if not crew.start(job, device):  # another imlbench is at it: wait, go on after
                        pending.append(job)
            yield from crew.wait()
    except (KeyboardInterrupt, GeneratorExit):
        crew.interrupt()
        raise


class _Crew:
    """The running processes."""

    def __init__(
        self,
        plan: Plan,
        store: Store,
        sources: Sources,
        display: Display,
        time_limit: float | None,
        force: bool,
        n_jobs: int,
        devices: Sequence[str],
    ) -> None:
        self._plan, self._store, self._sources = plan, store, sources
        self._display, self._time_limit, self._devices = display, time_limit, devices
        self._n_threads = max(1, _n_processors() // min(len(devices), max(n_jobs, 1)))
        self._refit_before = time.time() if force else 0.0
        self.running: list[_Running] = []

    def idle(self) -> list[str]:
        """Return the devices on which no job runs."""
        busy = {active.assignment.device for active in self.running}
        return [device for device in self._devices if device not in busy]

    def start(self, job: Job, device: str) -> bool:
        """Start a job; False if another process is working on it."""
        lock = _lock(self._store.folder(job.id))
        if lock is None:
            return False
        self._display.start(job, device)
        assignment = Assignment(
            job,
            self._store.root.resolve(),
            self._plan.metrics,
            self._plan.artifacts,
            self._sources,
            device,
            self._n_threads,
            self._refit_before,
        )
        self.running.append(_spawn(assignment, lock))
        return True

    def wait(self) -> Iterator[Outcome]:
        """Forward events until something has happened, and yield the outcomes."""
        with selectors.DefaultSelector() as selector:
            for active in self.running:
                if not active.is_silent:
                    selector.register(active.events, selectors.EVENT_READ, active)
            selector.select(timeout=0.5)
        for active in list(self.running):
            active.forward_events(self._display)
            outcome = active.check(self._time_limit)
            if outcome:
                active.forward_events(self._display)
                active.close()
                self.running.remove(active)
                self._display.end(outcome, active.assignment.folder)
                yield outcome

    def interrupt(self) -> None:
        """Stop all jobs, and record that the user did."""
        for active in self.running:
            active.stop()
            end(active.assignment.folder, Status.INTERRUPTED, "stopped by the user")
            active.close()


@dataclass
class _Running:
    """A job's process, the pipe of its events, and the lock of its folder."""

    assignment: Assignment
    process: subprocess.Popen[bytes]
    events: int
    lock: FileLock
    is_silent: bool = False
    start: float = field(default_factory=time.monotonic)
    _rest: bytes = b""

    def forward_events(self, display: Display) -> None:
        """Hand on what has come; a line that is no event is left out."""
        content = b""
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self.events, 1 << 16):
                content += part
            self.is_silent = True
        *lines, self._rest = (self._rest + content).split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError):
                display.event(self.assignment.job, EVENT.validate_json(line))

    def check(self, time_limit: float | None) -> Outcome | None:
        """Return the outcome if the process has ended, or has to be ended."""
        folder, seconds = self.assignment.folder, time.monotonic() - self.start
        if self.process.poll() is None:
            if time_limit is None or seconds <= time_limit:
                if self.is_silent:  # it has closed its pipe, and is about to end
                    time.sleep(0.01)
                return None
            self.stop()
            end(folder, Status.TIMEOUT, f"stopped after {time_limit:g} s")
        record = folder.read()
        if record is None or record.status is None:  # it died without a word
            code = self.process.returncode
            killed = code == -signal.SIGKILL
            status = Status.OUT_OF_MEMORY if killed else Status.FAILED
            reason = (
                "the system killed the process"
                if killed
                else f"the process died with exit code {code}"
            )
            end(folder, status, reason)
            return Outcome(self.assignment.job, status, reason, seconds=seconds)
        return Outcome(self.assignment.job, record.status, record.reason, seconds=seconds)

    def stop(self) -> None:
        """End the process and all that it has started."""
        for how, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, None)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=patience)
                return

    def close(self) -> None:
        """Release what is held."""
        os.close(self.events)
        self.lock.release()


def _n_processors() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _lock(folder: JobFolder) -> FileLock | None:
    """Return the lock of a job's folder, held; or ``None`` if another process holds it."""
    folder.lock_path.parent.mkdir(exist_ok=True)
    lock = FileLock(folder.lock_path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock


def _spawn(assignment: Assignment, lock: FileLock) -> _Running:
    """Start a job's process, in a session of its own: the parent decides on Ctrl-C."""
    folder = assignment.folder
    if assignment.refit_before:
        folder.clear()
    folder.remove_unfinished()
    now = time.time()
    record = folder.read()
    if record is None or record.fit is None:
        record = Record.begin(assignment.job, now)
    folder.write(record.model_copy(update={"status": None, "reason": "", "confirmed": now}))
    receiver, sender = os.pipe()
    os.set_blocking(receiver, False)
    try:
        with folder.log.open("ab" if record.fit else "wb") as log:  # the fit's log stays
            process = subprocess.Popen(
                # -P: the folder that this was started in is no place to import from.
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "imlbench.runner.worker",
                    str(sender),
                    str(os.getpid()),
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(sender,),
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
    finally:
        os.close(sender)
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as assignments:
        assignments.write(ASSIGNMENT.dump_json(assignment))
    return _Running(assignment, process, receiver, lock)

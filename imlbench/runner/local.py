"""The local runner: a spawned process per job, one job per device at a time, hard time limits."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from filelock import FileLock, Timeout

from imlbench.api import Sources
from imlbench.errors import Diverged, UserError
from imlbench.plan import Job
from imlbench.store import JobFolder, Status, Store


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

    def event(self, job: Job, event: dict[str, Any]) -> None:
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


@dataclass(frozen=True)
class _Assignment:
    """Everything that a job's process has to know."""

    job: Job
    store: Store
    metrics: Mapping[str, str]
    sources: Sources
    device: str
    n_threads: int
    refit_before: float

    @property
    def folder(self) -> JobFolder:
        return self.store.folder(self.job.id)


@dataclass
class _Running:
    assignment: _Assignment
    process: BaseProcess
    events: Connection
    lock: FileLock
    start: float = field(default_factory=time.monotonic)


def run_jobs(
    jobs: Sequence[Job],
    store: Store,
    *,
    metrics: Mapping[str, str],
    sources: Sources,
    devices: Sequence[str],
    display: Display,
    time_limit: float | None = None,
    force: bool = False,
) -> Iterator[Outcome]:
    """Run jobs, yielding each outcome as soon as it is known; finished jobs are reused.

    Arguments:
        jobs: What to run, in order.
        store: The results folder.
        metrics: Names of the metrics to compute, with what identifies their code.
        sources: Where the data are.
        devices: One job at a time on each.
        display: Shows progress.
        time_limit: Seconds after which a job is stopped with the status ``timeout``.
        force: Run finished jobs again, from the beginning, shared stages included.

    Raises:
        KeyboardInterrupt: After the running jobs were stopped and recorded as interrupted.
    """
    pending: list[Job] = []
    for job in jobs:
        folder = store.folder(job.id)
        if not force and is_complete(folder, metrics):
            outcome = Outcome(job, Status.DONE, reused=True)
            display.end(outcome, folder)
            yield outcome
        else:
            pending.append(job)
    running: list[_Running] = []
    n_threads = max(1, _n_processors() // min(len(devices), max(len(pending), 1)))
    refit_before = time.time() if force else 0.0
    try:
        while pending or running:
            for device in devices:
                if pending and device not in {active.assignment.device for active in running}:
                    job = pending.pop(0)
                    lock = _lock(store.folder(job.id))
                    if lock is None:  # another imlbench is at it: wait, and take over the rest
                        pending.append(job)
                        continue
                    display.start(job, device)
                    running.append(
                        _spawn(
                            _Assignment(
                                job, store, metrics, sources, device, n_threads, refit_before
                            ),
                            lock,
                        )
                    )
            wait([a.events for a in running] + [a.process.sentinel for a in running], timeout=0.5)
            for active in list(running):
                _forward_events(active, display)
                ended = _check(active, time_limit)
                if ended:
                    _forward_events(active, display)
                    running.remove(active)
                    active.lock.release()
                    display.end(ended, active.assignment.folder)
                    yield ended
    except (KeyboardInterrupt, GeneratorExit):
        for active in running:
            _stop(active.process)
            active.assignment.folder.end(Status.INTERRUPTED, "stopped by the user")
            active.lock.release()
        raise


def is_complete(folder: JobFolder, metrics: Mapping[str, str]) -> bool:
    """Whether a job is done and every metric was computed, by today's code, or does not apply."""
    if folder.status is not Status.DONE:
        return False
    record = folder.read("metrics.json")
    scores, not_applicable = record.get("scores", {}), record.get("not_applicable", {})
    return all(
        name in not_applicable or scores.get(name, {}).get("code") == code
        for name, code in metrics.items()
    )


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


def _spawn(assignment: _Assignment, lock: FileLock) -> _Running:
    job, folder = assignment.job, assignment.folder
    if assignment.refit_before:
        folder.clear()
    folder.remove_unfinished()
    (folder.path / "status.json").unlink(missing_ok=True)
    folder.write("config.json", {**asdict(job), "id": job.id})
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_work, args=(assignment, sender), daemon=True)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides on Ctrl-C
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, handler)
    sender.close()
    return _Running(assignment, process, receiver, lock)


def _forward_events(active: _Running, display: Display) -> None:
    with contextlib.suppress(EOFError, OSError):
        while active.events.poll():
            display.event(active.assignment.job, active.events.recv())


def _check(active: _Running, time_limit: float | None) -> Outcome | None:
    """Return the outcome if the process has ended, or has to be ended."""
    job, folder = active.assignment.job, active.assignment.folder
    seconds = time.monotonic() - active.start
    if active.process.is_alive():
        if time_limit is None or seconds <= time_limit:
            return None
        _stop(active.process)
        folder.end(Status.TIMEOUT, f"stopped after {time_limit:g} s")
    active.process.join()
    if folder.status is None:  # it died without a word
        code = active.process.exitcode
        if code == -signal.SIGKILL:
            folder.end(Status.OUT_OF_MEMORY, "the system killed the process")
        else:
            folder.end(Status.FAILED, f"the process died with exit code {code}")
    record = folder.read("status.json")
    return Outcome(job, Status(record["status"]), record["reason"], seconds=seconds)


def _stop(process: BaseProcess) -> None:
    process.terminate()
    process.join(timeout=5)
    if process.is_alive():
        process.kill()
        process.join()


def _work(assignment: _Assignment, events: Connection) -> None:
    """Run one job in a spawned process; everything it prints goes to its log."""
    log = open(assignment.folder.path / "log.txt", "w", encoding="utf-8", buffering=1)  # noqa: SIM115
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    faulthandler.enable(log)
    try:
        status, reason = _attempt(assignment, _sender(events))
    except BrokenPipeError:
        os._exit(1)  # the parent is gone, and nobody waits for this result
    assignment.folder.end(status, reason)


def _attempt(
    assignment: _Assignment, report: Callable[[dict[str, Any]], None]
) -> tuple[Status, str]:
    try:
        import torch

        from imlbench.job import run_job
        from imlbench.registry import Registry

        torch.set_num_threads(assignment.n_threads)
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)
        run_job(
            assignment.job,
            assignment.folder,
            Registry(),
            metrics=assignment.metrics,
            stages=assignment.store.stages,
            sources=assignment.sources,
            device=torch.device(assignment.device),
            report=report,
            refit_before=assignment.refit_before,
        )
    except BrokenPipeError:
        raise
    except Diverged as error:
        traceback.print_exc()
        return Status.DIVERGED, str(error)
    except Exception as error:  # a plugin can raise anything; the other jobs go on
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
        if _is_out_of_memory(error):
            return Status.OUT_OF_MEMORY, reason.splitlines()[0]
        return Status.FAILED, reason
    return Status.DONE, ""


def _is_out_of_memory(error: Exception) -> bool:
    """Whether an error is Python's, CUDA's or torch's way to say that no memory is left."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def _sender(events: Connection, interval: float = 0.1) -> Callable[[dict[str, Any]], None]:
    """Return a report function that sends at most ten progress events a second."""
    last = -interval

    def send(event: dict[str, Any]) -> None:
        nonlocal last
        final = event.get("step") == event.get("n_steps")
        if event["event"] == "progress" and not final and time.monotonic() - last < interval:
            return
        last = time.monotonic()
        events.send(event)

    return send

"""Jobs on this machine: slots on its devices, a process for each job, warm from the pool."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from imlbench.errors import UserError, last_line, plain
from imlbench.files import set_aside
from imlbench.records.folder import JobFolder
from imlbench.records.record import Status
from imlbench.runner.contract import EVENT, Assignment, Ended, Event, Lost, Waits
from imlbench.runner.pool import Exit, Pool
from imlbench.runner.requests import REQUEST, Run

TINY = 64
"""Numbers per example up to which a model is computed with one thread: more only wait."""


@dataclass
class _Active:
    """A job that runs, and what it has said of its end."""

    assignment: Assignment
    slot: int
    oom_kills: int
    last: Ended | Waits | None = None
    is_stopped: bool = False


class LocalRunner:
    """Carries out jobs in processes of a pool.

    Arguments:
        devices: Such as ``["cuda:0", "cuda:1"]`` or ``["cpu"]``.
        n_slots: How many jobs run at a time; spread evenly over the devices.
        pool: Where the processes come from; by default one of its own, which ends with the runner.
    """

    def __init__(self, devices: Sequence[str], n_slots: int, pool: Pool | None = None) -> None:
        self._devices, self._n_slots = devices, n_slots
        self._pool, self._owns_pool = pool or Pool(), pool is None
        self._active: dict[int, _Active] = {}

    def n_free(self) -> int:
        """Return how many more jobs can be started now."""
        return self._n_slots - len(self._active)

    def start(self, assignment: Assignment) -> None:
        """Start a job on the device that has the fewest."""
        slot = min(set(range(self._n_slots)) - {active.slot for active in self._active.values()})
        folder = assignment.folder
        folder.path.mkdir(parents=True, exist_ok=True)
        assignment = replace(
            assignment,
            device=self._devices[slot % len(self._devices)],
            n_threads=self._n_threads(assignment),
        )
        with _open_log(folder) as log:
            request = REQUEST.dump_json(Run(assignment))
            number = self._pool.submit(request, log, assignment.time_limit)
        self._active[number] = _Active(assignment, slot, _oom_kills())

    def _n_threads(self, assignment: Assignment) -> int:
        if assignment.job.space.n_dims <= TINY:
            return 1
        return assignment.n_threads or max(1, n_processors() // self._n_slots)

    def wait(self, seconds: float) -> Sequence[tuple[str, Event]]:
        """Return what has happened, by the job's id."""
        found: list[tuple[str, Event]] = []
        for number, said in self._pool.wait(seconds):
            active = self._active.get(number)
            if active is None:
                continue
            if isinstance(said, Exit):
                del self._active[number]
                event: Event | None = _end_of(active, said)
            else:
                event = self._hear(active, said)
            if event is not None:
                found.append((active.assignment.job.id, event))
        return found

    def _hear(self, active: _Active, line: bytes) -> Event | None:
        """Return what a job says; its end is told when its process has ended."""
        if line.startswith(b'{"imported"'):
            self._pool.preload(json.loads(line)["imported"])
            return None
        try:
            event = EVENT.validate_json(line)
        except ValueError:  # somebody else has written to the pipe
            return None
        if isinstance(event, Ended | Waits):
            active.last = event
            return None
        return event

    def stop(self, job: str) -> None:
        """End a job and all that it has started."""
        for number, active in self._active.items():
            if active.assignment.job.id == job:
                active.is_stopped = True
                self._pool.stop(number)

    def suspend(self, is_wanted: bool) -> None:
        """Suspend all jobs, or let them go on."""
        self._pool.suspend(is_wanted)

    def close(self) -> None:
        """End all jobs, record that they were stopped, and give everything back."""
        for active in self._active.values():
            self.stop(active.assignment.job.id)
        while self._active:
            self.wait(1.0)
        if self._owns_pool:
            self._pool.close()


@contextlib.contextmanager
def suspending(runner: LocalRunner) -> Iterator[None]:
    """Let Ctrl-Z suspend the jobs, too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def suspend(*_: object) -> None:
        runner.suspend(True)
        os.kill(os.getpid(), signal.SIGSTOP)
        runner.suspend(False)

    former = signal.signal(signal.SIGTSTP, suspend)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, former)


def _open_log(folder: JobFolder) -> IO[bytes]:
    if folder.log.is_dir():
        set_aside(folder.log)
    return folder.log.open("ab")


def _end_of(active: _Active, exit: Exit) -> Event:
    """Return how a job ended, and record it if the job could not."""
    if exit.is_lost:
        return Lost(reason=str(exit))
    if active.last is not None:  # also if its time was over just then
        return active.last
    status, reason = Status.FAILED, f"{exit}{_last_words(active.assignment.folder)}"
    if exit.is_timed_out:
        status, reason = Status.TIMEOUT, f"stopped after {active.assignment.time_limit:g} s"
    elif active.is_stopped:
        status, reason = Status.INTERRUPTED, "stopped by the user"
    elif exit.code == -signal.SIGKILL and _oom_kills() > active.oom_kills:
        status, reason = Status.OUT_OF_MEMORY, "the system killed the process to free memory"
    active.assignment.folder.end_unless_held(status, reason)
    return Ended(status=status, reason=reason)


def _last_words(folder: JobFolder) -> str:
    """Return the last line of a job's log; empty if there is none."""
    with contextlib.suppress(OSError), folder.log.open("rb") as file:
        file.seek(max(0, folder.log.stat().st_size - 4096))
        last = last_line(file.read().decode(errors="replace"))
        return f"; its log ends: {plain(last, 200)}" if last else ""
    return ""


def _oom_kills() -> int:
    """Return how often the system has killed a process to free memory; 0 if it does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def n_processors() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose_devices(requested: str, n_cuda: int) -> list[str]:
    """Return the devices to use.

    Numbers count the devices that ``CUDA_VISIBLE_DEVICES`` leaves visible, in its order, whatever
    it calls them by: numbers, UUIDs, parts of a device (MIG). Processes of jobs inherit it.

    Arguments:
        requested: ``"auto"`` (every CUDA device, or the CPU), ``"cpu"``, ``"cuda"``, ``"cuda:1"``,
            or several separated by commas.
        n_cuda: How many CUDA devices are visible.

    Raises:
        UserError: A device does not exist.
    """
    available = [f"cuda:{index}" for index in range(n_cuda)]
    if requested == "auto":
        return available or ["cpu"]
    devices = {"cpu": ["cpu"], **{name: [name] for name in available}}
    if available:
        devices["cuda"] = available
    chosen: list[str] = []
    for name in requested.split(","):
        if name not in devices:
            known = ", ".join(["auto", *devices])
            raise UserError(f"--device: must be one of {known}; got '{name}'. Use another.")
        chosen += devices[name]
    return list(dict.fromkeys(chosen))

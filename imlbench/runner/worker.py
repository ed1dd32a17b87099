"""One job in a process of its own: ``python -m imlbench.runner.worker FD PARENT``.

The assignment comes as JSON by the standard input; events go as lines of JSON to the file
descriptor FD; everything that is printed goes to the job's log. PARENT is the process that started
this one.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from imlbench.api.sources import Sources
from imlbench.errors import Diverged, UserError
from imlbench.plan.jobs import Job, Task
from imlbench.plan.planning import have_changed
from imlbench.records.folder import JobFolder, Store
from imlbench.records.record import Record, Status
from imlbench.runner.context import Event

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Assignment:
    """Everything that a job's process has to know.

    Arguments:
        job: The job.
        results: The results folder.
        metrics: The metrics to compute.
        artifacts: The artifacts to write.
        sources: Where the data are.
        device: Where to compute.
        n_threads: How many threads to use.
        refit_before: Stages that were fitted before this time are fitted again.
    """

    job: Job
    results: Path
    metrics: tuple[Task, ...]
    artifacts: tuple[Task, ...]
    sources: Sources
    device: str
    n_threads: int
    refit_before: float

    @property
    def folder(self) -> JobFolder:
        """The job's folder."""
        return Store(self.results).folder(self.job.id)


ASSIGNMENT = TypeAdapter(Assignment)
EVENT: TypeAdapter[Event] = TypeAdapter(Event)


def main() -> None:
    """Run the job, and record how it ended."""
    _die_with_parent(int(sys.argv[2]))
    assignment = ASSIGNMENT.validate_json(sys.stdin.buffer.read())
    events = int(sys.argv[1])
    os.set_inheritable(events, False)  # what a plugin starts must not hold the pipe open
    faulthandler.enable()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        status, reason = _attempt(assignment, _sender(events))
    except BrokenPipeError:
        os._exit(1)  # the parent is gone, and nobody waits for this result
    end(assignment.folder, status, reason)


def _die_with_parent(parent: int) -> None:
    """Ask the kernel to end this process when its parent ends, for whatever reason.

    Where it cannot be asked, the next event that finds no reader ends the process.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was too late
            os._exit(1)


def end(folder: JobFolder, status: Status, reason: str = "") -> Record | None:
    """Record how a job ended."""
    record = folder.read()
    if record is None:
        return None
    ended = {"status": status, "reason": reason, "ended": record.ended or time.time()}
    return folder.write(record.model_copy(update=ended))


def _attempt(assignment: Assignment, report: Callable[[Event], None]) -> tuple[Status, str]:
    try:
        import torch

        from imlbench.plan.registry import Registry
        from imlbench.runner.job import run_job

        registry = Registry()
        if have_changed(assignment.job, assignment.metrics, assignment.artifacts, registry):
            raise UserError("the code changed during the run. Run again.")
        torch.set_num_threads(assignment.n_threads)
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)
        run_job(
            assignment.job,
            Store(assignment.results),
            registry,
            metrics=assignment.metrics,
            artifacts=assignment.artifacts,
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


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a way to say that no memory is left."""
    while error is not None:
        if (
            isinstance(error, MemoryError)
            or type(error).__name__ == "OutOfMemoryError"
            or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
        ):
            return True
        error = error.__cause__
    return False


def _sender(events: int, interval: float = 0.1) -> Callable[[Event], None]:
    """Return a report function that sends at most ten progress events a second."""
    last = -interval

    def send(event: Event) -> None:
        nonlocal last
        is_final = isinstance(event, str) or event.step == event.n_steps
        if is_final or time.monotonic() - last >= interval:
            last = time.monotonic()
            os.write(events, EVENT.dump_json(event) + b"\n")

    return send


if __name__ == "__main__":
    main()

"""What a runner is: where jobs are carried out, and what it says of them.

The scheduler decides which job comes next; a runner carries it out: on this machine
(:mod:`imlbench.runner.local`), on a Ray cluster, or by Slurm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Protocol

from pydantic import Field, TypeAdapter

from imlbench.api.sources import Sources
from imlbench.plan.jobs import Job, Task
from imlbench.records.folder import JobFolder, Store
from imlbench.records.record import Fact, Point, Status


@dataclass(frozen=True)
class Assignment:
    """Everything that the process of a job has to know.

    Arguments:
        job: The job.
        results: The results folder, absolute.
        metrics: The metrics to compute.
        artifacts: The artifacts to write.
        sources: Where the data are.
        refit_before: What was fitted before this time is fitted again; in seconds since 1970.
        checkpoint_every: Seconds between two checkpoints within a fit.
        time_limit: Seconds after which the job is ended; time of suspension counts a tenth.
        is_fitted: Only scores and artifacts are wanted, of the checkpoint and samples there are.
        device: Where to compute; the runner decides.
        n_threads: How many threads to use; 0 until the runner has decided.
    """

    job: Job
    results: Path
    metrics: tuple[Task, ...]
    artifacts: tuple[Task, ...]
    sources: Sources
    refit_before: float = 0.0
    checkpoint_every: float = 60.0
    time_limit: float | None = None
    is_fitted: bool = False
    device: str = "cpu"
    n_threads: int = 0

    @property
    def folder(self) -> JobFolder:
        """The job's folder."""
        return Store(self.results).folder(self.job.id)


class Began(Fact):
    """A step of a job begins: ``load``, ``fit``, ``sample``, ``score``."""

    kind: Literal["began"] = "began"
    step: str


class Progress(Fact):
    """A point of a job's learning curves."""

    kind: Literal["progress"] = "progress"
    point: Point


class Noticed(Fact):
    """Something that the user has to know, such as a damaged file that was set aside."""

    kind: Literal["noticed"] = "noticed"
    text: str


class Ended(Fact):
    """A job has ended, for whatever reason.

    Arguments:
        status: How.
        reason: Why, if it is not done.
        seconds: What it took, without imports.
    """

    kind: Literal["ended"] = "ended"
    status: Status
    reason: str = ""
    seconds: float = 0.0


class Waits(Fact):
    """A job has stepped back, as another is fitting the stage that it needs, or is at the job.

    Arguments:
        lock: The file that the other process holds.
    """

    kind: Literal["waits"] = "waits"
    lock: Path


class Lost(Fact):
    """The place where a job ran is gone: it has to be started again, here or elsewhere."""

    kind: Literal["lost"] = "lost"
    reason: str


End = Ended | Waits | Lost
Event = Began | Progress | Noticed | End

ASSIGNMENT = TypeAdapter(Assignment)
EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])


class Runner(Protocol):
    """A place where jobs are carried out.

    Everything that a job has to say comes by :meth:`wait`; of its events exactly one is an
    :data:`End`, and it is the last.
    """

    def n_free(self) -> int:
        """Return how many more jobs can be started now."""
        ...

    def start(self, assignment: Assignment) -> None:
        """Start a job; called only while something is free."""
        ...

    def wait(self, seconds: float) -> Sequence[tuple[str, Event]]:
        """Return what has happened, by the job's id, as soon as something has.

        Arguments:
            seconds: Return after this long even if nothing has.
        """
        ...

    def stop(self, job: str) -> None:
        """End a job and all that it has started; then it is *interrupted*."""
        ...

    def close(self) -> None:
        """End all jobs and give everything back."""
        ...

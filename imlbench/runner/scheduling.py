"""Which job comes next, and what becomes of it: reuse, order, waiting, a second try when lost."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from imlbench.files import is_held
from imlbench.plan.jobs import Job, Plan
from imlbench.records.folder import Store
from imlbench.records.record import Record, Status
from imlbench.runner.contract import Assignment, Ended, Event, Lost, Runner, Waits

MOST_TRIES = 3
"""How often a job is started whose place was lost."""
_TICK = 0.5
_Kind = tuple[str, str]
"""Model and dataset: jobs that take about as long."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Arguments:
        job: The job.
        status: Its status.
        reason: Why, if it is not done.
        is_reused: Nothing had to be computed.
        seconds: What it took.
    """

    job: Job
    status: Status
    reason: str = ""
    is_reused: bool = False
    seconds: float = 0.0


class Watcher(Protocol):
    """What looks on while jobs run: the display, the journal."""

    def start(self, job: Job) -> None:
        """A job has been started."""

    def event(self, job: Job, event: Event) -> None:
        """A job has said something; after ``Waits`` or ``Lost`` it is started again later."""

    def end(self, outcome: Outcome) -> None:
        """A job has ended."""

    def tick(self, seconds_left: float | None) -> None:
        """Some time has passed; the jobs will take so much longer, if that can be said."""


def find_finished(
    plan: Plan, store: Store, records: Mapping[str, Record]
) -> tuple[list[Outcome], list[Job]]:
    """Return the jobs that need nothing, and those that are left.

    Arguments:
        plan: The plan.
        store: The results folder.
        records: Jobs that have ended, by id; every file is as it was written.
    """
    finished, left = [], []
    for job in plan.jobs:
        record = records.get(job.id)
        if record is not None and record.is_complete(job, plan.metrics, plan.artifacts):
            store.folder(job.id).confirm()
            finished.append(Outcome(job, Status.DONE, is_reused=True))
        else:
            left.append(job)
    return finished, left


def run_jobs(
    jobs: Sequence[Job],
    template: Assignment,
    runner: Runner,
    watchers: Sequence[Watcher],
    known: Mapping[_Kind, float] | None = None,
) -> Iterator[Outcome]:
    """Run jobs, longest first as far as is known, and yield each outcome as soon as it is known.

    A job whose stage another is fitting steps back and leaves its place to the next.

    Arguments:
        jobs: The jobs.
        template: What all assignments have in common.
        runner: Where they are carried out.
        watchers: What looks on.
        known: Seconds that earlier jobs took, by model and dataset.

    Raises:
        KeyboardInterrupt: After the running jobs were stopped and recorded as interrupted.
    """
    queue = _Queue(jobs, known or {})
    try:
        while not queue.is_empty:
            while runner.n_free() > 0 and (job := queue.next()) is not None:
                for watcher in watchers:
                    watcher.start(job)
                runner.start(replace(template, job=job))
            for name, event in runner.wait(_TICK):
                outcome = queue.hear(name, event, watchers)
                if outcome is not None and isinstance(event, Lost):
                    folder = replace(template, job=outcome.job).folder
                    folder.end_unless_held(outcome.status, outcome.reason)
                if outcome is not None:
                    for watcher in watchers:
                        watcher.end(outcome)
                    yield outcome
            for watcher in watchers:
                watcher.tick(queue.seconds_left())
    finally:
        runner.close()


class _Queue:
    """The jobs that are left: pending by their kind, waiting for a lock, or running."""

    def __init__(self, jobs: Sequence[Job], known: Mapping[_Kind, float]) -> None:
        self._pending: dict[_Kind, deque[Job]] = defaultdict(deque)
        for job in jobs:
            self._pending[_kind_of(job)].append(job)
        self._waiting: dict[str, tuple[Job, Path, float]] = {}
        self._running: dict[str, tuple[Job, float]] = {}
        self._tries: Counter[str] = Counter()
        self._took = {kind: (1, seconds) for kind, seconds in known.items()}
        self._n_slots = 1

    @property
    def is_empty(self) -> bool:
        """Whether everything has ended."""
        return not (any(self._pending.values()) or self._waiting or self._running)

    def _expected(self, kind: _Kind) -> float:
        """Return how long a job will take, judged by others of its model and dataset."""
        n_jobs, seconds = self._took.get(kind, (0, math.inf))
        return seconds / max(n_jobs, 1)

    def next(self) -> Job | None:
        """Take the job to start next: the longest; one of which nothing is known counts as such."""
        now = time.monotonic()
        for name, (job, lock, not_before) in list(self._waiting.items()):
            if now >= not_before and not is_held(lock):
                del self._waiting[name]
                self._pending[_kind_of(job)].appendleft(job)
        for kind in sorted(self._pending, key=self._expected, reverse=True):
            pending = self._pending[kind]
            for _ in range(len(pending)):
                job = pending.popleft()
                if job.id not in self._running and job.id not in self._waiting:
                    self._running[job.id] = job, now
                    self._n_slots = max(self._n_slots, len(self._running))
                    return job
                pending.append(job)  # the same fit, with samples drawn otherwise, comes later
        return None

    def hear(self, name: str, event: Event, watchers: Sequence[Watcher]) -> Outcome | None:
        """Take note of what a job says; return its outcome if that was its end."""
        job, began = self._running[name]
        if isinstance(event, Ended | Waits | Lost):
            del self._running[name]
        if isinstance(event, Ended):
            seconds = time.monotonic() - began
            if event.status is Status.DONE:
                n_jobs, before = self._took.get(_kind_of(job), (0, 0.0))
                self._took[_kind_of(job)] = n_jobs + 1, before + seconds
            return Outcome(job, event.status, event.reason, seconds=seconds)
        if isinstance(event, Lost):
            self._tries[name] += 1
            if self._tries[name] >= MOST_TRIES:
                return Outcome(job, Status.FAILED, f"{event.reason}, {MOST_TRIES} times")
            self._pending[_kind_of(job)].appendleft(job)
        elif isinstance(event, Waits):
            self._waiting[name] = job, event.lock, time.monotonic() + 0.1
        for watcher in watchers:
            watcher.event(job, event)
        return None

    def seconds_left(self) -> float | None:
        """Return how long everything will take; ``None`` if a kind of job has never ended."""
        now = time.monotonic()
        left = [len(jobs) * self._expected(kind) for kind, jobs in self._pending.items() if jobs]
        left += [self._expected(_kind_of(job)) for job, _, _ in self._waiting.values()]
        left += [
            max(self._expected(_kind_of(job)) - (now - began), 0.0)
            for job, began in self._running.values()
        ]
        total = sum(left)
        return total / self._n_slots if math.isfinite(total) else None


def _kind_of(job: Job) -> _Kind:
    return job.model, job.dataset

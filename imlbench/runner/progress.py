"""What the user sees while jobs run: a live line per job on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.text import Text

from imlbench.errors import plain
from imlbench.plan.jobs import Job
from imlbench.records.folder import Store
from imlbench.records.journal import Journal
from imlbench.records.record import Point, Status
from imlbench.runner import contract
from imlbench.runner.contract import Began, Event, Lost, Noticed, Waits
from imlbench.runner.scheduling import Outcome

_STYLES = {Status.DONE: "green", Status.INTERRUPTED: "yellow"}


class PlainDisplay:
    """Lines for logs and pipes: starts, ends, and progress every few seconds.

    What cannot be shown, as the terminal is gone, is left out.

    Arguments:
        store: The results folder, for the names of logs.
        n_jobs: How many jobs there are in all.
        interval: Least seconds between two progress lines of one job.
    """

    def __init__(self, store: Store, n_jobs: int, interval: float = 10.0) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True, force_jupyter=False)
        self._store, self._n_jobs, self._n_ended, self._interval = store, n_jobs, 0, interval
        self._last: dict[str, float] = {}
        self._clock = Clock()

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def print(self, text: str | Text) -> None:
        """Print a line; nothing in it is markup."""
        with contextlib.suppress(OSError):
            self.console.print(Text(text) if isinstance(text, str) else text)

    def reuse(self, outcomes: Sequence[Outcome]) -> None:
        """Say which jobs need nothing: each of a few, the number of many."""
        if len(outcomes) > 20:
            self._n_ended += len(outcomes)
            self.print(f"[{self._n_ended}/{self._n_jobs}] {len(outcomes)} jobs: done (reused)")
            return
        for outcome in outcomes:
            self.end(outcome)

    def start(self, job: Job) -> None:
        self._last[job.id] = time.monotonic()
        self.print(f"{job}: started")

    def event(self, job: Job, event: Event) -> None:
        text = self._clock.describe(job, event)
        is_due = time.monotonic() - self._last[job.id] >= self._interval
        if text and (is_due or not isinstance(event, contract.Progress | Began)):
            self._last[job.id] = time.monotonic()
            self.print(f"{job}: {text}")

    def end(self, outcome: Outcome) -> None:
        self._n_ended += 1
        line = Text(f"[{self._n_ended}/{self._n_jobs}] {outcome.job}: ")
        line.append(outcome.status, _STYLES.get(outcome.status, "red"))
        if outcome.is_reused:
            line.append(" (reused)")
        elif outcome.status is Status.DONE:
            line.append(f" in {outcome.seconds:.{0 if outcome.seconds >= 10 else 1}f} s")
        else:
            log = self._store.folder(outcome.job.id).log
            line.append(f": {plain(outcome.reason).rstrip('.')}. Log: {log}")
        self.print(line)

    def tick(self, seconds_left: float | None) -> None:
        pass


class LiveDisplay(PlainDisplay):
    """One moving line for each running job and one for the whole; what has ended scrolls away."""

    def __init__(self, store: Store, n_jobs: int) -> None:
        super().__init__(store, n_jobs)
        self._tasks: dict[str, TaskID] = {}
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[detail]}", markup=False),
            console=self.console,
            transient=True,
        )
        self._whole = self._progress.add_task("all jobs", total=n_jobs, detail="")

    def __enter__(self) -> LiveDisplay:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):
            self._progress.stop()

    def start(self, job: Job) -> None:
        self._last[job.id] = time.monotonic()
        self._tasks[job.id] = self._progress.add_task(str(job), total=None, detail="starting")

    def event(self, job: Job, event: Event) -> None:
        task = self._tasks[job.id]
        if isinstance(event, Noticed | Lost):
            super().event(job, event)
        if isinstance(event, Waits | Lost):
            self._progress.remove_task(self._tasks.pop(job.id))
        elif isinstance(event, Began):
            self._progress.update(task, completed=0, total=None, detail=event.step)
        elif isinstance(event, contract.Progress):
            point, detail = event.point, self._clock.describe(job, event)
            self._progress.update(task, completed=point.step, total=point.n_steps, detail=detail)

    def end(self, outcome: Outcome) -> None:
        task = self._tasks.pop(outcome.job.id, None)
        if task is not None:
            self._progress.remove_task(task)
        super().end(outcome)
        self._progress.update(self._whole, completed=self._n_ended)

    def tick(self, seconds_left: float | None) -> None:
        left = "" if seconds_left is None else f"{duration(seconds_left)} left"
        self._progress.update(self._whole, detail=f"{self._n_ended} of {self._n_jobs}  {left}")


class SilentDisplay(PlainDisplay):
    """Shows nothing."""

    def print(self, text: str | Text) -> None:
        pass


class Logbook:
    """Writes into the journal what each job is doing.

    Arguments:
        journal: Where to write.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal, self._clock = journal, Clock()
        self._running: dict[str, str] = {}

    def start(self, job: Job) -> None:
        self._running[job.id] = "starting"

    def event(self, job: Job, event: Event) -> None:
        if isinstance(event, Waits | Lost):
            self._running.pop(job.id, None)
        elif not isinstance(event, Noticed):
            self._running[job.id] = self._clock.describe(job, event)

    def end(self, outcome: Outcome) -> None:
        self._running.pop(outcome.job.id, None)

    def tick(self, seconds_left: float | None) -> None:
        self._journal.write(self._running, seconds_left)


class Clock:
    """Turns events into words, with the time left in the current stage."""

    def __init__(self) -> None:
        self._starts: dict[tuple[str, str], tuple[int, float]] = {}

    def describe(self, job: Job, event: Event) -> str:
        """Return an event in words; empty if there is nothing to say."""
        if isinstance(event, contract.Progress):
            return self._progress(job, event.point)
        if isinstance(event, Noticed):
            return f"warning: {event.text}"
        if isinstance(event, Lost):
            return f"lost, and started again: {event.reason}"
        return event.step if isinstance(event, Began) else ""

    def _progress(self, job: Job, point: Point) -> str:
        now = time.monotonic()
        first, start = self._starts.setdefault((job.id, point.stage), (point.step, now))
        values = ", ".join(f"{name} {value:.4g}" for name, value in point.values.items())
        text = plain(f"{point.stage} {point.step}/{point.n_steps}, {values}", 200)
        if point.step > first:
            left = (now - start) / (point.step - first) * (point.n_steps - point.step)
            text += f", {duration(left)} left"
        return text


def duration(seconds: float) -> str:
    """Return a duration as a person reads it.

    Example:
        >>> duration(75), duration(7323)
        ('1:15', '2:02:03')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def make_display(store: Store, n_jobs: int, is_wanted: bool = True) -> PlainDisplay:
    """Return the display that suits the error stream."""
    if not is_wanted:
        return SilentDisplay(store, n_jobs)
    is_terminal = Console(stderr=True, force_jupyter=False).is_terminal
    return (LiveDisplay if is_terminal else PlainDisplay)(store, n_jobs)

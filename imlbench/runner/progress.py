"""What the user sees while jobs run: a live line per job on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.text import Text

from imlbench.plan.jobs import Job
from imlbench.records.folder import JobFolder
from imlbench.records.record import Point, Status
from imlbench.runner.context import Event
from imlbench.runner.local import Outcome

_STYLES = {Status.DONE: "green", Status.INTERRUPTED: "yellow"}


class PlainDisplay:
    """Lines for logs and pipes: starts, ends, and progress every few seconds.

    Arguments:
        n_jobs: How many jobs there are in all.
        interval: Least seconds between two progress lines of one job.
    """

    def __init__(self, n_jobs: int, interval: float = 10.0) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True, force_jupyter=False)
        self._n_jobs, self._n_ended, self._interval = n_jobs, 0, interval
        self._last: dict[str, float] = {}
        self._clock = _Clock()

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def start(self, job: Job, device: str) -> None:
        self._last[job.id] = time.monotonic()
        self.console.print(f"{job}: started on {device}", markup=False)

    def event(self, job: Job, event: Event) -> None:
        progress = self._clock.describe(job, event)
        if progress and time.monotonic() - self._last[job.id] >= self._interval:
            self._last[job.id] = time.monotonic()
            self.console.print(f"{job}: {progress}", markup=False)

    def end(self, outcome: Outcome, folder: JobFolder) -> None:
        self._n_ended += 1
        line = Text(f"[{self._n_ended}/{self._n_jobs}] {outcome.job}: ")
        line.append(outcome.status, _STYLES.get(outcome.status, "red"))
        if outcome.reused:
            line.append(" (reused)")
        elif outcome.status is Status.DONE:
            line.append(f" in {outcome.seconds:.0f} s")
        else:
            line.append(f": {outcome.reason.rstrip('.')}. Log: {folder.log}")
        self.console.print(line)


class LiveDisplay(PlainDisplay):
    """One moving line for each running job; what has ended scrolls away above."""

    def __init__(self, n_jobs: int) -> None:
        super().__init__(n_jobs)
        self._tasks: dict[str, TaskID] = {}
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[detail]}"),
            console=self.console,
            transient=True,
        )

    def __enter__(self) -> LiveDisplay:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def start(self, job: Job, device: str) -> None:
        self._tasks[job.id] = self._progress.add_task(
            escape(str(job)), total=None, detail="starting"
        )

    def event(self, job: Job, event: Event) -> None:
        task = self._tasks[job.id]
        if isinstance(event, str):
            self._progress.update(task, completed=0, total=None, detail=event)
        else:
            detail = self._clock.describe(job, event)
            self._progress.update(
                task, completed=event.step, total=event.n_steps, detail=escape(detail)
            )

    def end(self, outcome: Outcome, folder: JobFolder) -> None:
        task = self._tasks.pop(outcome.job.id, None)
        if task is not None:
            self._progress.remove_task(task)
        super().end(outcome, folder)


class _Clock:
    """Turns progress events into words, with the time left in the current stage."""

    def __init__(self) -> None:
        self._starts: dict[tuple[str, str], tuple[int, float]] = {}

    def describe(self, job: Job, event: Event) -> str:
        if not isinstance(event, Point):
            return ""
        step, n_steps = event.step, event.n_steps
        now = time.monotonic()
        first, start = self._starts.setdefault((job.id, event.stage), (step, now))
        values = ", ".join(f"{name} {value:.4g}" for name, value in event.values.items())
        text = f"{event.stage} {step}/{n_steps}, {values}"
        if step > first:
            left = (now - start) / (step - first) * (n_steps - step)
            text += f", {left // 60:.0f}:{left % 60:02.0f} left"
        return text


class SilentDisplay(PlainDisplay):
    """Shows nothing."""

    def start(self, job: Job, device: str) -> None:
        pass

    def event(self, job: Job, event: Event) -> None:
        pass

    def end(self, outcome: Outcome, folder: JobFolder) -> None:
        pass


def make_display(n_jobs: int, is_wanted: bool = True) -> PlainDisplay:
    """Return the display that suits the error stream."""
    if not is_wanted:
        return SilentDisplay(n_jobs)
    return (
        LiveDisplay(n_jobs)
        if Console(stderr=True, force_jupyter=False).is_terminal
        else PlainDisplay(n_jobs)
    )

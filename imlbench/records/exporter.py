"""Logging to MLflow beside a run, in a process of its own: ``-m imlbench.records.exporter PARENT``.

Whatever MLflow does, it can neither hold up the run nor break it: the process gets the names of
jobs as lines of JSON, answers by lines of JSON, and is killed if it no longer answers.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imlbench.processes import die_with_parent, python_path
from imlbench.records.exported import Exported, unreachable
from imlbench.records.folder import JobFolder, Store

if TYPE_CHECKING:
    from imlbench.records.tracking import Tracker

_NICENESS = 5  # jobs have precedence
_REST = 60.0  # seconds during which a server that was away is not asked again
_LONGEST_LOG = 1 << 20
_MOST_NAMES = 5
_MOST_DEATHS = 3

_Line = dict[str, Any]


class Exporter:
    """Has jobs logged to MLflow as they end, by a process that is started when it is needed.

    Arguments:
        store: The results folder.
        uri: A tracking URI; by default ``$MLFLOW_TRACKING_URI``, or the database in the folder.
        with_tensors: Log checkpoints and samples, too.
    """

    def __init__(self, store: Store, uri: str | None = None, *, with_tensors: bool = False) -> None:
        self._store, self._with_tensors = store, with_tensors
        self._uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._child: _Child | None = None
        self._exported: Exported | None = None
        self._n_deaths = 0
        self._at = ""
        self._problem = ""
        self._refused: dict[str, str] = {}
        self._notes: list[str] = []

    def begin(self) -> None:
        """Start the process: it imports MLflow while the first job runs."""
        if self._start():
            self.poll()

    def submit(self, job_ids: Sequence[str]) -> None:
        """Have jobs logged that have ended; return at once, whatever the server does."""
        if self._exported is None:
            self._exported = Exported.read(self._store)
        jobs = [job for job in job_ids if self._lacks(self._exported, self._store.folder(job))]
        self.poll()
        if jobs and self._n_deaths < _MOST_DEATHS and self._start():
            self._send({"jobs": jobs})
            self.poll()

    def poll(self) -> None:
        """Take the answers that have come; return at once."""
        if self._child is not None:
            self._receive(self._child.exchange(0.0))

    def finish(self, jobs: Sequence[str] | None = None, patience: float = 60.0) -> list[str]:
        """Have everything logged that the server lacks, and wait for it.

        Arguments:
            jobs: Only these; by default all that are in the folder.
            patience: Seconds without any progress after which no more is waited.

        Returns:
            What the user has to know, one line each; empty if everything is logged.
        """
        try:
            self.poll()
            if self._child is not None or self._lacks_any(jobs):
                named = None if jobs is None else list(jobs)
                for _ in range(2):  # a process that died is replaced once
                    if self._finish(named, patience):
                        break
            return self._messages()
        finally:
            self.close()

    def close(self) -> None:
        """Let the process end; what it has not logged, the next run logs."""
        if self._child is not None:
            self._child.close()
        self._child, self._exported, self._n_deaths, self._at = None, None, 0, ""

    def _finish(self, jobs: list[str] | None, patience: float) -> bool:
        """Have everything logged; False if the process died."""
        self._problem = ""
        if not self._start():
            return True
        self._send({"finish": jobs, "last": self._at})  # last, as the process may have died of it
        deadline = time.monotonic() + patience
        while self._child is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                self._child.kill()
                self._child = None
                self._problem = self._cannot(f"there was no answer for {patience:g} s")
                return True
            answers = self._child.exchange(min(left, 1.0))
            if answers:
                deadline = time.monotonic() + patience
            if self._receive(answers):
                return True
        return False

    def _lacks_any(self, jobs: Sequence[str] | None) -> bool:
        """Whether the process has to be asked; a server has, once there is something to log."""
        folders = self._store if jobs is None else [self._store.folder(job) for job in jobs]
        exported = Exported.read(self._store)
        return any(self._lacks(exported, folder) for folder in folders)

    def _lacks(self, exported: Exported, folder: JobFolder) -> bool:
        if self._uri:
            exported = Exported(self._store)
        return exported.lacks(folder, with_tensors=self._with_tensors)

    def _start(self) -> bool:
        """Start the process if none runs; False if there can be none."""
        if self._child is None:
            settings = {
                "results": str(self._store.root.resolve()),
                "uri": self._uri,
                "with_tensors": self._with_tensors,
            }
            try:
                self._child = _Child(self._store, settings)
            except OSError as error:
                self._problem = self._cannot(f"its process cannot be started: {error.strerror}")
                return False
        return True

    def _send(self, line: _Line) -> None:
        assert self._child is not None
        self._child.outbox += _encoded(line)

    def _receive(self, answers: Sequence[_Line]) -> bool:
        """Note what the process has answered; True if it is done."""
        is_done = False
        for answer in answers:
            if "at" in answer:
                self._at = answer["at"]
            elif "refused" in answer:
                self._refused[answer["refused"]] = answer["reason"]
            elif "logged" in answer:
                self._refused.pop(answer["logged"], None)
            elif "note" in answer:
                self._notes.append(answer["note"])
            elif "done" in answer:
                is_done, self._problem = True, answer["done"]
        if self._child is not None and self._child.is_silent:
            code = self._child.kill()
            self._child = None
            if not is_done:
                self._n_deaths += 1
                where = f" while it logged job {self._at}" if self._at else ""
                self._problem = self._cannot(f"its process ended with exit code {code}{where}")
        return is_done

    def _cannot(self, reason: str) -> str:
        uri = self._uri or f"sqlite:///{self._store.root.resolve() / 'mlflow.db'}"
        return unreachable(uri, self._store, reason)

    def _messages(self) -> list[str]:
        """Return what the user has to know, once."""
        refused = [_of_refused(self._refused)] if self._refused else []
        messages = [*self._notes, *refused, *filter(None, [self._problem])]
        self._notes, self._refused, self._problem = [], {}, ""
        return messages


def _of_refused(refused: dict[str, str]) -> str:
    """Return one sentence about the jobs that could not be logged."""
    names = sorted(refused)
    shown = ", ".join(names[:_MOST_NAMES])
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    jobs = "job" if len(names) == 1 else "jobs"
    return (
        f"{jobs} {shown}{more} could not be logged to MLflow ({refused[names[0]]}); "
        "the others were."
    )


class _Child:
    """The process, and what is on the way to it and from it.

    Arguments:
        store: The results folder.
        settings: What it has to know first.

    Attributes:
        outbox: What has not been sent yet.
        is_silent: It has closed its output, and ends or has ended.
    """

    def __init__(self, store: Store, settings: _Line) -> None:
        with _log(store) as log:
            self._process = subprocess.Popen(
                # -P: the folder that this was started in is no place to import from.
                [sys.executable, "-P", "-m", "imlbench.records.exporter", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # the parent decides on Ctrl-C
                env={**os.environ, "PYTHONPATH": python_path()},
                bufsize=0,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        for pipe in (self._stdin, self._stdout):
            os.set_blocking(pipe.fileno(), False)
        self.outbox = _encoded(settings)
        self.is_silent = False
        self._rest = b""

    def exchange(self, timeout: float) -> list[_Line]:
        """Send and take what can be; wait at most ``timeout`` seconds for something to come."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            while self.outbox:
                self.outbox = self.outbox[os.write(self._stdin.fileno(), self.outbox) :]
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdout, selectors.EVENT_READ)
            if self.outbox:
                selector.register(self._stdin, selectors.EVENT_WRITE)
            selector.select(timeout)
        content = b""
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self._stdout.fileno(), 1 << 16):
                content += part
            self.is_silent = True
        *lines, self._rest = (self._rest + content).split(b"\n")
        return list(_parsed(lines))

    def kill(self) -> int:
        """End the process and all that it has started; return its exit code."""
        if self.is_silent:  # it is ending by itself
            self._wait(1.0)
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._stdin.close()
        self._stdout.close()
        return self._process.wait()

    def close(self) -> None:
        """Let the process end, which has nothing to do any more."""
        self._stdin.close()
        self._wait(2.0)
        self.kill()

    def _wait(self, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=seconds)


@contextlib.contextmanager
def _log(store: Store) -> Iterator[Any]:
    """Open the file for what MLflow prints; where it cannot be written, nothing is kept."""
    path = store.root / "locks" / "exporter.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_long = path.exists() and path.stat().st_size > _LONGEST_LOG
        log = path.open("wb" if is_long else "ab")
    except OSError:
        yield subprocess.DEVNULL
        return
    with log:
        yield log


def _encoded(line: _Line) -> bytes:
    return json.dumps(line).encode() + b"\n"


def _parsed(lines: Sequence[bytes]) -> Iterator[_Line]:
    for line in lines:
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def main() -> None:
    """Log jobs as they are named by lines of the standard input, until it ends."""
    die_with_parent(int(sys.argv[1]))
    with contextlib.suppress(OSError):
        os.nice(_NICENESS)
    answers = os.dup(1)
    os.dup2(2, 1)  # what MLflow prints goes to the log
    first, *_ = _parsed([sys.stdin.buffer.readline()])
    service = _Service(first, answers)
    service.prepare()
    while line := sys.stdin.buffer.readline():
        for order in _parsed([line]):
            service.follow(order)
    service.close()
    os._exit(0)  # nothing of MLflow's is waited for


class _Service:
    """What the process does.

    Arguments:
        settings: The results folder, the tracking URI, and what is to be logged.
        answers: The file descriptor for answers.
    """

    def __init__(self, settings: _Line, answers: int) -> None:
        self._settings, self._answers = settings, answers
        self._store = Store(Path(settings["results"]))
        self._tracker: Tracker | None = None
        self._problem = ""
        self._rest_until = 0.0

    def prepare(self) -> None:
        """Import MLflow, which takes seconds; what is wrong with it, the first job shows."""
        gc.disable()  # what is imported stays: to look through it again and again takes a fifth
        with contextlib.suppress(Exception):
            self._open().prepare()
        gc.freeze()
        gc.enable()

    def follow(self, order: _Line) -> None:
        """Log the jobs that are named, or, to finish, whatever is missing; then say so."""
        if "jobs" in order:
            self._export(order["jobs"])
            return
        named = order["finish"]
        jobs = [folder.path.name for folder in self._store] if named is None else named
        last = order["last"]
        self._export(sorted(jobs, key=lambda job: (job == last, job)))
        if not self._problem and self._tracker is not None:
            self._tracker.confirm()
        self._answer({"done": self._problem})

    def close(self) -> None:
        """Let go of the database."""
        if self._tracker is not None:
            self._tracker.close()

    def _export(self, jobs: Sequence[str]) -> None:
        """Log jobs, but for a while after a failure: everything is looked through at the end."""
        if time.monotonic() < self._rest_until:
            return
        tracker = self._open()
        tracker.export([self._store.folder(job) for job in jobs])
        for note in tracker.notes:
            self._answer({"note": note})
        tracker.notes.clear()
        self._problem = tracker.problem
        if self._problem:
            self.close()
            self._tracker, self._rest_until = None, time.monotonic() + _REST

    def _open(self) -> Tracker:
        if self._tracker is None:
            from imlbench.records.tracking import Tracker

            self._answer({"alive": ""})
            uri, with_tensors = self._settings["uri"], self._settings["with_tensors"]
            self._tracker = Tracker(
                self._store, uri, with_tensors=with_tensors, report=self._report
            )
        return self._tracker

    def _report(self, what: str, job: str, reason: str) -> None:
        self._answer({what: job, "reason": reason} if reason else {what: job})

    def _answer(self, line: _Line) -> None:
        try:
            os.write(self._answers, _encoded(line))
        except BrokenPipeError:
            os._exit(1)  # the parent is gone, and the next run logs the rest


if __name__ == "__main__":
    main()

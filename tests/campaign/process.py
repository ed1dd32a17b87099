"""Commands as processes: started, watched, and cleaned up by a mark in their environment."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MARK = "CAMPAIGN_ID"
PATIENCE = 300.0
"""Seconds after which a command hangs; the slowest takes a tenth of it."""

GONE_AFTER = 10.0
"""Seconds that processes may take to end after the command that started them."""

_CAMPAIGN = f"{os.getpid()}-"
"""How all marks of this campaign begin."""

_OURS = ("IMLBENCH_", "MLFLOW_", "_MLFLOW_")


@dataclass(frozen=True)
class Answer:
    """How a command ended.

    Arguments:
        arguments: What it was.
        code: Its exit status, negative for a signal; ``None`` if it hung.
        out: Its standard output.
        err: Its standard error.
        seconds: Wall time.
        peak_bytes: The most memory that one of its processes had.
        left: The command lines of processes that outlived it.
    """

    arguments: tuple[str, ...]
    code: int | None
    out: str
    err: str
    seconds: float
    peak_bytes: int
    left: tuple[str, ...]

    @property
    def text(self) -> str:
        """Everything that it printed."""
        return self.out + self.err


@dataclass(frozen=True)
class Process:
    """A running process that bears a mark."""

    pid: int
    parent: int
    session: int
    command: str


def marked(mark: str) -> list[Process]:
    """Return the running processes with a mark, or the beginning of one; zombies do not run."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            with contextlib.suppress(OSError, IndexError, ValueError):
                process = _read_process(int(entry.name), f"{MARK}={mark}".encode())
                found += [process] if process else []
    return found


def _read_process(pid: int, mark: bytes) -> Process | None:
    folder = Path(f"/proc/{pid}")
    if b"\0" + mark not in b"\0" + (folder / "environ").read_bytes():
        return None
    state, parent, _, session, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
    if state in "ZX":
        return None
    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return Process(pid, int(parent), int(session), command)


def kill_marked(mark: str = _CAMPAIGN) -> None:
    """End all processes with a mark, by default all of this campaign, and what they start."""
    while found := marked(mark):
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.01)


class Running:
    """A command that was started.

    Arguments:
        process: The process.
        arguments: What it is.
        mark: What its processes bear in their environment.
        logs: The files of its standard output and standard error.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        arguments: Sequence[str],
        mark: str,
        logs: tuple[Path, Path],
    ) -> None:
        self.process, self.mark = process, mark
        self._arguments, self._logs = tuple(arguments), logs
        self._start = time.monotonic()
        self._usage = 0

    @property
    def seconds(self) -> float:
        """How long it has been running."""
        return time.monotonic() - self._start

    def wait(self, timeout: float = PATIENCE) -> Answer:
        """Wait for its end, then for that of all its processes; what hangs or is left is killed."""
        ended = self.ends_within(timeout)
        seconds = self.seconds
        left = self._wait_for_others() if ended else [p.command for p in marked(self.mark)]
        kill_marked(self.mark)
        self._reap()
        out, err = (path.read_text(encoding="utf-8", errors="replace") for path in self._logs)
        code = self.process.returncode if ended else None
        return Answer(self._arguments, code, out, err, seconds, self._usage, tuple(left))

    def ends_within(self, seconds: float) -> bool:
        """Wait for the end of the command itself; whether it came in time."""
        if self.process.returncode is not None:
            return True
        try:
            handle = os.pidfd_open(self.process.pid)
        except ProcessLookupError:
            return True
        try:
            ended = bool(select.select([handle], [], [], max(0.0, seconds))[0])
        finally:
            os.close(handle)
        if ended:
            self._reap()
        return ended

    def _reap(self) -> None:
        if self.process.returncode is None:
            _, status, usage = os.wait4(self.process.pid, 0)
            self.process.returncode = os.waitstatus_to_exitcode(status)
            self._usage = usage.ru_maxrss * 1024

    def _wait_for_others(self) -> list[str]:
        end = time.monotonic() + GONE_AFTER
        while (others := marked(self.mark)) and time.monotonic() < end:
            time.sleep(0.05)
        return [process.command for process in others]

    def others(self) -> list[Process]:
        """Return its processes but for the first."""
        return [process for process in marked(self.mark) if process.pid != self.process.pid]


class Place:
    """A folder of its own to run commands in.

    Arguments:
        folder: An empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work = folder / "work"
        self.site = folder / "site"
        self.cache = folder / "cache"
        for path in (self.work, self.site, self.cache, folder / "tmp"):
            path.mkdir(parents=True, exist_ok=True)
        self.environment: dict[str, str] = {}
        self.prefix: tuple[str, ...] = ()
        self._n_started = 0

    @property
    def results(self) -> Path:
        """The results folder."""
        return self.work / "results"

    def start(
        self,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        before: Callable[[], None] | None = None,
        terminal: int | None = None,
        **options: object,
    ) -> Running:
        """Start ``imlbench`` with some arguments, as the leader of a process group.

        Arguments:
            arguments: Of the command line.
            environment: What is added to its environment.
            before: Called in the new process before anything else.
            terminal: A file descriptor for its three streams, instead of files.
            options: Passed on to :class:`subprocess.Popen`.
        """
        self._n_started += 1
        logs = tuple(self.folder / f"{self._n_started}.{name}" for name in ("out", "err"))
        mark = f"{_CAMPAIGN}{uuid.uuid4().hex}"
        with logs[0].open("wb") as out, logs[1].open("wb") as err:
            process = subprocess.Popen(
                [*self.prefix, sys.executable, "-m", "imlbench", *arguments],
                cwd=self.work,
                env=self._environment(mark, environment or {}),
                stdin=subprocess.DEVNULL if terminal is None else terminal,
                stdout=out if terminal is None else terminal,
                stderr=err if terminal is None else terminal,
                start_new_session=True,
                preexec_fn=_prepared(before),
                **options,  # type: ignore[call-overload]
            )
        return Running(process, arguments, mark, (logs[0], logs[1]))

    def imlbench(
        self,
        *arguments: str,
        timeout: float = PATIENCE,
        environment: Mapping[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> Answer:
        """Run ``imlbench`` to its end."""
        return self.start(*arguments, environment=environment, before=before).wait(timeout)

    def _environment(self, mark: str, more: Mapping[str, str]) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(_OURS)}
        path = os.pathsep.join(filter(None, [str(self.site), inherited.get("PYTHONPATH", "")]))
        return {
            **inherited,
            "PYTHONPATH": path,
            "IMLBENCH_CACHE": str(self.cache),
            "TMPDIR": str(self.folder / "tmp"),
            MARK: mark,
            **self.environment,
            **more,
        }


def _prepared(before: Callable[[], None] | None) -> Callable[[], None]:
    """Return what is done in a new process: Ctrl-C is not ignored, as in the background."""

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if before is not None:
            before()

    return prepare


@contextlib.contextmanager
def on_processors(processors: set[int]) -> Iterator[None]:
    """Let this thread, and what it starts, run on some processors only."""
    former = os.sched_getaffinity(0)
    os.sched_setaffinity(0, processors)
    try:
        yield
    finally:
        os.sched_setaffinity(0, former)

"""The near end of the fork server: starts it, hands it tasks, hears what they say and how they end.

A request is a line of JSON: ``{"task": number, "time_limit": seconds}``, which brings three file
descriptors (what to do; where to tell; the log), ``{"stop": number, "patience": seconds}``,
``{"import": [names]}`` or ``{"suspend": bool}``. What a task says comes by its own pipe.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import IO

from imlbench.errors import UserError
from imlbench.processes import python_path
from imlbench.runner import server

LIMIT = "IMLBENCH_PLUGIN_LIMIT"
"""The environment variable of how long a plugin may take to be imported or asked, in seconds."""

_LONGEST = 1e6

_CLOSED: list[dict[str, object]] = []
"""The answers of a server that is gone."""


@dataclass(frozen=True)
class Exit:
    """A task's process has ended.

    Arguments:
        code: Its exit code; negative for a signal.
        is_timed_out: Whether its time was over.
        is_lost: Whether the server has ended, and the task with it.
    """

    code: int
    is_timed_out: bool = False
    is_lost: bool = False

    @property
    def was_killed(self) -> bool:
        """Whether somebody else may have ended it, so that it deserves another try."""
        return self.is_lost or self.code < 0

    def __str__(self) -> str:
        if self.is_lost:
            return "the server of processes died"
        if self.code < 0:
            with contextlib.suppress(ValueError):
                return f"the process was ended by {signal.Signals(-self.code).name}"
        return f"the process ended with exit code {self.code}, without a word"


class TaskDied(Exception):
    """A task has ended without an answer.

    Arguments:
        step: What it was doing.
        reason: How it ended.
        was_killed: Whether somebody else may have ended it.
    """

    def __init__(self, step: str, reason: str, was_killed: bool = False) -> None:
        super().__init__(f"{step}: {reason}" if step else reason)
        self.step, self.reason, self.was_killed = step, reason, was_killed


@dataclass
class _Task:
    events: int
    pid: int | None = None
    exit: Exit | None = None
    is_silent: bool = False
    rest: bytearray = field(default_factory=bytearray)
    lines: list[bytes] = field(default_factory=list)

    def read(self) -> None:
        """Take what has come."""
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self.events, 1 << 16):
                head, *tail = part.split(b"\n")
                self.rest += head  # in place: the line of a plan can be of 100 MB
                for begun in tail:
                    self.lines.append(bytes(self.rest))
                    self.rest = bytearray(begun)
            self.is_silent = True


class Pool:
    """Processes that begin warm.

    A context manager; everything that runs ends with it.

    Attributes:
        broken: Plugins that were left out, and why.
    """

    def __init__(self) -> None:
        self.broken: dict[str, str] = {}
        self._barred: dict[str, str] = {}
        self._killed: set[str] = set()  # what was being imported when a server was killed
        self._preloaded: set[str] = set()
        self._process: subprocess.Popen[bytes] | None = None
        self._tasks: dict[int, _Task] = {}
        self._number = 0
        self._rest, self._is_ready = b"", False

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @staticmethod
    def limit(usual: float = 60.0) -> float:
        """Return how long a plugin may be silent, in seconds.

        Arguments:
            usual: If ``$IMLBENCH_PLUGIN_LIMIT`` does not say it.

        Raises:
            UserError: ``$IMLBENCH_PLUGIN_LIMIT`` is no number of seconds.
        """
        text = os.environ.get(LIMIT) or str(usual)
        try:
            seconds = float(text)
        except ValueError:
            seconds = 0.0
        if not 0 < seconds <= _LONGEST:
            raise UserError(f"{LIMIT}: must be a number of seconds; got '{text}'. Change it.")
        return seconds

    def begin(self) -> None:
        """Start the server, if it does not run, without waiting until it is ready."""
        if self._process is not None:
            return
        self._control, far = socket.socketpair()
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - until the server ends
        self._rest, self._is_ready, self._preloaded = b"", False, set()
        with far:
            self._process = subprocess.Popen(
                # -P: the folder that this was started in is no place to import from.
                [sys.executable, "-P", "-m", server.MODULE, str(far.fileno()), self._bars()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(far.fileno(),),
                start_new_session=True,
                env=_environment(),
            )

    def start(self) -> None:
        """Start the server, unless it runs; a plugin that ends it is left out.

        Raises:
            UserError: The plugins contradict each other, or the server cannot be started.
        """
        while self._process is None or not self._is_ready:
            self.begin()
            died = self._greet()
            if died is None:
                continue
            if died.was_killed and died.step not in self._killed:
                self._killed.add(died.step)
            elif not died.step or died.step in self._barred:
                raise UserError(f"the server of processes cannot be started: {died.reason}.")
            else:
                self._barred[died.step] = died.reason

    def _greet(self) -> TaskDied | None:
        """Wait until the server is ready; return how it ended, and while importing what, if so."""
        assert self._process is not None
        importing, patience = "", self.limit()
        while True:
            self._control.settimeout(patience)
            try:
                answers = self._receive()
            except TimeoutError:
                self._abandon()
                return TaskDied(importing, f"importing it took more than {patience:g} s")
            for answer in answers:
                importing = str(answer.get("importing", importing))
                if "errors" in answer:
                    self._abandon()
                    raise UserError(*answer["errors"])  # type: ignore[misc]
                if "ready" in answer:
                    self.broken = dict(answer["broken"])  # type: ignore[call-overload]
                    self._control.setblocking(False)
                    self._is_ready = True
                    return None
            if answers is _CLOSED:
                end = Exit(self._process.wait())
                self._abandon()
                reason = f"importing it ended the process ({end})"
                return TaskDied(importing, reason, end.was_killed)

    def _bars(self) -> str:
        return json.dumps(self._barred)

    def _receive(self) -> Sequence[dict[str, object]]:
        """Return the server's answers; ``_CLOSED`` if it is gone."""
        try:
            content = self._control.recv(1 << 16)
        except BlockingIOError:
            return []
        except ConnectionError:
            content = b""
        *lines, self._rest = (self._rest + content).split(b"\n")
        return [json.loads(line) for line in lines] if content else _CLOSED

    def submit(
        self, request: bytes, log: IO[bytes] | None = None, time_limit: float | None = None
    ) -> int:
        """Start a task, and return the number that it is called by.

        Arguments:
            request: What to do, as JSON; see :mod:`imlbench.runner.tasks`.
            log: Where it prints.
            time_limit: Seconds that it may take.
        """
        self.start()
        self._number += 1
        receiver, sender = os.pipe()
        os.set_blocking(receiver, False)
        with tempfile.TemporaryFile() as task:
            task.write(request)
            task.flush()
            task.seek(0)
            printed = (log or self._log).fileno()
            self._tasks[self._number] = _Task(receiver)
            self._ask(
                {"task": self._number, "time_limit": time_limit}, task.fileno(), sender, printed
            )
        os.close(sender)
        return self._number

    def _ask(self, request: dict[str, object], *descriptors: int) -> None:
        with contextlib.suppress(OSError):  # the server is gone: the next wait says so
            line = json.dumps(request).encode() + b"\n"
            self._control.setblocking(True)
            socket.send_fds(self._control, [line], descriptors)
        self._control.setblocking(False)

    def stop(self, number: int, patience: float = server.PATIENCE) -> None:
        """End a task and all that it has started; its exit comes by :meth:`wait`."""
        self._ask({"stop": number, "patience": patience})

    def suspend(self, is_wanted: bool) -> None:
        """Suspend all tasks, or let them go on."""
        if self._process is not None:
            self._ask({"suspend": is_wanted})

    def preload(self, names: Sequence[str]) -> None:
        """Let the server import modules that a task had to import, so that later ones need not."""
        new = [name for name in names if name not in self._preloaded]
        if new:
            self._preloaded.update(new)
            self._ask({"import": new})

    def wait(self, seconds: float) -> list[tuple[int, bytes | Exit]]:
        """Return what tasks have said, and how they ended, as soon as there is something.

        Arguments:
            seconds: Return after this long even if there is nothing.
        """
        if self._process is None:  # until the next task is submitted
            time.sleep(seconds)
            return []
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            for task in self._tasks.values():
                if not task.is_silent:
                    selector.register(task.events, selectors.EVENT_READ)
            selector.select(seconds)
        answers = self._receive()
        for answer in answers:
            known = self._tasks.get(int(str(answer.get("ended", answer.get("task")))))
            if known is not None and "pid" in answer:
                known.pid = int(str(answer["pid"]))
            elif known is not None:
                known.exit = Exit(int(str(answer["code"])), bool(answer["timed_out"]))
        if answers is _CLOSED:
            self._end_lost()
        return self._take()

    def _end_lost(self) -> None:
        """The server is gone: nothing that it has started may be left."""
        for task in self._tasks.values():
            if task.pid is not None and task.exit is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(task.pid, signal.SIGKILL)
            task.exit = task.exit or Exit(0, is_lost=True)
        self._abandon()

    def _take(self) -> list[tuple[int, bytes | Exit]]:
        found: list[tuple[int, bytes | Exit]] = []
        for number, task in list(self._tasks.items()):
            task.read()
            found += [(number, line) for line in task.lines]
            task.lines.clear()
            if task.exit is not None:
                found.append((number, task.exit))
                os.close(task.events)
                del self._tasks[number]
        return found

    def call(
        self,
        request: bytes,
        tell: Callable[[str], None] = lambda step: None,
        limit: float | None = None,
    ) -> bytes:
        """Carry out a task while nothing else runs, and return its answer, as JSON.

        One that is killed is tried once more.

        Arguments:
            request: What to do.
            tell: Called with each step.
            limit: Seconds that it may be silent; without one, for ever.

        Raises:
            UserError: The task says that something is wrong.
            TaskDied: It has ended, or had to be ended, without an answer.
        """
        try:
            return self._call(request, tell, limit)
        except TaskDied as died:
            if not died.was_killed:
                raise
        return self._call(request, tell, limit)

    def _call(self, request: bytes, tell: Callable[[str], None], limit: float | None) -> bytes:
        number, step, answer, silent, reason = self.submit(request), "", None, 0.0, ""
        while True:
            before = time.monotonic()
            news = self.wait(1.0)
            silent = 0.0 if news else silent + min(time.monotonic() - before, 2.0)
            if limit is not None and silent > limit and not reason:
                reason = f"it took more than {limit:g} s"
                self.stop(number, 0.5)
            for _, said in news:
                if isinstance(said, Exit):
                    if answer is None:
                        raise TaskDied(step, reason or str(said), said.was_killed and not reason)
                    if answer.startswith(b'{"errors"'):
                        raise UserError(*json.loads(answer)["errors"])
                    return answer
                if said.startswith(b'{"step"'):
                    step = json.loads(said)["step"]
                    tell(step)
                elif said.startswith(b'{"imported"'):
                    self.preload(json.loads(said)["imported"])
                else:
                    answer = said

    def close(self) -> None:
        """End the server and everything that runs."""
        if self._process is not None:
            if self._tasks:
                for task in self._tasks.values():
                    os.close(task.events)
                self._tasks.clear()
                self._control.close()  # which the server takes as the end of them
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=2 * server.PATIENCE)
            self._abandon()

    def _abandon(self) -> None:
        """Forget the server, which is or must be gone."""
        assert self._process is not None
        self._control.close()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._process = None
        self._log.close()


def _environment() -> dict[str, str]:
    """Return the environment of the server: folders are named as seen from anywhere."""
    found = {**os.environ, "PYTHONPATH": python_path()}
    for name in ("IMLBENCH_DATA", "IMLBENCH_CACHE"):
        if found.get(name):
            found[name] = os.path.abspath(found[name])
    return found

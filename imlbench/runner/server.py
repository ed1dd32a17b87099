"""The fork server: a process that has imported what jobs need, and forks one process for each task.

It never runs a plugin's code beyond importing it, never touches an accelerator, and has one thread,
so that its children begin where a new interpreter would be after seconds of imports. Each child is
a session of its own; when it has ended, for whatever reason, everything that it had started ends,
too: whatever is orphaned below the server becomes the server's child (Linux) and is killed. When
the process that started the server is gone, the server ends everything and itself.

``python -m imlbench.runner.server FD BARRED`` serves at a socket; requests and answers are lines of
JSON, see :mod:`imlbench.runner.pool`. ``python -m imlbench.runner.server --task TASK EVENTS BEGIN
BARRED`` carries out one task in a process that was not forked from the server.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from imlbench.errors import UserError
from imlbench.processes import adopt_orphans, die_with_parent, outlive_parent

if TYPE_CHECKING:
    from imlbench.plan.registry import Registry

MODULE = "imlbench.runner.server"
_TICK = 1.0
_LULL = 0.05
"""Seconds without a request after which there is nothing else to do."""
_SUSPENDED = 0.1
"""How much suspended time counts: a task that suspends itself must end some day."""
_LONGEST_IMPORT = 600.0
"""Seconds that a task in a new interpreter may take to begin: all plugins are imported again."""
PATIENCE = 5.0
"""Seconds between asking a process to end and ending it."""


def main() -> None:
    """Serve, or carry out one task."""
    # cuBLAS reads it when it starts, and without it may round another way every time.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    barred: dict[str, str] = json.loads(sys.argv[-1])
    if sys.argv[1] == "--task":
        from imlbench.runner.tasks import carry_out

        task, events, begin = map(int, sys.argv[2:5])
        registry = load_registry(barred)
        os.write(begin, b"!")
        carry_out(task, events, registry)
    _Server(socket.socket(fileno=int(sys.argv[1])), barred).serve()


def load_registry(
    barred: Mapping[str, str], announce: Callable[[str], None] = lambda name: None
) -> Registry:
    """Import torch and all plugins, with one thread: more of them would not survive a fork."""
    import torch

    from imlbench.plan.registry import Registry

    torch.set_num_threads(1)
    return Registry(announce=announce, barred=barred)


@dataclass
class _Child:
    """A task's process.

    Arguments:
        number: What the task is called by.
        pid: The process, and its session.
        begun: The end of a pipe that becomes readable when the task begins, after its imports.
        time_limit: Seconds that it may take from then on.
    """

    number: int
    pid: int
    begun: int
    time_limit: float | None
    seconds: float = 0.0
    has_begun: bool = False
    is_timed_out: bool = False
    kill_at: float | None = None

    def signal(self, how: signal.Signals) -> None:
        """Send a signal to everything in its session's group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, how)

    def ask_to_end(self, patience: float) -> None:
        """Ask it to end, and remember when it has to be ended."""
        if self.kill_at is None:
            self.signal(signal.SIGTERM)
            self.signal(signal.SIGCONT)  # one that is suspended would not hear
            self.kill_at = time.monotonic() + patience

    def is_suspended(self) -> bool:
        """Whether somebody has stopped it."""
        return _stat_of(self.pid)[:1] in (["T"], ["t"])


class _Server:
    """The loop: forks what is asked for, and says what has ended."""

    def __init__(self, control: socket.socket, barred: dict[str, str]) -> None:
        self._control, self._barred = control, barred
        self._children: dict[int, _Child] = {}
        self._buffer = b""
        self._descriptors: list[int] = []
        self._is_warm = False

    def serve(self) -> None:
        """Import the plugins, then serve until the other side is gone."""
        gc.disable()  # what is imported stays: to look through it again and again takes a fifth
        adopt_orphans()
        die_with_parent(os.getppid())  # while a plugin is imported: it may hang, and nobody listens
        try:
            self._registry = load_registry(self._barred, lambda name: self._tell(importing=name))
            from imlbench.runner import tasks  # noqa: F401 - children need it at once
        except UserError as error:
            self._tell(errors=error.messages)
            return
        outlive_parent()  # the parent may be a thread, which ends before its process
        gc.freeze()  # children need not copy the pages of what is there to look at it
        gc.enable()
        self._wake, wake = socket.socketpair()
        self._wake.setblocking(False)
        wake.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        broken = {plugin.name: plugin.error for plugin in self._registry.broken}
        self._tell(ready=True, broken=broken)
        try:
            while self._step():
                pass
        finally:
            for child in self._children.values():
                child.signal(signal.SIGKILL)
            self._end_orphans(everything=True)

    def _step(self) -> bool:
        """Do what is due; False if nobody is there any more."""
        before = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(self._wake, selectors.EVENT_READ)
            ready = {key.fileobj for key, _ in selector.select(self._patience())}
        if not (ready or self._is_warm):
            self._warm()
        if self._wake in ready:
            with contextlib.suppress(BlockingIOError):
                self._wake.recv(4096)
        self._reap()
        self._watch(min(time.monotonic() - before, 2 * _TICK))
        return self._control not in ready or self._listen()

    def _patience(self) -> float | None:
        if any(child.kill_at is not None for child in self._children.values()):
            return 0.05
        if not self._is_warm:
            return _LULL
        is_watched = any(c.time_limit or not c.has_begun for c in self._children.values())
        return _TICK if is_watched else None

    def _tell(self, **answer: object) -> None:
        try:
            self._control.sendall(json.dumps(answer).encode() + b"\n")
        except OSError:
            sys.exit(0)

    def _listen(self) -> bool:
        """Read requests and do what they say; False if the other side is gone."""
        try:
            content, descriptors, _, _ = socket.recv_fds(self._control, 1 << 16, 8)
        except OSError:
            return False
        self._descriptors += descriptors
        *lines, self._buffer = (self._buffer + content).split(b"\n")
        for line in lines:
            request = json.loads(line)
            child = self._children.get(request.get("stop", 0))
            if "task" in request:
                self._fork(request["task"], request.get("time_limit"))
            elif "import" in request:
                self._import(request["import"])
            elif "suspend" in request:
                self._suspend(request["suspend"])
            elif child is not None:
                child.ask_to_end(request["patience"])
        return bool(content)

    def _warm(self) -> None:
        """Look at the plugins' code when there is nothing else to do, so that tasks need not."""
        from imlbench.plan.planning import warm

        self._is_warm = True
        with contextlib.suppress(Exception):  # whoever needs the code says what is wrong
            warm(self._registry)

    def _import(self, names: Sequence[str]) -> None:
        """Import what a job has imported, so that the next one need not."""
        for name in names:
            if threading.active_count() == 1 and name not in sys.modules:
                with contextlib.suppress(BaseException):
                    importlib.import_module(name)
        gc.freeze()

    def _suspend(self, is_wanted: bool) -> None:
        for child in self._children.values():
            child.signal(signal.SIGSTOP if is_wanted else signal.SIGCONT)

    def _fork(self, number: int, time_limit: float | None) -> None:
        """Start a task; three descriptors came with it: what to do, where to tell, and the log."""
        descriptors, self._descriptors = self._descriptors[:3], self._descriptors[3:]
        begun, begin = os.pipe()
        server, is_safe = os.getpid(), _is_fork_safe()
        pid = os.fork()
        if pid == 0:
            try:
                self._control.close()
                _become_a_task(server, descriptors[2])
                self._carry_out(descriptors[0], descriptors[1], begin, is_safe)
            finally:
                os._exit(1)
        for descriptor in (*descriptors, begin):
            os.close(descriptor)
        os.set_blocking(begun, False)
        self._children[number] = _Child(number, pid, begun, time_limit)
        self._tell(task=number, pid=pid)

    def _carry_out(self, task: int, events: int, begin: int, is_safe: bool) -> None:
        """In the child: do what is asked, in a new interpreter if this one cannot be trusted."""
        if is_safe:
            from imlbench.runner.tasks import carry_out

            os.write(begin, b"!")
            carry_out(task, events, self._registry)
        for descriptor in (task, events, begin):
            os.set_inheritable(descriptor, True)
        arguments = ["--task", *map(str, (task, events, begin)), json.dumps(self._barred)]
        os.execv(sys.executable, [sys.executable, "-P", "-m", MODULE, *arguments])

    def _reap(self) -> None:
        """Say which tasks have ended, after all that they had started has ended."""
        ended = {}
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                ended[found[0]] = os.waitstatus_to_exitcode(found[1])
        for child in [c for c in self._children.values() if c.pid in ended]:
            del self._children[child.number]
            os.close(child.begun)
            child.signal(signal.SIGKILL)
            self._end_orphans()
            self._tell(ended=child.number, code=ended[child.pid], timed_out=child.is_timed_out)

    def _end_orphans(self, everything: bool = False) -> None:
        """End the processes that tasks have left behind."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            known = set() if everything else {child.pid for child in self._children.values()}
            orphans = [pid for pid in _children_of_this_process() if pid not in known]
            if not orphans:
                return
            for pid in orphans:
                with contextlib.suppress(ProcessLookupError, ChildProcessError):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, os.WNOHANG)
            time.sleep(0.005)

    def _watch(self, seconds: float) -> None:
        """Let time pass for the tasks that have begun, and end those whose time is over."""
        for child in self._children.values():
            if not child.has_begun:
                with contextlib.suppress(BlockingIOError):
                    os.read(child.begun, 1)
                    child.has_begun, child.seconds = True, 0.0
                child.seconds += seconds
                if child.seconds > _LONGEST_IMPORT:
                    child.ask_to_end(PATIENCE)
            elif child.time_limit is not None:
                child.seconds += seconds * (_SUSPENDED if child.is_suspended() else 1.0)
                if child.seconds > child.time_limit and not child.is_timed_out:
                    child.is_timed_out = True
                    child.ask_to_end(PATIENCE)
            if child.kill_at is not None and time.monotonic() > child.kill_at:
                child.signal(signal.SIGKILL)


def _become_a_task(server: int, log: int) -> None:
    """Make this a session of its own, which ends with the server and prints into its log."""
    os.setsid()
    die_with_parent(server)
    adopt_orphans()
    signal.set_wakeup_fd(-1)
    for name in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(name, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDWR)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    sys.stdout, sys.stderr = (  # a plugin may have closed them
        os.fdopen(descriptor, "w", buffering=1, errors="replace", closefd=False)
        for descriptor in (1, 2)
    )
    faulthandler.enable()


def _is_fork_safe() -> bool:
    """Whether a forked process can go on: no accelerator in use, no other thread to hold a lock."""
    import torch

    is_alone = threading.active_count() == 1
    return sys.platform == "linux" and is_alone and not torch.cuda.is_initialized()


def _stat_of(pid: int) -> list[str]:
    """Return what Linux says of a process, from its state and its parent on; else nothing."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _children_of_this_process() -> list[int]:
    """Return the processes that are this one's children now; an empty list where none can say."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if _stat_of(pid)[1:2] == [str(os.getpid())]]


if __name__ == "__main__":
    main()

"""Signals at random moments, to each of a run's processes; a terminal that is closed."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial

from tests.campaign.faults import FaultClass
from tests.campaign.oracle import (
    Problem,
    Truth,
    judge_answer,
    judge_folder,
    rerun,
)
from tests.campaign.process import Place, Process, Running
from tests.campaign.trials import BASIC, Lab, Skipped, Trial, single

MOMENTS = 4
"""Random moments for every signal to every process."""

STOPPED = 1.0
"""Seconds between STOP and CONT."""

Shot = Callable[[int], None]
"""Sends something to a process, or to a process group if the number is negative."""


def _send(how: signal.Signals) -> Shot:
    return lambda pid: os.kill(pid, how)


def _twice(pid: int) -> None:
    os.kill(pid, signal.SIGINT)
    time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGINT)


def _stop_and_continue(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    time.sleep(STOPPED)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


SHOTS: dict[str, Shot] = {
    **{how.name[3:]: _send(how) for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)},
    "INT": _send(signal.SIGINT),
    "INT twice": _twice,
    "STOP and CONT": _stop_and_continue,
}


def _parent(running: Running) -> int | None:
    return running.process.pid


def _group(running: Running) -> int | None:
    return -running.process.pid


def _server(running: Running) -> int | None:
    """Return the process between the first one and a job's; where there is none, the job's."""
    children = [p for p in running.others() if p.parent == running.process.pid]
    return max((p.pid for p in children), key=lambda pid: _n_children(running, pid), default=None)


def _n_children(running: Running, pid: int) -> int:
    return sum(process.parent == pid for process in running.others())


def _job(running: Running) -> int | None:
    """Return a process that leads a session of its own and has started no other."""
    others = running.others()
    parents = {process.parent for process in others}

    def is_job(process: Process) -> bool:
        return process.session == process.pid and process.pid not in parents

    return next((process.pid for process in others if is_job(process)), None)


TARGETS: dict[str, Callable[[Running], int | None]] = {
    "the parent": _parent,
    "the fork server": _server,
    "a job": _job,
    "the process group": _group,
}

CODES = {0, 1, 130, -signal.SIGKILL}
"""Of a disturbed run: all done all the same, a job failed, interrupted, or killed."""


def trials(lab: Lab) -> Iterator[Trial]:
    """Yield a trial for every signal, target and moment."""
    chance = lab.random("signals")
    for target, find in TARGETS.items():
        for shot_name, shot in SHOTS.items():
            for _ in lab.times(MOMENTS):
                moment = chance.uniform(0.02, 0.98)
                name = f"{shot_name} to {target} at {moment:.4f} of the run"
                yield single(name, partial(_shoot, lab, find, shot, moment))
    for _ in lab.times(2 * MOMENTS):
        moment = chance.uniform(0.02, 0.98)
        yield single(f"terminal closed at {moment:.4f} of the run", partial(_hang_up, lab, moment))


def _shoot(
    lab: Lab, find: Callable[[Running], int | None], shot: Shot, moment: float, place: Place
) -> list[Problem]:
    truth = lab.truth(BASIC)
    running = place.start(*truth.arguments)
    if not running.ends_within(moment * truth.seconds):
        pid = find(running)
        while pid is None and not running.ends_within(0.02):
            pid = find(running)
        with contextlib.suppress(ProcessLookupError):
            if pid is not None:
                shot(pid)
    return _judge(running, place, truth)


def _hang_up(lab: Lab, moment: float, place: Place) -> list[Problem]:
    """Close the terminal that a run was started in: the kernel sends SIGHUP, and writing fails."""
    truth = lab.truth(BASIC)
    try:
        master, slave = pty.openpty()
    except OSError as error:
        raise Skipped(f"no terminal: {error.strerror}") from error
    running = place.start(*truth.arguments, terminal=slave, before=_take_terminal)
    os.close(slave)
    os.set_blocking(master, False)
    end = time.monotonic() + moment * truth.seconds
    while time.monotonic() < end and not running.ends_within(0.05):
        with contextlib.suppress(OSError):  # a full terminal would stop the run
            os.read(master, 1 << 16)
    os.close(master)
    return _judge(running, place, truth)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _judge(running: Running, place: Place, truth: Truth) -> list[Problem]:
    answer = running.wait()
    problems = [*judge_answer(answer, {*CODES, -signal.SIGHUP})]
    if answer.code == 0:  # then it says that all is well
        problems += judge_folder(place.results, truth)
    after, _ = rerun(place, truth)
    return [*problems, *after]


CLASS = FaultClass(
    "signals",
    "KILL, TERM, HUP, INT, INT twice, and STOP with CONT a second later, each to the parent, to "
    "the fork server, to a job and to the process group, at random moments of a run of four jobs; "
    "and the terminal of a run is closed.",
    "the run ends with an honest exit status and leaves no process; the same command brings all "
    "jobs to the scores of an undisturbed run.",
    trials,
)

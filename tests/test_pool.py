"""The pool of processes: whoever kills one of them costs time, and nothing else."""

from __future__ import annotations

import os
import signal

import pytest

from imlbench import UserError
from imlbench.runner.calls import describe
from imlbench.runner.pool import Pool


class Killing(Pool):
    """A pool of which the first servers are killed before they are ready, or the first tasks."""

    def __init__(self, *, servers: int = 0, tasks: int = 0) -> None:
        super().__init__()
        self.n_servers, self.n_tasks = servers, tasks
        self._seen: set[int] = set()

    def begin(self) -> None:
        is_new = self._process is None
        super().begin()
        if is_new and self.n_servers:
            self.n_servers -= 1
            os.kill(self._process.pid, signal.SIGKILL)

    def wait(self, seconds):
        for task in self._tasks.values():
            if task.pid and self.n_tasks and task.pid not in self._seen:
                self._seen.add(task.pid)
                self.n_tasks -= 1
                os.kill(task.pid, signal.SIGKILL)
        return super().wait(0.01 if self.n_tasks else seconds)


@pytest.mark.parametrize("killed", [{"servers": 1}, {"tasks": 1}])
def test_what_is_killed_once_is_tried_again(killed):
    with Killing(**killed) as pool:
        assert "iml-gmm" in describe(pool)
        assert (pool.n_servers, pool.n_tasks) == (0, 0)


@pytest.mark.parametrize("killed", [{"servers": 2}, {"tasks": 2}])
def test_what_is_killed_twice_is_told(killed):
    with Killing(**killed) as pool, pytest.raises(UserError, match="ended by SIGKILL"):
        describe(pool)

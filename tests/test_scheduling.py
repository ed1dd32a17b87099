"""Which job comes next: tried with a runner that is told what happens."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from imlbench import Sources, Space
from imlbench.plan.jobs import Codes, Job
from imlbench.records.record import Status
from imlbench.runner.contract import Assignment, Ended, Event, Lost, Waits
from imlbench.runner.scheduling import MOST_TRIES, Outcome, run_jobs

DONE = Ended(status=Status.DONE)


def job(model: str, seed: int = 0) -> Job:
    codes = Codes("fit", "draw", "score")
    return Job(model, "", "data", {}, {}, seed, 10, 1, Space("vector", (2,)), codes)


class Scripted:
    """A runner in which each start of a job ends as the script of its model says."""

    def __init__(self, n_slots: int, **scripts: list[Event]) -> None:
        self.n_slots, self.scripts = n_slots, {m: deque(events) for m, events in scripts.items()}
        self.started: list[str] = []
        self.running: list[Job] = []
        self.most = 0
        self.is_closed = False

    def n_free(self) -> int:
        return self.n_slots - len(self.running)

    def start(self, assignment: Assignment) -> None:
        assert self.n_free() > 0
        self.started.append(assignment.job.model)
        self.running.append(assignment.job)
        self.most = max(self.most, len(self.running))

    def wait(self, seconds: float) -> list[tuple[str, Event]]:
        if not self.running:
            return []
        ended = self.running.pop(0)
        script = self.scripts.get(ended.model)
        return [(ended.id, script.popleft() if script else DONE)]

    def stop(self, job: str) -> None:
        raise AssertionError("nothing is stopped")

    def close(self) -> None:
        self.is_closed = True


def run(jobs: list[Job], runner: Scripted, **known: float) -> list[Outcome]:
    template = Assignment(jobs[0], Path("results"), (), (), Sources())
    durations = {(model, "data"): seconds for model, seconds in known.items()}
    return list(run_jobs(jobs, template, runner, [], durations))


def test_every_job_ends_once_and_never_more_run_than_there_are_slots():
    jobs = [job("a", seed) for seed in range(7)]
    runner = Scripted(3)
    outcomes = run(jobs, runner)
    assert sorted(outcome.job.seed for outcome in outcomes) == list(range(7))
    assert runner.most == 3
    assert runner.is_closed


def test_the_longest_come_first_and_unknown_ones_before_them():
    runner = Scripted(1)
    run([job("short"), job("new"), job("long")], runner, short=1.0, long=100.0)
    assert runner.started == ["new", "long", "short"]


def test_a_job_that_waits_for_a_stage_lets_others_go_first(tmp_path):
    held = tmp_path / "stage.lock"
    lock = FileLock(held)
    lock.acquire()

    class Releasing(Scripted):
        def start(self, assignment: Assignment) -> None:
            super().start(assignment)
            if assignment.job.model == "other":
                lock.release()

    runner = Releasing(1, waits=[Waits(lock=held), DONE])
    outcomes = run([job("waits"), job("other")], runner)
    assert runner.started == ["waits", "other", "waits"]
    assert [outcome.status for outcome in outcomes] == [Status.DONE, Status.DONE]


def test_samples_drawn_in_two_ways_are_scored_one_after_the_other():
    once = job("a")
    twice = replace(once, n_samples=20)
    assert once.id == twice.id
    runner = Scripted(2)
    assert len(run([once, twice], runner)) == 2
    assert runner.most == 1  # what a job says comes by its id


@pytest.mark.parametrize("n_losses", [1, MOST_TRIES - 1])
def test_a_lost_job_is_started_again(n_losses):
    runner = Scripted(1, lost=[Lost(reason="gone")] * n_losses)
    (outcome,) = run([job("lost")], runner)
    assert outcome.status is Status.DONE
    assert len(runner.started) == n_losses + 1


def test_a_job_that_is_lost_over_and_over_has_failed():
    (outcome,) = run([job("lost")], Scripted(1, lost=[Lost(reason="gone")] * 99))
    assert outcome.status is Status.FAILED
    assert outcome.reason == f"gone, {MOST_TRIES} times"


def test_whoever_stops_listening_stops_the_jobs():
    runner = Scripted(1)
    template = Assignment(job("a"), Path("results"), (), (), Sources())
    outcomes = run_jobs([job("a"), job("b")], template, runner, [])
    next(outcomes)
    outcomes.close()
    assert runner.is_closed

"""Ray and Slurm: jobs run elsewhere, are lost there, and all of their results come home."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import cloudpickle
import pytest

from imlbench.api.sources import Sources
from imlbench.api.space import Space
from imlbench.errors import UserError
from imlbench.plan.config import make_benchmark
from imlbench.plan.jobs import Codes, Job
from imlbench.plan.planning import make_plan
from imlbench.records.folder import Store
from imlbench.records.record import Point, Status
from imlbench.runner import ray_runner, slurm_runner
from imlbench.runner.contract import (
    Assignment,
    Began,
    End,
    Ended,
    Event,
    Lost,
    Progress,
    Runner,
    Waits,
)
from imlbench.runner.local import LocalRunner
from imlbench.runner.ray_runner import RayRunner
from imlbench.runner.scheduling import Outcome, run_jobs
from imlbench.runner.slurm_runner import SlurmRunner
from tests.plans import identify_data

DONE = Ended(status=Status.DONE)
LONG = 300.0


class Waiting:
    """A runner of one slot whose jobs end when their gate is a file, with the status in it."""

    def __init__(self, devices: Sequence[str], n_slots: int) -> None:
        assert n_slots == len(devices) == 1
        self.assignment, self.told = None, False

    def n_free(self) -> int:
        return int(self.assignment is None)

    def start(self, assignment: Assignment) -> None:
        self.assignment, self.told, self.is_stopped = assignment, False, False
        folder = assignment.folder.path
        folder.mkdir(parents=True, exist_ok=True)
        gate = Path(assignment.job.model_params["gate"])
        gate.with_suffix(".pid").write_text(str(os.getpid()))
        gate.with_suffix(".place").write_text(str(assignment.results))
        stages = Store(assignment.results).stages
        stages.mkdir(exist_ok=True)
        seen = sorted(path.name for path in [*folder.iterdir(), *stages.iterdir()])
        gate.with_suffix(".seen").write_text(json.dumps(seen))

    def wait(self, seconds: float) -> Sequence[tuple[str, Event]]:
        job = self.assignment.job
        if not self.told:
            self.told = True
            point = Point(stage="fit", step=1, n_steps=2, values={"loss": 0.5})
            return [(job.id, Began(step="fit")), (job.id, Progress(point=point))]
        gate = Path(job.model_params["gate"])
        end = time.monotonic() + seconds
        while not gate.exists() and not self.is_stopped and time.monotonic() < end:
            time.sleep(0.005)
        if not gate.exists() and not self.is_stopped:
            return []
        status = Status.INTERRUPTED if self.is_stopped else Status(gate.read_text())
        self._leave(gate)
        self.assignment = None
        return [(job.id, Ended(status=status))]

    def _leave(self, gate: Path) -> None:
        """Leave files as a job does: nested, of bytes that are no text, and a stage."""
        folder, stages = self.assignment.folder.path, Store(self.assignment.results).stages
        (folder / "samples").mkdir(exist_ok=True)
        (folder / "samples" / "5x10.safetensors").write_bytes(bytes(range(256)))
        (folder / ".writing-x").write_text("unfinished")
        with (folder / "log.txt").open("a") as log:
            log.write("once\n")
        (stages / f"stage-{gate.stem}.json").write_text("facts")
        (stages / f"stage-{gate.stem}.safetensors").write_bytes(b"\x00tensors")
        (stages / f"stage-{gate.stem}.lock").touch()

    def stop(self, job: str) -> None:
        self.is_stopped = True

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _elsewhere() -> Iterator[None]:
    """This module is not importable where jobs run: what is of it travels whole."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "results")
    store.prepare()
    return store


@pytest.fixture
def make(store: Store, tmp_path: Path):
    """Make assignments of jobs that wait for their gate."""

    def make(number: int) -> Assignment:
        job = Job(
            model="waiting",
            family="test",
            dataset="none",
            model_params={"gate": str(tmp_path / f"gate{number}.open")},
            dataset_params={},
            seed=number,
            n_samples=10,
            n_draws=5,
            space=Space("vector", (2,)),
            codes=Codes("fit", "draw", "score"),
        )
        return Assignment(job, store.root, (), (), Sources())

    return make


def gate(assignment: Assignment) -> Path:
    return Path(str(assignment.job.model_params["gate"]))


def let_go(assignment: Assignment, status: Status = Status.DONE) -> None:
    path = gate(assignment)
    path.with_suffix(".tmp").write_text(status)
    path.with_suffix(".tmp").replace(path)


def process_of(assignment: Assignment) -> int:
    return int(gate(assignment).with_suffix(".pid").read_text())


def place_of(assignment: Assignment) -> Path:
    return Path(gate(assignment).with_suffix(".place").read_text())


def listen(runner: Runner, what, times: int = 1) -> list[tuple[str, Event]]:
    """Return what a runner says until something has been said so often."""
    heard: list[tuple[str, Event]] = []
    end = time.monotonic() + LONG
    while sum(what(job, event) for job, event in heard) < times:
        assert time.monotonic() < end, heard
        heard += runner.wait(1.0)
    return heard


def has_begun(job: str, event: Event) -> bool:
    return isinstance(event, Progress)


def has_ended(job: str, event: Event) -> bool:
    return isinstance(event, End)


def start_when_free(runner: Runner, assignment: Assignment) -> list[tuple[str, Event]]:
    heard, end = [], time.monotonic() + LONG
    while not runner.n_free():
        assert time.monotonic() < end
        heard += runner.wait(1.0)
    runner.start(assignment)
    return heard


@pytest.fixture
def slurm(tmp_path: Path):
    """A Slurm runner of submitit's local processes."""
    runners = []

    def make(**parameters: str) -> SlurmRunner:
        runner = SlurmRunner(
            tmp_path / "exchange", {"timeout_min": "1000", **parameters}, "local", make=Waiting
        )
        runners.append(runner)
        return runner

    yield make
    for runner in runners:
        runner.close()


def test_slurm_runs_jobs_and_streams_what_they_say(slurm, make, tmp_path):
    runner, assignments = slurm(), [make(number) for number in range(3)]
    for assignment in assignments:
        assert runner.n_free() > 1000
        runner.start(assignment)
    heard = listen(runner, has_begun, 3)
    assert not any(has_ended(*said) for said in heard)
    for assignment in assignments:
        let_go(assignment)
    heard += listen(runner, has_ended, 3)
    for assignment in assignments:
        kinds = [type(event) for job, event in heard if job == assignment.job.id]
        assert kinds == [Began, Progress, Ended]
        assert assignment.folder.log.read_text() == "once\n"
    assert len({process_of(assignment) for assignment in assignments}) == 3
    runner.close()
    assert not list((tmp_path / "exchange").iterdir())


def test_a_task_that_is_killed_is_lost_and_can_be_started_again(slurm, make):
    runner, assignment = slurm(), make(0)
    runner.start(assignment)
    listen(runner, has_begun)
    os.kill(process_of(assignment), signal.SIGKILL)
    ((_, lost),) = listen(runner, has_ended)
    assert isinstance(lost, Lost)
    let_go(assignment)
    runner.start(assignment)
    assert listen(runner, has_ended)[-1] == (assignment.job.id, DONE)


def test_slurm_stops_what_runs_and_what_waits(slurm, make):
    runner, running, waiting = slurm(), make(0), make(1)
    runner.start(running)
    listen(runner, has_begun)
    runner.start(waiting)
    runner.stop(waiting.job.id)
    ((job, end),) = listen(runner, has_ended)
    assert (job, end.status) == (waiting.job.id, Status.INTERRUPTED)
    runner.stop(running.job.id)
    ((job, end),) = listen(runner, has_ended)
    assert (job, end.status) == (running.job.id, Status.INTERRUPTED)
    assert not gate(waiting).with_suffix(".pid").exists()  # it was never submitted


def test_a_task_that_slurm_preempts_is_begun_again(slurm, make):
    runner, assignment = slurm(timeout_min="1000"), make(0)
    runner.start(assignment)
    listen(runner, has_begun)
    first = process_of(assignment)
    os.kill(first, signal.SIGUSR2)
    listen(runner, has_begun)
    assert process_of(assignment) != first
    let_go(assignment)
    assert listen(runner, has_ended)[-1] == (assignment.job.id, DONE)


def test_a_task_whose_time_is_up_says_so(slurm, make):
    runner, assignment = slurm(timeout_min="5"), make(0)
    runner.start(assignment)
    listen(runner, has_begun)
    os.kill(process_of(assignment), signal.SIGUSR2)  # as Slurm does shortly before the end
    _, end = listen(runner, has_ended)[-1]
    assert (end.status, end.reason) == (Status.TIMEOUT, "stopped by Slurm's time limit")


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"slurm_partitoin": "gpu"}, "Did you mean 'slurm_partition'"),
        ({"nodes": "2"}, "unknown parameter 'nodes'"),
        ({"timeout_min": "1h"}, "timeout_min must be of type int; got '1h'"),
        ({"gpus_per_node": "0.5"}, "gpus_per_node must be of type int; got '0.5'"),
    ],
)
def test_parameters_that_slurm_does_not_know_are_refused(parameters, says, tmp_path):
    with pytest.raises(UserError) as caught:
        SlurmRunner(tmp_path, parameters, "local")
    assert says in str(caught.value)
    assert not list(tmp_path.iterdir())


SBATCH = """
import os, re, subprocess, sys
text = open(sys.argv[1]).read()
open(os.environ["SLURM_STATE"] + "/script", "a").write(text)
for index in range(int(re.search(r"--array=0-([0-9]+)", text)[1]) + 1):
    names = {"SLURM_JOB_ID": f"{8 + index}", "SLURM_ARRAY_JOB_ID": "7"}
    subprocess.Popen(
        ["bash", sys.argv[1]],
        env={**os.environ, **names, "SLURM_ARRAY_TASK_ID": f"{index}"},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
print("Submitted batch job 7")
"""
SRUN = 'while [[ $1 == --* ]]; do [[ $1 == --unbuffered ]] || shift; shift; done; exec "$@"'


@pytest.fixture
def slurm_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of what commands like Slurm's were told, and of what ``sacct`` is to say."""
    commands, state = tmp_path / "bin", tmp_path / "state"
    commands.mkdir()
    state.mkdir()
    (state / "sacct").write_text("JobID|State|NodeList\n")
    for name, text in {
        "sbatch": f"#!{sys.executable}\n{SBATCH}",
        "srun": f"#!/bin/bash\n{SRUN}\n",
        "sacct": "#!/bin/bash\ncat $SLURM_STATE/sacct\n",
        "scancel": "#!/bin/bash\necho $1 >> $SLURM_STATE/cancelled\n",
    }.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(commands), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_STATE", str(state))
    monkeypatch.setattr(slurm_runner, "_ASKS", 0.0)
    monkeypatch.setattr(slurm_runner, "_LAG", 0.0)
    return state


def test_slurm_gets_one_array_and_its_word_on_silent_tasks_is_taken(slurm_state, make, tmp_path):
    asked = {"timeout_min": "90", "slurm_partition": "gpu", "slurm_setup": "module load cuda"}
    runner = SlurmRunner(tmp_path / "exchange", asked, make=Waiting)
    done, timed_out, lost = assignments = [make(number) for number in range(3)]
    for assignment in assignments:
        runner.start(assignment)
    listen(runner, has_begun, 3)
    script = (slurm_state / "script").read_text()
    for line in ("--array=0-2%3", "--time=90", "--partition=gpu", "--job-name=imlbench"):
        assert f"#SBATCH {line}\n" in script
    assert "\nmodule load cuda\n" in script
    for assignment in (timed_out, lost):
        os.kill(process_of(assignment), signal.SIGKILL)
    states = "7_0|RUNNING|a\n7_1|TIMEOUT|a\n7_2|NODE_FAIL|b\n"
    (slurm_state / "sacct").write_text(f"JobID|State|NodeList\n{states}")
    let_go(done)
    ends = dict(listen(runner, has_ended, 3))
    assert ends[done.job.id].status is Status.DONE
    assert ends[timed_out.job.id].status is Status.TIMEOUT
    assert isinstance(ends[lost.job.id], Lost)
    assert "7_2 is gone (node_fail)" in ends[lost.job.id].reason
    assert (slurm_state / "cancelled").read_text() == "7_2\n"  # or Slurm would start it again
    runner.close()


def test_without_slurm_or_its_package_the_user_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="Slurm must be on this machine"):
        SlurmRunner(tmp_path, {})
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"needs the package submitit; .*'imlbench\[slurm\]'"):
        SlurmRunner(tmp_path, {})


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray, started by somebody else, with room for four workers."""
    ray = ray_runner.import_ray()
    temporary = ray_runner._connect(ray, None, 4)
    yield
    ray.shutdown()
    shutil.rmtree(temporary)


@pytest.fixture
def ray(cluster):
    """Make a Ray runner of waiting jobs."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    runners = []

    def make(n_workers: int, **given) -> RayRunner:
        runners.append(RayRunner(None, n_workers, make=Waiting, **given))
        return runners[-1]

    yield make
    for runner in runners:
        runner.close()
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_ray_runs_each_job_once_though_a_worker_is_lost(ray, make):
    runner, assignments = ray(2), [make(number) for number in range(8)]
    victim = assignments[3]
    for assignment in assignments:
        if assignment is not victim:
            let_go(assignment)
    by_id = {assignment.job.id: assignment for assignment in assignments}
    pending, running = list(assignments), set()
    heard: list[tuple[str, Event]] = []
    limit = time.monotonic() + LONG
    while pending or running:
        assert time.monotonic() < limit, heard
        for _ in range(min(runner.n_free(), len(pending))):
            running.add(pending[0].job.id)
            runner.start(pending.pop(0))
        assert len(running) <= 2
        for job, event in runner.wait(1.0):
            heard.append((job, event))
            if has_begun(job, event) and job == victim.job.id and not gate(victim).exists():
                os.kill(process_of(victim), signal.SIGKILL)
            if has_ended(job, event):
                running.remove(job)
            if isinstance(event, Lost):
                let_go(victim)
                pending.append(by_id[job])
    ends = Counter(job for job, event in heard if event == DONE)
    assert ends == dict.fromkeys(by_id, 1)
    assert [job for job, event in heard if isinstance(event, Lost)] == [victim.job.id]
    for assignment in assignments:
        assert assignment.folder.log.read_text() == "once\n"
        assert place_of(assignment) == assignment.results  # which the workers see


def test_workers_of_ray_have_numbers_of_their_own_whoever_comes_first(ray, make):
    """Processors follow from them; both workers shared one if the second came first."""
    runner, (first, second) = ray(2), [make(number) for number in range(2)]
    start_when_free(runner, first)  # perhaps before the other worker is there
    numbers = {id(slot.assignment): slot.number for slot in runner._slots}
    start_when_free(runner, second)
    now = {id(slot.assignment): slot.number for slot in runner._slots}
    assert sorted(now.values()) == [0, 1]
    assert now[id(first)] == numbers[id(first)]
    for assignment in (first, second):
        let_go(assignment)
    listen(runner, has_ended, times=2)


def test_where_workers_do_not_see_the_folder_all_of_a_job_comes_home(ray, make, store):
    runner, first, second = ray(2, is_shared=False), make(0), make(1)
    first.folder.path.mkdir()
    (first.folder.path / "half.pt").write_bytes(b"half a fit")
    os.utime(first.folder.path / "half.pt", ns=(5, 123456789))
    start_when_free(runner, first)
    listen(runner, has_begun)
    assert [path.name for path in first.folder.path.iterdir()] == ["half.pt"]
    with pytest.raises(TimeoutError):
        first.folder.lock.acquire(timeout=0)
    let_go(first, Status.FAILED)
    assert listen(runner, has_ended)[-1][1].status is Status.FAILED
    assert place_of(first) != store.root
    assert not place_of(first).is_relative_to(store.root)
    assert json.loads(gate(first).with_suffix(".seen").read_text()) == ["half.pt"]
    names = ["half.pt", "log.txt", "samples/5x10.safetensors"]
    folder = first.folder.path
    found = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
    assert found == names
    assert (folder / "half.pt").stat().st_mtime_ns == 123456789
    assert (folder / "samples" / "5x10.safetensors").read_bytes() == bytes(range(256))
    made = {path.name for path in store.stages.iterdir()}
    assert made == {"stage-gate0.json", "stage-gate0.safetensors"}
    first.folder.lock.acquire(timeout=0).lock.release()

    third = make(2)  # at the same time as the second, so that one is with the other worker
    for assignment in (second, third):
        start_when_free(runner, assignment)
    for assignment in (second, third):
        let_go(assignment)
    listen(runner, has_ended, 2)
    for assignment in (second, third):
        seen = json.loads(gate(assignment).with_suffix(".seen").read_text())
        assert {"stage-gate0.json", "stage-gate0.safetensors"} <= set(seen)
    assert len(list(store.stages.iterdir())) == 6
    assert {path.name for path in store.root.iterdir()} == {"runs", "stages", "locks", "store.json"}


def test_a_job_that_another_process_is_at_waits(ray, make):
    runner, assignment = ray(1, is_shared=False), make(0)
    lock = assignment.folder.lock
    with lock:
        start_when_free(runner, assignment)
        assert listen(runner, has_ended) == [(assignment.job.id, Waits(lock=Path(lock.lock_file)))]
    let_go(assignment)
    start_when_free(runner, assignment)
    assert listen(runner, has_ended)[-1] == (assignment.job.id, DONE)


def test_a_job_is_stopped_and_its_worker_goes_on(ray, make):
    runner, assignment, other = ray(1), make(0), make(1)
    start_when_free(runner, assignment)
    listen(runner, has_begun)
    runner.stop(assignment.job.id)
    _, end = listen(runner, has_ended)[-1]
    assert end.status is Status.INTERRUPTED
    let_go(other)
    start_when_free(runner, other)
    assert listen(runner, has_ended)[-1] == (other.job.id, DONE)
    assert process_of(other) == process_of(assignment)  # which is still warm


def test_what_is_not_shared_comes_home_even_if_the_runner_is_closed(ray, make):
    runner, assignment = ray(1, is_shared=False), make(0)
    start_when_free(runner, assignment)
    listen(runner, has_begun)
    runner.close()
    assert assignment.folder.log.read_text() == "once\n"
    end = time.monotonic() + LONG
    while Path(f"/proc/{process_of(assignment)}").exists():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_worker_sees_a_folder_only_if_it_reads_what_is_written_there(tmp_path):
    path = tmp_path / "token"
    path.write_bytes(b"token")
    assert ray_runner.Worker.reads(str(path), b"token")
    assert not ray_runner.Worker.reads(str(path), b"another")
    assert not ray_runner.Worker.reads(str(tmp_path / "absent"), b"token")


def broken(devices: Sequence[str], n_slots: int) -> Runner:
    raise RuntimeError("no plugins here")


def test_workers_that_cannot_start_are_told_and_not_tried_for_ever(ray, make):
    runner = RayRunner(None, 1, make=broken)
    with pytest.raises(UserError, match="no plugins here"):
        start_when_free(runner, make(0))
    runner.close()


def test_without_ray_or_a_cluster_the_user_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"needs the package ray; .*'imlbench\[ray\]'"):
        RayRunner(None, 1)


def make_local_runner(store: Store) -> Runner:
    return LocalRunner(["cpu"], 2)


def make_ray_runner(store: Store) -> Runner:
    return RayRunner(None, 2, is_shared=False)


def make_slurm_runner(store: Store) -> Runner:
    return SlurmRunner(store.root / "slurm", {"timeout_min": "60"}, "local")


class Nobody:
    """A watcher that shows nothing."""

    def start(self, job: Job) -> None: ...
    def event(self, job: Job, event: Event) -> None: ...
    def end(self, outcome: Outcome) -> None: ...
    def tick(self, seconds_left: float | None) -> None: ...


@pytest.mark.slow
def test_results_are_the_same_wherever_jobs_run(tmp_path, registry):
    benchmark = make_benchmark(
        None,
        None,
        models=["vae"],
        datasets=["toy-2d"],
        seeds=(0, 1),
        settings=["epochs=1", "hidden_dim=8"],
        metrics=("kde",),
    )
    plan = identify_data(make_plan(benchmark, registry), registry, Sources())
    found = []
    for number, make in enumerate((make_local_runner, make_ray_runner, make_slurm_runner)):
        store = Store(tmp_path / str(number))
        store.prepare()
        template = Assignment(plan.jobs[0], store.root, plan.metrics, plan.artifacts, Sources())
        outcomes = list(run_jobs(plan.jobs, template, make(store), [Nobody()]))
        assert [outcome.status for outcome in outcomes] == [Status.DONE] * 2, outcomes
        assert all(not folder.damaged(folder.read()) for folder in store)
        scores = {record.id: record.score("kde", "5x1000").value for record in store.records()}
        found.append((scores, [folder.checkpoint.read_bytes() for folder in store]))
    assert found[1] == found[0]
    assert found[2] == found[0]

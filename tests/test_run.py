"""The main job, end to end, as a user runs it."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from imlbench import Diverged, Metric, Model, Params, Score, Sources, Space
from imlbench.files import read_tensors
from imlbench.plan.config import make_benchmark
from imlbench.plan.jobs import Plan
from imlbench.plan.planning import make_plan
from imlbench.plan.registry import Registry
from imlbench.records.folder import JobFolder, Store
from imlbench.records.record import Status
from imlbench.runner.context import JobContext
from imlbench.runner.contract import Assignment
from imlbench.runner.job import run_job
from imlbench.runner.tasks import is_out_of_memory
from tests.plans import identify_data

QUICK = ("--epochs", "1", "--set", "hidden_dim=32", "--set", "latent_dim=4")
RUN = ("run", "--models", "iml-gmm,vae", "--datasets", "digits", *QUICK)
SMALL = (*RUN, "--set", "iml-gmm.n_components=2")
METRICS = ("kde", "reconstruction_error")


def quick_plan(
    registry: Registry, model: str, extra: list[str] | None = None, metrics=METRICS, **given
) -> Plan:
    usual = ["epochs=1", "latent_dim=4", "hidden_dim=32"]
    fields = registry.models[model].params_type.model_fields
    settings = [text for text in usual if text.partition("=")[0] in fields] + (extra or [])
    benchmark = make_benchmark(
        None,
        None,
        models=[model],
        datasets=["digits"],
        settings=settings,
        metrics=metrics,
        **given,
    )
    return identify_data(make_plan(benchmark, registry), registry, Sources())


def run_here(registry: Registry, plan: Plan, folder: Path, **given) -> JobFolder:
    (job,) = plan.jobs
    assignment = Assignment(job, folder, plan.metrics, (), Sources(), **given)
    run_job(assignment, registry)
    return assignment.folder


def values(folder: JobFolder) -> dict[str, float]:
    return {score.label: score.value for score in folder.read().scores}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of two models: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    answer = subprocess.run(
        [sys.executable, "-m", "imlbench", *SMALL, "--seeds", "0,1"],
        cwd=folder,
        env={**os.environ, "IMLBENCH_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    return folder, answer


def test_a_run_leaves_everything_behind(finished):
    folder, _ = finished
    jobs = list(Store(folder / "results"))
    assert len(jobs) == 4
    for job in jobs:
        names = {path.name for path in job.path.iterdir()}
        assert names == {
            "record.json",
            "checkpoint.safetensors",
            "curves.json",
            "samples",
            "scores",
            "artifacts",
            "log.txt",
        }
        assert not list(job.path.rglob(".writing*"))
        score = job.read().score("kde", "5x1000")
        kde = read_tensors(job.per_example("kde", "5x1000"))["per_example"]
        assert len(kde) == score.n_examples == 297
        assert score.value == pytest.approx(kde.mean().item())
        assert score.settings == {"h": 0.2, "M": 1000, "draws": 5}
        assert (job.artifact("samples", "5x1000") / "samples.png").stat().st_size > 1000


def test_what_was_really_used_is_recorded(finished):
    folder, _ = finished
    for job in Store(folder / "results"):
        record = job.read()
        assert record.model_params["batch_size"] > 26
        assert record.params["batch_size"] == 26  # 1,300 examples: an epoch has 50 steps
        assert record.fit.used["n_steps"] == 50
        assert "width" not in record.params  # no convolutions on 8x8 pixels


def test_metrics_that_a_model_cannot_have_are_told(finished):
    folder, _ = finished
    (vae, _) = (job for job in Store(folder / "results") if job.read().model == "vae")
    reason = vae.read().not_applicable["log_likelihood_manifold"].reason
    assert reason == "the model has no log_prob_manifold"


def test_a_run_ends_with_the_table_of_what_it_ran(finished):
    _, answer = finished
    assert re.search(r"^iml-gmm +2 ", answer.stdout, re.MULTILINE)
    assert re.search(r"^vae +2 ", answer.stdout, re.MULTILINE)
    assert "± is the standard deviation over n seeds" in answer.stdout


def test_a_second_run_trains_nothing_and_prints_the_same_table(finished):
    folder, first = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    second = subprocess.run(
        [sys.executable, "-m", "imlbench", *SMALL, "--seeds", "0,1"],
        cwd=folder,
        env={**os.environ, "IMLBENCH_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
    )
    assert second.stdout == first.stdout
    assert second.stderr.count("(reused)") == 4
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == before


@pytest.mark.parametrize("model", ["iml-gmm", "vae"])
def test_same_seed_same_result_and_the_global_random_state_is_untouched(registry, tmp_path, model):
    plan = quick_plan(registry, model)
    torch.manual_seed(7)
    states = (torch.get_rng_state(), repr(np.random.get_state()), random.getstate())  # noqa: NPY002
    first = run_here(registry, plan, tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert repr(np.random.get_state()) == states[1]  # noqa: NPY002
    assert random.getstate() == states[2]
    torch.manual_seed(8)
    second = run_here(registry, plan, tmp_path / "b")
    assert values(first) == values(second)
    other = run_here(registry, quick_plan(registry, model, seeds="1"), tmp_path / "c")
    assert values(other) != values(first)


def test_a_fitted_stage_is_shared_between_jobs(registry, tmp_path):
    whole = quick_plan(registry, "iml-gmm")
    shared = quick_plan(registry, "iml-gmm", extra=["iml-gmm.n_components=2"])
    alone = run_here(registry, shared, tmp_path / "alone")
    run_here(registry, whole, tmp_path / "together")
    second = run_here(registry, shared, tmp_path / "together")
    assert second.read().fit.seconds_reused > 0
    assert alone.read().fit.seconds_reused == 0
    assert values(second) == values(alone)  # the cache changes no number
    assert second.read().fit.used == alone.read().fit.used
    assert "autoencoder" in [point.stage for point in second.read_curves()]  # all the same


def test_all_base_distributions_share_one_autoencoder(registry, tmp_path):
    for model in ("iml-gmm", "iml-dpgmm", "iml-gaussian"):
        run_here(registry, quick_plan(registry, model, metrics=["kde"]), tmp_path)
    assert len(list((tmp_path / "stages").glob("*.safetensors"))) == 1


def test_nan_in_a_real_model_is_diverged(registry, tmp_path):
    plan = quick_plan(registry, "iml-gmm", extra=["learning_rate=1e20"])
    with pytest.raises(Diverged, match="autoencoder, epoch 1: "):
        run_here(registry, plan, tmp_path)


def test_force_fits_shared_stages_again_and_a_damaged_one_is_fitted_again(registry, tmp_path):
    plan = quick_plan(registry, "iml-gmm")
    folder = run_here(registry, plan, tmp_path)
    before = values(folder)
    (stage,) = (tmp_path / "stages").glob("*.safetensors")
    stage.write_bytes(b"damaged")
    folder.clear()
    assert run_here(registry, plan, tmp_path).read().fit.seconds_reused <= 0
    assert values(folder) == before
    folder.clear()
    again = run_here(registry, plan, tmp_path, refit_before=time.time() + 1)
    assert again.read().fit.seconds_reused <= 0


class _Twice(Metric[Params]):
    """A constant that it keeps under the same name as another metric does."""

    name = "twice"
    higher_is_better = True
    constant = 2.0

    def compute(self, evaluation):
        kept = evaluation.once("x", {}, lambda: {"x": torch.tensor(self.constant)})
        return Score(kept["x"].item())


class _Thrice(_Twice):
    name = "thrice"
    constant = 3.0


def test_metrics_do_not_share_what_they_keep(registry, tmp_path):
    registry.metrics |= {"twice": _Twice, "thrice": _Thrice}
    folder = run_here(registry, quick_plan(registry, "vae", metrics=["twice", "thrice"]), tmp_path)
    assert values(folder) == {"twice": 2.0, "thrice": 3.0}


def test_a_score_that_cannot_be_computed_any_more_is_no_score(registry, tmp_path, monkeypatch):
    registry.metrics["twice"] = _Twice
    plan = quick_plan(registry, "vae", metrics=["kde", "twice"])
    folder = run_here(registry, plan, tmp_path)
    assert set(values(folder)) == {"kde", "twice"}
    newer = tuple(replace(task, code="newer") for task in plan.metrics if task.name == "twice")
    monkeypatch.setattr(_Twice, "constant", float("nan"))
    with pytest.raises(RuntimeError, match="twice must be finite"):
        run_here(registry, replace(plan, metrics=newer), tmp_path)
    assert set(values(folder)) == {"kde"}


def test_going_back_and_forth_between_ways_of_drawing_computes_nothing(registry, tmp_path):
    plans = [
        quick_plan(registry, "reference-train", metrics=["kde", "log_likelihood"], n_draws=n)
        for n in (2, 3)
    ]
    for plan in plans:
        folder = run_here(registry, plan, tmp_path)
        folder.end(Status.DONE)
    for plan in plans:
        assert folder.read().is_complete(plan.jobs[0], plan.metrics, ())


class _Broken(Model[Params]):
    """Fails in the way that its class attribute says."""

    name = "broken"

    def fit(self, train, valid, context):
        context.report("training", 1, 2, loss=float("nan"))

    def sample(self, n, generator):
        return torch.zeros(n, *self.space.event_shape)


def test_nan_in_training_is_diverged_with_epoch_and_value(tmp_path, registry):
    (job,) = quick_plan(registry, "vae").jobs
    context = JobContext(
        job,
        torch.device("cpu"),
        stages=tmp_path,
        home="imlbench",
        checkpoints=tmp_path,
        checkpoint_every=60.0,
        report=lambda point: None,
    )
    model = _Broken(Params(), Space("vector", (2,)))
    with pytest.raises(Diverged, match="training, epoch 1: loss is nan"):
        model.fit(None, None, context)


PLUGIN = '''
import os, signal, time
import torch
from imlbench import Metric, Model, Params, Score, hookimpl

class Base(Model[Params]):
    """Zeros."""
    def fit(self, train, valid, context): pass
    def sample(self, n, generator):
        return torch.rand(n, *self.space.event_shape, generator=generator)

class Raises(Base):
    name = "raises"
    def fit(self, train, valid, context): raise RuntimeError("it broke")

class Nan(Base):
    name = "nan"
    def fit(self, train, valid, context): context.report("training", 3, 9, loss=float("nan"))

class Killed(Base):
    name = "killed"
    def fit(self, train, valid, context): os.kill(os.getpid(), signal.SIGKILL)

class Memory(Base):
    name = "memory"
    def fit(self, train, valid, context): raise MemoryError

class Slow(Base):
    name = "slow"
    def fit(self, train, valid, context):
        context.report("training", 1, 9, loss=1.0)
        with open("fits", "a") as file: file.write(".")
        with open("pid", "w") as file: file.write(str(os.getpid()))
        os.rename("pid", "asleep")
        time.sleep(float(os.environ.get("SLOW_SECONDS", "0")))

class Litters(Base):
    """Leaves processes behind: of its session, and of one of their own."""
    name = "litters"
    def fit(self, train, valid, context):
        for where in ("inside", "outside"):
            if os.fork() == 0:
                if where == "outside":
                    os.setsid()
                with open(f"{where}.pid", "w") as file: file.write(str(os.getpid()))
                os.rename(f"{where}.pid", where)
                time.sleep(3600)
        while not (os.path.exists("inside") and os.path.exists("outside")): time.sleep(0.01)
        time.sleep(float(os.environ.get("SLOW_SECONDS", "0")))

class Forgets(Base):
    """Keeps what it has found out where no checkpoint sees it."""
    name = "forgets"
    scale = 0.0
    def fit(self, train, valid, context): self.scale = 1.0
    def sample(self, n, generator): return self.scale * super().sample(n, generator)

class Counts(Base):
    name = "counts"
    def sample(self, n, generator): return super().sample(n, generator).round().long()

class Fine(Base):
    name = "fine"

class Fragile(Metric[Params]):
    name = "fragile"
    higher_is_better = True
    def compute(self, evaluation):
        if os.environ.get("FRAGILE"): raise RuntimeError("no luck")
        return Score(1.0)

class Careless(Metric[Params]):
    """Writes into everything that it is given."""
    name = "careless"
    higher_is_better = True
    needs_samples = True
    position = 0
    def compute(self, evaluation):
        evaluation.samples.zero_()
        for part in (evaluation.splits.train, evaluation.splits.valid, evaluation.splits.test):
            part._stored.zero_()
            part.stored.zero_()
        return Score(torch.tensor(1.0), settings={"h": torch.tensor(0.5)})

@hookimpl
def imlbench_models(): return [Raises, Nan, Killed, Memory, Slow, Litters, Forgets, Counts, Fine]

@hookimpl
def imlbench_metrics(): return [Fragile, Careless]
'''


@pytest.fixture
def outside(tmp_path):
    """A folder with a third party's plugin on the path, and a function that runs imlbench there."""
    site = tmp_path / "site"
    (site / "troubles-1.0.dist-info").mkdir(parents=True)
    (site / "troubles.py").write_text(PLUGIN)
    (site / "troubles-1.0.dist-info" / "METADATA").write_text("Name: troubles\nVersion: 1.0\n")
    (site / "troubles-1.0.dist-info" / "entry_points.txt").write_text(
        "[imlbench]\ntroubles = troubles\n"
    )

    def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        # Where the tests run in the background, Ctrl-C is ignored, and children would inherit that.
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return subprocess.Popen(
                [sys.executable, "-m", "imlbench", *arguments],
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": str(site), **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        finally:
            signal.signal(signal.SIGINT, handler)

    start.folder = tmp_path  # type: ignore[attr-defined]
    return start


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=900)
    return process.returncode, out, err


def statuses(folder: Path) -> dict[str, str]:
    return {record.model: str(record.status) for record in Store(folder / "results").records()}


def test_jobs_that_fail_are_recorded_and_the_others_go_on(outside):
    models = "raises,nan,killed,memory,litters,forgets,counts,fine"
    run = ("run", "--models", models, "--datasets", "digits", "--metrics", "kde")
    code, out, err = finish(outside(*run))
    assert code == 1, err
    assert statuses(outside.folder) == {
        "raises": "failed",
        "nan": "diverged",
        "killed": "failed",
        "memory": "out-of-memory",
        "litters": "done",
        "forgets": "failed",
        "counts": "failed",
        "fine": "done",
    }
    assert re.search(r"^fine ", out, re.MULTILINE)
    assert "No result: nan, seed 0: diverged (training, epoch 3: loss is nan)." in out
    assert "RuntimeError: it broke" in err
    assert "the process was ended by SIGKILL" in err
    assert "forgets.sample must be the same after its checkpoint was read" in err
    for process in ("inside", "outside"):
        assert not is_alive(int((outside.folder / process).read_text()))
    assert "Traceback" not in err
    assert (
        "Traceback" in next((outside.folder / "results/runs").glob("*raises*/log.txt")).read_text()
    )


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("CUDA error: out of memory. Search for `cudaErrorMemoryAllocation`", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes", True),
        ("CUDA error: device-side assert triggered", False),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_want_of_memory_is_known_by_what_libraries_say_also_in_a_metric(message, expected):
    cause = RuntimeError(message)
    outer = RuntimeError("metric kde failed")
    outer.__cause__ = cause
    assert is_out_of_memory(cause) is is_out_of_memory(outer) is expected


def test_a_job_that_takes_too_long_is_stopped(outside):
    run = ("run", "--models", "slow", "--datasets", "digits", "--metrics", "kde")
    code, _, err = finish(outside(*run, "--time-limit", "2", SLOW_SECONDS="3600"))
    assert code == 1
    assert "timeout: stopped after 2 s" in err
    assert statuses(outside.folder) == {"slow": "timeout"}


def test_a_metric_that_fails_costs_neither_the_training_nor_the_other_metrics(outside):
    run = ("run", "--models", "fine", "--datasets", "digits", "--metrics", "fragile,kde")
    code, _, err = finish(outside(*run, FRAGILE="1"))
    assert code == 1
    assert "metric fragile failed: no luck" in err
    (folder,) = Store(outside.folder / "results")
    assert set(values(folder)) == {"kde"}
    trained = (folder.path / "checkpoint.safetensors").stat().st_mtime_ns
    code, out, _ = finish(outside(*run))
    assert code == 0
    assert set(values(folder)) == {"kde", "fragile"}
    assert (folder.path / "checkpoint.safetensors").stat().st_mtime_ns == trained
    assert "fragile" in out


def wait_until_asleep(process: subprocess.Popen[str], folder: Path) -> int:
    """Wait until the job of the model ``slow`` sleeps; return its process."""
    while not (folder / "asleep").exists():
        assert process.poll() is None
        time.sleep(0.05)
    return int((folder / "asleep").read_text())


def is_alive(process: int) -> bool:
    """Whether a process runs; one that nobody has asked for its exit status does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_metrics_that_write_into_the_data_change_no_other(outside):
    def scores(metrics: str, results: str) -> dict[str, float]:
        run = ("run", "--models", "fine", "--datasets", "digits", "--metrics", metrics)
        code, _, err = finish(outside(*run, "--results", results))
        assert code == 0, err
        (folder,) = Store(outside.folder / results)
        return values(folder)

    careless = scores("careless,kde,kde_tuned", "a")
    assert careless == {"careless": 1.0, **scores("kde,kde_tuned", "b")}


def children_of(process: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == process:
                found.append(int(path.parent.name))
    return found


def servers_of(process: int) -> list[int]:
    """Return the child processes of a process that are servers of the pool."""
    children = children_of(process)
    return [
        child
        for child in children
        if b"imlbench.runner.server" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def test_jobs_go_on_when_the_server_of_processes_dies(outside):
    run = ("run", "--models", "slow", "--datasets", "digits", "--metrics", "kde")
    process = outside(*run, SLOW_SECONDS="1")
    job = wait_until_asleep(process, outside.folder)
    (server,) = servers_of(process.pid)
    os.kill(server, signal.SIGKILL)
    code, _, err = finish(process)
    assert code == 0, err
    assert "lost, and started again: the server of processes died" in err
    assert not is_alive(job)
    assert statuses(outside.folder) == {"slow": "done"}


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_nothing_is_left_of_a_run_that_was_ended(outside, how):
    run = ("run", "--models", "litters", "--datasets", "digits", "--metrics", "kde")
    process = outside(*run, SLOW_SECONDS="3600")
    while not (outside.folder / "outside").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(how)
    process.communicate()
    for name in ("inside", "outside"):
        while is_alive(int((outside.folder / name).read_text())):
            time.sleep(0.05)


def test_what_failed_is_told_and_run_again(outside):
    for models, expected in (("fine", 0), ("fine,slow", 1)):  # what is done knows no limit
        run = ("run", "--models", models, "--datasets", "digits", "--metrics", "kde")
        limit = () if expected == 0 else ("--time-limit", "2")
        assert finish(outside(*run, *limit, SLOW_SECONDS="3600"))[0] == expected
    _, out, _ = finish(outside("status"))
    assert "2 jobs: 1 done, 1 timeout, 0 running, 0 waiting." in out
    assert "timeout: slow on digits, seed 0: stopped after 2 s" in out
    code, out, err = finish(outside("run", "--retry-failed"))
    assert code == 0, err
    assert statuses(outside.folder) == {"fine": "done", "slow": "done"}
    assert "[1/1] slow on digits, seed 0: done" in err
    code, _, err = finish(outside("run", "--retry-failed"))
    assert code == 2
    assert "all are done" in err


def test_status_tells_what_is_running(outside):
    run = ("run", "--models", "slow", "--datasets", "digits", "--metrics", "kde")
    process = outside(*run, "--seeds", "0,1", SLOW_SECONDS="3600")
    wait_until_asleep(process, outside.folder)
    out = ""
    while "training 1/9, loss 1" not in out:  # it is written every few seconds
        _, out, _ = finish(outside("status"))
    assert f"(process {process.pid} on " in out
    assert "2 jobs: 1 running, 1 waiting." in out
    process.send_signal(signal.SIGTERM)
    finish(process)


def test_new_metrics_are_computed_without_fitting_again(outside):
    run = ("run", "--models", "fine", "--datasets", "digits", "--metrics", "kde")
    assert finish(outside(*run))[0] == 0
    (folder,) = Store(outside.folder / "results")
    fitted = folder.checkpoint.stat().st_mtime_ns, folder.samples("5x1000").stat().st_mtime_ns
    plugin = outside.folder / "site" / "troubles.py"
    plugin.write_text(plugin.read_text() + "\nX = 'the code of the model is another'\n")
    code, out, err = finish(outside("score", "--metrics", "kde,kde_tuned", "--set", "kde.h=0.3"))
    assert code == 0, err
    (folder,) = Store(outside.folder / "results")
    assert set(values(folder)) == {"kde", "kde[h=0.3]", "kde_tuned"}
    assert "kde[h=0.3]" in out.replace("\n", "")
    after = folder.checkpoint.stat().st_mtime_ns, folder.samples("5x1000").stat().st_mtime_ns
    assert after == fitted


def test_jobs_that_share_a_stage_fit_it_once_and_do_not_hold_up_others(outside):
    run = ("run", "--models", "iml,fine", "--datasets", "digits", "--metrics", "kde", *QUICK)
    code, _, err = finish(outside(*run, "--workers", "3"))
    assert code == 0, err
    records = Store(outside.folder / "results").records()
    assert len(records) == 4
    shared = [record for record in records if record.model != "fine"]
    assert sum(record.fit.seconds_reused > 0 for record in shared) == 2
    assert len({record.fit.stages for record in shared}) == 1


def test_two_runs_at_once_compute_every_job_once(outside):
    run = ("run", "--models", "fine,slow", "--datasets", "digits", "--metrics", "kde")
    first = outside(*run, SLOW_SECONDS="3")
    second = outside(*run, SLOW_SECONDS="3")
    errors = []
    for process in (first, second):
        code, _, err = finish(process)
        assert code == 0, err
        errors.append(err)
    assert statuses(outside.folder) == {"fine": "done", "slow": "done"}
    assert (outside.folder / "fits").read_text() == "."


def test_a_job_ends_with_the_run_that_started_it(outside):
    run = ("run", "--models", "slow", "--datasets", "digits", "--metrics", "kde")
    process = outside(*run, SLOW_SECONDS="3600")
    job = wait_until_asleep(process, outside.folder)
    process.kill()
    process.communicate()
    while is_alive(job):
        time.sleep(0.05)
    assert statuses(outside.folder) == {}  # nobody was left to say how it ended


@pytest.mark.parametrize(
    "how",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_goes_on_with_what_is_missing(outside, how):
    run = ("run", "--models", "fine,slow", "--datasets", "digits", "--metrics", "kde")
    process = outside(*run, SLOW_SECONDS="3600")
    wait_until_asleep(process, outside.folder)
    process.send_signal(how)
    code, _, err = finish(process)
    assert code == 130
    assert "1 of 2 jobs are done; run again to go on" in err
    assert statuses(outside.folder) == {"fine": "done", "slow": "interrupted"}
    code, _, err = finish(outside(*run))
    assert code == 0
    assert "fine on digits, seed 0: done (reused)" in err
    assert statuses(outside.folder) == {"fine": "done", "slow": "done"}


def test_to_interrupt_twice_is_to_interrupt(outside):
    run = ("run", "--models", "slow", "--datasets", "digits", "--metrics", "kde")
    process = outside(*run, SLOW_SECONDS="3600")
    job = wait_until_asleep(process, outside.folder)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)  # two that come at once are one
    code, _, err = finish(process)
    assert code == 130
    assert "Traceback" not in err
    while is_alive(job):
        time.sleep(0.05)


LONG = ("run", "--models", "iml-gmm,vae", "--datasets", "digits", "--metrics", "kde,kde_tuned")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_long_fits_that_are_killed_ten_times_end_with_the_same_scores(outside, seed):
    """Ten times the run, the server or the job is killed, wherever it happens to be."""
    epochs = ("--epochs", "300", "--seeds", str(seed), "--checkpoint-every", "0.1")
    code, _, err = finish(outside(*LONG, *epochs, "--results", "undisturbed"))
    assert code == 0, err
    n_kills, draw = 0, random.Random(seed)
    while n_kills < 10:
        process = outside(*LONG, *epochs)
        while not (jobs := [job for s in servers_of(process.pid) for job in children_of(s)]):
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(draw.uniform(0.2, 2.0))  # at a random moment
        with contextlib.suppress(ProcessLookupError):
            os.kill(draw.choice([process.pid, *servers_of(process.pid), *jobs]), signal.SIGKILL)
        n_kills += 1
        process.kill()
        process.communicate()
    code, _, err = finish(outside(*LONG, *epochs))
    assert code == 0, err
    undisturbed, disturbed = (
        {record.model: record for record in Store(outside.folder / name).records()}
        for name in ("undisturbed", "results")
    )
    for model, record in undisturbed.items():
        again = disturbed[model]
        assert again.fit.checkpoint.sha256 == record.fit.checkpoint.sha256
        assert again.fit.curves.sha256 == record.fit.curves.sha256
        assert [score.value for score in again.scores] == [score.value for score in record.scores]


def test_results_wait_for_a_tracking_server_that_is_away(outside):
    run = ("run", "--models", "fine", "--datasets", "digits", "--metrics", "kde")
    code, _, err = finish(outside(*run, MLFLOW_TRACKING_URI="http://127.0.0.1:9"))
    assert code == 0
    assert "cannot be written to" in err
    assert "the next run logs them" in err
    assert statuses(outside.folder) == {"fine": "done"}
    code, out, err = finish(outside(*run))
    assert code == 0
    assert "(reused)" in err
    assert re.search(r"^fine ", out, re.MULTILINE)


def test_force_runs_again(imlbench):
    arguments = ("run", "--models", "vae", "--datasets", "digits", *QUICK, "--metrics", "kde")
    assert imlbench(*arguments).exit_code == 0
    trained = next(Path("results/runs").glob("*/checkpoint.safetensors")).stat().st_mtime_ns
    assert imlbench(*arguments, "--force").exit_code == 0
    again = next(Path("results/runs").glob("*/checkpoint.safetensors")).stat().st_mtime_ns
    assert again > trained


def test_plan_and_dry_run_print_the_jobs_and_write_nothing(imlbench):
    planned = imlbench("plan", *SMALL[1:], "--seeds", "0..2")
    assert planned.exit_code == 0
    assert "iml-gmm on digits: 3 jobs\n" in planned.output
    assert "  - seeds 0, 1, 2\n" in planned.output
    assert "6 jobs" in planned.output
    assert imlbench(*SMALL, "--seeds", "0..2", "--dry-run").output == planned.output
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "--models", "vea", "--datasets", "digits"), "Did you mean 'vae'?"),
        (("run", "nothing"), "unknown benchmark 'nothing'"),
        (("run", "--models", "vae"), "--datasets must be given"),
        (("run", *SMALL[1:], "--device", "tpu"), "--device: must be one of auto, cpu"),
        (("run", *SMALL[1:], "--results", "/proc/nowhere"), "must be a folder that can be written"),
        (("run", "--models", "vae", "--datasets", "mnist", "--offline"), "MNIST/raw not found"),
        (("run", *SMALL[1:], "--config", "none.toml"), "none.toml: cannot be read"),
        (("leaderboard",), "there is none. Run some first"),
        (("plugins", "vea"), "Did you mean 'vae'?"),
        (("gc",), "must be a results folder; it has no store.json"),
        (("rm", "--models", "vae"), "must be a results folder; it has no store.json"),
        (("run", "--models", "iml-hmm", "--datasets", "digits"), "everything is skipped"),
    ],
)
def test_bad_input_is_one_message_and_exit_status_2(imlbench, monkeypatch, arguments, message):
    monkeypatch.delenv("IMLBENCH_DATA", raising=False)
    result = imlbench(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not list(Path.cwd().glob("results/runs/*/*"))

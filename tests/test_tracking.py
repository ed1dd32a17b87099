"""MLflow, real: the database in the folder and a server; whatever is moved, copied or deleted."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import ViewType
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.tracking._tracking_service.registry import TrackingStoreRegistry

import imlbench as api
from imlbench import Sources, UserError
from imlbench.plan.config import make_benchmark
from imlbench.plan.planning import make_plan
from imlbench.records.folder import JobFolder, Store
from imlbench.records.record import Record, Status
from imlbench.records.removal import collect_garbage, remove_jobs
from imlbench.records.tracking import Tracker, read_records
from imlbench.runner.contract import Assignment
from imlbench.runner.job import run_job
from tests.plans import identify_data


def run_jobs_here(registry, root: Path, *settings: str, seeds: str = "0") -> Store:
    """Run reference-train on points of the plane in this process."""
    benchmark = make_benchmark(
        None,
        None,
        models=["reference-train"],
        datasets=["toy-2d"],
        metrics=["kde", "modes_covered"],
        seeds=seeds,
        n_samples=50,
        settings=["n_train=200", "n_valid=50", "n_test=60", *settings],
    )
    plan = identify_data(make_plan(benchmark, registry), registry, Sources())
    store = Store(root)
    store.prepare()
    for job in plan.jobs:
        run_job(Assignment(job, root, plan.metrics, plan.artifacts, Sources()), registry)
        store.folder(job.id).end(Status.DONE)
    return store


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A results folder with two jobs, exported to the database in it."""
    from imlbench.plan.registry import Registry

    store = run_jobs_here(Registry(), tmp_path_factory.mktemp("original") / "results", seeds="0,1")
    export(store)
    return store


@pytest.fixture
def store(original, tmp_path) -> Store:
    """A copy of it, which is another folder."""
    shutil.copytree(original.root, tmp_path / "results")
    copy = Store(tmp_path / "results")
    copy.prepare()
    return copy


def export(store: Store, uri: str | None = None, **options) -> None:
    tracker = Tracker(store, uri, **options)
    tracker.export(list(store))
    assert tracker.problem == ""


def client_of(store: Store) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(tracking_uri=f"sqlite:///{store.root.resolve() / 'mlflow.db'}")


def runs_of(store: Store, view: int = ViewType.ACTIVE_ONLY) -> list[mlflow.entities.Run]:
    client = client_of(store)
    experiment = client.get_experiment_by_name("imlbench")
    return list(client.search_runs([experiment.experiment_id], run_view_type=view))


def files_of(run: mlflow.entities.Run) -> list[Path]:
    folder = Path(run.info.artifact_uri.removeprefix("file://"))
    return sorted(path for path in folder.rglob("*") if path.is_file())


def ids(store: Store) -> list[str]:
    return [folder.path.name for folder in store]


def test_a_run_holds_parameters_metrics_data_and_standard_fields(store):
    export(store)
    runs = runs_of(store)
    assert len(runs) == 2
    run = next(run for run in runs if run.data.params["seed"] == "1")
    record = next(record for record in store.records() if record.seed == 1)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == (
        "reference-train toy-2d toy-2d.n_train=200 toy-2d.n_valid=50 toy-2d.n_test=60 seed=1"
    )
    assert run.data.params["n_examples"] == "200"  # all there are, although 3000 are wanted
    assert run.data.params["toy-2d.n_train"] == "200"
    assert run.data.metrics["kde"] == record.score("kde", "5x50").value
    assert run.data.metrics["kde.stderr"] == record.score("kde", "5x50").stderr
    assert run.data.metrics["fit_seconds"] == record.fit.seconds
    assert run.data.tags["mlflow.user"] == record.fit.environment.user
    assert run.data.tags["mlflow.source.name"] == "imlbench"
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("toy-2d", record.fingerprint)
    names = {path.name for path in files_of(run)}
    assert {"record.json", "curves.json", "kde.safetensors", "plane.png"} <= names
    assert "checkpoint.safetensors" not in names


def test_the_experiment_offers_a_list_of_runs_with_their_metrics(store):
    export(store)
    experiment = client_of(store).get_experiment_by_name("imlbench")
    view = json.loads(experiment.tags["mlflow.sharedViewState.imlbench"])
    assert view["selectedColumns"][1:3] == ["metrics.`modes_covered`", "metrics.`kde`"]
    assert "viewStateShareKey=imlbench)" in experiment.tags["mlflow.note.content"]


def test_checkpoints_and_samples_are_logged_on_request(store):
    export(store, with_tensors=True)
    runs = runs_of(store)
    assert len(runs) == 2
    for run in runs:
        assert {"checkpoint.safetensors", "5x50.safetensors"} <= {p.name for p in files_of(run)}


def test_the_experiment_is_named_as_mlflow_says(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    export(store)
    experiment = client_of(store).get_experiment_by_name("mine")
    assert len(client_of(store).search_runs([experiment.experiment_id])) == 2


def test_exporting_again_changes_nothing(store):
    export(store)  # which also says where a copy is
    before = [(run.info.run_id, run.info.end_time, files_of(run)) for run in runs_of(store)]
    export(store)
    export(store)
    assert [(run.info.run_id, run.info.end_time, files_of(run)) for run in runs_of(store)] == before


def test_new_scores_go_to_the_run_that_is_there(store, registry):
    before = {run.info.run_id for run in runs_of(store)}
    run_jobs_here(registry, store.root, "kde.h=0.3", seeds="0,1")
    export(store)
    runs = runs_of(store)
    assert {run.info.run_id for run in runs} == before
    for run in runs:
        assert {"kde", "kde h:0.3"} <= set(run.data.metrics)
        client = client_of(store)
        assert len(client.get_metric_history(run.info.run_id, "kde")) == 1


def test_nothing_is_stored_twice(original):
    assert disk(original.runs, original.root / "mlartifacts") == disk(original.runs)


def disk(*folders: Path) -> int:
    """Bytes of files, of each inode once."""
    stats = {s.st_ino: s for f in folders for p in f.rglob("*") if (s := p.stat()) and p.is_file()}
    return sum(found.st_size for found in stats.values())


def test_a_deleted_run_comes_back_once(store):
    (first, *_) = runs_of(store)
    client_of(store).delete_run(first.info.run_id)
    assert len(runs_of(store)) == 1
    assert len(list(store.records())) == 2  # the folder is the truth
    export(store)
    assert len(runs_of(store)) == 2
    assert len(runs_of(store, ViewType.ALL)) == 2


def test_an_emptied_database_is_filled_again(store):
    shutil.rmtree(store.root / "mlartifacts")
    (store.root / "mlflow.db").unlink()
    export(store)
    assert len(runs_of(store)) == 2


def test_a_deleted_folder_leaves_the_table_and_then_mlflow(store):
    gone, stays = ids(store)
    shutil.rmtree(store.folder(gone).path)
    assert [record.id for record in store.records()] == [stays]
    export(store)
    assert len(runs_of(store)) == 2  # until rubbish is collected
    removed = collect_garbage(store, Tracker(store))
    assert (removed.jobs, removed.runs) == ((), 1)
    assert [run.data.tags["imlbench.job"] for run in runs_of(store)] == [stays]


def test_garbage_is_what_imlbench_has_made(store):
    mine = store.stages / "thesis.txt"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    unneeded = store.stages / f"autoencoder-{'0' * 16}.safetensors"
    unneeded.write_bytes(b"")
    collect_garbage(store, Tracker(store))
    assert mine.exists()
    assert not unneeded.exists()


def test_rm_removes_folder_and_run(store):
    gone, stays = ids(store)
    removed = remove_jobs(store, [gone], Tracker(store))
    assert (removed.jobs, removed.runs) == ((gone,), 1)
    assert ids(store) == [stays]
    assert [run.data.tags["imlbench.job"] for run in runs_of(store)] == [stays]
    assert len(list((store.root / "mlartifacts").iterdir())) == 1


def test_a_copy_writes_nothing_into_its_original_and_nothing_twice(original, store):
    before = {path: path.stat().st_mtime_ns for path in original.root.rglob("*")}
    assert store.name != original.name
    export(store)
    shutil.rmtree(store.folder(ids(store)[0]).path)
    collect_garbage(store, Tracker(store))
    assert {path: path.stat().st_mtime_ns for path in original.root.rglob("*")} == before
    (run,) = runs_of(store)
    assert all(path.is_relative_to(store.root.resolve()) for path in files_of(run))
    assert len(runs_of(original)) == 2


def test_a_moved_folder_keeps_its_runs(store, tmp_path):
    name, before = store.name, sorted(run.info.run_id for run in runs_of(store))
    store.root.rename(tmp_path / "elsewhere")
    moved = Store(tmp_path / "elsewhere")
    moved.prepare()
    export(moved)
    assert moved.name == name
    runs = runs_of(moved)
    assert sorted(run.info.run_id for run in runs) == before
    assert all(path.is_relative_to(moved.root.resolve()) for run in runs for path in files_of(run))
    assert not (tmp_path / "results").exists()


def delete_folder(store: Store) -> Store:
    shutil.rmtree(next(iter(store)).path)
    return store


def delete_run(store: Store) -> Store:
    for run in runs_of(store)[:1]:
        client_of(store).delete_run(run.info.run_id)
    return store


def delete_database(store: Store) -> Store:
    (store.root / "mlflow.db").unlink(missing_ok=True)
    # MLflow keeps a database open as long as the process lives, and the next run is another one.
    SqlAlchemyStore._engine_map.clear()
    TrackingStoreRegistry._get_store_with_resolved_uri.cache_clear()
    return store


def delete_logged_files(store: Store) -> Store:
    shutil.rmtree(store.root / "mlartifacts", ignore_errors=True)
    return store


def copy_store(store: Store) -> Store:
    target = store.root.with_name(f"{store.root.name}-copy")
    shutil.copytree(store.root, target)
    return opened(target)


def move_store(store: Store) -> Store:
    return opened(store.root.rename(store.root.with_name(f"{store.root.name}-moved")))


def opened(root: Path) -> Store:
    store = Store(root)
    store.prepare()
    return store


DEEDS = (
    delete_folder,
    delete_run,
    delete_database,
    delete_logged_files,
    copy_store,
    move_store,
    run_jobs_here,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "deeds",
    list(itertools.permutations(DEEDS, 2)),
    ids=lambda deeds: "-".join(d.__name__ for d in deeds),
)
def test_whatever_is_done_in_between_folder_and_mlflow_agree(store, registry, original, deeds):
    untouched = {path: path.stat().st_mtime_ns for path in original.root.rglob("*")}
    for deed in deeds:
        export(store)
        if deed is run_jobs_here:
            store = run_jobs_here(registry, store.root, seeds="0,1")
        else:
            store = deed(store)
    export(store)
    collect_garbage(store, Tracker(store))
    expected = {record.id: record.score("kde", "5x50").value for record in store.records()}
    runs = runs_of(store)
    assert len(expected) >= 1
    assert {run.data.tags["imlbench.job"]: run.data.metrics["kde"] for run in runs} == expected
    assert len(runs) == len(expected)
    for run in runs:
        files = files_of(run)
        assert files
        assert all(path.is_relative_to(store.root.resolve()) for path in files)
    assert {path: path.stat().st_mtime_ns for path in original.root.rglob("*")} == untouched


def test_exporting_leaves_the_current_folder_alone(store, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (store.root / "mlflow.db").unlink()
    export(store)
    assert not list((tmp_path / "here").iterdir())


def test_a_run_that_was_half_logged_is_logged_once(store):
    shutil.rmtree(store.root / "mlartifacts")
    (store.root / "mlflow.db").unlink()
    client = client_of(store)
    experiment = client.create_experiment("imlbench", artifact_location=store.root.as_uri())
    client.create_run(experiment, tags={"imlbench.job": ids(store)[0]})
    export(store)
    assert len(runs_of(store)) == 2
    assert all("imlbench.content" in run.data.tags for run in runs_of(store))


def test_an_absent_server_is_told_and_costs_nothing(store):
    tracker = Tracker(store, "http://127.0.0.1:9")
    tracker.export(list(store))
    assert "cannot be written to" in tracker.problem
    with pytest.raises(UserError, match="cannot be read"):
        read_records("http://127.0.0.1:9")


def test_an_older_form_of_results_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "runs" / "digits-vae-0").mkdir(parents=True)
    (tmp_path / "runs" / "digits-vae-0" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="must hold results of the form 3; got those of a version"):
        Store(tmp_path)


def test_a_newer_form_of_results_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "store.json").write_text('{"schema_version": 4}')
    with pytest.raises(UserError, match="must hold results of the form 3; got form 4"):
        Store(tmp_path)


def test_results_of_older_code_are_rubbish(store, registry):
    (old, _) = store.records()
    again = old.model_copy(
        update={"id": "toy-2d-again", "code": "newer", "confirmed": old.confirmed + 9}
    )
    JobFolder(store.runs / again.id).write(again)
    export(store)
    assert len(runs_of(store)) == 3
    removed = collect_garbage(store, Tracker(store))
    assert (removed.jobs, removed.runs) == ((old.id,), 1)
    assert again.id in ids(store)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A real MLflow server."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    uri = f"http://127.0.0.1:{port}"
    while True:
        assert process.poll() is None
        try:
            urllib.request.urlopen(f"{uri}/health", timeout=1).close()
            break
        except OSError:
            time.sleep(0.2)
    yield uri
    os.killpg(process.pid, 15)
    process.wait()


def test_reading_from_a_server_leaves_mlflows_own_settings_alone(store, server):
    before = mlflow.get_tracking_uri()
    export(store, server)
    api.results(tracking=server)
    assert mlflow.get_tracking_uri() == before
    with pytest.raises(UserError, match="cannot be read: there is no"):
        api.results(tracking="sqlite:////nowhere/mlflow.db")


def test_a_server_gives_the_same_table(store, server):
    export(store, server)
    export(store, server)
    found = api.results(tracking=server)
    there, here = ([r.confirmed_at(0) for r in f] for f in (found, api.results(store.root)))
    assert there == here
    assert str(found.leaderboard()) == str(api.results(store.root).leaderboard())


def test_a_shared_server_keeps_what_others_have_logged(original, store, server):
    export(original, server)
    export(store, server)  # the same results, from a copy
    assert len(api.results(tracking=server)) == 2
    remove_jobs(store, ids(store), Tracker(store, server))
    assert len(api.results(tracking=server)) == 2 - sum(
        run_store == store.name for run_store in logged_by(server)
    )


def logged_by(uri: str) -> list[str]:
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("imlbench")
    runs = client.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL)
    return [
        run.data.tags["imlbench.store"] for run in runs if run.info.lifecycle_stage == "deleted"
    ]


@pytest.mark.slow
def test_two_hundred_runs_on_a_server_give_the_same_table(store, server, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "many")
    (template, *_) = store.records()
    for number in range(200):
        write_job(store, template, number)
    export(store, server)
    assert len(read_records(server)) == 202
    there, here = api.results(tracking=server), api.results(store.root)
    assert str(there.leaderboard()) == str(here.leaderboard())


def write_job(store: Store, template: Record, number: int) -> None:
    """Write the record of a job that never ran."""
    changes = {
        "id": f"toy-2d-made-{number}",
        "model": f"made-{number % 10}",
        "seed": number // 10,
    }
    JobFolder(store.runs / changes["id"]).write(template.model_copy(update=changes))

"""The exporter: real processes, real MLflow; whatever breaks, the run goes on and is told."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from imlbench import UserError
from imlbench.files import describe
from imlbench.records import tracking
from imlbench.records.exporter import Exporter
from imlbench.records.folder import Store
from imlbench.records.record import (
    Environment,
    Fit,
    Point,
    Record,
    Scored,
    Shown,
    Status,
)
from imlbench.records.tracking import Tracker, read_records

ENVIRONMENT = Environment(
    imlbench="0.1",
    git_commit="0" * 40,
    python="3.12",
    torch="2.6",
    device="cpu",
    machine="a machine",
    n_threads=1,
    user="somebody",
)


def scored(label: str, value: float = 1.5, stderr: float | None = 0.25) -> Scored:
    return Scored(
        metric="kde",
        label=label,
        params={},
        key=f"key of {label}",
        draw="",
        value=value,
        stderr=stderr,
        n_examples=0,
        n_groups=0,
        settings={},
        unit="nats",
        higher_is_better=True,
        value_range=(None, None),
        position=1,
    )


def write_job(store: Store, number: int, **changes: object) -> str:
    """Write a job that never ran, with everything that is exported; return its name."""
    job = f"toy-2d-made-{number:05d}"
    folder = store.folder(job)
    folder.path.mkdir(parents=True, exist_ok=True)
    values = {"loss": 1.0, "valid": 2.0}
    points = [Point(stage="train", step=n, n_steps=3, values=values) for n in (1, 2, 3)]
    checkpoint, curves = folder.write_fit({}, points)
    figure = folder.artifact("plane", "5x50") / "plane.txt"
    figure.parent.mkdir(parents=True, exist_ok=True)
    figure.write_text("a figure")
    folder.log.write_text("a log")
    record = Record(
        id=job,
        model="made",
        family="made",
        dataset="toy-2d",
        seed=number,
        model_params={"n": 3},
        dataset_params={"n_train": 200},
        changed={},
        kind="vector",
        event_shape=(2,),
        fingerprint="0123456789abcdef",
        fit_key="fit",
        code="code",
        shipped_by=("imlbench 0.1", "imlbench 0.1"),
        status=Status.DONE,
        started=1.7e9,
        ended=1.7e9 + 5,
        confirmed=1.7e9,
        fit=Fit(
            seconds=2.0,
            seconds_reused=0.0,
            peak_memory_bytes=2**20,
            n_parameters=6,
            n_train=200,
            used={},
            stages=(),
            environment=ENVIRONMENT,
            checkpoint=checkpoint,
            curves=curves,
        ),
        scores=(scored("kde", float(number)),),
        artifacts=(
            Shown(
                artifact="plane",
                label="plane",
                key="key",
                draw="5x50",
                files={"plane.txt": describe(figure)},
            ),
        ),
    )
    folder.write(record.model_copy(update=changes))
    return job


def make_store(root: Path, n_jobs: int) -> Store:
    store = Store(root)
    store.prepare()
    for number in range(n_jobs):
        write_job(store, number)
    return store


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Store:
    """Three jobs in MLflow's database."""
    store = make_store(tmp_path_factory.mktemp("finished") / "results", 3)
    assert Exporter(store).finish() == []
    return store


@pytest.fixture
def store(finished, tmp_path) -> Store:
    """A copy of them, with its database, of which nothing is known yet."""
    shutil.copytree(finished.root, tmp_path / "results")
    copy = Store(tmp_path / "results")
    copy.prepare()
    return copy


def ids(store: Store) -> list[str]:
    return [folder.path.name for folder in store]


def query(database: Path, text: str, *values: object) -> list[tuple]:
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        return connection.execute(text, values).fetchall()


ACTIVE = """
    SELECT job.value, runs.run_uuid FROM runs JOIN tags AS job USING (run_uuid)
    JOIN tags AS content USING (run_uuid) WHERE runs.lifecycle_stage = 'active'
    AND job.key = 'imlbench.job' AND content.key = 'imlbench.content' ORDER BY job.value
"""


def logged(store: Store, database: str = "mlflow.db") -> list[str]:
    """Return the jobs of the runs that are complete, as the database itself says."""
    return [job for job, _ in query(store.root / database, ACTIVE)]


def metrics(store: Store, job: str) -> dict[str, float]:
    (run,) = [run for name, run in query(store.root / "mlflow.db", ACTIVE) if name == job]
    text = "SELECT key, value FROM latest_metrics WHERE run_uuid = ?"
    return dict(query(store.root / "mlflow.db", text, run))


@contextlib.contextmanager
def exporting(store: Store, uri: str | None = None, **options: bool) -> Iterator[Tracker]:
    """Export in this process, which has MLflow imported once for all tests."""
    tracker = Tracker(store, uri, **options)
    yield tracker
    tracker.close()


def export(store: Store) -> Tracker:
    with exporting(store) as tracker:
        assert tracker.export(list(store)) == {}
        assert tracker.problem == ""
        tracker.confirm()
    return tracker


def needs_process(store: Store, monkeypatch: pytest.MonkeyPatch, **options: bool) -> bool:
    """Whether an exporter starts its process at the end of a run."""

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(1, "started")

    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "Popen", refuse)
        messages = Exporter(store, **options).finish()
    assert all("its process cannot be started: started" in message for message in messages)
    return bool(messages)


# The process


def test_every_job_is_one_run_with_its_values(finished):
    assert logged(finished) == ids(finished)
    for number, job in enumerate(ids(finished)):
        found = metrics(finished, job)
        assert found.pop("peak_memory_mib") == 1.0
        assert found == {
            "kde": number,
            "kde.stderr": 0.25,
            "fit_seconds": 2.0,
            "n_parameters": 6.0,
            "train/loss": 1.0,
            "train/valid": 2.0,
        }


def test_the_experiment_offers_a_list_of_runs_with_their_metrics(finished):
    text = "SELECT value FROM experiment_tags WHERE key = 'mlflow.sharedViewState.imlbench'"
    ((view,),) = query(finished.root / "mlflow.db", text)
    columns = json.loads(view)["selectedColumns"]
    assert columns == ["attributes.`Duration`", "metrics.`kde`", "params.`seed`"]


def test_the_parent_imports_neither_mlflow_nor_torch_and_knows_what_is_logged(finished):
    code = (
        "import subprocess, sys; from pathlib import Path\n"
        "from imlbench.records.exporter import Exporter\n"
        "from imlbench.records.folder import Store\n"
        "store = Store(Path(sys.argv[1])); subprocess.Popen = None\n"
        "exporter = Exporter(store); exporter.submit([f.path.name for f in store])\n"
        "print(exporter.finish())\n"
        "print({'mlflow', 'torch', 'sqlalchemy', 'imlbench.records.tracking'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(finished.root)]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.stdout.splitlines() == ["[]", "set()"], answer


def test_a_process_that_is_killed_is_replaced_and_every_job_is_one_run(store):
    for number in range(3, 13):
        write_job(store, number)
    exporter = Exporter(store)
    exporter.submit(ids(store))
    answers: list[dict] = []
    while {"logged": "toy-2d-made-00003"} not in answers:
        answers += exporter._child.exchange(1.0)
        assert not exporter._child.is_silent
    os.kill(exporter._child._process.pid, signal.SIGKILL)
    exporter._child._process.wait()
    before = logged(store)
    assert 3 < len(before) < 13
    assert exporter.finish() == []
    assert logged(store) == ids(store)
    unfinished = query(
        store.root / "mlflow.db",
        "SELECT count(*) FROM runs WHERE lifecycle_stage = 'active' AND status = 'RUNNING'",
    )
    assert unfinished == [(0,)]


def test_two_exporters_at_once_log_every_job_once(tmp_path):
    store = make_store(tmp_path / "results", 6)
    exporters = [Exporter(store), Exporter(store)]
    for exporter in exporters:
        exporter.submit(ids(store))
    assert [exporter.finish() for exporter in exporters] == [[], []]
    assert logged(store) == ids(store)
    assert query(store.root / "mlflow.db", "SELECT count(*) FROM runs") == [(6,)]


@contextlib.contextmanager
def hung_server() -> Iterator[tuple[str, threading.Event]]:
    """A server that accepts and never answers; the event tells that it was asked."""
    asked, held = threading.Event(), []

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                held.append(server.accept())
                asked.set()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=accept)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", asked
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    for connection, _ in held:
        connection.close()


def test_a_hung_server_costs_no_more_than_the_patience(store):
    with hung_server() as (uri, asked):
        exporter = Exporter(store, uri)
        exporter.submit(ids(store))
        process = exporter._child._process
        assert asked.wait(60)
        exporter.poll()
        (message,) = exporter.finish(patience=0.2)
    assert message == (
        f"MLflow at {uri} cannot be written to (there was no answer for 0.2 s); "
        f"the results are safe in {store.runs} and the next run logs them."
    )
    assert process.returncode == -signal.SIGKILL


# The parent's side, beside a process that is not ours


@pytest.fixture
def instead(monkeypatch, tmp_path) -> Callable[[str], None]:
    """Have a shell script run instead of the process."""

    def replace(script: str) -> None:
        path = tmp_path / "instead"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return replace


def test_a_process_that_dies_is_replaced_once_and_told(store, instead, tmp_path):
    instead(f'echo started >> {tmp_path}/starts; echo \'{{"at": "some-job"}}\'; exit 3')
    (message,) = Exporter(store).finish()
    assert "(its process ended with exit code 3 while it logged job some-job)" in message
    assert (tmp_path / "starts").read_text() == "started\n" * 2


def test_all_that_a_hung_process_has_started_is_killed(store, instead, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    instead(f"echo nonsense; sleep 1000 > {tmp_path}/pipe & wait")
    exporter = Exporter(store)
    exporter.submit(ids(store))
    with (tmp_path / "pipe").open("rb") as pipe:
        (message,) = exporter.finish(patience=0.1)
        assert pipe.read() == b""  # its end: nobody has it open any more
    assert "there was no answer for 0.1 s" in message


def test_submitting_never_waits(store, instead, monkeypatch):
    instead("sleep 1000")
    monkeypatch.setattr(Exporter, "_lacks", lambda *arguments: True)
    exporter = Exporter(store)
    names = [f"job-{number:060d}" for number in range(10_000)]
    for name in names:
        exporter.submit([name])
    assert len(exporter._child.outbox) > 500_000  # pipes hold less than was submitted
    exporter.finish(patience=0.1)


def test_what_cannot_be_logged_is_told_in_one_line(store, instead):
    answers = [
        {"note": "mlflow.db was damaged"},
        {"refused": "a", "reason": "too long"},
        {"refused": "b", "reason": "too long"},
        {"logged": "b"},
        {"done": ""},
    ]
    instead("\n".join(f"echo '{json.dumps(answer)}'" for answer in answers))
    assert Exporter(store).finish() == [
        "mlflow.db was damaged",
        "job a could not be logged to MLflow (too long); the others were.",
    ]


def test_passwords_are_not_told(store, instead):
    instead("exit 1")
    (message,) = Exporter(store, "http://me:secret@host/").finish()
    assert message.startswith("MLflow at http://me:***@host/ cannot")


# What is noticed


def test_nothing_new_starts_no_process(store, monkeypatch):
    export(store)
    for folder in store:
        folder.confirm()
    assert not needs_process(store, monkeypatch)
    job = write_job(store, 7, status=None)  # it runs
    assert not needs_process(store, monkeypatch)
    write_job(store, 7)
    assert needs_process(store, monkeypatch)
    assert needs_process(store, monkeypatch, with_tensors=True)
    export(store)
    assert job in logged(store)
    assert not needs_process(store, monkeypatch)


def test_what_is_known_may_be_lost_or_damaged(store, monkeypatch):
    known = store.root / "exported.json"
    for content in ("", "[]", "{", '[["a"], ["b"], {"job": [1, 2]}]'):
        export(store)
        assert not needs_process(store, monkeypatch)
        known.write_text(content)
        assert needs_process(store, monkeypatch)
    known.unlink()
    assert needs_process(store, monkeypatch)
    export(store)


def delete(store: Store) -> None:
    (store.root / "mlflow.db").unlink()


def empty(database: Path) -> None:
    for table in ("tags", "params", "metrics", "latest_metrics", "inputs", "runs"):
        query(database, f"DELETE FROM {table}")


def delete_runs(store: Store) -> None:
    empty(store.root / "mlflow.db")


def delete_softly(store: Store) -> None:
    query(store.root / "mlflow.db", "UPDATE runs SET lifecycle_stage = 'deleted'")


def delete_experiment(store: Store) -> None:
    query(store.root / "mlflow.db", "UPDATE experiments SET lifecycle_stage = 'deleted'")


def restore(store: Store) -> None:
    """Put a database in place that is older than the last job."""
    database = store.root / "mlflow.db"
    shutil.copy(database, store.root / "backup")
    write_job(store, 7)
    export(store)
    assert "toy-2d-made-00007" in logged(store)
    os.replace(store.root / "backup", database)
    assert "toy-2d-made-00007" not in logged(store)


def delete_files(store: Store) -> None:
    shutil.rmtree(store.root / "mlartifacts")


@pytest.mark.parametrize(
    "deed", [delete, delete_runs, delete_softly, delete_experiment, restore, delete_files]
)
def test_whatever_happens_to_the_database_it_is_brought_up_to_date(store, monkeypatch, deed):
    export(store)
    deed(store)
    assert needs_process(store, monkeypatch)
    export(store)
    assert logged(store) == ids(store)
    for _, run in query(store.root / "mlflow.db", ACTIVE):
        assert (store.root / "mlartifacts" / run / "artifacts" / "record.json").exists()
    experiment = "SELECT lifecycle_stage FROM experiments WHERE name = 'imlbench'"
    assert query(store.root / "mlflow.db", experiment) == [("active",)]
    assert not needs_process(store, monkeypatch)


def truncate(database: Path) -> None:
    os.truncate(database, database.stat().st_size // 2)


def overwrite(database: Path) -> None:
    database.write_bytes(b"no database, but what somebody has written" * 100)


def void(database: Path) -> None:
    database.write_bytes(b"")


def replace_by_folder(database: Path) -> None:
    database.unlink()
    database.mkdir()


def spoil(database: Path) -> None:
    with database.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(40 * 4096))


@pytest.mark.parametrize(
    "deed",
    [
        truncate,
        overwrite,
        pytest.param(void, marks=pytest.mark.slow),
        pytest.param(replace_by_folder, marks=pytest.mark.slow),
        pytest.param(spoil, marks=pytest.mark.slow),
    ],
)
def test_a_damaged_database_is_set_aside_and_a_new_one_is_filled(store, monkeypatch, deed):
    export(store)
    deed(store.root / "mlflow.db")
    assert needs_process(store, monkeypatch)
    tracker = export(store)
    (aside,) = store.root.glob("mlflow.db.damaged-*")
    (note,) = tracker.notes
    assert note.startswith("mlflow.db was damaged (")
    assert note.endswith(
        f"it was set aside as {aside.name}, and a new one was made from the results."
    )
    assert "\n" not in note
    assert logged(store) == ids(store)


def test_removing_keeps_what_is_known(store, monkeypatch):
    export(store)
    (gone, *stay) = ids(store)
    with exporting(store) as tracker:
        assert tracker.remove([gone]) == 1
    store.folder(gone).clear()
    assert logged(store) == stay
    assert not needs_process(store, monkeypatch)


# The database


@contextlib.contextmanager
def full_disk(n_bytes: int) -> Iterator[None]:
    """Let no file grow beyond a size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("n_bytes", [100_000, pytest.param(500_000, marks=pytest.mark.slow)])
def test_a_full_disk_leaves_no_half_a_database(tmp_path, n_bytes):
    store = make_store(tmp_path / "results", 1)
    with full_disk(n_bytes), exporting(store) as tracker:
        assert tracker.export(list(store)) == {}
    assert "cannot be written to (" in tracker.problem
    assert not list(store.root.glob("mlflow.db*"))


def test_an_older_database_is_migrated_or_left_as_it_was(tmp_path):
    store = make_store(tmp_path / "results", 1)
    database = store.root / "mlflow.db"
    make_older(database)
    before = database.read_bytes()
    with full_disk(200_000), exporting(store) as tracker:
        tracker.export(list(store))
    assert tracker.problem
    assert database.read_bytes() == before
    assert [path.name for path in store.root.glob("mlflow.db*")] == ["mlflow.db"]
    export(store)
    assert logged(store) == ids(store)
    assert ("mine",) in query(database, "SELECT name FROM experiments")


def make_older(database: Path) -> None:
    """Make a database as an older MLflow makes it, with an experiment of the user's in it."""
    from alembic import command
    from alembic.script import ScriptDirectory
    from mlflow.store.db import utils
    from mlflow.store.tracking.dbmodels.initial_models import Base

    engine = utils.create_sqlalchemy_engine(f"sqlite:///{database}")
    Base.metadata.create_all(engine)
    config = utils._get_alembic_config(f"sqlite:///{database}")
    script = ScriptDirectory.from_config(config)
    older = script.get_revision(script.get_current_head()).down_revision
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, older)
    engine.dispose()
    query(database, "INSERT INTO experiments (name, lifecycle_stage) VALUES ('mine', 'active')")


def test_the_database_of_a_newer_mlflow_is_left_alone(store):
    query(store.root / "mlflow.db", "UPDATE alembic_version SET version_num = 'ffffffffffff'")
    before = (store.root / "mlflow.db").read_bytes()
    with exporting(store) as tracker:
        tracker.export(list(store))
    assert "made by a newer version of MLflow" in tracker.problem
    assert (store.root / "mlflow.db").read_bytes() == before


def test_the_folder_may_have_any_name(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    store = make_store(tmp_path / "a?b#c%20d e ü@x:y", 1)
    export(store)
    assert sorted(path.name for path in tmp_path.iterdir()) == [store.root.name, "here"]
    assert not list((tmp_path / "here").iterdir())
    assert logged(store) == ids(store)
    shutil.copy(store.root / "mlflow.db", tmp_path / "plain.db")
    client = MlflowClient(f"sqlite:///{tmp_path / 'plain.db'}")
    ((_, run),) = query(tmp_path / "plain.db", ACTIVE)
    assert "record.json" in {file.path for file in client.list_artifacts(run)}
    client._tracking_client.store._dispose_engine()
    store.root.rename(tmp_path / "moved %?")
    moved = Store(tmp_path / "moved %?")
    moved.prepare()
    export(moved)
    ((place,),) = query(moved.root / "mlflow.db", "SELECT artifact_uri FROM runs")
    assert place.startswith((moved.root / "mlartifacts").as_uri())


def test_readers_change_nothing(finished, store):
    database = store.root / "mlflow.db"
    query(database, "UPDATE alembic_version SET version_num = 'ffffffffffff'")
    before = database.read_bytes(), database.stat().st_mtime_ns
    with pytest.raises(UserError, match="cannot be read: Can't locate revision"):
        read_records(f"sqlite:///{database}")
    assert (database.read_bytes(), database.stat().st_mtime_ns) == before
    version = "SELECT version_num FROM alembic_version"
    ((current,),) = query(finished.root / "mlflow.db", version)
    query(database, "UPDATE alembic_version SET version_num = ?", current)
    export(store)
    found = read_records(f"sqlite:///{database}")
    there, here = ([record.confirmed_at(0) for record in r] for r in (found, store.records()))
    assert there == here


def test_a_lock_is_not_waited_for_forever(store, monkeypatch):
    from filelock import FileLock

    monkeypatch.setattr(tracking, "_PATIENCE", 0.05)
    with FileLock(store.root / "locks" / "mlflow.lock"), exporting(store) as tracker:
        tracker.export(list(store))
        assert "(another imlbench has been writing to it for 0.05 s)" in tracker.problem
        with pytest.raises(UserError, match="another imlbench"):
            tracker.remove(ids(store))


# Jobs that cannot be logged, and names that have to be changed


def test_a_job_that_cannot_be_logged_holds_up_no_other(store, monkeypatch):
    job = write_job(store, 0, started=1e300)  # no database holds such a time
    write_job(store, 7)
    for _ in range(2):
        with exporting(store) as tracker:
            refused = tracker.export(list(store))
            assert tracker.problem == ""
            tracker.confirm()
        assert list(refused) == [job]
        assert "too large" in refused[job]
        assert logged(store) == [name for name in ids(store) if name != job]
        assert needs_process(store, monkeypatch)
    write_job(store, 0)
    export(store)
    assert logged(store) == ids(store)


def test_names_are_made_legal_and_kept_apart(store):
    labels = ["fid@10k (%)", "fid 10k", "fid#10k", "../x//y/", "m" * 300, "m" * 299 + "n", "é"]
    scores = [scored(label, float(n), None) for n, label in enumerate(labels)]
    clash = [scored("rmse", 50.0, 51.0), scored("rmse.stderr", 52.0, None)]
    job = write_job(
        store,
        0,
        fit=None,
        scores=(*scores, *clash, scored("fit_seconds", 53.0, None)),
        model_params={"note": "x" * 9000, "a b(c)": 1},
    )
    points = [
        Point(stage="stage (100%)", step=1, n_steps=1, values={"loss": 60.0}),
        Point(stage="stage [100%]", step=1, n_steps=1, values={"loss": 61.0}),
    ]
    store.folder(job).write_fit({}, points)
    query(store.root / "mlflow.db", "DELETE FROM tags")  # log it anew, with its curves
    export(store)
    found = metrics(store, job)
    assert sorted(found.values()) == [*range(7), 50, 51, 52, 53, 60, 61]
    assert found["fid 10k"] == 1.0
    assert found["x/y"] == 3.0
    assert found["stage 100/loss"] in (60.0, 61.0)
    assert max(map(len, found)) <= 250
    params = query(store.root / "mlflow.db", "SELECT key, value FROM params")
    assert ("a b c", "1") in params
    assert max(len(value) for _, value in params) == 500


# Servers


def test_a_hung_server_is_told(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with hung_server() as (uri, _), exporting(store, uri) as tracker:
        tracker.export(list(store))
    assert "timed out" in tracker.problem
    assert "\n" not in tracker.problem


class _Broken(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(500)
        self.send_header("Retry-After", "3600")
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *arguments: object) -> None:
        pass


def test_a_broken_server_is_told(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with ThreadingHTTPServer(("127.0.0.1", 0), _Broken) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with exporting(store, f"http://127.0.0.1:{server.server_port}") as tracker:
            tracker.export(list(store))
        server.shutdown()
        thread.join()
    assert "500" in tracker.problem


@pytest.mark.parametrize("n_broken", [1, 3])
def test_a_server_that_fails_for_a_job_is_not_one_that_is_down(store, monkeypatch, n_broken):
    from requests.exceptions import RetryError

    write_job(store, 7)
    broken, log = ids(store)[:n_broken], Tracker._log

    def fail(self, client, experiment, folder, *rest):
        if folder.path.name in broken:
            raise RetryError("too many 500 error responses")
        log(self, client, experiment, folder, *rest)

    monkeypatch.setattr(Tracker, "_log", fail)
    shutil.copy(store.root / "mlflow.db", store.root / "server.db")
    empty(store.root / "server.db")
    with exporting(store, f"sqlite:///{store.root / 'server.db'}") as tracker:
        refused = tracker.export(list(store))
        tracker._remote._tracking_client.store._dispose_engine()
    assert list(refused) == broken[:2]
    assert bool(tracker.problem) == (n_broken == 3)
    assert len(logged(store, "server.db")) == (3 if n_broken == 1 else 0)

"""MLflow: absent, away, mad, dying in the middle; its database deleted, damaged, old, locked."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.campaign.faults import FaultClass
from tests.campaign.faults.files import DAMAGES
from tests.campaign.oracle import (
    Kind,
    Problem,
    judge_answer,
    judge_tracking,
    read_records,
    rerun,
    warns,
)
from tests.campaign.process import PATIENCE, Place
from tests.campaign.trials import BASIC, Lab, Trial, copy_folder, single

IMPATIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "2", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}

MOST_BYTES = 100_000
"""More than a run of four jobs sends to a server."""

CUTS = 12
"""Random moments at which a server dies."""

Connection = Callable[[socket.socket], None]


def _say(status: str, body: bytes) -> Connection:
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"

    def answer(client: socket.socket) -> None:
        client.recv(1 << 16)
        client.sendall(head.encode() + body)

    return answer


def _say_nothing(client: socket.socket) -> None:
    while client.recv(1 << 16):
        pass


SERVERS: dict[str, Connection] = {
    "answers nothing": _say_nothing,
    "answers 500": _say("500 Internal Server Error", b"oops"),
    "answers 503": _say("503 Service Unavailable", b"later"),
    "answers 401": _say("401 Unauthorized", b"{}"),
    "answers 404": _say("404 Not Found", b"nothing"),
    "answers a page": _say("200 OK", b"<!doctype html><title>log in</title>"),
    "answers null": _say("200 OK", b"null"),
    "answers garbage": lambda client: client.sendall(b"\x00\xff" * 1000),
    "hangs up": lambda client: None,
}

ADDRESSES = {
    "nobody there": "http://127.0.0.1:9",
    "no such host": "http://no-such-host.invalid:5000",
    "no such scheme": "gopher://nowhere",
    "no address": "http://",
    "a file for a folder": "sqlite:////dev/null/mlflow.db",
}


@contextlib.contextmanager
def _serve(handle: Connection) -> Iterator[str]:
    """Serve a port on this machine; yields the address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_accept, args=(server, handle), daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


def _accept(server: socket.socket, handle: Connection) -> None:
    def attend(client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            handle(client)

    with contextlib.suppress(OSError):
        while True:
            client, _ = server.accept()
            threading.Thread(target=attend, args=(client,), daemon=True).start()


class _RealServer:
    """An MLflow server, started when it is first needed, and a wire to it that can be cut."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "server"
        self.database = self.folder / "mlflow.db"
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def start(self) -> None:
        with self._lock:
            if self._process is None:
                self._start()

    def _start(self) -> None:
        self.folder.mkdir()
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        arguments = ["--backend-store-uri", f"sqlite:///{self.database}", "--workers", "1"]
        with (self.folder / "log.txt").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), *arguments],
                cwd=self.folder,
                env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        while not self._answers():
            assert self._process.poll() is None, (self.folder / "log.txt").read_text()
            time.sleep(0.1)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health").read())
        return False

    def stop(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, 9)  # asked to end, it may wait for ever
            self._process.wait()

    def wire(self, n_bytes: int | None) -> Connection:
        """Return what forwards to it until so many bytes were sent to it, and then hangs up."""
        left = [n_bytes if n_bytes is not None else 1 << 62]

        def forward(client: socket.socket) -> None:
            with socket.create_connection(("127.0.0.1", self.port)) as server:
                answers = threading.Thread(target=_copy, args=(server, client), daemon=True)
                answers.start()
                while (part := client.recv(1 << 12)) and left[0] > 0:
                    left[0] -= len(part)
                    if left[0] > 0:
                        server.sendall(part)

        return forward


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while part := source.recv(1 << 16):
            target.sendall(part)


def _execute(database: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def _said(*statements: str) -> Callable[[Path], None]:
    """Return the damage of some SQL statements."""
    return lambda database: _execute(database, *statements)


def _delete_with_files(database: Path) -> None:
    database.unlink()
    shutil.rmtree(database.parent / "mlartifacts")


def _turn_into_another(database: Path) -> None:
    database.unlink()
    _execute(database, "CREATE TABLE pets (name TEXT)")


DATABASES: dict[str, Callable[[Path], None]] = {
    "deleted": Path.unlink,
    "deleted with its files": _delete_with_files,
    **{how: DAMAGES[how] for how in ("emptied", "truncated", "garbage", "a folder")},
    "another database": _turn_into_another,
    "of a newer version": _said("UPDATE alembic_version SET version_num = 'of-tomorrow'"),
    "without a table": _said("DROP TABLE latest_metrics"),
    "without tags": _said("DELETE FROM tags"),
    "without metrics": _said("DELETE FROM metrics", "DELETE FROM latest_metrics"),
    "all runs deleted by hand": _said(
        "UPDATE runs SET lifecycle_stage = 'deleted', deleted_time = 1"
    ),
    "one run deleted by hand": _said(
        "UPDATE runs SET lifecycle_stage = 'deleted' "
        "WHERE run_uuid = (SELECT min(run_uuid) FROM runs)"
    ),
    "the experiment deleted by hand": _said(
        "UPDATE experiments SET lifecycle_stage = 'deleted' WHERE name = 'imlbench'"
    ),
    "the experiment renamed": _said("UPDATE experiments SET name = 'mine' WHERE name = 'imlbench'"),
    "runs unfinished": _said("UPDATE runs SET status = 'RUNNING', end_time = NULL"),
    "read-only": lambda database: database.chmod(0o444),
    "files deleted": lambda database: shutil.rmtree(database.parent / "mlartifacts"),
}
"""What happens to the database of a finished folder; in the end each job has one active run."""

ABSENT = {
    "cannot be imported": "raise ImportError('no mlflow here')",
    "breaks at import": "raise RuntimeError('half installed')",
    "exits at import": "import sys; sys.exit(1)",
    "is an empty package": "",
    "hangs at import": "import time; time.sleep(10 ** 6)",
}


def trials(lab: Lab) -> Iterator[Trial]:
    """Yield trials of MLflow itself, of servers, and of the database in the folder."""
    for name, source in ABSENT.items():
        yield single(f"mlflow {name}", partial(_absent, lab, source))
    for name, handle in SERVERS.items():
        yield single(f"server {name}", partial(_bad_server, lab, handle, IMPATIENT))
    yield single(
        "server answers nothing, usual patience", partial(_bad_server, lab, _say_nothing, {})
    )
    for name, address in ADDRESSES.items():
        yield single(f"address: {name}", partial(_bad_address, lab, address, IMPATIENT))
    for name, damage in DATABASES.items():
        yield single(f"database {name}", partial(_database, lab, damage))
    yield single("database restored from an older copy", partial(_older, lab))
    yield single("database locked by another process", partial(_locked, lab))
    yield from _cuts(lab)


def _cuts(lab: Lab) -> Iterator[Trial]:
    """Yield trials in which a real server dies after some bytes, and comes back."""
    chance, server = lab.random("tracking"), _RealServer(lab.folder)
    lab.at_end.callback(server.stop)
    for _ in lab.times(CUTS):
        n_bytes = chance.randrange(1, MOST_BYTES)
        name = f"server dies after {n_bytes} bytes, and comes back"
        yield single(name, partial(_cut, lab, server, n_bytes))


def _cut(lab: Lab, server: _RealServer, n_bytes: int, place: Place) -> list[Problem]:
    server.start()
    truth = lab.truth(BASIC)
    experiment = uuid.uuid4().hex
    names = {"MLFLOW_EXPERIMENT_NAME": experiment, **IMPATIENT}
    with _serve(server.wire(n_bytes)) as address:
        answer = place.imlbench(*BASIC, environment={**names, "MLFLOW_TRACKING_URI": address})
    problems = [*judge_answer(answer, {0})]
    with _serve(server.wire(None)) as address:
        back = {**names, "MLFLOW_TRACKING_URI": address}
        for _ in range(2):
            problems += judge_answer(place.imlbench(*BASIC, environment=back), {0})
    problems += [*judge_tracking(server.database, truth.jobs, experiment)]
    return problems + rerun(place, truth)[0]


def _absent(lab: Lab, source: str, place: Place) -> list[Problem]:
    """Run without MLflow, then with it."""
    truth = lab.truth(BASIC)
    stub = place.site / "mlflow"
    stub.mkdir()
    (stub / "__init__.py").write_text(source)
    answer = place.imlbench(*BASIC, timeout=PATIENCE / 2)
    problems = [*judge_answer(answer, {0})]
    if not warns([answer], "MLflow", "mlflow"):
        problems.append(Problem(Kind.HIDDEN, "nothing says that MLflow lacks the results"))
    shutil.rmtree(stub)
    return problems + rerun(place, truth)[0]


def _bad_server(
    lab: Lab, handle: Connection, environment: dict[str, str], place: Place
) -> list[Problem]:
    with _serve(handle) as address:
        return _bad_address(lab, address, environment, place)


def _bad_address(
    lab: Lab, address: str, environment: dict[str, str], place: Place
) -> list[Problem]:
    """Run with a server that is none, then with the database in the folder."""
    truth = lab.truth(BASIC)
    answer = place.imlbench(*BASIC, environment={**environment, "MLFLOW_TRACKING_URI": address})
    problems = [*judge_answer(answer, {0})]
    if not warns([answer], "MLflow"):
        problems.append(Problem(Kind.HIDDEN, "nothing says that the server lacks the results"))
    return problems + rerun(place, truth)[0]


def _database(lab: Lab, damage: Callable[[Path], None], place: Place) -> list[Problem]:
    truth = lab.truth(BASIC)
    lab.copy(truth, place)
    damage(place.results / "mlflow.db")
    return rerun(place, truth, is_told=True)[0]


def _older(lab: Lab, place: Place) -> list[Problem]:
    """Restore the database that was there when half of the jobs were done."""
    half = lab.truth((*BASIC[:-1], "0"))
    truth = lab.truth(BASIC)
    lab.copy(truth, place)
    (place.results / "mlflow.db").unlink()
    copy_folder(half.results / "mlflow.db", place.results / "mlflow.db")
    return rerun(place, truth)[0]


def _locked(lab: Lab, place: Place) -> list[Problem]:
    """Hold a transaction open while jobs run: MLflow waits, and says so in the end."""
    truth = lab.truth(BASIC)
    lab.copy(lab.truth((*BASIC[:-1], "0")), place)
    database = sqlite3.connect(place.results / "mlflow.db", isolation_level=None)
    with contextlib.closing(database):
        database.execute("BEGIN EXCLUSIVE")
        answer = place.imlbench(*BASIC)
        database.execute("ROLLBACK")
    problems = [*judge_answer(answer, {0})]
    n_done = sum(record["status"] == "done" for record in read_records(place.results).values())
    if n_done < len(truth.jobs):
        problems.append(Problem(Kind.LOST, f"only {n_done} jobs are done"))
    return problems + rerun(place, truth)[0]


CLASS = FaultClass(
    "tracking",
    "MLflow cannot be imported; its server is away, hangs, answers errors or nonsense, dies after "
    "a random number of bytes and comes back; its database is deleted, emptied, damaged, replaced, "
    "restored from an older copy, locked, or changed by hand.",
    "no job is lost; a warning says what was not logged; afterwards each job is there exactly "
    "once, or a warning says that the database cannot be used.",
    trials,
)

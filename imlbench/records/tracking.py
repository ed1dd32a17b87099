"""MLflow: records are exported by the parent process, and can be read back from a server.

The job folders are the truth. What a server lacks is logged by the next run, whatever was moved,
copied or deleted; a job's record is one MLflow run, found again by its tags.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock
from pydantic import ValidationError

from imlbench.errors import UserError
from imlbench.plan.identity import digest
from imlbench.records import terms
from imlbench.records.folder import JobFolder, Store
from imlbench.records.record import Record, Status

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

EXPERIMENT = "imlbench"
JOB, CONTENT, FIT, STORE, TENSORS = (
    f"imlbench.{name}" for name in ("job", "content", "fit", "store", "tensors")
)
_PAGE = 1000
_MOST_METRICS = 1000  # that one request may hold
_MOST_COLUMNS = 8  # metrics in the list of runs
_VIEW = "imlbench"


def _configure() -> None:
    """Keep MLflow quiet, offline, and from waiting for ever; what the user has set stays."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",  # --offline means offline
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }.items():
        os.environ.setdefault(name, value)


def experiment_name() -> str:
    """Return the name of the experiment: ``$MLFLOW_EXPERIMENT_NAME``, or ``imlbench``."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT


@dataclass(frozen=True)
class _Logged:
    """What an MLflow run says of itself."""

    run_id: str
    job: str
    content: str
    fit: str
    store: str
    is_deleted: bool
    has_tensors: bool
    metrics: dict[str, float]

    @classmethod
    def of(cls, run: Run) -> _Logged:
        tags = run.data.tags
        is_deleted = run.info.lifecycle_stage == "deleted"
        return cls(
            run.info.run_id,
            tags.get(JOB, ""),
            tags.get(CONTENT, ""),
            tags.get(FIT, ""),
            tags.get(STORE, ""),
            is_deleted,
            TENSORS in tags,
            run.data.metrics,
        )


class Tracker:
    """Exports a results folder to an MLflow server, or to the database in the folder.

    Arguments:
        store: The results folder.
        uri: A tracking URI; by default ``$MLFLOW_TRACKING_URI``, or ``sqlite`` in the folder.
        with_tensors: Log checkpoints and samples, too.

    Attributes:
        problem: Why results could not be logged; empty if they could.
    """

    def __init__(self, store: Store, uri: str | None = None, *, with_tensors: bool = False) -> None:
        _configure()
        root = store.root.resolve()
        named = uri or os.environ.get("MLFLOW_TRACKING_URI")
        self.store, self.with_tensors = store, with_tensors
        self.database = None if named else root / "mlflow.db"
        self.uri = named or f"sqlite:///{root / 'mlflow.db'}"
        self._artifacts = root / "mlartifacts"
        self.problem = ""

    def export(self, folders: Sequence[JobFolder]) -> None:
        """Log what the server lacks of these folders; nothing more after a failure."""
        records = [(folder, record) for folder in folders if (record := _ended(folder))]
        if self.problem or not records:
            return
        try:
            with self._locked():
                client = self._client()
                experiment = self._experiment(client)
                known = self._known(client, experiment, [record.id for _, record in records])
                for folder, record in records:
                    self._upsert(client, experiment, folder, record, known[record.id])
                if len(records) > 1:
                    self._offer_view(client, experiment, [record for _, record in records])
        except Exception as error:  # MLflow raises many kinds; none may cost a result
            self.problem = (
                f"MLflow at {self.uri} cannot be written to ({_first_line(error)}); "
                f"the results are safe in {self.store.runs} and the next run logs them."
            )

    def remove(self, jobs: Sequence[str]) -> int:
        """Delete this folder's MLflow runs of jobs; return how many there were."""
        return self._remove(lambda logged: logged.job in jobs)

    def remove_orphans(self, jobs: Sequence[str]) -> int:
        """Delete this folder's MLflow runs of all jobs but these; return how many there were."""
        return self._remove(lambda logged: logged.job not in jobs)

    def _remove(self, is_unwanted: Callable[[_Logged], bool]) -> int:
        if self.database is not None and not self.database.exists():
            return 0
        try:
            with self._locked():
                client = self._client()
                found = client.get_experiment_by_name(experiment_name())
                everything = _search(client, str(found.experiment_id)) if found else []
                unwanted = [
                    logged
                    for logged in everything
                    if self._is_ours(logged) and not logged.is_deleted and is_unwanted(logged)
                ]
                for logged in unwanted:
                    self._delete(client, logged)
        except Exception as error:  # MLflow raises many kinds, and all mean the same here
            raise UserError(
                f"MLflow: {self.uri} cannot be written to: {_first_line(error)}. "
                "Check MLFLOW_TRACKING_URI, and run the command again."
            ) from error
        return len(unwanted)

    def _delete(self, client: MlflowClient, logged: _Logged) -> None:
        client.delete_run(logged.run_id)
        if self.database is not None:
            shutil.rmtree(self._artifacts / logged.run_id, ignore_errors=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Let no other imlbench log from the same folder meanwhile."""
        path = self.store.root / "locks" / "mlflow.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path):
            if self.database is not None and self.database.exists():
                _relocate(self.database, self._artifacts.as_uri())
            yield

    def _client(self) -> MlflowClient:
        import mlflow
        from mlflow.store.tracking import sqlalchemy_store  # noqa: F401 - before the folder is set

        if self.database is not None:  # or it makes a folder "mlruns" in the current one
            os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = self._artifacts.as_uri()
        return mlflow.MlflowClient(tracking_uri=self.uri)

    def _experiment(self, client: MlflowClient) -> str:
        name = experiment_name()
        experiment = client.get_experiment_by_name(name)
        if experiment is not None:
            if experiment.lifecycle_stage == "deleted":
                client.restore_experiment(experiment.experiment_id)
            return str(experiment.experiment_id)
        location = self._artifacts.as_uri() if self.database is not None else None
        tags = {"mlflow.experimentKind": "custom_model_development"}
        return str(client.create_experiment(name, artifact_location=location, tags=tags))

    def _offer_view(self, client: MlflowClient, experiment: str, records: Sequence[Record]) -> None:
        """Offer a list of runs with their metrics, by a link; MLflow's own list shows none."""
        found = {(score.position, terms.legal(score.label)) for r in records for score in r.scores}
        metrics = [f"metrics.`{name}`" for _, name in sorted(found)[:_MOST_COLUMNS]]
        columns = ["attributes.`Duration`", *metrics, "params.`seed`"]
        link = f"#/experiments/{experiment}/runs?workflowType=machine_learning&viewStateShareKey="
        tags = {
            f"mlflow.sharedViewState.{_VIEW}": json.dumps({"selectedColumns": columns}),
            "mlflow.note.content": f"[All runs with their metrics]({link}{_VIEW})",
        }
        present = client.get_experiment(experiment).tags
        for key, value in tags.items():
            if present.get(key) != value:
                client.set_experiment_tag(experiment, key, value)

    def _known(
        self, client: MlflowClient, experiment: str, jobs: Sequence[str]
    ) -> dict[str, list[_Logged]]:
        """Return what the server has of jobs: ours, and what others logged of the same."""
        only = f"tags.`{JOB}` = '{jobs[0]}'" if len(jobs) == 1 else ""
        known: dict[str, list[_Logged]] = defaultdict(list)
        for logged in _search(client, experiment, only):
            known[logged.job].append(logged)
        return known

    def _is_ours(self, logged: _Logged) -> bool:
        return self.database is not None or logged.store == self.store.name

    def _upsert(
        self,
        client: MlflowClient,
        experiment: str,
        folder: JobFolder,
        record: Record,
        known: Sequence[_Logged],
    ) -> None:
        """Leave exactly one run of the record: the one that is there, brought up to date."""
        content = digest(record.model_dump(mode="json", exclude={"confirmed"}))
        same = [logged for logged in known if logged.content == content]
        ours = [logged for logged in known if self._is_ours(logged)]
        present = next((logged for logged in same if not logged.is_deleted), None)
        if present is not None:
            if not self._has_files(present.run_id, folder):
                self._log_files(client, present.run_id, folder)
            elif self.with_tensors and not present.has_tensors:
                self._log_tensors(client, present.run_id, folder)
            return
        fit = digest(record.fit.model_dump(mode="json") if record.fit else None)
        kept = next((logged for logged in (*same, *ours) if logged.fit == fit), None)
        if kept is not None and kept.is_deleted:
            client.restore_run(kept.run_id)
        for logged in ours:
            if logged != kept and not logged.is_deleted:
                self._delete(client, logged)
        self._log(client, experiment, folder, record, kept, content, fit)

    def _log(
        self,
        client: MlflowClient,
        experiment: str,
        folder: JobFolder,
        record: Record,
        kept: _Logged | None,
        content: str,
        fit: str,
    ) -> None:
        """Log everything, or what is new to the run that there is."""
        from mlflow.entities import Param, RunTag

        ended = int((record.ended or record.started) * 1000)
        values = terms.values(record)
        if kept is None:
            run = client.create_run(
                experiment,
                start_time=int(record.started * 1000),
                tags={JOB: record.id, STORE: self.store.name},
                run_name=terms.run_name(record),
            )
            run_id = run.info.run_id
            params = [Param(key, value) for key, value in terms.params(record).items()]
            points = terms.curves(folder, ended)
            client.log_batch(run_id, params=params)
            client.log_inputs(run_id, [terms.data(record)])
        else:
            run_id, points = kept.run_id, []
            values = {name: v for name, v in values.items() if kept.metrics.get(name) != v}
        points += terms.points(values, ended)
        for start in range(0, len(points), _MOST_METRICS):
            client.log_batch(run_id, metrics=points[start : start + _MOST_METRICS])
        self._log_files(client, run_id, folder)
        tags = {**terms.tags(record), STORE: self.store.name, FIT: fit}
        client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        state = "FINISHED" if record.status is Status.DONE else "FAILED"
        client.set_terminated(run_id, status=state, end_time=ended)
        client.set_tag(run_id, CONTENT, content)  # last: until then, the run is not up to date

    def _has_files(self, run_id: str, folder: JobFolder) -> bool:
        """Whether the files that belong to a run are there; a server's are."""
        if self.database is None:
            return True
        logged = self._artifacts / run_id / "artifacts" / "record.json"
        return logged.exists() and logged.samefile(folder.path / "record.json")

    def _log_files(self, client: MlflowClient, run_id: str, folder: JobFolder) -> None:
        """Log what is worth seeing; in the results folder itself nothing is stored twice."""
        names = ["record.json", "curves.json", "log.txt", "artifacts", "scores"]
        self._upload(client, run_id, folder, names)
        if self.with_tensors:
            self._log_tensors(client, run_id, folder)

    def _log_tensors(self, client: MlflowClient, run_id: str, folder: JobFolder) -> None:
        """Log checkpoint and samples; they stay there, whatever is logged later."""
        self._upload(client, run_id, folder, ["checkpoint.safetensors", "samples"])
        client.set_tag(run_id, TENSORS, "true")

    def _upload(
        self, client: MlflowClient, run_id: str, folder: JobFolder, names: Sequence[str]
    ) -> None:
        """Log those files and folders that there are; in the database's folder they are links."""
        present = [path for name in names if (path := folder.path / name).exists()]
        target = self._artifacts / run_id / "artifacts"
        for path in present if self.database is not None else ():
            shutil.rmtree(target / path.name, ignore_errors=True)
            _link(path, target / path.name)
        for path in present if self.database is None else ():
            if path.is_dir():
                client.log_artifacts(run_id, str(path), path.name)
            else:
                client.log_artifact(run_id, str(path))


def read_records(uri: str) -> list[Record]:
    """Return the records that an MLflow server holds, one for each job, the newest.

    Raises:
        UserError: The server cannot be read.
    """
    _configure()
    try:
        from mlflow import MlflowClient

        file = Path(uri.removeprefix("sqlite:///"))
        if uri.startswith("sqlite:///") and not file.exists():
            raise FileNotFoundError(f"there is no {file}")
        client = MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name(experiment_name())
        if experiment is None:
            return []
        ids = [
            logged.run_id
            for logged in _search(client, str(experiment.experiment_id))
            if logged.content and not logged.is_deleted
        ]
        with ThreadPoolExecutor(8) as pool:
            read = pool.map(lambda run_id: _download(client, run_id), ids)
            found = [record for record in read if record]
    except Exception as error:  # MLflow raises many kinds, and all mean the same here
        raise UserError(
            f"MLflow: {uri} cannot be read: {_first_line(error)}. Check the address."
        ) from error
    newest: dict[str, Record] = {}
    for record in sorted(found, key=lambda record: record.ended or record.started):
        newest[record.id] = record
    return sorted(newest.values(), key=lambda record: record.id)


def _download(client: MlflowClient, run_id: str) -> Record | None:
    """Return the record that a run holds; ``None`` if there is none, or of another version."""
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory() as folder:
        try:
            path = client.download_artifacts(run_id, "record.json", folder)
            return Record.model_validate_json(Path(path).read_bytes())
        except (ValidationError, OSError, MlflowException):
            return None


def _search(client: MlflowClient, experiment: str, only: str = "") -> list[_Logged]:
    """Return the runs of an experiment that imlbench has logged, deleted ones too."""
    from mlflow.entities import ViewType

    found: list[_Logged] = []
    token: str | None = None
    while True:
        page = client.search_runs([experiment], only, ViewType.ALL, _PAGE, page_token=token)
        found += [logged for run in page if (logged := _Logged.of(run)).job]
        token = page.token
        if not token:
            return found


def _relocate(database: Path, artifacts: str) -> None:
    """Let the database of a folder that was moved or copied speak of where it now is.

    MLflow stores absolute addresses. Those of the former place would lead there: into the original
    of a copy.
    """
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        rows = connection.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
        former = {str(location).partition("/mlartifacts")[0] for (location,) in rows if location}
        here = artifacts.removesuffix("/mlartifacts")
        for place in former - {here}:
            for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                    f"WHERE {column} LIKE ? || '/mlartifacts%'",
                    (here, len(place) + 1, place),
                )


def _link(source: Path, target: Path) -> None:
    """Link a file, or all files of a folder; copy them where links cannot be made."""
    if source.is_dir():
        for path in source.iterdir():
            _link(path, target / path.name)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _ended(folder: JobFolder) -> Record | None:
    record = folder.read()
    return record if record is not None and record.status is not None else None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

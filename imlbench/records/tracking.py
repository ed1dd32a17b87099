"""MLflow: records are exported to it, and can be read back from a server.

The job folders are the truth. What a server lacks is logged by the next run, whatever was moved,
copied or deleted; a job's record is one MLflow run, found again by its tags. A run exports by a
process of its own: see :mod:`imlbench.records.exporter`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import Timeout

from imlbench.errors import UserError
from imlbench.files import lock
from imlbench.plan.identity import digest
from imlbench.records import terms
from imlbench.records.database import (
    Database,
    chain,
    copied,
    is_of_damage,
    is_of_the_disk,
    said,
)
from imlbench.records.exported import (
    Exported,
    experiment_name,
    look_at,
    unreachable,
    without_password,
)
from imlbench.records.folder import JobFolder, Store, parse_record
from imlbench.records.record import Record, Status

if TYPE_CHECKING:
    from mlflow import MlflowClient

JOB, CONTENT, FIT, STORE, TENSORS = (
    f"imlbench.{name}" for name in ("job", "content", "fit", "store", "tensors")
)
_PAGE = 1000
_MOST_METRICS = 1000  # that one request may hold
_MOST_PARAMS = 100
_MOST_COLUMNS = 8  # metrics in the list of runs
_MOST_ALONE = 20  # jobs that are asked for one by one
_MOST_STRIKES = 2  # errors of a server, one after the other, that may be a job's fault
_PATIENCE = 30.0  # seconds for another process that is logging a job
_VIEW = "imlbench"
_FILES = ("record.json", "curves.json", "log.txt", "artifacts", "scores")
_TIMED_OUT = 504
_OF_ALL_JOBS = {401, 403, 408, 429}  # answers of a server that are not about what was sent


def _configure() -> None:
    """Keep MLflow quiet, offline, and from waiting for ever; what the user has set stays."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",  # --offline means offline
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
        "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",  # it may name hours
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }.items():
        os.environ.setdefault(name, value)


@dataclass(frozen=True)
class _Logged:
    """What an MLflow run says of itself."""

    run_id: str
    is_deleted: bool
    job: str
    content: str
    fit: str
    store: str
    has_tensors: bool

    @classmethod
    def of(cls, run_id: str, stage: str, tags: dict[str, str]) -> _Logged:
        job, content, fit, store = (tags.get(name, "") for name in (JOB, CONTENT, FIT, STORE))
        return cls(run_id, stage == "deleted", job, content, fit, store, TENSORS in tags)


_Report = Callable[[str, str, str], None]


def _ignore(what: str, job: str, reason: str) -> None:
    """Take no notice."""


class Tracker:
    """Exports a results folder to an MLflow server, or to the database in the folder.

    Arguments:
        store: The results folder.
        uri: A tracking URI; by default ``$MLFLOW_TRACKING_URI``, or ``sqlite`` in the folder.
        with_tensors: Log checkpoints and samples, too.
        report: Called with ``"at"`` and a job before it is logged, with ``"logged"`` and the job
            after it, or with ``"refused"``, the job and the reason; during a long search with
            ``"alive"``.

    Attributes:
        problem: Why results could not be logged; empty if they could.
        notes: What else the user has to know, one line each.
    """

    def __init__(
        self,
        store: Store,
        uri: str | None = None,
        *,
        with_tensors: bool = False,
        report: _Report = _ignore,
    ) -> None:
        _configure()
        root = store.root.resolve()
        named = uri or os.environ.get("MLFLOW_TRACKING_URI")
        self.store, self.with_tensors = store, with_tensors
        self.database = None if named else Database(root)
        self.uri = named or f"sqlite:///{root / 'mlflow.db'}"
        self.exported = Exported.read(store)
        self._artifacts = root / "mlartifacts"
        self._report = report
        self._remote: MlflowClient | None = None
        self._experiment: tuple[MlflowClient, str] | None = None
        self._strikes = 0
        self._has_logged = False
        self.problem = ""
        self.notes: list[str] = []

    def prepare(self) -> None:
        """Import what is needed to log; connect to nothing."""
        import mlflow  # noqa: F401 - it is only to be there

        if self.database is not None:
            from mlflow.store.tracking import sqlalchemy_store  # noqa: F401

    def export(self, folders: Sequence[JobFolder]) -> dict[str, str]:
        """Log what the server lacks of these folders; nothing more after a failure.

        Returns:
            The jobs that cannot be logged, though others can, and why.
        """
        refused: dict[str, str] = {}
        if self.problem or not any(self._content(folder) for folder in folders):
            return refused
        try:
            self._export(folders, refused)
        except Exception as error:  # MLflow raises many kinds; none may cost a result
            self.problem = unreachable(self.uri, self.store, said(error))
        return refused

    def _export(self, folders: Sequence[JobFolder], refused: dict[str, str]) -> None:
        self._experiment = None
        try:
            self._log_missing(folders, refused)
        except Exception as error:
            if self.database is None or not is_of_damage(error):
                raise
            self._set_aside(self.database)
            self._log_missing(folders, refused)

    def _log_missing(self, folders: Sequence[JobFolder], refused: dict[str, str]) -> None:
        """Log jobs one by one, letting other processes log theirs in between."""
        for folder in self._missing(folders):
            job = folder.path.name
            self._report("at", job, "")
            with self._opened() as (client, experiment):
                reason = self._try(client, experiment, folder)
            if reason:
                refused[job] = reason
            else:
                refused.pop(job, None)
                self._has_logged = True
            self._report("refused" if reason else "logged", job, reason)
        if self._has_logged and len(folders) > 1:
            with self._opened() as (client, experiment):
                self._offer_view(client, experiment, folders)
            self._has_logged = False

    def _missing(self, folders: Sequence[JobFolder]) -> list[JobFolder]:
        """Return the folders that the server lacks, or may lack if they are few."""
        if len(folders) <= _MOST_ALONE:
            return [folder for folder in folders if self._content(folder)]
        with self._opened() as (client, experiment):
            known = self._known(client, experiment)
        return [f for f in folders if not self._is_there(f, known.get(f.path.name, []))]

    def _try(self, client: MlflowClient, experiment: str, folder: JobFolder) -> str:
        """Log a job; return why it cannot be, if that is its own fault."""
        job = folder.path.name
        try:
            content, record = self._content(folder), folder.read()
            if content is not None and record is not None:
                known = self._known(client, experiment, job).get(job, [])
                self._upsert(client, experiment, folder, record, known, content)
            self._strikes = 0
        except Exception as error:  # MLflow raises many kinds
            if self._content(folder) is None:  # it was removed meanwhile
                return ""
            if not self._is_fault_of_job(error, client, experiment):
                raise
            with contextlib.suppress(Exception):  # what is half logged is made anew
                for logged in self._known(client, experiment, job).get(job, []):
                    if self._is_ours(logged) and not logged.content:
                        self._delete(client, logged)
            return said(error)
        return ""

    def _is_fault_of_job(self, error: Exception, client: MlflowClient, experiment: str) -> bool:
        """Whether other jobs can be logged after an error."""
        if self.database is not None:
            return not (is_of_the_disk(error) or is_of_damage(error))
        status = _status(error)
        if 400 <= status < 500:
            return status not in _OF_ALL_JOBS
        self._strikes += 1
        if self._strikes > _MOST_STRIKES or status == _TIMED_OUT:
            return False
        try:
            client.get_experiment(experiment)
        except Exception:  # MLflow raises many kinds; the first error is the one to tell
            return False
        return True

    def _set_aside(self, database: Database) -> None:
        with self._locked():
            fault = database.find_fault()
            if fault:  # or another process has made a new one
                aside = database.set_aside()
                self.notes.append(
                    f"{database.path.name} was damaged ({fault}); it was set aside as "
                    f"{aside.name}, and a new one was made from the results."
                )

    def confirm(self) -> None:
        """Note what the database in the folder now holds of the jobs that were looked at."""
        if self.database is None or not self.database.path.exists():
            return
        try:
            with self._opened() as (client, experiment):
                state = self.exported.state()
                known = self._known(client, experiment)
                self.exported.jobs = {
                    job: entry._replace(has_tensors=all(run.has_tensors for run in known[job]))
                    for job, entry in list(self.exported.jobs.items())
                    if job in known and self._is_there(self.store.folder(job), known[job])
                }
                self.exported.write(state)
        except Exception as error:  # MLflow raises many kinds
            self.problem = unreachable(self.uri, self.store, said(error))

    def close(self) -> None:
        """Let go of the database."""
        if self.database is not None:
            self.database.close()

    def remove(self, jobs: Sequence[str]) -> int:
        """Delete this folder's MLflow runs of jobs; return how many there were."""
        unwanted = set(jobs)
        return self._remove(lambda logged: logged.job in unwanted)

    def remove_orphans(self, jobs: Sequence[str]) -> int:
        """Delete this folder's MLflow runs of all jobs but these; return how many there were."""
        wanted = set(jobs)
        return self._remove(lambda logged: logged.job not in wanted)

    def _remove(self, is_unwanted: Callable[[_Logged], bool]) -> int:
        if self.database is not None and not self.database.path.exists():
            return 0
        try:
            with self._opened() as (client, experiment):
                known = self._known(client, experiment)
                unwanted = [
                    logged
                    for runs in known.values()
                    for logged in runs
                    if self._is_ours(logged) and not logged.is_deleted and is_unwanted(logged)
                ]
                for logged in unwanted:
                    self._delete(client, logged)
        except Exception as error:  # MLflow raises many kinds, and all mean the same here
            raise UserError(
                f"MLflow: {without_password(self.uri)} cannot be written to: {said(error)}. "
                "Check MLFLOW_TRACKING_URI, and run the command again."
            ) from error
        if self.exported.jobs:
            self.confirm()
        return len(unwanted)

    def _delete(self, client: MlflowClient, logged: _Logged) -> None:
        if not logged.is_deleted:
            client.delete_run(logged.run_id)
        if self.database is not None:
            shutil.rmtree(self._artifacts / logged.run_id, ignore_errors=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Let no other imlbench log from the same folder meanwhile."""
        try:
            guard = lock(self.store.root / "locks" / "mlflow.lock").acquire(timeout=_PATIENCE)
        except Timeout:
            raise TimeoutError(
                f"another imlbench has been writing to it for {_PATIENCE:g} s"
            ) from None
        with guard:
            yield

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[MlflowClient, str]]:
        """Give a client and the experiment, while no other imlbench logs."""
        with self._locked():
            client = self._client()
            if self._experiment is None or self._experiment[0] is not client:
                self._experiment = client, self._find_experiment(client)
            yield self._experiment

    def _client(self) -> MlflowClient:
        if self.database is not None:
            return self.database.open()
        if self._remote is None:
            import mlflow

            self._remote = mlflow.MlflowClient(tracking_uri=self.uri)
        return self._remote

    def _find_experiment(self, client: MlflowClient) -> str:
        name = experiment_name()
        experiment = client.get_experiment_by_name(name)
        if experiment is not None:
            if experiment.lifecycle_stage == "deleted":
                client.restore_experiment(experiment.experiment_id)
            return str(experiment.experiment_id)
        location = self._artifacts.as_uri() if self.database is not None else None
        tags = {"mlflow.experimentKind": "custom_model_development"}
        return str(client.create_experiment(name, artifact_location=location, tags=tags))

    def _offer_view(
        self, client: MlflowClient, experiment: str, folders: Sequence[JobFolder]
    ) -> None:
        """Offer a list of runs with their metrics, by a link; MLflow's own list shows none."""
        found = {column for folder in folders for column in _columns(folder)}
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
        self, client: MlflowClient, experiment: str, job: str = ""
    ) -> dict[str, list[_Logged]]:
        """Return what the server has of a job, or of all: ours, and what others logged."""
        if self.database is not None:
            found = _select(self.database, experiment, job)
        else:
            found = _search(client, experiment, job, self._report)
        known: dict[str, list[_Logged]] = defaultdict(list)
        for logged in found:
            known[logged.job].append(logged)
        return known

    def _content(self, folder: JobFolder) -> str | None:
        """Return what identifies a job's results; ``None`` if it has not ended."""
        job = folder.path.name
        entry = look_at(folder, self.exported.jobs.get(job))
        if entry is None:
            self.exported.jobs.pop(job, None)
            return None
        self.exported.jobs[job] = entry
        return entry.content

    def _is_ours(self, logged: _Logged) -> bool:
        return self.database is not None or logged.store == self.store.name

    def _is_there(self, folder: JobFolder, known: Sequence[_Logged]) -> bool:
        """Whether nothing has to be logged of a job."""
        content = self._content(folder)
        if content is None:
            return True
        active = [run for run in known if not run.is_deleted]
        present = self._find_present(active, content)
        if present is None or any(self._is_ours(run) and run != present for run in active):
            return False
        if self.with_tensors and not present.has_tensors:
            return False
        return self._has_files(present.run_id, folder)

    def _find_present(self, known: Sequence[_Logged], content: str) -> _Logged | None:
        """Return the run that says what a job's record says, preferably ours."""
        same = [run for run in known if run.content == content and not run.is_deleted]
        return next((run for run in same if self._is_ours(run)), same[0] if same else None)

    def _upsert(
        self,
        client: MlflowClient,
        experiment: str,
        folder: JobFolder,
        record: Record,
        known: Sequence[_Logged],
        content: str,
    ) -> None:
        """Leave exactly one run of the record: the one that is there, brought up to date."""
        ours = [run for run in known if self._is_ours(run)]
        present = self._find_present(known, content)
        fit = digest(record.fit.model_dump(mode="json") if record.fit else None)
        same = [run for run in known if run.content == content]
        kept = present or next((run for run in (*same, *ours) if run.fit == fit), None)
        if kept is not None and kept.is_deleted:
            client.restore_run(kept.run_id)
        for run in ours:
            if run != kept and not run.is_deleted:
                self._delete(client, run)
        if present is None:
            self._log(client, experiment, folder, record, kept, content, fit)
        elif not self._has_files(present.run_id, folder):
            self._log_files(client, present.run_id, folder)
        elif self.with_tensors and not present.has_tensors:
            self._log_tensors(client, present.run_id, folder)

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
        tags = {**terms.tags(record), STORE: self.store.name, FIT: fit}
        if kept is None:
            params = [Param(key, value) for key, value in terms.params(record).items()]
            points = terms.curves(folder, ended, values)
            run = client.create_run(
                experiment,
                start_time=int(record.started * 1000),
                tags={JOB: record.id, STORE: self.store.name},
                run_name=terms.run_name(record),
            )
            run_id = run.info.run_id
            for start in range(0, len(params), _MOST_PARAMS):
                client.log_batch(run_id, params=params[start : start + _MOST_PARAMS])
            client.log_inputs(run_id, [terms.data(record)])
        else:
            run_id, points = kept.run_id, []
            logged = client.get_run(run_id).data.metrics
            values = {name: v for name, v in values.items() if logged.get(name) != v}
        points += terms.points(values, ended)
        for start in range(0, len(points), _MOST_METRICS):
            client.log_batch(run_id, metrics=points[start : start + _MOST_METRICS])
        self._log_files(client, run_id, folder)
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
        self._upload(client, run_id, folder, _FILES)
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
        with _reading(uri) as client:
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
            f"MLflow: {without_password(uri)} cannot be read: {said(error)}. Check the address."
        ) from error
    newest: dict[str, Record] = {}
    for record in sorted(found, key=lambda record: record.ended or record.started):
        newest[record.id] = record
    return sorted(newest.values(), key=lambda record: record.id)


@contextlib.contextmanager
def _reading(uri: str) -> Iterator[MlflowClient]:
    """Open a server, or a copy of a database."""
    if uri.startswith("sqlite:///"):
        with copied(Path(uri.removeprefix("sqlite:///"))) as client:
            yield client
    else:
        from mlflow import MlflowClient

        yield MlflowClient(tracking_uri=uri)


def _download(client: MlflowClient, run_id: str) -> Record | None:
    """Return the record that a run holds; ``None`` if there is none, or of another version."""
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory() as folder:
        try:
            path = client.download_artifacts(run_id, "record.json", folder)
            return parse_record(Path(path).read_bytes())
        except (ValueError, OSError, MlflowException):
            return None


def _select(database: Database, experiment: str, job: str = "") -> list[_Logged]:
    """Return the runs that imlbench has logged, deleted ones too, past MLflow: it takes seconds."""
    only = "AND runs.run_uuid IN (SELECT run_uuid FROM tags WHERE key = ? AND value = ?)"
    query = (
        "SELECT runs.run_uuid, runs.lifecycle_stage, tags.key, tags.value FROM runs "
        "JOIN tags ON tags.run_uuid = runs.run_uuid "
        f"WHERE runs.experiment_id = ? AND tags.key IN (?, ?, ?, ?, ?) {only if job else ''}"
    )
    values = [int(experiment), JOB, CONTENT, FIT, STORE, TENSORS, *((JOB, job) if job else ())]
    tags: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    with database.connect() as connection:
        for run_id, stage, key, value in connection.execute(query, values):
            tags[run_id, stage][key] = value
    return [_Logged.of(*run, found) for run, found in tags.items() if found.get(JOB)]


def _search(
    client: MlflowClient, experiment: str, job: str = "", report: _Report = _ignore
) -> list[_Logged]:
    """Return the runs of an experiment that imlbench has logged, deleted ones too."""
    from mlflow.entities import ViewType

    only = f"tags.`{JOB}` = '{job}'" if job else ""
    found: list[_Logged] = []
    token: str | None = None
    while True:
        page = client.search_runs([experiment], only, ViewType.ALL, _PAGE, page_token=token)
        runs = (_Logged.of(r.info.run_id, r.info.lifecycle_stage, r.data.tags) for r in page)
        found += [logged for logged in runs if logged.job]
        report("alive", "", "")
        token = page.token
        if not token:
            return found


def _columns(folder: JobFolder) -> set[tuple[int, str]]:
    """Return where the metrics of a job stand in a table, and their names in MLflow."""
    try:
        scores = json.loads((folder.path / "record.json").read_bytes())["scores"]
        return {(score["position"], terms.legal(score["label"])) for score in scores}
    except (OSError, ValueError, TypeError, KeyError):
        return set()


def _status(error: Exception) -> int:
    """Return the status of HTTP that an error of a server, or before one, stands for."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException, Timeout

    causes = list(chain(error))
    if any(isinstance(cause, Timeout) for cause in causes):
        return _TIMED_OUT
    if isinstance(error, RequestException):
        return 500 if error.response is None else error.response.status_code
    if isinstance(error, MlflowException):
        is_unknown = error.error_code == "ENDPOINT_NOT_FOUND"
        return 500 if is_unknown else int(error.get_http_status_code())
    is_of_content = isinstance(error, OSError | ValueError | TypeError | ArithmeticError)
    return 400 if is_of_content and not is_of_the_disk(error) else 500


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

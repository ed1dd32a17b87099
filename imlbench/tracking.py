"""MLflow: job folders are logged by the parent process, and read back as a data frame."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imlbench.errors import UserError
from imlbench.store import JobFolder, Status, Store

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient

EXPERIMENT = "imlbench"


class Tracker:
    """An MLflow tracking server, or the database in the results folder.

    The job folders are the durable record: what cannot be logged now is logged by the next run.

    Arguments:
        store: The results folder.
        uri: A tracking URI; by default ``$MLFLOW_TRACKING_URI``, or ``sqlite`` in the folder.

    Attributes:
        problem: Why results could not be logged; empty if they could.
    """

    def __init__(self, store: Store, uri: str | None = None) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # --offline means offline
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        root = store.root.resolve()
        self.store = store
        self.is_default = not (uri or os.environ.get("MLFLOW_TRACKING_URI"))
        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}"
        self._artifacts = (root / "mlartifacts").as_uri() if self.is_default else None
        self.problem = ""
        self._is_new = self._is_missing
        self._logged: set[Path] = set()

    def log_pending(self, folders: Iterable[JobFolder]) -> None:
        """Log the folders that the server does not hold yet; nothing more after a failure."""
        for folder in folders:
            if self.problem or self._holds(folder):
                continue
            try:
                client = self._client()
                self._log(client, self._experiment(client), folder)
                self._logged.add(folder.path)
            except Exception as error:  # MLflow raises many kinds; none may cost a result
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                self.problem = (
                    f"MLflow at {self.uri} cannot be written to ({reason}); "
                    f"the results are safe in {self.store.runs} and the next run logs them."
                )

    def runs(self) -> pd.DataFrame:
        """Return the newest run of every job, one row each, as MLflow's ``search_runs`` names them.

        Raises:
            UserError: The server cannot be read.
        """
        if self._is_missing:
            import pandas as pd

            return pd.DataFrame()
        try:
            import mlflow

            mlflow.set_tracking_uri(self.uri)
            found = mlflow.search_runs(
                experiment_names=[EXPERIMENT],
                filter_string="tags.`imlbench.job` != ''",
                order_by=["attributes.start_time DESC"],
            )
        except Exception as error:  # MLflow raises many kinds, and all mean the same here
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"MLflow: {self.uri} cannot be read: {reason}. Check MLFLOW_TRACKING_URI."
            ) from error
        frame: pd.DataFrame = found
        return frame.drop_duplicates("tags.imlbench.job") if len(frame) else frame

    @property
    def _is_missing(self) -> bool:
        """Whether there is no database yet, or none any more."""
        return self.is_default and not (self.store.root / "mlflow.db").exists()

    def _holds(self, folder: JobFolder) -> bool:
        if self._is_new and folder.path not in self._logged:
            return False  # whatever the folder says, it meant an older database
        known = folder.read("tracking.json")
        return known.get("uri") == self.uri and known.get("content") == _content(folder)

    def _client(self) -> MlflowClient:
        import mlflow

        return mlflow.MlflowClient(tracking_uri=self.uri)

    def _experiment(self, client: MlflowClient) -> str:
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is not None:
            return str(experiment.experiment_id)
        return str(client.create_experiment(EXPERIMENT, artifact_location=self._artifacts))

    def _log(self, client: MlflowClient, experiment: str, folder: JobFolder) -> None:
        from mlflow.entities import Metric, Param, RunTag

        job, fit, end = (folder.read(f"{name}.json") for name in ("config", "fit", "status"))
        started = int((folder.path / "config.json").stat().st_mtime * 1000)
        ended = int((folder.path / "status.json").stat().st_mtime * 1000)
        name = f"{job['model']} {job['dataset']} seed {job['seed']}"
        tags = {**_tags(folder, job, fit), "mlflow.runName": name}
        last = RunTag("imlbench.job", job["id"])  # a run counts once it has this
        run = client.create_run(experiment, start_time=started)
        run_id = run.info.run_id
        params = _params(job)
        points = [Metric(key, value, ended, 0) for key, value in _metrics(folder, fit).items()]
        points += [
            Metric(f"{record['stage']}/{key}", value, ended, record["step"])
            for record in fit.get("history", [])
            for key, value in record["values"].items()
        ]
        client.log_batch(
            run_id,
            params=[Param(key, value) for key, value in params.items()],
            tags=[RunTag(key, value) for key, value in tags.items()],
        )
        for start in range(0, len(points), 1000):  # the most that one request may hold
            client.log_batch(run_id, metrics=points[start : start + 1000])
        client.log_artifacts(run_id, str(folder.path))
        state = "FINISHED" if end["status"] == Status.DONE else "FAILED"
        client.set_tag(run_id, last.key, last.value)
        client.set_terminated(run_id, status=state, end_time=ended)
        content = _content(folder)
        folder.write("tracking.json", {"uri": self.uri, "run": run_id, "content": content})


def _content(folder: JobFolder) -> str:
    """What changes when a job is run or scored again."""
    files = (folder.path / name for name in ("status.json", "metrics.json"))
    return " ".join(str(file.stat().st_mtime_ns) for file in files if file.exists())


def _tags(folder: JobFolder, job: dict[str, Any], fit: dict[str, Any]) -> dict[str, str]:
    end = folder.read("status.json")
    facts = ("unit", "higher_is_better", "settings")
    scores = {
        name: {fact: score[fact] for fact in facts} for name, score in folder.scores().items()
    }
    tags = {
        "model": job["model"],
        "dataset": job["dataset"],
        "seed": str(job["seed"]),
        "fingerprint": job["fingerprint"],
        "code": ", ".join(dict.fromkeys(job["code"])),
        "status": end["status"],
        "reason": end["reason"],
        "scores": json.dumps(scores),
        **fit.get("environment", {}),
    }
    return {f"imlbench.{name}": value for name, value in tags.items() if value}


def _params(job: dict[str, Any]) -> dict[str, str]:
    pairs = {"seed": job["seed"], "n_samples": job["n_samples"], "n_draws": job["n_draws"]}
    pairs |= {f"model.{name}": value for name, value in job["model_params"].items()}
    pairs |= {f"dataset.{name}": value for name, value in job["dataset_params"].items()}
    return {name: str(value) for name, value in pairs.items()}


def _metrics(folder: JobFolder, fit: dict[str, Any]) -> dict[str, float]:
    values: dict[str, float] = {}
    for name, score in folder.scores().items():
        values[name] = score["value"]
        if score["stderr"] is not None:
            values[f"{name}.stderr"] = score["stderr"]
    if fit:
        values["fit_seconds"] = fit["seconds"]
        values["peak_memory_mib"] = fit["peak_memory_bytes"] / 2**20
        values["n_parameters"] = fit["n_parameters"]
    return values

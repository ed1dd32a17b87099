"""What a record is called in MLflow: a run's name, its tags, parameters, metrics and data set."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from imlbench.plan.settings import assignments
from imlbench.records.folder import JobFolder
from imlbench.records.record import Record

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, Metric

LONGEST = 500
"""Characters of a parameter that every store takes."""


def run_name(record: Record) -> str:
    """Return a name that tells what is not at its default, as runs stand below each other."""
    words = [record.model, record.dataset, *assignments(record.changed), f"seed={record.seed}"]
    return " ".join(words)


def tags(record: Record) -> dict[str, str]:
    """Return MLflow's own tags, and those of how a job ended and where."""
    environment = record.fit.environment if record.fit else None
    found = {
        "mlflow.user": environment.user if environment else "",
        "mlflow.source.name": "imlbench",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": environment.git_commit.removesuffix("+") if environment else "",
        "mlflow.note.content": _description(record),
        "imlbench.status": str(record.status),
        "imlbench.reason": record.reason,
        "imlbench.version": environment.imlbench if environment else "",
        "imlbench.torch": environment.torch if environment else "",
        "imlbench.device": environment.device if environment else "",
    }
    return {name: value[:LONGEST] for name, value in found.items() if value}


def _description(record: Record) -> str:
    text = f"{record.model} on {record.dataset}, seed {record.seed}: {record.status}"
    return f"{text}: {record.reason}" if record.reason else text


def params(record: Record) -> dict[str, str]:
    """Return what a job was given, a dataset's parameters with its name before them."""
    pairs = {
        "model": record.model,
        "dataset": record.dataset,
        "seed": str(record.seed),
        **dict(pair.split("=", 1) for pair in assignments(record.params)),
        **{
            f"{record.dataset}.{name}": value
            for name, value in (pair.split("=", 1) for pair in assignments(record.dataset_params))
        },
    }
    return {name: value[:LONGEST] for name, value in pairs.items()}


def data(record: Record) -> DatasetInput:
    """Return the data set, as MLflow describes data sets."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    profile = {"event_shape": record.event_shape, "n_train": record.fit and record.fit.n_train}
    dataset = Dataset(
        name=record.dataset,
        digest=record.fingerprint,
        source_type="imlbench",
        source=json.dumps(record.dataset_params),
        profile=json.dumps(profile),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


def values(record: Record) -> dict[str, float]:
    """Return the metrics by a name that MLflow takes; samples drawn last have the plain names."""
    last = next(reversed(record.draws), "")
    found: dict[str, float] = {}
    for score in record.scores:
        name = legal(score.label if score.draw in ("", last) else f"{score.label}/{score.draw}")
        found[name] = score.value
        if score.stderr is not None:
            found[f"{name}.stderr"] = score.stderr
    if record.fit:
        found["fit_seconds"] = record.fit.seconds
        found["peak_memory_mib"] = record.fit.peak_memory_bytes / 2**20
        found["n_parameters"] = float(record.fit.n_parameters)
    return found


def legal(name: str) -> str:
    """Return a metric's name in the characters that MLflow allows."""
    return re.sub(r"[^\w\-. :/]", " ", name.replace("=", ":"), flags=re.ASCII).strip()


def points(named: dict[str, float], timestamp: int) -> list[Metric]:
    """Return values by name as metrics; the timestamp is in milliseconds since 1970."""
    from mlflow.entities import Metric

    return [Metric(name, value, timestamp, 0) for name, value in named.items()]


def curves(folder: JobFolder, timestamp: int) -> list[Metric]:
    """Return the learning curves as metrics with steps."""
    from mlflow.entities import Metric

    return [
        Metric(legal(f"{point.stage}/{name}"), value, timestamp, point.step)
        for point in folder.read_curves()
        for name, value in point.values.items()
    ]

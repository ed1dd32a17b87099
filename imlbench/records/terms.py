"""What a record is called in MLflow: a run's name, its tags, parameters, metrics and data set."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

from pydantic import JsonValue

from imlbench.plan.identity import digest
from imlbench.plan.settings import assignments
from imlbench.records.folder import JobFolder
from imlbench.records.record import Record

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, Metric

_T = TypeVar("_T")
LONGEST = 500
"""Characters of a parameter that every store takes."""
LONGEST_NAME = 250
"""Characters of a name that every store takes."""
_LONGEST_DIGEST = 36
_LONGEST_SOURCE = 65535


def run_name(record: Record) -> str:
    """Return a name that tells what is not at its default, as runs stand below each other."""
    words = [record.model, record.dataset, *assignments(record.changed), f"seed={record.seed}"]
    return _cut(" ".join(words), LONGEST_NAME)


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
    return {name: _cut(value) for name, value in found.items() if value}


def _description(record: Record) -> str:
    text = f"{record.model} on {record.dataset}, seed {record.seed}: {record.status}"
    return f"{text}: {record.reason}" if record.reason else text


def params(record: Record) -> dict[str, str]:
    """Return what a job was given, a dataset's parameters with its name before them."""
    pairs: list[tuple[str, JsonValue]] = [
        ("model", record.model),
        ("dataset", record.dataset),
        ("seed", record.seed),
        *record.params.items(),
        *((f"{record.dataset}.{name}", value) for name, value in record.dataset_params.items()),
    ]
    found = _apart(pairs)
    names = legal_names(found)
    return {
        names[name]: _cut(value if isinstance(value, str) else json.dumps(value))
        for name, value in found.items()
    }


def data(record: Record) -> DatasetInput:
    """Return the data set, as MLflow describes data sets."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    profile = {"event_shape": record.event_shape, "n_train": record.fit and record.fit.n_train}
    dataset = Dataset(
        name=_cut(record.dataset),
        digest=record.fingerprint[:_LONGEST_DIGEST],
        source_type="imlbench",
        source=_cut(json.dumps(record.dataset_params), _LONGEST_SOURCE),
        profile=json.dumps(profile),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])


def values(record: Record) -> dict[str, float]:
    """Return the metrics by a name that MLflow takes; samples drawn last have the plain names."""
    last = next(reversed(record.draws), "")
    pairs: list[tuple[str, float]] = []
    if record.fit:
        pairs = [
            ("fit_seconds", record.fit.seconds),
            ("peak_memory_mib", record.fit.peak_memory_bytes / 2**20),
            ("n_parameters", float(record.fit.n_parameters)),
        ]
    scores = {
        score.label if score.draw in ("", last) else f"{score.label}/{score.draw}": score
        for score in record.scores
    }
    pairs += [(name, score.value) for name, score in scores.items()]
    pairs += [(f"{n}.stderr", s.stderr) for n, s in scores.items() if s.stderr is not None]
    found = _apart(pairs)
    names = legal_names(found)
    return {names[name]: value for name, value in found.items()}


def _apart(pairs: Iterable[tuple[str, _T]]) -> dict[str, _T]:
    """Return values by name; a name that comes again is marked."""
    found: dict[str, _T] = {}
    for name, value in pairs:
        while name in found:
            name += "'"
        found[name] = value
    return found


def legal(name: str) -> str:
    """Return a name of a metric or parameter in the characters that MLflow allows.

    Example:
        >>> legal("fid@10k (%)"), legal("../a//b/"), legal("h=0.1")
        ('fid 10k', 'a/b', 'h:0.1')
    """
    plain = re.sub(r"[^\w\-. :/]", " ", name.replace("=", ":"), flags=re.ASCII)
    parts = (" ".join(part.split()) for part in plain.split("/"))
    plain = "/".join(part for part in parts if part.strip("."))
    plain = plain.lstrip(".") if plain.startswith("..") else plain
    return plain if 0 < len(plain) <= LONGEST_NAME else _marked(plain, name)


def legal_names(names: Iterable[str], taken: Iterable[str] = ()) -> dict[str, str]:
    """Return a legal name for each name, no two of them equal.

    Arguments:
        names: What to name.
        taken: Legal names that others have.

    Example:
        >>> legal_names(["fid 10k", "fid@10k"])
        {'fid 10k': 'fid 10k', 'fid@10k': 'fid 10k-8ea125e4'}
    """
    used = set(taken)
    found: dict[str, str] = {}
    for name in sorted(set(names), key=lambda name: (legal(name) != name, name)):
        plain = legal(name)
        found[name] = _marked(plain, name) if plain in used else plain
        used.add(found[name])
    return found


def _marked(plain: str, name: str) -> str:
    """Return a legal name with a mark of what it stands for."""
    mark = digest(name)[:8]
    return f"{plain[: LONGEST_NAME - len(mark) - 1]}-{mark}"


def _cut(text: str, longest: int = LONGEST) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def points(named: dict[str, float], timestamp: int) -> list[Metric]:
    """Return values by name as metrics; the timestamp is in milliseconds since 1970."""
    from mlflow.entities import Metric

    return [Metric(name, value, timestamp, 0) for name, value in named.items()]


def curves(folder: JobFolder, timestamp: int, taken: Iterable[str] = ()) -> list[Metric]:
    """Return the learning curves as metrics with steps.

    Arguments:
        folder: The job's folder.
        timestamp: When they ended, in milliseconds since 1970.
        taken: Names of other metrics.
    """
    from mlflow.entities import Metric

    found = [
        (f"{point.stage}/{name}", value, point.step)
        for point in folder.read_curves()
        for name, value in point.values.items()
    ]
    names = legal_names((name for name, _, _ in found), taken)
    return [Metric(names[name], value, timestamp, step) for name, value, step in found]

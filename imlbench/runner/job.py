"""The spine: run one job in this process. Load, fit, draw, score, show.

Each step leaves its result in the job's folder and is not repeated if it is there, made by the same
code from the same things: a metric that fails never costs a training run, and a new metric needs no
new samples.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock
from pydantic import JsonValue
from torch import Tensor

from imlbench.api import AnyArtifact, AnyMetric, AnyModel, Evaluation, Sources, Splits
from imlbench.errors import DataError
from imlbench.plan.identity import digest
from imlbench.plan.jobs import Job, Task
from imlbench.plan.registry import Registry
from imlbench.records.folder import JobFolder, Store, read_tensors, write_tensors
from imlbench.records.record import Fit, NotApplicable, Record, Scored, Shown
from imlbench.runner.context import JobContext, Report
from imlbench.runner.drawing import draw
from imlbench.runner.fitting import build, fit
from imlbench.runner.provenance import environment, peak_memory
from imlbench.runner.scoring import score, why_not
from imlbench.runner.seeding import seeded

logger = logging.getLogger("imlbench")


def run_job(
    job: Job,
    store: Store,
    registry: Registry,
    *,
    metrics: Sequence[Task],
    artifacts: Sequence[Task] = (),
    sources: Sources,
    device: torch.device,
    report: Report = lambda event: None,
    refit_before: float = 0.0,
) -> Record:
    """Bring a job's folder up to date: whatever is missing is computed.

    Arguments:
        job: The job.
        store: The results folder.
        registry: Where its model and dataset are.
        metrics: The metrics to compute.
        artifacts: The artifacts to write.
        sources: Where the data are.
        device: Where to compute.
        report: Called with every event.
        refit_before: Stages that were fitted before this time are fitted again.

    Returns:
        The job's record, without a status yet.

    Raises:
        Diverged: Training failed numerically.
        DataError: The data are missing or damaged.
        Exception: Whatever a plugin raises.
    """
    folder = store.folder(job.id)
    record = folder.read() or folder.write(Record.begin(job, time.time()))
    dataset_cls = registry.datasets[job.dataset]
    dataset = dataset_cls(dataset_cls.params_type.model_validate(job.dataset_params))
    report("load")
    splits = dataset.load(sources)
    if splits.fingerprint != job.fingerprint:
        raise DataError(f"dataset {job.dataset}: its files changed during the run. Run again.")
    model = build(registry.models[job.model], job.model_params, dataset.space, job.seed, device)
    if record.fit is None or not folder.checkpoint.exists():
        report("fit")
        home = type(model).__module__
        context = JobContext(job, device, store.stages, report, refit_before, home)
        record = _fit(model, splits, context, folder, record)
    model.load_state_dict(read_tensors(folder.checkpoint))
    model.eval().requires_grad_(False)
    report("sample")
    samples, record = _draw(job, model, folder, record, device)
    evaluation = Evaluation(dataset, splits, samples, model, device, seed=job.seed)
    report("score")
    scorer = _Scorer(job, store, folder, evaluation)
    record = scorer.score_all(record, metrics, registry)
    record = scorer.show_all(record, artifacts, registry)
    scorer.raise_first_failure()
    return record


def open_model(
    record: Record, folder: JobFolder, registry: Registry, device: torch.device
) -> AnyModel:
    """Return a job's fitted model, in evaluation mode, without gradients."""
    dataset_cls = registry.datasets[record.dataset]
    space = dataset_cls(dataset_cls.params_type.model_validate(record.dataset_params)).space
    cls = registry.models[record.model]
    model = build(cls, record.model_params, space, record.seed, device)
    model.load_state_dict(read_tensors(folder.checkpoint))
    return model.eval().requires_grad_(False)


def _fit(
    model: AnyModel, splits: Splits, context: JobContext, folder: JobFolder, record: Record
) -> Record:
    device = context.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    fit(model, splits, context)
    seconds = time.perf_counter() - start - context.seconds_waited
    write_tensors(folder.checkpoint, model.state_dict())
    folder.write_curves(context.curves)
    done = Fit(
        seconds=seconds + context.seconds_reused,
        seconds_reused=context.seconds_reused,
        peak_memory_bytes=peak_memory(device),
        n_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        n_train=len(splits.train),
        used=context.used,
        stages=tuple(context.stages_used),
        environment=environment(device),
    )
    return folder.write(record.model_copy(update={"fit": done}))


def _draw(
    job: Job, model: AnyModel, folder: JobFolder, record: Record, device: torch.device
) -> tuple[Tensor, Record]:
    path = folder.samples(job.draw)
    if record.draws.get(job.draw) == job.draw_key and path.exists():
        return read_tensors(path)["samples"], record
    samples = draw(model, job.seed, job.n_draws, job.n_samples, device)
    record = folder.write(record.without_scores(job.draw))
    write_tensors(path, {"samples": samples})
    draws = {**record.draws, job.draw: job.draw_key}
    return samples, folder.write(record.model_copy(update={"draws": draws}))


class _Scorer:
    """Computes metrics and artifacts that are missing or outdated; one that fails costs no other.

    Each result is written as soon as it is there.
    """

    def __init__(self, job: Job, store: Store, folder: JobFolder, evaluation: Evaluation) -> None:
        self._job, self._store, self._folder, self._evaluation = job, store, folder, evaluation
        self._failures: dict[str, Exception] = {}

    def score_all(self, record: Record, tasks: Sequence[Task], registry: Registry) -> Record:
        """Return the record with the scores of all metrics that apply."""
        known = {found.key for found in record.scores}
        reasons = dict(record.not_applicable)
        for task in tasks:
            cls = registry.metrics[task.name]
            metric = cls(cls.params_type.model_validate(task.params))
            reason = why_not(metric, self._evaluation)
            if reason:
                reasons[task.label] = NotApplicable(key=task.reason_key(self._job), reason=reason)
            elif task.key(self._job) not in known:
                outdated = self._job.draw if task.needs_samples else ""
                record = record.without_scores(outdated, task.label)
                try:
                    record = self._folder.write(record.with_score(self._score(metric, task)))
                except Exception as error:  # a metric is somebody else's code
                    logger.exception("metric %s failed", task.label)
                    self._failures[task.label] = error
        return self._folder.write(record.model_copy(update={"not_applicable": reasons}))

    def _score(self, metric: AnyMetric, task: Task) -> Scored:
        data = [self._job.dataset, self._job.fingerprint]
        cache = _Cache(self._store.cache, [*data, task.name, task.code])
        found = score(metric, replace(self._evaluation, cache=cache))
        draw = self._job.draw if task.needs_samples else ""
        n_groups = 0
        if found.per_example is not None:
            tensors = {"per_example": found.per_example}
            if found.groups is not None:
                tensors["groups"] = found.groups
                n_groups = len(found.groups.unique())
            write_tensors(self._folder.per_example(task.label, draw), tensors)
        return Scored(
            metric=task.name,
            label=task.label,
            params=task.params,
            key=task.key(self._job),
            draw=draw,
            value=found.value,
            stderr=found.stderr,
            n_examples=0 if found.per_example is None else len(found.per_example),
            n_groups=n_groups,
            settings=dict(found.settings),
            unit=metric.unit,
            higher_is_better=metric.higher_is_better,
            value_range=metric.value_range,
            position=metric.position,
        )

    def show_all(self, record: Record, tasks: Sequence[Task], registry: Registry) -> Record:
        """Return the record with the artifacts; one that fails costs a line, not the job."""
        known = {found.key for found in record.artifacts if not found.error}
        for task in tasks:
            cls = registry.artifacts[task.name]
            artifact = cls(cls.params_type.model_validate(task.params))
            if task.key(self._job) not in known:
                record = record.with_artifact(self._show(artifact, task))
        return self._folder.write(record)

    def _show(self, artifact: AnyArtifact, task: Task) -> Shown:
        target = self._folder.artifact(task.label, self._job.draw)
        files: tuple[str, ...] = ()
        failure = ""
        if not why_not(artifact, self._evaluation):
            try:
                files = _write_files(artifact, self._evaluation, target)
            except Exception as error:  # it is somebody else's code
                logger.exception("artifact %s failed", task.label)
                failure = f"{type(error).__name__}: {error}"
        return Shown(
            artifact=task.name,
            label=task.label,
            key=task.key(self._job),
            draw=self._job.draw,
            files=files,
            error=failure,
        )

    def raise_first_failure(self) -> None:
        """Raise if a metric failed."""
        if self._failures:
            first = next(iter(self._failures.values()))
            names = ", ".join(self._failures)
            raise RuntimeError(f"metric {names} failed: {first}") from first


def _write_files(artifact: AnyArtifact, evaluation: Evaluation, target: Path) -> tuple[str, ...]:
    """Write an artifact's files into a new folder: all of them or none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".writing-") as temporary:
        written = Path(temporary) / "files"
        written.mkdir()
        with seeded(0), torch.no_grad():
            artifact.write(evaluation, written)
        files = sorted(
            str(path.relative_to(written)) for path in written.rglob("*") if path.is_file()
        )
        if target.exists():
            target.rename(Path(temporary) / "older")
        if files:
            written.rename(target)
    return tuple(files)


class _Cache:
    """What metrics compute from the data alone, kept for all jobs.

    Arguments:
        folder: Where it is.
        identity: What identifies the data, the metric and its code.
    """

    def __init__(self, folder: Path, identity: list[str]) -> None:
        self._folder, self._identity = folder, identity

    def __call__(
        self,
        name: str,
        settings: Mapping[str, JsonValue],
        compute: Callable[[], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        path = self._folder / f"{digest(name, self._identity, dict(settings))}.safetensors"
        self._folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if path.exists():
                try:
                    return read_tensors(path)
                except Exception:  # whatever is wrong with the file, computing again mends it
                    logger.exception("%s cannot be read and is computed again", path)
            found = compute()
            write_tensors(path, found)
            return found

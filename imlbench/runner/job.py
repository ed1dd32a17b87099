"""The spine: run one job in this process. Load, fit, draw, score, show.

Each step leaves its result in the job's folder and is not repeated if it is there, undamaged, made
by the same code from the same things: a metric that fails never costs a training run, and a new
metric needs no new samples.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from pydantic import JsonValue
from torch import Tensor

from imlbench.api import AnyArtifact, AnyMetric, AnyModel, Evaluation, Examples, LogProb, Splits
from imlbench.api.randomness import make_generator
from imlbench.errors import ANYTHING, DataError, UserError, brief
from imlbench.files import (
    File,
    describe,
    lock,
    read_sealed,
    set_aside,
    write_sealed,
    write_tensors,
)
from imlbench.plan.identity import digest
from imlbench.plan.jobs import Job, Task
from imlbench.plan.registry import Registry
from imlbench.records.folder import JobFolder, Store
from imlbench.records.record import Drawn, Fit, NotApplicable, Record, Scored, Shown
from imlbench.runner.context import JobContext
from imlbench.runner.contract import Assignment, Began, Event, Progress
from imlbench.runner.drawing import draw
from imlbench.runner.fitting import build, fit
from imlbench.runner.provenance import environment, peak_memory
from imlbench.runner.scoring import score, why_not
from imlbench.runner.seeding import seeded

logger = logging.getLogger("imlbench")

Send = Callable[[Event], None]


def run_job(assignment: Assignment, registry: Registry, send: Send = lambda event: None) -> Record:
    """Bring a job's folder up to date: whatever is missing, damaged or outdated is computed.

    Arguments:
        assignment: The job, and what to compute for it.
        registry: Where its plugins are.
        send: Called with every event.

    Returns:
        The job's record, without a status yet.

    Raises:
        Diverged: Training failed numerically.
        UserError: The data, or the files of a job that is not to be fitted, are damaged.
        Exception: Whatever a plugin raises.
    """
    job, folder, device = assignment.job, assignment.folder, torch.device(assignment.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # also of what names none, such as the global generator
    record = _open_folder(assignment)
    if record.is_complete(job, assignment.metrics, assignment.artifacts):
        return record  # another process was faster
    record = folder.write(
        record.model_copy(update={"status": None, "reason": "", "confirmed": time.time()})
    )
    send(Began(step="load"))
    dataset_cls = registry.datasets[job.dataset]
    dataset = dataset_cls(dataset_cls.params_type.model_validate(job.dataset_params))
    splits = dataset.load(assignment.sources)
    if splits.fingerprint != job.fingerprint:
        raise DataError(f"dataset {job.dataset}: its files changed during the run. Run again.")
    if record.fit is None:
        record = _fit(assignment, registry, splits, folder, record, send)
    assert record.fit is not None
    model = open_model(record, folder, registry, device)
    send(Began(step="sample"))
    samples, record = _draw(job, model, folder, record, device)
    send(Began(step="score"))
    evaluation = Evaluation(dataset, splits, samples, model, device, seed=job.seed)
    scorer = _Scorer(assignment, folder, evaluation)
    record = scorer.score_all(record, registry)
    record = scorer.show_all(record, registry)
    scorer.raise_first_failure()
    return record


def _open_folder(assignment: Assignment) -> Record:
    """Return what is known of the job, without what is damaged or to be computed again."""
    folder = assignment.folder
    folder.remove_unfinished()
    record = folder.read()
    if record is None and folder.record_path.exists():
        set_aside(folder.record_path)
    if record is not None and record.started >= assignment.refit_before:
        record = folder.mend(record)
    elif assignment.is_fitted:
        raise UserError(f"job {assignment.job.id}: must have a record that can be read. Run it.")
    else:
        if record is not None:
            folder.clear()
        record = folder.write(Record.begin(assignment.job, time.time()))
    if record.fit is None:
        if assignment.is_fitted:
            raise UserError(f"job {assignment.job.id}: must have a fitted model. Run it first.")
        record = folder.write(record.without_fit())
    return record


def open_model(
    record: Record, folder: JobFolder, registry: Registry, device: torch.device
) -> AnyModel:
    """Return a job's fitted model, in evaluation mode, without gradients.

    Raises:
        UserError: Its checkpoint is damaged.
    """
    assert record.fit is not None
    dataset_cls = registry.datasets[record.dataset]
    space = dataset_cls(dataset_cls.params_type.model_validate(record.dataset_params)).space
    cls = registry.models[record.model]
    model = build(cls, record.model_params, space, record.seed, device)
    model.load_state_dict(folder.load(folder.checkpoint, record.fit.checkpoint))
    return model.eval().requires_grad_(False)


def _fit(
    assignment: Assignment,
    registry: Registry,
    splits: Splits,
    folder: JobFolder,
    record: Record,
    send: Send,
) -> Record:
    """Fit the model, and record the fit once its checkpoint has been shown to hold it."""
    job, device = assignment.job, torch.device(assignment.device)
    cls = registry.models[job.model]
    model = build(cls, job.model_params, job.space, job.seed, device)
    context = JobContext(
        job,
        device,
        stages=Store(assignment.results).stages,
        home=type(model).__module__,
        checkpoints=folder.path / "fit",
        checkpoint_every=assignment.checkpoint_every,
        report=lambda point: send(Progress(point=point)),
        refit_before=assignment.refit_before,
    )
    send(Began(step="fit"))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = context.seconds()
    fit(model, splits, context)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # what is under way belongs to the fit
    seconds = context.seconds() - start + context.checkpoints.seconds_before
    checkpoint, curves = folder.write_fit(model.state_dict(), context.curves)
    done = Fit(
        seconds=seconds + context.seconds_staged + context.seconds_reused,
        seconds_reused=context.seconds_reused,
        peak_memory_bytes=peak_memory(device),
        n_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        n_train=len(splits.train),
        used=context.used,
        stages=tuple(context.stages_used),
        environment=environment(device),
        checkpoint=checkpoint,
        curves=curves,
    )
    record = record.model_copy(update={"fit": done})
    model.eval().requires_grad_(False)
    _check_reloaded(model, open_model(record, folder, registry, device), splits.test)
    record = folder.write(record)
    context.checkpoints.clear()
    return record


def _check_reloaded(fitted: AnyModel, reloaded: AnyModel, test: Examples) -> None:
    """Refuse a model that forgets: what is read from its checkpoint must be what was fitted.

    The tolerance allows for arithmetic that differs in its order, on accelerators.

    Raises:
        ValueError: Samples or densities differ.
    """
    device = next(iter([*fitted.parameters(), *fitted.buffers()]), torch.empty(0)).device

    def answers(model: AnyModel) -> dict[str, Tensor]:
        with seeded(0), torch.no_grad():
            found = {"sample": model.sample(8, make_generator(0, "reloading", device))}
        with seeded(0), torch.no_grad():
            if model.can(LogProb):
                found["log_prob"] = cast(LogProb, model).log_prob(test[:8].to(device))
        return found

    before, after = answers(fitted), answers(reloaded)
    for name, value in before.items():
        if not torch.allclose(value, after[name], rtol=1e-4, atol=1e-5, equal_nan=True):
            raise ValueError(
                f"{fitted.name}.{name} must be the same after its checkpoint was read; it is not. "
                "Keep all that fit() finds out in parameters or buffers."
            )


def _draw(
    job: Job, model: AnyModel, folder: JobFolder, record: Record, device: torch.device
) -> tuple[Tensor, Record]:
    path, drawn = folder.samples(job.draw), record.draws.get(job.draw)
    if drawn is not None and drawn.key == job.draw_key:
        return folder.load(path, drawn.file)["samples"], record
    samples = draw(model, job.seed, job.n_draws, job.n_samples, device)
    record = folder.write(record.without_draw(job.draw))
    write_tensors(path, {"samples": samples})
    new = Drawn(key=job.draw_key, code=job.codes.draw, file=describe(path))
    draws = {**record.draws, job.draw: new}
    return samples, folder.write(record.model_copy(update={"draws": draws}))


class _Scorer:
    """Computes metrics and artifacts that are missing or outdated; one that fails costs no other.

    Each sees the data, the samples and the model as if it were the only one, and each result is
    written as soon as it is there.
    """

    def __init__(self, assignment: Assignment, folder: JobFolder, evaluation: Evaluation) -> None:
        self._job, self._folder, self._evaluation = assignment.job, folder, evaluation
        self._tasks, self._artifacts = assignment.metrics, assignment.artifacts
        self._cache, self._sources = Store(assignment.results).cache, assignment.sources
        self._state = {n: t.clone() for n, t in evaluation.model.state_dict().items()}
        self._failures: dict[str, BaseException] = {}

    def _fresh(self) -> Evaluation:
        """Return what a metric may look at; whatever it writes into, nobody else sees."""
        seen = self._evaluation
        if not seen.splits.are_untouched:  # by way of a private name
            splits = seen.dataset.load(self._sources)
            if splits.fingerprint != self._job.fingerprint:
                raise DataError(f"dataset {self._job.dataset}: was written into. Run again.")
            self._evaluation = seen = replace(seen, splits=splits)
        seen.model.load_state_dict(self._state)
        seen.model.eval().requires_grad_(False)
        draws = None if seen.draws is None else seen.draws.clone()
        return replace(seen, splits=seen.splits.fresh(), draws=draws)

    def score_all(self, record: Record, registry: Registry) -> Record:
        """Return the record with the scores of all metrics that apply."""
        known = {found.key for found in record.scores}
        reasons = dict(record.not_applicable)
        for task in self._tasks:
            if task.key(self._job) in known:
                continue
            outdated = self._job.draw if task.needs_samples else ""
            record = record.without_scores(outdated, task.label)
            try:
                cls = registry.metrics[task.name]
                metric = cls(cls.params_type.model_validate(task.params))
                reason = why_not(metric, self._evaluation)
                if reason:
                    key = task.reason_key(self._job)
                    reasons[task.label] = NotApplicable(key=key, reason=reason)
                else:
                    record = self._folder.write(record.with_score(self._score(metric, task)))
                    reasons.pop(task.label, None)
            except ANYTHING as error:  # a metric is somebody else's code
                logger.error("metric %s failed", task.label, exc_info=True)
                self._failures[task.label] = error
        return self._folder.write(record.model_copy(update={"not_applicable": reasons}))

    def _score(self, metric: AnyMetric, task: Task) -> Scored:
        data = [self._job.dataset, self._job.fingerprint]
        cache = _Cache(self._cache, [*data, task.name, task.code])
        found = score(metric, replace(self._fresh(), cache=cache))
        draw = self._job.draw if task.needs_samples else ""
        n_groups, file = 0, None
        if found.per_example is not None:
            tensors = {"per_example": found.per_example}
            if found.groups is not None:
                tensors["groups"] = found.groups
                n_groups = len(found.groups.unique())
            path = self._folder.per_example(task.label, draw)
            write_tensors(path, tensors)
            file = describe(path)
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
            file=file,
            settings=dict(found.settings),
            unit=metric.unit,
            higher_is_better=metric.higher_is_better,
            value_range=metric.value_range,
            position=metric.position,
        )

    def show_all(self, record: Record, registry: Registry) -> Record:
        """Return the record with the artifacts; one that fails costs a line, not the job."""
        known = {found.key for found in record.artifacts if not found.error}
        for task in self._artifacts:
            if task.key(self._job) not in known:
                record = record.with_artifact(self._show(registry.artifacts[task.name], task))
        return self._folder.write(record)

    def _show(self, cls: type[AnyArtifact], task: Task) -> Shown:
        target = self._folder.artifact(task.label, self._job.draw)
        files: dict[str, File] = {}
        failure = ""
        try:
            artifact = cls(cls.params_type.model_validate(task.params))
            if not why_not(artifact, self._evaluation):
                files = _write_files(artifact, self._fresh(), target)
        except ANYTHING as error:  # it is somebody else's code
            logger.error("artifact %s failed", task.label, exc_info=True)
            failure = brief(error)
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


def _write_files(artifact: AnyArtifact, evaluation: Evaluation, target: Path) -> dict[str, File]:
    """Write an artifact's files into a new folder: all of them or none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".writing-") as temporary:
        written = Path(temporary) / "files"
        written.mkdir()
        with seeded(0), torch.no_grad():
            artifact.write(evaluation, written)
        files = {
            str(path.relative_to(written)): describe(path)
            for path in sorted(written.rglob("*"))
            if path.is_file() and not path.is_symlink()
        }
        if target.exists():
            target.rename(Path(temporary) / "older")
        if files:
            written.rename(target)
    return files


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
        base = self._folder / digest(name, self._identity, dict(settings))
        with lock(base.with_suffix(".lock")):
            known = read_sealed(base)
            if known is not None:
                return known[0]
            found = compute()
            write_sealed(base, found, {})
            return found

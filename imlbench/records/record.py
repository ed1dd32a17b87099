"""The record of a job: everything that is known of it, typed, but for tensors and curves."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from imlbench.files import File
from imlbench.plan.settings import Settings

if TYPE_CHECKING:
    from imlbench.plan.jobs import Job, Task

SCHEMA = 3
"""The version of the form of records; folders of another are refused."""


class Status(StrEnum):
    """How a job ended. Only ``done`` is reused by the next run."""

    DONE = "done"
    FAILED = "failed"
    TIMEOUT = "timeout"
    OUT_OF_MEMORY = "out-of-memory"
    DIVERGED = "diverged"
    INTERRUPTED = "interrupted"


class Fact(BaseModel):
    """Base of what is written down: frozen, complete, finite."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )


class Environment(Fact):
    """With what, and where, a model was fitted."""

    imlbench: str
    git_commit: str
    python: str
    torch: str
    device: str
    machine: str
    n_threads: int
    user: str


class Fit(Fact):
    """A finished fit.

    Arguments:
        seconds: What it took, shared stages included, whether they were fitted or found.
        seconds_reused: What of this was spent by another job.
        peak_memory_bytes: Of the device, or of the process if it is the CPU.
        n_parameters: Numbers that were trained.
        n_train: Examples that it was fitted to.
        used: What was really used where it may differ from the parameters.
        stages: The shared stages that it is made of, as their files are named.
        environment: With what, and where.
        checkpoint: The file of the model's state.
        curves: The file of the learning curves.
    """

    seconds: float
    seconds_reused: float
    peak_memory_bytes: int
    n_parameters: int
    n_train: int
    used: Settings
    stages: tuple[str, ...]
    environment: Environment
    checkpoint: File
    curves: File


class Drawn(Fact):
    """Samples that were drawn.

    Arguments:
        key: What identifies them.
        code: What identifies the code that drew them.
        file: The file that holds them.
    """

    key: str
    code: str
    file: File


class Scored(Fact):
    """One metric's result.

    Arguments:
        metric: The metric's name.
        label: Its name with the parameters that are not at their default: one column.
        params: All of its parameters.
        key: What identifies the result.
        draw: How the samples were drawn, such as ``5x1000``; empty if it needs none.
        value: The value.
        stderr: Its standard error over examples or their groups.
        n_examples: How many per-example values are in the job's folder.
        n_groups: How many groups they form; 0 if each is its own.
        file: The file that holds them.
        settings: What the value depends on besides model and data.
        unit: Such as ``nats``.
        higher_is_better: The direction.
        value_range: The least and the greatest possible value.
        position: Where its column stands.
    """

    metric: str
    label: str
    params: Settings
    key: str
    draw: str
    value: float
    stderr: float | None
    n_examples: int
    n_groups: int
    file: File | None = None
    settings: Settings
    unit: str
    higher_is_better: bool | None
    value_range: tuple[float | None, float | None]
    position: int


class Shown(Fact):
    """One artifact's result: its files, by name, lie in the folder ``artifacts/<draw>/<label>``."""

    artifact: str
    label: str
    key: str
    draw: str
    files: dict[str, File]
    error: str = ""


class Point(Fact):
    """One point of the learning curves.

    Arguments:
        stage: What was being fitted.
        step: Epoch or iteration, counted from 1.
        n_steps: How many there will be at most.
        values: Losses, log-likelihoods, ...
    """

    stage: str
    step: int
    n_steps: int
    values: dict[str, float]


class NotApplicable(Fact):
    """Why a metric was not computed.

    Arguments:
        key: What identifies the answer.
        reason: Such as ``the model has no log_prob``.
    """

    key: str
    reason: str


class Record(Fact):
    """Everything that is known of a job.

    A job is one fit; samples drawn from it in several ways, and their scores, are in one record.

    Arguments:
        schema_version: The form of this record.
        id: The name of the job's folder.
        model: The model's name.
        family: The model's family.
        dataset: The dataset's name.
        seed: The seed.
        model_params: Resolved parameters; those that do not apply are absent.
        dataset_params: Likewise.
        changed: The parameters that are not at their default.
        kind: The kind of data.
        event_shape: The shape of one example.
        fingerprint: Hash of the data.
        fit_key: What identifies the fit.
        code: What identifies the code of the fit.
        shipped_by: The distributions of the model and of the dataset, with their versions.
        status: How the job ended; ``None`` if it has not.
        reason: Why, if it is not done.
        started: When its fit was begun, in seconds since 1970.
        ended: When it first ended; ``None`` if it has not.
        confirmed: When it was last found to be what today's code would make.
        fit: The fit, once there is one.
        draws: The samples, by how they were drawn, such as ``5x1000``.
        scores: What was computed.
        not_applicable: Metrics that make no sense for the job, by label, and why.
        artifacts: What was drawn and written.
    """

    schema_version: Literal[3] = 3
    id: str
    model: str
    family: str
    dataset: str
    seed: int
    model_params: Settings
    dataset_params: Settings
    changed: Settings
    kind: str
    event_shape: tuple[int, ...]
    fingerprint: str
    fit_key: str
    code: str
    shipped_by: tuple[str, str]
    status: Status | None = None
    reason: str = ""
    started: float
    ended: float | None = None
    confirmed: float
    fit: Fit | None = None
    draws: dict[str, Drawn] = {}
    scores: tuple[Scored, ...] = ()
    not_applicable: dict[str, NotApplicable] = {}
    artifacts: tuple[Shown, ...] = ()

    @classmethod
    def begin(cls, job: Job, started: float) -> Record:
        """Return the record of a job of which nothing has been computed yet."""
        return cls(
            id=job.id,
            model=job.model,
            family=job.family,
            dataset=job.dataset,
            seed=job.seed,
            model_params=job.model_params,
            dataset_params=job.dataset_params,
            changed=job.changed,
            kind=job.space.kind,
            event_shape=job.space.event_shape,
            fingerprint=job.fingerprint,
            fit_key=job.fit_key,
            code=job.codes.fit,
            shipped_by=job.shipped_by,
            started=started,
            confirmed=started,
        )

    @property
    def params(self) -> Settings:
        """The model's parameters as they were really used."""
        used = self.fit.used if self.fit else {}
        return {**self.model_params, **{n: v for n, v in used.items() if n in self.model_params}}

    def score(self, label: str, draw: str) -> Scored | None:
        """Return a metric's result for samples drawn in one way, or from the fit alone."""
        found = (s for s in self.scores if s.label == label and s.draw in ("", draw))
        return next(found, None)

    def with_score(self, score: Scored) -> Record:
        """Return the record with a score in place of an older one."""
        kept = [s for s in self.scores if (s.label, s.draw) != (score.label, score.draw)]
        return self.model_copy(update={"scores": (*kept, score)})

    def confirmed_at(self, time: float) -> Record:
        """Return the record with another time at which it was found to be up to date."""
        return self.model_copy(update={"confirmed": time})

    def without_scores(self, draw: str, label: str = "") -> Record:
        """Return the record without scores and artifacts of samples that are no more.

        Arguments:
            draw: How they were drawn; empty for what depends on the fit alone.
            label: Only this metric.
        """
        keep = [s for s in self.scores if s.draw != draw or (label and s.label != label)]
        shown = [s for s in self.artifacts if label or s.draw != draw]
        return self.model_copy(update={"scores": tuple(keep), "artifacts": tuple(shown)})

    def without_draw(self, draw: str) -> Record:
        """Return the record without samples, and without what was computed from them."""
        draws = {name: drawn for name, drawn in self.draws.items() if name != draw}
        return self.without_scores(draw).model_copy(update={"draws": draws})

    def without_fit(self) -> Record:
        """Return the record of the same job, of which nothing has been computed."""
        nothing: dict[str, object] = {
            "fit": None,
            "draws": {},
            "scores": (),
            "not_applicable": {},
            "artifacts": (),
        }
        return self.model_copy(update=nothing)

    def with_artifact(self, shown: Shown) -> Record:
        """Return the record with an artifact in place of an older one."""
        kept = [s for s in self.artifacts if (s.label, s.draw) != (shown.label, shown.draw)]
        return self.model_copy(update={"artifacts": (*kept, shown)})

    def is_complete(self, job: Job, metrics: Sequence[Task], artifacts: Sequence[Task]) -> bool:
        """Whether the job is done, and everything was computed by today's code or does not apply.

        Arguments:
            job: The job.
            metrics: The metrics that are wanted.
            artifacts: The artifacts that are wanted.
        """
        drawn = self.draws.get(job.draw)
        if self.status is not Status.DONE or drawn is None or drawn.key != job.draw_key:
            return False
        done = {score.key for score in self.scores}
        done |= {shown.key for shown in self.artifacts if not shown.error}

        def is_answered(task: Task) -> bool:
            reason = self.not_applicable.get(task.label)
            return (reason is not None and reason.key == task.reason_key(job)) or (
                task.key(job) in done
            )

        return all(is_answered(task) for task in (*metrics, *artifacts))

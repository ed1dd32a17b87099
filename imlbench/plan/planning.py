"""From a benchmark and the registry to a plan: what runs, with what, and what is skipped."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import TypeVar

from pydantic import ValidationError

from imlbench.api import (
    KINDS,
    AnyArtifact,
    AnyDataset,
    AnyMetric,
    AnyModel,
    Artifact,
    Metric,
    Space,
)
from imlbench.api.params import Params
from imlbench.errors import ANYTHING, ParameterError, UserError, brief, unknown
from imlbench.plan.config import Benchmark, Setting, constraint
from imlbench.plan.identity import code_of, digest, note, refresh
from imlbench.plan.jobs import Codes, Job, Plan, Skip, Task, Variant
from imlbench.plan.registry import PluginClass, Registry, family_of
from imlbench.plan.settings import Settings

MOST_JOBS = 1_000_000

_C = TypeVar("_C", bound=PluginClass)


def make_plan(
    benchmark: Benchmark,
    registry: Registry,
    *,
    announce: Callable[[str], None] = lambda step: None,
    barred: Mapping[str, str] = MappingProxyType({}),
) -> Plan:
    """Expand a benchmark into jobs, without reading any data.

    Arguments:
        benchmark: What to run.
        registry: Where its plugins are.
        announce: Called with each step, before a plugin's code is called.
        barred: Steps that must not be taken, and why: those that ended an earlier process.

    Raises:
        UserError: Unknown names, unknown parameters, values out of range: all of them at once.
    """
    refresh()
    models, datasets, metrics = _select_all(benchmark, registry)
    artifacts = list(registry.artifacts.values())
    errors = _unused_settings(
        benchmark.settings, [*models, *datasets, *metrics, *artifacts], registry
    )
    planner = _Planner(benchmark, registry, errors, announce, barred)
    for dataset_cls in datasets:
        for dataset_params in planner.combinations(dataset_cls):
            planner.add_jobs(models, dataset_cls, dataset_params)
    tasks = planner.tasks(metrics, artifacts)
    jobs = {(job.id, job.data): job for job in planner.jobs}
    return Plan(
        benchmark.name,
        tuple(Variant(job, benchmark.seeds) for job in with_varying(list(jobs.values()))),
        tuple(dict.fromkeys(planner.skips)),
        *tasks,
    )


def plan_tasks(
    benchmark: Benchmark,
    metrics: Sequence[type[AnyMetric]],
    artifacts: Sequence[type[AnyArtifact]],
    registry: Registry,
) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
    """Return what is computed for jobs that there are: metrics, and artifacts.

    Raises:
        UserError: A parameter is unknown, or out of its range: all of them at once.
    """
    errors = _unused_settings(benchmark.settings, [*metrics, *artifacts], registry)
    planner = _Planner(benchmark, registry, errors, lambda step: None, {})
    return planner.tasks(metrics, artifacts)


class _Planner:
    """Collects jobs, skipped pairs and errors."""

    def __init__(
        self,
        benchmark: Benchmark,
        registry: Registry,
        errors: list[str],
        announce: Callable[[str], None],
        barred: Mapping[str, str],
    ) -> None:
        self._benchmark, self._registry, self._errors = benchmark, registry, errors
        self._announce, self._barred = announce, barred
        self._usual: dict[tuple[type, Space], Settings] = {}
        self._codes_of = functools.cache(codes_of)
        self._n_jobs = 0
        self.jobs: list[Job] = []
        self.skips: list[Skip] = []

    def _enter(self, step: str) -> None:
        """Say what comes, or refuse what has ended another process."""
        if step in self._barred:
            raise RuntimeError(self._barred[step])
        self._announce(step)

    def combinations(self, cls: PluginClass) -> Iterator[Params]:
        """Yield every combination of a class's parameters; note what is invalid.

        Raises:
            UserError: There are too many.
        """
        mine = self._settings_of(cls)
        n_seeds = len(self._benchmark.seeds)
        self._n_jobs += n_seeds * math.prod(len(setting.values) for setting in mine.values())
        if self._n_jobs > MOST_JOBS:
            raise UserError(
                f"run: there must be at most {MOST_JOBS:,} jobs; {cls.name} alone has "
                f"{self._n_jobs // n_seeds:,} combinations of parameters, for {n_seeds:,} seeds. "
                "Try fewer values at a time."
            )
        for values in itertools.product(*(setting.values for setting in mine.values())):
            try:
                yield cls.params_type.model_validate(dict(zip(mine, values, strict=True)))
            except ValidationError as error:
                for problem in error.errors():
                    name = str(problem["loc"][0]) if problem["loc"] else ""
                    origin = mine[name].origin if name in mine else cls.name
                    self._errors.append(f"{origin}: {cls.name}.{name} {constraint(problem)}")
            except ANYTHING as error:  # a plugin's own check can raise anything
                where = ", ".join(setting.origin for setting in mine.values()) or cls.name
                self._errors.append(
                    f"{where}: {cls.name} cannot take its parameters ({brief(error)})."
                )

    def _settings_of(self, cls: PluginClass) -> dict[str, Setting]:
        return {
            setting.name: setting
            for setting in self._benchmark.settings
            if setting.name in cls.params_type.model_fields and _applies(setting, cls)
        }

    def add_jobs(
        self,
        models: Sequence[type[AnyModel]],
        dataset_cls: type[AnyDataset],
        dataset_params: Params,
    ) -> None:
        """Add the jobs of all models on one variant of a dataset."""
        try:
            self._enter(f"space of {dataset_cls.name}")
            space = dataset_cls(dataset_params).space
            _check_space(space)
        except ANYTHING as error:  # a plugin can raise anything, and may stop nobody else
            reason = f"its space cannot be had ({brief(error)})"
            self.skips += [Skip(cls.name, dataset_cls.name, reason, True) for cls in models]
            return
        for model_cls in models:
            if space.kind in model_cls.kinds:
                for params in self.combinations(model_cls):
                    self._add_model(model_cls, params, dataset_cls, dataset_params, space)
            else:
                kinds = " or ".join(sorted(model_cls.kinds))
                reason = f"{model_cls.name} is for {kinds} data; {dataset_cls.name} is {space.kind}"
                self.skips.append(Skip(model_cls.name, dataset_cls.name, reason))

    def _add_model(
        self,
        model_cls: type[AnyModel],
        params: Params,
        dataset_cls: type[AnyDataset],
        dataset_params: Params,
        space: Space,
    ) -> None:
        try:
            resolved = self._resolve(model_cls, params, dataset_cls, space)
        except ParameterError as error:
            set_by = self._settings_of(model_cls).get(error.parameter)
            origin = set_by.origin if set_by else f"default of {model_cls.name}"
            self._errors.append(f"{origin}: {model_cls.name}.{error.parameter} {error.problem}")
            return
        except ANYTHING as error:  # a plugin can raise anything, and may stop nobody else
            reason = f"its parameters cannot be resolved ({brief(error)})"
            self.skips.append(Skip(model_cls.name, dataset_cls.name, reason, True))
            return
        usual = self._usual_of(model_cls, space)
        changed = {
            **_changed(dataset_params, prefix=f"{dataset_cls.name}."),
            **{n: v for n, v in resolved.items() if n not in usual or usual[n] != v},
        }
        self.jobs.append(
            Job(
                model_cls.name,
                model_cls.family,
                dataset_cls.name,
                resolved,
                dataset_params.settings(),
                self._benchmark.seeds[0],
                self._benchmark.n_samples,
                self._benchmark.n_draws,
                space,
                self._codes_of(model_cls, dataset_cls),
                (self._registry.shipped_by(model_cls), self._registry.shipped_by(dataset_cls)),
                changed,
            )
        )

    def _resolve(
        self,
        model_cls: type[AnyModel],
        params: Params,
        dataset_cls: type[AnyDataset],
        space: Space,
    ) -> Settings:
        self._enter(f"parameters of {model_cls.name} on {dataset_cls.name}")
        resolved: Params = model_cls.resolve(params, space)
        if not isinstance(resolved, model_cls.params_type):
            raise TypeError(f"resolve must return parameters; got {resolved!r}")
        return resolved.settings()

    def _usual_of(self, model_cls: type[AnyModel], space: Space) -> Settings:
        """Return a model's parameters as they are by default; empty if there is no default."""
        key = (model_cls, space)
        if key not in self._usual:
            try:
                usual = model_cls.resolve(model_cls.params_type(), space).settings()
            except ANYTHING:
                usual = {}
            self._usual[key] = usual
        return self._usual[key]

    def tasks(
        self, metrics: Sequence[type[AnyMetric]], artifacts: Sequence[type[AnyArtifact]]
    ) -> tuple[tuple[Task, ...], tuple[Task, ...]]:
        """Return metrics and artifacts, with every combination of their parameters.

        Raises:
            UserError: Something was wrong, here or before.
        """
        ordered = sorted(metrics, key=lambda cls: cls.position)
        tasks = [
            tuple(
                Task(
                    cls.name,
                    params.settings(),
                    _changed(params),
                    code_of(cls.__module__),
                    getattr(cls, "needs_samples", True),
                )
                for cls in classes
                for params in self.combinations(cls)
            )
            for classes in (ordered, artifacts)
        ]
        if self._errors:
            raise UserError(*dict.fromkeys(self._errors))
        return tasks[0], tasks[1]


def have_changed(
    job: Job,
    metrics: Sequence[Task],
    artifacts: Sequence[Task],
    registry: Registry,
    *,
    is_fitted: bool = False,
) -> bool:
    """Whether the code is not the one that a plan was made for, in a process that runs a job.

    Arguments:
        job: The job.
        metrics: The metrics to compute.
        artifacts: The artifacts to write.
        registry: Where the plugins are.
        is_fitted: The job is not fitted again, whatever has become of the code of its model.
    """
    refresh()
    modules = [(task.code, registry.metrics[task.name].__module__) for task in metrics]
    modules += [(task.code, registry.artifacts[task.name].__module__) for task in artifacts]
    now = codes_of(registry.models[job.model], registry.datasets[job.dataset])
    expected = replace(now, score=job.codes.score) if is_fitted else job.codes
    return now != expected or any(code_of(module) != code for code, module in modules)


def warm(registry: Registry) -> None:
    """Look at the code of all plugins, so that neither forked nor later processes need to."""
    for cls in (*registry.models.values(), *registry.datasets.values()):
        code_of(cls.__module__)
    for cls in (*registry.metrics.values(), *registry.artifacts.values()):
        code_of(cls.__module__)
    for step in ("fitting", "drawing", "scoring"):
        code_of(f"imlbench.runner.{step}")
    note()


def codes_of(model_cls: type[AnyModel], dataset_cls: type[AnyDataset]) -> Codes:
    """Return what identifies the code of a model on a dataset."""
    # Named, not imported: these modules load torch and are read here, not run.
    return Codes(
        fit=digest(code_of(model_cls.__module__), code_of("imlbench.runner.fitting")),
        draw=code_of("imlbench.runner.drawing"),
        score=digest(code_of(dataset_cls.__module__), code_of("imlbench.runner.scoring")),
    )


def _changed(params: Params, prefix: str = "") -> Settings:
    """Return the parameters that are not at their default."""
    try:
        usual = type(params)().settings()
    except ANYTHING:  # there is no default, or a plugin raises anything
        usual = {}
    return {
        f"{prefix}{name}": value
        for name, value in params.settings().items()
        if name not in usual or usual[name] != value
    }


def with_varying(jobs: Sequence[Job]) -> tuple[Job, ...]:
    """Enter into every job the parameters that tell it from others of its model and dataset."""
    if len({(job.model, job.dataset) for job in jobs}) == len(jobs):
        return tuple(jobs)
    first: dict[tuple[str, str, str], object] = {}
    varying: set[tuple[str, str, str]] = set()
    everything = [
        {**{f"{job.dataset}.{n}": v for n, v in job.dataset_params.items()}, **job.model_params}
        for job in jobs
    ]
    for job, params in zip(jobs, everything, strict=True):
        for name, value in params.items():
            key = (job.model, job.dataset, name)
            if value != first.setdefault(key, value):
                varying.add(key)
    return tuple(
        replace(
            job,
            varying={n: v for n, v in params.items() if (job.model, job.dataset, n) in varying},
        )
        for job, params in zip(jobs, everything, strict=True)
    )


def _check_space(space: object) -> None:
    if not isinstance(space, Space):
        raise TypeError(f"it must be a Space; got {space!r}")
    shape = space.event_shape
    if space.kind not in KINDS or not (
        isinstance(shape, tuple) and shape and all(isinstance(n, int) and n > 0 for n in shape)
    ):
        raise ValueError(f"it must have a kind, and a shape of positive integers; got {space!r}")


def _select_all(
    benchmark: Benchmark, registry: Registry
) -> tuple[list[type[AnyModel]], list[type[AnyDataset]], list[type[AnyMetric]]]:
    errors: list[str] = []

    def select(choose: Callable[[Sequence[str]], list[_C]], names: Sequence[str]) -> list[_C]:
        try:
            return choose(names)
        except UserError as error:
            errors.extend(error.messages)
            return []

    models = select(registry.select_models, benchmark.models)
    datasets = select(registry.select_datasets, benchmark.datasets)
    metrics = select(registry.select_metrics, benchmark.metrics)
    if errors:
        broken = [f"note: plugin {p.name} was left out: {p.error}" for p in registry.broken]
        raise UserError(*errors, *broken)
    return models, datasets, metrics


def _applies(setting: Setting, cls: PluginClass) -> bool:
    """Whether a setting's target names a class; an empty target names every one."""
    names = (cls.name, family_of(cls))
    return not setting.target or any(name and fnmatchcase(name, setting.target) for name in names)


def _unused_settings(
    settings: Sequence[Setting], chosen: Sequence[PluginClass], registry: Registry
) -> list[str]:
    """Return a message for every setting that no plugin understands."""
    known: list[PluginClass] = [
        *registry.models.values(),
        *registry.datasets.values(),
        *registry.metrics.values(),
        *registry.artifacts.values(),
    ]
    errors = []
    for setting in settings:
        targets = [cls for cls in known if _applies(setting, cls)]
        here = [cls for cls in targets if cls in chosen]
        if not targets:
            names = {name for cls in known for name in (cls.name, family_of(cls))}
            errors.append(f"{setting.origin}: {unknown('plugin', setting.target, names - {''})}")
        elif setting.strict and not here:
            named = [cls.name for cls in chosen if not issubclass(cls, Metric | Artifact)]
            errors.append(
                f"{setting.origin}: '{setting.target}' must be one of the plugins to run; got none "
                f"of {', '.join(named)}, nor a metric or an artifact of theirs."
            )
        else:
            among = here if setting.strict and not setting.target else targets
            fields = {name for cls in among for name in cls.params_type.model_fields}
            if setting.name in ("n_samples", "n_draws", "seeds"):
                option = setting.name.replace("_", "-")
                errors.append(
                    f"{setting.origin}: must be a plugin's; '{setting.name}' is one of "
                    f"the benchmark. Use --{option}, or {setting.name} in benchmarks.toml."
                )
            elif setting.name not in fields:
                errors.append(f"{setting.origin}: {unknown('parameter', setting.name, fields)}")
    return errors

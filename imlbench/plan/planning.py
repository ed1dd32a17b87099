"""From a benchmark and the registry to a plan: what runs, with what, and what is skipped."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TypeVar

from pydantic import ValidationError

from imlbench.api import (
    AnyArtifact,
    AnyDataset,
    AnyMetric,
    AnyModel,
    Artifact,
    Metric,
    Sources,
    Space,
)
from imlbench.api.params import Params
from imlbench.errors import DataError, ParameterError, UserError, unknown
from imlbench.plan.config import Benchmark, Setting, constraint
from imlbench.plan.identity import code_of, digest, forget
from imlbench.plan.jobs import Codes, Job, Plan, Skip, Task
from imlbench.plan.registry import PluginClass, Registry, family_of
from imlbench.plan.settings import Settings

_C = TypeVar("_C", bound=PluginClass)


def make_plan(benchmark: Benchmark, registry: Registry) -> Plan:
    """Expand a benchmark into jobs, without reading any data.

    Raises:
        UserError: Unknown names, unknown parameters, values out of range: all of them at once.
    """
    forget()
    models, datasets, metrics = _select_all(benchmark, registry)
    artifacts = list(registry.artifacts.values())
    errors = _unused_settings(
        benchmark.settings, [*models, *datasets, *metrics, *artifacts], registry
    )
    planner = _Planner(benchmark, registry, errors)
    for dataset_cls in datasets:
        for dataset_params in planner.combinations(dataset_cls):
            planner.add_jobs(models, dataset_cls, dataset_params)
    tasks = [planner.tasks(classes) for classes in (metrics, artifacts)]
    if errors:
        raise UserError(*dict.fromkeys(errors))
    jobs = tuple({(job.id, _data_key(job)): job for job in planner.jobs}.values())
    return Plan(
        benchmark.name,
        _with_varying(jobs),
        tuple(dict.fromkeys(planner.skips)),
        tuple(sorted(tasks[0], key=lambda task: registry.metrics[task.name].position)),
        tuple(tasks[1]),
    )


class _Planner:
    """Collects jobs, skipped pairs and errors."""

    def __init__(self, benchmark: Benchmark, registry: Registry, errors: list[str]) -> None:
        self._benchmark, self._registry, self._errors = benchmark, registry, errors
        self.jobs: list[Job] = []
        self.skips: list[Skip] = []

    def combinations(self, cls: PluginClass) -> Iterator[Params]:
        """Yield every combination of a class's parameters; note what is invalid."""
        mine = self._settings_of(cls)
        for values in itertools.product(*(setting.values for setting in mine.values())):
            try:
                yield cls.params_type.model_validate(dict(zip(mine, values, strict=True)))
            except ValidationError as error:
                for problem in error.errors():
                    name = str(problem["loc"][0]) if problem["loc"] else ""
                    origin = mine[name].origin if name in mine else cls.name
                    self._errors.append(f"{origin}: {cls.name}.{name} {constraint(problem)}")
            except Exception as error:  # a plugin's own check can raise anything
                where = ", ".join(setting.origin for setting in mine.values()) or cls.name
                reason = f"{type(error).__name__}: {error}"
                self._errors.append(f"{where}: {cls.name} cannot take its parameters ({reason}).")

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
            space = dataset_cls(dataset_params).space
            if not isinstance(space, Space):
                raise TypeError(f"it must be a Space; got {space!r}")
        except Exception as error:  # a plugin can raise anything, and may stop nobody else
            reason = f"its space cannot be had ({type(error).__name__}: {error})"
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
            resolved: Params = model_cls.resolve(params, space)
            if not isinstance(resolved, model_cls.params_type):
                raise TypeError(f"resolve must return parameters; got {resolved!r}")
            resolved.settings()
        except ParameterError as error:
            set_by = self._settings_of(model_cls).get(error.parameter)
            origin = set_by.origin if set_by else f"default of {model_cls.name}"
            self._errors.append(f"{origin}: {model_cls.name}.{error.parameter} {error.problem}")
            return
        except Exception as error:  # a plugin can raise anything, and may stop nobody else
            reason = f"its parameters cannot be resolved ({type(error).__name__}: {error})"
            self.skips.append(Skip(model_cls.name, dataset_cls.name, reason, True))
            return
        benchmark = self._benchmark
        changed = {
            **_changed(dataset_params, prefix=f"{dataset_cls.name}."),
            **_changed(resolved, lambda usual: model_cls.resolve(usual, space)),
        }
        self.jobs += [
            Job(
                model_cls.name,
                model_cls.family,
                dataset_cls.name,
                resolved.settings(),
                dataset_params.settings(),
                seed,
                benchmark.n_samples,
                benchmark.n_draws,
                space,
                _codes(model_cls, dataset_cls),
                (self._registry.shipped_by(model_cls), self._registry.shipped_by(dataset_cls)),
                changed,
            )
            for seed in benchmark.seeds
        ]

    def tasks(self, classes: Sequence[type[AnyMetric]] | Sequence[type[AnyArtifact]]) -> list[Task]:
        """Return metrics or artifacts, with every combination of their parameters."""
        return [
            Task(
                cls.name,
                params.settings(),
                _changed(params),
                code_of(cls.__module__),
                getattr(cls, "needs_samples", True),
            )
            for cls in classes
            for params in self.combinations(cls)
        ]


def have_changed(
    job: Job, metrics: Sequence[Task], artifacts: Sequence[Task], registry: Registry
) -> bool:
    """Whether the code is not the one that a plan was made for, in a process that runs a job."""
    modules = [(task.code, registry.metrics[task.name].__module__) for task in metrics]
    modules += [(task.code, registry.artifacts[task.name].__module__) for task in artifacts]
    codes = _codes(registry.models[job.model], registry.datasets[job.dataset])
    return codes != job.codes or any(code_of(module) != code for code, module in modules)


def _codes(model_cls: type[AnyModel], dataset_cls: type[AnyDataset]) -> Codes:
    # Named, not imported: these modules load torch and are read here, not run.
    return Codes(
        fit=digest(code_of(model_cls.__module__), code_of("imlbench.runner.fitting")),
        draw=code_of("imlbench.runner.drawing"),
        score=digest(code_of(dataset_cls.__module__), code_of("imlbench.runner.scoring")),
    )


def _changed(
    params: Params, resolve: Callable[[Params], Params] = lambda given: given, prefix: str = ""
) -> Settings:
    """Return the parameters that are not at their default, as ``resolve`` makes it."""
    try:
        usual = resolve(type(params)()).settings()
    except Exception:  # there is no default, or a plugin raises anything
        usual = {}
    return {
        f"{prefix}{name}": value
        for name, value in params.settings().items()
        if name not in usual or usual[name] != value
    }


def _with_varying(jobs: Sequence[Job]) -> tuple[Job, ...]:
    """Enter into every job the parameters that tell it from others of its model and dataset."""
    seen: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    everything = [
        {**{f"{job.dataset}.{n}": v for n, v in job.dataset_params.items()}, **job.model_params}
        for job in jobs
    ]
    for job, params in zip(jobs, everything, strict=True):
        for name, value in params.items():
            seen[job.model, job.dataset, name].add(json.dumps(value))
    return tuple(
        replace(
            job,
            varying={n: v for n, v in params.items() if len(seen[job.model, job.dataset, n]) > 1},
        )
        for job, params in zip(jobs, everything, strict=True)
    )


def identify_data(plan: Plan, registry: Registry, sources: Sources) -> Plan:
    """Read every dataset once and enter its fingerprint into its jobs.

    So that missing or damaged data are found before anything is trained, downloads and decoding
    happen once, and results of one set of files are never taken for those of another.

    Raises:
        UserError: One message for every dataset that cannot be read.
    """
    fingerprints: dict[str, str] = {}
    errors: list[str] = []
    for job in plan.jobs:
        key = _data_key(job)
        if key not in fingerprints:
            cls = registry.datasets[job.dataset]
            fingerprints[key] = ""
            try:
                dataset = cls(cls.params_type.model_validate(job.dataset_params))
                fingerprints[key] = dataset.load(sources).fingerprint
            except DataError as error:
                errors += error.messages
            except Exception as error:  # a plugin can raise anything
                reason = f"{type(error).__name__}: {error}"
                errors.append(f"dataset {job.dataset}: loading it failed with {reason}.")
    if errors:
        raise UserError(*errors)
    jobs = (replace(job, fingerprint=fingerprints[_data_key(job)]) for job in plan.jobs)
    return replace(plan, jobs=tuple({job.id: job for job in jobs}.values()))


def _data_key(job: Job) -> str:
    return json.dumps([job.dataset, job.dataset_params], sort_keys=True)


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

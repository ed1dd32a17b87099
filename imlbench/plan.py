"""From a benchmark and the registry to jobs: what runs, with what, and what is skipped."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from imlbench.api import Dataset, Metric, Model, Sources, Space
from imlbench.config import Benchmark, Setting, constraint
from imlbench.errors import DataError, ParameterError, UserError, unknown
from imlbench.registry import Registry


@dataclass(frozen=True)
class Job:
    """One (model, dataset, parameters, seed): exactly what determines a result.

    Arguments:
        model: The model's name.
        dataset: The dataset's name.
        model_params: Resolved parameters, as JSON values.
        dataset_params: Likewise.
        seed: The only seed.
        n_samples: Samples per draw.
        n_draws: Number of draws.
        code: What identifies the code of the model and of the dataset.
        fingerprint: Hash of the data; empty until :func:`identify_data` has read them.
    """

    model: str
    dataset: str
    model_params: dict[str, Any]
    dataset_params: dict[str, Any]
    seed: int
    n_samples: int
    n_draws: int
    code: tuple[str, str]
    fingerprint: str = ""

    @cached_property
    def id(self) -> str:
        """A readable prefix and a hash of all fields."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{self.dataset}-{self.model}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def __str__(self) -> str:
        return f"{self.model} on {self.dataset}, seed {self.seed}"


@dataclass(frozen=True)
class Skip:
    """A pair that is not run, and why."""

    model: str
    dataset: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """The jobs of a benchmark, the pairs that are skipped, and the metrics with their code."""

    benchmark: str
    jobs: tuple[Job, ...]
    skips: tuple[Skip, ...]
    metrics: dict[str, str]


def make_plan(benchmark: Benchmark, registry: Registry) -> Plan:
    """Expand a benchmark into jobs, without reading any data.

    Raises:
        UserError: Unknown names, unknown parameters, values out of range: all of them at once.
    """
    models, datasets, metrics = _select_all(benchmark, registry)
    errors: list[str] = _unused_settings(benchmark.settings, [*models, *datasets], registry)
    jobs: list[Job] = []
    skips: list[Skip] = []
    for dataset_cls, dataset_params in _instances(datasets, benchmark.settings, errors):
        space = dataset_cls(dataset_params).space
        for model_cls in models:
            if space.kind not in model_cls.kinds:
                kinds = " or ".join(sorted(model_cls.kinds))
                reason = f"{model_cls.name} is for {kinds} data; {dataset_cls.name} is {space.kind}"
                skips.append(Skip(model_cls.name, dataset_cls.name, reason))
                continue
            for _, params in _instances([model_cls], benchmark.settings, errors, space):
                for seed in benchmark.seeds:
                    jobs.append(
                        Job(
                            model_cls.name,
                            dataset_cls.name,
                            params.model_dump(mode="json"),
                            dataset_params.model_dump(mode="json"),
                            seed,
                            benchmark.n_samples,
                            benchmark.n_draws,
                            (registry.code(model_cls), registry.code(dataset_cls)),
                        )
                    )
    if errors:
        raise UserError(*dict.fromkeys(errors))
    unique = {job.id: job for job in jobs}
    return Plan(
        benchmark.name,
        tuple(unique.values()),
        tuple(dict.fromkeys(skips)),
        {metric.name: registry.code(metric) for metric in metrics},
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
                fingerprints[key] = cls(cls.Params(**job.dataset_params)).load(sources).fingerprint
            except DataError as error:
                errors += error.messages
            except Exception as error:  # a plugin can raise anything
                reason = f"{type(error).__name__}: {error}"
                errors.append(f"dataset {job.dataset}: loading it failed with {reason}.")
    if errors:
        raise UserError(*errors)
    jobs = tuple(replace(job, fingerprint=fingerprints[_data_key(job)]) for job in plan.jobs)
    return replace(plan, jobs=jobs)


def _data_key(job: Job) -> str:
    return json.dumps([job.dataset, job.dataset_params], sort_keys=True)


def _select_all(
    benchmark: Benchmark, registry: Registry
) -> tuple[list[type[Model]], list[type[Dataset]], list[type[Metric]]]:
    selections = (
        (registry.select_models, benchmark.models),
        (registry.select_datasets, benchmark.datasets),
        (registry.select_metrics, benchmark.metrics),
    )
    chosen: list[Any] = []
    errors: list[str] = []
    for select, patterns in selections:
        try:
            chosen.append(select(patterns))
        except UserError as error:
            errors += error.messages
    if errors:
        broken = [f"note: plugin {p.name} was left out: {p.error}" for p in registry.broken]
        raise UserError(*errors, *broken)
    return chosen[0], chosen[1], chosen[2]


def _applies(setting: Setting, cls: type[Model] | type[Dataset]) -> bool:
    """Whether a setting's target names a class; an empty target names every one."""
    names = (cls.name, getattr(cls, "family", ""))
    return not setting.target or any(name and fnmatchcase(name, setting.target) for name in names)


def _unused_settings(
    settings: Sequence[Setting], chosen: Sequence[type[Model] | type[Dataset]], registry: Registry
) -> list[str]:
    """Return a message for every setting that no plugin understands."""
    known: list[Any] = [*registry.models.values(), *registry.datasets.values()]
    errors = []
    for setting in settings:
        from_command_line = setting.origin.startswith("--")
        targets = [cls for cls in known if _applies(setting, cls)]
        here = [cls for cls in targets if cls in chosen]
        if not targets:
            names = {name for cls in known for name in (cls.name, getattr(cls, "family", ""))}
            errors.append(f"{setting.origin}: {unknown('plugin', setting.target, names - {''})}")
        elif from_command_line and not here:
            errors.append(
                f"{setting.origin}: '{setting.target}' must be one of the models and datasets to "
                f"run; got none of {', '.join(cls.name for cls in chosen)}."
            )
        else:
            among = here if from_command_line and not setting.target else targets
            fields = {name for cls in among for name in cls.Params.model_fields}
            if setting.name not in fields:
                errors.append(f"{setting.origin}: {unknown('parameter', setting.name, fields)}")
    return errors


def _instances(
    classes: Sequence[Any],
    settings: Sequence[Setting],
    errors: list[str],
    space: Space | None = None,
) -> Iterator[tuple[Any, Any]]:
    """Yield every class with every combination of its parameters; note what is invalid."""
    for cls in classes:
        mine: dict[str, Setting] = {
            setting.name: setting
            for setting in settings
            if setting.name in cls.Params.model_fields and _applies(setting, cls)
        }
        for values in itertools.product(*(setting.values for setting in mine.values())):
            try:
                params = cls.Params(**dict(zip(mine, values, strict=True)))
                yield cls, params if space is None else cls.resolve(params, space)
            except ValidationError as error:
                for problem in error.errors():
                    name = str(problem["loc"][0]) if problem["loc"] else ""
                    origin = mine[name].origin if name in mine else cls.name
                    errors.append(f"{origin}: {cls.name}.{name} {constraint(problem)}")
            except ParameterError as error:
                set_by = mine.get(error.parameter)
                origin = set_by.origin if set_by else f"default of {cls.name}"
                errors.append(f"{origin}: {cls.name}.{error.parameter} {error.problem}")

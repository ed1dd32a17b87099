"""Planning jobs that are in a results folder: to score them, or to run them once more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from imlbench.errors import ANYTHING, brief
from imlbench.plan.config import Benchmark
from imlbench.plan.identity import refresh
from imlbench.plan.jobs import Job, Plan, Skip, Variant
from imlbench.plan.planning import codes_of, plan_tasks, with_varying
from imlbench.plan.registry import Registry
from imlbench.records.record import Record


def plan_again(
    records: Sequence[Record], benchmark: Benchmark, registry: Registry, as_fitted: bool
) -> Plan:
    """Plan jobs that are in a results folder.

    Arguments:
        records: Their records.
        benchmark: What is computed for each of them.
        registry: Where the plugins are.
        as_fitted: Whether they are taken as they were fitted, or made anew by today's code.

    Raises:
        UserError: A metric or a parameter of one is unknown.
    """
    refresh()
    metrics = registry.select_metrics(benchmark.metrics)
    artifacts = [] if as_fitted else list(registry.artifacts.values())
    tasks = plan_tasks(benchmark, metrics, artifacts, registry)
    usual_draw = f"{benchmark.n_draws}x{benchmark.n_samples}"
    jobs: list[Job] = []
    skips: list[Skip] = []
    for record in records:
        try:
            jobs += _again(record, registry, as_fitted, usual_draw)
        except KeyError as error:
            reason = f"plugin {error} is not installed"
            skips.append(Skip(record.model, record.dataset, reason, True))
        except ANYTHING as error:  # parameters of another version, or a plugin that raises anything
            reason = f"it cannot be planned again ({brief(error)})"
            skips.append(Skip(record.model, record.dataset, reason, True))
    variants = tuple(Variant(job, (job.seed,)) for job in with_varying(jobs))
    return Plan(benchmark.name, variants, tuple(skips), *tasks)


def _again(record: Record, registry: Registry, as_fitted: bool, usual_draw: str) -> Iterator[Job]:
    """Yield the jobs of a record: one for each way in which samples were drawn, if any were."""
    model_cls, dataset_cls = registry.models[record.model], registry.datasets[record.dataset]
    dataset_params = dataset_cls.params_type.model_validate(record.dataset_params)
    space = dataset_cls(dataset_params).space
    codes = codes_of(model_cls, dataset_cls)
    params = record.model_params
    if not as_fitted:
        given = model_cls.params_type.model_validate(params)
        params = model_cls.resolve(given, space).settings()
    for draw, drawn in record.draws.items() or [(usual_draw, None)]:
        n_draws, _, n_samples = draw.partition("x")
        known = codes
        if as_fitted:
            known = replace(codes, fit=record.code, draw=drawn.code if drawn else codes.draw)
        yield Job(
            record.model,
            record.family,
            record.dataset,
            params,
            dataset_params.settings(),
            record.seed,
            int(n_samples),
            int(n_draws),
            space,
            known,
            (registry.shipped_by(model_cls), registry.shipped_by(dataset_cls)),
            record.changed,
            fingerprint=record.fingerprint if as_fitted else "",
        )

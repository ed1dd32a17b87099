"""Commands that compute nothing: plans of many jobs, the list of plugins, jobs that are done."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from imlbench.plan.config import make_benchmark
from imlbench.plan.jobs import Job, Plan
from imlbench.plan.planning import make_plan
from imlbench.plan.registry import Registry
from imlbench.records.exported import Exported, look_at
from imlbench.records.folder import Store
from imlbench.records.record import Record
from speed.case import Case, Claim, Finding, Measured, Seconds
from speed.command import imlbench, in_temporary_folder, options
from speed.measure import interleaved, spread

SEEDS, GRID, PLUGINS = "plan: 10 x 10,000 seeds", "plan: 10,000 x 10 seeds", "plugins, again"
RERUN = "rerun of 10,000 jobs"

CLAIMS = (
    Claim(
        SEEDS,
        2.5,
        "imports of torch and of the plugins, in a process beside; seeds are kept as a list",
        at_most=3.0,
        unit="s",
    ),
    Claim(GRID, 3.5, "the same imports, and 0.1 ms for each combination", at_most=3.0, unit="s"),
    Claim(PLUGINS, 0.6, "imports of click; one file is read", at_most=1.5, unit="s"),
)
RERUN_CLAIMS = (
    Claim(
        RERUN,
        5.0,
        "2 s of imports; 0.1 ms each for a job's record, its keys and its files",
        at_most=5.0,
        unit="s",
    ),
)


@in_temporary_folder
def run(folder: Path, repetitions: int = 3, size: int = 10_000) -> Iterator[Finding]:
    """Plan many seeds and many combinations, and list the plugins."""
    vae = ("plan", *options(models="vae", datasets="digits"))
    few = options(set=f"vae.latent_dim={_numbers(10)}", seeds=f"0..{size - 1}")
    widths = options(set=f"vae.hidden_dim={_numbers(size // 50)}")
    many = options(set=f"vae.latent_dim={_numbers(50)}", seeds="0..9")
    commands = {SEEDS: (*vae, *few), GRID: (*vae, *widths, *many), PLUGINS: ("plugins",)}

    def timer(claim: str) -> float:
        return imlbench(folder, *commands[claim]).seconds

    times = interleaved({c: functools.partial(timer, c) for c in commands}, repetitions)
    for claim, found in times.items():
        yield Measured(claim, spread(found))


def _numbers(n: int) -> str:
    return ",".join(map(str, range(1, n + 1)))


CASE = Case(
    "runner-plan",
    "Times of whole commands that run nothing",
    "Plans of 100,000 jobs of vae on digits: 10 numbers of latent dimensions by 10,000 seeds, and "
    "50 of them by 200 widths by 10 seeds. The list of all plugins. Each command was run before.",
    CLAIMS,
    run,
)


def copy_to_seeds(store: Store, plan: Plan) -> None:
    """Copy the only job of a folder to all jobs of a plan, as if these had been run and logged.

    Arguments:
        store: The results folder; it holds the job of one of the plan's seeds.
        plan: Jobs that differ in nothing but the seed. Their files are links.
    """
    (record,) = store.records()
    plan = plan.with_fingerprints(dict.fromkeys(plan.data, record.fingerprint))
    source = store.folder(record.id)
    for job in plan.jobs:
        if job.id == record.id:
            continue
        target = store.folder(job.id)
        for path, _ in source.files(record):
            link = target.path / path.relative_to(source.path)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.hardlink_to(path)
        target.write(as_of(record, job, plan))
    exported = Exported(store)
    seen = {folder.path.name: look_at(folder) for folder in store}
    exported.jobs = {name: entry for name, entry in seen.items() if entry is not None}
    exported.write(exported.state())


def as_of(record: Record, job: Job, plan: Plan) -> Record:
    """Return a record as that of another seed's job, with its keys."""
    tasks = {task.label: task for task in (*plan.metrics, *plan.artifacts)}
    drawn, reasons = record.draws[job.draw], record.not_applicable
    changed = {
        "id": job.id,
        "seed": job.seed,
        "fit_key": job.fit_key,
        "draws": {job.draw: drawn.model_copy(update={"key": job.draw_key})},
        "scores": tuple(
            score.model_copy(update={"key": tasks[score.label].key(job)}) for score in record.scores
        ),
        "artifacts": tuple(
            shown.model_copy(update={"key": tasks[shown.label].key(job)})
            for shown in record.artifacts
        ),
        "not_applicable": {
            label: reason.model_copy(update={"key": tasks[label].reason_key(job)})
            for label, reason in reasons.items()
        },
    }
    return record.model_copy(update=changed)


@in_temporary_folder
def run_rerun(folder: Path, n_jobs: int = 10_000, repetitions: int = 3) -> Iterator[Finding]:
    """Make a folder of finished jobs, and run them again."""
    store = Store(folder / "results")
    toy = {"models": "reference-train", "datasets": "toy-2d", "metrics": "modes_covered"}
    given = options(**toy, n_samples=100, results=store.root)
    imlbench(folder, "run", *given, *options(seeds=0))
    benchmark = make_benchmark(
        None,
        None,
        models=[toy["models"]],
        datasets=[toy["datasets"]],
        metrics=[toy["metrics"]],
        n_samples=100,
        seeds=f"0..{n_jobs - 1}",
    )
    copy_to_seeds(store, make_plan(benchmark, Registry()))
    times, own_times = [], []
    for _ in range(1 + repetitions):
        ran = imlbench(folder, "run", *given, *options(seeds=f"0..{n_jobs - 1}"))
        if f" {n_jobs} jobs: done (reused)" not in ran.said:
            raise RuntimeError(f"all jobs must be reused; got: {ran.said[-2000:]}")
        times.append(ran.seconds)
        own_times.append(ran.own_seconds)
    yield Measured(RERUN, spread(times[1:]))
    yield Seconds("processor time of the command's own process", spread(own_times[1:]))


RERUN_CASE = Case(
    "runner-rerun",
    "Time of a whole command whose jobs are done",
    "10,000 jobs of reference-train on toy-2d, each with samples, a score and a figure. One was "
    "run; the others are copies of its record with their own seeds and keys, and their files are "
    "links to its files. They are noted as logged to MLflow, whose database a rerun does not read. "
    "The first rerun does not count.",
    RERUN_CLAIMS,
    run_rerun,
)

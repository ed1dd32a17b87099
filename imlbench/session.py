"""imlbench from Python: plan jobs and run them.

Example::

    import imlbench

    found = imlbench.run(models=["iml", "vae"], datasets="digits", set={"epochs": 5})
    found.leaderboard()
    found.to_frame().plot.scatter("latent_dim", "kde")
    imlbench.load(found.records[0]).sample(10, torch.Generator())
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from imlbench.errors import UserError, unknown
from imlbench.reading import Names, Place, Results, names_of, published_values
from imlbench.records.folder import Store
from imlbench.records.record import Record, Status
from imlbench.records.tables import entries

if TYPE_CHECKING:
    from imlbench.plan.config import Benchmark
    from imlbench.plan.jobs import Job, Plan
    from imlbench.runner.contract import Assignment, Runner
    from imlbench.runner.scheduling import Outcome, Watcher

Executor = Literal["local", "ray", "slurm"]


@dataclass(frozen=True)
class Options:
    """How and where jobs are run; see :func:`run`."""

    path: Place = "results"
    config: Place | None = None
    data_dir: Place | None = None
    offline: bool = False
    device: str = "auto"
    workers: int | None = None
    executor: Executor = "local"
    ray_address: str | None = None
    slurm: Mapping[str, str] = field(default_factory=dict)
    time_limit: float | None = None
    checkpoint_every: float = 60.0
    force: bool = False
    progress: bool = True
    log_tensors: bool = False


@dataclass(frozen=True)
class Finished:
    """A run that has ended.

    Arguments:
        results: What its jobs have left behind.
        plan: What was to run.
        outcomes: How its jobs ended.
        problems: What could not be logged to MLflow, and why.
        was_interrupted: Whether the user stopped it.
    """

    results: Results
    plan: Plan
    outcomes: tuple[Outcome, ...]
    problems: tuple[str, ...]
    was_interrupted: bool

    @property
    def n_done(self) -> int:
        """How many jobs have a result."""
        return sum(outcome.status is Status.DONE for outcome in self.outcomes)


class Session:
    """A pool of processes, and what is done with it: plan, then run.

    A context manager; whatever runs ends with it. No plugin's code runs in this process.

    Arguments:
        options: How and where.

    Raises:
        UserError: The results folder cannot be used.
    """

    def __init__(self, options: Options) -> None:
        from imlbench.api.sources import Sources
        from imlbench.runner.pool import Pool

        self.options, self.store = options, Store(Path(options.path))
        data_dir = Path(options.data_dir).absolute() if options.data_dir else None
        self._sources = Sources(data_dir, options.offline)
        self._pool = Pool()

    def __enter__(self) -> Session:
        self._pool.begin()
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.close()

    @property
    def broken(self) -> dict[str, str]:
        """The plugins that were left out, and why; known after a plan was made."""
        return self._pool.broken

    def look(self) -> None:
        """Read the results folder; best before there is a plan, while plugins are imported."""
        _ = self._sound

    @cached_property
    def _records(self) -> dict[str, Record]:
        """The jobs of the results folder that had ended, by id."""
        return {record.id: record for record in self.store.records()}

    @cached_property
    def _sound(self) -> dict[str, Record]:
        """Those of which every file is as it was written."""
        return {
            name: record
            for name, record in self._records.items()
            if not self.store.folder(name).damaged(record)
        }

    def plan(self, benchmark: Benchmark) -> Plan:
        """Expand a benchmark into jobs.

        Raises:
            UserError: Everything that is wrong with the request, at once.
        """
        from imlbench.runner.calls import make_plan

        return make_plan(self._pool, benchmark)

    def plan_again(self, benchmark: Benchmark, records: Sequence[Record], as_fitted: bool) -> Plan:
        """Plan jobs of the results folder, as they were fitted or by today's code.

        Arguments:
            benchmark: Which metrics are computed, with which parameters.
            records: The jobs.
            as_fitted: Whether nothing is fitted again.

        Raises:
            UserError: There is no such job, or a metric is unknown.
        """
        from imlbench.runner.calls import plan_again

        ids = [record.id for record in records]
        return plan_again(self._pool, benchmark, self.store.root, ids, as_fitted)

    def execute(self, plan: Plan, *, is_fitted: bool = False) -> Finished:
        """Run a plan, log what it leaves behind to MLflow, and return how it went.

        Arguments:
            plan: What to run.
            is_fitted: Only scores are computed, of checkpoints and samples that are there.

        Raises:
            UserError: There is nothing to run, or data are missing.
        """
        from imlbench.records.exporter import Exporter
        from imlbench.records.journal import Journal
        from imlbench.runner.calls import read_data
        from imlbench.runner.progress import Logbook, make_display
        from imlbench.runner.scheduling import find_finished, run_jobs

        options, devices = self.options, self._devices()
        if self.store.root.exists():
            self.store.prepare()  # before any data are read: it may not be possible
        skips = plan.skips
        if not is_fitted:
            plan = read_data(self._pool, plan, self._sources)
        if not len(plan):
            reasons = "; ".join(map(str, plan.skips))
            raise UserError(
                f"run: there must be at least one job; everything is skipped: {reasons}."
            )
        self.store.prepare()
        exporter = Exporter(self.store, with_tensors=options.log_tensors)
        started, was_interrupted = time.time(), False
        finished, left = find_finished(plan, self.store, {} if options.force else self._sound)
        with contextlib.ExitStack() as stack:
            display = stack.enter_context(
                make_display(self.store, len(plan.jobs), options.progress)
            )
            for skip in plan.skips[len(skips) :]:
                display.print(f"failed: {skip}")
            display.reuse(finished)
            outcomes = list(finished)
            try:
                if left:
                    exporter.begin()
                    names = {job.id: str(job) for job in plan.jobs}
                    journal = Journal(self.store, names, started)
                    stack.callback(journal.close)
                    template = self._template(plan, left[0], is_fitted, started)
                    runner = stack.enter_context(self._runner(devices, len(left)))
                    known = _durations(plan, self._records)
                    watchers: list[Watcher] = [display, Logbook(journal)]
                    for outcome in run_jobs(left, template, runner, watchers, known):
                        outcomes.append(outcome)
                        exporter.submit([outcome.job.id])
            except KeyboardInterrupt:
                was_interrupted = True
        problems = exporter.finish(patience=10.0 if was_interrupted else 60.0)
        return self._finished(plan, outcomes, problems, was_interrupted)

    def _template(self, plan: Plan, job: Job, is_fitted: bool, started: float) -> Assignment:
        from imlbench.runner.contract import Assignment

        return Assignment(
            job,
            self.store.root.resolve(),
            plan.metrics,
            plan.artifacts,
            self._sources,
            refit_before=started if self.options.force else 0.0,
            checkpoint_every=self.options.checkpoint_every,
            time_limit=self.options.time_limit,
            is_fitted=is_fitted,
        )

    def _devices(self) -> list[str]:
        """Return the devices of this machine to use, once it is clear that jobs can be run.

        Raises:
            UserError: A device does not exist, or a package is not installed.
        """
        from imlbench.runner.calls import count_devices
        from imlbench.runner.local import choose_devices

        options = self.options
        if options.executor == "ray":
            from imlbench.runner.ray_runner import import_ray

            import_ray()
            return []
        if options.executor == "slurm":
            from imlbench.runner.slurm_runner import import_submitit

            import_submitit()
            return []
        n_cuda = 0 if options.device == "cpu" else count_devices(self._pool)
        return choose_devices(options.device, n_cuda)

    @contextlib.contextmanager
    def _runner(self, devices: Sequence[str], n_jobs: int) -> Iterator[Runner]:
        """Make the runner that the options ask for."""
        options = self.options
        if options.executor == "ray":
            from imlbench.runner.ray_runner import RayRunner

            yield RayRunner(options.ray_address, min(options.workers or 1, n_jobs))
        elif options.executor == "slurm":
            from imlbench.runner.slurm_runner import SlurmRunner

            yield SlurmRunner(self.store.root / "slurm", options.slurm)
        else:
            from imlbench.runner.local import LocalRunner, suspending

            n_slots = min(options.workers or len(devices), n_jobs)
            local = LocalRunner(devices, n_slots, self._pool)
            with suspending(local):
                yield local

    def _finished(
        self,
        plan: Plan,
        outcomes: Sequence[Outcome],
        problems: Sequence[str],
        was_interrupted: bool,
    ) -> Finished:
        """Read what the jobs have left behind: again, where something was computed."""
        records = dict(self._records)
        for outcome in outcomes:
            record = None if outcome.is_reused else self.store.folder(outcome.job.id).read()
            if record is not None:
                records[record.id] = record
        draws = {job.id: job.draw for job in plan.jobs}
        shown = entries([records[name] for name in draws if name in records], draws)
        published = published_values(self.options.config)
        results = Results(shown, self.store, published)
        return Finished(results, plan, tuple(outcomes), tuple(problems), was_interrupted)


def _durations(plan: Plan, records: Mapping[str, Record]) -> dict[tuple[str, str], float]:
    """Return the seconds that fits took, by model and dataset, of the jobs of a plan."""
    took: dict[tuple[str, str], list[float]] = {}
    for job in plan.jobs:
        record = records.get(job.id)
        if record is not None and record.fit is not None:
            took.setdefault((job.model, job.dataset), []).append(record.fit.seconds)
    return {kind: sum(seconds) / len(seconds) for kind, seconds in took.items()}


def run(
    benchmark: str | None = None,
    *,
    models: Names = (),
    datasets: Names = (),
    metrics: Names = (),
    set: Mapping[str, object] | None = None,
    grid: Mapping[str, Sequence[object]] | None = None,
    seeds: str | int | Sequence[int] | None = None,
    n_samples: int | None = None,
    n_draws: int | None = None,
    config: Place | None = None,
    path: Place = "results",
    data_dir: Place | None = None,
    offline: bool = False,
    device: str = "auto",
    workers: int | None = None,
    executor: Executor = "local",
    ray_address: str | None = None,
    slurm: Mapping[str, str] | None = None,
    time_limit: float | None = None,
    checkpoint_every: float = 60.0,
    force: bool = False,
    progress: bool = True,
) -> Results:
    """Run every chosen model on every chosen dataset; finished jobs are reused.

    Arguments:
        benchmark: A name from ``benchmarks.toml``; the other arguments add to it and win over it.
        models: Names, families or globs: ``"iml,vae"`` or ``["iml", "vae"]``.
        datasets: Names or globs.
        metrics: Names or globs; by default all that apply.
        set: Parameters by ``"name"`` or ``"plugin.name"``.
        grid: Lists of values to try, by the same names.
        seeds: One job each: ``3``, ``[0, 1]`` or ``"0..2"``.
        n_samples: Samples per draw.
        n_draws: Independent draws.
        config: The file of named benchmarks; by default ``benchmarks.toml``.
        path: The results folder.
        data_dir: Where to look for data first.
        offline: Never touch the network.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:0,cuda:1"``.
        workers: Jobs at a time; by default one for each device.
        executor: ``"local"``, ``"ray"`` (needs ``imlbench[ray]``) or ``"slurm"`` (needs
            ``imlbench[slurm]``).
        ray_address: The cluster to join; by default one is started on this machine.
        slurm: What to ask Slurm for, by submitit's names, such as ``{"timeout_min": "60"}``.
        time_limit: Seconds allowed per job; time for which it is suspended counts a tenth.
        checkpoint_every: Seconds between two checkpoints within a fit.
        force: Run finished jobs again.
        progress: Show progress on the error stream.

    Returns:
        The results of these jobs; those that failed are among them, with their status and reason.

    Raises:
        UserError: Everything that is wrong with the request, at once.
        KeyboardInterrupt: After running jobs were stopped and recorded as interrupted.

    Example::

        found = imlbench.run(models="iml-gmm", datasets="digits", grid={"latent_dim": [5, 10, 20]})
        found.to_frame().plot("latent_dim", "kde")
    """
    from imlbench.plan.config import find_file, make_benchmark

    file = find_file(Path(config) if config else None)
    chosen = make_benchmark(
        benchmark,
        file,
        models=names_of(models),
        datasets=names_of(datasets),
        metrics=names_of(metrics),
        seeds=[seeds] if isinstance(seeds, int) else seeds,
        n_samples=n_samples,
        n_draws=n_draws,
        set=set,
        grid=grid,
    )
    options = Options(
        path=path,
        config=file,
        data_dir=data_dir,
        offline=offline,
        device=device,
        workers=workers,
        executor=executor,
        ray_address=ray_address,
        slurm=slurm or {},
        time_limit=time_limit,
        checkpoint_every=checkpoint_every,
        force=force,
        progress=progress,
    )
    with Session(options) as session:
        session.look()
        finished = session.execute(session.plan(chosen))
    if finished.was_interrupted:
        raise KeyboardInterrupt
    return finished.results


def describe_plugins(name: str = "") -> str:
    """Return a list of all plugins, or all about one of them.

    As long as nothing is installed or edited, what was told once is told again: plugins are not
    imported.

    Raises:
        UserError: There is none of that name.
    """
    from imlbench.api.sources import Sources
    from imlbench.files import read_facts, write_facts
    from imlbench.plan.installed import stamp
    from imlbench.runner.calls import describe
    from imlbench.runner.pool import Pool

    path, now = Sources().cache_dir / "plugins.json", stamp()
    known = read_facts(path)
    if known is None or known.pop("stamp", None) != now:
        with Pool() as pool:
            known = dict(describe(pool))
            if not pool.broken:  # which may have to do with more than what is installed
                with contextlib.suppress(OSError):
                    write_facts(path, {"stamp": now, **known})
    if name not in known:
        raise UserError(unknown("plugin", name, known.keys() - {""}))
    return str(known[name])

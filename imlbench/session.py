"""imlbench from Python: run jobs, look at results, load fitted models.

Example::

    import imlbench

    found = imlbench.run(models=["iml", "vae"], datasets="digits", set={"epochs": 5})
    found.leaderboard()
    found.to_frame().plot.scatter("latent_dim", "kde")
    imlbench.load(found.records[0]).sample(10, torch.Generator())
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from imlbench.errors import UserError, unknown
from imlbench.records.folder import Store, read_tensors
from imlbench.records.record import Record, Status
from imlbench.records.tables import Entry, Published, Table, entries, make_tables

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from imlbench.api.model import AnyModel
    from imlbench.plan.jobs import Plan
    from imlbench.plan.registry import Registry
    from imlbench.records.render import Format
    from imlbench.runner.local import Outcome

Place = str | os.PathLike[str]
Names = str | Sequence[str]


class Leaderboard:
    """Tables, one for each dataset; a notebook shows them as such.

    Arguments:
        tables: From :func:`~imlbench.records.tables.make_tables`.
    """

    def __init__(self, tables: Sequence[Table]) -> None:
        self.tables = tables

    def render(self, format: Format = "terminal", *, width: int | None = None) -> str:
        """Return the tables as text.

        Arguments:
            format: One of ``terminal``, ``github``, ``latex``, ``html``, ``csv``, ``json``.
            width: Columns of a terminal; zero for no limit and no control sequences.
        """
        from imlbench.records.render import render

        return render(self.tables, format, width=width)

    def __str__(self) -> str:
        return self.render(width=0)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return self.render("html")


class Results:
    """What jobs have left behind.

    Arguments:
        found: Records, each with a way in which samples were drawn.
        store: The folder they come from; ``None`` if they come from a server.
        published: Values from the literature.
    """

    def __init__(
        self,
        found: Sequence[Entry],
        store: Store | None,
        published: Published | None = None,
    ) -> None:
        self._entries, self._store, self._published = tuple(found), store, published

    @property
    def records(self) -> tuple[Record, ...]:
        """The records, one for each job."""
        return tuple({entry.record.id: entry.record for entry in self._entries}.values())

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __repr__(self) -> str:
        n_done = sum(record.status is Status.DONE for record in self)
        return f"Results({len(self)} jobs, {n_done} done)"

    def to_frame(self) -> pd.DataFrame:
        """Return a row for each job and way of drawing.

        Columns: what identifies the job, its parameters by their names, how it ended, every metric
        by its label with its ``stderr``, seconds, memory, and number of parameters.
        """
        import pandas as pd

        return pd.DataFrame([_flat(entry) for entry in self._entries])

    def leaderboard(
        self,
        *,
        models: Names = (),
        datasets: Names = (),
        metrics: Names = (),
        sort: str | None = None,
    ) -> Leaderboard:
        """Return a table for each dataset, with a row for each model and set of parameters.

        Arguments:
            models: Only these, by name, family or glob.
            datasets: Only these, by name or glob.
            metrics: Only these columns, by label or glob.
            sort: The metric that orders the rows; by default the first column.

        Raises:
            UserError: There is no result, or a name is unknown.
        """
        tables = make_tables(
            self._entries,
            models=_names(models),
            datasets=_names(datasets),
            metrics=_names(metrics),
            sort=sort,
            published=self._published,
        )
        return Leaderboard(tables)

    def load(self, record: Record, *, device: torch.device | str = "cpu") -> AnyModel:
        """Return the fitted model of one of these jobs; see :func:`imlbench.load`."""
        if self._store is None:
            raise UserError(f"job {record.id}: its model is not on the server; load its folder.")
        return load(record, self._store.root, device=device)

    def per_example(self, record: Record, label: str, draw: str = "") -> dict[str, torch.Tensor]:
        """Return a metric's values for every test example: ``per_example``, and perhaps ``groups``.

        Arguments:
            record: One of these records.
            label: The metric's label, such as ``kde``.
            draw: How the samples were drawn; by default as the last ones were.

        Raises:
            UserError: There are none.
        """
        score = record.score(label, draw or next(reversed(record.draws), ""))
        if self._store is None or score is None or not score.n_examples:
            labels = [found.label for found in record.scores if found.n_examples]
            raise UserError(f"job {record.id}: {unknown('per-example metric', label, labels)}")
        return read_tensors(self._store.folder(record.id).per_example(label, score.draw))


def _names(given: Names) -> tuple[str, ...]:
    parts = given.split(",") if isinstance(given, str) else given
    return tuple(name.strip() for name in parts if name.strip())


def _flat(entry: Entry) -> dict[str, object]:
    record = entry.record
    row: dict[str, object] = {
        "job": record.id,
        "model": record.model,
        "dataset": record.dataset,
        "seed": record.seed,
        **entry.params,
        **{f"{record.dataset}.{name}": value for name, value in record.dataset_params.items()},
        "status": str(record.status),
    }
    for score in entry.scores.values():
        row |= {score.label: score.value, f"{score.label}.stderr": score.stderr}
    if record.fit:
        row |= {
            "fit_seconds": record.fit.seconds,
            "peak_memory_bytes": record.fit.peak_memory_bytes,
            "n_parameters": record.fit.n_parameters,
        }
    return row


def results(
    path: Place = "results", *, tracking: str | None = None, config: Place | None = None
) -> Results:
    """Return what was run so far.

    Arguments:
        path: The results folder.
        tracking: An MLflow server to read from instead of the folder.
        config: The file of published values; by default ``benchmarks.toml``.

    Raises:
        UserError: There is no such folder, or the server cannot be read.
    """
    from imlbench.plan.config import find_file, read_file

    file = find_file(Path(config) if config else None)
    published = read_file(file).published if file else None
    if tracking is not None:
        from imlbench.records.tracking import read_records

        return Results(entries(read_records(tracking)), None, published)
    root = Path(path)
    if not root.is_dir():
        raise UserError(
            f"--results: {root} must be a folder with results; there is none. "
            "Run some first, for example: imlbench run --models iml,vae --datasets digits"
        )
    store = Store(root)
    return Results(entries(store.records()), store, published)


def load(
    job: Record | str, path: Place = "results", *, device: torch.device | str = "cpu"
) -> AnyModel:
    """Return a job's fitted model, ready to sample, encode, decode or evaluate.

    Arguments:
        job: The job's record, or the name of its folder.
        path: The results folder.
        device: Where it goes.

    Raises:
        UserError: There is no such job, it has no fitted model, or its plugin is not installed.

    Example::

        model = imlbench.load("digits-iml-gmm-0a1b2c3d4e5f")
        x = model.sample(10, torch.Generator().manual_seed(0))
    """
    import torch

    from imlbench.plan.registry import Registry
    from imlbench.runner.job import open_model

    store = Store(Path(path))
    name = job if isinstance(job, str) else job.id
    record = store.folder(name).read()
    if record is None:
        known = [folder.path.name for folder in store]
        raise UserError(f"--results: {store.root}: {unknown('job', name, known)}")
    if record.fit is None or not store.folder(name).checkpoint.exists():
        raise UserError(
            f"job {name}: must have a fitted model; it is {record.status} and has no checkpoint. "
            "Run it again first."
        )
    registry = Registry()
    for what, wanted, known_names in (
        ("model", record.model, registry.models),
        ("dataset", record.dataset, registry.datasets),
    ):
        if wanted not in known_names:
            raise UserError(f"job {name}: {unknown(what, wanted, known_names)}")
    try:
        return open_model(record, store.folder(name), registry, torch.device(device))
    except Exception as error:  # a plugin, or a file, can be wrong in any way
        raise UserError(
            f"job {name}: its checkpoint must fit today's code; got {type(error).__name__}: "
            f"{error}. Run it again, or install the version that it was made by."
        ) from error


@dataclass(frozen=True)
class Finished:
    """A run that has ended.

    Arguments:
        results: What its jobs have left behind.
        plan: What was to run.
        outcomes: How its jobs ended.
        problem: Why results could not be logged to MLflow; empty if they could.
        was_interrupted: Whether the user stopped it.
    """

    results: Results
    plan: Plan
    outcomes: tuple[Outcome, ...]
    problem: str
    was_interrupted: bool

    @property
    def n_done(self) -> int:
        """How many jobs have a result."""
        return sum(outcome.status is Status.DONE for outcome in self.outcomes)


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
    time_limit: float | None = None,
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
        time_limit: Seconds allowed per job.
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
    from imlbench.plan.planning import make_plan
    from imlbench.plan.registry import Registry

    file = find_file(Path(config) if config else None)
    chosen = make_benchmark(
        benchmark,
        file,
        models=_names(models),
        datasets=_names(datasets),
        metrics=_names(metrics),
        seeds=[seeds] if isinstance(seeds, int) else seeds,
        n_samples=n_samples,
        n_draws=n_draws,
        set=set,
        grid=grid,
    )
    registry = Registry()
    finished = execute(
        make_plan(chosen, registry),
        registry,
        path=path,
        config=file,
        data_dir=data_dir,
        offline=offline,
        device=device,
        time_limit=time_limit,
        force=force,
        progress=progress,
    )
    if finished.was_interrupted:
        raise KeyboardInterrupt
    return finished.results


def execute(
    plan: Plan,
    registry: Registry,
    *,
    path: Place,
    config: Path | None,
    data_dir: Place | None,
    offline: bool,
    device: str,
    time_limit: float | None,
    force: bool,
    progress: bool = True,
    log_tensors: bool = False,
) -> Finished:
    """Run a plan, log what it leaves behind to MLflow, and return how it went.

    The arguments are those of :func:`run`, but for

    Arguments:
        plan: What to run.
        registry: Where its plugins are.
        config: The file of published values.
        log_tensors: Log checkpoints and samples to MLflow, too.
    """
    from imlbench.api.sources import Sources
    from imlbench.plan.config import read_file
    from imlbench.plan.planning import identify_data
    from imlbench.records.tracking import Tracker
    from imlbench.runner.local import find_devices, run_jobs
    from imlbench.runner.progress import make_display

    if not plan.jobs:
        reasons = "; ".join(map(str, plan.skips))
        raise UserError(f"run: there must be at least one job; all pairs are skipped: {reasons}.")
    store = Store(Path(path))
    store.prepare()
    devices = find_devices(device)
    sources = Sources(Path(data_dir).resolve() if data_dir else None, offline)
    plan = identify_data(plan, registry, sources)
    tracker = Tracker(store, with_tensors=log_tensors)
    outcomes: list[Outcome] = []
    was_interrupted = False
    try:
        with make_display(len(plan.jobs), progress) as display:
            for outcome in run_jobs(
                plan,
                store,
                sources=sources,
                devices=devices,
                display=display,
                time_limit=time_limit,
                force=force,
            ):
                outcomes.append(outcome)
                if not outcome.reused:
                    tracker.export([store.folder(outcome.job.id)])
    except KeyboardInterrupt:
        was_interrupted = True
    tracker.export(list(store))
    found = {job.id: store.folder(job.id).read() for job in plan.jobs}
    shown = entries(
        [record for record in found.values() if record is not None],
        {job.id: job.draw for job in plan.jobs},
    )
    published = read_file(config).published if config else None
    return Finished(
        Results(shown, store, published), plan, tuple(outcomes), tracker.problem, was_interrupted
    )

"""The command line: parses and prints, nothing else. Imports what a command needs when it runs."""

from __future__ import annotations

import gc
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, TypeVar

import click

from imlbench.errors import UserError

if TYPE_CHECKING:
    from typing import Unpack

    from imlbench.plan.jobs import Plan, Skip
    from imlbench.plan.registry import Registry
    from imlbench.records.folder import Store
    from imlbench.records.record import Record
    from imlbench.records.render import Format
    from imlbench.records.tracking import Tracker

_Command = TypeVar("_Command", bound=Callable[..., object])


class Selection(TypedDict):
    """What the options of ``run`` and ``plan`` say."""

    benchmark: str | None
    models: tuple[str, ...]
    datasets: tuple[str, ...]
    metrics: tuple[str, ...]
    seeds: str | None
    n_samples: int | None
    n_draws: int | None
    settings: tuple[str, ...]
    epochs: str | None
    config: Path | None


class _Group(click.Group):
    """Turns the user's mistakes into messages and exit status 2."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            result: object = super().invoke(ctx)
        except UserError as error:
            for message in error.messages:
                click.secho(f"error: {message}", err=True, fg="red")
            ctx.exit(2)
        return result


def _names(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (value or "").split(",") if name.strip())


def _options(*options: Callable[[_Command], _Command]) -> Callable[[_Command], _Command]:
    def decorate(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_config = click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="The file of named benchmarks.  [default: benchmarks.toml, if there]",
)
_results = click.option(
    "--results",
    type=click.Path(path_type=Path),
    default=Path("results"),
    show_default=True,
    help="Folder for everything that is written.",
)
_plan_options = _options(
    click.argument("benchmark", required=False),
    click.option("--models", callback=_names, help="Names, families or globs: iml,vae,reference-*"),
    click.option("--datasets", callback=_names, help="Names or globs: digits,mnist"),
    click.option("--metrics", callback=_names, help="Names or globs.  [default: all that apply]"),
    click.option("--seeds", help="One job each: 0..2 or 0,1,2.  [default: 0]"),
    click.option("--n-samples", type=int, help="Samples per draw.  [default: 1000]"),
    click.option("--n-draws", type=int, help="Independent draws.  [default: 5]"),
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="[PLUGIN.]PARAM=VALUE[,…]",
        help="A parameter of any plugin; several values make a grid. Repeatable.",
    ),
    click.option("--epochs", help="Short for --set epochs=…"),
    _config,
)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="imlbench")
def main() -> None:
    """Which generative model fits this data best, and by how much?

    \b
    imlbench run --models iml,vae --datasets digits
    imlbench leaderboard
    """


@main.command()
@_plan_options
@_results
@click.option("--data-dir", type=click.Path(path_type=Path), help="Look for data here first.")
@click.option("--offline", is_flag=True, help="Never touch the network.")
@click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:0, cuda:0,cuda:1"
)
@click.option(
    "--time-limit", type=click.FloatRange(min=0, min_open=True), help="Seconds allowed per job."
)
@click.option("--force", is_flag=True, help="Run finished jobs again.")
@click.option("--log-tensors", is_flag=True, help="Log checkpoints and samples to MLflow, too.")
@click.option("--dry-run", is_flag=True, help="Print the jobs and stop.")
def run(
    results: Path,
    data_dir: Path | None,
    offline: bool,
    device: str,
    time_limit: float | None,
    force: bool,
    log_tensors: bool,
    dry_run: bool,
    **selection: Unpack[Selection],
) -> None:
    """Run models on datasets, and print the leaderboard.

    Every chosen model is run on every chosen dataset. Finished jobs are reused; an interrupted run
    goes on where it stopped. BENCHMARK is a name from benchmarks.toml; options add to it and win
    over it.
    """
    plan, registry = _make_plan(**selection)
    if dry_run:
        _print_plan(plan)
        return
    from imlbench.session import execute

    for unasked in (signal.SIGTERM, signal.SIGHUP):  # as on Ctrl-C, jobs are stopped and recorded
        signal.signal(unasked, signal.default_int_handler)
    _print_skips(plan.skips)
    finished = execute(
        plan,
        registry,
        path=results,
        config=_find_config(selection["config"]),
        data_dir=data_dir,
        offline=offline,
        device=device,
        time_limit=time_limit,
        force=force,
        log_tensors=log_tensors,
    )
    n_jobs, n_done = len(finished.plan.jobs), finished.n_done
    _warn([finished.problem] if finished.problem else [])
    if finished.was_interrupted:
        _warn([f"interrupted: {n_done} of {n_jobs} jobs are done; run again to go on."])
        sys.exit(130)
    computed = {score.label for record in finished.results for score in record.scores}
    asked = [task.label for task in plan.metrics if task.label in computed]
    if asked:
        click.echo(finished.results.leaderboard(metrics=asked).render(width=_width()))
    _warn(
        f"job {record.id}: artifact {shown.label} failed: {shown.error}"
        for record in finished.results
        for shown in record.artifacts
        if shown.error
    )
    if n_done < n_jobs:
        _warn([f"{n_jobs - n_done} of {n_jobs} jobs have no result; see the lines above."])
    if n_done < n_jobs or any(skip.is_failure for skip in plan.skips):
        sys.exit(1)


@main.command()
@_plan_options
def plan(**selection: Unpack[Selection]) -> None:
    """Print what `run` would run."""
    _print_plan(_make_plan(**selection)[0])


@main.command()
@_results
@click.option("--tracking", metavar="URI", help="Read from this MLflow server, not the folder.")
@_config
@click.option("--models", callback=_names, help="Only these: names, families or globs.")
@click.option("--datasets", callback=_names, help="Only these: names or globs.")
@click.option("--metric", "metrics", multiple=True, help="Only this column. Repeatable.")
@click.option("--sort", help="The metric that orders the rows.  [default: the first column]")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["terminal", "github", "latex", "html", "csv", "json"]),
    default="terminal",
    show_default=True,
)
def leaderboard(
    results: Path,
    tracking: str | None,
    config: Path | None,
    models: tuple[str, ...],
    datasets: tuple[str, ...],
    metrics: tuple[str, ...],
    sort: str | None,
    format_: Format,
) -> None:
    """Print a table per dataset of all results."""
    gc.disable()  # it would look at thousands of records over and over, and the process ends soon
    from imlbench.session import results as read_results

    found = read_results(results, tracking=tracking, config=config)
    tables = found.leaderboard(models=models, datasets=datasets, metrics=metrics, sort=sort)
    click.echo(tables.render(format_, width=_width()))


@main.command()
@click.argument("jobs", nargs=-1)
@_results
@click.option("--models", callback=_names, help="All jobs of these: names or globs.")
@click.option("--datasets", callback=_names, help="All jobs on these: names or globs.")
@click.option("--status", callback=_names, help="All jobs that ended like this: failed,diverged")
@click.option("--yes", is_flag=True, help="Do not ask.")
def rm(
    jobs: tuple[str, ...],
    results: Path,
    models: tuple[str, ...],
    datasets: tuple[str, ...],
    status: tuple[str, ...],
    yes: bool,
) -> None:
    """Remove jobs and their MLflow runs.

    JOBS are names of folders in results/runs, or globs.
    """
    from imlbench.records.removal import remove_jobs

    store, tracker = _open(results)
    chosen = _choose(store, jobs, models, datasets, status)
    for record in chosen:
        click.echo(f"{record.id}: {record.status}")
    if chosen and not yes:
        click.confirm(f"Remove {_count(len(chosen), 'job')}?", abort=True)
    removed = remove_jobs(store, [record.id for record in chosen], tracker)
    click.echo(
        f"Removed {_count(len(removed.jobs), 'job')} and {_count(removed.runs, 'MLflow run')}, "
        f"{removed.n_bytes / 1e6:.1f} MB."
    )


@main.command("gc")
@_results
def collect(results: Path) -> None:
    """Remove what no job needs any more.

    These are shared stages, results of older code, and MLflow runs without a job.
    """
    from imlbench.records.removal import collect_garbage

    removed = collect_garbage(*_open(results))
    click.echo(
        f"Removed {_count(removed.stages, 'stage')}, {_count(len(removed.jobs), 'job')} of older "
        f"code and {_count(removed.runs, 'MLflow run')}, {removed.n_bytes / 1e6:.1f} MB."
    )


@main.command()
@click.argument("name", required=False)
def plugins(name: str | None) -> None:
    """List all plugins, or tell all about NAME."""
    registry = _load_registry(quiet=True)
    from imlbench.plan.describe import describe_all, describe_one

    click.echo(describe_one(registry, name) if name else describe_all(registry))


def _load_registry(quiet: bool = False) -> Registry:
    from imlbench.plan.registry import Registry

    registry = Registry()
    if not quiet:
        _warn(f"plugin {p.name} was left out: {p.error}" for p in registry.broken)
    return registry


def _make_plan(**selection: Unpack[Selection]) -> tuple[Plan, Registry]:
    from imlbench.plan.config import make_benchmark

    epochs = selection["epochs"]
    chosen = make_benchmark(
        selection["benchmark"],
        _find_config(selection["config"]),
        models=selection["models"],
        datasets=selection["datasets"],
        metrics=selection["metrics"],
        seeds=selection["seeds"],
        n_samples=selection["n_samples"],
        n_draws=selection["n_draws"],
        settings=(*selection["settings"], *([f"epochs={epochs}"] if epochs else [])),
    )
    from imlbench.plan.planning import make_plan

    registry = _load_registry()
    return make_plan(chosen, registry), registry


def _find_config(config: Path | None) -> Path | None:
    from imlbench.plan.config import find_file

    return find_file(config)


def _open(results: Path) -> tuple[Store, Tracker]:
    from imlbench.records.folder import Store
    from imlbench.records.tracking import Tracker

    store = Store(results)
    store.claim()
    return store, Tracker(store)


def _choose(
    store: Store,
    jobs: tuple[str, ...],
    models: tuple[str, ...],
    datasets: tuple[str, ...],
    status: tuple[str, ...],
) -> list[Record]:
    """Return the records that all of the given options name.

    Raises:
        UserError: None is given, or one names nothing.
    """
    from fnmatch import fnmatchcase

    from imlbench.errors import unknown

    if not (jobs or models or datasets or status):
        raise UserError("rm: jobs must be named, by JOBS, --models, --datasets or --status.")
    records = [record for folder in store if (record := folder.read()) is not None]
    chosen = records
    for what, patterns, values in (
        ("job", jobs, [record.id for record in records]),
        ("model", models, [record.model for record in records]),
        ("dataset", datasets, [record.dataset for record in records]),
        ("status", status, [str(record.status) for record in records]),
    ):
        missing = [p for p in patterns if not any(fnmatchcase(value, p) for value in values)]
        if missing:
            raise UserError(*(f"rm: {unknown(what, p, set(values))}" for p in missing))
        of = {record.id: value for record, value in zip(records, values, strict=True)}
        chosen = [
            record
            for record in chosen
            if not patterns or any(fnmatchcase(of[record.id], p) for p in patterns)
        ]
    return chosen


def _print_plan(plan: Plan) -> None:
    from imlbench.plan.settings import assignments

    for job in plan.jobs:
        text = ", ".join(assignments({**job.dataset_params, **job.model_params}))
        click.echo(f"{job}:")
        click.echo(textwrap.fill(text, 80, initial_indent="    ", subsequent_indent="    "))
    _print_skips(plan.skips)
    click.echo(f"{_count(len(plan.jobs), 'job')}, {_count(len(plan.skips), 'pair')} skipped.")


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' * (n != 1)}"


def _print_skips(skips: Iterable[Skip]) -> None:
    for skip in skips:
        click.echo(f"{'failed' if skip.is_failure else 'skipped'}: {skip}", err=True)


def _width() -> int | None:
    """Return the terminal's width, as found; zero where the output is none."""
    return None if sys.stdout.isatty() else 0


def _warn(messages: Iterable[str]) -> None:
    for message in messages:
        click.secho(f"warning: {message}", err=True, fg="yellow")

"""The command line: parses and prints, nothing else. Imports what a command needs when it runs."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from imlbench.errors import UserError

if TYPE_CHECKING:
    from imlbench.plan import Plan
    from imlbench.registry import Registry
    from imlbench.tracking import Tracker

CONFIG = Path("benchmarks.toml")


class _Group(click.Group):
    """Turns the user's mistakes into messages and exit status 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            for message in error.messages:
                click.secho(f"error: {message}", err=True, fg="red")
            ctx.exit(2)


def _names(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (value or "").split(",") if name.strip())


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
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
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="[PLUGIN.]PARAM=VALUE[,…]",
        help="A parameter of models or datasets; several values make a grid. Repeatable.",
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
@click.option("--dry-run", is_flag=True, help="Print the jobs and stop.")
def run(
    results: Path,
    data_dir: Path | None,
    offline: bool,
    device: str,
    time_limit: float | None,
    force: bool,
    dry_run: bool,
    **selection: Any,
) -> None:
    """Run every chosen model on every chosen dataset, and print the leaderboard.

    Finished jobs are reused; an interrupted run goes on where it stopped. BENCHMARK is a name from
    benchmarks.toml; options add to it and win over it.
    """
    plan, registry = _make_plan(**selection)
    if dry_run:
        _print_plan(plan)
        return
    from imlbench.api import Sources
    from imlbench.plan import identify_data
    from imlbench.progress import make_display
    from imlbench.runner.local import find_devices, run_jobs
    from imlbench.store import Status, Store
    from imlbench.tracking import Tracker

    store = Store(results)
    store.prepare()
    devices = find_devices(device)
    sources = Sources(data_dir, offline)
    plan = identify_data(plan, registry, sources)
    tracker = Tracker(store)
    _print_skips(plan)
    outcomes = []
    try:
        with make_display(len(plan.jobs)) as display:
            for outcome in run_jobs(
                plan.jobs,
                store,
                metrics=plan.metrics,
                sources=sources,
                devices=devices,
                display=display,
                time_limit=time_limit,
                force=force,
            ):
                outcomes.append(outcome)
                if not outcome.reused:
                    tracker.log_pending([store.folder(outcome.job.id)])
    except KeyboardInterrupt:
        tracker.log_pending(store)
        done = sum(outcome.status is Status.DONE for outcome in outcomes)
        _warn([f"interrupted: {done} of {len(plan.jobs)} jobs are done; run again to go on."])
        sys.exit(130)
    tracker.log_pending(store)
    if tracker.problem:
        _warn([tracker.problem])
    failed = [outcome for outcome in outcomes if outcome.status is not Status.DONE]
    jobs = [job.id for job in plan.jobs]
    try:
        _print_leaderboard(tracker, "terminal", selection["config"], jobs=jobs)
    except UserError as error:  # no result, or no tracking server: no mistake in the request
        if not tracker.problem:
            _warn(error.messages)
    if failed:
        _warn([f"{len(failed)} of {len(outcomes)} jobs have no result; see the lines above."])
        sys.exit(1)


@main.command()
@_plan_options
def plan(**selection: Any) -> None:
    """Print the jobs that `run` would run, without running them."""
    _print_plan(_make_plan(**selection)[0])


@main.command()
@_results
@_config
@click.option("--models", callback=_names, help="Only these: names or globs.")
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
def leaderboard(results: Path, config: Path | None, format_: Any, **selection: Any) -> None:
    """Print a table per dataset of everything that was run."""
    from imlbench.store import Store
    from imlbench.tracking import Tracker

    if not results.is_dir():
        raise UserError(
            f"--results: {results} must be a folder with results; there is none. "
            "Run some first, for example: imlbench run --models iml,vae --datasets digits"
        )
    _print_leaderboard(Tracker(Store(results)), format_, config, **selection)


@main.command()
@click.argument("name", required=False)
def plugins(name: str | None) -> None:
    """List models, datasets and metrics, or tell all about NAME."""
    registry = _load_registry(quiet=True)
    from imlbench.describe import describe_all, describe_one

    click.echo(describe_one(registry, name) if name else describe_all(registry))


def _load_registry(quiet: bool = False) -> Registry:
    from imlbench.registry import Registry

    registry = Registry()
    if not quiet:
        _warn(f"plugin {p.name} was left out: {p.error}" for p in registry.broken)
    return registry


def _make_plan(
    benchmark: str | None,
    models: tuple[str, ...],
    datasets: tuple[str, ...],
    metrics: tuple[str, ...],
    seeds: str | None,
    settings: tuple[str, ...],
    epochs: str | None,
    config: Path | None,
) -> tuple[Plan, Registry]:
    from imlbench.config import make_benchmark

    chosen = make_benchmark(
        benchmark,
        _find_config(config),
        models=models,
        datasets=datasets,
        metrics=metrics,
        seeds=seeds,
        settings=(*settings, *([f"epochs={epochs}"] if epochs else [])),
    )
    from imlbench.plan import make_plan

    registry = _load_registry()
    return make_plan(chosen, registry), registry


def _find_config(config: Path | None) -> Path | None:
    return config or (CONFIG if CONFIG.exists() else None)


def _print_plan(plan: Plan) -> None:
    for job in plan.jobs:
        params = {**job.dataset_params, **job.model_params}.items()
        text = ", ".join(f"{name}={value}" for name, value in params if value is not None)
        click.echo(f"{job}:")
        click.echo(textwrap.fill(text, 80, initial_indent="    ", subsequent_indent="    "))
    _print_skips(plan)
    click.echo(f"{_count(len(plan.jobs), 'job')}, {_count(len(plan.skips), 'pair')} skipped.")


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' * (n != 1)}"


def _print_skips(plan: Plan) -> None:
    for skip in plan.skips:
        click.echo(f"skipped: {skip.model} on {skip.dataset}: {skip.reason}", err=True)


def _print_leaderboard(
    tracker: Tracker, format_: Any, config: Path | None, **selection: Any
) -> None:
    from imlbench.config import read_file
    from imlbench.leaderboard import make_tables, render

    path = _find_config(config)
    published = read_file(path).published if path else None
    tables = make_tables(tracker.runs(), published=published, **selection)
    width = None if sys.stdout.isatty() else 0
    click.echo(render(tables, format_, width=width))


def _warn(messages: Any) -> None:
    for message in messages:
        click.secho(f"warning: {message}", err=True, fg="yellow")

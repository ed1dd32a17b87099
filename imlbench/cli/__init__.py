"""The command line: parses and prints, nothing else. Imports what a command needs when it runs."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from imlbench.cli.options import (
    Execution,
    RunOptions,
    Selection,
    config_option,
    make_options,
    names,
    plan_options,
    results_option,
    run_options,
    settings_option,
    split,
)
from imlbench.errors import UserError, brief, plain

if TYPE_CHECKING:
    from typing import Unpack

    from imlbench.plan.jobs import Plan, Skip, Variant
    from imlbench.records.folder import Store
    from imlbench.records.render import Format
    from imlbench.records.tracking import Tracker
    from imlbench.session import Finished, Session


class _Group(click.Group):
    """Turns the user's mistakes into messages and exit status 2."""

    def invoke(self, ctx: click.Context) -> object:
        for unasked in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: jobs are stopped and recorded
            if signal.getsignal(unasked) is not signal.SIG_IGN:  # as nohup asks for
                signal.signal(unasked, signal.default_int_handler)
        _allow_open_files()
        gc.set_threshold(100_000, 50, 1000)  # records are many, and stay
        try:
            return super().invoke(ctx)
        except UserError as error:
            for message in error.messages:
                click.secho(f"error: {plain(message)}", err=True, fg="red")
            ctx.exit(2)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # to ask again changes nothing
            ctx.exit(130)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except BrokenPipeError:  # whoever read the output has closed it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(1)
        except OSError as error:
            what = error.filename or "a file"
            message = (
                f"error: {plain(str(what))}: {error.strerror or error}. Check it, and run again."
            )
            click.secho(message, err=True, fg="red")
            ctx.exit(2)
        except Exception as error:
            _save_traceback(error)
            ctx.exit(3)


def _allow_open_files() -> None:
    """Allow as many open files as the system lets this user have: each job has some, and a lock."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _save_traceback(error: Exception) -> None:
    """Say what nobody has foreseen in a line, and keep the rest in a file."""
    import tempfile
    import traceback

    place = "nowhere, as no file could be written"
    with contextlib.suppress(OSError):
        handle, place = tempfile.mkstemp(prefix="imlbench-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            traceback.print_exception(error, file=file)
    message = (
        f"error: unexpected {brief(error, 300)}. The traceback is in {place}; please report it."
    )
    with contextlib.suppress(OSError):
        click.secho(message, err=True, fg="red")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="imlbench")
def main() -> None:
    """Which generative model fits this data best, and by how much?

    \b
    imlbench run --models iml,vae --datasets digits
    imlbench leaderboard
    """


@main.command()
@plan_options
@results_option
@run_options
@click.option("--force", is_flag=True, help="Run finished jobs again.")
@click.option("--retry-failed", is_flag=True, help="Run again what did not end well.")
@click.option("--dry-run", is_flag=True, help="Print the jobs and stop.")
def run(
    results: Path,
    force: bool,
    retry_failed: bool,
    dry_run: bool,
    **given: Unpack[RunOptions],
) -> None:
    """Run models on datasets, and print the leaderboard.

    Every chosen model is run on every chosen dataset. Finished jobs are reused; an interrupted run
    goes on where it stopped. BENCHMARK is a name from benchmarks.toml; options add to it and win
    over it. With --retry-failed, the jobs of the results folder that did not end well are run
    again, by today's code: all of them, or those of the models and datasets that are named.
    """
    from imlbench.session import Session

    selection, options = split(given, results, force)
    with Session(options) as session:
        if not dry_run:
            session.look()
        plan = (_plan_failed if retry_failed else _make_plan)(session, selection)
        if dry_run:
            _print_plan(plan)
            return
        _print_skips(plan.skips)
        finished = session.execute(plan)
    _report(finished)


@main.command()
@results_option
@click.option("--models", callback=names, help="Only these: names, families or globs.")
@click.option("--datasets", callback=names, help="Only these: names or globs.")
@click.option("--metrics", callback=names, help="Names or globs.  [default: all that apply]")
@settings_option
@run_options
def score(
    results: Path,
    models: tuple[str, ...],
    datasets: tuple[str, ...],
    metrics: tuple[str, ...],
    settings: tuple[str, ...],
    **given: Unpack[Execution],
) -> None:
    """Compute metrics of finished jobs, from their checkpoints and samples.

    Nothing is fitted again, whatever has become of the models' code.
    """
    from imlbench.plan.config import make_benchmark
    from imlbench.records.selection import choose
    from imlbench.session import Session

    chosen = make_benchmark(
        None, None, models=["*"], datasets=["*"], metrics=metrics, settings=settings
    )
    with Session(make_options(given, results)) as session:
        session.store.claim()
        records = choose("score", session.store, (), models, datasets, ())
        fitted = [record for record in records if record.fit is not None and record.draws]
        if not fitted:
            raise UserError("score: there must be a job that was fitted; none is. Run some first.")
        plan = session.plan_again(chosen, fitted, as_fitted=True)
        _print_skips(plan.skips)
        finished = session.execute(plan, is_fitted=True)
    _report(finished)


@main.command()
@results_option
def status(results: Path) -> None:
    """Tell what is done, running, failed and waiting."""
    from imlbench.records.status import describe

    click.echo(describe(_open_store(results)))


@main.command()
@plan_options
def plan(**selection: Unpack[Selection]) -> None:
    """Print what `run` would run."""
    from imlbench.session import Options, Session

    with Session(Options()) as session:
        _print_plan(_make_plan(session, selection))


@main.command()
@results_option
@click.option("--tracking", metavar="URI", help="Read from this MLflow server, not the folder.")
@config_option
@click.option("--models", callback=names, help="Only these: names, families or globs.")
@click.option("--datasets", callback=names, help="Only these: names or globs.")
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
    from imlbench.reading import results as read_results

    found = read_results(results, tracking=tracking, config=config)
    _warn(
        f"job {name}: its record.json is damaged; run it again to have it computed anew"
        for name in found.damaged
    )
    tables = found.leaderboard(models=models, datasets=datasets, metrics=metrics, sort=sort)
    click.echo(tables.render(format_, width=_width()))


@main.command()
@click.argument("jobs", nargs=-1)
@results_option
@click.option("--models", callback=names, help="All jobs of these: names or globs.")
@click.option("--datasets", callback=names, help="All jobs on these: names or globs.")
@click.option("--status", callback=names, help="All jobs that ended like this: failed,diverged")
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
    from imlbench.records.selection import choose

    store, tracker = _open(results)
    if not (jobs or models or datasets or status):
        raise UserError("rm: jobs must be named, by JOBS, --models, --datasets or --status.")
    chosen = choose("rm", store, jobs, models, datasets, status)
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
@results_option
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
    from imlbench.session import describe_plugins

    click.echo(describe_plugins(name or ""))


def _make_plan(session: Session, selection: Selection) -> Plan:
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
    plan = session.plan(chosen)
    _warn_broken(session)
    return plan


def _plan_failed(session: Session, selection: Selection) -> Plan:
    """Plan what has failed: of the selection, or of the whole results folder."""
    from imlbench.plan.config import make_benchmark
    from imlbench.records.record import Status
    from imlbench.records.selection import choose

    session.store.claim()
    patterns = selection["models"] or ("*",), selection["datasets"] or ("*",)
    chosen = make_benchmark(
        None,
        None,
        models=["*"],
        datasets=["*"],
        metrics=selection["metrics"],
        n_samples=selection["n_samples"],
        n_draws=selection["n_draws"],
        settings=selection["settings"],
    )
    records = choose("run --retry-failed", session.store, (), *patterns, ())
    failed = [record for record in records if record.status is not Status.DONE]
    if not failed:
        raise UserError("run --retry-failed: there must be a job that failed; all are done.")
    plan = session.plan_again(chosen, failed, as_fitted=False)
    _warn_broken(session)
    return plan


def _warn_broken(session: Session) -> None:
    _warn(f"plugin {name} was left out: {error}" for name, error in session.broken.items())


def _report(finished: Finished) -> None:
    """Print the leaderboard of a run and what else there is to say, and end with its status."""
    n_jobs, n_done = len(finished.plan.jobs), finished.n_done
    _warn(finished.problems)
    if finished.was_interrupted:
        _warn([f"interrupted: {n_done} of {n_jobs} jobs are done; run again to go on."])
        sys.exit(130)
    computed = {score.label for record in finished.results for score in record.scores}
    asked = [task.label for task in finished.plan.metrics if task.label in computed]
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
    if n_done < n_jobs or any(skip.is_failure for skip in finished.plan.skips):
        sys.exit(1)


def _find_config(config: Path | None) -> Path | None:
    from imlbench.plan.config import find_file

    return find_file(config)


def _open_store(results: Path) -> Store:
    from imlbench.records.folder import Store

    store = Store(results)
    store.claim()
    return store


def _open(results: Path) -> tuple[Store, Tracker]:
    from imlbench.records.tracking import Tracker

    store = _open_store(results)
    return store, Tracker(store)


def _print_plan(plan: Plan) -> None:
    """Print the jobs by model and dataset: what they have in common once, then what varies."""
    from itertools import groupby

    from imlbench.plan.settings import assignments, ranges

    def pair(variant: Variant) -> tuple[str, str]:
        return variant.job.model, variant.job.dataset

    for (model, dataset), group in groupby(plan.variants, key=pair):
        variants = list(group)
        n_jobs = sum(len(variant.seeds) for variant in variants)
        first = variants[0].job
        params = {**first.dataset_params, **first.model_params}
        common = assignments({n: v for n, v in params.items() if n not in first.varying})
        click.echo(f"{model} on {dataset}: {_count(n_jobs, 'job')}")
        text = ", ".join(common)
        click.echo(textwrap.fill(text, 80, initial_indent="    ", subsequent_indent="    "))
        for variant in variants[:_MOST_LINES] if n_jobs > 1 else ():
            seeds = f"seed{'s' * (len(variant.seeds) > 1)} {ranges(variant.seeds)}"
            varying = ", ".join([*assignments(variant.job.varying), seeds])
            click.echo(f"  - {varying}")
        if len(variants) > _MOST_LINES:
            click.echo(f"  … and {len(variants) - _MOST_LINES} more such combinations")
    _print_skips(plan.skips)
    click.echo(f"{_count(len(plan), 'job')}, {_count(len(plan.skips), 'pair')} skipped.")


_MOST_LINES = 20


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

"""What the commands' options are, and what they say."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, cast

import click

from imlbench.errors import UserError

if TYPE_CHECKING:
    from imlbench.session import Executor, Options

_Command = TypeVar("_Command", bound=Callable[..., object])


class _Seconds(click.FloatRange):
    """A number of seconds, which NaN is not."""

    name = "seconds"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        seconds = float(super().convert(value, param, ctx))
        if not math.isfinite(seconds):
            self.fail(f"{value!r} is not a number of seconds.", param, ctx)
        return seconds


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


class Execution(TypedDict):
    """What the options say of how and where jobs are run."""

    data_dir: Path | None
    offline: bool
    device: str
    workers: int | None
    executor: Executor
    ray_address: str | None
    slurm: tuple[str, ...]
    time_limit: float | None
    checkpoint_every: float
    log_tensors: bool


class RunOptions(Selection, Execution):
    """All options of ``run``."""


def names(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Return names that are separated by commas."""
    return tuple(name.strip() for name in (value or "").split(",") if name.strip())


def _all_of(*options: Callable[[_Command], _Command]) -> Callable[[_Command], _Command]:
    def decorate(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


config_option = click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="The file of named benchmarks.  [default: benchmarks.toml, if there]",
)
results_option = click.option(
    "--results",
    type=click.Path(path_type=Path),
    default=Path("results"),
    show_default=True,
    help="Folder for everything that is written.",
)
settings_option = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="[PLUGIN.]PARAM=VALUE[,…]",
    help="A parameter of any plugin; several values make a grid. Repeatable.",
)
run_options = _all_of(
    click.option("--data-dir", type=click.Path(path_type=Path), help="Look for data here first."),
    click.option("--offline", is_flag=True, help="Never touch the network."),
    click.option(
        "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:0, cuda:0,cuda:1"
    ),
    click.option(
        "--workers",
        type=click.IntRange(1, 10_000),
        help="Jobs at a time, spread over the devices.  [default: one for each device]",
    ),
    click.option(
        "--executor",
        type=click.Choice(["local", "ray", "slurm"]),
        default="local",
        show_default=True,
        help="Where jobs are run; see docs/clusters.md.",
    ),
    click.option("--ray-address", metavar="ADDRESS", help="Join this Ray cluster."),
    click.option(
        "--slurm", multiple=True, metavar="KEY=VALUE", help="What to ask Slurm for. Repeatable."
    ),
    click.option(
        "--time-limit",
        type=_Seconds(min=0, min_open=True),
        help="Seconds allowed per job; time for which it is suspended counts a tenth.",
    ),
    click.option(
        "--checkpoint-every",
        type=_Seconds(min=0),
        default=60.0,
        show_default=True,
        help="Seconds between two checkpoints within a fit.",
    ),
    click.option("--log-tensors", is_flag=True, help="Log checkpoints and samples to MLflow, too."),
)
plan_options = _all_of(
    click.argument("benchmark", required=False),
    click.option("--models", callback=names, help="Names, families or globs: iml,vae,reference-*"),
    click.option("--datasets", callback=names, help="Names or globs: digits,mnist"),
    click.option("--metrics", callback=names, help="Names or globs.  [default: all that apply]"),
    click.option("--seeds", help="One job each: 0..2 or 0,1,2.  [default: 0]"),
    click.option("--n-samples", type=int, help="Samples per draw.  [default: 1000]"),
    click.option("--n-draws", type=int, help="Independent draws.  [default: 5]"),
    settings_option,
    click.option("--epochs", help="Short for --set epochs=…"),
    config_option,
)


def split(given: RunOptions, results: Path, force: bool) -> tuple[Selection, Options]:
    """Return what to run, and how."""
    names = Selection.__annotations__
    selection = {name: value for name, value in given.items() if name in names}
    execution = {name: value for name, value in given.items() if name not in names}
    options = make_options(cast("Execution", execution), results, force, given["config"])
    return cast("Selection", selection), options


def make_options(
    given: Execution, results: Path, force: bool = False, config: Path | None = None
) -> Options:
    """Return how and where to run.

    Raises:
        UserError: What Slurm is asked for is no assignment.
    """
    from imlbench.session import Options

    slurm = dict(pair.partition("=")[::2] for pair in given["slurm"])
    if "" in slurm.values() or "" in slurm:
        raise UserError("--slurm: must be KEY=VALUE, such as timeout_min=60. See docs/clusters.md.")
    execution: dict[str, Any] = {**given, "slurm": slurm}
    return Options(path=results, config=config, force=force, **execution)

"""The command line: ``python -m speed.gpu [PIECE ...]``."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click
import torch

from imlbench.errors import UserError, brief, unknown
from imlbench.files import write_text
from imlbench.runner.local import choose_devices
from speed.gpu.pieces import PIECES, Piece
from speed.gpu.setup import Setup, facts

UNFINISHED = "**Not finished**: "


class TimeIsUp(Exception):
    """What a piece may take is over."""


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Interrupt what the block does after so many seconds, as Ctrl-C would.

    Raises:
        TimeIsUp: It was interrupted.
    """
    rang = False

    def ring(*_: object) -> None:
        nonlocal rang
        rang = True
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except KeyboardInterrupt:
        if not rang:
            raise
        raise TimeIsUp from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def is_finished(table: Path) -> bool:
    """Whether a table is there, and complete."""
    return table.exists() and UNFINISHED not in table.read_text(encoding="utf-8")


def carry_out(piece: Piece, setup: Setup, seconds: float) -> bool:
    """Do a piece, or what is left of it, and write its table; return whether all is done."""
    table = setup.table(piece.table)
    if is_finished(table):
        click.echo(f"{piece.name}: done; remove {table} to have it done again")
        return True
    click.echo(f"{piece.name}: {piece.about}")
    try:
        with limit(seconds):
            problems = piece.do(setup)
    except TimeIsUp:
        problems = ["its time was over. The same command goes on."]
    except UserError as error:  # missing data
        problems = list(error.messages)
    except Exception as error:  # one piece must not cost the others
        traceback.print_exc()
        problems = [brief(error)]
    for problem in problems:
        click.echo(f"error: {piece.name}: {problem}", err=True)
    try:
        shown = piece.show(setup)
    except (UserError, OSError) as error:  # there is nothing yet
        click.echo(f"error: {piece.name}: there is nothing to show: {brief(error)}", err=True)
        return False
    unfinished = [UNFINISHED + "; ".join(problems)] if problems else []
    parts = [f"# {piece.name}", piece.about, *unfinished, facts(setup.device), shown]
    write_text(table, "\n\n".join(parts) + "\n")
    click.echo(f"{piece.name}: {'not finished' if problems else 'done'}; see {table}")
    return not problems


def select(names: Sequence[str]) -> list[Piece]:
    """Return the pieces of these names, or all, in order.

    Raises:
        UserError: A name is unknown.
    """
    wrong = [name for name in names if name not in PIECES]
    if wrong:
        raise UserError(*(unknown("piece", name, PIECES) for name in wrong))
    return [piece for name, piece in PIECES.items() if not names or name in names]


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=f"Pieces: {', '.join(PIECES)}.",
)
@click.argument("names", nargs=-1, metavar="[PIECE]...")
@click.option("--device", default="cuda", show_default=True, help="cuda, cuda:1, or cpu to try it.")
@click.option("--minutes", type=click.FloatRange(min=0.01), default=9, show_default=True)
@click.option("--quick", is_flag=True, help="Only try it, small, and write to results/gpu-quick.")
def main(names: tuple[str, ...], device: str, minutes: float, quick: bool) -> None:
    """Do on a CUDA device what can be done nowhere else, and write tables of it.

    Every piece is stopped after so many MINUTES; the same command goes on. What has a table is not
    done again. Exit status: 0, all is done; 1, something is left or has failed; 2, a mistake in the
    request.
    """
    try:
        pieces = select(names)
        chosen = choose_devices(device, torch.cuda.device_count())
    except UserError as error:
        for message in error.messages:
            click.echo(f"error: {message}", err=True)
        sys.exit(2)
    setup = Setup(torch.device(chosen[0]), quick)
    outcomes = [carry_out(piece, setup, 60 * minutes) for piece in pieces]
    sys.exit(0 if all(outcomes) else 1)

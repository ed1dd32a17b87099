"""The command line: ``python -m tests.campaign [--only CLASS] [--report FILE]``."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import click

from tests.campaign import report
from tests.campaign.faults import (
    data,
    disk,
    files,
    plugins,
    requests,
    signals,
    together,
    tracking,
)
from tests.campaign.trials import Engine, Lab

CLASSES = (
    signals.CLASS,
    files.CLASS,
    disk.CLASS,
    together.CLASS,
    plugins.CLASS,
    tracking.CLASS,
    requests.CLASS,
    data.CLASS,
)


@click.command()
@click.option(
    "--only",
    multiple=True,
    type=click.Choice([c.name for c in CLASSES]),
    help="Only this class. Repeatable.",
)
@click.option("--like", default="", help="Only faults with this in their name.")
@click.option("--seed", default=0, show_default=True, help="What chance follows from.")
@click.option(
    "--scale",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Below 1, a random part of all trials; above, more moments and sizes.",
)
@click.option(
    "--report",
    "page",
    type=click.Path(path_type=Path),
    help="Write this page, and the counts as JSON beside it.",
)
@click.option("--keep", is_flag=True, help="Keep the folders of all trials.")
@click.option("--list", "list_", is_flag=True, help="Count the faults and stop.")
def main(
    only: tuple[str, ...],
    like: str,
    seed: int,
    scale: float,
    page: Path | None,
    keep: bool,
    list_: bool,
) -> None:
    """Try faults, print what came of each class, and exit with 1 if one was not survived.

    Classes that are left out keep the counts that they have in the report.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what it has started ends with it
    kept = page.with_suffix(".json") if page else None
    rows = json.loads(kept.read_text(encoding="utf-8")) if kept and kept.exists() else {}
    folder = Path(tempfile.mkdtemp(prefix="campaign-"))
    lab = Lab(folder, seed, scale)
    engine = Engine(lab, keep=keep, like=like, tell=_tell)
    n_bad = 0
    try:
        for fault_class in CLASSES:
            if only and fault_class.name not in only:
                continue
            if list_:
                chosen = engine.choose(fault_class.name, fault_class.trials(lab))
                click.echo(f"{fault_class.name}: {sum(len(t.faults) for t in chosen)} faults")
                continue
            tally = engine.run(fault_class.name, fault_class.trials(lab))
            row = report.make_row(tally, seed, scale)
            counts = ", ".join(f"{kind} {n}" for kind, n in row["kinds"].items())
            click.echo(
                f"{fault_class.name}: tried {tally.n_tried}, survived {tally.n_survived}, {counts}"
                f"; skipped {len(tally.skipped)}, {tally.seconds:.0f} s"
            )
            for fault, trace in tally.broken.items():
                click.echo(f"the campaign could not try {fault}:\n{trace}", err=True)
            n_bad += len(tally.problems) + len(tally.broken)
            rows[fault_class.name] = row
            if page and kept:
                kept.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
                page.write_text(report.markdown(rows, CLASSES), encoding="utf-8")
    finally:
        lab.at_end.close()
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    sys.exit(1 if n_bad else 0)


def _tell(line: str) -> None:
    """Print a line, without anything that a terminal could take for a command."""
    click.echo(ascii(line)[1:-1][:400])


if __name__ == "__main__":
    main()

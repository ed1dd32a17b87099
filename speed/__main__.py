"""The command line: ``python -m speed [CASE ...]``."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
import traceback
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import click

from imlbench.errors import UserError, unknown
from imlbench.files import write_atomically, write_text
from speed import hmm, jobs, kde, likelihood, mixture, report, reuse, training, whole
from speed.case import Case, Record
from speed.runner import measure_apart

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        mixture.CASE,
        hmm.CASE,
        kde.CASE,
        kde.MEMORY_CASE,
        likelihood.CASE,
        training.CASE,
        whole.CASE,
        jobs.CASE,
        jobs.WORKERS_CASE,
        reuse.CASE,
        reuse.RERUN_CASE,
    )
}
FOLDER = Path(__file__).parent


def select(names: Sequence[str]) -> list[Case]:
    """Return the cases of these names or globs, or all.

    Raises:
        UserError: A name is unknown, or a case needs packages that are not installed.
    """
    found = {name: [case for case in CASES if fnmatchcase(case, name)] for name in names}
    wrong = [name for name, cases in found.items() if not cases]
    if wrong:
        raise UserError(*(unknown("case", name, CASES) for name in wrong))
    wanted = set(itertools.chain(*found.values())) if names else CASES.keys()
    chosen = [case for name, case in CASES.items() if name in wanted]
    needs = {need for case in chosen for need in case.needs}
    missing = sorted(need for need in needs if importlib.util.find_spec(need) is None)
    if missing:
        raise UserError(f"{', '.join(missing)} not installed: pip install 'imlbench[speed]'")
    return chosen


def save(new: Record) -> None:
    """Put a record in the place of the case's last one, and write RESULTS.md of all of them."""
    path = FOLDER / "results.json"
    records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    records[new["case"]] = new
    write_text(path, json.dumps(records, indent=2) + "\n")
    content = report.markdown([records[name] for name in CASES if name in records])
    write_atomically(FOLDER / "RESULTS.md", lambda path: path.write_text(content, encoding="utf-8"))


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=f"Cases: {', '.join(CASES)}. Globs such as 'runner-*' name several; nothing, all.",
)
@click.argument("names", nargs=-1, metavar="[CASE]...")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
def main(names: tuple[str, ...], threads: int) -> None:
    """Measure imlbench, mostly beside other libraries, and write speed/RESULTS.md.

    Exit status: 0, measured, whether targets were met or missed; 1, results disagree or a case
    failed; 2, a mistake in the request.
    """
    try:
        chosen = select(names)
    except UserError as error:
        for message in error.messages:
            click.echo(f"error: {message}", err=True)
        sys.exit(2)
    outcomes = [_run(case, threads) for case in chosen]  # all of them, whatever fails
    sys.exit(0 if all(outcomes) else 1)


def _run(case: Case, threads: int) -> bool:
    """Measure a case, show and save it; return whether it ran and its results agree."""
    click.echo(f"{case.name}: measuring", err=True)
    try:
        found = measure_apart(case, threads)
    except UserError as error:  # missing data
        click.echo(f"error: {case.name}: {error}", err=True)
        return False
    except Exception:  # one case must not cost the others
        click.echo(f"error: {case.name} failed\n{traceback.format_exc()}", err=True)
        return False
    save(found)
    click.echo(report.text(found) + "\n")
    return report.agrees(found)


if __name__ == "__main__":
    main()

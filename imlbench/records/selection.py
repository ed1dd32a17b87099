"""Which jobs of a results folder are meant."""

from __future__ import annotations

from fnmatch import fnmatchcase

from imlbench.errors import UserError, unknown
from imlbench.records.folder import Store
from imlbench.records.record import Record


def choose(
    command: str,
    store: Store,
    jobs: tuple[str, ...],
    models: tuple[str, ...],
    datasets: tuple[str, ...],
    status: tuple[str, ...],
) -> list[Record]:
    """Return the records that all of the given options name.

    Raises:
        UserError: One names nothing.
    """
    records = [record for folder in store if (record := folder.read()) is not None]
    chosen = records
    for what, patterns, names in (
        ("job", jobs, {record.id: {record.id} for record in records}),
        ("model", models, {record.id: {record.model, record.family} for record in records}),
        ("dataset", datasets, {record.id: {record.dataset} for record in records}),
        ("status", status, {record.id: {str(record.status)} for record in records}),
    ):
        known = set().union(*names.values()) - {""}
        missing = [p for p in patterns if not any(fnmatchcase(name, p) for name in known)]
        if missing:
            raise UserError(*(f"{command}: {unknown(what, p, known)}" for p in missing))
        chosen = [
            record
            for record in chosen
            if not patterns or any(fnmatchcase(n, p) for n in names[record.id] for p in patterns)
        ]
    return chosen

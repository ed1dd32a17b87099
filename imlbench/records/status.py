"""What ``imlbench status`` prints: done, running, failed and waiting."""

from __future__ import annotations

import time
from collections import Counter

from imlbench.errors import plain
from imlbench.records.folder import Store
from imlbench.records.journal import Session, read_last
from imlbench.records.record import Record, Status

_MOST_LINES = 20


def describe(store: Store) -> str:
    """Return what there is to say of the run that goes on, or else of all jobs of a folder."""
    session = read_last(store)
    records = {
        folder.path.name: record for folder in store if (record := folder.read()) is not None
    }
    if session is None:
        return "\n".join(_of_folder(records))
    wanted = {
        name: record
        if (record := records.get(name)) and record.confirmed >= int(session.begun.started)
        else None
        for name in session.begun.jobs
    }
    return "\n".join([*_of_session(session, wanted), *_of_failures(wanted, session)])


def _of_folder(records: dict[str, Record]) -> list[str]:
    counts = Counter(str(record.status or "not finished") for record in records.values())
    told = ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
    return [f"No run is remembered. {len(records)} jobs{': ' if told else ''}{told}."]


def _of_session(session: Session, records: dict[str, Record | None]) -> list[str]:
    begun, now = session.begun, session.now
    running = now.running if now is not None and session.is_alive else {}
    statuses = Counter(
        str(record.status)
        for name, record in records.items()
        if name not in running and record is not None and record.status is not None
    )
    n_waiting = len(records) - statuses.total() - len(running)
    counts = [f"{n} {status}" for status, n in sorted(statuses.items())]
    counts += [f"{len(running)} running", f"{n_waiting} waiting"]
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(begun.started))
    state = "runs" if session.is_alive else "has ended"
    lines = [
        f"The run of {started} (process {begun.pid} on {begun.host}) {state}.",
        f"{len(records)} jobs: {', '.join(counts)}.",
    ]
    if session.is_alive and now is not None and now.seconds_left is not None:
        minutes, seconds = divmod(round(now.seconds_left), 60)
        lines.append(f"About {minutes}:{seconds:02} left.")
    return lines + [
        f"running: {begun.jobs.get(name, name)}: {what}" for name, what in running.items()
    ]


def _of_failures(records: dict[str, Record | None], session: Session) -> list[str]:
    failed = [
        f"{record.status}: {session.begun.jobs[name]}: {plain(record.reason, 200)}"
        for name, record in records.items()
        if record is not None and record.status not in (None, Status.DONE)
    ]
    more = len(failed) - _MOST_LINES
    return failed[:_MOST_LINES] + ([f"… and {more} more"] if more > 0 else [])

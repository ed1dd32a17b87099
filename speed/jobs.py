"""What the runner adds to the jobs themselves: one after another, and several at a time."""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from imlbench.records.folder import Store
from imlbench.records.record import Record
from speed.case import Case, Claim, Failed, Finding, Measured, Note, Seconds, Spread
from speed.command import Ran, imlbench, in_temporary_folder, options
from speed.measure import interleaved, ratio, spread

N_WARM = 3
"""Jobs at the start of a run that do not count: they import what the others find imported."""
PHASES = ("until its folder is opened", "data, fit, samples", "metrics, figures", "until its end")

PER_JOB, PER_JOB_ALL, PARENT = "per job", "per job, all metrics", "the parent's processor time"
TWO, RAY = "two workers / one", "two workers: Ray / local"

CLAIMS = (
    Claim(
        PER_JOB,
        0.4,
        "a fork of a warm process, data from the system's cache, and the figure of the plane, "
        "which takes most of it",
        at_most=0.5,
        unit="s",
    ),
    Claim(
        PER_JOB_ALL,
        0.6,
        "5,000 samples instead of 500, and densities of 5,000 test examples",
        unit="s",
    ),
    Claim(
        PARENT,
        4.0,
        "it waits for pipes; its imports take half a second of half a minute",
        at_most=5.0,
        unit="%",
    ),
)
WORKERS_CLAIMS = (
    Claim(TWO, 0.55, "half, and what is done once before and after the jobs", at_most=0.6),
    Claim(
        RAY,
        1.4,
        "starting Ray takes 5 s, and each of its workers imports torch for itself",
        at_most=1 / 0.85,
    ),
)


def seconds_per_job(records: Sequence[Record]) -> list[float]:
    """Return the seconds from the end of each job to that of the next.

    Arguments:
        records: Of jobs that have ended, one after another, in this order.
    """
    return [_ended(after) - _ended(before) for before, after in pairwise(records)]


def phases(records: Sequence[Record]) -> dict[str, list[float]]:
    """Return what these seconds went into, by the times at which files were written.

    Arguments:
        records: Of jobs that have ended, one after another, in this order, with samples.
    """
    found: dict[str, list[float]] = {name: [] for name in PHASES}
    for before, record in pairwise(records):
        drawn = max(drawn.file.mtime_ns for drawn in record.draws.values())
        shown = [file.mtime_ns for item in record.artifacts for file in item.files.values()]
        written = max([drawn, *shown])
        times = (_ended(before), record.started, drawn / 1e9, written / 1e9, _ended(record))
        for name, (start, end) in zip(PHASES, pairwise(times), strict=True):
            found[name].append(end - start)
    return found


def _ended(record: Record) -> float:
    assert record.ended is not None
    return record.ended


@in_temporary_folder
def run(folder: Path, n_jobs: int = 30) -> Iterator[Finding]:
    """Run jobs that fit nothing, with little and with much to compute of each."""
    toy = {"models": "reference-train", "datasets": "toy-2d", "seeds": f"0..{n_jobs - 1}"}
    less = {"metrics": "modes_covered", "n_samples": 100}
    ran = {}
    for claim, chosen in ((PER_JOB, toy | less), (PER_JOB_ALL, toy)):
        store = Store(folder / claim)
        ran[claim] = imlbench(folder, "run", *options(results=store.root, workers=1, **chosen))
        records = sorted(store.records(), key=_ended)[N_WARM - 1 :]
        yield Measured(claim, spread(seconds_per_job(records)))
        yield Seconds(f"{claim}: the whole command", Spread.single(ran[claim].seconds))
        for name, found in phases(records).items():
            yield Seconds(f"{claim}: {name}", spread(found))
    yield Measured(PARENT, Spread.single(_share(ran[PER_JOB])))
    yield Note(f"{PARENT}, with all metrics: {_share(ran[PER_JOB_ALL]):.1f} %.")


def _share(ran: Ran) -> float:
    return 100 * ran.own_seconds / ran.seconds


CASE = Case(
    "runner-jobs",
    "Time from the end of one job to the end of the next",
    "30 jobs of reference-train on toy-2d by one worker, whose fit takes no time: with "
    "modes_covered of 100 samples, five times, and nothing else; then with everything as it is by "
    f"default. Both draw the figure of the plane. The first {N_WARM} jobs do not count. The "
    "parent is the command's own process, from its start to its end, in units of wall time; jobs "
    "and the logging to MLflow have processes of their own.",
    CLAIMS,
    run,
)


@in_temporary_folder
def run_workers(
    folder: Path, n_jobs: int = 8, epochs: int = 120, repetitions: int = 2
) -> Iterator[Finding]:
    """Run equal jobs by one worker, by two, and by two of Ray."""
    jobs = {"models": "vae", "datasets": "digits", "seeds": f"0..{n_jobs - 1}"}
    jobs |= {"set": f"vae.epochs={epochs}", "metrics": "kde", "n_samples": "100"}
    ways = {
        "one worker": ("local", 1),
        "two workers": ("local", 2),
        "two workers of Ray": ("ray", 2),
    }
    if importlib.util.find_spec("ray") is None:
        del ways["two workers of Ray"]
        yield Failed(RAY, "ray is not installed: pip install 'imlbench[ray]'")
    spans: dict[str, list[float]] = {way: [] for way in ways}

    def timer(way: str) -> float:
        executor, workers = ways[way]
        with tempfile.TemporaryDirectory(dir=folder) as results:
            chosen = options(results=results, executor=executor, workers=workers, **jobs)
            seconds = imlbench(folder, "run", *chosen).seconds
            spans[way].append(_span(Store(Path(results)).records()))
        return seconds

    timers = {way: functools.partial(timer, way) for way in ways}
    times = interleaved(timers, repetitions, warm_up=False)
    yield Measured(TWO, ratio(times["two workers"], times["one worker"]))
    if "two workers of Ray" in times:
        yield Measured(RAY, ratio(times["two workers of Ray"], times["two workers"]))
    for way in ways:
        yield Seconds(f"{way}: the whole command", spread(times[way]))
        yield Seconds(f"{way}: from the first job's start to the last's end", spread(spans[way]))


def _span(records: Sequence[Record]) -> float:
    return max(map(_ended, records)) - min(record.started for record in records)


WORKERS_CASE = Case(
    "runner-workers",
    "Ratios of the times of whole commands",
    "Eight jobs of vae on digits, 120 epochs each, with one thread each: by one worker, by two, "
    "and by two of a Ray cluster that the command starts on this machine and ends. What a command "
    "does once, before and after the jobs, counts: shorter jobs have worse ratios.",
    WORKERS_CLAIMS,
    run_workers,
)

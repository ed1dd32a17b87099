"""The oracle: what a results folder and a command must be like after a fault. All of it is here.

A fault is *survived* if none of these is seen:

- *lost*: a job is not done, or its scores are not exactly those of an undisturbed run, or MLflow
  lacks it, after at most two plain reruns of the same command; or these do not exit with 0.
- *duplicated*: a job is twice in the folder, or has two active runs in MLflow.
- *hidden*: a damaged result that is neither mended nor told; an exit status or a message that
  is wrong; a command that does not end; a process that outlives its command.
- *traceback*: a command prints one.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tests.campaign.process import PATIENCE, Answer, Place

RERUNS = 2
EXPERIMENT = "imlbench"

ScoreKey = tuple[str, str]
Scores = dict[ScoreKey, tuple[float, float | None, int]]
"""Value, standard error and number of examples, by the metric's label and the draw."""


class Kind(StrEnum):
    """The ways in which a fault is not survived."""

    LOST = "lost"
    DUPLICATED = "duplicated"
    HIDDEN = "hidden"
    TRACEBACK = "traceback"


@dataclass(frozen=True)
class Problem:
    """Something that must not be.

    Arguments:
        kind: Of which kind.
        what: What was seen, on one line.
        job: The job that it concerns; empty if it is not a single one.
    """

    kind: Kind
    what: str
    job: str = ""


@dataclass(frozen=True)
class Truth:
    """What an undisturbed run leaves behind.

    Arguments:
        arguments: The command.
        jobs: Every job's scores, by the name of its folder.
        results: The folder itself, never to be changed.
        seconds: How long the command took.
    """

    arguments: tuple[str, ...]
    jobs: dict[str, Scores]
    results: Path
    seconds: float


def read_records(results: Path) -> dict[str, dict[str, object]]:
    """Return the records in a results folder that can be read, by the names of their folders."""
    found = {}
    for path in sorted(results.glob("runs/*/record.json")):
        with contextlib.suppress(OSError, ValueError):
            found[path.parent.name] = json.loads(path.read_bytes())
    return found


def scores_of(record: Mapping[str, object]) -> Scores:
    """Return the scores in a record."""
    scores = record.get("scores")
    assert isinstance(scores, list)
    return {
        (score["label"], score["draw"]): (score["value"], score["stderr"], score["n_examples"])
        for score in scores
    }


def read_truth(answer: Answer, results: Path) -> Truth:
    """Return what a run has left behind that nothing has disturbed.

    Raises:
        RuntimeError: Something has: then nothing can be said of any fault.
    """
    records = read_records(results)
    truth = Truth(
        answer.arguments,
        {job: scores_of(record) for job, record in records.items()},
        results,
        answer.seconds,
    )
    problems = [*judge_answer(answer, {0}), *judge_folder(results, truth)]
    if problems or not truth.jobs:
        raise RuntimeError(f"an undisturbed run must have no problems; got {problems}\n{answer}")
    return truth


def judge_answer(answer: Answer, codes: Collection[int]) -> Iterator[Problem]:
    """Yield what is wrong with how a command ended.

    Arguments:
        answer: How it ended.
        codes: The exit statuses that are right.
    """
    command = " ".join(answer.arguments)[:60]
    if answer.code is None:
        yield Problem(Kind.HIDDEN, f"{command}: hangs after {answer.seconds:.0f} s")
    elif answer.code not in codes:
        last = (answer.err.strip().splitlines() or [""])[-1][:200]
        yield Problem(Kind.HIDDEN, f"{command}: exit status {answer.code}; {last}")
    if "Traceback (most recent call last)" in answer.text:
        last = next(
            (line for line in reversed(answer.err.splitlines()) if "Error" in line), "traceback"
        )
        yield Problem(Kind.TRACEBACK, f"{command}: {last[:200]}")
    if answer.left and answer.code is not None:
        yield Problem(Kind.HIDDEN, f"{command}: leaves {len(answer.left)}: {answer.left[0][:100]}")


def judge_folder(results: Path, truth: Truth, *, database: Path | None = None) -> list[Problem]:
    """Return what is wrong with a results folder and with MLflow's database.

    Arguments:
        results: The folder.
        truth: What an undisturbed run leaves behind.
        database: MLflow's; by default the one in the folder.
    """
    problems = [*_judge_jobs(read_records(results), truth)]
    if database is None:
        database = results / "mlflow.db"
    return [*problems, *judge_tracking(database, truth.jobs)]


def _judge_jobs(records: Mapping[str, Mapping[str, object]], truth: Truth) -> Iterator[Problem]:
    for job, scores in truth.jobs.items():
        record = records.get(job)
        if record is None:
            yield Problem(Kind.LOST, f"{job} has no record", job)
        elif record["status"] != "done":
            yield Problem(Kind.LOST, f"{job} is {record['status']}: {record['reason']}", job)
        elif (found := scores_of(record)) != scores:
            yield Problem(Kind.LOST, f"{job}: {_difference(found, scores)}", job)
    identities = Counter(_identity(record) for record in records.values())
    for identity, n in identities.items():
        if n > 1:
            yield Problem(Kind.DUPLICATED, f"{n} folders of {identity[:100]}")


def _difference(found: Scores, wanted: Scores) -> str:
    for key in {**wanted, **found}:
        if found.get(key) != wanted.get(key):
            return f"{key[0]} must be {wanted.get(key)}; got {found.get(key)}"
    raise AssertionError("they are equal")


def _identity(record: Mapping[str, object]) -> str:
    keys = ("model", "dataset", "seed", "model_params", "dataset_params", "fingerprint")
    return json.dumps([record.get(key) for key in keys], sort_keys=True)


def judge_tracking(
    database: Path, jobs: Collection[str], experiment: str = EXPERIMENT
) -> Iterator[Problem]:
    """Yield the jobs of which MLflow has not exactly one active run."""
    try:
        n_runs = Counter(_active_runs(database, experiment))
    except sqlite3.Error as error:
        yield Problem(Kind.LOST, f"{database.name}: {error}")
        return
    for job in jobs:
        if n_runs[job] == 0:
            yield Problem(Kind.LOST, f"{job} is not in MLflow", job)
        elif n_runs[job] > 1:
            yield Problem(Kind.DUPLICATED, f"{job} has {n_runs[job]} runs in MLflow", job)


def _active_runs(database: Path, experiment: str) -> list[str]:
    with contextlib.closing(
        sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30)
    ) as connection:
        rows = connection.execute(
            "SELECT tags.value FROM tags JOIN runs USING (run_uuid) "
            "JOIN experiments USING (experiment_id) WHERE tags.key = 'imlbench.job' "
            "AND runs.lifecycle_stage = 'active' AND experiments.lifecycle_stage = 'active' "
            "AND experiments.name = ?",
            (experiment,),
        )
        return [str(job) for (job,) in rows]


def rerun(
    place: Place,
    truth: Truth,
    *,
    environment: Mapping[str, str] | None = None,
    database: Path | None = None,
    is_told: bool = False,
) -> tuple[list[Problem], list[Answer]]:
    """Run the truth's command again, at most twice, until the folder is as it should be.

    Arguments:
        place: Where.
        truth: What it must come to.
        environment: What is added to the command's environment.
        database: MLflow's; by default the one in the folder.
        is_told: A database that a warning names is not lost.

    Returns:
        What is wrong in the end, and the answers.
    """
    answers: list[Answer] = []
    problems: list[Problem] = []
    for _ in range(RERUNS):
        answers.append(place.imlbench(*truth.arguments, environment=environment))
        problems = [*judge_answer(answers[-1], {0})]
        found = judge_folder(place.results, truth, database=database)
        if is_told and warns(answers, "MLflow"):
            found = [problem for problem in found if "MLflow" not in problem.what]
        problems += found
        if not problems or answers[-1].code is None:
            break
    return problems, answers


def warns(answers: Sequence[Answer], *names: str) -> bool:
    """Whether a line of warning or error names one of these things."""
    return any(
        name in line
        for answer in answers
        for line in answer.err.splitlines()
        for name in names
        if name
    )


def judge_mistake(
    answer: Answer, place: Place, before: Collection[Path], expected: str = ""
) -> Iterator[Problem]:
    """Yield what is wrong with the answer to a mistake in the request.

    It must be exit status 2 and a message, quick, in little memory, without control characters,
    and nothing may have been written.

    Arguments:
        answer: The answer.
        place: Where.
        before: The files that there were before.
        expected: What the message must hold.
    """
    yield from judge_answer(answer, {2})
    command = " ".join(answer.arguments)[:60]
    messages = [line for line in answer.err.splitlines() if line.lower().startswith("error: ")]
    if answer.code == 2 and not messages:
        yield Problem(Kind.HIDDEN, f"{command}: no message; got {answer.err[:100]!r}")
    if answer.code == 2 and expected not in answer.text:
        yield Problem(Kind.HIDDEN, f"{command}: no {expected!r} in {answer.err[-300:]!r}")
    odd = {c for c in answer.text if not c.isprintable() and c not in "\n\t"}
    if odd:
        yield Problem(Kind.HIDDEN, f"{command}: prints control characters {sorted(odd)!r}")
    if len(answer.text) > 20_000:
        yield Problem(Kind.HIDDEN, f"{command}: prints {len(answer.text)} characters")
    if answer.seconds > PATIENCE / 5 or answer.peak_bytes > 2e9:
        size = f"{answer.seconds:.0f} s, {answer.peak_bytes / 1e6:.0f} MB"
        yield Problem(Kind.HIDDEN, f"{command}: takes {size}")
    new = {path for path in files_in(place.work) if path not in before}
    if new:
        yield Problem(Kind.HIDDEN, f"{command}: wrote {sorted(new)[0].relative_to(place.work)}")


def files_in(folder: Path) -> set[Path]:
    """Return everything in a folder, folders too."""
    return set(folder.rglob("*"))

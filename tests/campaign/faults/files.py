"""Every file of a results folder, damaged in eight ways; the files are found by listing."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.campaign.faults import FaultClass
from tests.campaign.oracle import Kind, Problem, Truth, read_records, rerun, warns
from tests.campaign.process import Answer, Place
from tests.campaign.trials import SMALL, TOY, Lab, Trial

N_SEEDS = 6
"""Jobs of each model, so that as many files of it can be damaged at once."""

_MANY = (
    *("run", "--models", "reference-train,vae,iml-gaussian", "--datasets", "toy-2d", *TOY, *SMALL),
    *("--seeds", f"0..{N_SEEDS - 1}", "--metrics"),
)
FINISHED = (*_MANY, "kde,reconstruction_error,modes_covered")
BEGUN = (*_MANY, "kde,modes_covered")

_SHARED = (
    *("run", "--datasets", "digits", "--set", "epochs=1", "--set", "hidden_dim=16"),
    *("--set", "latent_dim=4", "--n-samples", "50", "--n-draws", "2"),
)
SHARING = (
    *(*_SHARED, "--metrics", "kde,reconstruction_error"),
    *("--models", "iml-gaussian,iml-gmm,reference-train"),
)
SHARING_BEGUN = (*_SHARED, "--metrics", "kde", "--models", "iml-gaussian,reference-train")

EXACT = (".safetensors", ".png", "curves.json")
"""Ends of the names of files that come out the same whenever they are made."""


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _zero(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))


def _flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))


def _rot(path: Path) -> None:
    """Flip a byte as a disk does, which leaves the time of modification as it is."""
    before = path.stat()
    _flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _garbage(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate()
        file.write(b"<!doctype html>\xff\xfe\x00 not what you want\n" * 20)


def _turn_into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").write_text("something\n")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": _truncate,
    "emptied": lambda path: os.truncate(path, 0),
    "zeroed": _zero,
    "flipped": _flip,
    "rotted": _rot,
    "garbage": _garbage,
    "deleted": Path.unlink,
    "a folder": _turn_into_folder,
}
OF_NOTHING = ("garbage", "deleted", "a folder")
"""The damages that can be done to an empty file."""


@dataclass(frozen=True)
class Damage:
    """A file and what is done to it.

    Arguments:
        file: Its path in the results folder.
        how: A key of ``DAMAGES``.
        job: The job that it belongs to; empty if it is shared.
    """

    file: str
    how: str
    job: str

    @property
    def group(self) -> str:
        """What it may disturb: two of one group are never damaged at once."""
        return self.job or self.file.partition("/")[0]


def trials(lab: Lab) -> Iterator[Trial]:
    """Yield trials on finished and on half-finished folders: jobs' own files, and shared ones."""
    finished, begun = lab.truth(FINISHED), lab.truth(BEGUN)
    sharing, sharing_begun = lab.truth(SHARING), lab.truth(SHARING_BEGUN)
    for start, end, is_shared in (
        (finished, finished, False),
        (begun, finished, False),
        (sharing, sharing, True),
        (sharing_begun, sharing, True),
    ):
        yield from trials_on(lab, start, end, is_shared=is_shared)


def trials_on(lab: Lab, start: Truth, end: Truth, *, is_shared: bool) -> Iterator[Trial]:
    """Yield trials on one folder.

    Arguments:
        lab: What trials share.
        start: The folder that is damaged.
        end: What the command that is run then must come to.
        is_shared: Damage the files that jobs share, not their own.
    """
    form = "finished" if start is end else "half-finished"
    for damages in _packed(_damages(start.results, is_shared)):
        yield _trial(lab, form, start, end, damages)


def _damages(results: Path, is_shared: bool) -> list[Damage]:
    """Return what can be done: to files of jobs, each kind of file of each model once; or shared.

    A kind of file is damaged in the folders of different jobs of the same model.
    """
    jobs = _jobs_of_files(results)
    turn: dict[str, int] = defaultdict(int)
    by_kind: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for file, job in sorted(jobs.items()):
        if is_shared == (job == ""):
            owner = job.rpartition("-")[0]
            kind = file.replace(job, "*") if file.startswith("runs/") else _kind(file, job)
            by_kind[owner, kind].append((file, job))
    found = []
    for (owner, _), files in by_kind.items():
        for how in DAMAGES:
            for file, job in files if is_shared else [files[turn[owner] % len(files)]]:
                if (results / file).stat().st_size or how in OF_NOTHING:
                    found.append(Damage(file, how, job))
            turn[owner] += 1
    return found


def _kind(file: str, job: str) -> str:
    """Return what is the same in the paths of two jobs' logged files."""
    return "mlartifacts/*/" + file.split("/", 2)[-1] if job else file


def _jobs_of_files(results: Path) -> dict[str, str]:
    """Return the job of every file; empty for shared ones."""
    logged = _logged_jobs(results / "mlflow.db")
    found = {}
    for path in results.rglob("*"):
        if path.is_file():
            parts = path.relative_to(results).parts
            job = parts[1] if parts[0] == "runs" else ""
            if parts[0] == "mlartifacts":
                job = logged.get(parts[1], "")
            found["/".join(parts)] = job
    return found


def _logged_jobs(database: Path) -> dict[str, str]:
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        query = "SELECT run_uuid, value FROM tags WHERE key = 'imlbench.job'"
        return dict(connection.execute(query).fetchall())


def _packed(damages: Sequence[Damage]) -> Iterator[tuple[Damage, ...]]:
    """Yield the damages in few tuples, none of which has two that may disturb each other."""
    rest = list(damages)
    while rest:
        chosen: dict[str, Damage] = {}
        for damage in rest:
            chosen.setdefault(damage.group, damage)
        yield tuple(chosen.values())
        rest = [damage for damage in rest if damage not in chosen.values()]


def _trial(lab: Lab, form: str, start: Truth, end: Truth, damages: tuple[Damage, ...]) -> Trial:
    def name(damage: Damage) -> str:
        return f"{form}: {damage.file} {damage.how}"

    alone = [_trial(lab, form, start, end, (d,)) for d in damages] if len(damages) > 1 else []
    run = partial(_run, lab, start, end, {name(damage): damage for damage in damages})
    return Trial(tuple(map(name, damages)), run, tuple(alone))


def _run(
    lab: Lab, start: Truth, end: Truth, damages: dict[str, Damage], place: Place
) -> dict[str, list[Problem]]:
    lab.copy(start, place)
    for damage in damages.values():
        DAMAGES[damage.how](place.results / damage.file)
    problems, answers = rerun(place, end, is_told=True)
    by_job = {damage.job: name for name, damage in damages.items() if damage.job}
    found: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        found[by_job.get(problem.job, "")].append(problem)
    for name, damage in damages.items():
        is_used = damage.job or start is not end
        hidden = _is_hidden(damage, place.results, end, answers) if is_used else None
        found[name] += [hidden] if hidden else []
    return found


def _is_hidden(
    damage: Damage, results: Path, end: Truth, answers: Sequence[Answer]
) -> Problem | None:
    """Return what is wrong if a damaged file is neither as it was nor named in a warning.

    What a disk changes without a trace may stay until somebody reads it, but for records, which are
    read at every run. A log cannot be mended.
    """
    if damage.file.startswith("mlartifacts/") and damage.file.endswith("record.json"):
        return _is_hidden_in_mlflow(damage, results)
    file = damage.file
    if file.startswith("mlartifacts/"):  # links to the files of the job
        file = f"runs/{damage.job}/{file.split('/', 3)[-1]}"
    path, original = results / file, end.results / file
    if damage.how == "rotted" or not file.endswith(EXACT) or not original.exists():
        return None
    if path.is_file() and path.read_bytes() == original.read_bytes():
        return None
    if warns(answers, damage.job, file):
        return None
    return Problem(Kind.HIDDEN, f"{file} stays damaged, and nothing says so", damage.job)


def _is_hidden_in_mlflow(damage: Damage, results: Path) -> Problem | None:
    """Return what is wrong if the record that MLflow shows is not the job's."""
    record = read_records(results).get(damage.job)
    for run, job in _logged_jobs(results / "mlflow.db").items():
        path = results / "mlartifacts" / run / "artifacts/record.json"
        if job == damage.job and path.is_file():
            shown = _read(path)
            if shown is not None and record is not None and shown["scores"] == record["scores"]:
                return None
    return Problem(Kind.HIDDEN, f"{damage.file} stays damaged", damage.job)


def _read(path: Path) -> dict[str, object] | None:
    import json

    with contextlib.suppress(OSError, ValueError):
        found: dict[str, object] = json.loads(path.read_bytes())
        return found
    return None


CLASS = FaultClass(
    "files",
    "Every kind of file of a finished and of a half-finished results folder (records, checkpoints, "
    "samples, scores, figures, logs, locks, stages, the metrics' cache, MLflow's database and "
    "files) is truncated, emptied, zeroed, has a byte flipped, the same without a new time of "
    "modification, is overwritten by garbage, deleted, or replaced by a folder. Files of different "
    "jobs are damaged at once.",
    "the same command brings all jobs to the scores of an undisturbed run, and a damaged file is "
    "as it was, or a warning names it or its job.",
    trials,
)

"""The campaign's oracle sees what it must see; a part of the campaign itself."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.campaign import __main__ as command
from tests.campaign import process, report
from tests.campaign.faults import files, requests
from tests.campaign.oracle import (
    Kind,
    Problem,
    Truth,
    files_in,
    judge_answer,
    judge_folder,
    judge_mistake,
    rerun,
)
from tests.campaign.process import Place, on_processors
from tests.campaign.trials import TOY, Engine, Lab, Tally

JOBS = ("toy-2d-vae-1", "toy-2d-vae-2")
COMMAND = ("run", "--models", "vae")


def write_record(results: Path, job: str, value: float = 1.5, status: str = "done") -> None:
    score = {"label": "kde", "draw": "2x50", "value": value, "stderr": 0.5, "n_examples": 60}
    record = {
        "model": "vae",
        "dataset": "toy-2d",
        "seed": JOBS.index(job) if job in JOBS else 0,
        "status": status,
        "reason": "",
        "scores": [score],
    }
    folder = results / "runs" / job
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "record.json").write_text(json.dumps(record))


def log_run(results: Path, job: str, run: str, stage: str = "active") -> None:
    with sqlite3.connect(results / "mlflow.db") as connection:
        connection.execute("INSERT INTO runs VALUES (?, ?, 1)", (run, stage))
        connection.execute("INSERT INTO tags VALUES ('imlbench.job', ?, ?)", (job, run))
    connection.close()


@pytest.fixture
def results(tmp_path) -> Path:
    """A folder as an undisturbed run leaves it, as far as the oracle looks at it."""
    folder = tmp_path / "results"
    folder.mkdir()
    with sqlite3.connect(folder / "mlflow.db") as connection:
        connection.executescript(
            "CREATE TABLE experiments (experiment_id INTEGER, name TEXT, lifecycle_stage TEXT);"
            "CREATE TABLE runs (run_uuid TEXT, lifecycle_stage TEXT, experiment_id INTEGER);"
            "CREATE TABLE tags (key TEXT, value TEXT, run_uuid TEXT);"
            "INSERT INTO experiments VALUES (1, 'imlbench', 'active');"
        )
    connection.close()
    for job in JOBS:
        write_record(folder, job)
        log_run(folder, job, f"run of {job}")
    return folder


@pytest.fixture
def truth(results) -> Truth:
    scores = {("kde", "2x50"): (1.5, 0.5, 60)}
    return Truth(COMMAND, dict.fromkeys(JOBS, scores), results, 1.0)


def edit(results: Path, change: Callable[[dict], object]) -> None:
    path = results / "runs" / JOBS[0] / "record.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def say(results: Path, statement: str) -> None:
    with sqlite3.connect(results / "mlflow.db") as connection:
        connection.execute(statement)
    connection.close()


def test_an_undisturbed_folder_has_no_problem(results, truth):
    assert judge_folder(results, truth) == []


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (lambda r: edit(r, lambda record: record["scores"].clear()), Kind.LOST),
        (lambda r: edit(r, lambda record: record["scores"][0].update(value=1.5000001)), Kind.LOST),
        (lambda r: edit(r, lambda record: record["scores"][0].update(stderr=None)), Kind.LOST),
        (lambda r: edit(r, lambda record: record.update(status="failed")), Kind.LOST),
        (lambda r: edit(r, lambda record: record.update(status=None)), Kind.LOST),
        (lambda r: (r / "runs" / JOBS[0] / "record.json").write_text("{"), Kind.LOST),
        (lambda r: shutil.rmtree(r / "runs" / JOBS[1]), Kind.LOST),
        (lambda r: write_record(r, "toy-2d-vae-3"), Kind.DUPLICATED),
        (lambda r: log_run(r, JOBS[0], "another"), Kind.DUPLICATED),
        (lambda r: say(r, "UPDATE runs SET lifecycle_stage = 'deleted'"), Kind.LOST),
        (lambda r: say(r, "UPDATE experiments SET name = 'mine'"), Kind.LOST),
        (lambda r: say(r, "DELETE FROM tags"), Kind.LOST),
        (lambda r: (r / "mlflow.db").write_bytes(b"garbage"), Kind.LOST),
        (lambda r: (r / "mlflow.db").unlink(), Kind.LOST),
    ],
)
def test_what_is_wrong_in_a_folder_is_seen(results, truth, spoil, kind):
    spoil(results)
    assert {problem.kind for problem in judge_folder(results, truth)} == {kind}


def test_a_run_that_was_deleted_by_hand_beside_the_active_one_is_no_second_one(results, truth):
    log_run(results, JOBS[0], "older", stage="deleted")
    assert judge_folder(results, truth) == []


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path / "place")


def pretend(place: Place, source: str) -> None:
    """Put another program in the place of imlbench."""
    package = place.site / "imlbench"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(source)


@pytest.mark.parametrize(
    ("source", "kinds"),
    [
        ("", set()),
        ("raise SystemExit(1)", {Kind.HIDDEN}),
        ("import os; os.kill(os.getpid(), 9)", {Kind.HIDDEN}),
        ("1 / 0", {Kind.HIDDEN, Kind.TRACEBACK}),
        ("import traceback\ntry: 1 / 0\nexcept ValueError: pass", {Kind.HIDDEN, Kind.TRACEBACK}),
        ("import subprocess; subprocess.Popen(['sleep', '1000'])", {Kind.HIDDEN}),
        (
            "import subprocess; subprocess.Popen(['sleep', '1000'], start_new_session=True)",
            {Kind.HIDDEN},
        ),
        ("import time; time.sleep(1000)", {Kind.HIDDEN}),
    ],
)
def test_what_is_wrong_with_how_a_command_ends_is_seen(place, monkeypatch, source, kinds):
    monkeypatch.setattr(process, "GONE_AFTER", 0.2)
    pretend(place, source)
    running = place.start(*COMMAND)
    answer = running.wait(timeout=3)
    assert {problem.kind for problem in judge_answer(answer, {0})} == kinds
    assert process.marked(running.mark) == []


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import sys; print('error: no', file=sys.stderr); sys.exit(2)", None),
        ("import sys; print('error: no', file=sys.stderr); sys.exit(1)", "exit status 1"),
        ("import sys; sys.exit(2)", "no message"),
        ("import sys; print('error: \\x1b[2J', file=sys.stderr); sys.exit(2)", "control"),
        ("import sys; open('x', 'w'); print('error: no', file=sys.stderr); sys.exit(2)", "wrote x"),
    ],
)
def test_what_is_wrong_with_the_answer_to_a_mistake_is_seen(place, source, what):
    pretend(place, source)
    before = files_in(place.work)
    problems = list(judge_mistake(place.imlbench(*COMMAND), place, before))
    assert [what in problem.what for problem in problems] == ([True] if what else [])


def test_reruns_end_when_all_is_well_and_after_two(place, results, truth):
    pretend(place, "open('runs', 'a').write('x')")
    shutil.copytree(results, place.results)
    assert rerun(place, truth)[0] == []
    assert (place.work / "runs").read_text() == "x"
    shutil.rmtree(place.results / "runs")
    assert {problem.kind for problem in rerun(place, truth)[0]} == {Kind.LOST}
    assert (place.work / "runs").read_text() == "xxx"


def test_the_page_counts_every_fault_once_in_each_column():
    tally = Tally(n_tried=5)
    tally.problems = {
        "a": [("lost", "x"), ("lost", "y"), ("hidden", "z")],
        "b": [("traceback", "`code` | <tag>\n")],
    }
    rows = {"files": report.make_row(tally, seed=0, scale=1.0)}
    page = report.markdown(rows, command.CLASSES)
    assert "| files | 5 | 3 | 1 | 0 | 1 | 1 |" in page
    assert "| **all** | **5** | **3** | **1** | **0** | **1** | **1** |" in page
    assert "'code' ¦ ‹tag>" in page
    assert json.loads(json.dumps(rows))["files"]["survived"] == 3


def test_every_fault_has_a_name_of_its_own(tmp_path):
    assert len({c.name for c in command.CLASSES}) == len(command.CLASSES) == 8
    lab = Lab(tmp_path)
    for fault_class in command.CLASSES:
        if fault_class is not files.CLASS:  # its faults are found in a real folder
            names = [name for trial in fault_class.trials(lab) for name in trial.faults]
            assert len(names) == len(set(names)), fault_class.name
    assert len(list(requests.CLASS.trials(lab))) >= 200


def carry_out(tmp_path: Path, trials) -> Tally:
    return Engine(Lab(tmp_path)).run("some", trials)


def test_a_problem_of_no_single_fault_is_looked_for_in_each_alone(tmp_path):
    from tests.campaign.trials import Trial, single

    problem = Problem(Kind.LOST, "something")
    alone = (single("a", lambda place: []), single("b", lambda place: [problem]))
    tally = carry_out(tmp_path, [Trial(("a", "b"), lambda place: {"": [problem]}, alone)])
    assert (tally.n_tried, set(tally.problems)) == (2, {"b"})


def test_a_trial_that_cannot_be_carried_out_is_no_fault_survived(tmp_path):
    from tests.campaign.trials import single

    tally = carry_out(tmp_path, [single("a", lambda place: 1 / 0)])  # type: ignore[arg-type]
    assert (tally.n_tried, set(tally.broken)) == (0, {"a"})


QUICK = (
    *("run", "--models", "reference-train", "--datasets", "toy-2d", *TOY, "--metrics", "kde"),
    *("--seeds", "0..9"),
)


def test_thirty_faults_are_survived(tmp_path):
    lab = Lab(tmp_path)
    with on_processors({min(os.sched_getaffinity(0))}):  # as the trials are
        truth = lab.truth(QUICK)
    damaged = list(files.trials_on(lab, truth, truth, is_shared=False))[:3]
    asked = [t for t in requests.CLASS.trials(lab) if "benchmarks.toml: deep" in t.faults[0]]
    tally = Engine(lab).run("quick", [*damaged, *asked])
    assert (tally.problems, tally.broken) == ({}, {})
    assert tally.n_tried >= 30


@pytest.mark.slow
@pytest.mark.parametrize("fault_class", command.CLASSES, ids=lambda found: found.name)
def test_a_part_of_every_class_is_survived(tmp_path, fault_class):
    lab = Lab(tmp_path, scale=0.03)
    with lab.at_end:
        tally = Engine(lab).run(fault_class.name, fault_class.trials(lab))
    assert (tally.problems, tally.broken) == ({}, {})
    assert tally.n_tried > 0

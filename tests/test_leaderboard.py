"""Tables: the aggregation against pandas by hand, and every format read back by something else."""

from __future__ import annotations

import io
import json
import statistics
import subprocess
import sys
from xml.etree import ElementTree

import pandas as pd
import pytest

from imlbench import UserError
from imlbench.files import File
from imlbench.records.folder import JobFolder, Store
from imlbench.records.record import Drawn, Environment, Fit, Record, Scored, Status
from imlbench.records.render import render
from imlbench.records.tables import Cell, Table, entries, make_tables

KDE = {"vae": [100.0, 101.0, 105.0], "iml-gmm": [180.0, 190.0, 191.0]}
ENVIRONMENT = Environment(
    imlbench="0.1.0",
    git_commit="",
    python="3.11",
    torch="2.4",
    device="cpu",
    machine="Linux",
    n_threads=2,
    user="somebody",
)

FILE = File(sha256="", size=0, mtime_ns=0)


def scored(label: str, value: float, **more) -> Scored:
    given = {
        "metric": label,
        "label": label,
        "params": {},
        "key": label,
        "draw": "5x1000",
        "value": value,
        "stderr": None,
        "n_examples": 0,
        "n_groups": 0,
        "settings": {},
        "unit": "",
        "higher_is_better": False,
        "value_range": (None, None),
        "position": 100,
    }
    return Scored(**{**given, **more})


def run(model: str, seed: int, kde: float, error: float, latent_dim: int = 20, **more) -> Record:
    kde_paper = scored(
        "kde_paper",
        kde,
        stderr=0.5,
        unit="nats",
        higher_is_better=True,
        settings={"h": 0.2, "M": 1000},
        position=0,
    )
    fit = Fit(
        seconds=10.0 + seed,
        seconds_reused=0.0,
        peak_memory_bytes=2**20,
        n_parameters=7,
        n_train=100,
        used={},
        stages=(),
        environment=ENVIRONMENT,
        checkpoint=FILE,
        curves=FILE,
    )
    given = {
        "id": f"{model}-{seed}-{latent_dim}",
        "model": model,
        "family": model.partition("-")[0],
        "dataset": "mnist",
        "seed": seed,
        "model_params": {"latent_dim": latent_dim},
        "dataset_params": {},
        "changed": {},
        "kind": "image",
        "event_shape": (1, 28, 28),
        "fingerprint": "abc123",
        "fit_key": f"{model}-{seed}-{latent_dim}",
        "code": "aaa",
        "shipped_by": ("imlbench 0.1.0", "imlbench 0.1.0"),
        "status": Status.DONE,
        "started": 1000.0,
        "ended": 1010.0,
        "confirmed": 1010.0,
        "fit": fit,
        "draws": {"5x1000": Drawn(key="drawn", code="", file=FILE)},
        "scores": (kde_paper, scored("error", error, position=20)),
    }
    return Record(**{**given, **more})


def changed(record: Record, **values: float) -> Record:
    """The record with other values of metrics."""
    for label, value in values.items():
        score = record.score(label, "5x1000").model_copy(update={"value": value})
        record = record.with_score(score)
    return record


def tables_of(records: list[Record], **selection) -> list[Table]:
    return make_tables(entries(records), **selection)


@pytest.fixture
def runs() -> list[Record]:
    found = [run("vae", seed, kde, 20.0) for seed, kde in enumerate(KDE["vae"])]
    found += [run("iml-gmm", seed, kde, 10.0 + seed) for seed, kde in enumerate(KDE["iml-gmm"])]
    return found


def test_a_table_says_what_was_trained_in_bfloat16(runs):
    first, *others = runs
    assert not any("bfloat16" in note for note in tables_of(runs)[0].notes)
    fit = first.fit.model_copy(update={"used": {"precision": "bfloat16"}})
    (table,) = tables_of([first.model_copy(update={"fit": fit}), *others])
    assert table.notes[-1].endswith(" Trained in bfloat16: vae.")


def test_rows_are_means_and_standard_deviations_over_seeds(runs):
    (table,) = tables_of(runs)
    assert [row.model for row in table.rows] == ["iml-gmm", "vae"]
    for row in table.rows:
        assert row.n == 3
        assert row.cells["kde_paper"].mean == pytest.approx(statistics.mean(KDE[row.model]))
        assert row.cells["kde_paper"].spread == pytest.approx(statistics.stdev(KDE[row.model]))
        assert row.fit_seconds == pytest.approx(11.0)


def test_settings_are_told_once_and_real_ones_by_their_range(runs):
    settings = [{"h": h, "M": 1000} for h in (0.2, 0.25, 0.3, 0.2, 0.2)]
    settings.append({"h": 0.2, "M": 500, "kernel": "{0}"})
    found = []
    for record, given in zip(runs, settings, strict=True):
        score = record.score("kde_paper", "5x1000").model_copy(update={"settings": given})
        found.append(record.with_score(score))
    (table,) = tables_of(found)
    assert table.notes[:2] == [
        "kde_paper of iml-gmm, vae: h = 0.2 to 0.3, M = 1000.",
        "kde_paper of iml-gmm: h = 0.2, M = 500, kernel = {0}.",
    ]


def test_one_seed_shows_the_standard_error_over_examples_and_never_as_spread(runs):
    (table,) = tables_of([record for record in runs if record.seed == 0])
    cell = table.rows[0].cells["kde_paper"]
    assert (cell.spread, cell.stderr) == (None, 0.5)
    text = render([table], "github")
    assert "180.00 (0.50)" in text
    assert "(…) is the standard error over test examples" in text


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (Cell(190.234, spread=0.4321), "190.23 ±0.43"),
        (Cell(-8318.4, spread=123.4), "-8318 ±123"),
        (Cell(10.62, stderr=0.051), "10.620 (0.051)"),
        (Cell(3.14159265), "3.1416"),
        (Cell(3.0, spread=0.0), "3 ±0"),
    ],
)
def test_uncertainty_decides_the_decimals(cell, text):
    assert str(cell) == text


def test_the_best_of_each_column_follows_its_direction(runs):
    (table,) = tables_of(runs)
    lines = render([table], "github").splitlines()
    row = next(line for line in lines if line.startswith("| iml-gmm"))
    assert row.count("**") == 4  # highest kde_paper and lowest error
    assert next(line for line in lines if line.startswith("| vae")).count("**") == 0


def test_sort_follows_the_direction_of_the_metric(runs):
    found = [changed(record, error=1.0) if record.model == "vae" else record for record in runs]
    (table,) = tables_of(found, sort="error")
    assert [row.model for row in table.rows] == ["vae", "iml-gmm"]


def test_parameters_that_differ_become_columns(runs):
    (table,) = tables_of([*runs, run("vae", 0, 90.0, 30.0, latent_dim=40)])
    assert table.varying_params() == ["latent_dim"]
    assert [(row.model, row.params["latent_dim"], row.n) for row in table.rows] == [
        ("iml-gmm", "20", 3),
        ("vae", "20", 3),
        ("vae", "40", 1),
    ]


def test_other_data_under_the_same_name_get_a_table_of_their_own(runs):
    other = run("vae", 0, 90.0, 30.0, fingerprint="def456", id="other")
    tables = tables_of([*runs, other])
    assert [len(table.rows) for table in tables] == [2, 1]
    assert "abc123" in tables[0].dataset
    assert "def456" in tables[1].dataset


def test_jobs_without_result_are_named_and_not_ranked(runs):
    ended = {"status": Status.DIVERGED, "reason": "gan, epoch 3: loss", "scores": (), "draws": {}}
    (table,) = tables_of([*runs, run("gan", 0, 0.0, 0.0, **ended)])
    assert "gan" not in [row.model for row in table.rows]
    assert "No result: gan, seed 0: diverged (gan, epoch 3: loss)." in render([table], "github")


def test_a_job_with_scores_is_ranked_although_one_metric_failed(runs):
    ended = {"status": Status.FAILED, "reason": "metric x failed"}
    found = [r.model_copy(update=ended) if r.model == "vae" else r for r in runs]
    (table,) = tables_of(found)
    assert [row.model for row in table.rows] == ["iml-gmm", "vae"]
    assert "Not complete: vae, seed 0: failed (metric x failed)." in render([table], "github")


def test_older_code_is_not_averaged_with_newer(runs):
    older = run("vae", 0, 50.0, 30.0, code="bbb", confirmed=900.0, id="older")
    (table,) = tables_of([older, *runs])
    assert [(row.model, row.n) for row in table.rows] == [("iml-gmm", 3), ("vae", 3)]
    assert table.rows[1].cells["kde_paper"].mean == pytest.approx(102.0)


def test_a_metric_of_one_dataset_can_be_asked_for_beside_others(runs):
    toy = run("vae", 0, 1.0, 2.0, dataset="toy", id="toy").with_score(scored("modes", 2.0))
    (table,) = tables_of([*runs, toy], metrics=["modes"])
    assert table.dataset == "toy"


def test_published_values_stand_beside_ours_and_are_never_the_best(runs):
    published = {"mnist": {"kde_paper": {"IML (paper)": 999.0}}}
    (table,) = tables_of(runs, published=published)
    assert [row.model for row in table.rows] == ["IML (paper)", "iml-gmm", "vae"]
    text = render([table], "github")
    assert "**187.0 ±6.1**" in text
    assert "Rows without n are published values" in text


def test_csv_and_json_carry_the_numbers_unrounded(runs):
    tables = tables_of(runs)
    frame = pd.read_csv(io.StringIO(render(tables, "csv")))
    assert frame["kde_paper"].tolist() == pytest.approx([187.0, 102.0])
    assert frame["kde_paper.std_over_seeds"][1] == pytest.approx(statistics.stdev(KDE["vae"]))
    records = json.loads(render(tables, "json"))
    assert [record["model"] for record in records] == ["iml-gmm", "vae"]


def test_html_and_latex_are_what_they_say(runs):
    tables = tables_of(runs)
    page = ElementTree.fromstring(f"<html>{render(tables, 'html')}</html>")
    rows = [["".join(cell.itertext()).strip() for cell in row] for row in page.iter("tr")]
    assert [row[0] for row in rows] == ["model", "iml-gmm", "vae"]
    assert [bold.text for bold in page.iter("b")] == ["187.0 ±6.1", "11.0 ±1.0"]
    latex = render(tables, "latex")
    assert r"kde\_paper $\uparrow$" in latex
    assert r"\textbf{187.0 $\pm$6.1}" in latex


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_terminal_table_fits_the_terminal(runs, width):
    found = []
    for record in runs:
        for index in range(8):
            record = record.with_score(scored(f"long_metric_name_{index}", 123.456))
        found.append(record)
    text = render(tables_of(found), "terminal", width=width)
    table = text.split("±  is")[0].split("± is")[0].replace("\033[1m", "").replace("\033[0m", "")
    assert max(len(line) for line in table.splitlines()) <= width
    assert ("Not shown for lack of width" in text) == (width < 200)


def test_bad_requests_are_one_message(runs):
    with pytest.raises(UserError, match="got none"):
        tables_of([])
    with pytest.raises(UserError, match=r"unknown metric 'kde_papr'\. Did you mean"):
        tables_of(runs, metrics=["kde_papr"])
    with pytest.raises(UserError, match="unknown metric 'kdf'"):
        tables_of(runs, sort="kdf")
    with pytest.raises(UserError, match="unknown model 'vea'"):
        tables_of(runs, models=["vea"])


def test_a_record_that_is_there_twice_counts_once(runs):
    assert tables_of([*runs, *runs]) == tables_of(runs)


def test_columns_come_in_the_order_that_metrics_ask_for_whatever_their_names(runs):
    found = [record.with_score(scored("a_metric_of_a_third_party", 1.0)) for record in runs]
    (table,) = tables_of(list(reversed(found)))
    assert [column.name for column in table.columns] == [
        "kde_paper",
        "error",
        "a_metric_of_a_third_party",
    ]


def test_two_ways_of_drawing_samples_are_two_rows(runs):
    more = scored("kde_paper", 7.0, draw="3x500", key="more", position=0, higher_is_better=True)
    found = [
        record.model_copy(
            update={"draws": {**record.draws, "3x500": Drawn(key="more", code="", file=FILE)}}
        ).with_score(more)
        for record in runs
    ]
    (table,) = tables_of(found)
    assert len(table.rows) == 4
    assert table.varying_params() == ["n_draws", "n_samples"]
    assert [row.cells["kde_paper"].mean for row in table.rows[2:]] == [7.0, 7.0]


def test_latex_escapes_what_has_a_meaning(runs):
    (table,) = tables_of(runs, published={"mnist": {"kde_paper": {"A & B_1 {50 %} #$~^": 1.0}}})
    latex = render([table], "latex")
    escaped = r"A \& B\_1 \{50 \%\} \#\$\textasciitilde{}\textasciicircum{}"
    assert escaped in latex


N_RUNS = 10_000

READ = """
import sys, time
from pathlib import Path
from imlbench.cli import main
start = time.process_time()
try:
    main(["leaderboard", "--results", sys.argv[1], "--format", "csv"])
finally:
    seconds = time.process_time() - start
    status = Path("/proc/self/status").read_text()  # ru_maxrss would include the parent's peak
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    print(f"{seconds} {peak}", file=sys.stderr)
"""


def made(number: int) -> Record:
    """A record with as many parameters and scores as a real one has."""
    record = run(
        f"model-{number % 20}",
        number // 1000,
        float(number),
        1.0,
        latent_dim=number // 20 % 50,
        id=f"mnist-model-{number}",
    )
    for index in range(10):
        record = record.with_score(scored(f"metric_{index}", float(index), stderr=0.1))
    return record


@pytest.mark.slow
def test_a_leaderboard_of_ten_thousand_runs(tmp_path):
    """5 s and 500 MB; processor time, as others may be at work on the machine."""
    store = Store(tmp_path / "results")
    store.prepare()
    for number in range(N_RUNS):
        JobFolder(store.runs / f"mnist-model-{number}").write(made(number))
    answer = subprocess.run(
        [sys.executable, "-c", READ, store.root], capture_output=True, text=True, check=True
    )
    seconds, mebibytes = map(float, answer.stderr.split())
    assert answer.stdout.count("\nmnist,model-") == 1000  # models and numbers of dimensions
    assert seconds < 5
    assert mebibytes < 500

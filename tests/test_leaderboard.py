"""Tables: the aggregation against pandas by hand, and every format read back by something else."""

from __future__ import annotations

import io
import json
import statistics
from xml.etree import ElementTree

import pandas as pd
import pytest

from imlbench import UserError
from imlbench.leaderboard import Cell, make_tables, render

FACTS = {
    "kde_paper": {"unit": "nats", "higher_is_better": True, "settings": {"h": 0.2, "M": 1000}},
    "error": {"unit": "", "higher_is_better": False, "settings": {}},
}
KDE = {"vae": [100.0, 101.0, 105.0], "iml-gmm": [180.0, 190.0, 191.0]}


def run(model: str, seed: int, kde: float, error: float, latent_dim: int = 20, **more):
    return {
        "tags.imlbench.job": f"{model}-{seed}-{latent_dim}",
        "tags.imlbench.model": model,
        "tags.imlbench.dataset": "mnist",
        "tags.imlbench.seed": str(seed),
        "tags.imlbench.fingerprint": "abc123",
        "tags.imlbench.code": "imlbench 0.1.0 aaa",
        "tags.imlbench.status": "done",
        "tags.imlbench.reason": None,
        "tags.imlbench.scores": json.dumps(FACTS),
        "params.n_samples": "1000",
        "params.n_draws": "5",
        "params.model.latent_dim": str(latent_dim),
        "metrics.kde_paper": kde,
        "metrics.kde_paper.stderr": 0.5,
        "metrics.error": error,
        "metrics.fit_seconds": 10.0 + seed,
        **more,
    }


@pytest.fixture
def runs() -> pd.DataFrame:
    rows = [run("vae", seed, kde, 20.0) for seed, kde in enumerate(KDE["vae"])]
    rows += [run("iml-gmm", seed, kde, 10.0 + seed) for seed, kde in enumerate(KDE["iml-gmm"])]
    return pd.DataFrame(rows)


def test_rows_are_means_and_standard_deviations_over_seeds(runs):
    (table,) = make_tables(runs)
    assert [row.model for row in table.rows] == ["iml-gmm", "vae"]
    for row in table.rows:
        assert row.n == 3
        assert row.cells["kde_paper"].mean == pytest.approx(statistics.mean(KDE[row.model]))
        assert row.cells["kde_paper"].spread == pytest.approx(statistics.stdev(KDE[row.model]))
        assert row.fit_seconds == pytest.approx(11.0)


def test_settings_are_told_once_and_real_ones_by_their_range(runs):
    facts = [json.loads(json.dumps(FACTS)) for _ in range(len(runs))]
    for h, fact in zip((0.2, 0.25, 0.3, 0.2, 0.2, 0.2), facts, strict=True):
        fact["kde_paper"]["settings"]["h"] = h
    facts[5]["kde_paper"]["settings"] |= {"M": 500, "kernel": "{0}"}
    runs["tags.imlbench.scores"] = [json.dumps(fact) for fact in facts]
    (table,) = make_tables(runs)
    assert table.notes[:2] == [
        "kde_paper of vae, iml-gmm: h = 0.2 to 0.3, M = 1000.",
        "kde_paper of iml-gmm: h = 0.2, M = 500, kernel = {0}.",
    ]


def test_one_seed_shows_the_standard_error_over_examples_and_never_as_spread(runs):
    (table,) = make_tables(runs[runs["tags.imlbench.seed"] == "0"])
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
    (table,) = make_tables(runs)
    lines = render([table], "github").splitlines()
    row = next(line for line in lines if line.startswith("| iml-gmm"))
    assert row.count("**") == 4  # highest kde_paper and lowest error
    assert next(line for line in lines if line.startswith("| vae")).count("**") == 0


def test_sort_follows_the_direction_of_the_metric(runs):
    runs.loc[runs["tags.imlbench.model"] == "vae", "metrics.error"] = 1.0
    (table,) = make_tables(runs, sort="error")
    assert [row.model for row in table.rows] == ["vae", "iml-gmm"]


def test_parameters_that_differ_become_columns(runs):
    more = pd.DataFrame([run("vae", 0, 90.0, 30.0, latent_dim=40)])
    (table,) = make_tables(pd.concat([runs, more]))
    assert table.varying_params() == ["latent_dim"]
    assert [(row.model, row.params["latent_dim"], row.n) for row in table.rows] == [
        ("iml-gmm", "20", 3),
        ("vae", "20", 3),
        ("vae", "40", 1),
    ]


def test_other_data_under_the_same_name_get_a_table_of_their_own(runs):
    other = pd.DataFrame([run("vae", 0, 90.0, 30.0, **{"tags.imlbench.fingerprint": "def456"})])
    tables = make_tables(pd.concat([runs, other]))
    assert [len(table.rows) for table in tables] == [2, 1]
    assert "abc123" in tables[0].dataset
    assert "def456" in tables[1].dataset


def test_jobs_without_result_are_named_and_not_ranked(runs):
    failed = run("gan", 0, float("nan"), float("nan"))
    failed |= {"tags.imlbench.status": "diverged", "tags.imlbench.reason": "gan, epoch 3: loss"}
    failed["tags.imlbench.scores"] = "{}"
    (table,) = make_tables(pd.concat([runs, pd.DataFrame([failed])]))
    assert "gan" not in [row.model for row in table.rows]
    assert "No result: gan, seed 0: diverged (gan, epoch 3: loss)." in render([table], "github")


def test_a_job_with_scores_is_ranked_although_one_metric_failed(runs):
    runs.loc[runs["tags.imlbench.model"] == "vae", "tags.imlbench.status"] = "failed"
    runs.loc[runs["tags.imlbench.model"] == "vae", "tags.imlbench.reason"] = "metric x failed"
    (table,) = make_tables(runs)
    assert [row.model for row in table.rows] == ["iml-gmm", "vae"]
    assert "Not complete: vae, seed 0: failed (metric x failed)." in render([table], "github")


def test_older_code_is_not_averaged_with_newer(runs):
    older = run("vae", 0, 50.0, 30.0, **{"tags.imlbench.code": "imlbench 0.1.0 bbb"})
    (table,) = make_tables(pd.concat([runs, pd.DataFrame([older])]))
    assert [(row.model, row.n) for row in table.rows] == [("iml-gmm", 3), ("vae", 3)]
    assert table.rows[1].cells["kde_paper"].mean == pytest.approx(102.0)


def test_a_metric_of_one_dataset_can_be_asked_for_beside_others(runs):
    toy = run("vae", 0, 1.0, 2.0, **{"tags.imlbench.dataset": "toy", "metrics.modes": 2.0})
    toy["tags.imlbench.scores"] = json.dumps({"modes": FACTS["error"]})
    (table,) = make_tables(pd.concat([runs, pd.DataFrame([toy])]), metrics=["modes"])
    assert table.dataset == "toy"


def test_published_values_stand_beside_ours_and_are_never_the_best(runs):
    published = {"mnist": {"kde_paper": {"IML (paper)": 999.0}}}
    (table,) = make_tables(runs, published=published)
    assert [row.model for row in table.rows] == ["IML (paper)", "iml-gmm", "vae"]
    text = render([table], "github")
    assert "**187.0 ±6.1**" in text
    assert "Rows without n are published values" in text


def test_csv_and_json_carry_the_numbers_unrounded(runs):
    tables = make_tables(runs)
    frame = pd.read_csv(io.StringIO(render(tables, "csv")))
    assert frame["kde_paper"].tolist() == pytest.approx([187.0, 102.0])
    assert frame["kde_paper.std_over_seeds"][1] == pytest.approx(statistics.stdev(KDE["vae"]))
    records = json.loads(render(tables, "json"))
    assert [record["model"] for record in records] == ["iml-gmm", "vae"]


def test_html_and_latex_are_what_they_say(runs):
    tables = make_tables(runs)
    page = ElementTree.fromstring(f"<html>{render(tables, 'html')}</html>")
    rows = [["".join(cell.itertext()).strip() for cell in row] for row in page.iter("tr")]
    assert [row[0] for row in rows] == ["model", "iml-gmm", "vae"]
    assert [bold.text for bold in page.iter("b")] == ["187.0 ±6.1", "11.0 ±1.0"]
    latex = render(tables, "latex")
    assert r"kde\_paper $\uparrow$" in latex
    assert r"\textbf{187.0 $\pm$6.1}" in latex


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_terminal_table_fits_the_terminal(runs, width):
    for index in range(8):
        runs[f"metrics.long_metric_name_{index}"] = 123.456
        FACTS_MORE = {f"long_metric_name_{index}": FACTS["error"] for index in range(8)}
    runs["tags.imlbench.scores"] = json.dumps({**FACTS, **FACTS_MORE})
    text = render(make_tables(runs), "terminal", width=width)
    table = text.split("±  is")[0].split("± is")[0].replace("\033[1m", "").replace("\033[0m", "")
    assert max(len(line) for line in table.splitlines()) <= width
    assert ("Not shown for lack of width" in text) == (width < 200)


def test_bad_requests_are_one_message(runs):
    with pytest.raises(UserError, match="got none"):
        make_tables(runs.iloc[:0])
    with pytest.raises(UserError, match=r"unknown metric 'kde_papr'\. Did you mean"):
        make_tables(runs, metrics=["kde_papr"])
    with pytest.raises(UserError, match="unknown metric 'kdf'"):
        make_tables(runs, sort="kdf")
    with pytest.raises(UserError, match="unknown model 'vea'"):
        make_tables(runs, models=["vea"])

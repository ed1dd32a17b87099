"""imlbench from Python: as a script and a notebook use it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pandas as pd
import pytest
import torch

import imlbench
from imlbench import UserError

NOTEBOOK = Path(__file__).parent.parent / "examples" / "notebook.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook, run from the beginning in an empty folder, and that folder."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": folder}}
    )
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("IMLBENCH_CACHE", str(folder / "cache"))
        environment.setenv("PYTHONWARNINGS", "default")
        client.execute()
    return notebook, folder / "results"


def test_the_notebook_shows_a_table_pictures_and_samples(executed):
    notebook, _ = executed
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    assert kinds.count("image/png") == 2
    assert any("<table>" in output.get("data", {}).get("text/html", "") for output in outputs)
    printed = "".join(output.get("text", "") for output in outputs)
    assert "[4/4] iml-gmm on digits, latent_dim=20, seed 0: " in printed
    assert "base: -" in printed


def test_results_are_a_frame_with_a_row_for_each_job(executed):
    _, path = executed
    found = imlbench.results(path)
    frame = found.to_frame()
    assert sorted(frame["latent_dim"]) == [2, 5, 10, 20]
    assert list(frame["status"]) == ["done"] * 4
    for record in found:
        (row,) = frame[frame["job"] == record.id].to_dict("records")
        assert row["kde"] == record.score("kde", "5x1000").value
        assert row["batch_size"] == 26  # what was used, not 500
    assert isinstance(frame, pd.DataFrame)


def test_a_loaded_model_gives_the_samples_and_scores_of_its_job(executed):
    _, path = executed
    found = imlbench.results(path)
    record = found.records[0]
    model = imlbench.load(record, path)
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    again = imlbench.load(record.id, path)
    torch.testing.assert_close(model.encode(x), again.encode(x), rtol=0, atol=0)
    values = found.per_example(record, "kde")["per_example"]
    assert values.mean().item() == pytest.approx(record.score("kde", "5x1000").value, abs=1e-12)


def test_a_second_run_computes_nothing(executed, capfd):
    _, path = executed
    before = contents(path)
    found = imlbench.run(
        models="iml-gmm",
        datasets="digits",
        metrics=["kde", "reconstruction_error"],
        grid={"latent_dim": [2, 5, 10, 20]},
        set={"epochs": 3, "n_components": 5},
        path=path,
        progress=False,
    )
    assert len(found) == 4
    assert capfd.readouterr().err == ""
    assert contents(path) == before


def contents(path: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file of a results folder's jobs, which one it is and what is in it."""
    files = [file for file in (path / "runs").rglob("*") if file.is_file()]
    return {file: (file.stat().st_ino, file.read_bytes()) for file in files}


def test_a_script_without_a_main_guard_runs_once(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import imlbench\n"
        "print('started')\n"
        "found = imlbench.run(models='reference-train', datasets='toy-2d', metrics='kde')\n"
        "print(found)\n"
    )
    environment = {**os.environ, "IMLBENCH_CACHE": str(tmp_path / "cache")}
    answer = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert answer.stdout == "started\nResults(1 jobs, 1 done)\n", answer.stderr


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: imlbench.run(models="vea", datasets="digits"), "Did you mean 'vae'"),
        (
            lambda: imlbench.run(models="vae", datasets="digits", set={"epoch": 3}),
            "set epoch: unknown parameter 'epoch'. Did you mean 'epochs'?",
        ),
        (
            lambda: imlbench.run(models="vae", datasets="digits", grid={"epochs": 3}),
            "grid epochs: must be a list of values to try; got 3",
        ),
        (lambda: imlbench.run(models="vae", datasets="digits", seeds=[-1]), "--seeds: must be"),
        (lambda: imlbench.results("nowhere"), "there is none"),
        (lambda: imlbench.load("nothing"), "unknown job 'nothing'"),
    ],
)
def test_mistakes_are_one_message(tmp_path, monkeypatch, call, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        call()
    assert message in str(caught.value)

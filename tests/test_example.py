"""The third-party package of ``examples/``, installed and run as its author would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from imlbench import Sources, Splits
from imlbench.files import read_tensors
from imlbench.records.folder import JobFolder
from imlbench_images.digits import Digits, DigitsParams

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "independent-pixels"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with the example installed, beside the environment's own packages."""
    folder = tmp_path_factory.mktemp("site")
    subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "--quiet", "--no-deps",
            "--no-build-isolation", "--target", str(folder), str(EXAMPLE),
        ],
        check=True,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def job(site, tmp_path_factory) -> JobFolder:
    """The folder of the one job that the example's author runs."""
    folder = tmp_path_factory.mktemp("work")
    command = [sys.executable, "-m", "imlbench", "run", "--models", "baseline"]
    subprocess.run(
        [*command, "--datasets", "digits"], env=environment(site), cwd=folder, check=True
    )
    (found,) = (folder / "results" / "runs").iterdir()
    return JobFolder(found)


@pytest.fixture(scope="module")
def digits() -> Splits:
    return Digits(DigitsParams()).load(Sources())


def environment(site: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(site)}


def test_the_example_is_listed(site):
    listed = subprocess.run(
        [sys.executable, "-m", "imlbench", "plugins"],
        env=environment(site),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "imlbench-independent-pixels 1.0: ok" in listed.stdout


def test_its_likelihood_is_exact(job, digits):
    train, test = digits.train[:].double(), digits.test[:].double()
    normal = torch.distributions.Normal(train.mean(0), train.std(0).clamp_min(1e-3))
    truth = normal.log_prob(test).flatten(1).sum(1).mean().item()
    assert value_of(job, "log_likelihood") == pytest.approx(truth, rel=1e-3)


def test_its_metric_and_its_artifact_are_those_of_its_samples(job, digits):
    (path,) = (job.path / "samples").iterdir()
    mean = read_tensors(path)["samples"].double().mean((0, 1))
    error = (mean - digits.test[:].double().mean(0)).square().mean().sqrt().item()
    assert value_of(job, "mean_error") == pytest.approx(error, rel=1e-4)
    (table,) = (job.path / "artifacts").rglob("mean.csv")
    written = [float(line) for line in table.read_text().splitlines()]
    assert written == pytest.approx(mean.flatten().tolist(), abs=1e-5)


def value_of(job: JobFolder, label: str) -> float:
    record = job.read()
    assert record is not None
    (value,) = [score.value for score in record.scores if score.label == label]
    return value


def test_the_documentation_shows_the_example_as_it_is():
    page = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    code = (EXAMPLE / "independent_pixels.py").read_text(encoding="utf-8")
    assert code.partition('"""\n\n')[2] in page

"""The third-party package of ``examples/``, installed and run as its author would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def test_the_example_runs_and_its_likelihood_is_exact(site, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-m", "imlbench"]
    listed = subprocess.run(
        [*command, "plugins"], env=environment, capture_output=True, text=True, check=True
    )
    assert "imlbench-independent-pixels 1.0: ok" in listed.stdout
    arguments = ["run", "--models", "baseline", "--datasets", "digits"]
    subprocess.run([*command, *arguments], env=environment, cwd=tmp_path, check=True)
    (job,) = (tmp_path / "results" / "runs").iterdir()
    found = json.loads((job / "metrics.json").read_text())["scores"]["log_likelihood"]

    from imlbench import Sources
    from imlbench_images.digits import Digits

    splits = Digits(Digits.Params()).load(Sources())
    train, test = splits.train[:].double(), splits.test[:].double()
    normal = torch.distributions.Normal(train.mean(0), train.std(0).clamp_min(1e-3))
    truth = normal.log_prob(test).flatten(1).sum(1).mean().item()
    assert found["value"] == pytest.approx(truth, rel=1e-3)


def test_the_documentation_shows_the_example_as_it_is():
    page = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    code = (EXAMPLE / "independent_pixels.py").read_text(encoding="utf-8")
    assert code.partition('"""\n\n')[2] in page

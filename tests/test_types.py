"""Types reach the author of a plugin: what is misspelt is an error in the editor."""

from __future__ import annotations

import subprocess
import sys

import pytest

PLUGIN = """
import torch
from torch import Tensor
from imlbench import (
    Evaluation, Examples, FitContext, LogProb, Metric, Model, Params, Score, from_data
)

class MineParams(Params):
    latent_dim: int = from_data(ge=1)

class Mine(Model[MineParams]):
    name = "mine"
    def fit(self, train: Examples, valid: Examples, context: FitContext) -> None:
        print(self.params.{parameter}, train.{method}(10))
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.zeros(n, self.params.latent_dim)

class Other(Metric[Params]):
    name = "other"
    higher_is_better = True
    requires = ({capability},)
    def compute(self, evaluation: Evaluation) -> Score:
        return {score}
"""
RIGHT = {
    "parameter": "latent_dim",
    "method": "batches",
    "capability": "LogProb",
    "score": "Score(0.0)",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "Success"),
        ({"parameter": "latnt_dim"}, '"MineParams" has no attribute "latnt_dim"'),
        ({"method": "batchs"}, '"Examples" has no attribute "batchs"'),
        ({"capability": '"log_porb"'}, "Incompatible types in assignment"),
        ({"score": "0.0"}, 'got "float", expected "Score"'),
    ],
)
def test_mypy_finds_what_is_wrong_in_a_plugin(tmp_path, wrong, message):
    (tmp_path / "mine.py").write_text(PLUGIN.format(**RIGHT | wrong))
    answer = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "mine.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert message in answer.stdout
    assert answer.returncode == (1 if wrong else 0), answer.stdout

"""How well an auto-encoder reproduces what it is given."""

from __future__ import annotations

from torch import Tensor

from imlbench import Evaluation, Metric, Score


class ReconstructionError(Metric):
    """Squared error of the reconstruction, summed over an example, mean over the test set."""

    name = "reconstruction_error"
    higher_is_better = False
    requires = frozenset({"encode", "decode"})

    def compute(self, evaluation: Evaluation) -> Score:
        """Compute the mean of the summed squared error."""
        model = evaluation.model

        def squared_error(x: Tensor) -> Tensor:
            return (model.decode(model.encode(x)) - x).square().flatten(1).sum(dim=1)

        return Score.mean(evaluation.per_example(squared_error, evaluation.splits.test))

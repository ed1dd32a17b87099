"""How well an auto-encoder reproduces what it is given."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from imlbench import Autoencoding, Evaluation, Metric, Params, Score


class ReconstructionError(Metric[Params]):
    """Squared error of the reconstruction, summed over an example, mean over the test set."""

    name = "reconstruction_error"
    higher_is_better = False
    value_range = (0.0, None)
    position = 20
    requires = (Autoencoding,)

    def compute(self, evaluation: Evaluation) -> Score:
        """Compute the mean of the summed squared error."""
        model, test = cast(Autoencoding, evaluation.model), evaluation.splits.test

        def squared_error(x: Tensor) -> Tensor:
            return (model.decode(model.encode(x)) - x).square().flatten(1).sum(dim=1)

        return Score.mean(evaluation.per_example(squared_error, test), test.groups)

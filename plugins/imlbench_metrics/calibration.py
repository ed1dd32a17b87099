"""Comparisons with the truth, for data whose distribution is known."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from imlbench import Evaluation, LogProb, Metric, Modes, Params, Score
from imlbench.densities import perplexity


class LogLikelihoodGap(Metric[Params]):
    r"""What a model's exact log-likelihood lacks: :math:`\log p_{data}(x) - \log p_{model}(x)`.

    Its mean over test examples estimates the Kullback-Leibler divergence of model from data.
    """

    name = "log_likelihood_gap"
    unit = "nats"
    higher_is_better = False
    reference = "Kullback and Leibler, On Information and Sufficiency, 1951"
    position = 11
    requires = (LogProb,)
    requires_of_dataset = (LogProb,)

    def compute(self, evaluation: Evaluation) -> Score:
        """Compute the mean difference on the test set."""
        data, model = cast(LogProb, evaluation.dataset), cast(LogProb, evaluation.model)
        test = evaluation.splits.test

        def gap(x: Tensor) -> Tensor:
            return data.log_prob(x) - model.log_prob(x)

        return Score.mean(evaluation.per_example(gap, test), test.groups)


class ModesCovered(Metric[Params]):
    r"""Number of the data's modes that the samples cover: the perplexity of their shares.

    :math:`\exp(-\sum_c q_c \log q_c)`, where :math:`q_c` is the share of samples nearest to mode c:
    1 if all samples are in one mode, the number of modes if they are shared out evenly.
    """

    name = "modes_covered"
    higher_is_better = True
    value_range = (1.0, None)
    position = 30
    needs_samples = True
    requires_of_dataset = (Modes,)

    def compute(self, evaluation: Evaluation) -> Score:
        """Count the modes of all draws together."""
        data = cast(Modes, evaluation.dataset)
        counts = data.mode(evaluation.samples.flatten(0, 1)).bincount().double()
        return Score(perplexity(counts / counts.sum()))

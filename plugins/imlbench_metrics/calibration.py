"""Comparisons with the truth, for data whose distribution is known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imlbench import Evaluation, Metric, Score


class LogLikelihoodGap(Metric):
    r"""What a model's exact log-likelihood lacks: :math:`\log p_{data}(x) - \log p_{model}(x)`.

    Its mean over test examples estimates the Kullback-Leibler divergence of model from data.
    """

    name = "log_likelihood_gap"
    unit = "nats"
    higher_is_better = False
    requires = frozenset({"log_prob"})
    requires_of_dataset = frozenset({"log_prob"})

    def compute(self, evaluation: Evaluation) -> Score:
        """Compute the mean difference on the test set."""
        data: Any = evaluation.dataset
        model: Any = evaluation.model

        def gap(x: Tensor) -> Tensor:
            return data.log_prob(x) - model.log_prob(x)

        return Score.mean(evaluation.per_example(gap, evaluation.splits.test))


class ModesCovered(Metric):
    r"""Number of the data's modes that the samples cover: the perplexity of their shares.

    :math:`\exp(-\sum_c q_c \log q_c)`, where :math:`q_c` is the share of samples nearest to mode c:
    1 if all samples are in one mode, the number of modes if they are shared out evenly.
    """

    name = "modes_covered"
    higher_is_better = True
    requires_of_dataset = frozenset({"mode"})

    def compute(self, evaluation: Evaluation) -> Score:
        """Count the modes of all draws together."""
        data: Any = evaluation.dataset
        counts = data.mode(evaluation.samples.flatten(0, 1)).bincount().double()
        shares = counts / counts.sum()
        return Score(torch.special.entr(shares).sum().exp().item())

"""Log-likelihood of held-out latents in order of time: what modelling time buys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor

from imlbench import BaseLogProbSequence, Evaluation, Kind, Metric, Params, Score
from imlbench_audio.framing import lengths_of


class SequenceLogLikelihood(Metric[Params]):
    r"""Log-likelihood of held-out latents, of every chunk given those before it in its recording.

    :math:`\log p_0(h_t \mid h_1, \dots, h_{t-1})`; models that take chunks as exchangeable have
    :math:`\log p_0(h_t)`. Without any volume: comparable between models that share an auto-encoder.
    """

    name = "sequence_log_likelihood"
    unit = "nats"
    higher_is_better = True
    position = 5
    requires = (BaseLogProbSequence,)
    kinds: ClassVar[frozenset[Kind]] = frozenset({"sequence"})

    def compute(self, evaluation: Evaluation) -> Score:
        """Compute the mean over the chunks of the test set."""
        test = evaluation.splits.test
        return Score.mean(in_order(evaluation, torch.arange(len(test))), test.groups)


class ShuffledLogLikelihood(Metric[Params]):
    """The same as ``sequence_log_likelihood`` with the chunks of each recording in random order.

    What it lacks of that is what the model knows about time; nothing, if chunks are exchangeable.
    The order is the same for all models and seeds, so that models can be compared.
    """

    name = "sequence_log_likelihood_shuffled"
    unit = "nats"
    higher_is_better = None
    position = 6
    requires = (BaseLogProbSequence,)
    kinds: ClassVar[frozenset[Kind]] = frozenset({"sequence"})

    def compute(self, evaluation: Evaluation) -> Score:
        """Compute the mean over the chunks of the test set; values are in the original order."""
        test = evaluation.splits.test
        order = shuffled(lengths_of(test), torch.Generator().manual_seed(0))
        values = in_order(evaluation, order)
        return Score.mean(torch.empty_like(values).scatter(0, order, values), test.groups)


def shuffled(lengths: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return a permutation of all chunks that leaves each in its recording, shape (N,)."""
    parts, first = [], 0
    for length in lengths:
        parts.append(first + torch.randperm(length, generator=generator))
        first += length
    return torch.cat(parts)


def in_order(evaluation: Evaluation, order: Tensor) -> Tensor:
    """Return the conditional log-densities of the test chunks when they come in ``order``, (N,)."""
    model, test = cast(BaseLogProbSequence, evaluation.model), evaluation.splits.test
    x = test[order].to(evaluation.device)
    return model.base_log_prob_sequence(x, lengths_of(test)).double().cpu()

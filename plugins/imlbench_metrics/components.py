"""How rich a mixture has become."""

from __future__ import annotations

from imlbench import Evaluation, Metric, Score


class EffectiveComponents(Metric):
    """Number of mixture components in use: the perplexity of the weights."""

    name = "effective_components"
    higher_is_better = None
    requires = frozenset({"effective_components"})

    def compute(self, evaluation: Evaluation) -> Score:
        """Ask the model."""
        return Score(evaluation.model.effective_components())

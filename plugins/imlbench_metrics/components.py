"""How rich a mixture has become."""

from __future__ import annotations

from typing import cast

from imlbench import EffectiveComponents, Evaluation, Metric, Params, Score


class ComponentsInUse(Metric[Params]):
    """Number of mixture components in use: the perplexity of the weights."""

    name = "effective_components"
    higher_is_better = None
    value_range = (1.0, None)
    position = 60
    requires = (EffectiveComponents,)

    def compute(self, evaluation: Evaluation) -> Score:
        """Ask the model."""
        return Score(cast(EffectiveComponents, evaluation.model).effective_components())

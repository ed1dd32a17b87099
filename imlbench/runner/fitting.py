"""How the harness builds and fits a model: what a fit depends on besides the model's own code."""

from __future__ import annotations

import torch
from pydantic import JsonValue

from imlbench.api.data import Splits
from imlbench.api.model import AnyModel, FitContext
from imlbench.api.randomness import derive_seed
from imlbench.api.space import Space
from imlbench.runner.seeding import seeded


def build(
    cls: type[AnyModel],
    settings: dict[str, JsonValue],
    space: Space,
    seed: int,
    device: torch.device,
) -> AnyModel:
    """Return a model that is initialised as its seed says, not fitted.

    Arguments:
        cls: Its class.
        settings: Its resolved parameters.
        space: The space of the data.
        seed: The job's seed.
        device: Where it goes.
    """
    with seeded(derive_seed(seed, "initialisation")):
        return cls(cls.params_type.model_validate(settings), space).to(device)


def fit(model: AnyModel, splits: Splits, context: FitContext) -> None:
    """Fit a model, in training mode, to data on its device."""
    train, valid = (part.fresh().to(context.device) for part in (splits.train, splits.valid))
    with seeded(derive_seed(context.seed, "fit")):
        model.train()
        model.fit(train, valid, context)

"""How the harness draws samples of a fitted model: what samples depend on besides the fit."""

from __future__ import annotations

import torch
from torch import Tensor

from imlbench.api.model import AnyModel
from imlbench.api.randomness import derive_seed
from imlbench.errors import Diverged
from imlbench.runner.seeding import seeded


def draw(model: AnyModel, seed: int, n_draws: int, n_samples: int, device: torch.device) -> Tensor:
    r"""Return independent draws, float32, of shape :math:`(n\_draws, n\_samples, *event\_shape)`.

    The draws of a smaller number are the first ones of a larger number.

    Raises:
        TypeError: The model returns something of another shape.
        Diverged: Some values are NaN or infinite.
    """
    draws = []
    for number in range(n_draws):
        derived = derive_seed(seed, f"samples {number}")
        generator = torch.Generator(device).manual_seed(derived)
        with seeded(derived), torch.no_grad():
            draws.append(model.sample(n_samples, generator).to("cpu", torch.float32))
        expected = (n_samples, *model.space.event_shape)
        if draws[-1].shape != expected:
            found = tuple(draws[-1].shape)
            raise TypeError(f"{model.name}.sample must return {expected}; got {found}")
    samples = torch.stack(draws)
    if not samples.isfinite().all():
        raise Diverged("samples", 1, "some are NaN or infinite")
    return samples

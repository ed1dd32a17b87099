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
            found = model.sample(n_samples, generator)
        expected = (n_samples, *model.space.event_shape)
        if not isinstance(found, Tensor) or found.shape != expected or found.is_complex():
            what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise TypeError(f"{model.name}.sample must return a real {expected}; got {what}")
        draws.append(found.to("cpu", torch.float32))
    samples = torch.stack(draws)
    if not samples.isfinite().all():
        raise Diverged("samples", 1, "some are NaN or infinite")
    return samples

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
        TypeError: The model returns something of another type or shape.
        Diverged: Some values are NaN or infinite.
    """
    draws = []
    for number in range(n_draws):
        derived = derive_seed(seed, f"samples {number}")
        generator = torch.Generator(device).manual_seed(derived)
        with seeded(derived), torch.no_grad():
            found = model.sample(n_samples, generator)
        expected = (n_samples, *model.space.event_shape)
        if not isinstance(found, Tensor):
            raise TypeError(f"{model.name}.sample must return a tensor; got {type(found).__name__}")
        if found.shape != expected or not found.is_floating_point():
            raise TypeError(
                f"{model.name}.sample must return real numbers of shape {expected}; "
                f"got {found.dtype} of shape {tuple(found.shape)}"
            )
        draws.append(found.to("cpu", torch.float32))
    samples = torch.stack(draws)
    if not samples.isfinite().all():
        raise Diverged("samples", 1, "some are NaN or infinite")
    return samples

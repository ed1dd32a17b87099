"""A Gaussian for every pixel: the whole of a third party's plugin, as in docs/plugins.md."""

import torch
from pydantic import Field

from imlbench import Examples, FitContext, Model, Params, hookimpl


class IndependentPixels(Model):
    """A Gaussian for every pixel, independent of all others."""

    name = "independent-pixels"
    family = "baseline"

    class Params(Params):
        min_std: float = Field(1e-3, gt=0)
        """Smallest standard deviation of a pixel."""

    def __init__(self, params, space):
        super().__init__(params, space)
        self.register_buffer("mean", torch.zeros(space.event_shape))
        self.register_buffer("std", torch.ones(space.event_shape))

    def fit(self, train: Examples, valid: Examples, context: FitContext) -> None:
        x = train[:]
        self.mean.copy_(x.mean(0))
        self.std.copy_(x.std(0).clamp_min(self.params.min_std))

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        noise = torch.randn(
            n, *self.space.event_shape, generator=generator, device=self.mean.device
        )
        return self.mean + self.std * noise

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        return torch.distributions.Normal(self.mean, self.std).log_prob(x).flatten(1).sum(1)


@hookimpl
def imlbench_models():
    return [IndependentPixels]

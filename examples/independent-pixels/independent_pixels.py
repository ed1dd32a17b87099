"""A Gaussian for every pixel: the whole of a third party's plugin, as in docs/plugins.md."""

from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from imlbench import (
    AnyArtifact,
    AnyMetric,
    AnyModel,
    Artifact,
    Evaluation,
    Examples,
    FitContext,
    Metric,
    Model,
    Params,
    Score,
    Space,
    hookimpl,
)


class IndependentPixelsParams(Params):
    min_std: float = Field(1e-3, gt=0)
    """Smallest standard deviation of a pixel."""


class IndependentPixels(Model[IndependentPixelsParams]):
    """A Gaussian for every pixel, independent of all others."""

    name = "independent-pixels"
    family = "baseline"
    mean: Tensor
    std: Tensor

    def __init__(self, params: IndependentPixelsParams, space: Space) -> None:
        super().__init__(params, space)
        self.register_buffer("mean", torch.zeros(space.event_shape))
        self.register_buffer("std", torch.ones(space.event_shape))

    def fit(self, train: Examples, valid: Examples, context: FitContext) -> None:
        x = train[:]
        self.mean.copy_(x.mean(0))
        self.std.copy_(x.std(0).clamp_min(self.params.min_std))

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        shape = (n, *self.space.event_shape)
        noise = torch.randn(shape, generator=generator, device=self.mean.device)
        return self.mean + self.std * noise

    def log_prob(self, x: Tensor) -> Tensor:
        log_density: Tensor = torch.distributions.Normal(self.mean, self.std).log_prob(x)
        return log_density.flatten(1).sum(1)


class MeanError(Metric[Params]):
    """Root mean square, over pixels, of the mean sample less the mean test image."""

    name = "mean_error"
    higher_is_better = False
    needs_samples = True

    def compute(self, evaluation: Evaluation) -> Score:
        error = evaluation.samples.mean((0, 1)) - evaluation.splits.test[:].mean(0)
        return Score(error.square().mean().sqrt().item())


class MeanSample(Artifact[Params]):
    """The mean sample, as a table of numbers."""

    name = "mean-sample"

    def write(self, evaluation: Evaluation, folder: Path) -> None:
        mean = evaluation.samples.mean((0, 1)).flatten()
        (folder / "mean.csv").write_text("\n".join(f"{value:.6g}" for value in mean.tolist()))


@hookimpl
def imlbench_models() -> list[type[AnyModel]]:
    return [IndependentPixels]


@hookimpl
def imlbench_metrics() -> list[type[AnyMetric]]:
    return [MeanError]


@hookimpl
def imlbench_artifacts() -> list[type[AnyArtifact]]:
    return [MeanSample]

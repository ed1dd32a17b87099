"""Generative adversarial networks: the original one, and the Wasserstein one."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from imlbench import Diverged, Examples, FitContext, Kind, Model, Params, Space, from_data
from imlbench.networks import (
    Bounded,
    convolutional_decoder,
    convolutional_encoder,
    fill_sizes,
    is_convolutional,
    perceptron,
)
from imlbench.training import Precision, n_steps_for, train_epochs

MIN_DIVERSITY = 0.01
"""Below this share of the training data's standard deviation, samples are one point.

It is a ten-thousandth of the variance. Samples of one class, or of one narrow mode out of many, lie
far above it: they are a poor fit, which metrics measure, and no failure.
"""
MAX_ACCURACY = 0.999
"""Above this accuracy the discriminator has won: samples have nothing left in common with data."""
PATIENCE = (3, 1000)
"""Epochs, and steps, for which a failure must last: a generator may recover from a bad epoch."""
N_COMPARED = 256
"""Samples that are drawn after every epoch to measure diversity and batch statistics."""
N_REFERENCE = 1000
"""Training examples that the data's mean and standard deviation are taken from."""
SAMPLE_BATCH = 1000


class AdversarialParams(Params):
    """Parameters of every adversarial model."""

    latent_dim: int = from_data(ge=1)
    """Number of latent dimensions, K; by default 20, for larger images 100."""
    hidden_dim: int = from_data(ge=1)
    """Width of the generator's hidden layer, by default 600; not used for larger images."""
    discriminator_dim: int = from_data(ge=1)
    """Width of the discriminator's hidden layer, by default 200; not used for larger images."""
    width: int = from_data(ge=1)
    """Channels of the DC-GAN's layers next to the image, by default 128; only for larger images."""
    activation: Literal["tanh", "relu"] = from_data()
    """Between the generator's layers; not used for larger images, where it is ReLU. By default tanh
    for ``gan`` and relu for ``wgan``."""
    epochs: int = from_data(ge=1)
    """Passes of the discriminator over the training set; by default as many as `n_steps` needs."""
    n_steps: int = from_data(ge=1)
    """Steps of the discriminator, at least, if `epochs` is not given; by default 10,000."""
    batch_size: int = Field(64, ge=1)
    """Examples per step; fewer on small data, so that an epoch has at least 50 steps."""
    precision: Precision = "auto"
    """Of the networks' products during training: bfloat16 for wide perceptrons and large batches on
    processors made for it, otherwise float32; the record says which it was."""


P = TypeVar("P", bound=AdversarialParams)


class Adversarial(Model[P]):
    """A generator, and a discriminator that tells its samples from data.

    The networks are perceptrons, K-600-D and D-200-1 with leaky ReLU, or for larger images those of
    the DC-GAN (https://arxiv.org/abs/1511.06434). Values without bounds are standardised inside.

    Every epoch reports the losses and the `diversity` of samples: their standard deviation, as a
    share of the training data's. A fit whose samples have shrunk to a point is *diverged*.
    """

    family = "gan"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"vector", "image"})
    mean: Tensor
    std: Tensor

    def __init__(self, params: P, space: Space) -> None:
        super().__init__(params, space)
        self.generator, self.discriminator = make_networks(params, space, self.has_batch_norm)
        shape = () if space.value_range else space.event_shape
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))

    @classmethod
    def resolve(cls, params: P, space: Space) -> P:
        """Fill in the sizes of the networks, and either epochs or steps."""
        params = fill_sizes(params, space)
        if is_convolutional(space):
            params = params.without("discriminator_dim", "activation")
        else:
            params = params.filled(discriminator_dim=200, activation="relu")
        return params.without("n_steps") if params.epochs else params.filled(n_steps=10_000)

    @property
    def has_batch_norm(self) -> bool:
        """Whether a convolutional discriminator normalises its layers."""
        return True

    @property
    def n_critic(self) -> int:
        """Steps of the discriminator for each of the generator."""
        return 1

    @abstractmethod
    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Return the optimiser of one of the networks."""

    @abstractmethod
    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """Return the loss, given the discriminator's outputs for examples and samples."""

    @abstractmethod
    def generator_loss(self, fake: Tensor) -> Tensor:
        """Return the loss, given the discriminator's outputs for samples."""

    def penalty(self, real: Tensor, fake: Tensor, generator: torch.Generator) -> Tensor | float:
        """Return what is added to the discriminator's loss, given examples and samples."""
        return 0.0

    def constrain(self) -> None:
        """Restrict the discriminator's weights; called after each of its steps."""

    def curves(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """Return more values to report, given the discriminator's outputs."""
        return {}

    def failure(self, values: Mapping[str, float]) -> str:
        """Return why an epoch with these values was a failure, or nothing."""
        if values["diversity"] < MIN_DIVERSITY:
            share = f"their standard deviation is {values['diversity']:.2g} of the data's"
            return f"the samples have collapsed to a point: {share}"
        return ""

    def fit(self, train: Examples, valid: Examples, context: FitContext) -> None:
        """Train the two networks in turns."""
        reference = next(train.batches(N_REFERENCE, context.generator("reference")))
        self._standardize_by(reference)
        steps_per_epoch = n_steps_for(len(train), self.params.batch_size, 1)
        step = _Turns(self, train, context.generator("noise"))
        watch = _Watch(self, reference, context, steps_per_epoch)
        train_epochs(
            step,
            train,
            n_epochs=self.params.epochs or math.ceil(self.params.n_steps / steps_per_epoch),
            batch_size=self.params.batch_size,
            context=context,
            stage=self.name,
            precision=self.params.precision,
            parts=[self, step, watch],
            after_epoch=watch,
        )

    def _standardize_by(self, reference: Tensor) -> None:
        if self.space.value_range is None:
            std = reference.std(dim=0)
            self.mean.copy_(reference.mean(dim=0))
            self.std.copy_(torch.where(std > 0, std, 1.0))

    def _step_discriminator(
        self, x: Tensor, noise: torch.Generator, optimizer: Optimizer
    ) -> dict[str, Tensor]:
        with torch.no_grad():
            samples = self.generator(self._latents(len(x), noise))
        real, fake = self.discriminator(x), self.discriminator(samples)
        loss = self.discriminator_loss(real, fake)
        optimizer.zero_grad(set_to_none=True)
        (loss + self.penalty(x, samples, noise)).backward()
        optimizer.step()
        self.constrain()
        losses = {"discriminator_loss": loss, "generator_loss": self.generator_loss(fake)}
        return {**losses, **self.curves(real, fake)}

    def _step_generator(self, n: int, noise: torch.Generator, optimizer: Optimizer) -> None:
        loss = self.generator_loss(self.discriminator(self.generator(self._latents(n, noise))))
        optimizer.zero_grad(set_to_none=True)
        loss.backward(inputs=list(self.generator.parameters()))
        optimizer.step()

    @torch.no_grad()
    def measure_batch_norm(self, generator: torch.Generator) -> None:
        """Take the generator's statistics for sampling from its weights as they now are.

        Running averages lag behind the weights: after few steps, samples would all look alike.
        """
        layers = [m for m in self.generator.modules() if isinstance(m, nn.BatchNorm2d)]
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = 1.0  # those of the batch that follows; None would make steps wait
        if layers:
            self.generator(self._latents(N_COMPARED, generator))

    def _latents(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, self.params.latent_dim, generator=generator, device=self.mean.device)

    def _generate(self, h: Tensor) -> Tensor:
        """Return the samples that latents (N, K) stand for."""
        return self.mean + self.std * self.generator(h)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Decode standard normal latents, a thousand at a time."""
        return torch.cat(
            [self._generate(h) for h in self._latents(n, generator).split(SAMPLE_BATCH)]
        )


class GANParams(AdversarialParams):
    """Parameters of ``gan``."""

    learning_rate: float = Field(2e-4, gt=0)
    """Learning rate of Adam, for both networks."""


class GAN(Adversarial[GANParams]):
    r"""The generative adversarial network (https://arxiv.org/abs/1406.2661).

    The discriminator's output is the logit of an example being real. Its loss and the generator's,
    which is the non-saturating one, are

    .. math:: -\log D(x) - \log(1 - D(G(h))), \qquad -\log D(G(h)).

    `accuracy` is the share of examples and samples that the discriminator tells rightly. If it is
    perfect for long, the fit is *diverged*.
    """

    name = "gan"

    @classmethod
    def resolve(cls, params: GANParams, space: Space) -> GANParams:
        """Fill in tanh as the activation, too."""
        return super().resolve(params.filled(activation="tanh"), space)

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Return Adam as the DC-GAN uses it."""
        rate = self.params.learning_rate
        return torch.optim.Adam(parameters, lr=rate, betas=(0.5, 0.999), fused=True)

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """Return the cross-entropy of examples and of samples, added."""
        return F.softplus(-real).mean() + F.softplus(fake).mean()

    def generator_loss(self, fake: Tensor) -> Tensor:
        """Return the cross-entropy of samples taken for examples."""
        return F.softplus(-fake).mean()

    def curves(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """Return the discriminator's accuracy."""
        return {"accuracy": torch.cat([real > 0, fake < 0]).float().mean()}

    def failure(self, values: Mapping[str, float]) -> str:
        """Collapse, or a discriminator that has won."""
        if values["accuracy"] > MAX_ACCURACY:
            return f"the discriminator has won: its accuracy is {values['accuracy']:.5f}"
        return super().failure(values)


class WGANParams(AdversarialParams):
    """Parameters of ``wgan``."""

    n_critic: int = Field(5, ge=1)
    """Steps of the critic for each of the generator."""
    clip: float = from_data(gt=0)
    """Largest absolute value of the critic's weights, by default 0.01, if there is no gradient
    penalty."""
    gradient_penalty: float = Field(0.0, ge=0)
    """Weight of the gradient penalty, such as 10; 0 clips the weights instead."""
    learning_rate: float = from_data(gt=0)
    """Of both networks.

    By default 1e-4 with a gradient penalty, and else 5e-5 for the DC-GAN, as in the papers, but
    2e-4 for perceptrons, which are far from trained after 10,000 steps at 5e-5.
    """


class WGAN(Adversarial[WGANParams]):
    r"""The Wasserstein GAN (https://arxiv.org/abs/1701.07875).

    The discriminator, here called critic, has no bounded output. It maximises
    :math:`f(x) - f(G(h))`, and the generator :math:`f(G(h))`. Its weights are clipped, or it is
    held to slope 1 by a gradient penalty (https://arxiv.org/abs/1704.00028), without batch
    normalisation.
    """

    name = "wgan"

    @property
    def has_batch_norm(self) -> bool:
        """Not with a gradient penalty, for which examples must not depend on each other."""
        return not self.params.gradient_penalty

    @property
    def n_critic(self) -> int:
        """Steps of the critic for each of the generator."""
        return self.params.n_critic

    @classmethod
    def resolve(cls, params: WGANParams, space: Space) -> WGANParams:
        """Fill in the learning rate and what constrains the critic, too."""
        if params.gradient_penalty:
            params = params.filled(learning_rate=1e-4).without("clip")
        else:
            rate = 5e-5 if is_convolutional(space) else 2e-4
            params = params.filled(learning_rate=rate, clip=0.01)
        return super().resolve(params, space)

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Return RMSprop, or Adam with a gradient penalty, as the two papers do."""
        rate = self.params.learning_rate
        if self.params.gradient_penalty:
            return torch.optim.Adam(parameters, lr=rate, betas=(0.5, 0.9), fused=True)
        return torch.optim.RMSprop(parameters, lr=rate)

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """Return the negative estimate of the distance, up to a factor."""
        return fake.mean() - real.mean()

    def generator_loss(self, fake: Tensor) -> Tensor:
        """Return the negative mean of the critic's output."""
        return -fake.mean()

    def penalty(self, real: Tensor, fake: Tensor, generator: torch.Generator) -> Tensor | float:
        """Return the weighted gradient penalty, if any."""
        weight = self.params.gradient_penalty
        return weight * gradient_penalty(self.discriminator, real, fake, generator) if weight else 0

    @torch.no_grad()
    def constrain(self) -> None:
        """Clip the critic's weights, unless there is a gradient penalty."""
        if not self.params.gradient_penalty:
            for parameter in self.discriminator.parameters():
                parameter.clamp_(-self.params.clip, self.params.clip)


def gradient_penalty(
    critic: nn.Module, real: Tensor, fake: Tensor, generator: torch.Generator
) -> Tensor:
    r"""Return how far the critic's slope is from 1 between examples and samples.

    .. math:: E[(\|\nabla f(u x + (1 - u) \tilde x)\| - 1)^2], \quad u \sim \mathcal U(0, 1)

    Reference: https://arxiv.org/abs/1704.00028

    Arguments:
        critic: From :math:`(N, *event\_shape)` to (N, 1); no output may depend on other examples.
        real: Examples, shape :math:`(N, *event\_shape)`.
        fake: As many samples.
        generator: Source of u, on their device.
    """
    u = torch.rand(len(real), generator=generator, device=real.device, dtype=real.dtype)
    x = torch.lerp(fake, real, u.view(-1, *[1] * (real.dim() - 1))).requires_grad_()
    (slope,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()


def make_networks(
    params: AdversarialParams, space: Space, has_batch_norm: bool
) -> tuple[nn.Sequential, nn.Sequential]:
    """Return generator and discriminator: the DC-GAN's for larger images, else perceptrons.

    Arguments:
        params: As the model resolved them.
        space: The space of the data.
        has_batch_norm: Normalise the DC-GAN's discriminator, too.
    """
    latent, n_dims = params.latent_dim, space.n_dims
    if is_convolutional(space):
        decoder = convolutional_decoder(latent, space, params.width, batch_norm=True)
        critic = convolutional_encoder(space, 1, params.width, batch_norm=has_batch_norm)
        generator = nn.Sequential(decoder, Bounded(space))
        return generator.apply(_initialize), critic.apply(_initialize)
    activation = {"tanh": nn.Tanh, "relu": nn.ReLU}[params.activation]
    hidden = perceptron(latent, params.hidden_dim, n_dims, activation=activation)
    return nn.Sequential(hidden, nn.Unflatten(1, space.event_shape), Bounded(space)), nn.Sequential(
        nn.Flatten(),
        nn.Linear(n_dims, params.discriminator_dim),
        nn.LeakyReLU(0.2),
        nn.Linear(params.discriminator_dim, 1),
    )


def _initialize(module: nn.Module) -> None:
    """Draw the initial weights of a layer as the DC-GAN does."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


class _Turns:
    """A step of the discriminator, with one of the generator every `n_critic`."""

    def __init__(self, model: Adversarial[P], train: Examples, noise: torch.Generator) -> None:
        self._model, self._train, self._noise = model, train, noise
        self._discriminator = model.make_optimizer(model.discriminator.parameters())
        self._generator = model.make_optimizer(model.generator.parameters())
        self._n_steps = 0

    def __call__(self, rows: Tensor) -> dict[str, Tensor]:
        model = self._model
        x = (self._train[rows] - model.mean) / model.std
        values = model._step_discriminator(x, self._noise, self._discriminator)
        self._n_steps += 1
        if self._n_steps % model.n_critic == 0:
            model._step_generator(len(x), self._noise, self._generator)
        return values

    def state_dict(self) -> dict[str, Any]:
        return {
            "discriminator": self._discriminator.state_dict(),
            "generator": self._generator.state_dict(),
            "n_steps": self._n_steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._discriminator.load_state_dict(state_dict["discriminator"])
        self._generator.load_state_dict(state_dict["generator"])
        self._n_steps = state_dict["n_steps"]


class _Watch:
    """Reports the samples' diversity after every epoch, and ends a fit that has failed.

    A failure must last for `PATIENCE`; samples that are one point at the end are never accepted.
    """

    def __init__(
        self, model: Adversarial[P], reference: Tensor, context: FitContext, steps_per_epoch: int
    ) -> None:
        self._model, self._context = model, context
        self._spread = _spread(reference)
        n_epochs, n_steps = PATIENCE
        self._patience = max(n_epochs, math.ceil(n_steps / steps_per_epoch))
        self._n_failures = 0

    def __call__(self, epoch: int, n_epochs: int, values: Mapping[str, float]) -> None:
        stage, diversity = self._model.name, self._diversity()
        self._context.report(stage, epoch, n_epochs, diversity=diversity)
        reason = self._model.failure({**values, "diversity": diversity})
        self._n_failures = self._n_failures + 1 if reason else 0
        if self._n_failures >= self._patience:
            raise Diverged(stage, epoch, f"{reason}, for {self._n_failures} epochs")
        if epoch == n_epochs and diversity < MIN_DIVERSITY:
            raise Diverged(stage, epoch, reason)

    def state_dict(self) -> dict[str, Any]:
        return {"n_failures": self._n_failures}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._n_failures = state_dict["n_failures"]

    @torch.no_grad()
    def _diversity(self) -> float:
        """Return the spread of fresh samples as a share of the training data's."""
        self._model.measure_batch_norm(self._context.generator("batch norm"))
        self._model.eval()
        samples = self._model.sample(N_COMPARED, self._context.generator("diversity"))
        self._model.train()
        return _spread(samples) / self._spread


def _spread(x: Tensor) -> float:
    """Return the standard deviation over examples, averaged over dimensions."""
    return max(x.flatten(1).std(dim=0).mean().item(), 1e-12)

"""Models of time: IML whose base distribution is one of sequences of latents."""

from __future__ import annotations

from typing import ClassVar, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from imlbench import Examples, FitContext, Kind, Space
from imlbench.densities import Density, GaussianHMM
from imlbench.networks import require_at_most
from imlbench_iml.autoencoders import IMLParams
from imlbench_iml.models import IML, Latents
from imlbench_iml.recurrent import RecurrentMixture

P = TypeVar("P", bound=IMLParams)


class SequenceIML(IML[P]):
    """IML whose base distribution is one of sequences; its samples follow each other in time."""

    kinds: ClassVar[frozenset[Kind]] = frozenset({"sequence"})
    is_sequential = True


class IMLHMMParams(IMLParams):
    """Parameters of ``iml-hmm``."""

    n_states: int = Field(300, ge=1)
    """Hidden states; at most as many as there are training chunks."""
    transition_prior: float = Field(0.01, ge=0)
    """Added to every expected count of starts and of transitions, so that what the training
    recordings lack is improbable, not impossible."""
    variance_prior: float = Field(0.001, ge=0)
    """Chunks of average variance that every state is given beside its own, so that a state of few
    chunks is not too narrow."""
    backend: Literal["torch", "hmmlearn"] = "torch"
    """What fits the hidden Markov model. hmmlearn is slower; it is there to check torch's fit on
    data of one's own. It follows the likelihood of the training data, and ignores the validation
    data."""


class IMLHMM(SequenceIML[IMLHMMParams]):
    """IML with a hidden Markov model as base distribution, as in the paper's audio experiments.

    Each state emits latents of independent Gaussian coordinates. That assumption depends on the
    axes, so the latents are turned to the principal axes of the training chunks'.
    """

    name = "iml-hmm"
    density: GaussianHMM
    axes: Tensor

    def __init__(self, params: IMLHMMParams, space: Space) -> None:
        super().__init__(params, space)
        self.register_buffer("axes", torch.eye(params.latent_dim))

    def make_density(self) -> Density:
        """Return a hidden Markov model with diagonal covariances."""
        p = self.params
        return GaussianHMM(
            p.latent_dim, p.n_states, transition_prior=p.transition_prior, backend=p.backend
        )

    def fit(self, train: Examples, valid: Examples, context: FitContext) -> None:
        """Train the auto-encoder, unless it is known already, then the hidden Markov model."""
        n_states = self.params.n_states
        require_at_most("n_states", n_states, len(train), "the number of training chunks")
        self.axes.copy_(torch.eye(len(self.axes)))
        super().fit(train, valid, context)

    def fit_density(self, train: Latents, valid: Latents, context: FitContext) -> None:
        """Choose the axes, and fit the hidden Markov model to latents along them.

        Its prior of the variances is in units of the latents'.
        """
        h = train.h
        centred = (h - h.mean(0)).double().nan_to_num()  # the density will refuse what is no number
        variance, axes = torch.linalg.eigh(centred.T @ centred / len(h))
        self.axes.copy_(axes)
        self.density.variance_prior = self.params.variance_prior * variance.mean().item()
        train, valid = (latents._replace(h=latents.h @ self.axes) for latents in (train, valid))
        super().fit_density(train, valid, context)

    def encode(self, x: Tensor) -> Tensor:
        """Return the latents along the axes, (N, K)."""
        return super().encode(x) @ self.axes

    def decode(self, h: Tensor) -> Tensor:
        """Return chunks for latents along the axes, (N, K)."""
        return super().decode(h @ self.axes.mT)


class IMLRNNParams(IMLParams):
    """Parameters of ``iml-rnn``."""

    n_components: int = Field(30, ge=1)
    """Components of the mixture that the network predicts, with diagonal covariances; at most as
    many as there are training chunks."""
    n_units: int = Field(64, ge=1)
    """Units of the recurrent layer."""
    n_steps: int = Field(1000, ge=1)
    """Most steps of Adam; held-out recordings decide when to stop."""


class IMLRNN(SequenceIML[IMLRNNParams]):
    """IML with a recurrent network as base distribution: a mixture given everything before.

    It is fitted to recordings that follow each other as if they were one, and learns by itself
    where one ends and what comes then; so what it generates goes on to the next recording.
    """

    name = "iml-rnn"
    density: RecurrentMixture

    def make_density(self) -> Density:
        """Return a recurrent network with mixture-density output."""
        p = self.params
        return RecurrentMixture(p.latent_dim, p.n_components, n_units=p.n_units, max_iter=p.n_steps)

    def fit(self, train: Examples, valid: Examples, context: FitContext) -> None:
        """Train the auto-encoder, unless it is known already, then the recurrent network."""
        n_components = self.params.n_components
        require_at_most("n_components", n_components, len(train), "the number of training chunks")
        super().fit(train, valid, context)

    def fit_density(self, train: Latents, valid: Latents, context: FitContext) -> None:
        """Fit the network to all recordings as one."""
        super().fit_density(train._replace(lengths=None), valid._replace(lengths=None), context)
        context.record(n_steps=self.density.n_iter)

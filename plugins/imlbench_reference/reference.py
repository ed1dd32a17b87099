"""Rows that every leaderboard should have beside its models.

A model that scores below ``reference-train`` on a metric of sample quality is beaten by copying the
training set; a metric on which ``reference-kmeans`` is far above ``reference-train`` rewards
averages more than data. On sequences, what ``reference-recordings`` is above ``reference-train``
is what a metric gives for the order of time.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import IncrementalPCA
from torch import Tensor

from imlbench import Examples, FitContext, Kind, Model, ParameterError, Params, Space
from imlbench.densities import GaussianMixture

VECTORS_AND_IMAGES: frozenset[Kind] = frozenset({"vector", "image"})


class _StoredExamples(Model):
    """A model whose samples are taken from a fixed list, without repetition while it lasts."""

    family = "reference"

    def __init__(self, params: Any, space: Space) -> None:
        super().__init__(params, space)
        capacity = params.n_examples
        self.register_buffer("examples", torch.zeros(capacity, *space.event_shape))
        self.register_buffer("n_examples", torch.tensor(0))

    def _store(self, examples: Tensor) -> None:
        self.examples[: len(examples)] = examples
        self.n_examples.fill_(len(examples))

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw from the list; it is repeated, shuffled anew, if it is shorter than ``n``."""
        available = int(self.n_examples)
        rounds = -(-n // available)
        order = [
            torch.randperm(available, generator=generator, device=generator.device)
            for _ in range(rounds)
        ]
        return self.examples[torch.cat(order)[:n]]


class ReferenceTrain(_StoredExamples):
    """Real training examples as samples: what copying the data scores."""

    name = "reference-train"

    class Params(Params):
        """Parameters of ``reference-train``."""

        n_examples: int = Field(3000, ge=1)
        """Training examples to keep, chosen by seed; all if there are fewer."""

    def fit(self, train: Examples, valid: Examples, context: FitContext) -> None:
        """Choose the examples."""
        generator = context.generator("choice", "cpu")
        chosen = torch.randperm(len(train), generator=generator)[: self.params.n_examples]
        self._store(train[chosen.to(train.stored.device)])


class ReferenceRecordings(_StoredExamples):
    """Real training recordings as samples, in order: what copying them scores."""

    name = "reference-recordings"
    kinds: frozenset[Kind] = frozenset({"sequence"})

    class Params(Params):
        """Parameters of ``reference-recordings``."""

        n_examples: int = Field(5000, ge=1)
        """Successive training chunks to keep, where they begin is chosen by seed; all if there are
        fewer."""

    def fit(self, train: Examples, valid: Examples, context: FitContext) -> None:
        """Choose a stretch of the recordings."""
        n_starts = max(0, len(train) - self.params.n_examples) + 1
        start = self._below(n_starts, context.generator("choice", "cpu"))
        self._store(train[torch.arange(start, min(start + self.params.n_examples, len(train)))])

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Go on from a random chunk, and from the end to the beginning."""
        available = int(self.n_examples)
        start = self._below(available, generator)
        return self.examples[torch.arange(start, start + n) % available]

    @staticmethod
    def _below(n: int, generator: torch.Generator) -> int:
        return int(torch.randint(n, (), generator=generator, device=generator.device))


class ReferenceKMeans(_StoredExamples):
    """Centroids of the training set as samples: what averages score (mini-batch k-means)."""

    name = "reference-kmeans"

    class Params(Params):
        """Parameters of ``reference-kmeans``."""

        n_examples: int = Field(1000, ge=1)
        """Number of centroids; at most the number of training examples."""
        epochs: int = Field(5, ge=1)
        """Passes over the training set."""

    def fit(self, train: Examples, valid: Examples, context: FitContext) -> None:
        """Cluster the training set."""
        n_centroids = min(self.params.n_examples, len(train))
        generator = context.generator("shuffle")
        kmeans = MiniBatchKMeans(
            n_centroids, init="random", n_init=1, random_state=context.seed, reassignment_ratio=0
        )
        for epoch in range(1, self.params.epochs + 1):
            inertia, n_seen = 0.0, 0
            for x in train.batches(max(5000, 2 * n_centroids), generator):
                if len(x) >= n_centroids:
                    kmeans.partial_fit(x.flatten(1).cpu().numpy())
                    inertia, n_seen = inertia + float(kmeans.inertia_), n_seen + len(x)
            context.report("kmeans", epoch, self.params.epochs, inertia=inertia / n_seen)
        centroids = torch.from_numpy(kmeans.cluster_centers_).float()
        self._store(centroids.unflatten(1, self.space.event_shape).to(self.examples.device))


class ReferenceGMM(Model):
    r"""A Gaussian mixture on the whitened principal components of the data: no network at all.

    :math:`x = \mu + U \operatorname{diag}(s)\, z`, with a mixture for z; what the components leave
    out is not modelled.
    """

    name = "reference-gmm"
    family = "reference"
    kinds = VECTORS_AND_IMAGES

    class Params(Params):
        """Parameters of ``reference-gmm``."""

        n_dims: int | None = Field(None, ge=1)
        """Number of principal components; by default 50, or all if the data have fewer."""
        n_components: int = Field(30, ge=1)
        """Components of the mixture, each with a full covariance."""

    def __init__(self, params: Any, space: Space) -> None:
        super().__init__(params, space)
        self.register_buffer("mean", torch.zeros(space.n_dims))
        self.register_buffer("directions", torch.zeros(params.n_dims, space.n_dims))
        self.density = GaussianMixture(params.n_dims, n_components=params.n_components)

    @classmethod
    def resolve(cls, params: Any, space: Space) -> Any:
        """Fill in the number of principal components."""
        n_dims = params.n_dims or min(50, space.n_dims)
        if n_dims > space.n_dims:
            problem = f"must be at most {space.n_dims}, the dimensions of the data; got {n_dims}."
            raise ParameterError("n_dims", problem)
        return params.model_copy(update={"n_dims": n_dims})

    def fit(self, train: Examples, valid: Examples, context: FitContext) -> None:
        """Find the principal components batch by batch, then fit the mixture to the scores."""
        pca = IncrementalPCA(self.params.n_dims)
        for x in train.batches(5000):
            if len(x) >= self.params.n_dims:
                pca.partial_fit(x.flatten(1).cpu().numpy())
        deviations = torch.from_numpy(pca.singular_values_ / len(train) ** 0.5)
        deviations = deviations.clamp_min(1e-6 * deviations.max())  # constant dimensions
        self.mean.copy_(torch.from_numpy(pca.mean_))
        self.directions.copy_(torch.from_numpy(pca.components_) * deviations[:, None])
        self.density.fit(
            self._embed(train),
            valid=self._embed(valid),
            generator=context.generator("density"),
            report=lambda step, n_steps, value: context.report(
                "density", step, n_steps, log_likelihood=value
            ),
        )

    def _embed(self, split: Examples) -> Tensor:
        return torch.cat([self.encode(x) for x in split.batches(5000)])

    def encode(self, x: Tensor) -> Tensor:
        """Return the whitened principal components (N, n_dims)."""
        inverse = self.directions / self.directions.square().sum(1, keepdim=True)
        return (x.flatten(1) - self.mean) @ inverse.mT

    def decode(self, h: Tensor) -> Tensor:
        """Return data for whitened principal components."""
        return (self.mean + h @ self.directions).unflatten(1, self.space.event_shape)

    def base_log_prob(self, x: Tensor) -> Tensor:
        """Return the log-density of the whitened principal components, nats, (N,)."""
        return self.density.log_prob(self.encode(x))

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw from the mixture and map back to data space."""
        return self.decode(self.density.sample(n, generator).float())

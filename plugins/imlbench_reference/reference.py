"""Rows that every leaderboard should have beside its models.

A model that scores below ``reference-train`` on a metric of sample quality is beaten by copying the
training set; a metric on which ``reference-kmeans`` is far above ``reference-train`` rewards
averages more than data. On sequences, what ``reference-recordings`` is above ``reference-train``
is what a metric gives for the order of time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from imlbench import Examples, FitContext, Kind, Model, Params, Space, from_data
from imlbench.densities import GaussianMixture
from imlbench.networks import require_at_most

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator

VECTORS_AND_IMAGES: frozenset[Kind] = frozenset({"vector", "image"})


class StoredParams(Params):
    """Parameters of a model that keeps examples."""

    n_examples: int = Field(ge=1)
    """Examples to keep."""


P = TypeVar("P", bound=StoredParams)


class _StoredExamples(Model[P]):
    """A model whose samples are taken from a fixed list, without repetition while it lasts."""

    family = "reference"
    examples: Tensor
    n_examples: Tensor

    def __init__(self, params: P, space: Space) -> None:
        super().__init__(params, space)
        capacity = params.n_examples
        self.register_buffer("examples", torch.zeros(capacity, *space.event_shape))
        self.register_buffer("n_examples", torch.tensor(0))

    def _store(self, examples: Tensor, context: FitContext) -> None:
        context.record(n_examples=len(examples))
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


class ReferenceTrainParams(StoredParams):
    """Parameters of ``reference-train``."""

    n_examples: int = Field(3000, ge=1)
    """Training examples to keep, chosen by seed; all if there are fewer."""


class ReferenceTrain(_StoredExamples[ReferenceTrainParams]):
    """Real training examples as samples: what copying the data scores."""

    name = "reference-train"

    def fit(self, train: Examples, valid: Examples, context: FitContext) -> None:
        """Choose the examples."""
        generator = context.generator("choice", "cpu")
        chosen = torch.randperm(len(train), generator=generator)[: self.params.n_examples]
        self._store(train[chosen.to(train.stored.device)], context)


class ReferenceRecordingsParams(StoredParams):
    """Parameters of ``reference-recordings``."""

    n_examples: int = Field(5000, ge=1)
    """Successive training chunks to keep, where they begin is chosen by seed; all if there are
    fewer."""


class ReferenceRecordings(_StoredExamples[ReferenceRecordingsParams]):
    """Real training recordings as samples, in order: what copying them scores."""

    name = "reference-recordings"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"sequence"})

    def fit(self, train: Examples, valid: Examples, context: FitContext) -> None:
        """Choose a stretch of the recordings."""
        n_starts = max(0, len(train) - self.params.n_examples) + 1
        start = self._below(n_starts, context.generator("choice", "cpu"))
        stop = min(start + self.params.n_examples, len(train))
        self._store(train[torch.arange(start, stop)], context)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Go on from a random chunk, and from the end to the beginning."""
        available = int(self.n_examples)
        start = self._below(available, generator)
        return self.examples[torch.arange(start, start + n) % available]

    @staticmethod
    def _below(n: int, generator: torch.Generator) -> int:
        return int(torch.randint(n, (), generator=generator, device=generator.device))


class ReferenceKMeansParams(StoredParams):
    """Parameters of ``reference-kmeans``."""

    n_examples: int = Field(1000, ge=1)
    """Number of centroids; at most the number of training examples."""
    epochs: int = Field(5, ge=1)
    """Passes over the training set."""


class ReferenceKMeans(_StoredExamples[ReferenceKMeansParams]):
    """Centroids of the training set as samples: what averages score (mini-batch k-means)."""

    name = "reference-kmeans"

    def fit(self, train: Examples, valid: Examples, context: FitContext) -> None:
        """Cluster the training set."""
        from sklearn.cluster import MiniBatchKMeans

        n_centroids = min(self.params.n_examples, len(train))
        generator = context.generator("shuffle")
        kmeans = MiniBatchKMeans(
            n_centroids, init="random", n_init=1, random_state=context.seed, reassignment_ratio=0
        )
        for epoch in context.steps("kmeans", self.params.epochs, _Estimator(kmeans)):
            inertia, n_seen = 0.0, 0
            for x in train.batches(max(5000, 2 * n_centroids), generator):
                if len(x) >= n_centroids:
                    kmeans.partial_fit(x.flatten(1).cpu().numpy())
                    inertia, n_seen = inertia + float(kmeans.inertia_), n_seen + len(x)
            context.report("kmeans", epoch, self.params.epochs, inertia=inertia / n_seen)
        centroids = torch.from_numpy(kmeans.cluster_centers_).float().to(self.examples.device)
        self._store(centroids.unflatten(1, self.space.event_shape), context)


class _Estimator:
    """The arrays and numbers of an estimator that is fitted batch by batch, as a state.

    A random state is none of them: mini-batch k-means draws its first centroids, and after that
    only replacements, of which there are none here.
    """

    def __init__(self, estimator: BaseEstimator) -> None:
        self._estimator = estimator

    def state_dict(self) -> dict[str, Any]:
        arrays = {n: np.asarray(v) for n, v in vars(self._estimator).items() if _is_numeric(v)}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self._estimator, name, value.numpy() if value.ndim else value.item())


def _is_numeric(value: object) -> bool:
    return isinstance(value, np.ndarray | np.number | int | float)


class ReferenceGMMParams(Params):
    """Parameters of ``reference-gmm``."""

    n_dims: int = from_data(ge=1)
    """Number of principal components; by default 50, or all if the data have fewer."""
    n_components: int = Field(30, ge=1)
    """Components of the mixture, each with a full covariance."""


class ReferenceGMM(Model[ReferenceGMMParams]):
    r"""A Gaussian mixture on the whitened principal components of the data: no network at all.

    :math:`x = \mu + U \operatorname{diag}(s)\, z`, with a mixture for z; what the components leave
    out is not modelled.
    """

    name = "reference-gmm"
    family = "reference"
    kinds = VECTORS_AND_IMAGES
    mean: Tensor
    directions: Tensor

    def __init__(self, params: ReferenceGMMParams, space: Space) -> None:
        super().__init__(params, space)
        self.register_buffer("mean", torch.zeros(space.n_dims))
        self.register_buffer("directions", torch.zeros(params.n_dims, space.n_dims))
        self.density = GaussianMixture(params.n_dims, n_components=params.n_components)

    @classmethod
    def resolve(cls, params: ReferenceGMMParams, space: Space) -> ReferenceGMMParams:
        """Fill in the number of principal components."""
        params = params.filled(n_dims=min(50, space.n_dims))
        require_at_most("n_dims", params.n_dims, space.n_dims, "the dimensions of the data")
        return params

    def fit(self, train: Examples, valid: Examples, context: FitContext) -> None:
        """Find the principal components batch by batch, then fit the mixture to the scores."""
        from sklearn.decomposition import IncrementalPCA

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

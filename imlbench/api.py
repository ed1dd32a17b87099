"""The contracts: what a plugin implements, and what the harness hands to it."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import platformdirs
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from imlbench.errors import DataError

Kind = Literal["vector", "image", "sequence"]
KINDS: frozenset[Kind] = frozenset({"vector", "image", "sequence"})


class Params(BaseModel):
    """Base of every plugin's parameters: frozen, and unknown names are errors.

    A docstring under a field is its help text. A field whose default is ``None`` may be filled in
    from the data by :meth:`Model.resolve`.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


@dataclass(frozen=True)
class Space:
    """What one example is, known before any data are read.

    Arguments:
        kind: ``"vector"``, ``"image"`` (channels first) or ``"sequence"`` (a chunk of a recording).
        event_shape: The shape of one example, such as ``(1, 28, 28)``.
        value_range: Smallest and largest possible value, or ``None`` where values have no bounds.

    Example:
        >>> Space("image", (1, 28, 28), (0.0, 1.0)).n_dims
        784
    """

    kind: Kind
    event_shape: tuple[int, ...]
    value_range: tuple[float, float] | None = None

    @property
    def n_dims(self) -> int:
        """The number of scalars in one example."""
        return math.prod(self.event_shape)


class Examples:
    r"""One split of a dataset: stored compactly, read as float32.

    Reading gives ``stored * scale + offset``. Storage may be uint8 and may lie in a memory-mapped
    file, so that no run holds a float copy of a large set.

    Arguments:
        stored: The stored values, shape :math:`(N, *event\_shape)`.
        scale: Factor from stored values to values of the dataset's range.
        offset: Added after scaling.
        lengths: For sequences, the number of chunks of each recording, in order; sums to :math:`N`.

    Example:
        >>> pixels = torch.tensor([[0, 255], [51, 102]], dtype=torch.uint8)
        >>> Examples(pixels, scale=1 / 255)[1]
        tensor([0.2000, 0.4000])
    """

    def __init__(
        self,
        stored: Tensor,
        *,
        scale: float = 1.0,
        offset: float = 0.0,
        lengths: tuple[int, ...] | None = None,
    ) -> None:
        self.stored, self.scale, self.offset, self.lengths = stored, scale, offset, lengths

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, index: Any) -> Tensor:
        return self.stored[index].to(torch.float32).mul(self.scale).add_(self.offset)

    def to(self, device: torch.device) -> Examples:
        """Return the same examples with their storage on ``device``."""
        return Examples(
            self.stored.to(device), scale=self.scale, offset=self.offset, lengths=self.lengths
        )

    def batches(
        self, batch_size: int, generator: torch.Generator | None = None
    ) -> Iterator[Tensor]:
        r"""Yield all examples once, in order, or shuffled if a generator is given.

        Arguments:
            batch_size: Examples per batch; the last batch may be smaller.
            generator: Source of the permutation, on the device of the storage.

        Yields:
            float32 tensors of shape :math:`(B, *event\_shape)`.
        """
        if generator is None:
            for start in range(0, len(self), batch_size):
                yield self[start : start + batch_size]
            return
        order = torch.randperm(len(self), generator=generator, device=generator.device)
        for chosen in order.to(self.stored.device).split(batch_size):
            yield self[chosen]

    def digest(self) -> str:
        """Return the SHA-256 of the decoded content: storage, scale, offset and lengths."""
        header = f"{tuple(self.stored.shape)} {self.stored.dtype} {self.scale} {self.offset}"
        content = hashlib.sha256(f"{header} {self.lengths}".encode())
        for part in self.stored.split(4096):
            content.update(part.contiguous().numpy().data)
        return content.hexdigest()


@dataclass
class Splits:
    """A loaded dataset.

    Arguments:
        train: What models are fitted to.
        valid: For early stopping and for choosing settings of a metric; never part of ``test``.
        test: What metrics are computed on.
        fingerprint: Hash of the decoded content; computed if not given.
    """

    train: Examples
    valid: Examples
    test: Examples
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if not self.fingerprint:
            digests = " ".join(part.digest() for part in (self.train, self.valid, self.test))
            self.fingerprint = hashlib.sha256(digests.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Sources:
    """Where datasets look for their files.

    Arguments:
        data_dir: The folder named on the command line, if any; it comes first.
        offline: Never touch the network.
    """

    data_dir: Path | None = None
    offline: bool = False

    @property
    def cache_dir(self) -> Path:
        """The user's cache folder, where downloads and decoded data go."""
        return Path(os.environ.get("IMLBENCH_CACHE") or platformdirs.user_cache_dir("imlbench"))

    @property
    def directories(self) -> tuple[Path, ...]:
        """The folders to look in, in order: ``--data-dir``, ``$IMLBENCH_DATA``, the cache."""
        environment = os.environ.get("IMLBENCH_DATA")
        named = (self.data_dir, Path(environment) if environment else None, self.cache_dir)
        return tuple(folder for folder in named if folder is not None)

    def find(self, relative: str) -> Path | None:
        """Return the first existing ``folder / relative``, or ``None``."""
        for path in (folder / relative for folder in self.directories):
            with contextlib.suppress(OSError):  # a folder that may not be searched
                if path.exists():
                    return path
        return None

    def missing(self, dataset: str, relative: str, remedy: str) -> DataError:
        """Return the error that says where ``relative`` was looked for, and what to do."""
        looked = ", ".join(str(folder) for folder in self.directories)
        return DataError(f"dataset {dataset}: {relative} not found; looked in {looked}. {remedy}")


class Dataset(ABC):
    """A dataset plugin: a name, parameters, the space of its examples, and how to load them.

    Loading is deterministic: the same parameters and files give the same splits. A dataset whose
    distribution is known may have a method ``log_prob(x) -> (N,)`` in nats, and, if it is a
    mixture, ``mode(x) -> (N,)``, the component that each point belongs to. A method
    ``draw(evaluation, folder)`` may write figures or audio of its own into a job's folder.
    """

    name: ClassVar[str]
    Params: ClassVar[type[Params]] = Params

    def __init__(self, params: Any) -> None:
        self.params = params

    @property
    @abstractmethod
    def space(self) -> Space:
        """What one example is; must not read any data."""

    @abstractmethod
    def load(self, sources: Sources) -> Splits:
        """Read the data.

        Raises:
            DataError: Files are missing or damaged; the message names the file and the remedy.
        """

    def can(self, capability: str) -> bool:
        """Whether this dataset, with these parameters, has the named method."""
        return callable(getattr(self, capability, None))


class FitContext(ABC):
    """What the harness offers to a model while it is fitted.

    Attributes:
        device: Where to compute.
        seed: The job's seed.
    """

    device: torch.device
    seed: int

    @abstractmethod
    def generator(self, purpose: str, device: torch.device | str | None = None) -> torch.Generator:
        """Return a fresh generator, determined by the job's seed and ``purpose``.

        Draws for one purpose do not depend on how many were made for another, so that a stage
        comes out the same whether an earlier one was computed or found in the cache.

        Arguments:
            purpose: A name, such as ``"shuffle"``.
            device: Where it lives; by default the job's device.
        """

    @abstractmethod
    def report(self, stage: str, step: int, n_steps: int, **values: float) -> None:
        """Record values of one epoch or iteration; shown live and logged as curves.

        Arguments:
            stage: What is being fitted, such as ``"autoencoder"``.
            step: Epoch or iteration, counted from 1.
            n_steps: How many there will be at most.
            values: Losses, log-likelihoods, …

        Raises:
            Diverged: A value is NaN or infinite.
        """

    @abstractmethod
    def fit_once(
        self, stage: str, module: nn.Module, settings: Mapping[str, Any], fit: Callable[[], None]
    ) -> None:
        """Fit ``module``, or load its state if any job has already fitted the same.

        Arguments:
            stage: Name of the stage, such as ``"autoencoder"``.
            module: What ``fit`` changes; its state is the result.
            settings: Everything that determines the result besides the dataset, the seed and the
                model's code: architecture, epochs, learning rate, …
            fit: Called only if the result is not in the cache.
        """


class Model(nn.Module, ABC):
    r"""A model plugin: a :class:`torch.nn.Module` that can be fitted and sampled.

    Its ``state_dict`` is its checkpoint, so that everything learnt must be a parameter or a buffer
    whose shape follows from ``params`` and ``space``. The harness calls all methods in evaluation
    mode, without gradients (but :meth:`fit`), inside a forked global random state seeded by the
    job: layers may be initialised the usual way.

    A model *can* do more by having more methods. ``x`` has shape :math:`(N, *event\_shape)`:

    ==================================  ==============================================
    ``encode(x)``, ``decode(h)``        latents :math:`(N, K)`, and back to data space
    ``base_log_prob(x)``                log-density of the latents, nats, :math:`(N,)`
    ``log_prob(x)``                     exact log-density of the data, nats, :math:`(N,)`
    ``log_prob_layerwise(x)``           the paper's sum over layers, nats, :math:`(N,)`
    ``log_prob_manifold(x)``            density on the decoder's manifold, nats, :math:`(N,)`
    ``sample_components(n, generator)`` samples, and the component :math:`(n,)` of each
    ``effective_components()``          how many components a mixture uses, a number
    ==================================  ==============================================

    Arguments:
        params: An instance of ``Params``, as :meth:`resolve` returned it.
        space: The space of the data.
    """

    name: ClassVar[str]
    family: ClassVar[str] = ""
    kinds: ClassVar[frozenset[Kind]] = KINDS
    Params: ClassVar[type[Params]] = Params

    def __init__(self, params: Any, space: Space) -> None:
        super().__init__()
        self.params = params
        self.space = space

    @classmethod
    def resolve(cls, params: Any, space: Space) -> Any:
        """Return the parameters with those defaults filled in that depend on the data.

        Called before anything is run; the result is what the job records.

        Raises:
            ParameterError: The parameters and the data contradict each other.
        """
        return params

    @abstractmethod
    def fit(self, train: Examples, valid: Examples, context: FitContext) -> None:
        """Learn from ``train``; their storage and the module are on ``context.device``.

        Raises:
            Diverged: Training failed numerically.
        """

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        r"""Draw ``n`` independent examples.

        Arguments:
            n: How many.
            generator: The only source of randomness, on the module's device.

        Returns:
            float32 of shape :math:`(n, *event\_shape)`.
        """

    def can(self, capability: str) -> bool:
        """Whether this model, with these parameters on this data, has the named method."""
        return callable(getattr(self, capability, None))


@dataclass(frozen=True)
class Score:
    """The value of a metric.

    Arguments:
        value: The value, in the metric's unit.
        stderr: Its standard error over test examples, where it has one.
        per_example: One value per test example, float64 of shape :math:`(N,)`, where it has them.
        settings: What the number depends on besides model and data, such as the bandwidth.
    """

    value: float
    stderr: float | None = None
    per_example: Tensor | None = None
    settings: dict[str, float | int | str] = field(default_factory=dict)

    @classmethod
    def mean(cls, per_example: Tensor, **settings: float | int | str) -> Score:
        r"""Return the mean of per-example values with its standard error :math:`s / \sqrt{N}`.

        Example:
            >>> Score.mean(torch.tensor([1.0, 2.0, 3.0])).value
            2.0
        """
        values = per_example.detach().to("cpu", torch.float64)
        stderr = (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None
        return cls(values.mean().item(), stderr, values, settings)


@dataclass(frozen=True)
class Evaluation:
    r"""What a metric may look at.

    Arguments:
        dataset: The dataset plugin.
        splits: Its data.
        samples: Stored samples of the model, shape :math:`(n\_draws, n\_samples, *event\_shape)`.
        model: The fitted model, in evaluation mode, on ``device``.
        device: Where to compute.
    """

    dataset: Dataset
    splits: Splits
    samples: Tensor
    model: Model
    device: torch.device

    def per_example(self, function: Callable[[Tensor], Tensor], split: Examples) -> Tensor:
        """Return ``function`` of every example of ``split``, computed in batches, on the CPU."""
        parts = [function(x.to(self.device)).cpu() for x in split.batches(1000)]
        return torch.cat(parts)


class Metric(ABC):
    """A metric plugin: one number for a fitted model, with its unit and direction.

    Class attributes:
        name: Its name, everywhere.
        unit: Such as ``"nats"``; empty for a pure number.
        higher_is_better: The direction; ``None`` for a number that is neither good nor bad.
        requires: Methods that the model must have, such as ``"log_prob"``.
        requires_of_dataset: Methods that the dataset must have, such as ``"log_prob"``.
        kinds: The kinds of data it makes sense for.
    """

    name: ClassVar[str]
    unit: ClassVar[str] = ""
    higher_is_better: ClassVar[bool | None]
    requires: ClassVar[frozenset[str]] = frozenset()
    requires_of_dataset: ClassVar[frozenset[str]] = frozenset()
    kinds: ClassVar[frozenset[Kind]] = KINDS

    @abstractmethod
    def compute(self, evaluation: Evaluation) -> Score:
        """Compute the score; called without gradients."""

"""What a metric plugin implements, what it may look at, and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pydantic import JsonValue
from torch import Tensor

from imlbench.api.data import Examples, Splits
from imlbench.api.dataset import AnyDataset
from imlbench.api.model import AnyModel
from imlbench.api.params import P, Parametrised
from imlbench.api.randomness import make_generator
from imlbench.api.space import KINDS, Kind

Tensors = dict[str, Tensor]
Cache = Callable[[str, Mapping[str, JsonValue], Callable[[], Tensors]], Tensors]


@dataclass(frozen=True)
class Score:
    """The value of a metric.

    Arguments:
        value: The value, in the metric's unit.
        stderr: Its standard error over test examples, or over their groups, where it has one.
        per_example: One value per test example, float64 of shape :math:`(N,)`, where it has them.
        groups: Which of them hang together, int64 of shape :math:`(N,)`; ``None`` if none do.
        settings: What the number depends on besides model and data, such as the bandwidth.
    """

    value: float
    stderr: float | None = None
    per_example: Tensor | None = None
    groups: Tensor | None = None
    settings: dict[str, float | int | str] = field(default_factory=dict)

    @classmethod
    def mean(
        cls, per_example: Tensor, groups: Tensor | None = None, **settings: float | int | str
    ) -> Score:
        r"""Return the mean of per-example values with its standard error.

        .. math:: \frac 1 N \sqrt{\frac{G}{G - 1} \sum_{g=1}^G
            \Bigl(\sum_{n \in g} (v_n - \bar v) \Bigr)^2}

        with G groups g; without groups every example is its own, and this is :math:`s / \sqrt{N}`.

        Arguments:
            per_example: One value for every test example, shape :math:`(N,)`.
            groups: Which of them hang together, int64 of shape :math:`(N,)`, such as
                ``Examples.groups``.
            settings: What the value depends on.
        """
        values = per_example.detach().to("cpu", torch.float64)
        deviations = values - values.mean()
        if groups is not None:
            groups = groups.cpu()
            members = groups.unique(return_inverse=True)[1]
            deviations = deviations.new_zeros(int(members.max()) + 1).index_add_(
                0, members, deviations
            )
        n_groups = len(deviations)
        stderr = None
        if n_groups > 1:
            correction = n_groups / (n_groups - 1)
            stderr = (correction * deviations.square().sum()).sqrt().item() / len(values)
        return cls(values.mean().item(), stderr, values, groups, settings)


@dataclass(frozen=True)
class Evaluation:
    r"""What a metric or an artifact may look at.

    Arguments:
        dataset: The dataset plugin.
        splits: Its data.
        draws: Stored samples of the model, shape :math:`(n\_draws, n\_samples, *event\_shape)`;
            ``None`` for a metric that does not need them.
        model: The fitted model, in evaluation mode, on ``device``.
        device: Where to compute.
        seed: What generators follow from.
        cache: Where :meth:`once` keeps what it computed; without one, it computes every time.
    """

    dataset: AnyDataset
    splits: Splits
    draws: Tensor | None
    model: AnyModel
    device: torch.device
    seed: int = 0
    cache: Cache | None = None

    @property
    def samples(self) -> Tensor:
        """The draws.

        Raises:
            RuntimeError: The metric does not say that it needs them.
        """
        if self.draws is None:
            raise RuntimeError("a metric that looks at samples must say needs_samples = True")
        return self.draws

    def per_example(self, function: Callable[[Tensor], Tensor], split: Examples) -> Tensor:
        """Return ``function`` of every example of ``split``, computed in batches, on the CPU."""
        parts = [function(x.to(self.device)).cpu() for x in split.batches(1000)]
        return torch.cat(parts)

    def generator(self, purpose: str, device: torch.device | str | None = None) -> torch.Generator:
        """Return a fresh generator, determined by the job's seed and ``purpose``.

        Arguments:
            purpose: A name, such as ``"bootstrap"``.
            device: Where it lives; by default the job's device.
        """
        return make_generator(self.seed, purpose, device or self.device)

    def once(
        self, name: str, settings: Mapping[str, JsonValue], compute: Callable[[], Tensors]
    ) -> Tensors:
        """Return what ``compute`` returns, computed once for all jobs on the same data.

        For what follows from the data alone, such as features of the test split: never for
        anything that depends on the model, its samples or the seed.

        Arguments:
            name: A name, such as ``"features"``; each metric has names of its own.
            settings: Everything that determines the result besides the data and the metric's code.
            compute: Called only if the result is not in the cache.
        """
        return compute() if self.cache is None else self.cache(name, settings, compute)


class Metric(Parametrised[P], ABC):
    """A metric plugin: one number for a fitted model, with its unit and direction.

    Class attributes:
        unit: Such as ``"nats"``; empty for a pure number.
        higher_is_better: The direction; ``None`` for a number that is neither good nor bad.
        value_range: The least and the greatest possible value, ``None`` where there is no bound.
        reference: Where it is defined: a paper, a link.
        position: Where its column stands; smaller ones come first, then the names' order decides.
        needs_samples: Whether it looks at samples; if not, other draws leave its score as it is.
        requires: Capabilities that the model must have, such as ``(LogProb,)``.
        requires_of_dataset: Capabilities that the dataset must have.
        kinds: The kinds of data it makes sense for.

    Arguments:
        params: The parameters, of the class in the brackets: ``class KDE(Metric[KDEParams])``.
    """

    unit: ClassVar[str] = ""
    higher_is_better: ClassVar[bool | None]
    value_range: ClassVar[tuple[float | None, float | None]] = (None, None)
    reference: ClassVar[str] = ""
    position: ClassVar[int] = 100
    needs_samples: ClassVar[bool] = False
    requires: ClassVar[tuple[type[object], ...]] = ()
    requires_of_dataset: ClassVar[tuple[type[object], ...]] = ()
    kinds: ClassVar[frozenset[Kind]] = KINDS

    def __init__(self, params: P) -> None:
        self.params = params

    @abstractmethod
    def compute(self, evaluation: Evaluation) -> Score:
        """Compute the score; called without gradients."""


AnyMetric = Metric[Any]
"""A metric of whatever parameters: what the harness handles."""

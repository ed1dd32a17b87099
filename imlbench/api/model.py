"""What a model plugin implements, and what it is given while it is fitted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Protocol

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from imlbench.api.capabilities import Capable
from imlbench.api.data import Examples
from imlbench.api.params import P, Parametrised
from imlbench.api.randomness import make_generator
from imlbench.api.space import KINDS, Kind, Space


class Stateful(Protocol):
    """What can say its state and take it back: a module, an optimiser, a learning-rate schedule.

    A state is made of dictionaries, lists, tuples, tensors, numbers and strings.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return everything that changes from step to step."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object:
        """Take a state back that an equal object, newly made, has returned."""


class FitContext(ABC):
    """What the harness offers to a model while it is fitted.

    Attributes:
        device: Where to compute.
        seed: The job's seed.
    """

    device: torch.device
    seed: int

    def generator(self, purpose: str, device: torch.device | str | None = None) -> torch.Generator:
        """Return a fresh generator, determined by the job's seed and ``purpose``.

        Draws for one purpose do not depend on how many were made for another, so that a stage
        comes out the same whether an earlier one was computed or found in the cache.

        Arguments:
            purpose: A name, such as ``"shuffle"``.
            device: Where it lives; by default the job's device.
        """
        return make_generator(self.seed, purpose, device or self.device)

    def steps(self, stage: str, n_steps: int, *parts: Stateful | torch.Generator) -> Iterable[int]:
        """Count the steps of a loop, 1 to ``n_steps``, from where an interrupted fit was.

        After every step the harness may keep the state of the parts. If the process ends, a later
        fit of the same job puts it back into parts that were made anew, and counts on from there;
        a loop that was finished is left out. The result is that of a fit without interruption.

        Arguments:
            stage: What is being fitted, as in :meth:`report`.
            n_steps: How many there will be at most.
            parts: Everything that the steps change or depend on and that they have changed:
                modules, optimisers, schedules, counters. Generators of :meth:`generator` that
                were made before the loop, the global random states, and what was reported and
                recorded are kept without being named; generators of your own are not. Without any
                parts, the loop always begins at 1.

        Example::

            for epoch in context.steps("vae", 20, self, optimizer):
                context.report("vae", epoch, 20, loss=train_one_epoch())
        """
        return range(1, n_steps + 1)

    @abstractmethod
    def report(self, stage: str, step: int, n_steps: int, **values: float) -> None:
        """Record values of one epoch or iteration; shown live and logged as curves.

        Arguments:
            stage: What is being fitted, such as ``"autoencoder"``.
            step: Epoch or iteration, counted from 1.
            n_steps: How many there will be at most.
            values: Losses, log-likelihoods, ...

        Raises:
            Diverged: A value is NaN or infinite.
        """

    @abstractmethod
    def record(self, **facts: JsonValue) -> None:
        """Record what was really used where it may differ from the parameters: batch size, steps.

        Arguments:
            facts: By name; where a parameter has that name, the fact is shown in its place.
        """

    @abstractmethod
    def fit_once(
        self,
        stage: str,
        module: nn.Module,
        settings: Mapping[str, JsonValue],
        fit: Callable[[], None],
    ) -> None:
        """Fit ``module``, or load its state if any job has already fitted the same.

        What identifies the result besides ``settings`` are the data, the seed, and the code of the
        class of ``module`` and of the function ``fit``, with all that their modules import.

        Arguments:
            stage: Name of the stage, such as ``"autoencoder"``.
            module: What ``fit`` changes; its state is the result.
            settings: Everything else that determines the result: architecture, epochs, ...
            fit: Called only if the result is not in the cache. A bound method or a
                :func:`functools.partial` of a function that stands beside the module's class: a
                lambda would add the code of the module where it is written.
        """


class Model(nn.Module, Parametrised[P], Capable, ABC):
    r"""A model plugin: a :class:`torch.nn.Module` that can be fitted and sampled.

    Its ``state_dict`` is its checkpoint, so that everything learnt must be a parameter or a buffer
    whose shape follows from ``params`` and ``space``. The harness calls all methods in evaluation
    mode, without gradients (but :meth:`fit`), inside a forked global random state seeded by the
    job: layers may be initialised the usual way.

    A model *can* do more by having more methods, those of the protocols in
    :mod:`imlbench.api.capabilities`: ``encode`` and ``decode``, ``log_prob``, ...

    Arguments:
        params: The parameters, as :meth:`resolve` returned them, of the class in the brackets:
            ``class VAE(Model[VAEParams])``.
        space: The space of the data.
    """

    family: ClassVar[str] = ""
    kinds: ClassVar[frozenset[Kind]] = KINDS

    def __init__(self, params: P, space: Space) -> None:
        super().__init__()
        self.params = params
        self.space = space

    @classmethod
    def resolve(cls, params: P, space: Space) -> P:
        """Return the parameters complete for the data.

        Defaults that depend on the data are filled in, and what does not apply to them is left
        without a value. Called before anything is run; the result is what the job records.

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


AnyModel = Model[Any]
"""A model of whatever parameters: what the harness handles."""

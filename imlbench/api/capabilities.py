r"""What a model or a dataset may offer beyond the contract: one protocol each, one answer each.

An instance has a capability if ``hasattr`` says so, and :func:`available_if` lets that depend on
its parameters and its data. ``x`` stands for data of shape :math:`(N, *event\_shape)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any, Protocol, TypeVar, cast

from torch import Generator, Tensor


class LogProb(Protocol):
    """The exact density, of a model or of data whose distribution is known."""

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log-density of the data, nats, shape (N,)."""
        ...


class LogProbLayerwise(Protocol):
    """The density of a decoder that widens, as the paper computes it."""

    def log_prob_layerwise(self, x: Tensor) -> Tensor:
        """Return the log-density with the layers' own volumes added up, nats, shape (N,)."""
        ...


class LogProbManifold(Protocol):
    """The density of a decoder that widens, with its true volume."""

    def log_prob_manifold(self, x: Tensor) -> Tensor:
        """Return the log-density on the decoder's manifold, nats, shape (N,)."""
        ...


class BaseLogProb(Protocol):
    """The density of the latents."""

    def base_log_prob(self, x: Tensor) -> Tensor:
        """Return the log-density of the latents of x, without any volume, nats, shape (N,)."""
        ...


class BaseLogProbSequence(Protocol):
    """The density of latents that follow each other in time."""

    def base_log_prob_sequence(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        r"""Return the log-density of every chunk's latents, given the chunks before it.

        Arguments:
            x: The chunks of whole recordings, shape :math:`(N, *event\_shape)`.
            lengths: The number of chunks of each recording; sums to N.

        Returns:
            :math:`\log p_0(h_t \mid h_1, \dots, h_{t-1})` in nats, shape (N,). If the base
            distribution takes chunks as exchangeable, :math:`\log p_0(h_t)`.
        """
        ...


class Autoencoding(Protocol):
    """Latents, and a way back to the data."""

    def encode(self, x: Tensor) -> Tensor:
        """Return the latents, shape (N, K)."""
        ...

    def decode(self, h: Tensor) -> Tensor:
        r"""Return data for latents (N, K), shape :math:`(N, *event\_shape)`."""
        ...


class SampleComponents(Protocol):
    """Samples that come from components (or states) of a mixture."""

    def sample_components(self, n: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Return what ``sample`` draws, and the component (n,) that each came from, int64."""
        ...


class EffectiveComponents(Protocol):
    """A mixture that may leave components unused."""

    def effective_components(self) -> float:
        """Return how many components are in use: the perplexity of their weights."""
        ...


class SampleGiven(Protocol):
    """A conditional model: samples of given classes, speakers, ..."""

    def sample_given(self, labels: Mapping[str, Tensor], generator: Generator) -> Tensor:
        r"""Draw one example for every row of labels.

        Arguments:
            labels: What ``Examples.labels`` holds, each of shape (n,), int64.
            generator: The only source of randomness.

        Returns:
            float32 of shape :math:`(n, *event\_shape)`.
        """
        ...


class Modes(Protocol):
    """A dataset that is a mixture whose components can be told apart."""

    def mode(self, x: Tensor) -> Tensor:
        """Return the component that most likely drew each point, int64, shape (N,)."""
        ...


def members(capability: type[object]) -> list[str]:
    """Return the names of a protocol's methods.

    Raises:
        TypeError: It is no protocol.

    Example:
        >>> members(Autoencoding)
        ['decode', 'encode']
    """
    if not getattr(capability, "_is_protocol", False):
        raise TypeError(
            "a capability must be a protocol, such as imlbench.LogProb; "
            f"got {capability!r}. Import it from imlbench, or write one."
        )
    return sorted(
        name
        for base in capability.__mro__
        if getattr(base, "_is_protocol", False)
        for name, value in vars(base).items()
        if callable(value) and not name.startswith("_")
    )


class Capable:
    """Has capabilities that can be asked for."""

    def can(self, capability: type[object]) -> bool:
        """Whether this instance, with its parameters on its data, has a capability.

        Arguments:
            capability: A protocol, such as :class:`LogProb`.

        Raises:
            TypeError: It is no protocol.
        """
        return all(hasattr(self, name) for name in members(capability))


_Method = TypeVar("_Method", bound=Callable[..., object])
_Check = Callable[[Any], bool]
"""Takes the instance; Any, because a lambda in the body of a class cannot name its type."""


def available_if(check: _Check) -> Callable[[_Method], _Method]:
    """Let an instance have a method only if ``check(instance)`` is true.

    Example:
        >>> class Stone:
        ...     is_alive = False
        ...     @available_if(lambda stone: stone.is_alive)
        ...     def speak(self) -> str:
        ...         return "hello"
        >>> hasattr(Stone(), "speak")
        False
    """

    def decorate(method: _Method) -> _Method:
        return cast("_Method", _Available(method, check))

    return decorate


class _Available:
    """The descriptor behind :func:`available_if`."""

    def __init__(self, method: Callable[..., object], check: _Check) -> None:
        self._method, self._check = method, check
        self.__doc__ = method.__doc__

    def __get__(self, instance: object, owner: type) -> Callable[..., object]:
        if instance is None:
            return self._method
        if not self._check(instance):
            name = self._method.__name__
            raise AttributeError(f"this {owner.__name__} has no '{name}' on these data")
        return MethodType(self._method, instance)

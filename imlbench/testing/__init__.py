"""Conformance: what every model must do, as a check that plugin authors run on theirs.

Example:
    >>> from imlbench.testing import SPACES, check_model
    >>> from imlbench_vae.vae import VAE
    >>> check_model(VAE, SPACES["vector"], epochs=1, hidden_dim=8)
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import pickle
import random
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import cast

import numpy as np
import torch
from pydantic import JsonValue
from safetensors.torch import load, save
from torch import Generator, Tensor, nn

from imlbench.api import (
    AnyModel,
    Autoencoding,
    BaseLogProb,
    BaseLogProbSequence,
    EffectiveComponents,
    Examples,
    FitContext,
    LogProb,
    LogProbLayerwise,
    LogProbManifold,
    Params,
    SampleComponents,
    SampleGiven,
    Space,
    Splits,
)
from imlbench.api.capabilities import members
from imlbench.api.model import Stateful
from imlbench.errors import Diverged
from imlbench.records.record import Point
from imlbench.runner.resuming import Checkpoints, read
from imlbench.runner.seeding import seeded

SPACES: Mapping[str, Space] = {
    "vector": Space("vector", (2,)),
    "image": Space("image", (1, 8, 8), (0.0, 1.0)),
    "large-image": Space("image", (3, 64, 64), (-1.0, 1.0)),
    "sequence": Space("sequence", (800,)),
}
"""A small space of every kind; ``large-image`` is one for convolutions."""

LOG_DENSITIES = (LogProb, LogProbManifold, LogProbLayerwise, BaseLogProb)
N_SAMPLES = 50
SEED = 3


class CheckContext(FitContext):
    """A context without a harness: every stage is fitted, on the CPU, and nothing is written.

    Arguments:
        seed: The seed of all generators.

    Attributes:
        history: What the model reported, in order.
        facts: What the model recorded.
    """

    def __init__(self, seed: int = 0) -> None:
        self.device, self.seed = torch.device("cpu"), seed
        self.history: list[Point] = []
        self.facts: dict[str, JsonValue] = {}

    def report(self, stage: str, step: int, n_steps: int, **values: float) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                raise Diverged(stage, step, f"{name} is {value}")
        plain = {name: float(value) for name, value in values.items()}
        self.history.append(Point(stage=stage, step=int(step), n_steps=int(n_steps), values=plain))

    def record(self, **facts: JsonValue) -> None:
        self.facts |= facts

    def fit_once(
        self,
        stage: str,
        module: nn.Module,
        settings: Mapping[str, JsonValue],
        fit: Callable[[], None],
    ) -> None:
        json.dumps(dict(settings))
        fit()


class Interrupted(Exception):
    """A fit was ended, as by a cluster that needs the machine."""


class ResumableContext(CheckContext):
    """A context that keeps the states of loops in a folder, and that can end a fit.

    Arguments:
        seed: The seed of all generators.
        folder: Where states are kept; a new context goes on from those that are there.
        stop_at: The fit is ended when it reports more than so many times, interrupted or not.
        interval: Seconds from one state that is kept to the next; by default every one is.

    Attributes:
        checkpoints: What keeps the states.
    """

    def __init__(
        self, seed: int, folder: Path, *, stop_at: float = math.inf, interval: float = 0.0
    ) -> None:
        super().__init__(seed)
        self._stop_at = stop_at
        self.checkpoints = Checkpoints(folder, interval, self.history, self.facts)

    def generator(self, purpose: str, device: torch.device | str | None = None) -> Generator:
        return self.checkpoints.tracked(purpose, super().generator(purpose, device))

    def steps(self, stage: str, n_steps: int, *parts: Stateful | Generator) -> Iterable[int]:
        return self.checkpoints.steps(stage, n_steps, parts)

    def report(self, stage: str, step: int, n_steps: int, **values: float) -> None:
        if len(self.history) >= self._stop_at:
            raise Interrupted(f"at {stage}, step {step}")
        super().report(stage, step, n_steps, **values)


def make_splits(
    space: Space, n_train: int = 100, seed: int = 0, *, label: str = "cluster"
) -> Splits:
    """Return random data of two clusters that fill the space's range, for any space.

    Arguments:
        space: The space.
        n_train: Training examples; there are 30 for validation and 30 for testing.
        seed: Determines the data.
        label: The name of the label that says which cluster an example is from, 0 or 1.
    """
    generator = Generator().manual_seed(seed)

    def draw(n: int) -> Examples:
        cluster = torch.randint(0, 2, (n, *[1] * len(space.event_shape)), generator=generator)
        noise = torch.randn(n, *space.event_shape, generator=generator)
        x = 0.3 + 0.4 * cluster + 0.1 * noise
        if space.value_range is not None:
            x = space.from_unit(x.clamp(0, 1))
        lengths = (n // 2, n - n // 2) if space.kind == "sequence" else None
        return Examples(x, lengths=lengths, labels={label: cluster.flatten()})

    return Splits(draw(n_train), draw(30), draw(30))


def check_model(
    cls: type[AnyModel], space: Space, label: str = "cluster", /, **params: object
) -> None:
    """Fit a model to small random data and check everything that the harness relies on.

    Arguments:
        cls: The model class.
        space: One that ``cls.kinds`` allows, such as a value of :data:`SPACES`.
        label: The name of the examples' label, for a model that looks at labels.
        params: Parameters, small enough to be quick.

    Raises:
        AssertionError: The model breaks the contract; the message says how.
    """
    assert space.kind in cls.kinds, f"{cls.name} is not for {space.kind} data"
    resolved = _resolve(cls, space, params)
    splits = make_splits(space, label=label)
    first, second = _check_fits(functools.partial(_fit, cls, resolved, space, splits))
    before = _global_states()
    samples = _draw(first, 7)
    _check_samples(samples, space)
    assert torch.equal(samples, _draw(second, 7)), "the same seed must give the same samples"
    assert not torch.equal(samples, _draw(first, 8)), "another seed must give other samples"
    reloaded = _reload(first, cls, resolved, space)
    assert torch.equal(samples, _draw(reloaded, 7)), "a reloaded model must give the same samples"
    with torch.no_grad():
        _check_densities(first, reloaded, splits.test)
        _check_latents(first, splits.test[:])
        _check_components(first, samples)
        _check_conditional(first, reloaded, label)
    assert _global_states() == before, "sampling must leave the global random states alone"


def _resolve(cls: type[AnyModel], space: Space, given: Mapping[str, object]) -> Params:
    resolved: Params = cls.resolve(cls.params_type.model_validate(given), space)
    assert cls.resolve(resolved, space) == resolved, "resolve must leave resolved parameters alone"
    stored = json.loads(json.dumps(resolved.settings()))
    rebuilt = cls.params_type.model_validate(stored)
    assert rebuilt == resolved, "parameters must be the same when they are read from their settings"
    return resolved


def _fit(
    cls: type[AnyModel], params: Params, space: Space, splits: Splits, context: FitContext
) -> AnyModel:
    with seeded(SEED):
        model = cls(params, space)
        model.train()
        model.fit(splits.train, splits.valid, context)
    return model.eval().requires_grad_(False)


def _check_fits(fit: Callable[[FitContext], AnyModel]) -> tuple[AnyModel, AnyModel]:
    """Return a model, and one whose fit was interrupted and went on; they must be the same."""
    context = CheckContext(SEED)
    first = fit(context)
    second, resumed = _fit_interrupted(fit, len(context.history) // 2)
    if _checkpoint(first) != _checkpoint(second):
        third = fit(CheckContext(SEED))
        assert _checkpoint(first) == _checkpoint(third), "the same seed must give the same model"
        raise AssertionError(
            "a fit that was interrupted must go on to the model of one that was not; "
            "everything that a step changes must be a part of context.steps"
        )
    expected, reported = ([_step(point) for point in c.history] for c in (context, resumed))
    assert reported == expected, f"a fit that goes on must report {expected}; got {reported}"
    facts, recorded = set(context.facts), set(resumed.facts)
    assert recorded == facts, f"a fit that goes on must record {facts}; got {recorded}"
    return first, second


def _fit_interrupted(
    fit: Callable[[FitContext], AnyModel], stop_at: int
) -> tuple[AnyModel, CheckContext]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with contextlib.suppress(Interrupted):
            fit(ResumableContext(SEED, folder, stop_at=stop_at))
        for path in folder.iterdir():
            _check_state(path)
        context = ResumableContext(SEED, folder)
        return fit(context), context


def _check_state(path: Path) -> None:
    try:
        read(path)
    except pickle.UnpicklingError as error:
        raise AssertionError(
            f"the state of a loop must be made of tensors, numbers and strings: {error}"
        ) from error


def _step(point: Point) -> tuple[str, int, int, tuple[str, ...]]:
    """Return what no clock has a part in."""
    return point.stage, point.step, point.n_steps, tuple(point.values)


def _draw(model: AnyModel, seed: int) -> Tensor:
    with torch.no_grad():
        return model.sample(N_SAMPLES, Generator().manual_seed(seed))


def _reload(model: AnyModel, cls: type[AnyModel], params: Params, space: Space) -> AnyModel:
    with seeded(SEED + 1):
        reloaded = cls(params, space)
    reloaded.load_state_dict(load(_checkpoint(model)))
    return reloaded.eval().requires_grad_(False)


def _checkpoint(model: AnyModel) -> bytes:
    return save({name: value.contiguous() for name, value in model.state_dict().items()})


def _check_samples(samples: Tensor, space: Space) -> None:
    expected = (N_SAMPLES, *space.event_shape)
    assert samples.shape == expected, f"samples must be {expected}; got {tuple(samples.shape)}"
    assert samples.dtype == torch.float32, f"samples must be float32; got {samples.dtype}"
    assert samples.isfinite().all(), "samples must be finite"
    if space.value_range is not None:
        low, high = space.value_range
        margin = high - low  # an invertible output has straight ends, beyond the range
        inside = (samples >= low - margin) & (samples <= high + margin)
        assert inside.all(), f"samples must be near [{low}, {high}]"


def _check_densities(model: AnyModel, reloaded: AnyModel, test: Examples) -> None:
    methods = {name: () for capability in LOG_DENSITIES for name in members(capability)}
    with_lengths = {name: (test.lengths or (len(test),),) for name in members(BaseLogProbSequence)}
    for name, arguments in {**methods, **with_lengths}.items():
        if hasattr(model, name):
            value, again = (getattr(m, name)(test[:], *arguments) for m in (model, reloaded))
            assert value.shape == (len(test),), f"{name} must give one value per example"
            assert value.isfinite().all(), f"{name} must be finite"
            assert torch.equal(value, again), f"a reloaded model must give the same {name}"


def _check_latents(model: AnyModel, x: Tensor) -> None:
    both = {hasattr(model, name) for name in members(Autoencoding)}
    assert len(both) == 1, "a model must have both encode and decode, or neither"
    if model.can(Autoencoding):
        autoencoder = cast("Autoencoding", model)
        h = autoencoder.encode(x)
        assert h.ndim == 2, f"latents must be (N, K); got {tuple(h.shape)}"
        assert len(h) == len(x), "there must be one latent per example"
        decoded = autoencoder.decode(h)
        assert decoded.shape == x.shape, "decoding must give the shape of the data"


def _check_components(model: AnyModel, samples: Tensor) -> None:
    if model.can(SampleComponents):
        mixture = cast("SampleComponents", model)
        again, component = mixture.sample_components(N_SAMPLES, Generator().manual_seed(7))
        assert torch.equal(again, samples), "sample_components must draw what sample draws"
        assert component.shape == (N_SAMPLES,), "there must be one component per sample"
        assert component.dtype == torch.int64, f"components must be int64; got {component.dtype}"
    if model.can(EffectiveComponents):
        number = cast("EffectiveComponents", model).effective_components()
        assert 1 <= number < math.inf, f"effective_components must be at least 1; got {number}"


def _check_conditional(model: AnyModel, reloaded: AnyModel, label: str) -> None:
    if model.can(SampleGiven):
        given = {label: torch.arange(N_SAMPLES) % 2}

        def draw(model: AnyModel, seed: int) -> Tensor:
            return cast("SampleGiven", model).sample_given(given, Generator().manual_seed(seed))

        samples = draw(model, 7)
        _check_samples(samples, model.space)
        same = torch.equal(samples, draw(reloaded, 7))
        assert same, "a reloaded model must give the same samples of given labels"
        other = torch.equal(samples, draw(model, 8))
        assert not other, "another seed must give other samples of given labels"


def _global_states() -> tuple[str, str, str]:
    numpy_state = repr(np.random.get_state())  # noqa: NPY002 - the state that must not change
    return repr(torch.get_rng_state().tolist()), numpy_state, repr(random.getstate())

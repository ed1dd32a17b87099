"""Conformance: what every model must do, as a check that plugin authors run on theirs.

Example:
    >>> from imlbench.testing import SPACES, check_model
    >>> from imlbench_vae.vae import VAE
    >>> check_model(VAE, SPACES["vector"], epochs=1, hidden_dim=8)
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from imlbench.api import Examples, Model, Space, Splits
from imlbench.job import JobContext, seeded
from imlbench.plan import Job
from imlbench.store import read_tensors, write_tensors

SPACES: Mapping[str, Space] = {
    "vector": Space("vector", (2,)),
    "image": Space("image", (1, 8, 8), (0.0, 1.0)),
    "large-image": Space("image", (3, 64, 64), (-1.0, 1.0)),
    "sequence": Space("sequence", (800,)),
}
"""A small space of every kind; ``large-image`` is one for convolutions."""

LOG_DENSITIES = ("log_prob", "log_prob_manifold", "log_prob_layerwise", "base_log_prob")


def make_splits(space: Space, n_train: int = 100, seed: int = 0) -> Splits:
    """Return random data of two clusters that fill the space's range, for any space."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> Examples:
        centre = torch.randint(0, 2, (n, *[1] * len(space.event_shape)), generator=generator)
        noise = torch.randn(n, *space.event_shape, generator=generator)
        x = 0.3 + 0.4 * centre + 0.1 * noise
        if space.value_range is not None:
            low, high = space.value_range
            x = low + (high - low) * x.clamp(0, 1)
        lengths = (n // 2, n - n // 2) if space.kind == "sequence" else None
        return Examples(x, lengths=lengths)

    return Splits(draw(n_train), draw(30), draw(30))


def check_model(cls: type[Model], space: Space, **params: Any) -> None:
    """Fit a model to small random data and check everything that the harness relies on.

    Arguments:
        cls: The model class.
        space: One that ``cls.kinds`` allows, such as a value of :data:`SPACES`.
        params: Parameters, small enough to be quick.

    Raises:
        AssertionError: The model breaks the contract; the message says how.
    """
    assert space.kind in cls.kinds, f"{cls.name} is not for {space.kind} data"
    resolved = cls.resolve(cls.Params(**params), space)
    assert cls.resolve(resolved, space) == resolved, "resolve must leave resolved parameters alone"
    splits = make_splits(space)
    first, second = (_fit(cls, resolved, space, splits) for _ in range(2))
    before = _global_states()
    samples = _draw(first, 7)
    _check_samples(samples, space)
    assert torch.equal(samples, _draw(second, 7)), "the same seed must give the same samples"
    assert not torch.equal(samples, _draw(first, 8)), "another seed must give other samples"
    reloaded = _reload(first, cls, resolved, space)
    assert torch.equal(samples, _draw(reloaded, 7)), "a reloaded model must give the same samples"
    _check_densities(first, reloaded, splits.test[:])
    _check_latents(first, splits.test[:])
    _check_components(first, samples)
    assert _global_states() == before, "sampling must leave the global random states alone"


def _fit(cls: type[Model], params: Any, space: Space, splits: Splits) -> Model:
    job = Job(cls.name, "check", {}, {}, 3, 50, 1, ("check", "check"), splits.fingerprint)
    with tempfile.TemporaryDirectory() as folder, seeded(3):
        model = cls(params, space)
        model.train()
        context = JobContext(job, torch.device("cpu"), Path(folder), lambda event: None)
        model.fit(splits.train, splits.valid, context)
    return model.eval().requires_grad_(False)


def _draw(model: Model, seed: int) -> Tensor:
    with torch.no_grad():
        return model.sample(50, torch.Generator().manual_seed(seed))


def _reload(model: Model, cls: type[Model], params: Any, space: Space) -> Model:
    with tempfile.TemporaryDirectory() as folder, seeded(4):
        path = Path(folder) / "checkpoint.safetensors"
        write_tensors(path, model.state_dict())
        reloaded = cls(params, space)
        reloaded.load_state_dict(read_tensors(path))
    return reloaded.eval().requires_grad_(False)


def _check_samples(samples: Tensor, space: Space) -> None:
    expected = (50, *space.event_shape)
    assert samples.shape == expected, f"samples must be {expected}; got {tuple(samples.shape)}"
    assert samples.dtype == torch.float32, f"samples must be float32; got {samples.dtype}"
    assert samples.isfinite().all(), "samples must be finite"
    if space.value_range is not None:
        low, high = space.value_range
        margin = high - low  # an invertible output has straight ends, beyond the range
        inside = (samples >= low - margin) & (samples <= high + margin)
        assert inside.all(), f"samples must be near [{low}, {high}]"


def _check_densities(model: Model, reloaded: Model, x: Tensor) -> None:
    for name in LOG_DENSITIES:
        if model.can(name):
            with torch.no_grad():
                value, again = (getattr(m, name)(x) for m in (model, reloaded))
            assert value.shape == (len(x),), f"{name} must give one value per example"
            assert value.isfinite().all(), f"{name} must be finite"
            assert torch.equal(value, again), f"a reloaded model must give the same {name}"


def _check_latents(model: Model, x: Tensor) -> None:
    if model.can("encode") and model.can("decode"):
        with torch.no_grad():
            h = cast("Any", model).encode(x)
            assert h.ndim == 2, f"latents must be (N, K); got {tuple(h.shape)}"
            assert len(h) == len(x), "there must be one latent per example"
            assert cast("Any", model).decode(h).shape == x.shape, (
                "decoding must give the shape of the data"
            )


def _check_components(model: Model, samples: Tensor) -> None:
    if model.can("sample_components"):
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            again, component = cast("Any", model).sample_components(50, generator)
        assert torch.equal(again, samples), "sample_components must draw what sample draws"
        assert component.shape == (50,), "there must be one component per sample"


def _global_states() -> tuple[str, str, str]:
    numpy_state = repr(np.random.get_state())  # noqa: NPY002 - the state that must not change
    return repr(torch.get_rng_state().tolist()), numpy_state, repr(random.getstate())

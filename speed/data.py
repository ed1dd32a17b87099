"""What is measured on: real data and their embeddings, found as every run of imlbench does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imlbench import Examples, Sources, Space, Splits
from imlbench.files import read_tensors, write_tensors
from imlbench.plan.identity import code_of, digest
from imlbench.plan.registry import Registry
from imlbench.runner import fitting
from imlbench.testing import CheckContext

EPOCHS = 3
"""Enough for embeddings that are no noise."""


def load(dataset: str) -> tuple[Splits, Space]:
    """Return a dataset with its usual parameters."""
    cls = Registry().datasets[dataset]
    plugin = cls(cls.params_type())
    return plugin.load(Sources()), plugin.space


def build(model: str, space: Space, seed: int, **params: Any) -> Any:
    """Return a model as the harness builds it: parameters resolved, initialised by the seed."""
    cls = Registry().models[model]
    resolved = cls.resolve(cls.params_type(**params), space)
    return fitting.build(cls, resolved.settings(), space, seed, torch.device("cpu"))


def autoencoder(dataset: str, latent_dim: int) -> tuple[Any, Splits]:
    """Return a briefly trained auto-encoder, which the cache keeps, and its data.

    Arguments:
        dataset: The dataset's name.
        latent_dim: The number of latent dimensions.
    """
    splits, space = load(dataset)
    model = build("iml-gaussian", space, seed=0, latent_dim=latent_dim, epochs=EPOCHS)
    code = code_of(type(model).__module__)
    key = digest(code, splits.fingerprint, model.params.settings())
    name = f"{dataset}-{latent_dim}-{key}.safetensors"
    path = Sources().cache_dir / "speed" / name
    if path.exists():
        model.load_state_dict(read_tensors(path))
    else:
        model.fit(splits.train, splits.valid, CheckContext(seed=0))
        write_tensors(path, model.state_dict())
    return model.eval().requires_grad_(False), splits


def embed(model: Any, examples: Examples) -> Tensor:
    """Return latents (N, K)."""
    return torch.cat([model.encode(x) for x in examples.batches(5000)])


def mnist_embeddings(latent_dim: int) -> Tensor:
    """Return the latents of the 60,000 images that are not for testing."""
    model, splits = autoencoder("mnist", latent_dim)
    return torch.cat([embed(model, splits.train), embed(model, splits.valid)])


def digit_embeddings(latent_dim: int) -> tuple[Tensor, list[int]]:
    """Return the latents of the training utterances, and the chunks that each one has."""
    model, splits = autoencoder("spoken-digits", latent_dim)
    return embed(model, splits.train), list(splits.train.lengths or ())

"""The contract, for every registered model and a small space of every kind."""

from __future__ import annotations

import pytest
import torch

from imlbench import Model
from imlbench.registry import Registry
from imlbench.testing import SPACES, check_model

QUICK = {
    "epochs": 1,
    "hidden_dim": 16,
    "latent_dim": 2,
    "width": 4,
    "n_components": 2,
    "n_examples": 60,
    "n_dims": 2,
    "n_states": 3,
    "n_steps": 20,
}
PAIRS = [
    (name, space)
    for name, model in Registry().models.items()
    for space in SPACES
    if SPACES[space].kind in model.kinds
]


@pytest.mark.parametrize(("name", "space"), PAIRS)
def test_model_keeps_the_contract(registry, name, space):
    cls = registry.models[name]
    quick = {key: value for key, value in QUICK.items() if key in cls.Params.model_fields}
    check_model(cls, SPACES[space], **quick)


class _Forgetful(Model):
    """Keeps what it learns where the checkpoint does not see it."""

    name = "forgetful"

    def fit(self, train, valid, context):
        self.mean = train[:].mean(0)

    def sample(self, n, generator):
        noise = torch.randn(n, *self.space.event_shape, generator=generator)
        return noise + getattr(self, "mean", torch.zeros(()))


class _Unseeded(_Forgetful):
    """Ignores the generator."""

    def sample(self, n, generator):
        return torch.randn(n, *self.space.event_shape)


class _Constant(_Forgetful):
    """Knows one sample only."""

    def sample(self, n, generator):
        return torch.zeros(n, *self.space.event_shape)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (_Forgetful, "a reloaded model must give the same samples"),
        (_Unseeded, "the same seed must give the same samples"),
        (_Constant, "another seed must give other samples"),
    ],
)
def test_the_check_finds_what_is_wrong(cls, message):
    with pytest.raises(AssertionError, match=message):
        check_model(cls, SPACES["vector"])

"""The IML models: their stages, what they can do, and the libraries that check their fits."""

from __future__ import annotations

import warnings

import pytest
import torch

from imlbench import (
    BaseLogProb,
    LogProb,
    LogProbLayerwise,
    LogProbManifold,
    ParameterError,
)
from imlbench.plan.identity import closure
from imlbench.testing import SPACES, CheckContext, make_splits
from imlbench_iml.models import IML, IMLDPGMM, IMLGMM, IMLGaussian
from imlbench_iml.sequences import IMLHMM, IMLRNN


def make(cls: type[IML], kind: str, **params) -> IML:
    torch.manual_seed(0)
    space = SPACES[kind]
    return cls(cls.resolve(cls.params_type(**params), space), space)


def fitted(cls: type[IML], kind: str, n_train: int = 100, **params) -> tuple[IML, CheckContext]:
    model, context = make(cls, kind, **params), CheckContext()
    splits = make_splits(SPACES[kind], n_train)
    model.fit(splits.train, splits.valid, context)
    return model.eval().requires_grad_(False), context


def test_the_shared_stage_depends_on_no_base_distribution():
    """Its results stay valid when a density or a model is changed."""
    files = {"/".join(path.parts[-2:]) for path in closure("imlbench_iml.autoencoders")}
    assert {"imlbench_iml/autoencoders.py", "imlbench_iml/invertible.py"} <= files
    assert {"imlbench/training.py", "imlbench/networks.py"} <= files
    assert not {file for file in files if "densities" in file or "models.py" in file}


class Stages(CheckContext):
    """Keeps what stages are fitted with."""

    def fit_once(self, stage, module, settings, fit):
        self.stages = {**getattr(self, "stages", {}), stage: (settings, fit.func.__module__)}
        super().fit_once(stage, module, settings, fit)


def test_models_share_the_stage_of_the_auto_encoder():
    stages = []
    for cls, params in ((IMLGMM, {"n_components": 2}), (IMLGaussian, {})):
        context = Stages()
        splits = make_splits(SPACES["image"])
        make(cls, "image", epochs=1, **params).fit(splits.train, splits.valid, context)
        stages.append(context.stages)
    assert stages[0] == stages[1]
    settings, module = stages[0]["autoencoder"]
    assert module == "imlbench_iml.autoencoders"
    assert set(settings) == {
        "latent_dim", "hidden_dim", "epochs", "batch_size", "noise", "learning_rate", "precision",
    }  # fmt: skip


def test_a_bijection_has_no_stage():
    context, splits = Stages(), make_splits(SPACES["vector"])
    make(IMLGaussian, "vector").fit(splits.train, splits.valid, context)
    assert not hasattr(context, "stages")


@pytest.mark.parametrize(
    ("kind", "params", "exact", "volume"),
    [
        ("vector", {}, True, True),
        ("vector", {"latent_dim": 1}, False, True),
        ("image", {"latent_dim": 64}, True, True),
        ("image", {}, False, True),
        ("large-image", {"width": 4}, False, False),
        ("sequence", {"width": 4}, False, False),
    ],
)
def test_densities_of_the_data_need_a_volume_and_exact_ones_a_bijection(
    kind, params, exact, volume
):
    model = make(IMLGaussian, kind, **params)
    assert model.can(BaseLogProb)
    assert model.can(LogProb) == hasattr(model, "log_prob") == exact
    assert model.can(LogProbManifold) == model.can(LogProbLayerwise) == volume


def test_the_loss_without_noise_is_the_mean_squared_distance():
    model = make(IMLGaussian, "image", noise=0.0)
    x = make_splits(SPACES["image"]).train[:10]
    distances = torch.linalg.vector_norm((model.decode(model.encode(x)) - x).flatten(1), dim=1)
    loss = model.autoencoder.loss(x, torch.Generator())
    torch.testing.assert_close(loss, distances.square().mean())
    noisy = make(IMLGaussian, "image", noise=2.0)
    assert noisy.autoencoder.loss(x, torch.Generator().manual_seed(0)) > loss


@pytest.mark.parametrize("cls", [IMLGMM, IMLDPGMM, IMLRNN])
def test_more_components_than_examples_are_refused_before_training(cls):
    kind = "sequence" if cls is IMLRNN else "vector"
    quick = {"epochs": 1, "width": 4} if cls is IMLRNN else {}
    with pytest.raises(ParameterError, match="n_components must be at most 20, the number of"):
        fitted(cls, kind, 20, n_components=21, **quick)


def test_the_recorded_steps_of_the_recurrent_network_are_its_own():
    _, context = fitted(
        IMLRNN, "sequence", epochs=1, latent_dim=2, width=4, n_components=2, n_units=4, n_steps=30
    )
    last = max(report.step for report in context.history if report.stage == "density")
    assert context.facts["n_steps"] == last <= 30
    assert context.facts["batch_size"] == 2


@pytest.mark.parametrize(
    ("cls", "library", "kind", "params"),
    [
        (IMLGMM, "scikit-learn", "vector", {"n_components": 2}),
        (IMLDPGMM, "scikit-learn", "vector", {"n_components": 4}),
        (IMLHMM, "hmmlearn", "sequence", {"n_states": 2, "latent_dim": 2, "width": 4, "epochs": 1}),
    ],
)
def test_the_library_s_fit_is_as_good_as_torch_s(cls, library, kind, params):
    """Both climb the same likelihood, from starts of their own: held-out ones are alike.

    The clusters are far apart, so that there is one optimum to find. The tolerance is less than a
    third of the standard error of the mean over the 30 examples, 0.18 nats or more.
    """
    test = make_splits(SPACES[kind]).test
    values = {}
    for backend in ("torch", library):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the libraries' own
            model, context = fitted(cls, kind, 1000, backend=backend, **params)
        if kind == "sequence":
            log_prob = model.base_log_prob_sequence(test[:], test.lengths)
        else:
            log_prob = model.base_log_prob(test[:])
        values[backend] = log_prob.mean().item()
        curve = [report for report in context.history if report.stage == "density"]
        assert bool(curve) == (backend == "torch")
    assert values[library] == pytest.approx(values["torch"], abs=0.05)

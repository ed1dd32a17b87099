"""The contract, for every registered model and a small space of every kind."""

from __future__ import annotations

import pytest
import torch

from imlbench import Model, ParameterError, Params, SampleGiven, available_if, from_data
from imlbench.plan.registry import Registry
from imlbench.testing import SPACES, CheckContext, check_model, make_splits
from imlbench.training import train_epochs, usual_precision

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
    quick = {key: value for key, value in QUICK.items() if key in cls.params_type.model_fields}
    check_model(cls, SPACES[space], **quick)


PERCEPTRON = {"latent_dim": 20, "hidden_dim": 600}
DCGAN = {"latent_dim": 100, "width": 128}
AUTO = {"precision": "auto"}
EXACT = {"batch_size": 2, "precision": "float32"}
IML = {"epochs": 18, "batch_size": 500, "learning_rate": 3e-3, **AUTO}
VAE = {"epochs": 18, "batch_size": 128, "learning_rate": 1e-3, **AUTO}
GAN = {"n_steps": 10_000, "batch_size": 64, "learning_rate": 2e-4, **AUTO}
WGAN = {"n_steps": 10_000, "batch_size": 64, "n_critic": 5, **AUTO}
WGAN |= {"gradient_penalty": 0.0, "clip": 0.01}
SMALLER = {"discriminator_dim": 200, "activation": "relu"}
DEFAULTS = [
    ("iml-gaussian", "vector", {"latent_dim": 2}),  # a bijection is not trained
    ("iml-gaussian", "image", {"latent_dim": 20, "hidden_dim": 64, **IML, "noise": 8 / 7}),
    ("iml-gaussian", "large-image", {**DCGAN, **IML, "learning_rate": 5e-4}),
    (
        "iml-gaussian",
        "sequence",
        {"latent_dim": 80, "width": 16, "filter_length": 40, **IML, "batch_size": 50},
    ),
    ("vae", "vector", {**PERCEPTRON, "latent_dim": 2, **VAE}),
    ("vae", "image", {**PERCEPTRON, **VAE}),
    ("vae", "large-image", {**DCGAN, **VAE}),
    ("vae", "sequence", {**PERCEPTRON, **VAE}),
    ("gan", "vector", {**PERCEPTRON, **GAN, **SMALLER, "activation": "tanh"}),
    ("gan", "large-image", {**DCGAN, **GAN}),
    ("wgan", "image", {**PERCEPTRON, **WGAN, **SMALLER, "learning_rate": 2e-4}),
    ("wgan", "large-image", {**DCGAN, **WGAN, "learning_rate": 5e-5}),
    ("reference-gmm", "vector", {"n_dims": 2, "n_components": 30}),
    ("reference-gmm", "image", {"n_dims": 50, "n_components": 30}),
]


@pytest.mark.parametrize(("name", "space", "settings"), DEFAULTS)
def test_defaults_follow_from_the_data(registry, name, space, settings):
    """The sizes of the papers, and no parameter that does not apply."""
    cls = registry.models[name]
    found = cls.resolve(cls.params_type(), SPACES[space]).settings()
    assert found == pytest.approx(settings)


@pytest.mark.parametrize(
    ("name", "space", "given"),
    [
        ("iml-gmm", "vector", {"epochs": 3, "batch_size": 7, "learning_rate": 1.0, "width": 9}),
        ("iml-gmm", "vector", {"noise": 0.0, "hidden_dim": 3, "filter_length": 2}),
        ("iml-gmm", "image", {"width": 9, "filter_length": 2}),
        ("iml-gmm", "large-image", {"hidden_dim": 3, "filter_length": 2}),
        ("iml-gmm", "sequence", {"hidden_dim": 3}),
        ("vae", "image", {"width": 9}),
        ("vae", "large-image", {"hidden_dim": 3}),
        ("gan", "vector", {"width": 9}),
        ("gan", "large-image", {"hidden_dim": 3, "discriminator_dim": 3, "activation": "relu"}),
    ],
)
def test_what_does_not_apply_makes_no_other_job(registry, name, space, given):
    cls = registry.models[name]
    plain, other = (cls.resolve(cls.params_type(**params), SPACES[space]) for params in ({}, given))
    assert other == plain


def test_of_steps_and_epochs_and_of_clip_and_penalty_one_applies(registry):
    cls = registry.models["wgan"]
    params = cls.params_type(epochs=3, n_steps=50, clip=0.1, gradient_penalty=10.0)
    settings = cls.resolve(params, SPACES["vector"]).settings()
    assert settings["epochs"] == 3
    assert settings["learning_rate"] == 1e-4
    assert not {"n_steps", "clip"} & set(settings)


@pytest.mark.parametrize(
    ("name", "space", "given", "message"),
    [
        ("iml-gmm", "vector", {"latent_dim": 3}, "latent_dim must be at most 2, the dimensions"),
        ("iml-gmm", "image", {"hidden_dim": 65}, "hidden_dim must be at most 64, the dimensions"),
        (
            "iml-gmm",
            "image",
            {"hidden_dim": 9, "latent_dim": 10},
            "latent_dim must be at most 9, hidden_dim",
        ),
        ("iml-gmm", "vector", {"noise": 1.0}, "noise must be 0 where the output has no sigmoid"),
        ("iml-gmm", "large-image", {"noise": 1.0}, "noise must be 0"),
        ("iml-gmm", "sequence", {"noise": 1.0}, "noise must be 0"),
        ("vae", "vector", {"latent_dim": 3}, "latent_dim must be at most 2, the dimensions"),
        ("reference-gmm", "vector", {"n_dims": 3}, "n_dims must be at most 2, the dimensions"),
    ],
)
def test_what_contradicts_the_data_is_refused(registry, name, space, given, message):
    cls = registry.models[name]
    with pytest.raises(ParameterError, match=message):
        cls.resolve(cls.params_type(**given), SPACES[space])


@pytest.mark.parametrize(
    ("name", "params", "facts"),
    [
        ("vae", {"epochs": 3}, {**EXACT, "n_steps": 150}),  # 50 batches of 100 examples
        ("gan", {"n_steps": 70}, {**EXACT, "n_steps": 100}),
        ("iml-gmm", {"latent_dim": 1, "epochs": 2}, {**EXACT, "n_steps": 100}),
        ("iml-gmm", {}, {}),  # a bijection is not trained
        ("reference-train", {}, {"n_examples": 100}),
    ],
)
def test_what_was_really_used_is_recorded(registry, name, params, facts):
    cls, context, space = registry.models[name], CheckContext(), SPACES["vector"]
    quick = {k: v for k, v in QUICK.items() if k in ("hidden_dim", "n_components")}
    given = {k: v for k, v in {**quick, **params}.items() if k in cls.params_type.model_fields}
    splits = make_splits(space)
    cls(cls.resolve(cls.params_type(**given), space), space).fit(
        splits.train, splits.valid, context
    )
    assert context.facts == facts


class _Conditional(Model[Params]):
    """A Gaussian for every cluster, whose mean is learnt by gradient descent."""

    name = "conditional"

    def __init__(self, params, space):
        super().__init__(params, space)
        self.means = torch.nn.Parameter(torch.zeros(2, *space.event_shape))

    def fit(self, train, valid, context):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)

        def step(rows):
            loss = (train[rows] - self.means[train.labels["cluster"][rows]]).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return {"loss": loss}

        train_epochs(step, train, n_epochs=3, batch_size=2, context=context, stage="means")

    def sample(self, n, generator):
        return self.sample_given(
            {"cluster": torch.randint(2, (n,), generator=generator)}, generator
        )

    def sample_given(self, labels, generator):
        means = self.means[labels["cluster"]]
        return means + 0.1 * torch.randn(means.shape, generator=generator)


def test_a_conditional_model_can_be_trained_and_checked():
    check_model(_Conditional, SPACES["vector"])
    space, splits = SPACES["vector"], make_splits(SPACES["vector"], 1000)
    model = _Conditional(Params(), space)
    model.fit(splits.train, splits.valid, CheckContext())
    # Clusters at 0.3 and 0.7; the last steps are of two examples of standard deviation 0.1.
    centres = torch.tensor([[0.3, 0.3], [0.7, 0.7]])
    torch.testing.assert_close(model.means.data, centres, rtol=0, atol=0.15)


class _Forgetful(Model[Params]):
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


class _Sound(_Forgetful):
    """Does nothing wrong."""

    def fit(self, train, valid, context):
        """Learn nothing."""


class _WidthParams(Params):
    width: int = from_data(ge=1)


class _Restless(Model[_WidthParams]):
    """Doubles its width whenever it is resolved."""

    name = "restless"

    @classmethod
    def resolve(cls, params, space):
        return params.model_copy(update={"width": 2 * (params.width or 1)})

    fit, sample = _Sound.fit, _Sound.sample


class _DefaultParams(Params):
    width: int = 128


class _Unrepeatable(Model[_DefaultParams]):
    """Leaves out a parameter that has a default."""

    name = "unrepeatable"

    @classmethod
    def resolve(cls, params, space):
        return params.without("width")

    fit, sample = _Sound.fit, _Sound.sample


class _OneWay(_Sound):
    """Encodes without decoding."""

    def encode(self, x):
        return x.flatten(1)


class _WrongDensity(_Sound):
    """One density for all examples."""

    def log_prob(self, x):
        return x.sum()


class _OtherComponents(_Sound):
    """Components of other samples."""

    def sample_components(self, n, generator):
        return self.sample(n, generator) + 1, torch.zeros(n, dtype=torch.int64)


class _TooFew(_Sound):
    """One sample whatever the labels."""

    def sample_given(self, labels, generator):
        return self.sample(1, generator)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (_Forgetful, "a reloaded model must give the same samples"),
        (_Unseeded, "the same seed must give the same samples"),
        (_Constant, "another seed must give other samples"),
        (_Restless, "resolve must leave resolved parameters alone"),
        (_Unrepeatable, "parameters must be the same when they are read from their settings"),
        (_OneWay, "both encode and decode, or neither"),
        (_WrongDensity, "log_prob must give one value per example"),
        (_OtherComponents, "sample_components must draw what sample draws"),
        (_TooFew, r"samples must be \(50, 2\); got \(1, 2\)"),
    ],
)
def test_the_check_finds_what_is_wrong(cls, message):
    with pytest.raises(AssertionError, match=message):
        check_model(cls, SPACES["vector"])


def test_the_check_lets_pass_what_is_sound():
    check_model(_Sound, SPACES["vector"])


class _Sometimes(_Sound):
    """Has a method on images only."""

    @available_if(lambda self: self.space.kind == "image")
    def sample_given(self, labels, generator):
        return self.sample(len(labels["cluster"]), generator)


def test_hasattr_is_the_one_truth():
    model, other = (_Sometimes(Params(), SPACES[kind]) for kind in ("image", "vector"))
    assert hasattr(model, "sample_given")
    assert model.can(SampleGiven)
    assert not hasattr(other, "sample_given")
    assert not other.can(SampleGiven)
    with pytest.raises(AttributeError, match="sample_given"):
        other.sample_given({}, torch.Generator())


@pytest.mark.parametrize(
    ("units", "sizes", "batch_size", "expected"),
    [
        ({"amx_bf16": True}, (600, 784), 500, "bfloat16"),
        ({"avx512_bf16": True}, (600, 784), 500, "bfloat16"),
        ({"avx512_bf16": False, "avx2": True}, (600, 784), 500, "float32"),
        ({"amx_bf16": True}, (600, 784), 128, "float32"),
        ({"amx_bf16": True}, (64, 64), 500, "float32"),
    ],
)
def test_products_are_rounded_by_default_where_it_pays(
    units, sizes, batch_size, expected, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units, raising=False)
    modules = [torch.nn.Linear(*sizes), torch.nn.Conv2d(256, 1024, 4)]
    assert usual_precision(torch.device("cpu"), modules, batch_size) == expected
    assert usual_precision(torch.device("cuda"), modules, batch_size) == "float32"


@pytest.mark.parametrize("space", ["image", "large-image", "sequence"])
@pytest.mark.parametrize("name", ["iml-gaussian", "vae", "gan", "wgan"])
def test_rounded_products_train_nearly_the_same_model_in_full_precision(registry, name, space):
    """A product in bfloat16, of 8 bits of mantissa, is off by up to 0.4 %; a loss by less than 5 %.

    What the fitted model then computes is not rounded: it is the same in float64, to 1e-3.
    """
    cls, space = registry.models[name], SPACES[space]
    if space.kind not in cls.kinds:
        return
    splits, losses, weights = make_splits(space), [], []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        quick = {key: QUICK[key] for key in QUICK if key in cls.params_type.model_fields}
        quick |= {"hidden_dim": 64, "precision": precision}
        params = cls.resolve(cls.params_type(**quick), space)
        model, context = cls(params, space), CheckContext()
        model.fit(splits.train, splits.valid, context)
        losses.append(next(iter(context.history[0].values.values())))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert not torch.equal(*weights)  # something was rounded
    assert torch.bfloat16 not in {tensor.dtype for tensor in model.state_dict().values()}
    x = model.eval().sample(50, torch.Generator().manual_seed(0))
    if hasattr(model, "encode"):
        with torch.no_grad():
            h = model.encode(x)
            exact = model.double().encode(x.double())
        assert h.dtype == torch.float32
        torch.testing.assert_close(h.double(), exact, rtol=1e-3, atol=1e-3)

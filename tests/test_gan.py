"""The adversarial models: contracts, constraints, what they learn, and how they fail."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from imlbench import Diverged, Examples, Space
from imlbench.runner.seeding import seeded
from imlbench.testing import CheckContext
from imlbench_gan import imlbench_models
from imlbench_gan.gan import GAN, WGAN, gradient_penalty

VECTOR = Space("vector", (2,))
DIGITS = Space("image", (1, 8, 8), (0.0, 1.0))
PICTURES = Space("image", (3, 64, 64), (-1.0, 1.0))
SMALL = {"latent_dim": 4, "hidden_dim": 16, "discriminator_dim": 16, "width": 8}


@pytest.fixture(autouse=True)
def _one_thread(_isolated):
    torch.set_num_threads(1)  # so small are the networks that a second one is in the way


def make(model, space: Space, seed: int = 0, **params):
    with seeded(seed):
        return model(model.resolve(model.params_type(**SMALL | params), space), space)


def fit(model, data: torch.Tensor, seed: int = 0) -> list[dict]:
    """Fit the model; return the values that it reported, one record for each epoch."""
    context = CheckContext(seed)
    try:
        model.train().fit(Examples(data), Examples(data), context)
    finally:
        model.eval()
    epochs: dict[int, dict[str, float]] = {}
    for record in context.history:
        epochs.setdefault(record.step, {}).update(record.values)
    return list(epochs.values())


def draw(model, n: int = 16, seed: int = 0) -> torch.Tensor:
    with torch.no_grad():
        return model.eval().sample(n, torch.Generator().manual_seed(seed))


def random_data(space: Space, n: int = 100) -> torch.Tensor:
    x = torch.rand(n, *space.event_shape, generator=torch.Generator().manual_seed(0))
    low, high = space.value_range or (-100.0, 300.0)
    return low + (high - low) * x


def normal(n: int, mean: list[float], factor: list[list[float]]) -> torch.Tensor:
    z = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(0))
    return torch.tensor(mean) + z @ torch.tensor(factor).T


def test_the_hook_names_both():
    assert [model.name for model in imlbench_models()] == ["gan", "wgan"]


@pytest.mark.parametrize("model", [GAN, WGAN])
@pytest.mark.parametrize("space", [VECTOR, DIGITS])
def test_samples_have_the_data_s_shape_and_range_and_are_reproducible(model, space):
    data, samples = random_data(space), []
    for seed in (0, 0, 1):
        fitted = make(model, space, seed, epochs=1)
        state = torch.get_rng_state()
        fit(fitted, data, seed)
        samples.append(draw(fitted, 2100))
        assert torch.equal(torch.get_rng_state(), state)
    assert samples[0].shape == (2100, *space.event_shape)
    assert samples[0].dtype == torch.float32
    assert samples[0].isfinite().all()
    if space.value_range:
        assert samples[0].min() >= space.value_range[0]
        assert samples[0].max() <= space.value_range[1]
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])
    assert not torch.equal(draw(fitted, seed=1), draw(fitted, seed=2))
    loaded = make(model, space, seed=5)
    loaded.load_state_dict(fitted.state_dict())
    assert torch.equal(draw(loaded), draw(fitted))


@pytest.mark.parametrize(
    ("model", "params"),
    [(GAN, {}), (WGAN, {"n_critic": 1}), (WGAN, {"n_critic": 1, "gradient_penalty": 10.0})],
)
def test_the_convolutional_version_trains(model, params):
    fitted = make(model, PICTURES, epochs=1, **params)
    before = {name: value.clone() for name, value in fitted.state_dict().items()}
    (values,) = fit(fitted, random_data(PICTURES, n=2))  # two steps of one example
    changed = {
        name.split(".")[0] for name, v in fitted.state_dict().items() if (v != before[name]).any()
    }
    assert changed == {"generator", "discriminator"}
    assert values["diversity"] > 0.05  # batch normalisation is no reason for an early collapse
    x = draw(fitted, 5)
    assert x.shape == (5, 3, 64, 64)
    assert x.abs().max() <= 1
    h = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # no sample depends on the others
        torch.testing.assert_close(
            fitted._generate(h)[:1], fitted._generate(h[:1]), rtol=0, atol=1e-5
        )
    normalised = any(isinstance(layer, nn.BatchNorm2d) for layer in fitted.discriminator.modules())
    assert normalised == ("gradient_penalty" not in params)


@pytest.mark.parametrize("space", [VECTOR, PICTURES])
def test_the_weights_of_the_critic_stay_within_the_clip(space):
    n = 500 if space is VECTOR else 4
    model = make(WGAN, space, clip=0.007, epochs=1, learning_rate=1e-3, batch_size=2)
    assert max(p.abs().max() for p in model.discriminator.parameters()) > 0.007
    fit(model, random_data(space, n))
    largest = [p.abs().max().item() for p in model.discriminator.parameters()]
    assert max(largest) == pytest.approx(0.007)
    assert max(p.abs().max() for p in model.generator.parameters()) > 0.007


def test_the_generator_has_one_step_for_n_critic_of_the_critic(monkeypatch):
    calls = []
    monkeypatch.setattr(WGAN, "_step_generator", lambda self, n, *_: calls.append(n))
    fit(make(WGAN, VECTOR, epochs=2, batch_size=10, n_critic=7), random_data(VECTOR, 500))
    assert calls == [10] * (100 // 7)


def test_epochs_follow_from_the_number_of_steps():
    data = random_data(VECTOR, 500)  # 50 steps an epoch
    assert len(fit(make(GAN, VECTOR, n_steps=101, batch_size=10), data)) == 3


def test_gradient_penalty_of_a_linear_critic_is_the_closed_form():
    w = torch.randn(1, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    critic = nn.Sequential(nn.Flatten(), nn.Linear(12, 1)).double()
    critic[1].weight.data.copy_(w)
    real, fake = (torch.rand(5, 3, 2, 2, dtype=torch.float64) for _ in range(2))
    penalty = gradient_penalty(critic, real, fake, torch.Generator().manual_seed(0))
    norm = w.norm()
    torch.testing.assert_close(penalty, (norm - 1).square())
    penalty.backward()
    torch.testing.assert_close(critic[1].weight.grad, 2 * (norm - 1) * w / norm)


def test_gradient_penalty_looks_between_examples_and_samples():
    class Square(nn.Module):  # slope 2x
        def forward(self, x):
            return x.square().sum(dim=1, keepdim=True)

    real, fake = torch.full((4000, 1), 2.0), torch.full((4000, 1), 1.0)
    penalty = gradient_penalty(Square(), real, fake, torch.Generator().manual_seed(0))
    # E (2x - 1)^2 for x uniform in (1, 2) is 13/3.
    assert penalty.item() == pytest.approx(13 / 3, abs=0.1)


@pytest.mark.parametrize(
    ("space", "params", "rate", "optimizer"),
    [
        (PICTURES, {}, 5e-5, torch.optim.RMSprop),
        (DIGITS, {}, 2e-4, torch.optim.RMSprop),
        (DIGITS, {"learning_rate": 5e-5}, 5e-5, torch.optim.RMSprop),
        (PICTURES, {"gradient_penalty": 10.0}, 1e-4, torch.optim.Adam),
    ],
)
def test_the_optimiser_of_wgan_is_that_of_its_papers(space, params, rate, optimizer):
    model = make(WGAN, space, **params)
    made = model.make_optimizer(model.generator.parameters())
    assert type(made) is optimizer
    assert made.param_groups[0]["lr"] == model.params.learning_rate == rate


def test_gan_learns_the_mean_of_a_gaussian():
    space = Space("vector", (2,), (0.0, 1.0))
    data = normal(2000, [0.25, 0.7], [[0.05, 0.0], [0.0, 0.05]])
    model = make(GAN, space, hidden_dim=32, n_steps=1500, learning_rate=1e-3)
    assert (draw(model, 2000).mean(dim=0) - data.mean(dim=0)).abs().min() > 0.1
    fit(model, data)
    torch.testing.assert_close(draw(model, 2000).mean(dim=0), data.mean(dim=0), rtol=0, atol=0.05)


def test_data_without_bounds_may_have_any_scale():
    mean = [-3000.0, 5e-4]
    data = normal(2000, mean, [[400.0, 0.0], [8e-5, 6e-5]])  # correlation 0.8
    model = make(GAN, VECTOR, hidden_dim=32, n_steps=2000, learning_rate=1e-3)
    values = fit(model, data)
    x = draw(model, 2000)
    error = (x.mean(dim=0) - data.mean(dim=0)).abs() / data.std(dim=0)
    assert error.max() < 0.5
    assert torch.corrcoef(x.T)[0, 1] > 0.5
    assert 0.3 < values[-1]["diversity"] < 2


class Constant(GAN):
    """Its samples are one point."""

    def _step_generator(self, n, noise, optimizer):
        for parameter in self.generator.parameters():
            parameter.data.zero_()


class Recovering(GAN):
    """Its samples are one point up to the last epoch but one."""

    n_left = 151

    def _step_generator(self, n, noise, optimizer):
        self.n_left -= 1
        self.generator[0][0].weight.data.fill_(0.0 if self.n_left > 0 else 0.5)


class Idle(GAN):
    """Its generator learns nothing."""

    def _step_generator(self, n, noise, optimizer):
        pass


class OneMode(GAN):
    """It has learnt one of two modes."""

    def sample(self, n, generator):
        return 0.1 * torch.randn(n, 2, generator=generator)


def test_samples_that_are_one_point_at_the_end_are_a_collapse():
    with pytest.raises(Diverged, match="gan, epoch 2: the samples have collapsed to a point"):
        fit(make(Constant, DIGITS, epochs=2, batch_size=2), random_data(DIGITS))


def test_a_collapse_that_lasts_ends_the_fit():
    # 50 steps an epoch, and a thousand steps of patience
    with pytest.raises(Diverged, match=r"epoch 20: .* of the data's, for 20 epochs"):
        fit(make(Constant, DIGITS, epochs=99, batch_size=2), random_data(DIGITS))


def test_a_generator_may_recover():
    values = fit(make(Recovering, DIGITS, epochs=4, batch_size=2), random_data(DIGITS))
    assert [value["diversity"] > 0.01 for value in values] == [False, False, False, True]


def test_a_discriminator_that_has_won_ends_the_fit():
    data = 0.8 + 0.2 * random_data(DIGITS)
    model = make(Idle, DIGITS, epochs=99, batch_size=2, learning_rate=1e-2)
    with pytest.raises(Diverged, match=r"the discriminator has won: its accuracy is 1\.00000, for"):
        fit(model, data)


def test_one_mode_of_two_is_no_collapse():
    data = normal(1000, [0.0, 0.0], [[0.1, 0.0], [0.0, 0.1]])
    data[::2] += 6
    model = make(OneMode, VECTOR, epochs=2)
    values = fit(model, data)
    assert 0.01 < values[-1]["diversity"] < 0.1
    x = draw(model, 500)
    assert x.max() < 1


def test_nan_is_diverged():
    data = random_data(VECTOR)
    with pytest.raises(Diverged, match=r"gan, epoch \d+: discriminator_loss is (nan|inf)"):
        fit(make(GAN, VECTOR, epochs=5, learning_rate=1e38), data)

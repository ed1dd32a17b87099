"""The invertible perceptron against autograd, and against what a density must be."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from torch.func import jacfwd, vmap

from imlbench import LogProb, Space
from imlbench_iml.invertible import SLOPE, InvertibleNetwork, Sigmoid, TallLinear, Tanh
from imlbench_iml.models import IMLGMM, IMLGMMParams


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def perceptron(latent: int, hidden: int, dims: int, scale: float = 1.5) -> InvertibleNetwork:
    layers = [TallLinear(latent, hidden), Tanh(), TallLinear(hidden, dims), Sigmoid(0.0, 1.0)]
    generator = torch.Generator().manual_seed(0)
    for layer in layers[::2]:
        layer.weight.data.add_(0.3 * torch.randn(layer.weight.shape, generator=generator))
        layer.weight.data.mul_(scale)
        layer.bias.data.copy_(torch.randn(layer.bias.shape, generator=generator))
    return InvertibleNetwork(layers, (dims,)).requires_grad_(False)


def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layer", [Tanh(), Sigmoid(0.0, 1.0), Sigmoid(-1.0, 1.0)])
def test_activation_is_smooth_increasing_and_invertible(layer):
    t = torch.linspace(-30, 30, 100_001)
    y = layer(t)
    slope = vmap(jacfwd(layer.forward))(t)
    width = getattr(layer, "width", 1.0)
    torch.testing.assert_close(layer.inverse(y), t, rtol=0, atol=1e-9)
    torch.testing.assert_close(layer.log_slope(t).exp(), slope, rtol=1e-9, atol=0)
    assert slope.min() >= width * SLOPE * (1 - 1e-12)
    # Continuous value and derivative: neighbours 6e-4 apart differ by no more than their slope.
    assert y.diff().abs().max() <= 6.01e-4 * slope.max()
    assert slope.diff().abs().max() < 1e-3


@pytest.mark.parametrize(
    ("layer", "point", "value"),
    [(Tanh(), 2.9932, 0.99499), (Sigmoid(0.0, 1.0), 4.5850, 0.98990)],
)
def test_activation_joins_where_the_slope_is_c(layer, point, value):
    """The paper's requirement of continuous derivatives fixes y* and t*; digits as rounded."""
    assert layer.y_join == pytest.approx(value, abs=1e-5)
    assert layer.t_join == pytest.approx(point, abs=5e-4)
    assert layer.log_slope(torch.tensor(layer.t_join)).exp().item() == pytest.approx(SLOPE)


@pytest.mark.parametrize("layer", [Tanh(), Sigmoid(0.0, 1.0)])
def test_activation_inverts_any_real_output(layer):
    y = torch.tensor([-1e6, -3.0, -1.0, 0.0, 0.5, 1.0, 2.0, 1e6])
    assert layer.inverse(y).isfinite().all()
    torch.testing.assert_close(layer(layer.inverse(y)), y)


def test_inside_the_activations_are_the_usual_ones():
    t = torch.linspace(-2.9, 2.9, 101)
    torch.testing.assert_close(Tanh()(t), t.tanh())
    torch.testing.assert_close(Sigmoid(0.0, 1.0)(t), t.sigmoid())


def test_the_gradient_of_the_left_inverse_is_that_of_the_normal_equations():
    """To rounding in float64: the implicit gradient is exact, not an approximation."""
    layer = TallLinear(4, 7)
    y, weights = normal(5, 7).requires_grad_(), normal(5, 4, scale=0.5)
    inputs = [y, layer.weight, layer.bias]
    gram = layer.weight.mT @ layer.weight
    plain = torch.linalg.solve(gram, ((y - layer.bias) @ layer.weight).mT).mT
    truth = torch.autograd.grad((plain * weights).sum(), inputs)
    found = torch.autograd.grad((layer.inverse(y) * weights).sum(), inputs)
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layer", [Tanh(), Sigmoid(0.0, 1.0), Sigmoid(-1.0, 1.0)])
@pytest.mark.parametrize("way", ["forward", "inverse"])
def test_derivatives_of_activations_are_those_of_differences(layer, way):
    t = torch.tensor([-9.0, -4.0, -2.0, -0.3, 0.0, 1.0, 2.5, 6.0, 50.0]).requires_grad_()
    at = t if way == "forward" else layer(t).detach().requires_grad_()
    assert torch.autograd.gradcheck(getattr(layer, way), at, check_forward_ad=True)


def test_derivatives_of_the_left_inverse_are_those_of_differences():
    layer, y = TallLinear(4, 7), normal(5, 7).requires_grad_()

    def inverse(y, weight):
        return torch.func.functional_call(_Inverse(layer), {"layer.weight": weight}, y)

    weight = (layer.weight.detach() + normal(7, 4, scale=0.3)).requires_grad_()
    assert torch.autograd.gradcheck(inverse, (y, weight), check_forward_ad=True)


class _Inverse(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, y):
        return self.layer.inverse(y)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_encode_inverts_decode_for_any_latent(scale):
    network = perceptron(20, 600, 784)
    h = normal(50, 20, scale=scale)
    torch.testing.assert_close(network.encode(network.decode(h)), h, rtol=0, atol=1e-4)


def test_square_network_is_a_bijection_of_all_data():
    network = perceptron(6, 6, 6)
    x = torch.cat([normal(50, 6, scale=3.0), torch.zeros(1, 6), torch.ones(1, 6)])
    torch.testing.assert_close(network.decode(network.encode(x)), x, rtol=0, atol=1e-4)


def test_square_volume_is_autograds_determinant():
    network = perceptron(6, 6, 6)
    h = normal(20, 6, scale=3.0)
    jacobian = vmap(jacfwd(lambda one: network.decode(one[None])[0]))(h)
    truth = torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(network.log_volume_layerwise(h), truth, rtol=0, atol=1e-9)
    torch.testing.assert_close(network.log_volume_manifold(h), truth, rtol=0, atol=1e-9)


def test_manifold_volume_is_that_of_the_true_jacobian():
    network = perceptron(5, 30, 40)
    h = normal(20, 5)
    jacobian = vmap(jacfwd(lambda one: network.decode(one[None])[0]))(h)
    truth = 0.5 * torch.linalg.slogdet(jacobian.mT @ jacobian).logabsdet
    torch.testing.assert_close(network.log_volume_manifold(h), truth, rtol=0, atol=1e-9)
    assert (network.log_volume_layerwise(h) - truth).abs().min() > 0.1  # another quantity


def test_layerwise_volume_adds_up_the_layers_own():
    network = perceptron(5, 30, 40)
    h = normal(3, 5)
    first, tanh, second, sigmoid = network.layers
    a = first(h)
    t = second(tanh(a))
    truth = (
        0.5 * torch.logdet(first.weight.mT @ first.weight)
        + tanh.log_slope(a).sum(1)
        + 0.5 * torch.logdet(second.weight.mT @ second.weight)
        + sigmoid.log_slope(t).sum(1)
    )
    torch.testing.assert_close(network.log_volume_layerwise(h), truth)


def test_density_integrates_to_one_in_two_dimensions():
    """Standard normal latents through a square network; the grid covers all but 1e-3 of it."""
    network = perceptron(2, 2, 2, scale=0.7)
    grid = torch.linspace(-0.6, 1.6, 1201)
    x = torch.cartesian_prod(grid, grid)
    h = network.encode(x)
    base = -0.5 * h.square().sum(1) - math.log(2 * math.pi)
    density = (base - network.log_volume_layerwise(h)).exp()
    assert density.sum().item() * (grid[1] - grid[0]).item() ** 2 == pytest.approx(1, abs=0.01)


def test_network_in_float32_round_trips_at_the_sizes_of_the_paper():
    torch.set_default_dtype(torch.float32)
    network = perceptron(20, 600, 784).float()
    h = normal(50, 20)
    torch.testing.assert_close(network.encode(network.decode(h)), h, rtol=0, atol=1e-4)


def test_shapes_follow_the_event_shape():
    layers = [TallLinear(2, 12), Sigmoid(0.0, 1.0)]
    space = Space("image", (3, 2, 2), (0.0, 1.0))
    network = InvertibleNetwork(layers, space.event_shape)
    assert network.decode(torch.zeros(4, 2)).shape == (4, 3, 2, 2)
    assert network.encode(torch.zeros(4, 3, 2, 2)).shape == (4, 2)


def iml_gmm(space: Space, **params) -> IMLGMM:
    torch.manual_seed(0)
    resolved = IMLGMM.resolve(IMLGMMParams(n_components=3, **params), space)
    model = IMLGMM(resolved, space).eval().requires_grad_(False)
    for layer in (layer for layer in model.autoencoder.layers if hasattr(layer, "weight")):
        layer.weight.add_(0.3 * torch.randn(layer.weight.shape)).mul_(1.5)
    k = model.density.n_dims
    model.density.means.copy_(torch.randn(3, k))
    model.density.covariances.copy_(torch.eye(k).expand(3, k, k) * torch.rand(3, 1, 1).add(0.5))
    return model


def mixture_log_density(model: IMLGMM, h: torch.Tensor) -> torch.Tensor:
    """By scipy, one component after the other."""
    density = model.density
    parts = [
        math.log(w) + multivariate_normal(m.numpy(), c.numpy()).logpdf(h.numpy())
        for w, m, c in zip(density.weights, density.means, density.covariances, strict=True)
    ]
    return torch.from_numpy(logsumexp(parts, axis=0))


def test_log_prob_of_a_square_model_is_the_change_of_variables():
    model = iml_gmm(Space("image", (1, 2, 2), (0.0, 1.0)), latent_dim=4)
    x = normal(10, 1, 2, 2).sigmoid()
    h = model.encode(x)
    jacobian = vmap(jacfwd(lambda one: model.encode(one[None])[0]))(x).flatten(2)
    truth = mixture_log_density(model, h) + torch.linalg.slogdet(jacobian).logabsdet
    assert model.can(LogProb)
    for log_prob in (model.log_prob, model.log_prob_layerwise, model.log_prob_manifold):
        torch.testing.assert_close(log_prob(x), truth, rtol=0, atol=1e-4)


def test_log_prob_manifold_of_a_model_is_that_of_the_true_jacobian():
    model = iml_gmm(Space("image", (1, 4, 4), (0.0, 1.0)), latent_dim=3)
    x = normal(10, 1, 4, 4).sigmoid()
    h = model.encode(x)
    jacobian = vmap(jacfwd(lambda one: model.decode(one[None])[0].flatten()))(h)
    volume = 0.5 * torch.linalg.slogdet(jacobian.mT @ jacobian).logabsdet
    assert not model.can(LogProb)
    truth = mixture_log_density(model, h) - volume
    torch.testing.assert_close(model.log_prob_manifold(x), truth, rtol=0, atol=1e-4)

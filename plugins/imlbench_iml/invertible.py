r"""Networks that widen and whose left inverse uses the same weights (Eq. 9 and 10).

The paper's invertible perceptron is ``TallLinear, Tanh, TallLinear, Sigmoid``. With all layers
square the network is a bijection, and both volumes below equal the change of variables.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from imlbench.networks import unrounded

SLOPE = 0.01
"""Slope c of the straight lines that continue the activations outside."""


class Layer(nn.Module, ABC):
    """A map from R^n to R^m, m >= n, with a left inverse: ``inverse(forward(a)) == a``."""

    @abstractmethod
    def forward(self, a: Tensor) -> Tensor:
        """Map (N, n) to (N, m)."""

    @abstractmethod
    def inverse(self, y: Tensor) -> Tensor:
        """Map (N, m) to (N, n), for every real y."""

    @abstractmethod
    def log_volume(self, a: Tensor) -> Tensor:
        """Return the logarithm of the layer's own volume change at a, shape (N,) or ()."""

    @abstractmethod
    def push_forward(self, tangents: Tensor, a: Tensor) -> Tensor:
        """Multiply tangent vectors (N, K, n), one per row, by the Jacobian at a: (N, K, m)."""


class _LeftInverse(torch.autograd.Function):
    r"""The least squares solution a of :math:`y \approx W a`, and what it leaves, :math:`y - W a`.

    Solved by the inverse of the Gram matrix, exact although products are rounded under autocast,
    and refined once. With u the gradient times that inverse, and r what is left, the gradients are
    :math:`W u` for y and :math:`r u^\top - (W u) a^\top` for W: no more products than the solution
    takes, and none for the Gram matrix. It cannot be differentiated again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, weight: Tensor, inverse_gram: Tensor) -> tuple[Tensor, Tensor]:
        device = y.device.type
        rounds = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if rounds else y.dtype
        w, inverse = weight.to(dtype), inverse_gram.to(dtype)
        a = (y.to(dtype) @ w @ inverse).to(y.dtype)
        rest = y - a.to(dtype) @ w.mT
        return a + rest.to(dtype) @ w @ inverse, rest

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[1:], *output)
        ctx.save_for_forward(*inputs[1:], *output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor, Tensor, None]:
        weight, inverse_gram, a, rest = ctx.saved_tensors
        u = gradient @ inverse_gram
        v = u @ weight.mT
        return unrounded(v), unrounded(rest.mT @ u - v.mT @ a), None

    @staticmethod
    def jvp(ctx: Any, dy: Tensor, dw: Tensor | None, _: None) -> tuple[Tensor, None]:
        weight, inverse_gram, a, rest = ctx.saved_tensors
        normal = dy @ weight if dw is None else (dy - a @ dw.mT) @ weight + rest @ dw
        return normal @ inverse_gram, None


class TallLinear(Layer):
    r"""A linear layer that widens.

    .. math:: y = W a + b, \qquad a = (W^\top W)^{-1} W^\top (y - b)

    Its volume change is :math:`\sqrt{\det W^\top W}`.

    Arguments:
        n_in: Input dimensions.
        n_out: Output dimensions, at least ``n_in``.
    """

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(n_out, n_in)))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, a: Tensor) -> Tensor:
        return unrounded(nn.functional.linear(a, self.weight, self.bias))

    def inverse(self, y: Tensor) -> Tensor:
        with torch.no_grad():
            inverse_gram = torch.cholesky_inverse(self._gram_cholesky())
        a: Tensor = _LeftInverse.apply(y - self.bias, self.weight, inverse_gram)[0]
        return a

    def log_volume(self, a: Tensor) -> Tensor:
        return self._gram_cholesky().diagonal().log().sum()

    def push_forward(self, tangents: Tensor, a: Tensor) -> Tensor:
        return tangents @ self.weight.mT

    def _gram_cholesky(self) -> Tensor:
        """Factorise in full precision, without looking whether it succeeds: the host would wait.

        What fails is NaN, as the loss will be.
        """
        with torch.autocast(self.weight.device.type, enabled=False):
            factor, info = torch.linalg.cholesky_ex(self.weight.mT @ self.weight)
        return torch.where(info == 0, factor, torch.nan)


class _ValueAndSlope(torch.autograd.Function):
    """A function of each coordinate that returns its value and its derivative.

    A gradient is one product then, where autograd would go back through every operation. It cannot
    be differentiated again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        a: Tensor, function: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        return function(a)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.save_for_forward(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return gradient * slope, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return tangent * slope, None


class Elementwise(Layer):
    """An increasing function of each coordinate."""

    def forward(self, a: Tensor) -> Tensor:
        value: Tensor = _ValueAndSlope.apply(a, self.value_and_slope)[0]
        return value

    @abstractmethod
    def value_and_slope(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Return the function and its derivative, elementwise."""

    @abstractmethod
    def log_slope(self, a: Tensor) -> Tensor:
        """Return the logarithm of the derivative, elementwise."""

    def log_volume(self, a: Tensor) -> Tensor:
        return self.log_slope(a).sum(dim=-1)

    def push_forward(self, tangents: Tensor, a: Tensor) -> Tensor:
        return tangents * self.log_slope(a).exp()[:, None, :]


class Tanh(Elementwise):
    r"""Hyperbolic tangent inside, straight lines of slope c outside (Eq. 9).

    Value and first derivative are continuous, which fixes where they meet:
    :math:`y^* = \sqrt{1 - c}`, :math:`t^* = \operatorname{atanh} y^*`.

    Example:
        >>> layer = Tanh()
        >>> layer.inverse(layer(torch.tensor([-50.0, 0.25, 7.0]))).round(decimals=3)
        tensor([-50.0000,   0.2500,   7.0000])
    """

    y_join = math.sqrt(1 - SLOPE)
    t_join = math.atanh(y_join)

    def value_and_slope(self, a: Tensor) -> tuple[Tensor, Tensor]:
        inside = a.clamp(-self.t_join, self.t_join)
        tanh = inside.tanh()
        return torch.add(tanh, a - inside, alpha=SLOPE), tanh.square().neg_().add_(1)

    def inverse(self, y: Tensor) -> Tensor:
        value: Tensor = _ValueAndSlope.apply(y, self._inverse_and_slope)[0]
        return value

    def _inverse_and_slope(self, y: Tensor) -> tuple[Tensor, Tensor]:
        inside = y.clamp(-self.y_join, self.y_join)
        value = torch.add(inside.atanh(), y - inside, alpha=1 / SLOPE)
        return value, inside.mul_(inside).neg_().add_(1).reciprocal_()

    def log_slope(self, a: Tensor) -> Tensor:
        return torch.log1p(-a.clamp(-self.t_join, self.t_join).tanh().square())


class Sigmoid(Elementwise):
    r"""Sigmoid inside, straight lines of slope c outside (Eq. 10), onto a range of values.

    They meet where :math:`\sigma^* (1 - \sigma^*) = c`, so that even the smallest and the largest
    pixel have a finite inverse: nothing is clamped.

    Arguments:
        low: Lower end of the sigmoid's range.
        high: Its upper end.

    Example:
        >>> layer = Sigmoid(0.0, 1.0)
        >>> layer(layer.inverse(torch.tensor([0.0, 0.5, 1.0]))).mul(1000).round().abs()
        tensor([   0.,  500., 1000.])
    """

    y_join = (1 + math.sqrt(1 - 4 * SLOPE)) / 2
    t_join = math.log(y_join / (1 - y_join))

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.width = low, high - low

    def value_and_slope(self, a: Tensor) -> tuple[Tensor, Tensor]:
        inside = a.clamp(-self.t_join, self.t_join)
        sigmoid = inside.sigmoid()
        unit = torch.add(sigmoid, a - inside, alpha=SLOPE)
        slope = (1 - sigmoid).mul_(sigmoid).mul_(self.width)
        return unit.mul_(self.width).add_(self.low), slope

    def inverse(self, y: Tensor) -> Tensor:
        unit = (y - self.low) / self.width
        inside = unit.clamp(1 - self.y_join, self.y_join)
        return torch.add(inside.logit(), unit - inside, alpha=1 / SLOPE)

    def log_slope(self, a: Tensor) -> Tensor:
        inside = a.clamp(-self.t_join, self.t_join)
        logsigmoid = nn.functional.logsigmoid
        return logsigmoid(inside) + logsigmoid(-inside) + math.log(self.width)


class InvertibleNetwork(nn.Module):
    r"""A decoder from R^K to data space whose left inverse is the encoder.

    Arguments:
        layers: From the latents outwards.
        event_shape: Shape of one example.
    """

    has_volume = True

    def __init__(self, layers: list[Layer], event_shape: tuple[int, ...]) -> None:
        super().__init__()
        linear = [layer.weight.shape for layer in layers if isinstance(layer, TallLinear)]
        self.is_bijective = all(n_out == n_in for n_out, n_in in linear)
        self.layers = nn.ModuleList(layers)
        self.event_shape = event_shape

    @property
    def _layers(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def decode(self, h: Tensor) -> Tensor:
        r"""Map latents (N, K) to data :math:`(N, *event\_shape)`."""
        for layer in self._layers:
            h = layer(h)
        return h.unflatten(1, self.event_shape)

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Map data to latents (N, K); data off the decoder's manifold are projected, by layers.

        Arguments:
            x: The data.
            noise: Added to the inverse of the output activation, shape (N, D).
        """
        *inner, output = self._layers
        h = output.inverse(x.flatten(1))
        if noise is not None:
            h = h + noise
        for layer in reversed(inner):
            h = layer.inverse(h)
        return h

    def log_volume_layerwise(self, h: Tensor) -> Tensor:
        """Return the sum of the layers' own log volume changes at h, shape (N,)."""
        total = h.new_zeros(len(h))
        for layer in self._layers:
            total = total + layer.log_volume(h)
            h = layer(h)
        return total

    def log_volume_manifold(self, h: Tensor) -> Tensor:
        r"""Return :math:`\frac 1 2 \log\det J^\top J` of the whole decoder at h, shape (N,)."""
        tangents = torch.eye(h.shape[1], dtype=h.dtype, device=h.device).expand(len(h), -1, -1)
        for layer in self._layers:
            tangents = layer.push_forward(tangents, h)
            h = layer(h)
        return torch.linalg.cholesky(tangents @ tangents.mT).diagonal(dim1=1, dim2=2).log().sum(1)

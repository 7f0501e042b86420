"""A smooth multi-layer perceptron whose divergence is exact and cheap: no autograd graph of a graph."""

from __future__ import annotations

import itertools
from typing import cast

from torch import Tensor, nn

from galray.phasespace.activations import derivatives
from galray.phasespace.settings import Activation

__all__ = ["DivergenceMLP"]


class DivergenceMLP(nn.Module):
    """An MLP R^d → R^d that gives its divergence with its value.

    With z₁ = W₁u + b₁, zₗ = Wₗφ(zₗ₋₁) + bₗ and the output W_o φ(z_L) + b_o, the d unit tangents start as
    the columns of W₁ and are pushed through the layers beside the values. For one and two hidden layers
    the sum over tangents is done beforehand:

        ∇·s = φ'(z₁)·diag(W₁W_o),      ∇·s = φ'(z₂)ᵀ [W₂ ∘ (W₁W_o)ᵀ] φ'(z₁),

    so that the exact divergence of a network with two hidden layers costs one more matrix product, not d.
    In deeper ones the tangents run from the input up to the last hidden layer but one, those of the
    outputs down to it, and meet there: one chain of products with a constant start on either side.

    Arguments:
        features: Number d of inputs and outputs.
        hidden: Widths of the hidden layers; at least one.
        activation: ``tanh``, ``silu`` or ``softplus`` (all smooth).
    """

    def __init__(self, features: int, hidden: tuple[int, ...], activation: Activation = "silu") -> None:
        super().__init__()
        self.features = features
        self.activation = activation
        widths = (features, *hidden)
        self.hidden = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in itertools.pairwise(widths))
        self.out = nn.Linear(widths[-1], features)
        # The network starts as zero: the model starts at its analytic base.
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    @property
    def _layers(self) -> list[nn.Linear]:
        return [cast(nn.Linear, layer) for layer in self.hidden]

    def forward(self, u: Tensor) -> Tensor:
        """U (*, d) to the value (*, d)."""
        for layer in self._layers:
            u = derivatives(self.activation, layer(u), 0)[0]
        return self.out(u)

    def value_and_divergence(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The value (n, d) and its divergence (n,) at u (n, d)."""
        layers = self._layers
        slopes = []
        for layer in layers:
            u, slope = derivatives(self.activation, layer(u), 1)
            slopes.append(slope)
        value = self.out(u)
        first, last = layers[0].weight, self.out.weight
        if len(layers) == 1:
            return value, slopes[0] @ (first * last.t()).sum(1)
        if len(layers) == 2:
            coupled = layers[1].weight * (first @ last).t()
            return value, (slopes[1] * (slopes[0] @ coupled.t())).sum(-1)
        # ∂ᵢz from the input's side up to the last layer but one, and from the output's side down to it:
        # (n, d, width), the first product of either side with a constant matrix
        start = (first.unsqueeze(2) * layers[1].weight.t().unsqueeze(1)).flatten(1)
        pushed = (slopes[0] @ start).unflatten(1, (self.features, -1))
        for layer, slope in zip(layers[2:-1], slopes[1:-2], strict=True):
            pushed = (slope.unsqueeze(1) * pushed) @ layer.weight.t()
        end = (last.t().unsqueeze(2) * layers[-1].weight.unsqueeze(1)).flatten(1)
        pulled = (slopes[-1] @ end).unflatten(1, (self.features, -1))
        return value, ((pushed * pulled).sum(1) * slopes[-2]).sum(-1)

    def value_and_curvature(self, u: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        """The value (n, d) and tᵀ(∇s)t (n,) along one direction t (n, d) per point."""
        tangent = direction
        for layer in self._layers:
            u, slope = derivatives(self.activation, layer(u), 1)
            tangent = slope * (tangent @ layer.weight.t())
        return self.out(u), ((tangent @ self.out.weight.t()) * direction).sum(-1)

"""A smooth multi-layer perceptron whose divergence is exact and cheap: no autograd graph of a graph."""

from __future__ import annotations

import itertools
import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from galray.phasespace.settings import Activation

__all__ = ["DivergenceMLP"]


def _value(name: str, z: Tensor) -> Tensor:
    """φ(z)."""
    if name == "tanh":
        return torch.tanh(z)
    if name == "silu":
        return F.silu(z)
    return F.softplus(z) - math.log(2.0)


def _value_and_slope(name: str, z: Tensor) -> tuple[Tensor, Tensor]:
    """φ(z) and φ'(z), sharing what they have in common."""
    if name == "tanh":
        a = torch.tanh(z)
        return a, 1.0 - a * a
    gate = torch.sigmoid(z)
    if name == "silu":
        a = z * gate
        return a, gate + a * (1.0 - gate)
    return F.softplus(z) - math.log(2.0), gate


class DivergenceMLP(nn.Module):
    """An MLP R^d → R^d that gives its divergence with its value.

    With z₁ = W₁u + b₁, zₗ = Wₗφ(zₗ₋₁) + bₗ and the output W_o φ(z_L) + b_o, the d unit tangents start as
    the columns of W₁ and are pushed through the layers beside the values. For one and two hidden layers
    the sum over tangents is done beforehand:

        ∇·s = φ'(z₁)·diag(W₁W_o),      ∇·s = φ'(z₂)ᵀ [W₂ ∘ (W₁W_o)ᵀ] φ'(z₁),

    so that the exact divergence of a network with two hidden layers costs one more matrix product, not d.

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

    def forward(self, u: Tensor) -> Tensor:
        """U (*, d) to the value (*, d)."""
        for layer in self.hidden:
            u = _value(self.activation, layer(u))
        return self.out(u)

    def value_and_divergence(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The value (n, d) and its divergence (n,) at u (n, d)."""
        layers = [cast(nn.Linear, layer) for layer in self.hidden]
        first = layers[0]
        a, slope = _value_and_slope(self.activation, first(u))
        depth = len(self.hidden)
        if depth == 1:
            trace = (first.weight * self.out.weight.t()).sum(1)
            return self.out(a), slope @ trace
        if depth == 2:
            second = layers[1]
            a2, slope2 = _value_and_slope(self.activation, second(a))
            coupled = second.weight * (first.weight @ self.out.weight).t()
            return self.out(a2), (slope2 * (slope @ coupled.t())).sum(-1)
        tangents = slope.unsqueeze(1) * first.weight.t()  # (n, d, width)
        for layer in layers[1:]:
            a, slope = _value_and_slope(self.activation, layer(a))
            tangents = slope.unsqueeze(1) * (tangents @ layer.weight.t())
        return self.out(a), (tangents * self.out.weight).sum((-1, -2))

"""A scalar network whose gradient is the score: no curl by construction, and an exact, cheap Laplacian."""

from __future__ import annotations

import itertools
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from galray.phasespace.settings import Activation

__all__ = ["GradientMLP"]


def _derivatives(name: str, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """φ(z), φ'(z) and φ''(z), sharing what they have in common."""
    if name == "tanh":
        a = torch.tanh(z)
        slope = 1.0 - a * a
        return a, slope, -2.0 * a * slope
    gate = torch.sigmoid(z)
    bend = gate * (1.0 - gate)
    if name == "silu":
        return z * gate, gate + z * bend, bend * (2.0 + z * (1.0 - 2.0 * gate))
    return F.softplus(z), gate, bend


class GradientMLP(nn.Module):
    """s = ∇g of a scalar MLP g: R^d → R, with the divergence ∇·s = ∇²g.

    A score is a gradient; a network of d free outputs must learn that from the stars, this one cannot do
    otherwise. Value, the d unit tangents and the Laplacian are pushed through the layers together (the
    forward Laplacian of Li et al. 2023, arXiv 2307.08214): with z = W a,

        ∂ᵢφ(z) = φ'(z) W ∂ᵢa,      ∇²φ(z) = φ'(z) W ∇²a + φ''(z) Σᵢ (W ∂ᵢa)²,

    one matrix product per layer for d + 2 rows, and no autograd graph of a graph.

    Arguments:
        features: Number d of inputs.
        hidden: Widths of the hidden layers; at least one.
        activation: ``tanh``, ``silu`` or ``softplus`` (all smooth).
    """

    def __init__(self, features: int, hidden: tuple[int, ...], activation: Activation = "silu") -> None:
        super().__init__()
        self.features = features
        self.activation = activation
        widths = (features, *hidden)
        self.hidden = nn.ModuleList(nn.Linear(n_in, n_out) for n_in, n_out in itertools.pairwise(widths))
        # A constant in g has no gradient, so no bias; g starts as zero: the model starts at its base.
        self.out = nn.Linear(widths[-1], 1, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, u: Tensor) -> Tensor:
        """U (*, d) to the score ∇g (*, d)."""
        value, _ = self.value_and_divergence(u.reshape(-1, self.features))
        return value.reshape(u.shape)

    def potential(self, u: Tensor) -> Tensor:
        """The scalar g at u (*, d): shape (*,)."""
        for layer in self.hidden:
            u = _derivatives(self.activation, layer(u))[0]
        return self.out(u).squeeze(-1)

    def value_and_divergence(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """∇g (n, d) and ∇²g (n,) at u (n, d)."""
        d = self.features
        first, *rest = (cast(nn.Linear, layer) for layer in self.hidden)
        a, slope, bend = _derivatives(self.activation, first(u))
        tangents = slope.unsqueeze(1) * first.weight.t()  # (n, d, width)
        laplacian = bend * first.weight.square().sum(1)
        for layer in rest:
            rows = torch.cat([tangents, laplacian.unsqueeze(1), a.unsqueeze(1)], 1) @ layer.weight.t()
            a, slope, bend = _derivatives(self.activation, rows[:, d + 1] + layer.bias)
            pushed = rows[:, :d]
            tangents = slope.unsqueeze(1) * pushed
            laplacian = slope * rows[:, d] + bend * pushed.square().sum(1)
        weight = self.out.weight[0]
        return tangents @ weight, laplacian @ weight

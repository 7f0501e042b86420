"""A scalar network whose gradient is the score: no curl by construction, and an exact, cheap Laplacian."""

from __future__ import annotations

import itertools
from typing import cast

import torch
from torch import Tensor, nn

from galray.phasespace.activations import derivatives
from galray.phasespace.forward_laplacian import ForwardLaplacian, laplacian_by_autograd
from galray.phasespace.settings import Activation

__all__ = ["GradientMLP"]


class GradientMLP(nn.Module):
    """s = ∇g of a scalar MLP g: R^d → R, with the divergence ∇·s = ∇²g.

    A score is a gradient; a network of d free outputs must learn that from the stars, this one cannot do
    otherwise. Value, the d unit tangents and the Laplacian are pushed through the layers together (the
    forward Laplacian of Li et al. 2023, arXiv 2307.08214): with z = W a,

        ∂ᵢφ(z) = φ'(z) W ∂ᵢa,      ∇²φ(z) = φ'(z) W ∇²a + φ''(z) Σᵢ (W ∂ᵢa)²,

    so that a layer costs a matrix product for d + 2 rows, and no autograd graph of a graph is built.

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

    @property
    def _layers(self) -> list[nn.Linear]:
        return [cast(nn.Linear, layer) for layer in self.hidden]

    def forward(self, u: Tensor) -> Tensor:
        """U (*, d) to the score ∇g (*, d), by one pass back through the layers."""
        slopes = []
        for layer in self._layers:
            u, slope = derivatives(self.activation, layer(u), 1)
            slopes.append(slope)
        adjoint = self.out.weight[0]
        for layer, slope in zip(reversed(self._layers), reversed(slopes), strict=True):
            adjoint = (adjoint * slope) @ layer.weight
        return adjoint

    def potential(self, u: Tensor) -> Tensor:
        """The scalar g at u (*, d): shape (*,)."""
        for layer in self._layers:
            u = derivatives(self.activation, layer(u), 0)[0]
        return self.out(u).squeeze(-1)

    def value_and_divergence(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """∇g (n, d) and ∇²g (n,) at u (n, d)."""
        layers = self._layers
        # Mixed precision and compilers want operations they know.
        plain = torch.is_autocast_enabled(u.device.type) or torch.compiler.is_compiling()
        if len(layers) == 1 or plain:
            weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
            return laplacian_by_autograd(self.activation, u, weights, biases, self.out.weight[0])
        hidden = [p for layer in layers for p in (layer.weight, layer.bias)]
        return ForwardLaplacian.apply(self.activation, u, self.out.weight[0], *hidden)

    def value_and_curvature(self, u: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        """∇g (n, d) and the second derivative tᵀ(∇∇g)t (n,) along one direction t (n, d) per point."""
        slopes = []
        first, second = direction, torch.zeros_like(direction)
        a = u
        for layer in self._layers:
            z, first, second = layer(a), first @ layer.weight.t(), second @ layer.weight.t()
            a, slope, bend = derivatives(self.activation, z, 2)
            slopes.append(slope)
            second = slope * second + bend * first.square()
            first = slope * first
        adjoint = self.out.weight[0]
        for layer, slope in zip(reversed(self._layers), reversed(slopes), strict=True):
            adjoint = (adjoint * slope) @ layer.weight
        return adjoint, self.out(second).squeeze(-1)

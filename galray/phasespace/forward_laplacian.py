"""∇g and ∇²g of a scalar MLP in one pass with a backward written by hand.

The step of implicit score matching is the hot loop of training. Autograd would keep a node for each of
the elementwise operations on the d tangents; here each tangent tensor is written once and read as rarely
as can be, with the tangents' axis in front, where sums over it and products with per-star factors run over
contiguous memory. The first two layers' tangents are one product, since those of the input are constant:
∂ᵢz₂ = W₂ (φ'(z₁) ∘ W₁eᵢ) = φ'(z₁)ᵀ Mᵢ with Mᵢ = diag(W₁eᵢ) W₂ᵀ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from galray.phasespace.activations import derivatives
from galray.phasespace.settings import Activation

__all__ = ["ForwardLaplacian", "laplacian_by_autograd"]


class _Layer(NamedTuple):
    """What the backward pass needs of one hidden layer with z = W a + b: n stars, h units, d tangents."""

    value: Tensor  # φ(z) (n, h)
    slope: Tensor  # φ'(z)
    bend: Tensor  # φ''(z)
    jerk: Tensor  # φ'''(z)
    laplacian: Tensor  # ∇²φ(z) (n, h)
    square: Tensor  # Σᵢ (∂ᵢz)², (n, h), for the first layer (h,)
    linear: Tensor | None = None  # ∇²z (n, h)
    pushed: Tensor | None = None  # ∂ᵢz (d, n, h)
    tangents: Tensor | None = None  # ∂ᵢφ(z) (d, n, h), where a further layer takes them


def laplacian_by_autograd(
    activation: Activation, u: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], out: Tensor
) -> tuple[Tensor, Tensor]:
    """The same figures in operations that autograd can differentiate any number of times.

    Arguments:
        activation: The activation's name.
        u: Points (n, d).
        weights: Of the hidden layers, each (h_out, h_in).
        biases: Of the hidden layers, each (h_out,).
        out: Weight of the output, (h,).

    Returns:
        ∇g (n, d) and ∇²g (n,).
    """
    a, slope, bend = derivatives(activation, u @ weights[0].t() + biases[0], 2)
    tangents = slope.unsqueeze(1) * weights[0].t()  # (n, d, h)
    laplacian = bend * weights[0].square().sum(1)
    for weight, bias in zip(weights[1:], biases[1:], strict=True):
        pushed = tangents @ weight.t()
        a, slope, bend = derivatives(activation, a @ weight.t() + bias, 2)
        laplacian = slope * (laplacian @ weight.t()) + bend * pushed.square().sum(1)
        tangents = slope.unsqueeze(1) * pushed
    return tangents @ out, laplacian @ out


class ForwardLaplacian(torch.autograd.Function):
    """(∇g, ∇²g) of g(u) = w·φ(W_L … φ(W₁u + b₁) … + b_L) with two hidden layers or more.

    ``apply(activation, u, w, W₁, b₁, W₂, b₂, …)`` takes points (n, d), the output's weight (h,) and the
    hidden layers, and gives ∇g (n, d) and ∇²g (n,). A backward pass that is to be differentiated itself
    (``create_graph=True``) goes through `laplacian_by_autograd`.
    """

    @staticmethod
    def forward(ctx: Any, activation: Activation, u: Tensor, out: Tensor, *hidden: Tensor) -> Any:
        """Push the value, the d unit tangents and the Laplacian through the layers."""
        weights, biases = hidden[0::2], hidden[1::2]
        n, d = u.shape
        value, slope, bend, jerk = derivatives(activation, torch.addmm(biases[0], u, weights[0].t()), 3)
        square = weights[0].square().sum(1)
        layers = [_Layer(value, slope, bend, jerk, bend * square, square)]
        coupled = weights[0].t().unsqueeze(2) * weights[1].t()  # Mᵢ (d, h₁, h₂)
        for index in range(1, len(weights)):
            below, weight = layers[-1], weights[index]
            if below.tangents is None:
                pushed = torch.matmul(below.slope, coupled)
            else:
                pushed = (below.tangents.flatten(0, 1) @ weight.t()).unflatten(0, (d, n))
            linear = below.laplacian @ weight.t()
            z = torch.addmm(biases[index], below.value, weight.t())
            value, slope, bend, jerk = derivatives(activation, z, 3)
            square = _contract(pushed, pushed)
            laplacian = torch.addcmul(slope * linear, bend, square)
            tangents = slope * pushed if index + 1 < len(weights) else None
            layers.append(_Layer(value, slope, bend, jerk, laplacian, square, linear, pushed, tangents))
        top = layers[-1]
        assert top.pushed is not None
        gradient = (top.pushed * (top.slope * out)).sum(-1).t()
        ctx.activation, ctx.layers, ctx.coupled = activation, layers, coupled
        ctx.save_for_backward(u, out, *hidden)
        return gradient, top.laplacian @ out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """From the loss's derivatives by ∇g (n, d) and ∇²g (n,) to those by u, w and the layers."""
        u, out, *hidden = ctx.saved_tensors
        weights, biases = hidden[0::2], hidden[1::2]
        by_gradient, by_laplacian = grads
        if torch.is_grad_enabled():
            results = laplacian_by_autograd(ctx.activation, u, weights, biases, out)
            inputs = [t for t in (u, out, *hidden) if t.requires_grad]
            found = iter(torch.autograd.grad(results, inputs, grads, create_graph=True, allow_unused=True))
            return (None, *(next(found) if t.requires_grad else None for t in (u, out, *hidden)))

        layers: list[_Layer] = ctx.layers
        top = layers[-1]
        assert top.pushed is not None
        assert top.linear is not None
        along = by_gradient.t().unsqueeze(-1).contiguous()  # (d, n, 1)
        sums = _contract(top.pushed, along)
        by_out = torch.addmv((top.slope * sums).sum(0), top.laplacian.t(), by_laplacian)
        # Upstream of the layer at hand: by_lap of ∇²φ(z), by_pushed of ∂ᵢz, by_z of z.
        by_lap = torch.outer(by_laplacian, out)
        by_pushed = top.pushed * (2.0 * top.bend * by_lap)
        by_pushed.addcmul_(top.slope * out, along)
        by_z = top.bend * torch.addcmul(sums * out, by_lap, top.linear)
        by_z.addcmul_(top.jerk * top.square, by_lap)
        by_layers: list[Tensor] = []
        for index in range(len(weights) - 1, 0, -1):
            weight, layer, below = weights[index], layers[index], layers[index - 1]
            by_linear = layer.slope * by_lap
            by_weight = (by_z.t() @ below.value).addmm_(by_linear.t(), below.laplacian)
            by_bias = by_z.sum(0)
            by_value, by_lap = by_z @ weight, by_linear @ weight
            if below.tangents is None:
                break
            assert below.pushed is not None
            assert below.linear is not None
            flat = by_pushed.flatten(0, 1)
            by_weight.addmm_(flat.t(), below.tangents.flatten(0, 1))
            by_layers += [by_bias, by_weight]
            by_pushed = (flat @ weight).view_as(below.pushed)  # here still of ∂ᵢφ(z)
            sums = _contract(by_pushed, below.pushed)
            by_pushed = by_pushed.mul_(below.slope).addcmul_(below.pushed, 2.0 * below.bend * by_lap)
            by_z = below.slope * by_value
            by_z.addcmul_(below.bend, torch.addcmul(sums, by_lap, below.linear))
            by_z.addcmul_(below.jerk * below.square, by_lap)
        # The first layer: its tangents came through M.
        first, weight = layers[0], weights[1]
        by_coupled = torch.matmul(first.slope.t(), by_pushed)  # (d, h₁, h₂)
        by_slope = by_pushed[0] @ ctx.coupled[0].t()
        for pushed, matrix in zip(by_pushed[1:], ctx.coupled[1:], strict=True):
            by_slope.addmm_(pushed, matrix.t())
        by_weight += (by_coupled * weights[0].t().unsqueeze(2)).sum(0).t()
        by_layers += [by_bias, by_weight]
        by_z = torch.addcmul(first.slope * by_value, first.bend, by_slope)
        by_z.addcmul_(first.jerk * first.square, by_lap)
        by_first = (by_coupled * weight.t()).sum(2).t() + by_z.t() @ u
        by_first += 2.0 * weights[0] * (by_lap * first.bend).sum(0).unsqueeze(1)
        by_layers += [by_z.sum(0), by_first]
        by_u = by_z @ weights[0] if ctx.needs_input_grad[1] else None
        return (None, by_u, by_out, *by_layers[::-1])


def _contract(a: Tensor, b: Tensor) -> Tensor:
    """Σᵢ aᵢbᵢ over the leading axis, without the tensor of products."""
    total = a[0] * b[0]
    for first, second in zip(a[1:], b[1:], strict=True):
        total.addcmul_(first, second)
    return total

"""Smooth activations φ and their derivatives up to the third, sharing what they have in common."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from galray.phasespace.settings import Activation

__all__ = ["derivatives"]


def derivatives(name: Activation, z: Tensor, order: int) -> tuple[Tensor, ...]:
    """φ(z), φ'(z) … up to an order of 0 to 3.

    Arguments:
        name: ``tanh``, ``silu`` (z σ(z) with the logistic σ) or ``softplus`` (shifted: φ(0) = 0).
        z: Any shape.
        order: Of the highest derivative.

    Returns:
        order + 1 tensors of z's shape.
    """
    if name == "tanh":
        a = torch.tanh(z)
        if order == 0:
            return (a,)
        square = a * a
        slope = 1.0 - square
        # φ'' = −2φφ', φ''' = φ'(6φ² − 2)
        return (a, slope, -2.0 * a * slope, slope * (6.0 * square - 2.0))[: order + 1]
    if order == 0:
        return (F.silu(z),) if name == "silu" else (F.softplus(z) - math.log(2.0),)
    gate = torch.sigmoid(z)
    bend = gate * (1.0 - gate)  # σ'
    skew = bend * (1.0 - 2.0 * gate)  # σ''
    if name == "softplus":
        return (F.softplus(z) - math.log(2.0), gate, bend, skew)[: order + 1]
    value, slope = z * gate, torch.addcmul(gate, z, bend)
    if order == 1:
        return value, slope
    second = torch.addcmul(2.0 * bend, z, skew)
    if order == 2:
        return value, slope, second
    # σ''' = σ'(1 − 6σ')
    return value, slope, second, torch.addcmul(3.0 * skew, z, bend * (1.0 - 6.0 * bend))

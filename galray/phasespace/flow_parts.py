"""The normalised densities that a phase-space flow is made of: p(y) or p(y|c) in a few dimensions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, cast

import torch
import zuko
from torch import Tensor, nn

from galray.phasespace.continuous import ContinuousField
from galray.phasespace.mixtures import AutoregressiveMixture, GaussianMixture
from galray.phasespace.settings import FlowPart
from galray.phasespace.smooth_transforms import SmoothAffineTransform, SmoothSplineTransform

__all__ = ["PartDensity", "build_part"]


class PartDensity(nn.Module, ABC):
    """A density of y (*, features), given c (*, context) or nothing, and how it is trained."""

    matched = False
    """Whether training matches a field instead of maximising the likelihood."""

    def start_at(self, y: Tensor, generator: torch.Generator) -> None:
        """Place what the density is made of at rows of y (n, features), where it is made of Gaussians."""

    @abstractmethod
    def log_prob(self, y: Tensor, c: Tensor | None = None) -> Tensor:
        """Log p(y|c), differentiable in both: shape (*,)."""

    @abstractmethod
    def draw(self, n: int, c: Tensor | None, generator: torch.Generator) -> Tensor:
        """Samples (n, features), one for each row of c (n, context)."""

    def loss(self, y: Tensor, c: Tensor | None, generator: torch.Generator) -> Tensor:
        """What training minimises, of each row: shape (n,)."""
        return -self.log_prob(y, c)

    def held_out_loss(self, y: Tensor, c: Tensor | None) -> Tensor:
        """The same without noise of its own: shape (n,)."""
        return -self.log_prob(y, c)


class _Autoregressive(PartDensity):
    """Autoregressive transforms of zuko before a Gaussian or an autoregressive mixture.

    What an autoregressive density cannot represent depends on the axes it goes along. Axes turned at random,
    with the weights, make that error differ between the members of an ensemble, so that it averages out.
    """

    axes: Tensor

    def __init__(self, part: FlowPart, features: int, context: int) -> None:
        super().__init__()
        self.flow = zuko.lazy.Flow(_transforms(part, features, context), _base(part, features, context))
        axes = torch.linalg.qr(torch.randn(features, features))[0] if part.rotate else torch.eye(features)
        self.register_buffer("axes", axes)

    def log_prob(self, y: Tensor, c: Tensor | None = None) -> Tensor:
        return self.flow(c).log_prob(y @ self.axes)

    def draw(self, n: int, c: Tensor | None, generator: torch.Generator) -> Tensor:
        flow: Any = self.flow(c)
        dtype = next(self.parameters()).dtype
        features = flow.event_shape[0]
        # torch's distributions would draw from the global generator
        z = torch.randn(n, features, generator=generator, dtype=torch.float64).to(dtype)
        if isinstance(self.flow.base, AutoregressiveMixture):
            uniform = torch.rand(n, features, generator=generator, dtype=torch.float64).to(dtype)
            z = flow.base.draw(uniform, z)
        return flow.transform.inv(z) @ self.axes.mT


def _transforms(part: FlowPart, features: int, context: int) -> list[Any]:
    transforms: list[Any] = []
    for i in range(part.transforms):
        order = torch.arange(features) if i % 2 == 0 else torch.arange(features).flip(0)
        options: dict[str, Any] = {
            "features": features,
            "context": context,
            "order": order,
            "hidden_features": part.hidden,
            "activation": nn.SiLU,
            "univariate": SmoothAffineTransform,
        }
        if part.kind == "nsf":
            options["univariate"] = SmoothSplineTransform
            options["shapes"] = [(part.bins,), (part.bins,)]
        transforms.append(zuko.flows.MaskedAutoregressiveTransform(**options))
    if not transforms:
        transforms.append(zuko.lazy.UnconditionalTransform(zuko.transforms.IdentityTransform))
    return transforms


def _base(part: FlowPart, features: int, context: int) -> Any:
    if part.kind == "mixture":
        return AutoregressiveMixture(features, context, part.bins, part.hidden)
    return zuko.lazy.UnconditionalDistribution(
        zuko.distributions.DiagNormal, torch.zeros(features), torch.ones(features), buffer=True
    )


class _Gaussians(PartDensity):
    """A mixture of Gaussians with full covariances, all smooth functions of c."""

    def __init__(self, part: FlowPart, features: int, context: int) -> None:
        super().__init__()
        self.mixture = GaussianMixture(features, context, part.bins, part.hidden)

    def start_at(self, y: Tensor, generator: torch.Generator) -> None:
        self.mixture.start_at(y, generator)

    def log_prob(self, y: Tensor, c: Tensor | None = None) -> Tensor:
        return self.mixture.log_prob(y, c)

    def draw(self, n: int, c: Tensor | None, generator: torch.Generator) -> Tensor:
        return self.mixture.draw(n, c, generator)


class _Continuous(PartDensity):
    """A continuous flow, trained by flow matching."""

    matched = True

    def __init__(self, part: FlowPart, features: int, context: int) -> None:
        super().__init__()
        self.field = ContinuousField(features, context, part.hidden, part.steps)

    def log_prob(self, y: Tensor, c: Tensor | None = None) -> Tensor:
        return self.field.log_prob(y, c)

    def draw(self, n: int, c: Tensor | None, generator: torch.Generator) -> Tensor:
        return self.field.draw(n, c, generator)

    def loss(self, y: Tensor, c: Tensor | None, generator: torch.Generator) -> Tensor:
        return self.field.matching_loss(y, c, generator)

    def held_out_loss(self, y: Tensor, c: Tensor | None) -> Tensor:
        # The same noise for the same rows every time: curves fall smoothly and models compare pairwise.
        generator = torch.Generator(y.device).manual_seed(0x0DE)
        draws = [self.field.matching_loss(y, c, generator) for _ in range(8)]
        return torch.stack(draws).mean(0)


_KINDS: dict[str, Any] = {
    "mixture": _Autoregressive,
    "nsf": _Autoregressive,
    "maf": _Autoregressive,
    "gaussians": _Gaussians,
    "continuous": _Continuous,
}


def build_part(part: FlowPart, features: int, context: int) -> PartDensity:
    """An untrained density of `features` dimensions, given `context` numbers (0: unconditional)."""
    return cast(PartDensity, _KINDS[part.kind](part, features, context))

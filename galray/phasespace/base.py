"""The analytic base of the score network: a few Gaussians in velocity times a smooth log n(x).

Both parts are small smooth networks of position alone, fitted by likelihood: p(v|x) as a mixture density
network, n(x) by noise-contrastive estimation, which needs no normalisation and knows no border.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from galray.errors import GalrayError
from galray.phasespace.settings import BaseSettings

__all__ = ["AnalyticBase", "PositionDensity", "VelocityMixture"]

_CHUNK = 65_536


def _trunk(hidden: tuple[int, ...], outputs: int) -> nn.Sequential:
    widths = (3, *hidden)
    layers: list[nn.Module] = []
    for n_in, n_out in itertools.pairwise(widths):
        layers += [nn.Linear(n_in, n_out), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))


class PositionDensity(nn.Module):
    """An unnormalised log n of internal positions."""

    def __init__(self, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.net = _trunk(hidden, 1)

    def forward(self, ux: Tensor) -> Tensor:
        """Log n + const at internal positions (*, 3): shape (*,)."""
        return self.net(ux).squeeze(-1)


class VelocityMixture(nn.Module):
    """p(v|x) = Σ_k π_k(x) N(v; m_k(x), (A_kᵀA_k)⁻¹(x)) in internal coordinates.

    A mixture density network (Bishop 1994); A_k is lower triangular with positive diagonal.
    """

    def __init__(self, components: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.components = components
        self.net = _trunk(hidden, 10 * components)
        last = cast(nn.Linear, self.net[-1])
        nn.init.zeros_(last.weight)
        with torch.no_grad():
            bias = last.bias.view(components, 10)
            bias.zero_()
            # Widths spread about the standardised one, so that the components differ from the start.
            spread = torch.linspace(-0.7, 0.7, components) if components > 1 else torch.zeros(1)
            bias[:, 4:7] = -spread.unsqueeze(-1)

    def parameters_at(self, ux: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log π (*, K), m (*, K, 3), log diag A (*, K, 3) and the rest of A (*, K, 3) at positions (*, 3)."""
        raw = self.net(ux).unflatten(-1, (self.components, 10))
        return torch.log_softmax(raw[..., 0], -1), raw[..., 1:4], raw[..., 4:7], raw[..., 7:10]

    def log_prob(self, ux: Tensor, uv: Tensor) -> Tensor:
        """Log p(uv|ux): shape (*,)."""
        log_weight, mean, log_diag, below = self.parameters_at(ux)
        d = uv.unsqueeze(-2) - mean
        d0, d1, d2 = d.unbind(-1)
        a0, a1, a2 = log_diag.exp().unbind(-1)
        b10, b20, b21 = below.unbind(-1)
        square = (a0 * d0) ** 2 + (b10 * d0 + a1 * d1) ** 2 + (b20 * d0 + b21 * d1 + a2 * d2) ** 2
        log_normal = log_diag.sum(-1) - 0.5 * square - 1.5 * math.log(2.0 * math.pi)
        return torch.logsumexp(log_weight + log_normal, -1)


def _fit(module: nn.Module, loss: Callable[[int], Tensor], steps: int, learning_rate: float) -> None:
    optimizer = torch.optim.Adam(module.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss(step).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()


class AnalyticBase(nn.Module):
    """log f_base(u) = log n(u_x) + log p(u_v|u_x), its score, and the score's divergence."""

    def __init__(self, settings: BaseSettings) -> None:
        super().__init__()
        self.settings = settings
        self.density = PositionDensity(settings.hidden)
        self.velocity = VelocityMixture(settings.components, settings.hidden)

    def log_prob(self, u: Tensor) -> Tensor:
        """Unnormalised log density of internal coordinates (*, 6): shape (*,)."""
        return self.density(u[..., :3]) + self.velocity.log_prob(u[..., :3], u[..., 3:])

    def score(self, u: Tensor) -> Tensor:
        """∇_u log f_base: shape (*, 6), detached."""
        with torch.enable_grad():
            u = u.detach().requires_grad_(True)
            return torch.autograd.grad(self.log_prob(u).sum(), u)[0]

    def score_and_divergence(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The score (n, 6) and its divergence (n,), detached; seven backward passes."""
        with torch.enable_grad():
            u = u.detach().requires_grad_(True)
            score = torch.autograd.grad(self.log_prob(u).sum(), u, create_graph=True)[0]
            divergence = torch.zeros_like(u[:, 0])
            for i in range(u.shape[1]):
                divergence += torch.autograd.grad(score[:, i].sum(), u, retain_graph=True)[0][:, i]
        return score.detach(), divergence

    def fit(
        self,
        u: Tensor,
        inside: Callable[[Tensor], Tensor],
        generator: torch.Generator,
        log_efficiency: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Fit both parts to stars.

        n(x) is found by noise-contrastive estimation (Gutmann & Hyvärinen 2010): a logistic classifier
        between the stars and a reference of independent logistic marginals cut to the same ball, whose
        logit is log n − log n_reference. Both sides stop at the border, so the border leaves no trace. A
        known selection thins the reference as it thinned the stars, so that n is the density before it.

        Arguments:
            u: Standardised stars, shape (n, 6).
            inside: Function of internal positions (m, 3) that says which lie in the ball.
            generator: Source of every random number.
            log_efficiency: Log ε + const at internal positions (m, 3) of a known selection; −∞ where
                no star is seen.
        """
        cfg = self.settings
        n, batch = len(u), min(cfg.batch_size, len(u))
        steps = max(int(cfg.star_passes / batch), 1)
        ux, uv = u[:, :3].contiguous(), u[:, 3:].contiguous()
        width = math.sqrt(3.0) / math.pi  # logistic scale of unit variance

        def draw(count: int) -> Tensor:
            kept: list[Tensor] = []
            have = 0
            while have < count:
                p = torch.rand(2 * count, 3, generator=generator, dtype=torch.float64).clamp(1e-7, 1 - 1e-7)
                x = width * torch.logit(p)
                x = x[inside(x)]
                kept.append(x)
                have += len(x)
            return torch.cat(kept)[:count].to(u.dtype)

        reference = draw(min(max(4 * n, 4 * batch) * cfg.noise_ratio, 2_000_000))

        thinning = torch.ones(len(reference), dtype=u.dtype)
        if log_efficiency is not None:
            log_seen = torch.cat([log_efficiency(part.double()) for part in reference.split(_CHUNK)])
            thinning = (log_seen - log_seen.max()).exp().to(u.dtype)
            if not bool(torch.isfinite(thinning).all()):
                raise GalrayError(
                    "the selection's log ε is not a number, or +∞, somewhere in the ball",
                    "it must be defined in the whole ball: −∞ where no star is seen",
                )

        def log_reference(x: Tensor) -> Tensor:
            t = x / width
            return (-t - 2.0 * nn.functional.softplus(-t)).sum(-1)

        ratio = cfg.noise_ratio
        offset = math.log(ratio)

        def contrast(step: int) -> Tensor:
            stars = ux[torch.randint(n, (batch,), generator=generator)]
            drawn = torch.randint(len(reference), (ratio * batch,), generator=generator)
            both = torch.cat([stars, reference[drawn]])
            logit = self.density(both) - log_reference(both) - offset
            softplus = nn.functional.softplus
            return (
                softplus(-logit[:batch]).mean() + ratio * (thinning[drawn] * softplus(logit[batch:])).mean()
            )

        def likelihood(step: int) -> Tensor:
            index = torch.randint(n, (batch,), generator=generator)
            return -self.velocity.log_prob(ux[index], uv[index]).mean()

        _fit(self.density, contrast, steps, cfg.learning_rate)
        _fit(self.velocity, likelihood, steps, cfg.learning_rate)
        self.requires_grad_(False)

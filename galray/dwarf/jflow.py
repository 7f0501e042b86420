"""Train a spherical flow on (x, y, v_los), by smoothed densities or exactly, and invert it to a mass."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from galray.dwarf.flow import OdeRadialFlow, RadialFlow, RadialMap, SphereFlow
from galray.dwarf.jeans import inverse_jeans
from galray.dwarf.likelihood import weighted_quantile
from galray.dwarf.tracers import Tracers
from galray.dwarf.velocities import Shape
from galray.errors import GalrayError

__all__ = [
    "FlowFit",
    "Kernel",
    "LineOfSight",
    "choose_bandwidth",
    "fit_flow",
    "kernel_loss",
    "projected_loss",
]

_WIDER = 1.7  # of the base draws in the kernel loss


@dataclass(frozen=True)
class Kernel:
    """A Gaussian kernel in (x, y, v_los).

    Attributes:
        position: Width in kpc.
        velocity: Width in km/s.
    """

    position: float
    velocity: float


def kernel_loss(
    flow: SphereFlow,
    stars: Tensor,
    v_error: Tensor,
    kernel: Kernel,
    base: Tensor,
    smear: Tensor,
    log_weight: Tensor | None = None,
) -> Tensor:
    """Cross entropy of the kernel-smoothed data in the kernel-smoothed model.

    −(1/N N_K) Σ_a Σ_b ln [(1/N_G) Σ_c K(w_a + ε_b − T(z_c))]: the data's kernel ε_b and the model's are the
    same K_h, as in the method's paper. The stars' velocities already hold their errors, so the model's
    velocities are given the same: its kernel in velocity is √(h_v² + e_a²), the star's own is h_v alone,
    and no error is counted twice. Equal `base` and `smear` from call to call are common random numbers.

    Arguments:
        flow: The model.
        stars: (x, y, v_los − v_sys) in kpc and km/s, shape (N, 3).
        v_error: Velocity errors in km/s, shape (N,).
        kernel: K_h.
        base: Unit Gaussian numbers, shape (N_G, 6).
        log_weight: Of each, shape (N_G,), where they come from another density: far-flung stars, which no
            equal draw reaches, would otherwise rule the loss; none gives equal weights.
        smear: Unit Gaussian numbers, shape (N_K, N, 3).

    Returns:
        The loss, a scalar; in nats with densities per kpc² km/s.
    """
    model = flow.sample(base)[:, [0, 1, 5]]
    widths = torch.tensor([kernel.position, kernel.position, kernel.velocity], dtype=torch.float64)
    points = stars + smear * widths
    wide = torch.sqrt(kernel.velocity**2 + v_error**2)
    # positions first: |a − c|² = a² + c² − 2ac as one matrix product
    a, c = points[..., :2].reshape(-1, 2) / kernel.position, model[:, :2] / kernel.position
    exponent = -0.5 * (a.square().sum(-1)[:, None] + c.square().sum(-1)) + a @ c.T
    wide_all = wide.expand(len(smear), -1).reshape(-1, 1)
    exponent = exponent - 0.5 * ((points[..., 2].reshape(-1, 1) - model[:, 2]) / wide_all) ** 2
    if log_weight is not None:
        exponent = exponent + log_weight
    log_p = torch.logsumexp(exponent, -1) - math.log(len(model)) - torch.log(wide_all[:, 0])
    return -log_p.mean() + 2 * math.log(kernel.position) + 1.5 * math.log(2 * math.pi)


class LineOfSight:
    """Quadrature along the line of sight at every projected radius: z = R sinh t, Gauss-Legendre in t.

    Arguments:
        radius: Projected radii in kpc, shape (j,).
        outermost: Where the model ends, kpc.
        nodes: Quadrature nodes.
    """

    def __init__(self, radius: Tensor, outermost: float, nodes: int = 40) -> None:
        x, w = np.polynomial.legendre.leggauss(nodes)
        last = torch.arccosh(outermost / radius)[:, None]
        t = 0.5 * last * torch.from_numpy(x + 1)
        self.r = radius[:, None] * torch.cosh(t)
        self.weight = last * torch.from_numpy(w) * self.r  # 2 dz = 2 R cosh t dt
        self.s = 1 / torch.cosh(t) ** 2  # R²/r²


def projected_loss(
    flow: SphereFlow, radius: Tensor, v: Tensor, v_error: Tensor, sight: LineOfSight
) -> Tensor:
    """Exact −⟨ln p(R, v_los)⟩: n and the velocities projected by quadrature, no kernel.

    Arguments:
        flow: The model.
        radius: Projected radii in kpc, (N,).
        v: Velocities about the mean in km/s, (N,).
        v_error: Their errors, (N,).
        sight: The quadrature at these radii.

    Returns:
        A scalar in nats, with densities per kpc² km/s as in `kernel_loss`.
    """
    log_n = flow.positions.log_density(sight.r)
    sigma_r, _ = flow.dispersions(sight.r)
    variance = sigma_r**2 * (1 - flow.beta(sight.r) * sight.s)
    if flow.shape.requires_grad:
        shape = Shape.of(variance, flow.excess_kurtosis().expand_as(variance))
        log_v = shape.log_prob(v[:, None, None], (v_error**2)[:, None, None])[..., 0]
    else:
        total = variance + (v_error**2)[:, None]
        log_v = -0.5 * (v[:, None] ** 2 / total + torch.log(2 * math.pi * total))
    return -torch.logsumexp(torch.log(sight.weight) + log_n + log_v, -1).mean()


def choose_bandwidth(
    points: np.ndarray, v_error: np.ndarray, seed: int = 0, most: int = 1500, factors: int = 9
) -> Kernel:
    """Kernel of the greatest leave-one-out likelihood of the data, among multiples of Scott's rule.

    Arguments:
        points: (x, y, v), shape (n, 3).
        v_error: Their velocity errors; the velocity kernel is what the errors leave of the total width.
        seed: Draws the stars used when there are more than `most`.
        most: Stars used.
        factors: Multiples tried between 0.2 and 1.6.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, 0xBA7D]))
    rows = rng.permutation(len(points))[:most]
    w, error = points[rows], v_error[rows]
    spread = np.array([*np.median(np.abs(w[:, :2] - np.median(w[:, :2], 0)), 0) * 1.4826, w[:, 2].std()])
    n = len(w)
    # far-flung stars, each alone in its place, would ask for a kernel that drowns the centre
    bulk = np.hypot(w[:, 0] - np.median(w[:, 0]), w[:, 1] - np.median(w[:, 1])) < 3 * spread[:2].mean()
    rule = spread * n ** (-1 / 7)
    best, best_score = None, -np.inf
    for factor in np.geomspace(0.2, 1.6, factors):
        h = factor * np.array([rule[:2].mean(), rule[:2].mean(), rule[2]])
        d2 = ((w[:, None] - w) ** 2 / h**2).sum(-1)
        np.fill_diagonal(d2, np.inf)
        low = d2.min(1, keepdims=True)
        score = (np.log(np.exp(-0.5 * (d2 - low)).sum(1)) - 0.5 * low[:, 0])[bulk].mean() - np.log(h).sum()
        if score > best_score:
            best, best_score = h, score
    assert best is not None
    # the data are smeared by their errors already: only the rest of the chosen width is added
    rest = max(best[2] ** 2 - float(np.median(error)) ** 2, (0.25 * best[2]) ** 2)
    return Kernel(float(best[0]), math.sqrt(rest))


@dataclass
class FlowFit:
    """A trained flow and what follows from it.

    Attributes:
        flow: The model.
        losses: Of every step, shape (steps,).
        kernel: The kernel, if one was used.
        v_sys: Mean velocity taken off, km/s.
    """

    flow: SphereFlow
    losses: np.ndarray
    kernel: Kernel | None
    v_sys: float

    def mass(self, r: np.ndarray) -> np.ndarray:
        """M(<r) in Msun by the inverse Jeans equation, shape of r; nothing keeps it positive."""
        return self._mass(torch.as_tensor(r, dtype=torch.float64)).detach().numpy()

    def _mass(self, r: Tensor) -> Tensor:
        positions = self.flow.positions
        if isinstance(positions, RadialMap):
            slope = positions.log_slope(r)
        else:
            tracked = r if r.requires_grad else r.clone().requires_grad_(True)
            (slope,) = torch.autograd.grad(positions.log_density(tracked).sum(), tracked, create_graph=True)
            slope = slope * r
        radial2 = torch.exp(2 * self.flow.sigma(r))
        return inverse_jeans(r, slope, radial2, 2 * self.flow.sigma.log_slope(r), self.flow.beta(r))

    def density(self, r: np.ndarray) -> np.ndarray:
        """ρ(r) = (4πr²)⁻¹ dM/dr in Msun/kpc³, the derivative exact; shape of r."""
        x = torch.as_tensor(r, dtype=torch.float64).clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(self._mass(x).sum(), x)
        return (slope / (4 * math.pi * x**2)).detach().numpy()


def fit_flow(
    tracers: Tracers,
    anisotropy: Callable[[Tensor], Tensor] | None = None,
    *,
    loss: Literal["kernel", "projected"] = "projected",
    form: Literal["fast", "ode"] = "fast",
    cusp: float | None = 0.0,
    non_gaussian: bool = False,
    kernel: Kernel | None = None,
    steps: int = 400,
    batch: int = 512,
    base: int = 2048,
    learning_rate: float = 0.03,
    smoothness: float = 1.0,
    seed: int = 0,
) -> FlowFit:
    """Train n(r) and σ_r(r) of a spherical flow on sky positions and line-of-sight velocities.

    Arguments:
        tracers: The stars; they are checked. Where they have memberships, a star enters a step's batch with a
            chance that is in proportion to its own.
        anisotropy: β(r) of tensors; none is isotropic. This method takes it as given.
        loss: Smoothed by a kernel, or projected exactly.
        form: The monotone map, or the ODE.
        cusp: c, fixed; none learns it (fast form only).
        non_gaussian: Learn one kurtosis of the local velocities.
        kernel: K_h; none chooses it by cross-validation.
        steps: Steps of Adam, cosine schedule.
        batch: Stars per step.
        base: Model stars per step of the kernel loss.
        learning_rate: The largest.
        smoothness: Weight of the Gaussian prior on the bends of ln σ_r, in stars.
        seed: Of every random number.
    """
    tracers.check()
    if form == "ode" and cusp is None:
        raise GalrayError("the ODE form cannot learn the cusp", "give cusp, or use the fast form")
    rng = np.random.default_rng(np.random.SeedSequence([seed, 0x1F10]))
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    v_sys = float(np.average(tracers.v, weights=tracers.membership))
    points = np.stack([tracers.x, tracers.y, tracers.v - v_sys], -1)
    radius = np.hypot(points[:, 0], points[:, 1])
    weight = np.ones(len(tracers)) if tracers.membership is None else tracers.membership
    half = weighted_quantile(radius, weight, 0.5)
    positions: RadialFlow
    if form == "fast":
        positions = RadialMap(0.8 * half, cusp=0.1 if cusp is None else cusp, learn_cusp=cusp is None)
    else:
        positions = OdeRadialFlow(0.8 * half, cusp=float(cusp or 0.0), seed=seed)
    spread = math.sqrt(float(np.average(points[:, 2] ** 2, weights=weight)))
    flow = SphereFlow(positions, half, spread, anisotropy, non_gaussian)
    if loss == "kernel" and kernel is None:
        likely = weight > 0.5
        kernel = choose_bandwidth(points[likely], tracers.v_error[likely], seed)
    stars, error = torch.from_numpy(points), torch.from_numpy(tracers.v_error)
    r = torch.from_numpy(radius.clip(0.005 * half, 30.0 * half))
    outermost = 60.0 * half
    parameters = [p for p in flow.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    losses = np.empty(steps)
    z = torch.randn(base, 6, generator=generator, dtype=torch.float64)
    # positions from a wider base, weighted back to the unit Gaussian
    z[:, :3] *= _WIDER
    log_weight = -0.5 * (1 - 1 / _WIDER**2) * z[:, :3].square().sum(-1)
    log_weight = log_weight - torch.logsumexp(log_weight, 0) + math.log(base)
    smear = torch.randn(1, len(stars), 3, generator=generator, dtype=torch.float64)
    for i in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (0.5 * (1 + math.cos(math.pi * i / steps)) + 0.01)
        if tracers.membership is None:
            chosen = rng.permutation(len(stars))[:batch]
        else:
            chosen = rng.choice(len(stars), min(batch, len(stars)), p=weight / weight.sum())
        rows = torch.from_numpy(chosen)
        if loss == "kernel":
            assert kernel is not None
            value = kernel_loss(flow, stars[rows], error[rows], kernel, z, smear[:, rows], log_weight)
        else:
            sight = LineOfSight(r[rows], outermost)
            value = projected_loss(flow, r[rows], stars[rows, 2], error[rows], sight)
        total = value + smoothness * flow.sigma.roughness() / len(stars)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()
        losses[i] = value.item()
    return FlowFit(flow, losses, kernel if loss == "kernel" else None, v_sys)

"""The solvers on exact f: whose error is seen when there is no network and no noise of a score.

Least squares over velocities must give a(x) to round-off; Φ fitted to the exact scores of 2¹⁷ Plummer stars
is judged where the Plummer rows are; smoothed Poisson is judged against the density smoothed by a quadrature
of its own: four times as many nodes in every coordinate, or in one dimension for the sheet.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import Bench
from benchmarks._gravity_plummer import BALL, judge, stars
from galray.gravity import Kernel, PotentialSettings, fit_potential, least_squares, smooth, smoothed_density
from galray.mocks import HernquistSphere, IsochroneSphere, PlummerSphere
from galray.phasespace import ExactModel
from galray.potentials import NFW, Isochrone, MiyamotoNagai
from galray.units import G

MASS, SCALE = 1e10, 2.0


class Sheet:
    """The isothermal sheet ρ = Σ sech²(z/2h)/4h: a_z = −2πGΣ tanh(z/2h)."""

    def __init__(self, surface_density: float, h: float) -> None:
        self.surface_density, self.h = surface_density, h

    def acceleration(self, x: Tensor) -> Tensor:
        a = torch.zeros_like(x)
        a[..., 2] = -2 * math.pi * G * self.surface_density * torch.tanh(x[..., 2] / (2 * self.h))
        return a

    def smoothed(self, z: Tensor, kernel: Kernel) -> Tensor:
        """ρ*K by the trapezoidal rule over the kernel's marginal along z.

        Of a Gaussian cut at the ellipsoid of k widths, exp(−δ²/2h²) [1 − exp(−(k² − δ²/h²)/2)] is left.
        """
        reach = kernel.reach[2]
        offset = torch.linspace(-reach, reach, 20_001, dtype=torch.float64)
        q2 = (offset / kernel.h[2]).square()
        weight = torch.exp(-q2 / 2) * (1 - torch.exp(-(kernel.truncate**2 - q2) / 2))
        rho = self.surface_density / (4 * self.h) / torch.cosh((z[:, None] + offset) / (2 * self.h)).square()
        return (rho * weight).sum(1) / weight.sum()


def measure(bench: Bench) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    num_positions, num_velocities = (16, 200) if bench.quick else (128, 2000)
    _least_squares(bench, num_positions, num_velocities, generator)
    _potentials(bench)
    _poisson(bench, num_positions, generator)


def _least_squares(bench: Bench, positions: int, velocities: int, generator: torch.Generator) -> None:
    direction = torch.nn.functional.normalize(
        torch.randn(positions, 3, generator=generator, dtype=torch.float64)
    )
    x = direction * SCALE * torch.linspace(0.2, 3.0, positions, dtype=torch.float64)[:, None]
    for sphere in (PlummerSphere(MASS, SCALE), IsochroneSphere(MASS, SCALE), HernquistSphere(MASS, SCALE)):
        truth = sphere.potential_field.acceleration(x)
        name = type(sphere).__name__.removesuffix("Sphere")
        with bench.cpu():
            a = least_squares(ExactModel(sphere), x, num_velocities=velocities, generator=generator)
        error = ((a - truth).norm(dim=-1) / truth.norm(dim=-1)).max()
        bench.row(f"{name}: least squares on exact f, largest |da|/|a|", float(error), bar=1e-6)


def _potentials(bench: Bench) -> None:
    count = 2**14 if bench.quick else 2**17
    sphere, w = stars(count, 0)
    scores = sphere.score(w)
    masses: dict[str, Any] = {"num_masses": 400, "mass_width": 1.0}
    for name, settings in {
        "network on masses": PotentialSettings(basis="network", base="masses", **masses),
        "masses alone": PotentialSettings(basis="masses", **masses),
    }.items():
        with bench.cpu():
            field = fit_potential(scores, w, settings, seed=1, ball=BALL)
        found = judge(field, sphere)
        label = f"Plummer, {count} stars, exact scores: {name}"
        bar = 0.003 if name.startswith("network") and not bench.quick else None
        bench.row(f"{label}, a rms", found["a rms"], bar=bar)
        bench.row(f"{label}, density rms", found["density rms"])


def _poisson(bench: Bench, positions: int, generator: torch.Generator) -> None:
    kernel = Kernel()
    fine = Kernel(radial_nodes=24, polar_nodes=64, azimuthal_nodes=32)
    spread = torch.tensor([4.0, 4.0, 1.0], dtype=torch.float64)
    near = torch.randn(positions, 3, generator=generator, dtype=torch.float64) * spread
    x = near[near.norm(dim=-1) > 1.5]  # the NFW cusp and the thin disc's centre need a finer kernel
    for potential in (
        Isochrone(MASS, SCALE),
        NFW.from_density(1e7, 15.0),
        MiyamotoNagai(5e10, 2.6, 0.33),
    ):
        truth = smooth(potential.mass_density, x, fine)
        with bench.cpu():
            density = smoothed_density(potential, x, kernel)
        error = ((density - truth).abs() / truth).max()
        bench.row(
            f"{type(potential).__name__}: smoothed Poisson, largest |drho|/rho", float(error), bar=0.005
        )
    sheet = Sheet(5e7, 0.1)
    z = torch.from_numpy(np.linspace(-1.0, 1.0, 41))
    places = torch.stack([torch.zeros_like(z), torch.zeros_like(z), z], -1)
    truth = sheet.smoothed(z, kernel)
    with bench.cpu():
        density = smoothed_density(sheet, places, kernel)
    # of the largest: far from the sheet there is nothing to divide by
    error = (density - truth).abs().max() / truth.max()
    bench.row("thin sheet, h = 0.1 kpc: smoothed Poisson, largest |drho|/rho(0)", float(error), bar=0.005)

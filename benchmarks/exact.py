"""The solvers on exact densities: whose error is seen when there is no network.

Least squares over velocities with the analytic score must give a(x) to round-off; smoothed Poisson on an
analytic acceleration must give the analytic density smoothed with the same kernel.
"""

from __future__ import annotations

import torch

from benchmarks import Bench, main
from galray.gravity import Kernel, least_squares, smooth, smoothed_density
from galray.mocks import HernquistSphere, IsochroneSphere, PlummerSphere
from galray.phasespace import ExactModel
from galray.potentials import NFW, Isochrone, MiyamotoNagai, Plummer


def measure(bench: Bench) -> None:
    generator = torch.Generator().manual_seed(1)
    num_positions, num_velocities = (16, 200) if bench.quick else (128, 2000)
    direction = torch.nn.functional.normalize(
        torch.randn(num_positions, 3, generator=generator, dtype=torch.float64)
    )
    mass, scale = 1e10, 2.0
    for sphere in (PlummerSphere(mass, scale), IsochroneSphere(mass, scale), HernquistSphere(mass, scale)):
        radius = scale * torch.linspace(0.2, 3.0, num_positions, dtype=torch.float64)
        x = direction * radius[:, None]
        truth = sphere.potential_field.acceleration(x)
        with bench.cpu():
            a = least_squares(ExactModel(sphere), x, num_velocities=num_velocities, generator=generator)
        error = ((a - truth).norm(dim=-1) / truth.norm(dim=-1)).max()
        name = type(sphere).__name__.removesuffix("Sphere")
        bench.row(f"{name}: least squares on exact f, largest |da|/|a|", float(error), bar=1e-6)

    kernel = Kernel()
    near = torch.randn(num_positions, 3, generator=generator, dtype=torch.float64) * torch.tensor(
        [4.0, 4.0, 1.0]
    )
    for potential in (
        Plummer(mass, scale),
        Isochrone(mass, scale),
        NFW.from_density(1e7, 15.0),
        MiyamotoNagai(5e10, 2.6, 0.33),
    ):
        x = near[near.norm(dim=-1) > 1.5]  # the NFW cusp and the thin disc's centre need a finer kernel
        truth = smooth(potential.mass_density, x, kernel)
        with bench.cpu():
            density = smoothed_density(potential, x, kernel)
        error = ((density - truth).abs() / truth).max()
        bench.row(f"{type(potential).__name__}: smoothed Poisson, largest |drho|/rho", float(error), bar=0.01)


if __name__ == "__main__":
    main("exact", measure)

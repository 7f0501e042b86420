"""A barred mock Galaxy: gravity that turns with a known pattern speed, tracers stationary in its frame.

Stars start as a disc and are followed for their own random times in the turning gravity, as in
`galray.mocks.discs`: the random times have a smooth density many radial periods wide, so that integrating on
only shifts the window and what is left of the starting phases is suppressed, whatever the potential. The bar
looks the same after half a turn, so each star is taken at its place or at the one opposite, whichever lies
in the ball.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from galray.frame import GalacticFrame, cartesian
from galray.mocks.discs import giants, star_table
from galray.mocks.orbits import conserving
from galray.mocks.rotating_orbits import integrate_rotating, jacobi_energy
from galray.mocks.settings import BarredGalaxySettings, DiscSettings
from galray.potentials import NFW, Composite, LongMuraliBar, MiyamotoNagai
from galray.units import MSUN_PC3

__all__ = ["BarredGalaxy"]

_STEP = 1.0  # step × vertical frequency where a typical orbit of the guiding radius comes nearest
_NEAREST = 0.6  # that place, in guiding radii
_ENERGY_CUT = 8.0  # orbits above 8 σ² (0.03 %) are left out, as in the axisymmetric mock
_AZIMUTHS = 64
_PILOT = 16_384
_BATCH = 400_000


class BarredGalaxy:
    """The barred mock Galaxy.

    Arguments:
        settings: Mass model, bar and tracers.
        frame: Where the Sun is.
    """

    def __init__(
        self, settings: BarredGalaxySettings | None = None, frame: GalacticFrame | None = None
    ) -> None:
        self.settings = settings or BarredGalaxySettings()
        self.frame = frame or GalacticFrame()
        s, bar = self.settings, self.settings.bar
        u = self.frame.sun_galcen_distance_kpc / s.halo_scale_radius_kpc
        halo_density = s.halo_density_msun_pc3 * MSUN_PC3 * u * (1 + u) ** 2
        self.potential = Composite(
            {
                "bar": LongMuraliBar(
                    bar.mass, bar.half_length_kpc, bar.width_kpc, bar.height_kpc, bar.angle_deg
                ),
                "disc": MiyamotoNagai(s.disc_mass, s.disc_length_kpc, s.disc_height_kpc),
                "halo": NFW.from_density(halo_density, s.halo_scale_radius_kpc),
            }
        )

    @property
    def pattern_speed(self) -> float:
        """Ω_p in km/s/kpc, positive along Galactic rotation."""
        return self.settings.bar.pattern_speed_km_s_kpc

    def circular_velocity(self, radius: Tensor) -> Tensor:
        """√(−R ⟨a_R⟩) in the plane, ⟨⟩ over azimuth, in km/s, shape (n,)."""
        phi = torch.arange(_AZIMUTHS, dtype=torch.float64) * (2 * math.pi / _AZIMUTHS)
        at = torch.stack(torch.broadcast_tensors(radius[:, None], phi, torch.zeros(())), -1)
        x = cartesian(at)
        outward = (self.potential.acceleration(x) * x).sum(-1)  # R a_R
        return torch.sqrt(-outward.mean(1))

    def truth(self) -> dict[str, Any]:
        """What a run on this mock should find, as JSON values."""
        sun = torch.tensor(self.frame.sun_position, dtype=torch.float64)
        halo = self.potential.subset(["halo"])
        baryons = self.potential.subset(["bar", "disc"])
        return {
            "potential": self.potential.to_dict(),
            "baryons": baryons.to_dict(),
            "halo": halo.to_dict(),
            "frame": self.frame.as_dict(),
            "pattern_speed_km_s_kpc": self.pattern_speed,
            "sun": {
                "circular_velocity_km_s": self.circular_velocity(
                    torch.tensor([self.frame.sun_radius], dtype=torch.float64)
                ).item(),
                "acceleration": self.potential.acceleration(sun).tolist(),
                "rho": self.potential.mass_density(sun).item() / MSUN_PC3,
                "rho_baryons": baryons.mass_density(sun).item() / MSUN_PC3,
                "rho_dm": halo.mass_density(sun).item() / MSUN_PC3,
            },
        }

    def sample(
        self,
        seed: int,
        *,
        executor: Executor | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> pa.Table:
        """Draw the stars of the ball around the Sun.

        Arguments:
            seed: Root of every random stream; the result does not depend on the executor.
            executor: Runs the orbits; default: this process.
            progress: Called with (stars drawn so far, stars wanted).

        Returns:
            ``num_stars`` rows in random order with the columns of `galray.mocks.MilkyWay.sample`; the
            ``population`` is the number of the disc.
        """
        s = self.settings
        *streams, last = np.random.SeedSequence(seed).spawn(len(s.discs) + 1)
        counts = [round(s.num_stars * disc.fraction) for disc in s.discs]
        counts[0] += s.num_stars - sum(counts)
        parts, account, done = [], [], 0
        for disc, count, stream in zip(s.discs, counts, streams, strict=True):
            part, orbits = self._disc_stars(disc, count, np.random.default_rng(stream), executor)
            parts.append(part)
            account.append(orbits)
            done += count
            if progress is not None:
                progress(done, s.num_stars)
        rng = np.random.default_rng(last)
        order = rng.permutation(s.num_stars)
        w = torch.cat(parts).numpy()[order]
        population = np.repeat(np.arange(len(counts)), counts)[order]
        magnitude, colour = giants(np.minimum(population, 1), rng)
        description = {
            "mock": "barred_galaxy",
            "seed": seed,
            "settings": s.model_dump(mode="json"),
            "frame": self.frame.as_dict(),
            "orbits": account,
        }
        names = pa.array([f"disc_{k}" for k in population])
        return star_table(w, order, names, magnitude, colour, description)

    def starting_states(self, disc: DiscSettings, n: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """States (n, 6) of a disc at random azimuths in the plane, and their guiding radii (n,)."""
        low, high = self.settings.guiding_radii_kpc
        grid = np.linspace(low, high, 512)
        cumulative = np.cumsum(grid * np.exp(-grid / disc.scale_length_kpc))
        cumulative = (cumulative - cumulative[0]) / (cumulative[-1] - cumulative[0])
        speeds = self.circular_velocity(torch.from_numpy(grid)).numpy()
        radius = np.interp(rng.random(n), cumulative, grid)
        hotter = np.exp((self.frame.sun_radius - radius) / disc.sigma_length_kpc)
        energies = -np.log1p(math.expm1(-_ENERGY_CUT) * rng.random((2, n)))
        v_radius, v_z = (rng.integers(0, 2, (2, n)) * 2.0 - 1.0) * hotter * np.sqrt(2 * energies)
        cylinder = [
            radius,
            2 * math.pi * rng.random(n),
            np.zeros(n),
            disc.sigma_r_km_s * v_radius,
            np.interp(radius, grid, speeds),
            disc.sigma_z_km_s * v_z,
        ]
        return cartesian(torch.from_numpy(np.stack(cylinder, -1))), torch.from_numpy(radius)

    def mixed_orbits(
        self,
        disc: DiscSettings,
        n: int,
        rng: np.random.Generator,
        *,
        executor: Executor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Draw n orbits and follow each for its random time in the turning gravity.

        Returns:
            The stars' states (n, 6), and an account: the number of orbits, how many were integrated again
            with shorter steps, and the largest and median |ΔE_J|/v_c².

        Raises:
            RuntimeError: Orbits do not conserve E_J even with steps 81 times shorter.
        """
        start, radius = self.starting_states(disc, n, rng)
        period, step = self._periods_and_steps(radius)
        time = self.settings.mixing_periods * period * torch.from_numpy(rng.random((3, n)).mean(0))
        unit = float(self.circular_velocity(torch.tensor([self.frame.sun_radius], dtype=torch.float64))) ** 2
        before = jacobi_energy(self.potential, start, self.pattern_speed)

        def follow(rows: Tensor, shorter: int) -> tuple[Tensor, Tensor]:
            end = integrate_rotating(
                self.potential,
                start[rows],
                time[rows],
                step[rows] / shorter,
                self.pattern_speed,
                executor=executor,
            )
            after = jacobi_energy(self.potential, end, self.pattern_speed)
            return end, (after - before[rows]).abs() / unit

        return conserving(follow, n, self.settings.energy_tolerance, "|ΔE_J|/v_c²")

    def into_ball(self, w: Tensor) -> Tensor:
        """Those states (m, 6) that lie in the ball, or do after half a turn."""
        sun = torch.tensor(self.frame.sun_position, dtype=torch.float64)
        half_turn = torch.tensor([-1.0, -1.0, 1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
        facing = torch.where((w[:, :1] < 0), w, w * half_turn)  # the Sun stands at negative x
        inside = (facing[:, :3] - sun).square().sum(1) < self.settings.ball_radius_kpc**2
        return facing[inside]

    def _periods_and_steps(self, radius: Tensor) -> tuple[Tensor, Tensor]:
        """Radial periods of the guiding radii, and steps for their orbits, in kpc/(km/s)."""
        low, high = self.settings.guiding_radii_kpc
        grid = torch.linspace(_NEAREST * low, 1.01 * high, 512, dtype=torch.float64)
        speed = self.circular_velocity(grid)
        momentum2 = (grid * speed).square()
        (slope,) = torch.gradient(momentum2, spacing=(grid,))
        epicyclic = torch.sqrt(slope / grid**3)  # κ² = R⁻³ dL²/dR
        above = cartesian(torch.stack([grid, torch.zeros_like(grid), torch.full_like(grid, 1e-3)], -1))
        vertical = torch.sqrt(-self.potential.acceleration(above)[:, 2] / 1e-3)

        def at(r: Tensor, values: Tensor) -> Tensor:
            return torch.from_numpy(np.interp(r.numpy(), grid.numpy(), values.numpy()))

        return 2 * math.pi / at(radius, epicyclic), _STEP / at(_NEAREST * radius, vertical)

    def _disc_stars(
        self, disc: DiscSettings, count: int, rng: np.random.Generator, executor: Executor | None
    ) -> tuple[Tensor, dict[str, float]]:
        parts: list[Tensor] = []
        account: dict[str, float] = {}
        have, drawn = 0, 0
        while have < count:
            n = min(_PILOT, 1000 + 2 * count)
            if drawn:
                n = min(_BATCH, math.ceil((count - have) * drawn / max(have, 1) * 1.01) + 1000)
            w, part = self.mixed_orbits(disc, n, rng, executor=executor)
            parts.append(self.into_ball(w))
            have, drawn = have + len(parts[-1]), drawn + n
            for key, value in part.items():
                known = account.get(key, 0)
                account[key] = max(known, value) if key.endswith("error") else known + value
        return torch.cat(parts)[:count], account

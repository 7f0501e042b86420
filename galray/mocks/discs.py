"""A mock Milky Way: exact gravity, stationary tracers of thin disc, thick disc and stellar halo.

The discs are made of orbits. A distribution of integrals (guiding radius, radial and vertical energy) is
drawn, each orbit is followed for its own random time, and the star is taken where it then is: one star per
orbit. The random times have a smooth density (the mean of three uniform ones) that is many radial periods
wide, so what is left of the starting phases is suppressed by the cube of that number, whatever the potential;
integrating on only shifts the window, so the ensemble is stationary. The stellar halo has an exact
distribution function of energy. The Galaxy is axisymmetric, so a star at (R, z) is turned to a random azimuth
at which it lies in the ball, and kept with a probability proportional to the range of such azimuths.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from galray.frame import GalacticFrame, cartesian
from galray.mocks.orbits import MeridionalOrbits, conserving, energy, integrate, pericentre
from galray.mocks.settings import DiscSettings, KickSettings, MilkyWaySettings
from galray.potentials import NFW, Composite, FlattenedNFW, Hernquist, MiyamotoNagai, Potential
from galray.units import MSUN_PC3, MYR

__all__ = ["MilkyWay", "sample"]

Progress = Callable[[int, int], None]

_BARYONS = ("stellar_disc", "gas_disc", "bulge")
_STEP = 0.9  # step × highest frequency of the orbit: |ΔE/E| is below 1e-5 but for one orbit in a thousand
_ENERGY_CUT = 8.0  # orbits above 8 σ² (0.03 %) are left out: they could be unbound near the centre
_PILOT = 16_384
_BATCH = 400_000


class MilkyWay:
    """The mock Galaxy.

    Arguments:
        settings: Mass model and tracers.
        frame: Where the Sun is.
    """

    def __init__(self, settings: MilkyWaySettings | None = None, frame: GalacticFrame | None = None) -> None:
        self.settings = settings or MilkyWaySettings()
        self.frame = frame or GalacticFrame()
        p = self.settings.potential
        self.potential = Composite(
            {
                "stellar_disc": MiyamotoNagai(
                    p.stellar_disc_mass, p.stellar_disc_length_kpc, p.stellar_disc_height_kpc
                ),
                "gas_disc": MiyamotoNagai(p.gas_disc_mass, p.gas_disc_length_kpc, p.gas_disc_height_kpc),
                "bulge": Hernquist(p.bulge_mass, p.bulge_radius_kpc),
                "halo": self._halo(),
            }
        )

    def _halo(self) -> Potential:
        """The dark halo with its density at the Sun."""
        p = self.settings.potential
        density, scale = p.halo_density_msun_pc3 * MSUN_PC3, p.halo_scale_radius_kpc
        if p.halo_flattening == 1.0:
            x = self.frame.sun_galcen_distance_kpc / scale
            return NFW.from_density(density * x * (1 + x) ** 2, scale)
        unit = FlattenedNFW(1e12, scale, p.halo_flattening)
        mass = 1e12 * density / unit.mass_density(self.frame.sun_position).item()
        return FlattenedNFW(mass, scale, p.halo_flattening)

    @property
    def baryons(self) -> Composite:
        """Discs and bulge: everything but the dark halo."""
        return self.potential.subset(_BARYONS)

    @property
    def halo(self) -> Composite:
        """The dark halo."""
        return self.potential.subset(["halo"])

    def truth(self) -> dict[str, Any]:
        """What a run on this mock should find, as JSON values.

        Returns:
            ``potential``, ``baryons`` and ``halo`` as `Potential.to_dict` descriptions, ``frame``, and
            ``sun``: circular velocity (km/s), acceleration ((km/s)²/kpc) and densities (Msun/pc³) at the Sun.
        """
        sun = torch.tensor(self.frame.sun_position, dtype=torch.float64)
        density = {
            "rho": self.potential.mass_density(sun).item() / MSUN_PC3,
            "rho_baryons": self.baryons.mass_density(sun).item() / MSUN_PC3,
            "rho_dm": self.halo.mass_density(sun).item() / MSUN_PC3,
        }
        return {
            "potential": self.potential.to_dict(),
            "baryons": self.baryons.to_dict(),
            "halo": self.halo.to_dict(),
            "frame": self.frame.as_dict(),
            "sun": {
                "circular_velocity_km_s": self.potential.circular_velocity(self.frame.sun_radius).item(),
                "acceleration": self.potential.acceleration(sun).tolist(),
                **density,
            },
        }

    def sample(
        self, seed: int, *, executor: Executor | None = None, progress: Progress | None = None
    ) -> pa.Table:
        """Draw the stars of the ball around the Sun.

        Arguments:
            seed: Root of every random stream; the result does not depend on the executor.
            executor: Runs the orbits, such as a ``ProcessPoolExecutor``; default: this process.
            progress: Called with (stars drawn so far, stars wanted).

        Returns:
            ``num_stars`` rows in random order: x, y, z (kpc), vx, vy, vz (km/s) in the Galactocentric frame,
            ``orbit_id`` (int64, one star per orbit), ``population``, ``abs_g_mag`` and ``bp_rp``.
            The schema's metadata key ``galray`` holds the seed, settings, frame and counts as JSON.
        """
        s = self.settings
        *streams, kick_stream = np.random.SeedSequence(seed).spawn(5)
        kick_rng = np.random.default_rng(kick_stream)
        thick = round(s.num_stars * s.thick_disc.fraction)
        halo = round(s.num_stars * s.stellar_halo.fraction)
        wanted = {"thin_disc": s.num_stars - thick - halo, "thick_disc": thick, "stellar_halo": halo}
        states, account, done = [], {}, 0
        for (name, count), stream in zip(wanted.items(), streams[:3], strict=True):
            rng = np.random.default_rng(stream)
            report = None
            if progress is not None:
                start = done

                def report(n: int, start: int = start) -> None:
                    progress(start + n, s.num_stars)

            if name == "stellar_halo":
                part = self.sample_halo(count, rng)
            else:
                part, account[name] = self._disc_stars(
                    getattr(s, name), count, rng, executor, report, kick_rng
                )
            done += count
            if report is not None:
                report(count)
            states.append(part)
        rng = np.random.default_rng(streams[3])
        order = rng.permutation(s.num_stars)
        w = torch.cat(states).numpy()[order]
        population = np.repeat(np.arange(3), list(wanted.values()))[order]
        magnitude, colour = giants(population, rng)
        description = {
            "mock": "milky_way",
            "seed": seed,
            "settings": s.model_dump(mode="json"),
            "frame": self.frame.as_dict(),
            "stars": wanted,
            "orbits": account,
        }
        names = pa.DictionaryArray.from_arrays(population.astype(np.int8), list(wanted))
        return star_table(w, order, names.cast(pa.string()), magnitude, colour, description)

    # Discs -------------------------------------------------------------------------------------------------

    def starting_orbits(self, disc: DiscSettings, n: int, rng: np.random.Generator) -> MeridionalOrbits:
        """Draw n orbits of a disc, each at its guiding radius in the plane, with all its energy in motion.

        Guiding radii have the density R_g exp(−R_g / h), thinned out where orbits cannot reach the ball; that
        factor depends on L_z alone, an integral of motion, so the ensemble stays stationary.
        """
        grid, cumulative = self._guiding_radii(disc)
        radius = torch.from_numpy(np.interp(rng.random(n), cumulative, grid))
        hotter = torch.exp((self.frame.sun_radius - radius) / disc.sigma_length_kpc)
        top = -math.expm1(-_ENERGY_CUT)
        energies = torch.from_numpy(-np.log1p(-top * rng.random((2, n))))
        signs = torch.from_numpy(rng.integers(0, 2, (2, n)) * 2.0 - 1.0)
        v_radius, v_z = signs * hotter * torch.sqrt(2 * energies)
        state = torch.stack(
            [radius, torch.zeros_like(radius), disc.sigma_r_km_s * v_radius, disc.sigma_z_km_s * v_z], -1
        )
        return MeridionalOrbits(state, radius * self.potential.circular_velocity(radius))

    def mixed_orbits(
        self,
        disc: DiscSettings,
        n: int,
        rng: np.random.Generator,
        *,
        executor: Executor | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> tuple[MeridionalOrbits, dict[str, float]]:
        """Draw n orbits and follow each for its random time.

        Returns:
            The stars' meridional states, and an account: the number of orbits, how many were integrated again
            with shorter steps, and the largest and median |ΔE/E|.
        """
        orbits = self.starting_orbits(disc, n, rng)
        epicyclic, _ = self._frequencies(orbits.state[:, 0])
        period = 2 * math.pi / epicyclic
        time = self.settings.mixing_periods * period * torch.from_numpy(rng.random((3, n)).mean(0))
        step = self.longest_step(orbits)
        before = energy(self.potential, orbits)

        def follow(rows: Tensor, shorter: int) -> tuple[Tensor, Tensor]:
            end = integrate(
                self.potential,
                orbits[rows],
                time[rows],
                step[rows] / shorter,
                executor=executor,
                progress=progress if shorter == 1 else None,
            )
            return end.state, (energy(self.potential, end) / before[rows] - 1).abs()

        state, account = conserving(follow, n, self.settings.energy_tolerance, "|ΔE/E|")
        return MeridionalOrbits(state, orbits.angular_momentum), account

    def kicked(
        self,
        orbits: MeridionalOrbits,
        kick: KickSettings,
        rng: np.random.Generator,
        *,
        executor: Executor | None = None,
    ) -> MeridionalOrbits:
        """Kick a random part of the stars in v_z and follow them for the time since; the rest is steady."""
        share = kick.fraction / (1 - self.settings.stellar_halo.fraction)
        rows = torch.from_numpy(np.flatnonzero(rng.random(len(orbits)) < share))
        hit = MeridionalOrbits(orbits.state[rows].clone(), orbits.angular_momentum[rows])
        hit.state[:, 3] += kick.velocity_km_s
        time = torch.full((len(rows),), kick.time_myr / MYR, dtype=torch.float64)
        step = self.longest_step(hit) / 2  # no energy is checked here
        after = integrate(self.potential, hit, time, step, executor=executor)
        state = orbits.state.clone()
        state[rows] = after.state
        return MeridionalOrbits(state, orbits.angular_momentum)

    def longest_step(self, orbits: MeridionalOrbits) -> Tensor:
        """The step in kpc/(km/s) that resolves the fastest part of each orbit."""
        nearest = pericentre(self.potential, orbits)
        _, vertical = self._frequencies(nearest)
        # an orbit that leaves the disc crosses it in less than its period
        _, ordinary = self._frequencies(orbits.state[:, 0])
        height = torch.hypot(orbits.state[:, 1], orbits.state[:, 3] / ordinary)
        height = height / self.settings.potential.stellar_disc_height_kpc
        vertical = vertical * torch.sqrt(1 + height.square())
        # the centrifugal barrier's own frequency: d²/dR² of ½L_z²/R² is 3 L_z²/R⁴
        barrier = math.sqrt(3.0) * orbits.angular_momentum.abs() / nearest.square()
        return _STEP / torch.maximum(vertical, barrier)

    def turned_into_ball(self, orbits: MeridionalOrbits, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Turn stars to azimuths inside the ball.

        Returns:
            The states of the stars kept, shape (m, 6), and their indices, shape (m,).
        """
        radius, z = orbits.state[:, 0], orbits.state[:, 1]
        sun_radius, sun_z = self.frame.sun_radius, self.frame.sun_position[2]
        r = self.settings.ball_radius_kpc
        cosine = (radius.square() + sun_radius**2 + (z - sun_z).square() - r**2) / (2 * radius * sun_radius)
        widest = math.asin(min(1.0, r / sun_radius))
        half_range = torch.acos(cosine.clamp(max=1.0))  # zero outside the ball
        draws = torch.from_numpy(rng.random((2, len(orbits))))
        kept = torch.nonzero(draws[0] * widest < half_range).squeeze(1)
        phi = (2 * draws[1] - 1) * half_range
        cylinder = torch.stack(
            [radius, phi, z, orbits.state[:, 2], orbits.azimuthal_velocity, orbits.state[:, 3]], -1
        )
        return cartesian(cylinder[kept]), kept

    def _disc_stars(
        self,
        disc: DiscSettings,
        count: int,
        rng: np.random.Generator,
        executor: Executor | None,
        progress: Callable[[int], None] | None,
        kick_rng: np.random.Generator,
    ) -> tuple[Tensor, dict[str, float]]:
        """Batches of orbits until `count` stars lie in the ball; surplus stars are dropped unseen."""
        parts: list[Tensor] = []
        account: dict[str, float] = {}
        have, drawn = 0, 0
        while have < count:
            n = min(_PILOT, 1000 + 2 * count)
            if drawn:
                chance = max(have, 1) / drawn
                n = min(_BATCH, math.ceil((count - have) / chance * 1.01) + 1000)
            seen = 0

            def on_chunk(done: int, base: int = have, chance: float = have / max(drawn, 1)) -> None:
                nonlocal seen
                seen += done
                if progress is not None:
                    progress(min(count, base + int(seen * chance)))

            orbits, part = self.mixed_orbits(disc, n, rng, executor=executor, progress=on_chunk)
            if self.settings.kick is not None:
                orbits = self.kicked(orbits, self.settings.kick, kick_rng, executor=executor)
            w, _ = self.turned_into_ball(orbits, rng)
            parts.append(w)
            have, drawn = have + len(w), drawn + n
            for key, value in part.items():
                known = account.get(key, 0)
                account[key] = max(known, value) if key.endswith("error") else known + value
        return torch.cat([*parts, torch.empty(0, 6, dtype=torch.float64)])[:count], account

    def _frequencies(self, radius: Tensor) -> tuple[Tensor, Tensor]:
        """Epicyclic and vertical frequencies κ, ν of circular orbits in km/s/kpc, shape (n,)."""
        radius2 = radius.square().detach().requires_grad_()
        rotation2, vertical2 = self.potential.force_factors(radius2, torch.zeros_like(radius2))
        (slope,) = torch.autograd.grad(rotation2.sum(), radius2)
        # κ² = 4Ω² + R dΩ²/dR
        epicyclic2 = 4 * rotation2 + 2 * radius2 * slope
        return epicyclic2.detach().sqrt(), vertical2.detach().sqrt()

    def _guiding_radii(self, disc: DiscSettings) -> tuple[np.ndarray, np.ndarray]:
        """The cumulative distribution of guiding radii on a grid."""
        sun, ball = self.frame.sun_radius, self.settings.ball_radius_kpc
        edges = torch.tensor([sun - ball, sun + ball], dtype=torch.float64).clamp_min(1.0)
        epicyclic, _ = self._frequencies(edges)
        hotter = torch.exp((sun - edges) / disc.sigma_length_kpc)
        reach = (disc.sigma_r_km_s * hotter / epicyclic).numpy()  # rms epicycle at the ball's edges
        inner = max(1.0, sun - ball - 4 * reach[0]), max(2.0, sun - ball - 2.5 * reach[0])
        outer = sun + ball + 2.5 * reach[1], sun + ball + 4 * reach[1]
        grid = np.linspace(inner[0], outer[1], 4001)
        density = grid * np.exp(-grid / disc.scale_length_kpc)
        density *= _smooth_step((grid - inner[0]) / (inner[1] - inner[0]))
        density *= _smooth_step((outer[1] - grid) / (outer[1] - outer[0]))
        cumulative = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]))])
        return grid, cumulative / cumulative[-1]

    # Stellar halo -----------------------------------------------------------------------------------------

    def sample_halo(self, count: int, rng: np.random.Generator) -> Tensor:
        """Draw from f ∝ exp(−E/σ²) − 1 in the ball, by rejection from n ∝ exp(−Φ/σ²) and a Maxwellian."""
        sigma = self.settings.stellar_halo.sigma_km_s
        sun = torch.tensor(self.frame.sun_position, dtype=torch.float64)
        r = self.settings.ball_radius_kpc
        # Φ grows with R and |z|: no place in the ball is deeper than this one
        deepest = self.potential.potential([self.frame.sun_radius - r, 0.0, 0.0])
        parts, have = [torch.empty(0, 6, dtype=torch.float64)], 0
        while have < count:
            direction = rng.standard_normal((200_000, 3))
            direction /= np.linalg.norm(direction, axis=1, keepdims=True)
            x = sun + torch.from_numpy(r * np.cbrt(rng.random((len(direction), 1))) * direction)
            depth = self.potential.potential(x)
            draws = torch.from_numpy(rng.random((2, len(x))))
            v = sigma * torch.from_numpy(rng.standard_normal((len(x), 3)))
            total = depth + 0.5 * v.square().sum(1)
            kept = draws[0] < torch.exp((deepest - depth) / sigma**2)
            kept &= draws[1] < -torch.expm1(total / sigma**2)
            parts.append(torch.cat([x, v], 1)[kept])
            have += int(kept.sum())
        return torch.cat(parts)[:count]


def sample(
    settings: MilkyWaySettings,
    seed: int,
    *,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> pa.Table:
    """Draw the stars of a mock Milky Way: `MilkyWay.sample` in one call."""
    return MilkyWay(settings).sample(seed, executor=executor, progress=progress)


def star_table(
    w: np.ndarray,
    orbit_id: np.ndarray,
    population: pa.Array,
    magnitude: np.ndarray,
    colour: np.ndarray,
    description: dict[str, Any],
) -> pa.Table:
    """Mock stars as a table, one star per orbit, with what they are in the schema's metadata key ``galray``.

    Arguments:
        w: States (n, 6) in kpc and km/s.
        orbit_id: Number of each star's orbit.
        population: Name of its population.
        magnitude: Absolute G.
        colour: BP − RP.
        description: Seed, settings, frame and counts, as JSON can hold them.
    """
    columns = {name: w[:, i] for i, name in enumerate(("x", "y", "z", "vx", "vy", "vz"))}
    table = pa.table(
        {
            **columns,
            "orbit_id": orbit_id.astype(np.int64),
            "population": population,
            "abs_g_mag": magnitude,
            "bp_rp": colour,
        }
    )
    return table.replace_schema_metadata({"galray": json.dumps(description)})


def giants(population: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Absolute magnitudes M_G and colours G_BP − G_RP of giants, all bright enough to be seen to 4 kpc.

    A red clump (40 %, M_G = 0.45 ± 0.15) on a red giant branch whose counts grow as 10^{0.25 M} between −1
    and 1.5; brighter giants are redder, and the older, metal-poorer populations bluer. Simple on purpose: no
    inversion uses it but through the errors and cuts that depend on magnitude.

    Arguments:
        population: 0 thin disc, 1 thick disc, 2 stellar halo; shape (n,).
        rng: The stream to draw from.

    Returns:
        M_G and G_BP − G_RP in mag, shape (n,) each.
    """
    n = len(population)
    bright, faint, slope = -1.0, 1.5, 0.25 * math.log(10)
    low, high = math.exp(slope * bright), math.exp(slope * faint)
    branch = np.log(low + (high - low) * rng.random(n)) / slope
    clump = np.clip(0.45 + 0.15 * rng.standard_normal(n), bright, faint)
    magnitude = np.where(rng.random(n) < 0.4, clump, branch)
    colour = 1.25 - 0.12 * (magnitude - 0.5) + 0.05 * rng.standard_normal(n)
    return magnitude, colour - np.array([0.0, 0.06, 0.15])[population]


def _smooth_step(t: np.ndarray) -> np.ndarray:
    """From 0 at t ≤ 0 to 1 at t ≥ 1 with two continuous derivatives."""
    t = np.clip(t, 0, 1)
    return t**3 * (10 - 15 * t + 6 * t**2)

"""M(r) and ρ(r) of a sphere from weak-form moments of its stars: no network, no anisotropy assumed.

In equilibrium E[dg/dt] = 0 for any g(x, v). With g = r B_k(r) v_r, B_k a spline in ln r,

    E[(B_k + B_k') v_r² + B_k v_t²] = E[B_k G M(r) / r],      B_k' = dB_k/dln r,

the virial theorem of the stars under B_k: ΣB_k = 1 gives the whole one. Velocity errors σ add
(3 B_k + B_k') σ² to the left-hand side on average, which is subtracted.

Without the radii (stars seen on the sky, with proper motions: x, y, v_x, v_y), g = R H_k(R) v_R in the
plane of the sky does the same,

    E[(H_k + H_k') v_R² + H_k v_φ²] = E[H_k (R²/r²) G M(r) / r],

and the right-hand side needs of the unseen radii only their distribution, which star counts give by Abel
inversion: any function of r that is the mean of T(R) over directions, ∫ T(r sin θ) sin θ dθ, has as its
expectation the mean of T(R) over the stars. So the sky plane suffices, and still no anisotropy is assumed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from galray.dwarf.spherical_mass import (
    RadialMass,
    RadialMoments,
    TestFunctions,
    interpolation,
    radial_grid,
    solve_mass,
)
from galray.dwarf.spherical_settings import SphericalMassSettings
from galray.errors import GalrayError

__all__ = ["fit_spherical_moments", "moments_3d", "moments_on_sky"]

Array = NDArray[np.float64]

_DEPROJECTION = 20  # splines whose means over directions stand for functions of r
_ANGLES = 96


def fit_spherical_moments(
    w: Any,
    velocity_error: float | Array = 0.0,
    settings: SphericalMassSettings | None = None,
    *,
    seed: int = 0,
) -> RadialMass:
    """M(r) and ρ(r) from stars with 6D states, or from what the sky shows of them.

    Arguments:
        w: States around the centre and in its rest frame: (x, y, z, v_x, v_y, v_z), shape (n, 6), or without
            the depth (x, y, v_x, v_y, v_z), shape (n, 5); kpc and km/s. In 5D the line-of-sight velocity
            is not needed: v_z may be anything finite.
        velocity_error: Standard deviation of the Gaussian noise in each velocity component, km/s: one
            number, or one per star (n,).
        settings: Test functions, knots, prior.
        seed: Of the deal of stars into jackknife blocks.

    Returns:
        The halo, with posterior and jackknife.

    Raises:
        GalrayError: Wrong shapes, values that are not finite, negative errors, a star at the centre, or too
            few stars.
    """
    settings = settings or SphericalMassSettings()
    states, error = check_states(w, velocity_error)
    build = moments_3d if states.shape[1] == 6 else moments_on_sky
    return solve_mass(build(states, error, settings), settings, seed=seed)


def moments_3d(w: Array, error: Array, settings: SphericalMassSettings) -> RadialMoments:
    """The moments of stars with 6D states (n, 6) and velocity errors (n,)."""
    r, v_r, tangential2 = spherical_velocities(w)
    tests = TestFunctions(r, settings.test_functions)
    basis, slope = tests(r)
    square = (v_r**2 - error**2)[:, None]
    target = (basis + slope) * square + basis * (tangential2 - 2 * error**2)[:, None]
    grid = radial_grid(r)
    return RadialMoments(target, grid, tests(grid)[0], interpolation(grid, r), None, r)


def moments_on_sky(w: Array, error: Array, settings: SphericalMassSettings) -> RadialMoments:
    """The moments of stars with (x, y, v_x, v_y, v_z), shape (n, 5), and velocity errors (n,)."""
    x, y, v_x, v_y = w[:, 0], w[:, 1], w[:, 2], w[:, 3]
    R = np.hypot(x, y)
    radial = (x * v_x + y * v_y) / R
    across2 = v_x**2 + v_y**2 - radial**2
    tests = TestFunctions(R, settings.test_functions)
    basis, slope = tests(R)
    target = (basis + slope) * (radial**2 - error**2)[:, None] + basis * (across2 - error**2)[:, None]
    grid = np.geomspace(0.5 * R.min(), 6 * R.max(), len(radial_grid(R)))
    angle = (np.arange(_ANGLES) + 0.5) * (0.5 * np.pi / _ANGLES)
    sine = np.sin(angle)
    step = 0.5 * np.pi / _ANGLES

    def over_directions(functions: TestFunctions, power: int) -> Array:
        """∫ T(r sin θ) sinᵖ θ dθ at the grid, shape (J, functions)."""
        values = functions((grid[:, None] * sine).reshape(-1))[0].reshape(len(grid), _ANGLES, -1)
        return np.asarray(np.einsum("jak,a->jk", values, sine**power * step))

    # a function F of r as Σ c_m S_m by least squares where the stars are; then E[F(r)] = Σ c_m E[T_m(R)]
    shadows = TestFunctions(R, _DEPROJECTION)
    directions = over_directions(shadows, 1)
    importance = np.histogram(np.log(1.25 * R), np.append(np.log(grid), np.log(grid[-1] * 1.03)))[0]
    kernel = np.exp(-0.5 * (np.arange(-30, 31) / 10.0) ** 2)
    importance = np.convolve(importance, kernel / kernel.sum(), mode="same") / len(R) + 1e-6
    weighted = directions * importance[:, None]
    gram = directions.T @ weighted
    gram[np.diag_indices(len(gram))] += 1e-9 * np.trace(gram) / len(gram)
    spread = np.asarray(np.linalg.solve(gram, weighted.T), dtype=np.float64)
    occupancy = sparse.csr_array(shadows(R)[0])
    return RadialMoments(target, grid, over_directions(tests, 3), occupancy, spread, 1.1 * R)


def spherical_velocities(w: Array) -> tuple[Array, Array, Array]:
    """Radius (kpc), radial velocity (km/s) and squared tangential speed of states (n, 6): shape (n,) each."""
    x, v = w[:, :3], w[:, 3:]
    r = np.linalg.norm(x, axis=1)
    v_r = (x * v).sum(1) / r
    return r, v_r, np.maximum((v**2).sum(1) - v_r**2, 0.0)


def check_states(w: Any, velocity_error: Any) -> tuple[Array, Array]:
    """States (n, 5 or 6) and errors (n,) as float64 arrays, or a clear refusal."""
    states = np.asarray(w, dtype=float)
    if states.ndim != 2 or states.shape[1] not in (5, 6):
        raise GalrayError(
            f"states of shape {states.shape}",
            "give (x, y, z, vx, vy, vz) or (x, y, vx, vy, vz), one row a star",
        )
    error = np.broadcast_to(np.asarray(velocity_error, dtype=float), (len(states),))
    bad = np.flatnonzero(~(np.isfinite(states).all(1) & np.isfinite(error)))
    if bad.size:
        raise GalrayError(f"star {bad[0]} has a state or error that is not finite", "remove such rows")
    if (error < 0).any():
        raise GalrayError(f"star {np.flatnonzero(error < 0)[0]} has a negative velocity error", "mend it")
    at_centre = np.flatnonzero(~(states[:, : states.shape[1] - 3] != 0).any(1))
    if at_centre.size:
        raise GalrayError(f"star {at_centre[0]} stands at the centre itself", "check the centre")
    return states, error

"""Exact f and exact ε: what each way to solve for Φ and ε together errs by itself, and what it cannot know.

Truth is a Plummer sphere (G = M = b = 1) behind a smooth ε without symmetry, or, for the moments, behind an
axially symmetric one, integrated by quadrature. Errors are over positions with r uniform in 0.3-3 b.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.special import roots_jacobi
from torch import Tensor

from benchmarks import Bench
from galray.gravity import DustSettings, Moments, MomentsSettings, Region, fit_dust, identifiability
from galray.mocks import HernquistSphere, MilkyWay, PlummerSphere
from galray.units import G

__all__ = ["measure"]

BALL = Region((0.0, 0.0, 0.0), 4.0)
SPHERE = PlummerSphere(1.0 / G, 1.0)
BAR_A, BAR_LOG = 0.005, 0.02
FITS: dict[str, Any] = {
    "potential_basis": "Rz",
    "num_potential_splines": (12, 17),
    "concentration": (2.5, 2.5),
    "selection_basis": "xyz",
    "num_selection_splines": (13, 13, 13),
    "selection_concentration": (1.0, 1.0, 1.0),
    "penalty": 1e-9,
    "epochs": 2,
}
CONDITIONAL = {
    "selection_basis": "Rz",
    "num_selection_splines": (12, 17),
    "selection_concentration": (2.5, 2.5),
}


def smooth_log_epsilon(x: Tensor) -> Tensor:
    """A smooth selection with no symmetry."""
    r2 = x.square().sum(-1)
    return -1.5 * r2 / (4 + r2) - 0.4 * torch.tanh(x[..., 0] / 2)


def flat_log_epsilon(x: Tensor) -> Tensor:
    """A smooth selection that is axially symmetric and deepest in the plane."""
    r2 = x[..., 0] ** 2 + x[..., 1] ** 2
    return -1.6 * r2 / (4 + r2) * torch.exp(-(x[..., 2] ** 2) / 4)


def thinned(count: int, seed: int, log_epsilon: Any, sphere: Any = SPHERE, ball: Region = BALL) -> Tensor:
    """So many stars of a sphere in the ball, seen through ε: shape (count, 6)."""
    parts: list[Tensor] = []
    generator = torch.Generator().manual_seed(seed)
    have, number = 0, 0
    while have < count:
        w = sphere.sample(2 * count, [seed, number])
        w = w[w[:, :3].norm(dim=1) < ball.radius]
        chance = torch.rand(len(w), generator=generator, dtype=torch.float64)
        parts.append(w[chance < log_epsilon(w[:, :3]).exp()])
        have, number = have + len(parts[-1]), number + 1
    return torch.cat(parts)[:count]


def gradient(function: Any, x: Tensor) -> Tensor:
    """The gradient of a function of positions (n, 3)."""
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


def places(count: int = 4096, low: float = 0.3, high: float = 3.0, seed: int = 1) -> Tensor:
    """Random directions, r uniform: shape (count, 3)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 3))
    return torch.from_numpy(x / np.linalg.norm(x, axis=1)[:, None] * rng.uniform(low, high, (count, 1)))


def acceleration_error(field: Any, x: Tensor, sphere: Any = SPHERE) -> float:
    """The rms of |Δa|/|a|."""
    truth = sphere.potential_field.acceleration(x)
    return float(((field.acceleration(x) - truth).norm(dim=1) / truth.norm(dim=1)).square().mean().sqrt())


def quadrature(moments: Moments, log_epsilon: Any, ball: Region) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights that integrate ε f of the Plummer sphere, exactly in velocity, as if they were stars.

    The icosahedron integrates polynomials of direction up to order 5, Gauss's rule those of v²; between all
    breaks of the splines there are four Gaussian nodes along R and along z.

    Arguments:
        moments: Whose integrals are wanted, in (R, z).
        log_epsilon: An axially symmetric log ε.
        ball: The ball.

    Returns:
        States (n, 6) and weights (n,).
    """
    golden = (1 + 5**0.5) / 2
    corners = [np.roll([0.0, a, b * golden], k) for k in range(3) for a in (-1, 1) for b in (-1, 1)]
    directions = np.array(corners) / np.sqrt(1 + golden**2)
    nodes, speed_weight = roots_jacobi(3, 3.5, 0.5)  # (v/v_esc)² is Beta(3/2, 9/2)
    unit = (np.sqrt((nodes + 1) / 2)[:, None, None] * directions).reshape(-1, 3)
    weight_v = np.repeat(speed_weight / speed_weight.sum(), 12) / 12
    axes = []
    for i in range(2):
        bases: Any = (moments.tests, moments.basis, moments.selection_basis)
        breaks = np.unique(np.concatenate([b.axes[i].breaks for b in bases]).round(9))
        g, gw = np.polynomial.legendre.leggauss(4)
        half = np.diff(breaks)[:, None] / 2
        axes.append(((breaks[:-1, None] + half + half * g).ravel(), (half * gw).ravel()))
    (r, rw), (z, zw) = axes
    x = np.stack([np.repeat(r, len(z)), np.zeros(len(r) * len(z)), np.tile(z, len(r))], 1)
    weight = np.repeat(rw * r, len(z)) * np.tile(zw, len(r))
    inside = np.linalg.norm(x, axis=1) < ball.radius
    x, weight = x[inside], weight[inside]
    place = torch.from_numpy(x)
    weight = weight * (SPHERE.number_density(place) * log_epsilon(place).exp()).numpy()
    escape = torch.sqrt(-2 * SPHERE.potential_field.potential(place)).numpy()
    w = np.concatenate([np.repeat(x, len(unit), 0), (escape[:, None, None] * unit).reshape(-1, 3)], 1)
    mass = (weight[:, None] * weight_v).ravel()
    return w, mass / mass.mean()


def measure(bench: Bench) -> None:
    """Every row of the group."""
    _scores(bench)
    _moments(bench)
    _identifiability(bench)


def _row(bench: Bench, name: str, error: float, log: float, held: bool = True) -> None:
    label = f"exact f and epsilon, {name}"
    bars = (BAR_A, BAR_LOG) if held and not bench.quick else (None, None)
    bench.row(f"{label}: acceleration", error, "rms", bar=bars[0], peer="0.32 % median, analytic score (JAX)")
    bench.row(f"{label}: log epsilon, constant removed", log, "rms", bar=bars[1])


def _scores(bench: Bench) -> None:
    count = 20_000 if bench.quick else 80_000
    w = thinned(count, 1, smooth_log_epsilon)
    x = places()
    scores = SPHERE.score(w)
    seen = scores.clone()
    seen[:, :3] += gradient(smooth_log_epsilon, w[:, :3])
    conditional = scores.clone()
    conditional[:, :3] -= gradient(lambda y: torch.log(SPHERE.number_density(y)), w[:, :3])

    def log_observed(y: Tensor) -> Tensor:
        return torch.log(SPHERE.number_density(y)) + smooth_log_epsilon(y)

    for coarse in (9, 11):  # what is left is the splines' own error: it falls as they become finer
        settings = DustSettings.model_validate(
            FITS | {"basis": "spline", "num_selection_splines": (coarse,) * 3}
        )
        with bench.cpu():
            found = fit_dust(seen, w, settings, seed=1, ball=BALL, check=False)
        log = float((found.log_efficiency(x) - smooth_log_epsilon(x)).std())
        name = f"joint, spline, {count} stars, {coarse}^3 splines of epsilon"
        _row(bench, name, acceleration_error(found, x), log, held=False)
    for basis in ("spline", "network"):
        for variant, given in (("joint", seen), ("conditional", conditional)):
            options = FITS | {"basis": basis, "variant": variant}
            if variant == "conditional":
                options |= CONDITIONAL | {"selection_amplitude": 10.0}
            settings = DustSettings.model_validate(options)
            with bench.cpu():
                found = fit_dust(given, w, settings, seed=1, ball=BALL, log_density=log_observed, check=False)
            log = float((found.log_efficiency(x) - smooth_log_epsilon(x)).std())
            _row(bench, f"{variant}, {basis}, {count} stars", acceleration_error(found, x), log)


def _moments(bench: Bench) -> None:
    ball = Region((0.0, 0.0, 0.0), 6.0)
    settings = MomentsSettings(
        num_potential_splines=(12, 17),
        num_test_splines=(13, 21),
        concentration=(2.5, 2.5),
        selection="shared",
        num_selection_splines=(10, 11),
        selection_concentration=(1.0, 1.0),
        window=0.3,
    )
    x = places(high=2.5)
    with bench.cpu():
        moments = Moments(settings, ball)
        w, mass = quadrature(moments, flat_log_epsilon, ball)
        found = moments.result([moments.sums(w, mass)], penalty=1e-9)
    log = float((found.selections["shared"].log_efficiency(x) - flat_log_epsilon(x)).std())
    _row(bench, "moments by quadrature", acceleration_error(found.potential, x), log)


def _identifiability(bench: Bench) -> None:
    """How far accelerations are left to the prior of log ε, for isothermal tracers and others."""
    count = 20_000 if bench.quick else 100_000
    rng = np.random.default_rng(0)
    tracers: dict[str, tuple[np.ndarray, Any, bool]] = {
        "isothermal": (rng.normal(size=(count, 6)) * np.repeat([1.3, 1.0], 3), BALL, True)
    }
    for name, sphere in (("Plummer", SPHERE), ("Hernquist", HernquistSphere(1.0 / G, 1.0))):
        tracers[name] = (thinned(count, 3, smooth_log_epsilon, sphere).numpy(), BALL, False)
    from benchmarks._dust_disc import STARS, disc_states

    sun = MilkyWay().frame.sun_position
    tracers["disc mock"] = (disc_states(STARS[0])[:count], Region(sun, 4.0), False)
    for name, (w, ball, degenerate) in tracers.items():
        with bench.cpu():
            told = identifiability(w, ball)
        print(f"# {name}: {told}", flush=True)
        bench.row(
            f"identifiability, {name}, {count} stars: acceleration left to the prior",
            told.uncertainty,
            bar=0.5,
            at_least=degenerate,
        )

"""Orbits in gravity that turns at a steady rate: many stars at once, symplectic, order 4."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from galray.mocks.orbits import DRIFTS, KICKS, in_chunks
from galray.potentials import Potential

__all__ = ["integrate_rotating", "jacobi_energy"]


def jacobi_energy(potential: Potential, w: Tensor, pattern_speed: float) -> Tensor:
    """E_J = ½v² + Φ − Ω_p L in (km/s)², conserved where gravity turns with Ω_p; shape (n,).

    Arguments:
        potential: Gravity as it stands in the axes of `w`.
        w: States (n, 6), velocities in the inertial frame.
        pattern_speed: Ω_p in km/s/kpc, positive along Galactic rotation, like L = y v_x − x v_y.
    """
    momentum = w[:, 1] * w[:, 3] - w[:, 0] * w[:, 4]
    return potential.potential(w[:, :3]) + 0.5 * w[:, 3:].square().sum(1) - pattern_speed * momentum


def integrate_rotating(
    potential: Potential,
    w: Tensor,
    time: Tensor,
    max_step: Tensor,
    pattern_speed: float,
    *,
    executor: Executor | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Follow each star for its own time in the axes that turn with the gravity.

    In those axes H = ½v² − Ω_p L + Φ(x): its first two terms are a straight flight and a turn, both exact,
    and Φ stands still, so the scheme of `galray.mocks.orbits` applies as it is.

    Arguments:
        potential: Gravity in the turning axes.
        w: States (n, 6): positions and inertial velocities, both along the turning axes.
        time: How long each star goes on, in kpc/(km/s), shape (n,).
        max_step: Longest allowed step, shape (n,).
        pattern_speed: Ω_p in km/s/kpc, positive along Galactic rotation.
        executor: Runs the chunks; default: this process.
        progress: Called with the number of stars done after each chunk.

    Returns:
        The states after `time`, in the order given, shape (n, 6).
    """
    time, max_step = time.to(torch.float64), max_step.to(torch.float64)
    options: dict[str, Any] = {"executor": executor, "progress": progress}
    return in_chunks(_advance, potential, (w,), time, max_step, pattern_speed, **options)


def _advance(
    potential: Potential, w: np.ndarray, step: np.ndarray, num_steps: int, pattern_speed: float
) -> np.ndarray:
    """Kick–drift compositions; the last kick of a step joins the next."""
    x = torch.tensor(w[:, :3].T)  # (3, n): each coordinate contiguous
    v = torch.tensor(w[:, 3:].T)
    h = torch.from_numpy(step)
    # seen from the turning axes, what stands still turns against the rotation
    drifts = [(a * h, torch.cos(a * h * pattern_speed), torch.sin(a * h * pattern_speed)) for a in DRIFTS]
    kicks = [b * h for b in KICKS]
    joined = kicks[0] + kicks[-1]

    def kick(amount: Tensor) -> None:
        v.addcmul_(amount, potential.acceleration(x.T).T)

    def turn(u: Tensor, cosine: Tensor, sine: Tensor) -> None:
        first = u[0] * cosine - u[1] * sine
        u[1] = u[0] * sine + u[1] * cosine
        u[0] = first

    with torch.inference_mode():
        kick(kicks[0])
        for i in range(num_steps):
            for stage, (amount, cosine, sine) in enumerate(drifts):
                x.addcmul_(amount, v)
                turn(x, cosine, sine)
                turn(v, cosine, sine)
                if stage < 5:
                    kick(kicks[stage + 1])
            kick(joined if i < num_steps - 1 else kicks[-1])
        return torch.cat([x, v]).T.contiguous().numpy()

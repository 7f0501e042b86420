"""Rows of the dwarf benchmark that need no halo posterior: two forms of a flow, and 6D stars."""

from __future__ import annotations

import time

import numpy as np

from benchmarks import Bench

__all__ = ["measure_forms", "measure_sixd"]


def measure_forms(bench: Bench) -> None:
    """CPU time of one training step of the radial flow's fast form beside its ODE form."""
    import torch

    from galray.dwarf import Tracers
    from galray.dwarf.jflow import Kernel, fit_flow
    from galray.mocks.dwarfs import gaia_challenge

    torch.set_num_threads(1)
    tracers = Tracers.project(gaia_challenge("PlumCoreOm").sample_noisy(1000, 1).numpy())
    kernel = Kernel(0.03, 1.5)

    def step(form: str, loss: str, few: int, many: int) -> float:
        """CPU seconds per step: the difference of two trainings, so that set-up drops out."""
        options = {"loss": loss, "form": form, "kernel": kernel, "seed": 1}
        fit_flow(tracers, steps=1, **options)  # type: ignore[arg-type]
        spent = []
        for steps in (few, many):
            begin = time.process_time()
            fit_flow(tracers, steps=steps, **options)  # type: ignore[arg-type]
            spent.append(time.process_time() - begin)
        return (spent[1] - spent[0]) / (many - few)

    with bench.cpu():
        found = {
            loss: (
                step("fast", loss, 5, 25 if bench.quick else 65),
                step("ode", loss, 1, 3 if bench.quick else 6),
            )
            for loss in ("kernel", "projected")
        }
        positions_fast, positions_ode = _positions()
    for loss, (fast, ode) in found.items():
        bench.row(f"training step, {loss} loss, 512 of 1,000 stars: CPU, fast form", 1e3 * fast, "ms")
        bench.row(f"training step, {loss} loss, 512 of 1,000 stars: CPU, ODE form", 1e3 * ode, "ms")
        head = f"training step, {loss} loss: ODE form over fast form"
        bench.row(head, ode / fast, bar=10.0, at_least=True)
    ratio = positions_ode / positions_fast
    bench.row(
        "radial flow alone, ln n(r) and gradient: ODE form over fast form", ratio, bar=10.0, at_least=True
    )


def _positions() -> tuple[float, float]:
    """CPU seconds of value and gradient of the positions' likelihood, fast and ODE form."""
    import torch

    from galray.dwarf.flow import OdeRadialFlow, RadialMap

    r = torch.from_numpy(np.random.default_rng(1).exponential(0.25, 2048))
    spent = []
    for flow in (RadialMap(0.2), OdeRadialFlow(0.2, seed=1)):
        for _ in range(2):
            flow.log_density(r).mean().backward()
        begin = time.process_time()
        for _ in range(10):
            flow.log_density(r).mean().backward()
        spent.append((time.process_time() - begin) / 10)
    return spent[0], spent[1]


def measure_sixd(bench: Bench) -> None:
    """ρ(r) of PlumCoreOm from 10,000 stars with all six coordinates, by score and by moments."""
    from galray.dwarf import fit_spherical_moments, fit_spherical_score
    from galray.mocks.dwarfs import gaia_challenge

    mock = gaia_challenge("PlumCoreOm")
    r = np.geomspace(0.15, 0.8, 31)
    count, stars = (1, 2000) if bench.quick else (3, 10_000)
    ratios: dict[str, list[np.ndarray]] = {"moments": [], "score": []}
    with bench.cpu():
        for seed in range(count):
            w = mock.sample_noisy(stars, 2000 + seed).numpy()
            ratios["moments"].append(fit_spherical_moments(w, 2.0, seed=seed).density(r) / mock.density(r))
            _, mass = fit_spherical_score(w, 2.0, seed=seed)
            ratios["score"].append(mass.density(r) / mock.density(r))
    for name, found in ratios.items():
        error = float(np.abs(np.median(found, axis=0) - 1).max())
        head = f"PlumCoreOm {stars:,} stars in 6D, {name}, median of {count}: |drho|/rho 0.15-0.8 kpc"
        bench.row(head, error, bar=0.15)

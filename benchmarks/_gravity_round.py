"""A prior of a round mass, its strength found by two halves of the stars: on a sphere, and on a disc.

The sphere is that of `benchmarks._gravity_plummer`, judged as there, from its eight networks and two more,
each trained on half the stars. The disc is Miyamoto & Nagai's with (a, b) = (0.5, 0.8) and isothermal stars:
there the prior must do no harm. The prior's form was settled on realisations that no row uses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import Bench
from benchmarks._gravity_parts import cpu_seconds, part, recipe
from benchmarks._gravity_plummer import (
    BALL,
    BEST,
    HIGH,
    MEMBERS,
    POTENTIAL,
    REALISATIONS,
    SCORE,
    TRAINING,
    averaged,
    invert,
    member,
    rows,
    stars,
)
from galray.gravity import choose_roundness, fit_potential
from galray.mocks import RotatingIsothermal
from galray.phasespace import Ball, build_model, objective
from galray.potentials import MiyamotoNagai
from galray.training import fit, split
from galray.units import G

__all__ = ["measure"]


def chosen(label: str, halves: list[tuple[Tensor, Tensor]], ball: Ball) -> tuple[float, float]:
    """The roundness that two halves find for each other, and the CPU-seconds spent."""

    def work(folder: Path) -> dict[str, Any]:
        first, second = halves
        return {"roundness": choose_roundness(first, second, POTENTIAL, seed=0, ball=ball)}

    models = [recipe(SCORE), recipe(TRAINING)]
    task = {"what": f"roundness, {label}", "potential": POTENTIAL.model_dump(mode="json"), "recipe": models}
    found, _ = part(task, work)
    return found["roundness"], found["cpu_seconds"]


def _sphere(bench: Bench, count: int, epochs: int, members: int) -> None:
    found, strengths = [], []
    for realisation in REALISATIONS[:1] if bench.quick else REALISATIONS:
        sphere, w = stars(count, realisation)
        mean, spent = averaged(count, realisation, members, epochs)
        order = torch.from_numpy(np.random.default_rng([77, 0]).permutation(count))
        halves = []
        for half, mine in (("first", order[: count // 2]), ("second", order[count // 2 :])):
            scores, more = member(count, realisation, 0, half, epochs)
            halves.append((scores[mine], w[mine]))
            spent += more
        strength, more = chosen(f"{count} stars, realisation {realisation}", halves, BALL)
        spent += more
        name = f"{members} networks, realisation {realisation}, round"
        figures, more = invert(name, sphere, w, mean, form="mean", roundness=strength)
        found.append((figures, spent + more))
        strengths.append(strength)
        print(f"# realisation {realisation}: roundness {strength:.3g}, {figures}", flush=True)
    for kind, some in (("first 3", found[:3]), ("fresh 3", found[3:]), ("all 6", found)):
        if some:
            text = f"{count} stars, mean score of {members} networks, roundness by halves, mean of {kind}"
            rows(bench, text, some, BEST, HIGH)
    label = f"Plummer, {count} stars: roundness that the halves choose, least"
    bench.row(label, min(strengths), peer=f"largest {max(strengths):.3g}")


def _disc(bench: Bench, count: int, epochs: int) -> None:
    """Isothermal stars in a flattened mass: the density of the mass, with and without the prior."""
    ball = Ball((0.0, 0.0, 0.0), 3.0)
    shape, sigma = (0.5, 0.8), 0.37
    mass = MiyamotoNagai(1.0 / G, *shape)
    model = RotatingIsothermal(mass, 0.0, sigma, ball)

    def work(folder: Path) -> dict[str, Any]:
        torch.set_num_threads(1)
        begin = cpu_seconds()
        w = model.sample(count, 11)
        halves, scores = [], torch.zeros_like(w)
        for number, mine in enumerate(torch.arange(count).split(count // 2)):
            own = w[mine]
            training = TRAINING.model_copy(update={"epochs": epochs})
            train, held = split(len(own), training.validation_fraction, number)
            network = build_model("score", SCORE, ball, own[train], seed=number)
            fit(network, objective("score"), own[train].float(), own[held].float(), training, seed=number)
            with torch.no_grad():
                every = torch.cat([network.score(chunk) for chunk in w.split(16_384)]).double()
            halves.append((every[mine], own))
            scores += every / 2
        x = model.sample(8192, 12)[:, :3]
        x = x[(x.norm(dim=1) > 0.3) & (x.norm(dim=1) < 1.5)]
        truth = mass.mass_density(x)
        strength = choose_roundness(*halves, POTENTIAL, seed=0, ball=ball)
        given = {"none": 0.0, "halves": strength, "strong": 100.0}
        figures = {"roundness": strength}
        for name, roundness in given.items():
            settings = POTENTIAL.model_copy(update={"roundness": roundness})
            density = fit_potential(scores, w, settings, seed=0, ball=ball).mass_density(x)
            figures[name] = float(((density - truth).square().sum() / truth.square().sum()).sqrt())
        return {**figures, "seconds": cpu_seconds() - begin}

    models = [recipe(SCORE), recipe(TRAINING), epochs]
    task = {
        "what": "flattened mass",
        "stars": count,
        "shape": shape,
        "sigma": sigma,
        "ball": ball.radius,
        "potential": POTENTIAL.model_dump(mode="json"),
        "recipe": models,
    }
    found, _ = part(task, work)
    seconds = found["seconds"]
    what = f"isothermal stars in a flattened disc, {count} stars"
    bench.row(f"{what}: roundness that the halves choose", found["roundness"], cpu_seconds=seconds)
    for name, text in (("none", "no prior"), ("halves", "that roundness"), ("strong", "a roundness of 100")):
        bench.row(f"{what}, {text}: density L2", found[name], cpu_seconds=seconds)
    ratio = found["halves"] / found["none"]
    limit = None if bench.quick else 1.05
    bench.row(f"{what}: density L2 over that of no prior", ratio, bar=limit, cpu_seconds=seconds)


def measure(bench: Bench) -> None:
    torch.set_num_threads(1)
    count, epochs, members = (2**14, 8, 2) if bench.quick else (2**17, 12, MEMBERS)
    _disc(bench, count, epochs)
    _sphere(bench, count, epochs, members)

"""What one member of an ensemble does: stars in, a trained model, a field, and its values at the places.

`run_member` is called in a process of its own by the ensemble engine; everything it needs comes from the
run directory and its context, everything it leaves lies in its folder.
"""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from galray.catalog import ShardStore, observer_of
from galray.catalog.mirror import place_of
from galray.config import RunConfig
from galray.efficiency_maps import DUST_CELLS_KPC, save_map, star_counts
from galray.ensemble import bootstrap_indices, report_progress, split_indices
from galray.errors import GalrayError
from galray.gravity import (
    DustField,
    Kernel,
    fit_dust,
    fit_potential,
    least_squares,
    save_field,
    smoothed_density,
)
from galray.member_stars import (
    member_config,
    member_states,
    noisy_states,
    patch_bootstrap,
    sightline_states,
)
from galray.phasespace import (
    Ball,
    build_model,
    completed_stars,
    posterior_stars,
    project_out,
    run_checks,
    save_model,
)
from galray.phasespace.models import empty_model
from galray.provenance import write_atomic
from galray.results import Places

__all__ = [
    "evaluate",
    "load_evaluation",
    "places_of",
    "require_stars",
    "run_member",
]


def places_of(config: RunConfig, store: ShardStore) -> Places:
    """The places of a run: the same in every process, from its configuration and its store."""
    kernel = Kernel.from_settings(config.gravity.kernel)
    assert store.ball is not None  # without one only the vertical inversion runs
    return Places(config.places, store.frame, store.ball.center, store.ball.radius, kernel.reach)


MAX_WEIGHTS_PER_STAR = 30
"""Held-out stars stop a network with more weights than stars before it memorises them; not beyond this."""


def require_stars(config: RunConfig, store: ShardStore, family: str) -> str:
    """Refuse to train what the stars cannot determine, before hours are spent on it.

    Returns:
        A warning where the model has more weights than stars; empty where all is well.

    Raises:
        GalrayError: There are fewer stars than splines of the potential, or far fewer than weights.
    """
    assert store.ball is not None
    ball = Ball(store.ball.center, store.ball.radius)
    model = empty_model(family, getattr(config, family), ball)
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    held_out = getattr(config.training, family).validation_fraction
    stars = int(store.num_rows * (1 - held_out))
    splines = math.prod(config.gravity.potential.splines)
    if store.num_rows < splines:
        raise GalrayError(
            f"{family}: {store.num_rows:,} stars for {splines:,} splines of the potential",
            "take more stars, or fewer gravity.potential.base_splines",
        )
    text = f"{family}: {stars:,} training stars for {weights:,} weights"
    if stars * MAX_WEIGHTS_PER_STAR < weights:
        raise GalrayError(text, f"take more stars, or smaller hidden layers in [{family}]")
    return f"{text}; expect wide errors" if stars < weights else ""


def with_observer(model_settings: Any, store: ShardStore) -> Any:
    """A model's settings, with the Sun as the observer where one is needed and none is named."""
    if getattr(model_settings, "missing_rv", "") == "marginalise" and model_settings.sun_position is None:
        return model_settings.model_copy(update={"sun_position": observer_of(store)[:3]})
    noise = model_settings.noise
    if noise.treatment == "ignore" or noise.observer is not None:
        return model_settings
    noise = noise.model_copy(update={"observer": observer_of(store)})
    return model_settings.model_copy(update={"noise": noise})


def split_stars(states: np.ndarray, fraction: float, spec: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Training and held-out stars of a member, the training stars resampled where it asks for it."""
    train_rows, validation_rows = split_indices(len(states), fraction, spec["streams"]["split"])
    if spec["bootstrap"] and not spec.get("variation", {}).get("patches"):
        # Training and validation are split first: a star drawn twice never stands on both sides.
        train_rows = train_rows[bootstrap_indices(len(train_rows), spec["streams"]["bootstrap"])]
    train, validation = (torch.from_numpy(states[np.sort(rows)]) for rows in (train_rows, validation_rows))
    return train, validation


def run_member(spec: dict[str, Any], folder: str, context: dict[str, Any]) -> dict[str, Any]:
    """Train one model, turn it into gravity, evaluate it; leaves everything in `folder`.

    Arguments:
        spec: The member, as of `MemberSpec.to_dict`; its family is ``flow`` or ``score``.
        folder: Where to write the model, the field, the curve, the checks and the evaluation.
        context: ``config`` (JSON of the run configuration), ``store`` (path).

    Returns:
        Figures of the member for its result: best held-out loss, epochs, seconds of each step.
    """
    from galray import training

    config = member_config(RunConfig.model_validate(context["config"]), spec)
    store = ShardStore(context["store"], config.catalog.storage.signed)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    family = spec["family"]
    settings = getattr(config.training, family)
    model_settings = with_observer(getattr(config, family), store)
    deconvolve = model_settings.noise.treatment == "deconvolve"
    marginalise = family == "flow" and model_settings.missing_rv == "marginalise"
    begin = time.perf_counter()

    states = noisy_states(store, spec) if deconvolve else member_states(store, spec)
    patches = spec.get("variation", {}).get("patches")
    train, validation = split_stars(states, settings.validation_fraction, spec)
    seed = spec["streams"]["training"]

    assert store.ball is not None
    ball = Ball(store.ball.center, store.ball.radius)
    model = build_model(family, model_settings, ball, train, seed=seed)
    if marginalise:
        others = split_stars(sightline_states(store, spec), settings.validation_fraction, spec)
        sun = model_settings.sun_position
        train, validation = (
            project_out(torch.cat([a.double(), b]), torch.arange(len(a) + len(b)) < len(a), sun).float()
            for a, b in zip((train, validation), others, strict=True)
        )
    selection = patch_bootstrap(ball, patches, spec["streams"]["bootstrap"]) if patches else None
    curve: list[dict[str, Any]] = []

    def on_epoch(row: dict[str, Any]) -> None:
        curve.append(row)
        write_atomic(target / "curve.json", curve)
        report_progress(folder, 0.9 * row["epoch"] / settings.epochs, f"{family} epoch {row['epoch']}")

    if settings.max_workers > 1:
        result = training.fit_distributed(
            family,
            model,
            train,
            validation,
            settings,
            seed=seed,
            storage=place_of(target, config.catalog.storage.signed),
            name="checkpoint",
            curve="curve.json",
            labels=config.ensemble.labels,
        )
    else:
        result = training.fit(
            model,
            training.objective(family, model_settings, selection=selection),
            train,
            validation,
            settings,
            seed=seed,
            checkpoint_dir=target / "checkpoint",
            on_epoch=on_epoch,
        )
    write_atomic(target / "curve.json", result.curve)
    save_model(model, target / "model")
    shutil.rmtree(target / "checkpoint", ignore_errors=True)  # of use until the weights are safe, and large
    trained = time.perf_counter()

    # Gravity is fitted where the stars of f are, not where their errors put them.
    stars = train
    if deconvolve:
        stars = posterior_stars(model, train, model_settings.noise, seed=seed)
    elif marginalise:
        stars = completed_stars(model, train, model_settings.sun_position, seed=seed)
    weights = None if selection is None else selection.weight_and_gradient(stars[:, :3].double())[0].numpy()
    field = field_of_model(model, stars, config, seed, weights)
    save_field(field, target / "field")
    if isinstance(field, DustField):
        save_map(field.efficiency_map(star_counts(store, DUST_CELLS_KPC)), target / "dust.safetensors")
    inverted = time.perf_counter()

    kernel = Kernel.from_settings(config.gravity.kernel)
    evaluate(field, places_of(config, store), kernel, target / "evaluation.safetensors")
    checks = run_checks(model, validation.double(), seed=seed)
    if family == "flow":
        checks |= least_squares_check(model, field, places_of(config, store), config, seed)
    write_atomic(target / "checks.json", checks)
    return {
        "best": result.best,
        "epochs": result.epochs,
        "stars": len(states),
        "stars_per_second": result.stars_per_second,
        "train_seconds": trained - begin,
        "gravity_seconds": inverted - trained,
        "evaluate_seconds": time.perf_counter() - inverted,
    }


def least_squares_check(
    model: Any, field: Any, places: Places, config: RunConfig, seed: int
) -> dict[str, dict[str, Any]]:
    """Does Φ agree with least squares over velocities drawn from the flow, at the Sun?"""
    settings = config.gravity.least_squares
    x = torch.from_numpy(places.x[:1])  # the first of the places is the Sun
    a = least_squares(
        model,
        x,
        num_velocities=settings.num_velocities,
        form=settings.form,
        clip=settings.clip,
        generator=torch.Generator().manual_seed(seed),
        batch_size=settings.batch_size,
    )
    ratio = float(a[0, 0] / field.acceleration(x)[0, 0])
    name = "a_R at the Sun: least squares over velocities / potential"
    return {name: {"value": ratio, "error": None, "expected": 1.0, "ok": abs(ratio - 1) < 0.1}}


def field_of_model(model: Any, w: Tensor, config: RunConfig, seed: int, weights: Any = None) -> Any:
    """Φ fitted to the model's score over the stars, weighed or all alike; with ε behind dust."""
    if config.gravity.dust is not None:
        return fit_dust(model, w, config.gravity.dust, seed=seed % 2**32, weights=weights)
    return fit_potential(model, w, config.gravity.potential, seed=seed % 2**32, weights=weights)


def evaluate(field: Any, places: Places, kernel: Kernel, path: Path | None = None) -> dict[str, np.ndarray]:
    """Acceleration and smoothed density at the places; ρ is NaN where the kernel leaves the ball.

    Returns:
        ``acceleration`` (N, 3) in (km/s)²/kpc and ``density`` (N,) in Msun/kpc³, float64.
    """
    from safetensors.numpy import save

    acceleration = np.asarray(field.acceleration(torch.from_numpy(places.x)).detach())
    density = np.full(len(places.x), np.nan)
    inside = places.density_rows
    density[inside] = np.asarray(smoothed_density(field, torch.from_numpy(places.x[inside]), kernel).detach())
    if not (np.isfinite(acceleration).all() and np.isfinite(density[inside]).all()):
        raise GalrayError(
            "the field is not finite at every place", "lower the learning rate, or look at the training curve"
        )
    arrays = {"acceleration": np.ascontiguousarray(acceleration), "density": density}
    if path is not None:
        write_atomic(path, save(arrays))
    return arrays


def load_evaluation(path: Path) -> dict[str, np.ndarray]:
    """What `evaluate` wrote.

    Raises:
        GalrayError: The file is absent or broken.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(path)
        return {name: arrays[name] for name in ("acceleration", "density")}
    except (SafetensorError, OSError, KeyError) as error:
        raise GalrayError(
            f"{path}: cannot be read: {error}",
            f"delete the folder {path.parent} and run again: what is missing is made anew",
        ) from None

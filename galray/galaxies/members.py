"""The fits of one galaxy: what each varies, and the function that does one."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from galray.catalog.mirror import local_copy
from galray.catalog.storage import is_url
from galray.dwarf.observation import Galaxy, Observation
from galray.dwarf.reading import read_observation
from galray.dwarf.settings import HaloFitSettings
from galray.ensemble import MemberSpec, bootstrap_indices
from galray.errors import GalrayError
from galray.galaxies.config import DwarfConfig, MemberSettings
from galray.provenance import content_hash

if TYPE_CHECKING:
    from galray.dwarf import HaloPosterior

__all__ = ["COMPARISON", "design", "fit_member", "load_posterior", "observe", "variant_settings", "variants"]

COMPARISON = "core or cusp"
"""Name of the member that compares cored with cuspy haloes on held-out stars."""


def observe(config: DwarfConfig) -> Observation:
    """The stars of a configuration: read from its files, which may lie at URLs, or drawn from its mock.

    Raises:
        GalrayError: Bad data, or no such model.
    """
    galaxy = config.galaxy.resolve(config.name)
    if config.mock is None:
        observation = _read(config, galaxy)
        try:  # what every fit would refuse must be said before one is started
            observation.tracers().check()
        except GalrayError as refused:
            raise GalrayError(f"{config.data.spectroscopy}: {refused.what}", refused.remedy) from None
        return observation
    from galray.mocks.dwarfs import gaia_challenge

    mock = config.mock
    model = gaia_challenge(mock.model)
    w = model.sample_noisy(mock.num_stars, mock.seed, velocity_error=mock.velocity_error).numpy()
    v = w[:, 3:]
    moving: dict[str, Any] = {}
    error = np.full(len(w), mock.velocity_error)
    if config.data.proper_motions:
        moving = {"pm_x": v[:, 0], "pm_y": v[:, 1], "pm_x_error": error, "pm_y_error": error}
    return Observation(
        galaxy=replace(galaxy, name=f"mock {mock.model}"),
        x=w[:, 0],
        y=w[:, 1],
        velocity=v[:, 2],
        velocity_error=error,
        membership=np.ones(len(w)),
        account={"rows": len(w), "kept": len(w)},
        **moving,
    )


def _read(config: DwarfConfig, galaxy: Galaxy) -> Observation:
    """The stars of the configuration's files; those at URLs keep their names in messages and results."""
    data, urls = config.data, dict[str, str]()
    for key in ("spectroscopy", "photometry"):
        if is_url(url := getattr(data, key)):
            path = str(local_copy(url, config.storage))
            data, urls[path] = data.model_copy(update={key: path}), url

    def named(text: str) -> str:
        for path, url in urls.items():
            text = text.replace(path, url)
        return text

    try:
        observation = read_observation(data, galaxy)
    except GalrayError as refused:
        raise GalrayError(named(refused.what), refused.remedy) from None
    return replace(observation, sources={named(path): digest for path, digest in observation.sources.items()})


def variants(settings: MemberSettings) -> list[str]:
    """Names of the members that change one thing of the fit."""
    names = ["velocities"] if settings.velocities else []
    names += ["smoothness"] if settings.smoothness else []
    return names + [f"anisotropy {kind}" for kind in settings.anisotropies]


def variant_settings(fit: HaloFitSettings, variant: str) -> HaloFitSettings:
    """A fit's settings with the one thing changed that the variant is named for."""
    if variant == "velocities":
        other = "gaussian" if fit.likelihood.velocities != "gaussian" else "fourth_moment"
        return fit.model_copy(update={"likelihood": fit.likelihood.model_copy(update={"velocities": other})})
    if variant == "smoothness":
        freer = fit.halo.model_copy(update={"steepening_sd": 2 * fit.halo.steepening_sd})
        return fit.model_copy(update={"halo": freer})
    if variant.startswith("anisotropy "):
        kind = variant.removeprefix("anisotropy ")
        beta = type(fit.anisotropy).model_validate({"kind": kind})
        return fit.model_copy(update={"anisotropy": beta})
    if variant:
        raise ValueError(f"no variant '{variant}'")
    return fit


def design(config: DwarfConfig, observation: Observation, first: int = 0) -> list[MemberSpec]:
    """The members of a galaxy, the base first.

    Arguments:
        config: The galaxy's configuration.
        observation: Its stars, whose contents are part of the members' identity.
        first: Index of the first member.
    """
    fit = [config.fit.model_dump(mode="json"), config.members.longer]
    common = content_hash([*fit, _digest(observation), config.data.perspective])
    labels: list[tuple[str, int, int]] = [("", seed, 0) for seed in range(config.members.seeds)]
    labels += [("", 0, bootstrap) for bootstrap in range(1, config.members.bootstraps + 1)]
    labels += [(variant, 0, 0) for variant in variants(config.members)]
    if config.members.comparison:
        labels.append((COMPARISON, 0, 0))
    return [
        MemberSpec(
            first + place,
            f"{config.name}/{variant}" if variant else config.name,
            seed=seed,
            bootstrap=bootstrap,
            root_seed=config.seed,
            context_hash=common,
        )
        for place, (variant, seed, bootstrap) in enumerate(labels)
    ]


def fit_member(spec: dict[str, Any], folder: str, context: Mapping[str, Any]) -> dict[str, Any]:
    """Do one fit; the posterior's samples go to ``posterior.safetensors`` in the member's folder.

    Arguments:
        spec: `MemberSpec.to_dict`.
        folder: Where it may write.
        context: ``configs``: configuration of each galaxy by name, as plain values; ``observations``: its
            stars, which the driver has read, since no two nodes need see the same disk.

    Returns:
        Diagnostics of the sampling, ``rho150``, ``mass_half`` and CPU seconds.
    """
    from galray.dwarf import compare_haloes, fit_halo

    name, _, variant = str(spec["family"]).partition("/")
    config = DwarfConfig.model_validate(context["configs"][name])
    observation: Observation = context["observations"][name]
    settings = observation.adapted(config.fit, perspective=config.data.perspective)
    seed = int(spec["streams"]["training"]) % 2**31
    begin = time.process_time()
    if variant == COMPARISON:
        result = compare_haloes(observation.tracers(), settings, seed)
        found = {key: float(getattr(result, key)) for key in ("cored", "cuspy", "difference", "error")}
        return {"comparison": found, "cpu_seconds": time.process_time() - begin}
    settings = variant_settings(settings, variant)
    if spec["bootstrap"]:
        observation = resample(observation, spec)
    posterior = fit_halo(observation.tracers(), settings, seed)
    for _ in range(config.members.longer):
        if posterior.diagnostics["converged"]:
            break
        settings = _longer(settings)
        posterior = fit_halo(observation.tracers(), settings, seed)
    _save(posterior, Path(folder) / "posterior.safetensors")
    half = float(posterior.half_radius)
    return {
        "diagnostics": posterior.diagnostics,
        "rho150": _quantiles(posterior.density([0.15])[:, 0]),
        "mass_half": _quantiles(posterior.mass([half])[:, 0]),
        "half_radius": half,
        "cpu_seconds": time.process_time() - begin,
    }


def _longer(settings: HaloFitSettings) -> HaloFitSettings:
    """The same fit with chains three times as long."""
    sampler = settings.sampler
    longer = sampler.model_copy(update={"warmup": 2 * sampler.warmup, "draws": 3 * sampler.draws})
    return settings.model_copy(update={"sampler": longer})


def resample(observation: Observation, spec: Mapping[str, Any]) -> Observation:
    """The observation with its stars drawn again with replacement, velocities and photometry apart."""
    seed = int(spec["streams"]["bootstrap"])
    rows = bootstrap_indices(len(observation), seed)
    light = bootstrap_indices(len(observation.light_x), seed + 1) if len(observation.light_x) else None
    return observation.select(rows, light)


def load_posterior(folder: Path) -> HaloPosterior:
    """Read the posterior that a member left in its folder."""
    from safetensors import safe_open

    from galray.dwarf import HaloPosterior

    with safe_open(folder / "posterior.safetensors", framework="numpy") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
        return HaloPosterior.from_arrays(arrays, file.metadata())


def _save(posterior: HaloPosterior, path: Path) -> None:
    from safetensors.numpy import save_file

    arrays, meta = posterior.to_arrays()
    save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, path, meta)


def _quantiles(values: np.ndarray) -> list[float]:
    return [float(value) for value in np.quantile(values, [0.025, 0.16, 0.5, 0.84, 0.975])]


def _digest(observation: Observation) -> str:
    """Hash of the numbers that a fit sees."""
    arrays = ["x", "y", "velocity", "velocity_error", "membership", "light_x", "light_y", "light_weight"]
    arrays += ["pm_x", "pm_y", "pm_x_error", "pm_y_error"]
    galaxy: Galaxy = observation.galaxy
    parts = [np.round(getattr(observation, name), 12).tolist() for name in arrays]
    return content_hash([json.dumps(parts), repr(galaxy)])

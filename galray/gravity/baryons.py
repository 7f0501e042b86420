"""The baryons that are subtracted from the total density, with their uncertainty.

The plane-parallel layers of McKee et al. 2015 or of a user's file, the known components of a mock, or
nothing. Baryons are smoothed with the same kernel as the total density before they are subtracted: a kernel
of 0.2 kpc halves the midplane density of the cold gas.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor

from galray.errors import GalrayError
from galray.gravity.poisson import Kernel, smooth
from galray.gravity.region import as_positions
from galray.gravity.settings import BaryonSettings
from galray.settings import Settings
from galray.units import MSUN_PC3

__all__ = ["Baryons", "Layer", "LayerTable", "build", "read_layers"]

# 1 hydrogen nucleus per cm³ in Msun/pc³, 1.4 m_H each (m_H in g, pc in cm, Msun in g)
_MSUN_PC3_PER_CM3 = 1.4 * 1.67353e-24 * 3.085678e18**3 / 1.98841e33


class Layer(Settings):
    """One plane-parallel component."""

    name: str
    kind: str = ""
    """``gas``, ``stars`` …, for the record."""
    density_msun_pc3: float | None = Field(default=None, ge=0)
    """Midplane density."""
    number_density_cm3: float | None = Field(default=None, ge=0)
    """Midplane density of hydrogen nuclei; the mass density is 1.4 m_H times it."""
    height_pc: float = Field(gt=0)
    """h of the shape."""
    shape: Literal["gauss", "exp", "sech2"]
    """exp(−(z/h)²), exp(−|z|/h) or sech²(z/h)."""
    relative_error: float = Field(default=0.0, ge=0, lt=1)
    """Uncertainty of the midplane density."""
    height_relative_error: float = Field(default=0.0, ge=0, lt=1)
    """Uncertainty of h at fixed column density."""
    scale_length_kpc: float | None = Field(default=None, gt=0)
    """Radial decline exp(−(R − R0)/R_d); absent: none."""

    @model_validator(mode="after")
    def _one_density(self) -> Layer:
        if (self.density_msun_pc3 is None) == (self.number_density_cm3 is None):
            raise ValueError(f"layer '{self.name}': give density_msun_pc3 or number_density_cm3, one of them")
        return self

    @property
    def midplane(self) -> float:
        """Midplane density in Msun/kpc³."""
        if self.density_msun_pc3 is not None:
            return self.density_msun_pc3 * MSUN_PC3
        assert self.number_density_cm3 is not None
        return self.number_density_cm3 * _MSUN_PC3_PER_CM3 * MSUN_PC3

    @property
    def column(self) -> float:
        """Column density of the whole layer in Msun/kpc²."""
        factor = math.sqrt(math.pi) if self.shape == "gauss" else 2.0
        return factor * self.midplane * self.height_pc / 1e3


class LayerTable(Settings):
    """A file of layers."""

    name: str
    reference: str = ""
    radius_kpc: float = Field(gt=0)
    """R0 at which the midplane densities hold."""
    layers: tuple[Layer, ...] = Field(min_length=1)


class Baryons:
    """Baryonic mass density, as a sum of layers, an analytic potential, or nothing.

    Arguments:
        name: What the report calls it.
        layers: The layers, each with the factors of a draw on its density and height.
        radius: R0 of the layers' radial decline, kpc.
        potential: A `galray.potentials.Potential`.
        factor: Factor on the potential's mass.
        relative_error: Its uncertainty.
    """

    def __init__(
        self,
        name: str,
        *,
        layers: tuple[Layer, ...] = (),
        radius: float = 8.122,
        potential: Any = None,
        factor: float = 1.0,
        relative_error: float = 0.0,
        scales: tuple[tuple[float, float], ...] = (),
    ) -> None:
        self.name = name
        self.layers = layers
        self.radius = radius
        self._potential = potential
        self._factor = factor
        self._relative_error = relative_error
        self._scales = scales or tuple((1.0, 1.0) for _ in layers)

    def mass_density(self, x: Any) -> Tensor:
        """ρ(x) in Msun/kpc³ at positions x (*, 3), shape (*)."""
        x = as_positions(x)
        total = torch.zeros(x.shape[:-1], dtype=torch.float64, device=x.device)
        if self._potential is not None:
            total = total + self._factor * self._potential.mass_density(x)
        cylindrical_radius = torch.hypot(x[..., 0], x[..., 1])
        for layer, (density, height) in zip(self.layers, self._scales, strict=True):
            t = x[..., 2].abs() / (layer.height_pc / 1e3 * height)
            if layer.shape == "gauss":
                profile = torch.exp(-t.square())
            elif layer.shape == "exp":
                profile = torch.exp(-t)
            else:
                profile = 4 * torch.exp(-2 * t) / (1 + torch.exp(-2 * t)).square()  # sech² without overflow
            if layer.scale_length_kpc is not None:
                profile = profile * torch.exp((self.radius - cylindrical_radius) / layer.scale_length_kpc)
            total = total + layer.midplane * density * profile
        return total

    def smoothed_density(self, x: Any, kernel: Kernel) -> Tensor:
        """(ρ*K)(x) in Msun/kpc³ at positions x (*, 3), shape (*)."""
        return smooth(self.mass_density, x, kernel)

    def draw(self, seed: Any) -> Baryons:
        """A version within the uncertainties: log-normal factors on columns and on heights.

        Arguments:
            seed: Anything that `numpy.random.default_rng` takes.
        """
        rng = np.random.default_rng(seed)

        def factor(relative: float) -> float:
            sigma2 = math.log1p(relative**2)
            return float(np.exp(math.sqrt(sigma2) * rng.normal() - sigma2 / 2))

        scales = []
        for layer in self.layers:
            mass, height = factor(layer.relative_error), factor(layer.height_relative_error)
            scales.append((mass / height, height))
        return Baryons(
            self.name,
            layers=self.layers,
            radius=self.radius,
            potential=self._potential,
            factor=factor(self._relative_error),
            relative_error=self._relative_error,
            scales=tuple(scales),
        )

    def error(self, x: Any, kernel: Kernel | None = None, *, num_draws: int = 32, seed: int = 0) -> Tensor:
        """Covariance of the (smoothed) density at positions x (n, 3) over draws, shape (n, n)."""
        draws = [self.draw([seed, i]) for i in range(num_draws)]
        rows = torch.stack(
            [d.mass_density(x) if kernel is None else d.smoothed_density(x, kernel) for d in draws]
        )
        return torch.cov(rows.T).reshape(rows.shape[1], rows.shape[1])

    def __repr__(self) -> str:
        return f"Baryons({self.name!r})"


def read_layers(path: str | Path) -> LayerTable:
    """Read a TOML file of layers.

    Raises:
        GalrayError: The file is absent, is not TOML, or a key is missing, unknown or impossible.
    """
    path = Path(path).expanduser()
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GalrayError(
            f"{path}: cannot be read: {error.strerror}",
            "give baryons.file the path of a TOML table of layers",
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise GalrayError(f"{path}: not a TOML file: {error}", "mend the line it names") from None
    try:
        return LayerTable.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "layers"
        raise GalrayError(
            f"{path}: {where}: {first['msg']}", "compare with galray/gravity/data/mckee2015.toml"
        ) from None


def build(settings: BaryonSettings, potential: Mapping[str, Any] | None = None) -> Baryons:
    """The baryons of a configuration.

    Arguments:
        settings: The [gravity.baryons] section.
        potential: A mock's own baryons (`Potential.to_dict`), used when the section names none.

    Raises:
        GalrayError: The file is broken, or a `potential` model has no potential.
    """
    if settings.model == "none":
        return Baryons("none")
    if settings.model == "potential":
        from galray.potentials import from_dict

        description = settings.potential or potential
        if description is None:
            raise GalrayError(
                "baryons.model = 'potential' without a potential",
                "give baryons.potential, or run on a mock, which brings its own",
            )
        return Baryons(
            "given potential", potential=from_dict(description), relative_error=settings.relative_error
        )
    path = (
        Path(str(resources.files("galray.gravity") / "data" / "mckee2015.toml"))
        if settings.model == "mckee2015"
        else Path(settings.file)
    )
    table = read_layers(path)
    return Baryons(table.name, layers=table.layers, radius=table.radius_kpc)
